#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "gradient/checks.h"
#include "gradient/cpu/pieces.h"

namespace alrao::cpu {
namespace {

using torch::stable::Tensor;

// Entries of a piece at most, and of a task at least: with less, waking a thread takes longer.
constexpr int64_t kPiece = 16384, kTask = 65536;
// A piece costs this many entries' time on top of its own.
constexpr int64_t kPieceOverhead = 64;

struct Piece {
  const GradientRow* row;
  int64_t segment, begin, entries;
};

std::vector<Piece> cut(const std::vector<GradientRow>& rows) {
  std::vector<Piece> pieces;
  for (const GradientRow& row : rows)
    for (int64_t n = 0; n < row.count; ++n)
      for (int64_t begin = 0; begin < row.inner; begin += kPiece)
        pieces.push_back(
            {&row, row.first + n, n * row.inner + begin, std::min(kPiece, row.inner - begin)});
  return pieces;
}

// body(i) for every piece, in parallel; pieces that follow each other are one thread's until there
// are kTask entries.
template <class Body>
void for_each(const std::vector<Piece>& pieces, const Body& body) {
  std::vector<int64_t> starts{0};
  int64_t cost = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    cost += pieces[i].entries + kPieceOverhead;
    if (cost >= kTask || i + 1 == pieces.size()) {
      starts.push_back(static_cast<int64_t>(i + 1));
      cost = 0;
    }
  }
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t i = starts[first]; i < starts[last]; ++i) body(i);
  };
  const auto tasks = static_cast<int64_t>(starts.size()) - 1;
  if (tasks <= 1) {
    run(0, tasks);
  } else {
    torch::stable::parallel_for(0, tasks, 1, run);
  }
}

// Each segment's sum or maximum, in the order of the pieces: the same on any number of threads.
std::vector<double> sums(const std::vector<Piece>& pieces, int64_t segments, Norm norm) {
  std::vector<double> parts(pieces.size()), total(segments, 0.0);
  const auto sum = ALRAO_KERNEL(gradient_clip_sum);
  for_each(pieces, [&](int64_t i) {
    const Piece& piece = pieces[i];
    parts[i] = sum(piece.row->data, piece.row->dtype, piece.begin, piece.entries, norm);
  });
  for (size_t i = 0; i < pieces.size(); ++i) {
    double& own = total[pieces[i].segment];
    own = norm.kind == NormKind::kLargest ? norm_join<NormKind::kLargest>(own, parts[i])
                                          : norm_join<NormKind::kTwo>(own, parts[i]);
  }
  return total;
}

void scale(std::vector<Piece> pieces, const double* norms, double max_norm) {
  const auto factor = [&](const Piece& piece) {
    return clip_factor(norms[piece.segment], max_norm);
  };
  pieces.erase(std::remove_if(pieces.begin(), pieces.end(),
                              [&](const Piece& piece) { return factor(piece) == 1; }),
               pieces.end());
  const auto scale_piece = ALRAO_KERNEL(gradient_clip_scale);
  for_each(pieces, [&](int64_t i) {
    const Piece& piece = pieces[i];
    scale_piece(piece.row->data, piece.row->dtype, piece.begin, piece.entries, factor(piece));
  });
}

Tensor gradient_clip(const std::vector<Tensor>& grads, const std::vector<int64_t>& firsts,
                     const std::vector<int64_t>& counts, int64_t segments, double norm_type,
                     double max_norm) {
  const auto rows = check_gradients(grads, firsts, counts, segments);
  const auto pieces = cut(rows);
  const Norm norm = norm_of_order(norm_type);
  const auto total = sums(pieces, segments, norm);
  const Tensor norms =
      torch::stable::new_empty(grads[0], {segments}, torch::headeronly::ScalarType::Double);
  auto* const out = static_cast<double*>(norms.mutable_data_ptr());
  for (int64_t n = 0; n < segments; ++n) out[n] = norm_of_sum(total[n], norm);
  scale(pieces, out, max_norm);
  return norms;
}

void gradient_clip_by(const std::vector<Tensor>& grads, const std::vector<int64_t>& firsts,
                      const std::vector<int64_t>& counts, const Tensor& norms, double max_norm) {
  check_norms(norms, grads);
  const auto rows = check_gradients(grads, firsts, counts, norms.size(0));
  scale(cut(rows), static_cast<const double*>(norms.const_data_ptr()), max_norm);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) {
  m.impl("gradient_clip_", TORCH_BOX(&gradient_clip));
  m.impl("gradient_clip_by_", TORCH_BOX(&gradient_clip_by));
}

}  // namespace alrao::cpu
