// Clone after clone, and chunk after chunk of samples: the logits of one clone for one chunk are
// all that is held, and each clone's dweight is complete before the next one's begins.
#include "mixture/cuda/problem.h"

namespace alrao::cuda {

template <class T>
Unfinished<T> run_streamed(const NllProblem<T>& p) {
  using Compute = compute_t<T>;
  const auto& [samples, features, clones, classes] = p.size;
  const bool need_dx = p.options.need_dx, need_dw = p.options.need_dw;
  const int64_t ld = p.row_distance(false);
  // The gradient lies over the logits, row by row.
  constexpr int64_t kNarrower = sizeof(Compute) / sizeof(T);
  const int64_t bytes = (ld + (need_dx ? features : 0)) * sizeof(Compute);
  const int64_t chunk = p.chunk(bytes);

  const auto z = p.gemm.template empty<Compute>({chunk, ld});
  const auto term = p.gemm.template empty<Compute>({need_dx ? chunk : 0, features});
  const StateMemory<Compute> state(p.gemm, samples);
  const auto finite_x = p.template finite_copy<T>(p.x_data(), need_dw ? samples : 0, features);
  Unfinished<T> left;
  left.memory = p.gemm.template empty<double>({2 * clones + 1, samples});
  left.parts = {data_of<double>(left.memory), samples};
  left.columns_memory = z;
  const auto weight_sum = p.weight_sum(classes, chunk);

  for (int64_t clone = 0; clone < clones; ++clone) {
    for (int64_t first = 0; first < samples; first += chunk) {
      const int64_t count = std::min(chunk, samples - first);
      auto a = p.template chunk_arguments<RowArguments<T>>(z, false);
      a.clone = clone;
      a.first = first;
      a.chunk = count;
      p.logits(a.z, first, count, clone, false);
      a.target = p.target;
      a.norm = p.folded_norm();
      a.options = p.extras;
      a.need_gradient = need_dx || need_dw;
      a.state = state.get();
      a.out = left.parts;
      check_launch("mixture_rows", launch_mixture_rows(a, p.stream));

      const auto g = row_major(reinterpret_cast<const T*>(a.z), count, classes, ld * kNarrower);
      CombineArguments<T> sums{};
      if (need_dw) {
        p.add_weight_gradient(weight_sum, clone, g, data_of<const T>(finite_x), first);
        if (p.dbias != nullptr) {
          sums.columns = {g.data,   count, classes, g.row_stride, p.dbias + clone * classes,
                          first > 0};
        }
      }
      if (need_dx) {
        p.features_gradient(data_of<Compute>(term), g,
                            p.weight_data() + clone * classes * features);
        sums.term = data_of<const Compute>(term);
      }
      sums.state = a.state;
      sums.first = first;
      sums.chunk = count;
      sums.features = features;
      sums.total = p.dx;
      sums.is_first = clone == 0;
      sums.is_last = clone + 1 == clones;
      sums.norm = p.norm_left();
      check_launch("mixture_combine", launch_mixture_combine(sums, p.stream));
    }
  }
  return left;
}

#define ALRAO_INSTANTIATE(T) template Unfinished<T> run_streamed(const NllProblem<T>&)
ALRAO_FOR_EVERY_TYPE(ALRAO_INSTANTIATE);

}  // namespace alrao::cuda
