// A block of queries and its keys: which are near, far and visible, and where their rows lie.
#pragma once

#include <algorithm>
#include <cmath>

#include "elements.h"
#include "kernels.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

constexpr float kInfinity = __builtin_inff(), kNaN = __builtin_nanf("");

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

// Segments and visible keys begin and end at multiples of it, or where the keys do. Dropout requires multiples of 8.
INLINE int64_t key_step(const Attention& a) { return std::max<int64_t>({kLanes, 8, a.row_step}); }

// Divides the keys [start, stop) into those far from all queries of a stretch, on either side, and those between.
// All keys are far if there are no position terms.
inline void cut_segments(const Attention& a, const Block& stretch, int64_t start, int64_t stop,
                         Segment (&segments)[3]) {
  int64_t near_start = stop, near_stop = stop;
  if (a.pos_key.data || a.pos_query.data) {
    const auto within = [&](int64_t key) { return std::clamp(key, start, stop); };
    near_start = within(round_down(std::max<int64_t>(stretch.position - a.far_past + 1, 0), key_step(a)));
    near_stop = stretch.position + stretch.rows - 1 - a.far_future;
    near_stop = std::max(near_start, within(round_up(std::max<int64_t>(near_stop, 0), key_step(a))));
  }
  segments[0] = {start, near_start, kPast};
  segments[1] = {near_start, near_stop, kNear};
  segments[2] = {near_stop, stop, kFuture};
}

// Copies the row of a table that all keys far on one side read, times `scale`. Copies zeros if the table is absent.
inline void far_row(const Attention& a, const Table& table, int64_t head, Side side, float scale, float* to) {
  const int64_t size = a.padded_size;
  std::fill_n(to, size, 0.0f);
  if (table.data == nullptr) return;
  const int64_t slot = slot_of(a, side == kPast ? a.reach : -a.reach);
  with_element(a.element, [&](auto element) {
    using E = decltype(element);
    const auto* row = static_cast<const typename E::Stored*>(table.data) + head * table.head + slot * table.row;
    copy_rows<E>([&](int64_t) { return row; }, 1, a.size, scale, to, size);
  });
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
    start = stop == 0 ? 0 : round_down(start, key_step(a));
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

}  // namespace deberta_fast::DEBERTA_FAST_ISA
