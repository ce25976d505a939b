// The CPU kernel of switch_mixture_losses_backward: the gradients of losses that are not summed, of
// what the loss kept with `per_sample`.
//
// Sample b's factor comes only now, so it goes into the smaller operand of the product:
// dweight = sum_b dlogits[n, c, b] (grad[b] x[b]).
#include <torch/csrc/stable/ops.h>

#include <numeric>

#include "common/checks.h"
#include "common/cpu/gemm.h"
#include "mixture/boxed.h"
#include "mixture/cpu/problem.h"

namespace alrao::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A task has at least so many rows of the product: with 16, that of 8192 classes took a quarter
// longer.
constexpr int64_t kTaskRows = 128;

// The factors of the losses: 0 for samples that do not count, whose gradient is 0 whatever comes.
template <class T>
Buffer<T> counted_factors(const Tensor& grad, const T* marks) {
  const T* in = static_cast<const T*>(grad.const_data_ptr());
  Buffer<T> factors(grad.numel());
  for (int64_t b = 0; b < factors.size(); ++b) {
    factors.data()[b] = marks[b] == kNotCountedMark ? T(0) : in[b];
  }
  return factors;
}

// The samples' rows times their factors; zeros for a factor 0, also of rows that are not finite.
// Any other factor of such a row makes the product NaN: all clones are dead for it, and learn
// nothing.
template <class T>
void scale_rows(T* out, const T* in, const T* factors, int64_t rows, int64_t width) {
  for (int64_t b = 0; b < rows; ++b, in += width, out += width) {
    const T factor = factors[b];
    if (factor == 0) {
      std::fill_n(out, width, T(0));
    } else {
      for (int64_t d = 0; d < width; ++d) out[d] = in[d] * factor;
    }
  }
}

template <class T>
T dot(const T* a, const T* b, int64_t count) {
  T sums[kLaneTile] = {};
  int64_t i = 0;
  for (; i + kLaneTile <= count; i += kLaneTile) {
    for (int64_t lane = 0; lane < kLaneTile; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  for (; i < count; ++i) sums[0] += a[i] * b[i];
  return std::accumulate(sums, sums + kLaneTile, T(0));
}

template <class T>
void add_products(T* dweight, T* dbias, const Tensor& dlogits, const T* scaled, const T* grad,
                  int64_t samples, int64_t features) {
  const int64_t chunks = dlogits.size(0), rows = dlogits.size(1), ld = dlogits.size(2);
  const T* values = static_cast<const T*>(dlogits.const_data_ptr());
  const double flops = 2.0 * rows * samples * features;
  const int64_t rows_per_task = ceil_div(rows, task_count(flops, rows / kTaskRows));
  run_tasks(ceil_div(rows, rows_per_task), [&](int64_t i) {
    const int64_t row = i * rows_per_task, count = std::min(rows_per_task, rows - row);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t begin = chunk * ld, size = std::min(ld, samples - begin);
      const auto g = row_major<const T>(values + (chunk * rows + row) * ld, count, size, ld);
      gemm<T>(row_major(dweight + row * features, count, features, features), g,
              row_major(scaled + begin * features, size, features, features), chunk > 0);
      for (int64_t r = row; r < row + count; ++r) {
        const T sum = dot(values + (chunk * rows + r) * ld, grad + begin, size);
        dbias[r] = chunk > 0 ? dbias[r] + sum : sum;
      }
    }
  });
}

template <class T>
MixtureGradients run(const Tensor& dlogits, const Tensor& marks, const Tensor& dx, const Tensor& x,
                     const Tensor& grad) {
  const int64_t samples = x.size(0), features = x.size(1);
  const bool need_dx = dx.dim() == 2, need_dw = dlogits.dim() == 3;
  const int64_t clones = marks.size(0), rows = need_dw ? dlogits.size(1) : 0;
  auto gradients = empty_gradients<T>({samples, features, clones, rows / clones}, need_dx, need_dw);
  auto& [scaled_dx, dweight, dbias] = gradients;
  const T* mark = static_cast<const T*>(marks.const_data_ptr());
  const Buffer<T> counted = counted_factors(grad, mark);
  const T* factors = counted.data();
  if (need_dx) {
    scale_rows(static_cast<T*>(scaled_dx.mutable_data_ptr()),
               static_cast<const T*>(dx.const_data_ptr()), factors, samples, features);
  }
  if (!need_dw) return gradients;
  T* const dweights = static_cast<T*>(dweight.mutable_data_ptr());
  T* const dbiases = static_cast<T*>(dbias.mutable_data_ptr());
  if (samples == 0) {
    std::fill_n(dweights, dweight.numel(), T(0));
    std::fill_n(dbiases, dbias.numel(), T(0));
    return gradients;
  }
  const Tensor own = in_type<T>(x);
  const Buffer<T> scaled(samples * features);
  scale_rows(scaled.data(), static_cast<const T*>(own.const_data_ptr()), factors, samples,
             features);
  add_products(dweights, dbiases, dlogits, static_cast<const T*>(scaled.data()), factors, samples,
               features);
  // A clone that is dead for a sample that counts learns nothing.
  const int64_t own_rows = rows / clones;
  for (int64_t n = 0; n < clones; ++n, mark += samples) {
    bool any = false;
    for (int64_t b = 0; b < samples; ++b) any |= mark[b] == kDeadMark && factors[b] != 0;
    if (!any) continue;
    std::fill_n(dweights + n * own_rows * features, own_rows * features, T(0));
    std::fill_n(dbiases + n * own_rows, own_rows, T(0));
  }
  return gradients;
}

MixtureGradients losses_backward(const Tensor& dlogits, const Tensor& marks, const Tensor& dx,
                                 const Tensor& x, const Tensor& grad) {
  check_shape("grad", grad, {x.size(0)});
  const bool is_double = x.scalar_type() == ScalarType::Double;
  check_dtype("grad", grad, {is_double ? ScalarType::Double : ScalarType::Float});
  const Tensor factors = dense(grad);
  return is_double ? run<double>(dlogits, marks, dx, x, factors)
                   : run<float>(dlogits, marks, dx, x, factors);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) {
  m.impl("switch_mixture_losses_backward", &boxed_losses_backward<&losses_backward>);
}

}  // namespace alrao::cpu
