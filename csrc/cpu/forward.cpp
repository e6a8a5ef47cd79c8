// O = softmax(A) V and its log-sum-exp, (1) to (3), for blocks of queries over tiles of keys, by an online softmax in
// base 2:
//
//     m' = max(m, max_j Z_ij)   l' = l 2^(m - m') + sum_j 2^(Z_ij - m')   O' = O 2^(m - m') + sum_j 2^(Z_ij - m') v_j
//
// A thread processes consecutive blocks. The keys of a head and sequence, transposed, and its values stay in float32
// from one block to the next.
#include "forward.h"

#include "dropout.h"
#include "tile.h"

namespace deberta_fast::DEBERTA_FAST_ISA {
namespace {

class ForwardPass : ScoreTiles {
 public:
  ForwardPass(const Attention& a, const Forward& f) : ScoreTiles(a), f_(f) {
    memory_ = allocate([&](Carver& carver) { carve(carver); });
  }

  void blocks(int64_t begin, int64_t end) {
    for_each_block(
        a_, begin, end,
        [&](const Sequence& sequence, int64_t head) {
          visible_ = VisibleKeys(a_, sequence, head, bias_);
          load_keys(sequence, head);
        },
        [&](const Block& block, const Block& stretch) { run(block, stretch); });
  }

 private:
  void carve(Carver& carver) {
    const int64_t keys = round_up(a_.longest_key, kTileKeys);
    key_t_ = carver(tile_offset(keys, size_)), value_ = carver(keys * size_);
    output_ = carver(kMaxBlockRows * size_), keep_ = carver(round_up(kTileKeys, 8 * kLanes));
    carve_scores(carver, kTilePitch, false);
  }

  void load_keys(const Sequence& sequence, int64_t head) {
    with_element(a_.element, [&](auto element) {
      using E = decltype(element);
      const auto rows = [&](const Heads& x) { return rows_of<E>(x, sequence.batch, head, sequence.first_key); };
      transpose_tiles<E>(rows(a_.key), visible_.stop, a_.size, key_t_);
      copy_rows<E>(rows(a_.value), visible_.stop, a_.size, 1.0f, value_, size_);
    });
  }

  void run(const Block& block, const Block& stretch) {
    const Sequence& sequence = a_.sequences[block.sequence];
    with_element(a_.element, [&](auto element) { load_query<decltype(element)>(sequence, block); });
    std::fill_n(output_, block.rows * size_, 0.0f);
    std::fill_n(row_max_, block.rows, -kInfinity);
    std::fill_n(row_sum_, block.rows, 0.0f);
    for_each_tile(block, stretch, key_t_, 0, visible_.start, visible_.stop, kTileKeys,
                  [&](Side side, int64_t key, int64_t count) {
                    online_softmax(block, side, key, round_up(count, kLanes));
                    gemm_add(block.rows, size_, count, {scores_, kTilePitch, 1}, value_ + key * size_, size_, output_,
                             size_);
                  });
    finish(a_, f_, block, visible_, row_max_, row_sum_, output_);
  }

  void online_softmax(const Block& block, Side side, int64_t key, int64_t columns) {
    for (int64_t r = 0; r < block.rows; ++r) {
      float* const row = scores_ + r * kTilePitch;
      const float constant = side == kNear ? 0.0f : far_constant_[r];
      Vector largest = load(row);
      for (int64_t c = kLanes; c < columns; c += kLanes) largest = max(largest, load(row + c));
      const float row_max = std::max(row_max_[r], maximum(largest) + constant);
      const float shift = row_max == -kInfinity ? 0.0f : row_max;  // without a visible key yet: 2^(-inf - 0) = 0
      Vector sums{};
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Vector p = exp2(load(row + c) + constant - shift);  // the score is rounded first, as in backward
        sums += p;
        store(row + c, p);
      }
      const float alpha = std::exp2(row_max_[r] - shift);
      row_sum_[r] = row_sum_[r] * alpha + sum(sums);
      row_max_[r] = row_max;
      if (alpha != 1) {
        for (int64_t d = 0; d < size_; d += kLanes) {
          store(output_ + r * size_ + d, load(output_ + r * size_ + d) * alpha);
        }
      }
      if (a_.dropout) {
        keep_row(a_, block.sequence, block.head, block.first + r, key, columns, keep_);
        for (int64_t c = 0; c < columns; c += kLanes) store(row + c, load(row + c) * load(keep_ + c));
      }
    }
  }

  const Forward& f_;
  Scratch memory_;
  float *key_t_, *value_;  // tiles of (D, kTilePitch); (keys, D)
  float *output_, *keep_;  // (rows, D); dropout of a row
  float row_max_[kMaxBlockRows], row_sum_[kMaxBlockRows];
};

}  // namespace

void forward(const Attention& a, const Forward& f, int64_t begin, int64_t end) { ForwardPass(a, f).blocks(begin, end); }

}  // namespace deberta_fast::DEBERTA_FAST_ISA
