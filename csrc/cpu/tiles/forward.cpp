// O = softmax(A) V and its log-sum-exp, (1) to (3), in bfloat16 by products in tiles. The online softmax of
// ../forward.cpp is in float32; its terms, which are at most 1, are rounded to bfloat16 for the product with V.
#include "../forward.h"

#include "../dropout.h"
#include "scores.h"

namespace deberta_fast::DEBERTA_FAST_ISA {
namespace {

constexpr int64_t kForwardKeys = 256;  // the most keys of a tile of scores

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
    carve_scores(carver, a_.longest_key, kForwardKeys);
    value_ = carve_halves(carver, (round_up(a_.longest_key, kPaddedRows) + kPaddedRows) * size_);
    p_ = carve_halves(carver, kMaxBlockRows * kForwardKeys);
    output_ = carver(kMaxBlockRows * size_), keep_ = carver(round_up(kForwardKeys, 8 * kLanes));
  }

  void load_keys(const Sequence& sequence, int64_t head) {
    // The packed keys serve as memory for the values' rows.
    const int64_t count = round_up(visible_.stop, kPaddedRows);
    copy_padded(rows_of<Bfloat16>(a_.value, sequence.batch, head, sequence.first_key), visible_.stop, a_.size, key_,
                size_);
    pair_rows(key_, count, size_, value_);
    std::fill_n(value_ + count * size_, kPaddedRows * size_, uint16_t{0});
    load_key_rows(sequence, head, 0, visible_.stop);
  }

  void run(const Block& block, const Block& stretch) {
    const Sequence& sequence = a_.sequences[block.sequence];
    load_query(sequence, block);
    std::fill_n(output_, padded_rows(block) * size_, 0.0f);
    std::fill_n(row_max_, block.rows, -kInfinity);
    std::fill_n(row_sum_, block.rows, 0.0f);
    for_each_tile(block, stretch, 0, visible_.start, visible_.stop, kForwardKeys,
                  [&](Side side, int64_t key, int64_t count) {
                    online_softmax(block, side, key, count);
                    product(padded_rows(block) / kTile, size_ / kTile, div_up(count, kDepth), {p_, kForwardKeys},
                            pairs(value_ + key * size_, size_), {output_, size_}, {output_, size_});
                  });
    finish(a_, f_, block, visible_, row_max_, row_sum_, output_);
  }

  void online_softmax(const Block& block, Side side, int64_t key, int64_t count) {
    const int64_t columns = round_up(count, kLanes);
    const Vector scale = broadcast(factor());
    for (int64_t r = 0; r < block.rows; ++r) {
      const float* const row = scores_ + r * pitch_;
      const Vector constant = broadcast(constants(side)[r]);
      Vector largest = load(row);
      for (int64_t c = kLanes; c < columns; c += kLanes) largest = max(largest, load(row + c));
      const auto score = [&](Vector s) { return s * scale + constant; };
      const float row_max = std::max(row_max_[r], score(broadcast(maximum(largest)))[0]);
      const float shift = row_max == -kInfinity ? 0.0f : row_max;  // without a visible key yet: 2^(-inf - 0) = 0
      uint16_t* const p_row = p_ + r * kForwardKeys;
      if (a_.dropout) {
        keep_row(a_, block.sequence, block.head, block.first + r, key, columns, keep_);
      }
      Vector sums{};
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Vector p = exp2(score(load(row + c)) - shift);  // the score is rounded first, as in backward
        sums += p;
        store_rounded(p_row + c, a_.dropout ? p * load(keep_ + c) : p);
      }
      std::fill(p_row + columns, p_row + round_up(columns, kDepth), uint16_t{0});
      const float alpha = std::exp2(row_max_[r] - shift);
      row_sum_[r] = row_sum_[r] * alpha + sum(sums);
      row_max_[r] = row_max;
      if (alpha != 1) {
        for (int64_t d = 0; d < size_; d += kLanes) {
          store(output_ + r * size_ + d, load(output_ + r * size_ + d) * alpha);
        }
      }
    }
  }

  const Forward& f_;
  Scratch memory_;
  uint16_t *value_, *p_;   // pairs of (keys, D); terms of the softmax, (rows, kForwardKeys)
  float *output_, *keep_;  // (rows, D); dropout of a row
  float row_max_[kMaxBlockRows], row_sum_[kMaxBlockRows];
};

}  // namespace

void forward(const Attention& a, const Forward& f, int64_t begin, int64_t end) {
  const TileConfiguration tiles;
  ForwardPass(a, f).blocks(begin, end);
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
