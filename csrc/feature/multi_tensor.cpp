#include "feature/multi_tensor.h"

#include <algorithm>
#include <utility>

#include "feature/optimizer.h"

namespace alrao {
namespace {

// Small tensors cost this many entries' time on top of their own.
constexpr int64_t kPieceOverhead = 64;
// Entries per task: enough tasks to balance the threads, each large enough to hide its own
// overhead.
constexpr int64_t kTasks = 64, kSmallestTask = 1024, kLargestTask = 16384;
// Threads with fewer entries than this are not worth waking.
constexpr int64_t kSerialEntries = 32768;

// "exp_avgs[3]": how messages name a tensor.
std::string entry(const char* list, int64_t t) {
  return std::string(list) + "[" + std::to_string(t) + "]";
}

}  // namespace

MultiTensor::MultiTensor(OpNames names, TensorLists lists)
    : names_(std::move(names)), lists_(std::move(lists)) {
  check_lists();
  const auto num_params = static_cast<int64_t>(lists_.params.size());
  records_.reserve(num_params);
  seen_.reserve(num_params * (num_states() + 4));
  for (int64_t t = 0; t < num_params; ++t) {
    check_strided(entry("params", t), lists_.params[t].get());
    see(lists_.params[t]);
  }
  for (int64_t t = 0; t < num_params; ++t) add_record(t);
  shape_starts_.push_back(static_cast<int64_t>(shapes_.size()));
  see(*lists_.steps);
  steps_ = static_cast<int64_t*>(data_of(lists_.steps->get()));
  check_overlap();
  if (lists_.steps->is_cpu()) cut();
}

void MultiTensor::check_lists() const {
  const size_t num_params = lists_.params.size();
  const auto check_length = [&](const char* name, size_t length, bool may_be_empty) {
    if (length != num_params && !(may_be_empty && length == 0))
      fail(op(), name, " has ", length, " entries, expected ", num_params,
           ", one for each of params", may_be_empty ? ", or none" : "");
  };
  for (size_t k = 0; k < lists_.states.size(); ++k)
    check_length(names_.states[k], lists_.states[k].size(), false);
  check_length("masters", lists_.masters.size(), true);
  check_length("averages", lists_.averages.size(), true);
  check_length("rates", lists_.rates.size(), false);
  check_length("inners", lists_.inners.size(), false);
  check_length("seeds", lists_.seeds.size(), true);

  const AtenTensorHandle steps = lists_.steps->get();
  if (dtype_of(steps) != aoti_torch_dtype_int64() || !lists_.steps->is_contiguous() ||
      numel_of(steps) != static_cast<int64_t>(num_params))
    fail(op(), "steps has dtype ", dtype_text(dtype_of(steps)), " and ", text(shape_of(steps)),
         ", expected a contiguous int64 tensor with ", num_params,
         " entries, one for each of params");
}

void MultiTensor::check_states(int64_t expected, const char* because) const {
  if (num_states() == expected || records_.empty()) return;
  const bool missing = num_states() < expected;
  fail(op(), names_.states[missing ? num_states() : expected],
       missing ? " is empty, expected one for each of params"
               : " has entries, expected an empty list",
       " because ", because);
}

void MultiTensor::check_strided(const std::string& name, AtenTensorHandle tensor) const {
  if (!is_strided(tensor))
    fail(op(), name, " is sparse or of another layout, expected an ordinary strided tensor");
}

void MultiTensor::see(const Tensor& tensor) {
  const AtenTensorHandle handle = tensor.get();
  seen_.push_back({handle, data_of(handle), numel_of(handle)});
}

void MultiTensor::add_record(int64_t t) {
  const AtenTensorHandle param = lists_.params[t].get();
  const auto check_device = [&](const std::string& name, AtenTensorHandle tensor) {
    check_strided(name, tensor);
    int32_t type, index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &index));
    if (t == 0 && tensor == param) {
      device_type_ = type;
      device_index_ = index;
    }
    if (type != device_type_ || index != device_index_)
      fail(op(), name, " is on another device than params[0], expected all tensors on one device");
  };

  check_device(entry("params", t), param);
  if (t == 0) check_device("steps", lists_.steps->get());
  const Shape shape = shape_of(param);
  const DtypeName* dtype = find_dtype(dtype_of(param));
  if (!dtype)
    fail(op(), entry("params", t),
         " has an unsupported dtype, expected float64, float32, bfloat16 or float16");
  if (!is_dense(shape.sizes, shape.strides, shape.dim))
    fail(op(), entry("params", t), " has ", text(shape),
         ", expected a dense tensor without overlap or gaps: use a copy made by .contiguous()");
  dtypes_.push_back(dtype->code);
  shape_starts_.push_back(static_cast<int64_t>(shapes_.size()));
  shapes_.insert(shapes_.end(), shape.sizes, shape.sizes + shape.dim);
  shapes_.insert(shapes_.end(), shape.strides, shape.strides + shape.dim);

  const auto check_like_param = [&](const std::string& name, AtenTensorHandle tensor) {
    const Shape own = shape_of(tensor);
    if (!same_sizes(own, shape) || !same_layout(own, shape))
      fail(op(), name, " has ", text(own), ", expected those of ", entry("params", t), ", ",
           text(shape), ": make it by torch.empty_like or zeros_like");
  };

  FeatureRecord record{};
  record.param = data_of(param);
  record.param_dtype = dtype->dtype;
  record.numel = numel_of(param);

  for (size_t k = 0; k < lists_.states.size(); ++k) {
    const Tensor& state = lists_.states[k][t];
    const std::string name = entry(names_.states[k], t);
    check_device(name, state.get());
    check_like_param(name, state.get());
    const DtypeName* own = find_dtype(dtype_of(state.get()));
    if (!own || (own != dtype && own->dtype != Dtype::kFloat32))
      fail(op(), name, " has dtype ", dtype_text(dtype_of(state.get())), ", expected ", dtype->name,
           " as ", entry("params", t), ", or float32");
    record.states[k] = data_of(state.get());
    record.state_dtypes[k] = own->dtype;
    see(state);
  }

  if (!lists_.masters.empty() && numel_of(lists_.masters[t].get()) > 0) {
    const Tensor& master = lists_.masters[t];
    const std::string name = entry("masters", t);
    check_device(name, master.get());
    check_like_param(name, master.get());
    if (!is_low_precision(dtype->dtype) || dtype_of(master.get()) != aoti_torch_dtype_float32())
      fail(
          op(), name, " has dtype ", dtype_text(dtype_of(master.get())), " for a ", dtype->name,
          " parameter, expected float32 for a bfloat16 or float16 parameter, else an empty tensor");
    record.master = static_cast<float*>(data_of(master.get()));
    see(master);
  }

  if (!lists_.averages.empty() && numel_of(lists_.averages[t].get()) > 0) {
    const Tensor& average = lists_.averages[t];
    const std::string name = entry("averages", t);
    check_device(name, average.get());
    check_like_param(name, average.get());
    const bool is_double = dtype->dtype == Dtype::kFloat64;
    if (dtype_of(average.get()) !=
        (is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32()))
      fail(op(), name, " has dtype ", dtype_text(dtype_of(average.get())), " for a ", dtype->name,
           " parameter, expected ", is_double ? "float64" : "float32");
    record.average = data_of(average.get());
    see(average);
  }

  const Tensor& rate = lists_.rates[t];
  check_device(entry("rates", t), rate.get());
  const DtypeName* rate_dtype = find_dtype(dtype_of(rate.get()));
  if (!rate_dtype || !(rate_dtype->dtype == Dtype::kFloat32 ||
                       (rate_dtype->dtype == Dtype::kFloat64 && dtype->dtype == Dtype::kFloat64)))
    fail(op(), entry("rates", t), " has dtype ", dtype_text(dtype_of(rate.get())),
         ", expected float32", dtype->dtype == Dtype::kFloat64 ? " or float64" : "");
  if (rate.dim() != 1 || !rate.is_contiguous())
    fail(op(), entry("rates", t), " has ", text(shape_of(rate.get())),
         ", expected a contiguous vector, one rate per feature");
  record.rates = data_of(rate.get());
  record.rate_dtype = rate_dtype->dtype;
  record.period = rate.numel();
  record.inner = lists_.inners[t];
  see(rate);
  const int64_t inner = record.inner, period = record.period, numel = record.numel;
  if (inner < 1) fail(op(), entry("inners", t), " is ", inner, ", expected at least 1");
  // Whole features only; written so that inner * period cannot overflow.
  const bool fits =
      period > 0 && (period == 1 || (numel % inner == 0 && numel / inner % period == 0));
  if (numel > 0 && !fits)
    fail(
        op(), entry("rates", t), " has ", period, " entries and ", entry("inners", t), " is ",
        inner, ", which does not divide ", entry("params", t), " of ", numel, " elements, ",
        text(shape),
        ": expected rates with as many entries as the parameter has features, and inner the stride "
        "of their dimension");

  record.stochastic = !lists_.seeds.empty() && !record.master && is_low_precision(dtype->dtype);
  if (record.stochastic) record.seed = static_cast<uint64_t>(lists_.seeds[t]);
  records_.push_back(record);
}

// Threads write different tensors at the same time.
void MultiTensor::check_overlap() const {
  std::vector<std::pair<const char*, const char*>> ranges;
  const auto add = [&](const Tensor& tensor) {
    const auto* begin = static_cast<const char*>(data_of(tensor.get()));
    const auto bytes = numel_of(tensor.get()) * static_cast<int64_t>(tensor.element_size());
    if (bytes > 0) ranges.emplace_back(begin, begin + bytes);
  };
  for (const Tensor& param : lists_.params) add(param);
  for (const auto& states : lists_.states)
    for (const Tensor& state : states) add(state);
  for (const Tensor& master : lists_.masters) add(master);
  for (const Tensor& average : lists_.averages) add(average);
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i)
    if (ranges[i].first < ranges[i - 1].second)
      fail(op(),
           "two of params, their states, masters and averages share memory, expected each tensor "
           "once");
}

void MultiTensor::cut() {
  int64_t total = 0;
  for (const FeatureRecord& record : records_) total += record.numel + kPieceOverhead;
  // A power of two, so that kernels see multiples of their block.
  int64_t task = kSmallestTask;
  while (task < kLargestTask && task * kTasks < total) task *= 2;
  serial_tasks_ = kSerialEntries / task;

  int64_t cost = 0;
  task_starts_.push_back(0);
  for (size_t t = 0; t < records_.size(); ++t) {
    for (int64_t begin = 0; begin < records_[t].numel; begin += task) {
      const int64_t end = std::min(begin + task, records_[t].numel);
      pieces_.push_back({static_cast<int64_t>(t), begin, end});
      cost += end - begin + kPieceOverhead;
      if (cost >= task) {
        task_starts_.push_back(static_cast<int64_t>(pieces_.size()));
        cost = 0;
      }
    }
  }
  if (cost > 0) task_starts_.push_back(static_cast<int64_t>(pieces_.size()));
}

Shape MultiTensor::param_shape(size_t t) const {
  const int64_t* sizes = shapes_.data() + shape_starts_[t];
  const int64_t dim = (shape_starts_[t + 1] - shape_starts_[t]) / 2;
  return {sizes, sizes + dim, dim};
}

bool MultiTensor::unchanged() const {
  for (size_t t = 0; t < records_.size(); ++t) {
    const AtenTensorHandle param = seen_[t].handle;
    const Shape now = shape_of(param), then = param_shape(t);
    if (data_of(param) != seen_[t].data || !same_sizes(now, then) || !same_layout(now, then) ||
        dtype_of(param) != dtypes_[t])
      return false;
  }
  for (size_t i = records_.size(); i < seen_.size(); ++i)
    if (data_of(seen_[i].handle) != seen_[i].data || numel_of(seen_[i].handle) != seen_[i].numel)
      return false;
  return true;
}

bool MultiTensor::is_here(AtenTensorHandle tensor) const {
  int32_t type, index = device_index_;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &type));
  if (type != device_type_) return false;
  // There is one CPU.
  static const int32_t cpu = aoti_torch_device_type_cpu();
  if (type != cpu) TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &index));
  return index == device_index_;
}

int64_t MultiTensor::bind(const std::vector<AtenTensorHandle>& grads) {
  if (grads.size() != records_.size())
    fail(op(), "grads has ", grads.size(), " entries, expected ", records_.size(),
         ", one for each of params");
  copies_.clear();
  for (size_t t = 0; t < grads.size(); ++t) {
    AtenTensorHandle grad = grads[t];
    const int64_t number = static_cast<int64_t>(t);
    if (!is_strided(grad))
      fail(op(), entry("grads", number),
           " is sparse, expected an ordinary (dense) gradient: sparse=False in the embedding, or "
           "grad.to_dense()");
    if (!is_here(grad))
      fail(op(), entry("grads", number),
           " is on another device than params, expected the same device");
    if (dtype_of(grad) != dtypes_[t])
      fail(op(), entry("grads", number), " has dtype ", dtype_text(dtype_of(grad)), ", expected ",
           dtype_text(dtypes_[t]), " as ", entry("params", number));
    const Shape own = shape_of(grad), expected = param_shape(t);
    if (!same_sizes(own, expected))
      fail(op(), entry("grads", number), " has ", text(own), ", expected the shape of ",
           entry("params", number), ", ", text(expected));
    if (!same_layout(own, expected)) {
      AtenTensorHandle copy;
      TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(expected.dim, expected.sizes,
                                                      expected.strides, dtypes_[t], device_type_,
                                                      device_index_, &copy));
      copies_.emplace_back(copy);
      TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy, grad, 0));
      grad = copy;
    }
    const void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(grad, &data));
    records_[t].grad = data;
  }
  return static_cast<int64_t>(copies_.size());
}

void MultiTensor::read_steps(double averaging) {
  for (size_t t = 0; t < records_.size(); ++t) {
    records_[t].step = steps_[t];
    records_[t].average_weight = average_weight(averaging, steps_[t]);
  }
}

void MultiTensor::count_steps() {
  for (size_t t = 0; t < records_.size(); ++t) ++steps_[t];
}

}  // namespace alrao
