// O = softmax(A) V and its log-sum-exp, (1) to (3), a block of queries at a time over tiles of keys, with an online
// softmax in base 2:
//
//     m' = max(m, max_j Z_ij)   l' = l 2^(m - m') + sum_j 2^(Z_ij - m')   O' = O 2^(m - m') + sum_j 2^(Z_ij - m') v_j
//
// A thread takes neighbouring blocks and keeps the keys of a head and sequence, transposed, and its values from one
// block to the next, as floats.
#include <cmath>

#include "dropout.h"
#include "tile.h"

namespace deberta_fast::DEBERTA_FAST_ISA {
namespace {

class ForwardPass {
 public:
  ForwardPass(const Attention& a, const Forward& f) : a_(a), f_(f), size_(round_up(a.size, kLanes)) {
    Carver needed;
    carve(needed);
    memory_ = ThreadMemory(kThreadScratch, needed.floats());
    Carver memory(memory_.data());
    carve(memory);
  }

  void blocks(int64_t begin, int64_t end) {
    const Sequence* sequence = nullptr;
    int64_t head = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % a_.blocks_per_head;
      const Sequence* next = sequence_of(block);
      const int64_t stretch = (block - next->first_block) / a_.blocks_of_stretch;
      const int64_t share = (block - next->first_block) % a_.blocks_of_stretch;
      const Range all = rows_of_stretch(a_, next->queries, stretch);
      const auto cut = [&](int64_t n) { return all.start + (all.stop - all.start) * n / a_.blocks_of_stretch; };
      const Range rows{cut(share), cut(share + 1)};
      if (rows.start == rows.stop) continue;
      if (next != sequence || item / a_.blocks_per_head != head) {
        sequence = next, head = item / a_.blocks_per_head;
        keys_ = VisibleKeys(a_, *sequence, head, bias_);
        load_keys(*sequence, head);
      }
      const auto block_of = [&](const Range& r) {
        return Block{head, sequence - a_.sequences, r.start, r.stop - r.start, r.start + a_.query_offset};
      };
      run(block_of(rows), block_of(all));
    }
  }

 private:
  void carve(Carver& carver) {
    int64_t longest = 0;
    for (int64_t s = 0; s < a_.sequence_count; ++s) longest = std::max(longest, a_.sequences[s].keys);
    longest = round_up(longest, kTileKeys);
    key_t_ = carver(longest / kTileKeys * kTilePitch * size_), value_ = carver(longest * size_);
    query_ = carver(kMaxBlockRows * size_), far_query_ = carver(kMaxBlockRows * size_);
    output_ = carver(kMaxBlockRows * size_), scores_ = carver(kMaxBlockRows * kTilePitch);
    bias_ = carver(longest), far_row_ = carver(size_), keep_ = carver(kTileKeys + 4 * kLanes);
    strips_.carve(carver);
  }

  const Sequence* sequence_of(int64_t block) const {
    const auto before = [](int64_t n, const Sequence& sequence) { return n < sequence.first_block; };
    return std::upper_bound(a_.sequences, a_.sequences + a_.sequence_count, block, before) - 1;
  }

  void load_keys(const Sequence& sequence, int64_t head) {
    with_element(a_.element, [&](auto element) {
      using E = decltype(element);
      const auto key = rows_of<E>(a_.key, sequence.batch, head, sequence.first_key);
      const auto value = rows_of<E>(a_.value, sequence.batch, head, sequence.first_key);
      for (int64_t first = 0; first < keys_.stop; first += kTileKeys) {
        const int64_t count = std::min(keys_.stop - first, kTileKeys);
        const auto tile = [&](int64_t r) { return key(first + r); };
        transpose_rows<E>(tile, count, a_.size, 1.0f, key_t_ + first / kTileKeys * kTilePitch * size_, kTilePitch);
      }
      copy_rows<E>(value, keys_.stop, a_.size, 1.0f, value_, size_);
    });
  }

  void run(const Block& block, const Block& stretch) {
    const Sequence& sequence = a_.sequences[block.sequence];
    with_element(a_.element, [&](auto element) {
      using E = decltype(element);
      const auto rows = rows_of<E>(a_.query, sequence.batch, block.head, sequence.first_query + block.first);
      copy_rows<E>(rows, block.rows, a_.size, static_cast<float>(a_.scale * kLog2e), query_, size_);
    });
    std::fill_n(output_, block.rows * size_, 0.0f);
    std::fill_n(peak_, block.rows, -kInfinity);
    std::fill_n(total_, block.rows, 0.0f);

    Segment segments[3];
    cut_segments(a_, stretch, keys_.start, keys_.stop, segments);
    for (const Segment& segment : segments) {
      if (segment.start >= segment.stop) continue;
      if (segment.side != kNear) far_queries(a_, block, segment.side, query_, far_query_, far_constant_, far_row_);
      for (int64_t key = segment.start, next; key < segment.stop; key = next) {
        next = std::min(round_down(key, kTileKeys) + kTileKeys, segment.stop);
        if (!keys_.any(a_, block.first, block.rows, key, next - key)) continue;
        const int64_t columns = round_up(next - key, kLanes);
        const float* key_t = key_t_ + key / kTileKeys * kTilePitch * size_ + key % kTileKeys;
        if (segment.side == kNear) {
          near_scores(a_, block, query_, key_t, key, next - key, columns, strips_, scores_, kTilePitch);
        } else {
          far_scores(a_, block.rows, far_query_, key_t, columns, scores_, kTilePitch);
        }
        keys_.hide(a_, block.first, block.rows, key, columns, scores_, kTilePitch);
        softmax(block, segment.side, key, columns);
        gemm_add(block.rows, size_, next - key, {scores_, kTilePitch, 1}, value_ + key * size_, size_, output_, size_);
      }
    }
    finish(block, sequence);
  }

  void softmax(const Block& block, Side side, int64_t key, int64_t columns) {
    for (int64_t r = 0; r < block.rows; ++r) {
      float* const row = scores_ + r * kTilePitch;
      const float constant = side == kNear ? 0.0f : far_constant_[r];
      Vector largest = load(row);
      for (int64_t c = kLanes; c < columns; c += kLanes) largest = max(largest, load(row + c));
      const float peak = std::max(peak_[r], maximum(largest) + constant);
      const float shift = peak == -kInfinity ? 0.0f : peak;  // a row that sees nothing yet: 2^(-inf - 0) = 0
      Vector total{};
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Vector p = exp2(load(row + c) + constant - shift);  // the score is rounded first, as in backward
        total += p;
        store(row + c, p);
      }
      const float rescale = std::exp2(peak_[r] - shift);
      total_[r] = total_[r] * rescale + sum(total);
      peak_[r] = peak;
      if (rescale != 1) {
        for (int64_t d = 0; d < size_; d += kLanes) {
          store(output_ + r * size_ + d, load(output_ + r * size_ + d) * rescale);
        }
      }
      if (a_.dropout) {
        keep_row(a_, block.sequence * a_.heads + block.head, block.first + r, key, columns, keep_);
        for (int64_t c = 0; c < columns; c += kLanes) store(row + c, load(row + c) * load(keep_ + c));
      }
    }
  }

  void finish(const Block& block, const Sequence& sequence) {
    for (int64_t r = 0; r < block.rows; ++r) {
      float* const output = output_ + r * size_;
      const bool some = total_[r] > 0 || keys_.seen_by(a_, block.first + r);
      if (!some) {  // whatever its query
        std::fill_n(output, size_, 0.0f);
        peak_[r] = -kInfinity, total_[r] = 0;
      }
      const float lse = log_sum_exp(peak_[r], std::log2(static_cast<double>(total_[r])));
      if (some && total_[r] == 0) total_[r] = kNaN;  // it sees nothing but scores of minus infinity: no softmax
      const float inverse = some ? 1 / total_[r] : 0.0f;
      for (int64_t d = 0; d < size_; d += kLanes) store(output + d, load(output + d) * inverse);
      const int64_t row = sequence.first_query + block.first + r;
      if (f_.lse.data) *at(f_.lse, sequence.batch, block.head, row) = lse;
      if (f_.peak.data) *at(f_.peak, sequence.batch, block.head, row) = peak_[r];
      if (f_.total.data) *at(f_.total, sequence.batch, block.head, row) = total_[r];
    }
    with_element(a_.element, [&](auto element) {
      using E = decltype(element);
      const auto rows = rows_of<E>(f_.output, sequence.batch, block.head, sequence.first_query + block.first);
      store_rows<E>(output_, size_, block.rows, a_.size, 1.0f, rows);
    });
  }

  const Attention& a_;
  const Forward& f_;
  const int64_t size_;  // D rounded up
  ThreadMemory memory_;
  VisibleKeys keys_;
  Strips strips_;
  float *key_t_, *value_;      // tiles of (D, kTilePitch); (keys, D)
  float *query_, *far_query_;  // (rows, D), times log2(e) s
  float *output_, *scores_;    // (rows, D), (rows, kTilePitch)
  float *bias_, *far_row_, *keep_;
  float far_constant_[kMaxBlockRows], peak_[kMaxBlockRows], total_[kMaxBlockRows];
};

}  // namespace

void forward(const Attention& a, const Forward& f, int64_t begin, int64_t end) { ForwardPass(a, f).blocks(begin, end); }

}  // namespace deberta_fast::DEBERTA_FAST_ISA
