// All clones of a chunk of samples at once: logits, one kernel, the products for dx and dweight.
#include "mixture/cuda/problem.h"

namespace alrao::cuda {

template <class T>
Unfinished<T> run_joint(const NllProblem<T>& p) {
  using Compute = compute_t<T>;
  const auto& [samples, features, clones, classes] = p.size;
  const bool need_dx = p.options.need_dx, need_dw = p.options.need_dw;
  const int64_t rows = clones * classes, ld = p.row_distance(true);
  const int64_t bytes = ld * (sizeof(Compute) + sizeof(T) * (need_dx + need_dw));
  const int64_t chunk = p.chunk(bytes);

  const auto z = p.gemm.template empty<Compute>({chunk, ld});
  const auto g = p.gemm.template empty<T>({need_dw ? chunk : 0, ld});
  const auto rg = p.gemm.template empty<T>({need_dx ? chunk : 0, ld});
  // Copies without what is not finite: 0 times that would be NaN in the products.
  const auto finite_x = p.gemm.template empty<T>({need_dw ? samples : 0, features});
  const auto finite_weight = p.gemm.template empty<T>({need_dx ? rows : 0, features});
  T* const weight = need_dx ? data_of<T>(finite_weight) : nullptr;

  Unfinished<T> left;
  const int64_t full = samples / chunk, rest = samples % chunk;
  const auto parts_of = [&, clones = clones, classes = classes](int64_t count) {
    return joint_parts<T>(count, clones, classes, p.extras.any);
  };
  const int64_t parts = full * parts_of(chunk) + (rest > 0 ? parts_of(rest) : 0);
  left.memory = p.gemm.template empty<double>({2 * clones + 1, parts});
  left.parts = {data_of<double>(left.memory), parts};
  left.columns_memory = g;
  left.scale_dx = need_dx && p.norm_left() != nullptr;

  const auto weight_sum = p.weight_sum(rows, chunk);
  int64_t first_part = 0;
  for (int64_t first = 0; first < samples; first += chunk) {
    const int64_t count = std::min(chunk, samples - first);
    auto a = p.template chunk_arguments<JointArguments<T>>(z, true);
    a.first = first;
    a.chunk = count;
    p.logits(a.z, first, count, 0, true);
    a.target = p.target;
    a.norm = p.folded_norm();
    a.options = p.extras;
    a.g = need_dw ? data_of<T>(g) : nullptr;
    a.rg = need_dx ? data_of<T>(rg) : nullptr;
    a.out = left.parts;
    a.first_part = first_part;
    a.x = p.x_data();
    a.finite_x = need_dw ? data_of<T>(finite_x) : nullptr;
    if (first == 0) a.weight = {p.weight_data(), weight, rows * features};
    check_launch("mixture_joint", launch_mixture_joint(a, p.stream));
    first_part += parts_of(count);

    if (need_dx) {
      p.features_gradient(p.dx + first * features, row_major<const T>(a.rg, count, rows, ld),
                          weight);
    }
    if (need_dw) {
      p.add_weight_gradient(weight_sum, 0, row_major<const T>(a.g, count, rows, ld), a.finite_x,
                            first);
      if (p.dbias != nullptr) left.columns = {a.g, count, rows, ld, p.dbias, first > 0};
      // The last chunk's are the finishing kernel's.
      if (first + count < samples) {
        CombineArguments<T> sums{};
        sums.columns = left.columns;
        check_launch("mixture_combine", launch_mixture_combine(sums, p.stream));
      }
    }
  }
  return left;
}

#define ALRAO_INSTANTIATE(T) template Unfinished<T> run_joint(const NllProblem<T>&)
ALRAO_FOR_EVERY_TYPE(ALRAO_INSTANTIATE);

}  // namespace alrao::cuda
