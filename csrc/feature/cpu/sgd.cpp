#include "feature/sgd.h"
#include "feature/cpu/pieces.h"
#include "feature/multi_tensor.h"

namespace alrao {

void feature_sgd_cpu(const MultiTensor& tensors, const SgdOptions& options) {
  const auto piece = ALRAO_KERNEL(feature_sgd_piece);
  tensors.for_each_piece([&](const FeatureRecord& record, int64_t begin, int64_t end) {
    piece(record, options, begin, end);
  });
}

}  // namespace alrao
