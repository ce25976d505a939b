// The feature optimizers under the CUDA key: the device tables of their tensors, made once for a
// plan, and a step's launches. Nothing waits for the device.

#include <torch/csrc/stable/accelerator.h>

#include <mutex>

#include "common/cuda/stream.h"
#include "feature/cuda/launch.h"
#include "feature/op.h"

namespace alrao::cuda {
namespace {

// A table and the device memory it is in.
struct DeviceTable {
  MultiTensorTable layout;
  Tensor memory;
  bool mixed;
};

std::shared_ptr<DeviceTable> make_device_table(const MultiTensor& tensors, bool mixed,
                                               cudaStream_t stream) {
  auto layout =
      make_table(tensors.records(), static_cast<int>(tensors.num_states()), mixed, tensors.steps());
  const auto words = static_cast<int64_t>(layout.bytes / sizeof(int64_t));
  const int64_t stride = 1;
  AtenTensorHandle memory;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &words, &stride, aoti_torch_dtype_int64(),
                                                  tensors.device_type(), tensors.device_index(),
                                                  &memory));
  auto table = std::make_shared<DeviceTable>(DeviceTable{std::move(layout), Tensor(memory), mixed});
  check_launch("upload_table",
               upload_table(table->layout, table->memory.mutable_data_ptr(), stream));
  return table;
}

// What a captured graph reads, and what may still be read on another stream than it was allocated
// on: some kilobytes, kept for the life of the process.
void keep_forever(std::shared_ptr<DeviceTable> table) {
  static std::mutex mutex;
  static auto* const kept = new std::vector<std::shared_ptr<DeviceTable>>;
  const std::lock_guard<std::mutex> lock(mutex);
  kept->push_back(std::move(table));
}

// What MultiTensor::attachment holds.
struct Attachment {
  std::shared_ptr<DeviceTable> table;
  cudaStream_t stream = nullptr;  // the table was allocated on it
  bool kept = false;
};

std::shared_ptr<DeviceTable> find_table(MultiTensor& tensors, bool mixed, cudaStream_t stream) {
  if (!tensors.attachment) tensors.attachment = std::make_shared<Attachment>();
  auto& attachment = *static_cast<Attachment*>(tensors.attachment.get());
  const bool capturing = is_capturing(stream);
  if (!attachment.table || attachment.table->mixed != mixed) {
    auto table = make_device_table(tensors, mixed, stream);
    // While a graph is captured only the graph fills it: a later step must make its own.
    if (capturing) {
      keep_forever(table);
      return table;
    }
    attachment = {std::move(table), stream, false};
  }
  if ((capturing || stream != attachment.stream) && !attachment.kept) {
    keep_forever(attachment.table);
    attachment.kept = true;
  }
  return attachment.table;
}

// A scalar on the CPU is read here, one on the tensors' device by the kernel.
DeviceScalar device_scalar(const MultiTensor& tensors, const char* name,
                           const std::optional<Tensor>& scalar, double& value) {
  if (!scalar) return {nullptr, false};
  check_scalar(tensors.op(), name, *scalar);
  int32_t type, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(scalar->get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(scalar->get(), &index));
  if (type == tensors.device_type() && index == tensors.device_index()) {
    const bool is_double = scalar->scalar_type() == torch::headeronly::ScalarType::Double;
    return {scalar->const_data_ptr(), is_double};
  }
  value = read_scalar(tensors.op(), name, scalar, value);
  return {nullptr, false};
}

// Starts launch(call, options) on the current stream of the tensors' device.
template <class Options>
void step(MultiTensor& tensors, const Gradients& grads, Options options,
          const ScalarTensors& scalars,
          cudaError_t (*launch)(const MultiTensorCall&, const Options&)) {
  double lr = 1, scale = 1, found_inf = 0;
  DeviceScalars on_device;
  on_device.lr = device_scalar(tensors, "lr", scalars.lr, lr);
  on_device.grad_scale = device_scalar(tensors, "grad_scale", scalars.grad_scale, scale);
  on_device.found_inf = device_scalar(tensors, "found_inf", scalars.found_inf, found_inf);
  options.lr *= lr;
  options.grad_factor /= scale;
  // Also allocates there, and copies gradients of other strides there.
  const torch::stable::accelerator::DeviceGuard guard(tensors.device_index());
  tensors.bind(grads);
  if (found_inf == 0 && !tensors.records().empty()) {
    const cudaStream_t stream = current_stream(tensors.device_index());
    // Kernels for the most states there can be take states of several dtypes.
    const auto table = find_table(tensors, tensors.num_states() == kMaxStates, stream);
    const MultiTensorCall call{table->layout,
                               table->memory.mutable_data_ptr(),
                               tensors.records(),
                               on_device,
                               options.warmup_steps,
                               options.averaging,
                               stream};
    check_launch(tensors.op().c_str(), launch(call, options));
  }
  // Memory that is freed now serves what is queued later, on the same stream.
  tensors.release();
}

#define ALRAO_UPDATE(stem) launch_##stem
ALRAO_DEFINE_FEATURE_OPS

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CUDA, m) { register_feature_ops(m); }

// One sparse gradient sends the call here; the checks say which one it is.
STABLE_TORCH_LIBRARY_IMPL(alrao_fast, SparseCUDA, m) { register_feature_ops(m); }

}  // namespace alrao::cuda
