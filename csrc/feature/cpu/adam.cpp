#include "feature/adam.h"
#include "feature/cpu/pieces.h"
#include "feature/multi_tensor.h"

namespace alrao {

void feature_adam_cpu(const MultiTensor& tensors, const AdamOptions& options) {
  const auto piece = ALRAO_KERNEL(feature_adam_piece);
  tensors.for_each_piece([&](const FeatureRecord& record, int64_t begin, int64_t end) {
    piece(record, options, begin, end);
  });
}

}  // namespace alrao
