// Binds csrc's arithmetic of one element for the tests: arrays in, arrays out, one call an element.
// Built several times, each with a name of its own in ELEMENT_MATH (build.py); with
// ALRAO_CUDA_ON_CPU as the CUDA kernels see it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

#ifdef ALRAO_CUDA_ON_CPU
#include "mixture/cuda/rows.cuh"
#endif
#include "common/rounding.h"
#include "feature/adam.h"
#include "feature/master.h"
#include "feature/sgd.h"
#include "gradient/math.h"
#include "mixture/likelihood.h"
#include "mixture/math.h"
#include "switch/math.h"

namespace py = pybind11;
using namespace alrao;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// A copy of every array, all of one length: what an update writes.
template <class T, std::size_t kCount>
std::array<Array<T>, kCount> copies(const std::array<Array<T>, kCount>& arrays) {
  std::array<Array<T>, kCount> made;
  for (std::size_t i = 0; i < kCount; ++i) {
    if (arrays[i].size() != arrays[0].size()) throw std::invalid_argument("lengths differ");
    made[i] = Array<T>(arrays[i].size(), arrays[i].data());
  }
  return made;
}

// `rule` is none, first, torch or authors.
template <class T>
py::tuple sgd(const Array<T>& p, const Array<T>& g, const Array<T>& buf, const Array<T>& rate,
              const std::string& rule, bool nesterov, double momentum, double dampening,
              double weight_decay, double grad_factor) {
  auto [new_p, new_buf] = copies<T, 2>({p, buf});
  const SgdScalars<T> s{
      T(1), T(grad_factor), T(momentum), T(1 / momentum), T(1 - dampening), T(weight_decay)};
  const std::map<std::string, Momentum> rules{{"none", Momentum::kNone},
                                              {"first", Momentum::kFirst},
                                              {"torch", Momentum::kTorch},
                                              {"authors", Momentum::kAuthors}};
  const SgdRule how{rules.at(rule), nesterov, weight_decay != 0};
  T *const ps = new_p.mutable_data(), *const bufs = new_buf.mutable_data();
  for (py::ssize_t i = 0; i < new_p.size(); ++i) {
    sgd_element(ps[i], g.data()[i], bufs[i], rate.data()[i], s, how);
  }
  return py::make_tuple(new_p, new_buf);
}

template <bool AMSGRAD, class T>
void adam_loop(py::ssize_t count, T* p, const T* g, T* m, T* v, T* v_max, const T* rate,
               const AdamScalars<T>& s, Decay decay) {
  for (py::ssize_t i = 0; i < count; ++i) {
    adam_element<AMSGRAD>(p[i], g[i], m[i], v[i], v_max[i], rate[i], s, decay);
  }
}

// `decay` is none, gradient or weights.
template <class T>
py::tuple adam(const Array<T>& p, const Array<T>& g, const Array<T>& m, const Array<T>& v,
               const Array<T>& v_max, const Array<T>& rate, bool amsgrad, const std::string& decay,
               double beta1, double beta2, double step_factor, double root_factor, double eps,
               double weight_decay, double grad_factor) {
  auto [new_p, new_m, new_v, new_max] = copies<T, 4>({p, m, v, v_max});
  const AdamScalars<T> s{T(1),     T(grad_factor), T(beta1),       T(1 - beta1),
                         T(beta2), T(1 - beta2),   T(step_factor), T(root_factor),
                         T(eps),   T(weight_decay)};
  const std::map<std::string, Decay> decays{
      {"none", Decay::kNone}, {"gradient", Decay::kGradient}, {"weights", Decay::kWeights}};
  (amsgrad ? adam_loop<true, T> : adam_loop<false, T>)(new_p.size(), new_p.mutable_data(), g.data(),
                                                       new_m.mutable_data(), new_v.mutable_data(),
                                                       new_max.mutable_data(), rate.data(), s,
                                                       decays.at(decay));
  return py::make_tuple(new_p, new_m, new_v, new_max);
}

// The random bits of entries 8 * block, ..., 8 * block + 7.
Array<uint16_t> random_bits(int64_t block, int64_t step, uint64_t seed) {
  uint32_t words[4];
  philox(words, block, step, seed);
  Array<uint16_t> bits(8);
  for (int i = 0; i < 8; ++i) {
    bits.mutable_data()[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
  }
  return bits;
}

// The mixture over clones taken in one after the other: maximum, sum, and the likelihood's -log.
template <class T>
py::tuple mixture(const Array<T>& joints) {
  RunningMixture<T> running = empty_mixture<T>();
  for (py::ssize_t i = 0; i < joints.size(); ++i) take_in(running, joints.data()[i]);
  return py::make_tuple(running.max, running.sum, mixture_nll(running));
}

template <NormKind KIND>
double joined(const Array<double>& values, double order) {
  double sum = 0;
  for (py::ssize_t i = 0; i < values.size(); ++i)
    sum = norm_join<KIND>(sum, norm_term<KIND>(values.data()[i], order));
  return sum;
}

double norm_of(const Array<double>& values, double order) {
  const Norm norm = norm_of_order(order);
  switch (norm.kind) {
    case NormKind::kTwo:
      return norm_of_sum(joined<NormKind::kTwo>(values, order), norm);
    case NormKind::kOne:
      return norm_of_sum(joined<NormKind::kOne>(values, order), norm);
    case NormKind::kLargest:
      return norm_of_sum(joined<NormKind::kLargest>(values, order), norm);
    default:
      return norm_of_sum(joined<NormKind::kPower>(values, order), norm);
  }
}

// Under names that end in the type's.
template <class T>
void bind(py::module_& m, const std::string& type) {
  m.def(("sgd_" + type).c_str(), &sgd<T>);
  m.def(("adam_" + type).c_str(), &adam<T>);
  m.def(("mixture_" + type).c_str(), &mixture<T>);
  m.def(("class_log_likelihood_" + type).c_str(), py::vectorize([](T logit, T max, T sum) {
          return ClassesOptions().log_likelihood(logit, LogitSums<T>{max, sum});
        }));
  m.def(("is_alive_" + type).c_str(), py::vectorize([](T value) { return is_alive(value); }));
#ifdef ALRAO_CUDA_ON_CPU
  // Of parts, each a largest logit, its class, and the sum of exp(logit - largest).
  m.def(("merge_" + type).c_str(),
        [](const Array<T>& largest, const Array<int32_t>& places, const Array<T>& sums) {
          auto all = cuda::Softmax<T>::none();
          for (py::ssize_t i = 0; i < largest.size(); ++i) {
            all = cuda::Merge()(
                all, cuda::Softmax<T>{{largest.data()[i], places.data()[i], 0}, sums.data()[i]});
          }
          return py::make_tuple(all.peak.value, all.peak.place, all.sum);
        });
#endif
}

}  // namespace

PYBIND11_MODULE(ELEMENT_MATH, m) {
  bind<float>(m, "float32");
  bind<double>(m, "float64");

  m.def("integer_power",
        py::vectorize([](double base, int64_t exponent) { return integer_power(base, exponent); }));
  m.def("float_to_bf16", py::vectorize([](float x) { return float_to_bf16(x); }));
  m.def("bf16_to_float", py::vectorize([](uint16_t x) { return bf16_to_float(x); }));
  m.def("float_to_fp16", py::vectorize([](float x) { return float_to_fp16(x); }));
  m.def("fp16_to_float", py::vectorize([](uint16_t x) { return fp16_to_float(x); }));
  m.def("float_to_bf16_stochastic", py::vectorize([](float x, uint32_t random16) {
          return float_to_bf16_stochastic(x, random16);
        }));
  m.def("float_to_fp16_stochastic", py::vectorize([](float x, uint32_t random16) {
          return float_to_fp16_stochastic(x, random16);
        }));
  m.def("master_value_bf16", py::vectorize([](float master, uint16_t param) {
          return master_value(master, BFloat16{param});
        }));
  m.def("master_value_fp16", py::vectorize([](float master, uint16_t param) {
          return master_value(master, Float16{param});
        }));
  m.def("random_bits", &random_bits);

  m.def("norm_of", &norm_of);
  m.def("clip_factor",
        py::vectorize([](double norm, double max_norm) { return clip_factor(norm, max_norm); }));

  m.def("switch_evidence", py::vectorize([](double x) { return switch_evidence(x); }));
  m.def("switch_observed", py::vectorize([](double nll_sum, double count, bool mean) {
          return switch_observed(nll_sum, count, mean);
        }));
  m.def("switch_lag", py::vectorize([](double evidence, double largest) {
          return switch_lag(evidence, largest);
        }));
  m.def("switch_mass", py::vectorize([](double logw, double lag, double reference) {
          return switch_mass(logw, lag, reference);
        }));
  m.def("switch_share", &switch_share);
  m.def("switch_redistribute", [](const Array<double>& unstable, const Array<double>& stable,
                                  double share, int64_t t, double theta) {
    auto [first, second] = copies<double, 2>({unstable, stable});
    for (py::ssize_t i = 0; i < first.size(); ++i) {
      const SwitchMass mass =
          switch_redistribute({first.data()[i], second.data()[i]}, share, t, theta);
      first.mutable_data()[i] = mass.unstable;
      second.mutable_data()[i] = mass.stable;
    }
    return py::make_tuple(first, second);
  });
}
