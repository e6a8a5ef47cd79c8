// A block of queries against a range of keys: near and far keys, visible keys, and scores in base 2 (6), (7).
#pragma once

#include <algorithm>
#include <cmath>

#include "elements.h"
#include "gemm.h"
#include "kernels.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

constexpr float kInfinity = __builtin_inff(), kNaN = __builtin_nanf("");
constexpr int64_t kTileKeys = 384;  // the most keys of a tile, whose scores fit into the second-level cache
constexpr int64_t kKeyGroup = 48;   // keys whose p2c scores are computed at once; a multiple of strips and vectors
constexpr int64_t kTilePitch = kTileKeys + 16;
static_assert(kTileKeys % kKeyGroup == 0 && kKeyGroup % kStrip == 0 && kKeyGroup % kLanes == 0);

// Divides memory into arrays of whole cache lines. Without memory it only counts what they need.
class Carver {
 public:
  explicit Carver(float* memory = nullptr) : memory_(memory) {}
  float* operator()(int64_t floats) {
    float* const array = memory_ ? memory_ + floats_ : nullptr;
    floats_ += round_up(floats, 16);
    return array;
  }
  int64_t floats() const { return floats_; }

 private:
  float* memory_;
  int64_t floats_ = 0;
};

// Returns memory for the arrays that carve(carver) takes. Calls it twice, first to count them, then to place them.
template <class Carve>
Scratch allocate(Carve carve) {
  Carver needed;
  carve(needed);
  Scratch memory(needed.floats());
  Carver carver(memory.data());
  carve(carver);
  return memory;
}

// Returns the address of row r of a head and sequence. E is an element type of elements.h.
template <class E>
struct RowsOf {
  typename E::Stored* first;
  int64_t stride;
  typename E::Stored* operator()(int64_t r) const { return first + r * stride; }
};

template <class E>
RowsOf<E> rows_of(const Heads& heads, int64_t batch, int64_t head, int64_t first_row) {
  return {
      static_cast<typename E::Stored*>(heads.data) + batch * heads.batch + head * heads.head + first_row * heads.row,
      heads.row};
}

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

inline float* at(const Statistic& statistic, int64_t batch, int64_t head, int64_t row) {
  return statistic.data + batch * statistic.batch + head * statistic.head + row * statistic.row;
}

// Returns the natural log-sum-exp of a row. row_max is its largest score, and log_sum the logarithm of its row sum,
// both in base 2.
inline float log_sum_exp(double row_max, double log_sum) { return static_cast<float>((row_max + log_sum) / kLog2e); }

// Queries first to first + rows - 1 of a sequence. `position` is first + query_offset, so key j has the distance j -
// position from the first query.
struct Block {
  int64_t head, sequence, first, rows, position;
};

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

// y += factor x
INLINE void add_scaled(float factor, const float* x, float* y, int64_t size) {
  for (int64_t d = 0; d < size; d += kLanes) store(y + d, load(y + d) + load(x + d) * factor);
}

// The keys of a segment are far from the queries, on one side, or near.
enum Side { kPast = 0, kFuture = 1, kNear = 2 };

// Keys [start, stop) of a sequence.
struct Segment {
  int64_t start, stop;
  Side side;
};

// Divides the keys [start, stop) into those far from all queries of a stretch, on either side, and those between. The
// near ones begin and end at multiples of kLanes, or at start or stop. Without position terms all keys are far.
inline void cut_segments(const Attention& a, const Block& stretch, int64_t start, int64_t stop,
                         Segment (&segments)[3]) {
  int64_t near_start = stop, near_stop = stop;
  if (a.pos_key.data || a.pos_query.data) {
    const auto within = [&](int64_t key) { return std::clamp(key, start, stop); };
    near_start = within(round_down(std::max<int64_t>(stretch.position - a.far_past + 1, 0), kLanes));
    near_stop = stretch.position + stretch.rows - 1 - a.far_future;
    near_stop = std::max(near_start, within(round_up(std::max<int64_t>(near_stop, 0), kLanes)));
  }
  segments[0] = {start, near_start, kPast};
  segments[1] = {near_start, near_stop, kNear};
  segments[2] = {near_stop, stop, kFuture};
}

// Copies the row of a table that all keys far on one side read, times `scale`. Copies zeros if the table is absent.
inline void far_row(const Attention& a, const Table& table, int64_t head, Side side, float scale, float* to) {
  const int64_t size = round_up(a.size, kLanes);
  std::fill_n(to, size, 0.0f);
  if (table.data == nullptr) return;
  const int64_t slot = slot_of(a, side == kPast ? a.reach : -a.reach);
  with_element(a.element, [&](auto element) {
    using E = decltype(element);
    const auto* row = static_cast<const typename E::Stored*>(table.data) + head * table.head + slot * table.row;
    copy_rows<E>([&](int64_t) { return row; }, 1, a.size, scale, to, size);
  });
}

// scores[i][j] += p2c[j][i] for the p2c scores of a group of keys, by squares of kLanes rows and columns.
INLINE void add_transposed(const float* p2c, int64_t pitch, int64_t rows, int64_t columns, float* scores,
                           int64_t scores_pitch) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vector square[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) square[l] = load(p2c + (j + l) * pitch + i);
      transpose(square);
      float* to = scores + i * scores_pitch + j;
      const int64_t count = std::min<int64_t>(rows - i, kLanes);
      for (int64_t l = 0; l < count; ++l) store(to + l * scores_pitch, load(to + l * scores_pitch) + square[l]);
    }
  }
}

// The visible keys of a head and sequence.
class VisibleKeys {
 public:
  int64_t start = 0, stop = 0;  // all visible keys lie in this range

  VisibleKeys() = default;
  // `bias` is memory for one float per key, rounded up to kLanes. It becomes minus infinity for the keys that a mask
  // without a query dimension hides, and for the padding, and 0 for the others.
  VisibleKeys(const Attention& a, const Sequence& sequence, int64_t head, float* bias)
      : start(0), stop(sequence.keys), keys_(sequence.keys), bias_(bias) {
    std::fill(bias, bias + keys_, 0.0f);
    std::fill(bias + keys_, bias + round_up(keys_, kLanes), -kInfinity);
    if (a.mask == nullptr) return;
    mask_ = a.mask + sequence.batch * a.mask_batch + head * a.mask_head + sequence.first_query * a.mask_query +
            sequence.first_key * a.mask_key;
    if (a.mask_query != 0) return;
    start = keys_, stop = 0;
    for (int64_t j = 0; j < keys_; ++j) {
      if (mask_[j * a.mask_key]) {
        start = std::min(start, j), stop = j + 1;
      } else {
        bias[j] = -kInfinity;
      }
    }
    start = stop == 0 ? 0 : round_down(start, kLanes);
    holes_ = std::any_of(bias + start, bias + stop, [](float b) { return b != 0; });
  }

  // Whether any of these queries sees any of these keys.
  bool any(const Attention& a, int64_t query, int64_t rows, int64_t key, int64_t columns) const {
    if (a.mask_query == 0) return true;
    columns = std::min(columns, keys_ - key);
    for (int64_t r = query; r < query + rows; ++r) {
      const uint8_t* row = mask_ + r * a.mask_query + key * a.mask_key;
      if (a.mask_key == 1 && std::memchr(row, 1, columns)) return true;
      for (int64_t c = 0; a.mask_key != 1 && c < columns; ++c) {
        if (row[c * a.mask_key]) return true;
      }
    }
    return false;
  }

  // Whether a query sees any key.
  bool seen_by(const Attention& a, int64_t query) const { return start < stop && any(a, query, 1, 0, keys_); }

  // Sets the scores of hidden pairs to minus infinity, also in the padding of the last vector.
  void hide(const Attention& a, int64_t query, int64_t rows, int64_t key, int64_t columns, float* scores,
            int64_t pitch) const {
    if (a.mask_query != 0) hide_pairs(a, query, rows, key, std::min(columns, keys_ - key), scores, pitch);
    if (!holes_ && key + columns <= stop) return;
    for (int64_t r = 0; r < rows; ++r, scores += pitch) {
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Vector bias = load(bias_ + key + c);
        store(scores + c, bias == 0.0f ? load(scores + c) : bias);
      }
    }
  }

 private:
  void hide_pairs(const Attention& a, int64_t query, int64_t rows, int64_t key, int64_t columns, float* scores,
                  int64_t pitch) const {
    for (int64_t r = query; r < query + rows; ++r, scores += pitch) {
      const uint8_t* from = mask_ + r * a.mask_query + key * a.mask_key;
      int64_t c = 0;
      for (; a.mask_key == 1 && c + kLanes <= columns; c += kLanes) {
        const Ints see = __builtin_convertvector(*reinterpret_cast<const AnyBytes*>(from + c), Ints);
        store(scores + c, see != 0 ? load(scores + c) : broadcast(-kInfinity));
      }
      for (; c < columns; ++c) scores[c] = from[c * a.mask_key] ? scores[c] : -kInfinity;
    }
  }

  int64_t keys_ = 0;
  const float* bias_ = nullptr;
  const uint8_t* mask_ = nullptr;
  bool holes_ = false;  // whether a bias in [start, stop) is minus infinity
};

// Scores of a block of queries, tile by tile; the base of the forward and backward passes.
class ScoreTiles {
 protected:
  explicit ScoreTiles(const Attention& a) : a_(a), size_(round_up(a.size, kLanes)) {}

  // `pitch` is that of a tile of scores.
  void carve_scores(Carver& carver, int64_t pitch) {
    pitch_ = pitch;
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
  // c2p: a strip of kStrip queries has columns + kStrip - 1 consecutive distances. In their product with K^e, the cells
  // of query r begin one further left than those of query r - 1. Read with a pitch that is one less, they lie under the
  // keys, and the c2c term is added to them. p2c is the same with keys in place of queries, and is transposed.
  void near_scores(const Block& block, const float* key_t, int64_t first_key, int64_t all_keys, int64_t columns) {
    const int64_t last_distance = a_.first_distance + a_.distances - 1;
    for (int64_t r = 0; r < block.rows; r += kStrip) {
      const int64_t count = std::min<int64_t>(block.rows - r, kStrip);
      const Operand strip{query_ + r * size_, size_, 1};
      const float* start = nullptr;
      if (a_.pos_key.data) {
        const int64_t distance = first_key - (block.position + r + count - 1);
        gemm(count, columns + count - 1, a_.size, strip,
             a_.key_by_distance_t + block.head * size_ * a_.pitch + (distance - a_.first_distance), a_.pitch, nullptr,
             0, c2p_, kKeyPitch);
        start = c2p_ + count - 1;
      }
      gemm(count, columns, a_.size, strip, key_t, kTilePitch, start, kKeyPitch - 1, scores_ + r * pitch_, pitch_);
    }
    if (a_.pos_query.data == nullptr) return;
    for (int64_t group = 0; group < all_keys; group += kKeyGroup) {
      const int64_t keys = std::min(all_keys - group, kKeyGroup), filled = std::min(columns - group, kKeyGroup);
      // Cell t of key j's row belongs to query i = t + j - (kKeyGroup - 1).
      const int64_t delta = block.position - (first_key + group) - (kKeyGroup - 1);  // of cell 0 of every key
      const float* table = a_.query_by_distance_t + block.head * size_ * a_.pitch + (delta + last_distance);
      for (int64_t j = 0; j < keys; j += kStrip) {
        const int64_t count = std::min<int64_t>(keys - j, kStrip), cell = kKeyGroup - j - count;
        gemm(count, block.rows + count - 1, a_.size, {key_t + group + j, 1, kTilePitch}, table + cell, a_.pitch,
             nullptr, 0, p2c_ + j * kQueryPitch + cell, kQueryPitch);
      }
      add_transposed(p2c_ + kKeyGroup - 1, kQueryPitch - 1, block.rows, filled, scores_ + group, pitch_);
    }
  }

  static constexpr int64_t kKeyPitch = kTilePitch + 16;                           // of c2p
  static constexpr int64_t kQueryPitch = kMaxBlockRows + kKeyGroup + 2 * kLanes;  // of p2c
  float *c2p_, *p2c_;  // position scores of a strip of queries and of a group of keys
};

}  // namespace deberta_fast::DEBERTA_FAST_ISA
