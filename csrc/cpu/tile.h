// Scores in base 2 of a block of queries against tiles of keys (6), (7).
#pragma once

#include "block.h"
#include "gemm.h"
#include "tables.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

constexpr int64_t kTileKeys = 384;  // the most keys of a tile, whose scores fit into the second-level cache
constexpr int64_t kKeyGroup = 48;   // keys whose p2c scores are computed at once; a multiple of strips and vectors
constexpr int64_t kTilePitch = kTileKeys + 16;
static_assert(kTileKeys % kKeyGroup == 0 && kKeyGroup % kStrip == 0 && kKeyGroup % kLanes == 0);

// Keys or values are stored transposed, in tiles of (D, kTilePitch). Returns the offset of a column.
INLINE int64_t tile_offset(int64_t column, int64_t size) {
  return column / kTileKeys * kTilePitch * size + column % kTileKeys;
}

template <class E>
void transpose_tiles(RowsOf<E> rows, int64_t count, int64_t size, float* to) {
  for (int64_t first = 0; first < count; first += kTileKeys) {
    transpose_rows<E>(RowsOf<E>{rows(first), rows.stride}, std::min(count - first, kTileKeys), size, 1.0f,
                      to + tile_offset(first, round_up(size, kLanes)), kTilePitch);
  }
}

INLINE float dot(const float* x, const float* y, int64_t size) {
  Vector total{};
  for (int64_t d = 0; d < size; d += kLanes) total += load(x + d) * load(y + d);
  return sum(total);
}

// to[r] = x_r . y_r for rows (count, D), summed in the order of `gemm`, so that dP - Delta is exactly 0 if P is 1.
// Reads and writes a multiple of kLanes rows.
inline void row_dots(const float* x, const float* y, int64_t count, int64_t size, float* to) {
  for (int64_t r = 0; r < count; r += kLanes) {
    Vector total{};
    for (int64_t d = 0; d < size; d += kLanes) {
      Vector left[kLanes], right[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        left[l] = load(x + (r + l) * size + d), right[l] = load(y + (r + l) * size + d);
      }
      transpose(left), transpose(right);
      for (int64_t l = 0; l < kLanes; ++l) total += left[l] * right[l];
    }
    store(to + r, total);
  }
}

// scores[i][j] += p2c[j][runs[i - j]] for the p2c scores of a group of keys, by squares of kLanes rows and columns.
INLINE void add_transposed(const float* p2c, int64_t pitch, const int32_t* runs, int64_t rows, int64_t columns,
                           float* scores, int64_t scores_pitch) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vector square[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) square[l] = spread(p2c + (j + l) * pitch, runs + i - (j + l));
      transpose(square);
      float* to = scores + i * scores_pitch + j;
      const int64_t count = std::min<int64_t>(rows - i, kLanes);
      for (int64_t l = 0; l < count; ++l) store(to + l * scores_pitch, load(to + l * scores_pitch) + square[l]);
    }
  }
}

// Scores of a block of queries, tile by tile; the base of the forward and backward passes.
class ScoreTiles {
 protected:
  explicit ScoreTiles(const Attention& a) : a_(a), size_(a.padded_size), tables_(a) {}

  // `pitch` is that of a tile of scores.
  void carve_scores(Carver& carver, int64_t pitch, bool for_backward) {
    pitch_ = pitch;
    tables_.carve(carver, for_backward);
    query_ = carver(kMaxBlockRows * size_), far_query_ = carver(kMaxBlockRows * size_);
    scores_ = carver(kMaxBlockRows * pitch);
    bias_ = carver(round_up(a_.longest_key, kLanes)), row_ = carver(size_);
    c2p_ = carver(kStrip * kKeyPitch), p2c_ = carver(kKeyGroup * kQueryPitch);
  }

  template <class E>
  void load_query(const Sequence& sequence, const Block& block) {
    copy_rows<E>(rows_of<E>(a_.query, sequence.batch, block.head, sequence.first_query + block.first), block.rows,
                 a_.size, static_cast<float>(a_.scale * kLog2e), query_, size_);
  }

  // Calls use(side, key, count) for each tile of the keys [start, stop) that has a visible pair, with its scores in
  // scores_. A tile has at most tile_keys keys and ends at a multiple of tile_keys, counted from first_key, or at the
  // end of its segment. key_t has the keys from first_key on. A far tile's scores lack far_constant_ (7).
  template <class Use>
  void for_each_tile(const Block& block, const Block& stretch, const float* key_t, int64_t first_key, int64_t start,
                     int64_t stop, int64_t tile_keys, Use use) {
    Segment segments[3];
    cut_segments(a_, stretch, start, stop, segments);
    for (const Segment& segment : segments) {
      if (segment.start >= segment.stop) continue;
      if (segment.side != kNear) load_far_query(block, segment.side);
      for (int64_t key = segment.start, next; key < segment.stop; key = next) {
        next = std::min(first_key + round_down(key - first_key, tile_keys) + tile_keys, segment.stop);
        if (!visible_.any(a_, block.first, block.rows, key, next - key)) continue;
        const int64_t columns = round_up(next - key, kLanes);
        const float* tile = key_t + tile_offset(key - first_key, size_);
        if (segment.side == kNear) {
          near_scores(block, tile, key, next - key, columns);
        } else {
          gemm(block.rows, columns, a_.size, {far_query_, size_, 1}, tile, kTilePitch, nullptr, 0, scores_, pitch_);
        }
        visible_.hide(a_, block.first, block.rows, key, columns, scores_, pitch_);
        use(segment.side, key, next - key);
      }
    }
  }

  const Attention& a_;
  const int64_t size_;  // D rounded up
  int64_t pitch_ = 0;
  VisibleKeys visible_;
  ExpandedTables tables_;
  float *query_, *far_query_;  // (rows, D), times log2(e) s
  float* scores_;              // (rows, pitch)
  float *bias_, *row_;         // of VisibleKeys; (D) for a row of a table
  float far_constant_[kMaxBlockRows];

 private:
  // Computes (7) for one side: the shifted queries log2(e) s (q + Q^r_r), and for each row the constant log2(e) s q .
  // K^r_r.
  void load_far_query(const Block& block, Side side) {
    far_row(a_, a_.pos_query, block.head, side, static_cast<float>(a_.scale * kLog2e), row_);
    for (int64_t r = 0; r < block.rows; ++r) {
      for (int64_t d = 0; d < size_; d += kLanes) {
        store(far_query_ + r * size_ + d, load(query_ + r * size_ + d) + load(row_ + d));
      }
    }
    std::fill_n(far_constant_, block.rows, 0.0f);
    if (a_.pos_key.data == nullptr) return;  // zeros times an infinite query would be NaN
    far_row(a_, a_.pos_key, block.head, side, 1.0f, row_);
    for (int64_t r = 0; r < block.rows; ++r) far_constant_[r] = dot(query_ + r * size_, row_, size_);
  }

  // Computes the scores (6), (rows, columns), of the keys [first_key, first_key + all_keys). Columns beyond the keys
  // are padding, which the caller hides.
  //
  // c2p: a strip of kStrip queries has columns + kStrip - 1 consecutive distances, hence as many runs or fewer. Their
  // product with K^n has one cell per run, which is spread to the keys at the run's distances. p2c is the same with
  // keys in place of queries, and is transposed.
  void near_scores(const Block& block, const float* key_t, int64_t first_key, int64_t all_keys, int64_t columns) {
    tables_.expand(block.head);
    for (int64_t r = 0; a_.pos_key.data && r < block.rows; r += kStrip) {
      const int64_t count = std::min<int64_t>(block.rows - r, kStrip);
      const int32_t* runs = tables_.key.runs.from(first_key - (block.position + r));  // of query r, the strip's first
      const int64_t first = runs[1 - count], last = runs[columns - 1];
      gemm(count, last - first + 1, a_.size, {query_ + r * size_, size_, 1}, tables_.key.columns + first, tables_.pitch,
           nullptr, 0, c2p_, kKeyPitch);
      for (int64_t n = 0; n < count; ++n) {
        float* const scores = scores_ + (r + n) * pitch_;
        for (int64_t c = 0; c < columns; c += kLanes) {
          store(scores + c, spread(c2p_ + n * kKeyPitch - first, runs + c - n));
        }
      }
    }
    gemm(block.rows, columns, a_.size, {query_, size_, 1}, key_t, kTilePitch, a_.pos_key.data ? scores_ : nullptr,
         pitch_, scores_, pitch_);
    if (a_.pos_query.data == nullptr) return;
    for (int64_t group = 0; group < all_keys; group += kKeyGroup) {
      const int64_t keys = std::min(all_keys - group, kKeyGroup), filled = std::min(columns - group, kKeyGroup);
      const int32_t* runs = tables_.query.runs.from(block.position - (first_key + group));  // of the group's first key
      const int64_t lowest = runs[1 - filled];                                              // in cell 0 of every key
      for (int64_t j = 0; j < keys; j += kStrip) {
        const int64_t count = std::min<int64_t>(keys - j, kStrip);
        const int64_t first = runs[1 - count - j], last = runs[block.rows - 1 - j];
        gemm(count, last - first + 1, a_.size, {key_t + group + j, 1, kTilePitch}, tables_.query.columns + first,
             tables_.pitch, nullptr, 0, p2c_ + j * kQueryPitch + (first - lowest), kQueryPitch);
      }
      add_transposed(p2c_ - lowest, kQueryPitch, runs, block.rows, filled, scores_ + group, pitch_);
    }
  }

  static constexpr int64_t kKeyPitch = kTilePitch + 16;                           // of c2p
  static constexpr int64_t kQueryPitch = kMaxBlockRows + kKeyGroup + 2 * kLanes;  // of p2c
  float *c2p_, *p2c_;  // position scores of a strip of queries and of a group of keys
};

}  // namespace deberta_fast::DEBERTA_FAST_ISA
