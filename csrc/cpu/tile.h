// A block of queries against a range of keys: which keys are near, and their scores in base 2 (6), (7).
#pragma once

#include <algorithm>
#include <cmath>

#include "elements.h"
#include "gemm.h"
#include "kernels.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

constexpr float kInfinity = __builtin_inff(), kNaN = __builtin_nanf("");
constexpr int64_t kTileKeys = 384;  // keys of a tile, at most: a tile of scores stays in the second-level cache
constexpr int64_t kKeyGroup = 48;   // keys whose p2c scores are made at once: whole strips and whole vectors
constexpr int64_t kTilePitch = kTileKeys + 16;
static_assert(kTileKeys % kKeyGroup == 0 && kKeyGroup % kStrip == 0 && kKeyGroup % kLanes == 0);

// Cuts memory into arrays, each of whole cache lines. Without memory it only counts what they need.
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

// The address of a row of one head and sequence.
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

inline float* at(const Statistic& statistic, int64_t batch, int64_t head, int64_t row) {
  return statistic.data + batch * statistic.batch + head * statistic.head + row * statistic.row;
}

// The log-sum-exp of a row, of its largest score and the logarithm of its total, both in base 2.
inline float log_sum_exp(double peak, double log_total) { return static_cast<float>((peak + log_total) / kLog2e); }

// Queries first to first + rows - 1 of a sequence; the position of the first one, as keys count.
struct Block {
  int64_t head, sequence, first, rows, position;
};

INLINE float dot(const float* x, const float* y, int64_t size) {
  Vector total{};
  for (int64_t d = 0; d < size; d += kLanes) total += load(x + d) * load(y + d);
  return sum(total);
}

// to[r] = x_r . y_r of rows (count, D), each summed in the order of `gemm`: dP - Delta is then 0 where a query answers
// one value, and not what rounding leaves of it. Reads whole squares of lanes.
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

// The far side that a segment lies on, or near.
enum Side { kPast = 0, kFuture = 1, kNear = 2 };

// Keys [start, stop) of a sequence.
struct Segment {
  int64_t start, stop;
  Side side;
};

// Which of the keys [start, stop) are near to any query of a stretch, to whole vectors. Without position terms all
// count as far.
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

// Row sigma(delta) of the tables. Distances that the lengths cannot reach may lie outside of the rows that were given.
INLINE int64_t slot_of(const Attention& a, int64_t delta) {
  const int64_t slot = a.slots[std::clamp(delta, -a.reach, a.reach) + a.reach] - a.first_slot;
  return std::clamp<int64_t>(slot, 0, a.table_rows - 1);
}

// Row sigma = r of a table, which all keys far on one side read; zeros without it.
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

// (7) for one side: the shifted queries log2(e) s (q + Q^r_r) and the constant log2(e) s q . K^r_r of each row.
// query and far_query are (rows, D); row is memory for D floats.
inline void far_queries(const Attention& a, const Block& block, Side side, const float* query, float* far_query,
                        float* constant, float* row) {
  const int64_t size = round_up(a.size, kLanes);
  far_row(a, a.pos_query, block.head, side, static_cast<float>(a.scale * kLog2e), row);
  for (int64_t r = 0; r < block.rows; ++r) {
    for (int64_t d = 0; d < size; d += kLanes) {
      store(far_query + r * size + d, load(query + r * size + d) + load(row + d));
    }
  }
  std::fill_n(constant, block.rows, 0.0f);
  if (a.pos_key.data == nullptr) return;  // not zeros times the query, which may be infinite
  far_row(a, a.pos_key, block.head, side, 1.0f, row);
  for (int64_t r = 0; r < block.rows; ++r) constant[r] = dot(query + r * size, row, size);
}

// Scratch memory of `near_scores`.
struct Strips {
  static constexpr int64_t kKeyPitch = kTilePitch + 16;                           // c2p of a strip of queries
  static constexpr int64_t kQueryPitch = kMaxBlockRows + kKeyGroup + 2 * kLanes;  // p2c of a group of keys
  float *c2p, *p2c;
  void carve(Carver& carver) { c2p = carver(kStrip * kKeyPitch), p2c = carver(kKeyGroup * kQueryPitch); }
};

// (7) without its constant a row: scores (rows, columns) of the queries of a far segment, log2(e) s (q + Q^r_r).
// key_t is (D, columns).
INLINE void far_scores(const Attention& a, int64_t rows, const float* query, const float* key_t, int64_t columns,
                       float* scores, int64_t pitch) {
  const int64_t size = round_up(a.size, kLanes);
  gemm(rows, columns, a.size, {query, size, 1}, key_t, kTilePitch, nullptr, 0, scores, pitch);
}

// scores[i][j] += p2c[j][i - j + const] for a group of keys, a square of lanes at a time.
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

// (6): scores (rows, columns) of the block's queries, log2(e) s q, and the keys from `first_key` on.
//
// c2p: a strip of kStrip queries meets columns + kStrip - 1 distances one after the other; query r of it starts one
// cell further left than query r - 1. Read with a pitch one less, that product is what the c2c term is added to.
// p2c: the same with keys for queries; its tile is transposed on the way. Columns beyond `keys` fill up the last vector:
// whatever stands there is hidden afterwards.
inline void near_scores(const Attention& a, const Block& block, const float* query, const float* key_t,
                        int64_t first_key, int64_t all_keys, int64_t columns, const Strips& strips, float* scores,
                        int64_t pitch) {
  const int64_t size = round_up(a.size, kLanes), last_distance = a.first_distance + a.distances - 1;
  for (int64_t r = 0; r < block.rows; r += kStrip) {
    const int64_t count = std::min<int64_t>(block.rows - r, kStrip);
    const Operand strip{query + r * size, size, 1};
    const float* start = nullptr;
    if (a.pos_key.data) {
      const int64_t distance = first_key - (block.position + r + count - 1);
      gemm(count, columns + count - 1, a.size, strip,
           a.key_by_distance_t + block.head * size * a.pitch + (distance - a.first_distance), a.pitch, nullptr, 0,
           strips.c2p, Strips::kKeyPitch);
      start = strips.c2p + count - 1;
    }
    gemm(count, columns, a.size, strip, key_t, kTilePitch, start, Strips::kKeyPitch - 1, scores + r * pitch, pitch);
  }
  if (a.pos_query.data == nullptr) return;
  for (int64_t group = 0; group < all_keys; group += kKeyGroup) {
    const int64_t keys = std::min(all_keys - group, kKeyGroup), filled = std::min(columns - group, kKeyGroup);
    // Cell t of key j's row belongs to query i = t + j - (kKeyGroup - 1).
    const int64_t delta = block.position - (first_key + group) - (kKeyGroup - 1);  // of cell 0
    const float* table = a.query_by_distance_t + block.head * size * a.pitch + (delta + last_distance);
    for (int64_t j = 0; j < keys; j += kStrip) {
      const int64_t count = std::min<int64_t>(keys - j, kStrip), cell = kKeyGroup - j - count;
      gemm(count, block.rows + count - 1, a.size, {key_t + group + j, 1, kTilePitch}, table + cell, a.pitch, nullptr, 0,
           strips.p2c + j * Strips::kQueryPitch + cell, Strips::kQueryPitch);
    }
    add_transposed(strips.p2c + kKeyGroup - 1, Strips::kQueryPitch - 1, block.rows, filled, scores + group, pitch);
  }
}

// Which keys of a head and sequence may be seen.
class VisibleKeys {
 public:
  int64_t start = 0, stop = 0;  // no key outside is visible

  VisibleKeys() = default;
  // bias: memory for as many floats as there are keys, rounded up to kLanes.
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

  // Whether any of these queries may see any of these keys.
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

  // Whether a query may see any key at all.
  bool seen_by(const Attention& a, int64_t query) const { return start < stop && any(a, query, 1, 0, keys_); }

  // Scores of hidden pairs become minus infinity, also those of columns past the last visible key, which fill up the
  // last vector.
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
  bool holes_ = false;
};

}  // namespace deberta_fast::DEBERTA_FAST_ISA
