// Gradients, (8) to (11), a block of queries at a time over tiles of keys, with P made anew:
//
//     P = 2^(Z - peak) / total    dP = dO V^T    dA = P o (dP - Delta + dlse)    Delta_i = dO_i . O_i    dV = P^T dO
//
// Near tiles add the position terms of (9) as products along the diagonals of dA: their operand is dA itself, read with
// skewed strides (gemm.h). A margin of zeros around dA stands for the pairs outside of the tile.
#include <cmath>

#include "dropout.h"
#include "tile.h"

namespace deberta_fast::DEBERTA_FAST_ISA {
namespace {

constexpr int64_t kBackwardKeys = 192;            // keys of a tile: two tiles of scores stay in the second-level cache
constexpr int64_t kMarginRows = 8, kMargin = 16;  // zeros above and below dA, and left and right of it
constexpr int64_t kGradPitch = kBackwardKeys + 48;  // an odd number of cache lines
static_assert(kMarginRows >= kStrip - 1 && kMargin >= kStrip - 1 && kGradPitch >= kBackwardKeys + 2 * kMargin);
static_assert(kTileKeys % kBackwardKeys == 0);

// Keys of one sequence that belong to part `part` of `parts`; parts begin at whole vectors of any instruction set.
Range keys_of_part(int64_t keys, int64_t parts, int64_t part) {
  const int64_t step = round_up((keys + parts - 1) / parts, 16), start = std::min(keys, part * step);
  return {start, std::min(keys, start + step)};
}

class BackwardPass {
 public:
  BackwardPass(const Attention& a, const Backward& b) : a_(a), b_(b), size_(round_up(a.size, kLanes)) {
    Carver needed;
    carve(needed);
    memory_ = ThreadMemory(kThreadScratch, needed.floats());
    Carver memory(memory_.data());
    carve(memory);
    // The margins above and on the left, which nothing overwrites.
    std::fill_n(margins_, (kMarginRows + kMaxBlockRows + kMarginRows) * kGradPitch, 0.0f);
    grad_scores_ = margins_ + kMarginRows * kGradPitch + kMargin;
  }

  void items(int64_t wave, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item % a_.parts, group = item / a_.parts % b_.groups;
      head_ = item / a_.parts / b_.groups;
      const int64_t by_distance = a_.distances * size_;
      if (b_.pos_key_sums) std::fill_n(grad_key_by_distance_, by_distance, 0.0f);
      if (b_.pos_query_sums) std::fill_n(grad_query_by_distance_, by_distance, 0.0f);
      std::fill_n(far_grad_key_, 2 * size_, 0.0f);
      std::fill_n(far_grad_query_, 2 * size_, 0.0f);
      for (int64_t s = group == 0 ? 0 : b_.group_ends[group - 1]; s < b_.group_ends[group]; ++s) {
        run(s, part, keys_of_part(a_.sequences[s].keys, a_.parts, (part + wave) % a_.parts));
      }
      const int64_t rows = a_.used_rows * size_;
      const auto last_distance = a_.first_distance + a_.distances - 1;
      if (b_.pos_key_sums) {
        sum_by_slot(grad_key_by_distance_, far_grad_key_, -a_.first_distance, -1, wave == 0,
                    b_.pos_key_sums + item * rows);
      }
      if (b_.pos_query_sums) {
        sum_by_slot(grad_query_by_distance_, far_grad_query_, -last_distance, 1, wave == 0,
                    b_.pos_query_sums + item * rows);
      }
    }
  }

 private:
  void carve(Carver& carver) {
    int64_t queries = 0, keys = 0;
    for (int64_t s = 0; s < a_.sequence_count; ++s) {
      queries = std::max(queries, a_.sequences[s].queries), keys = std::max(keys, a_.sequences[s].keys);
    }
    const Range part = keys_of_part(keys, a_.parts, 0);
    const int64_t tiles = (part.stop + kTileKeys - 1) / kTileKeys, most = tiles * kTileKeys;
    key_t_ = carver(tiles * kTilePitch * size_), value_t_ = carver(tiles * kTilePitch * size_);
    key_ = carver(most * size_);
    if (a_.parts == 1) grad_key_ = carver(most * size_), grad_value_ = carver(most * size_);
    query_ = carver(kMaxBlockRows * size_), far_query_ = carver(kMaxBlockRows * size_);
    grad_output_ = carver(kMaxBlockRows * size_), grad_query_ = carver(kMaxBlockRows * size_);
    scores_ = carver(kMaxBlockRows * kGradPitch);
    margins_ = carver((kMarginRows + kMaxBlockRows + kMarginRows) * kGradPitch);
    bias_ = carver(round_up(keys, kLanes)), row_ = carver(size_);
    keep_ = carver(kBackwardKeys + 4 * kLanes), column_sums_ = carver(kBackwardKeys + kLanes);
    far_grad_key_ = carver(2 * size_), far_grad_query_ = carver(2 * size_);
    if (b_.pos_key_sums) grad_key_by_distance_ = carver(a_.distances * size_);
    if (b_.pos_query_sums) grad_query_by_distance_ = carver(a_.distances * size_);
    strips_.carve(carver);
  }

  // The stretches of one part of a sequence's queries, and these keys.
  void run(int64_t s, int64_t part, Range keys) {
    const Sequence& sequence = a_.sequences[s];
    if (a_.parts == 1) {
      std::fill_n(grad_key_, sequence.keys * size_, 0.0f);
      std::fill_n(grad_value_, sequence.keys * size_, 0.0f);
    } else {
      const int64_t offset = (b_.key_starts[s] * a_.heads + head_ * sequence.keys) * size_;
      grad_key_ = b_.key_sums + offset, grad_value_ = b_.value_sums + offset;
    }
    visible_ = VisibleKeys(a_, sequence, head_, bias_);
    keys.start = std::max(keys.start, visible_.start), keys.stop = std::min(keys.stop, visible_.stop);
    first_key_ = keys.start;
    const int64_t stretches = stretches_of(a_, sequence.queries) / a_.parts;
    if (keys.start < keys.stop && stretches > 0) load_keys(sequence, keys);
    for (int64_t n = part * stretches; n < (part + 1) * stretches; ++n) {
      const Range rows = rows_of_stretch(a_, sequence.queries, n);
      if (rows.start < rows.stop) {
        run({head_, s, rows.start, rows.stop - rows.start, rows.start + a_.query_offset}, keys);
      }
    }
    if (a_.parts == 1) {
      store_heads(b_.grad_key, grad_key_, sequence.batch, sequence.first_key, sequence.keys,
                  static_cast<float>(1 / kLog2e));
      store_heads(b_.grad_value, grad_value_, sequence.batch, sequence.first_key, sequence.keys, 1.0f);
    }
  }

  void load_keys(const Sequence& sequence, const Range& keys) {
    with_element(a_.element, [&](auto element) {
      using E = decltype(element);
      const auto key = rows_of<E>(a_.key, sequence.batch, head_, sequence.first_key + keys.start);
      const auto value = rows_of<E>(a_.value, sequence.batch, head_, sequence.first_key + keys.start);
      const int64_t all = keys.stop - keys.start;
      for (int64_t first = 0; first < all; first += kTileKeys) {
        const int64_t count = std::min(all - first, kTileKeys), tile = first / kTileKeys * kTilePitch * size_;
        const auto from = [first](auto rows) { return [rows, first](int64_t r) { return rows(first + r); }; };
        transpose_rows<E>(from(key), count, a_.size, 1.0f, key_t_ + tile, kTilePitch);
        transpose_rows<E>(from(value), count, a_.size, 1.0f, value_t_ + tile, kTilePitch);
      }
      copy_rows<E>(key, all, a_.size, 1.0f, key_, size_);
    });
  }

  void run(const Block& block, const Range& keys) {
    load_queries(block);
    std::fill_n(grad_query_, block.rows * size_, 0.0f);
    Segment segments[3];
    cut_segments(a_, block, keys.start, std::max(keys.start, keys.stop), segments);
    for (const Segment& segment : segments) {
      if (segment.start >= segment.stop) continue;
      if (segment.side != kNear) far_queries(a_, block, segment.side, query_, far_query_, far_constant_, row_);
      for (int64_t key = segment.start, next; key < segment.stop; key = next) {
        next = std::min(first_key_ + round_down(key - first_key_, kBackwardKeys) + kBackwardKeys, segment.stop);
        if (visible_.any(a_, block.first, block.rows, key, next - key)) tile(block, segment.side, key, next - key);
      }
    }
    const Sequence& sequence = a_.sequences[block.sequence];
    if (a_.parts == 1) {
      store_heads(b_.grad_query, grad_query_, sequence.batch, sequence.first_query + block.first, block.rows, a_.scale);
    } else {
      const int64_t row = b_.query_starts[block.sequence] * a_.heads + head_ * sequence.queries + block.first;
      add_scaled(1.0f, grad_query_, b_.query_sums + row * size_, block.rows * size_);
    }
  }

  void load_queries(const Block& block) {
    const Sequence& sequence = a_.sequences[block.sequence];
    const int64_t first = sequence.first_query + block.first;
    with_element(a_.element, [&](auto element) {
      using E = decltype(element);
      const auto rows = [&](const Heads& heads) { return rows_of<E>(heads, sequence.batch, head_, first); };
      copy_rows<E>(rows(a_.query), block.rows, a_.size, static_cast<float>(a_.scale * kLog2e), query_, size_);
      copy_rows<E>(rows(b_.grad_output), block.rows, a_.size, 1.0f, grad_output_, size_);
      copy_rows<E>(rows(b_.output), block.rows, a_.size, 1.0f, grad_query_, size_);  // whose turn comes later
    });
    row_dots(grad_output_, grad_query_, block.rows, size_, delta_);
    const double log_keys = std::log2(static_cast<double>(sequence.keys));
    for (int64_t r = 0; r < block.rows; ++r) {
      const auto given = [&](const Statistic& x) { return *at(x, sequence.batch, head_, first + r); };
      grad_lse_[r] = b_.grad_lse.data ? given(b_.grad_lse) : 0.0f;
      // 2^peak total is the row's sum; kept apart they hold it where one float32 for both would round it off. Where they
      // do not make up the log-sum-exp, they are not this row's.
      const float lse = given(b_.lse);
      const bool none = lse == -kInfinity;
      double peak = lse * kLog2e, total = 1, log_total = 0;
      if (b_.peak.data) {
        const double logarithm = std::log2(static_cast<double>(given(b_.total)));
        if (none ? given(b_.peak) == lse : log_sum_exp(given(b_.peak), logarithm) == lse) {
          peak = given(b_.peak), total = given(b_.total), log_total = logarithm;
        }
      }
      // P = 2^(Z - shift) factor. Nearer to most scores than the log-sum-exp, the shift rounds off less of Z - shift.
      // A row that sees nothing has 2^(-inf - 0) times 0; scores of minus infinity are multiplied by a NaN.
      shift_[r] = none ? 0.0f : static_cast<float>(peak + log_total - log_keys);
      factor_[r] = static_cast<float>(none ? 0 * total : std::exp2(shift_[r] - peak) / total);
    }
  }

  void tile(const Block& block, Side side, int64_t key, int64_t count) {
    const int64_t columns = round_up(count, kLanes), local = key - first_key_;
    const int64_t in_tile = local / kTileKeys * kTilePitch * size_ + local % kTileKeys;
    const bool near = side == kNear;
    if (near) {
      near_scores(a_, block, query_, key_t_ + in_tile, key, count, columns, strips_, scores_, kGradPitch);
    } else {
      far_scores(a_, block.rows, far_query_, key_t_ + in_tile, columns, scores_, kGradPitch);
    }
    visible_.hide(a_, block.first, block.rows, key, columns, scores_, kGradPitch);
    gemm(block.rows, columns, a_.size, {grad_output_, size_, 1}, value_t_ + in_tile, kTilePitch, nullptr, 0,
         grad_scores_, kGradPitch);
    softmax_gradient(block, side, key, columns);

    const Operand by_query{grad_scores_, kGradPitch, 1}, by_key{grad_scores_, 1, kGradPitch};
    float* const grad_key = grad_key_ + key * size_;
    gemm_add(count, size_, block.rows, {scores_, 1, kGradPitch}, grad_output_, size_, grad_value_ + key * size_, size_);
    gemm_add(count, size_, block.rows, by_key, near ? query_ : far_query_, size_, grad_key, size_);
    gemm_add(block.rows, size_, count, by_query, key_ + local * size_, size_, grad_query_, size_);
    if (near) {
      if (a_.pos_key.data) add_c2p_gradients(block, key, count);
      if (a_.pos_query.data) add_p2c_gradients(block, key, count, grad_key);
    } else if (a_.pos_key.data || a_.pos_query.data) {
      add_far_gradients(block, side, local, count);
    }
  }

  // P with dropout over the scores, dA over dP.
  void softmax_gradient(const Block& block, Side side, int64_t key, int64_t columns) {
    for (int64_t r = 0; r < block.rows; ++r) {
      float *const p_row = scores_ + r * kGradPitch, *const g_row = grad_scores_ + r * kGradPitch;
      const float constant = side == kNear ? 0.0f : far_constant_[r], shift = shift_[r];
      const Vector factor = broadcast(factor_[r]), delta = broadcast(delta_[r]), grad_lse = broadcast(grad_lse_[r]);
      if (a_.dropout) {
        keep_row(a_, block.sequence * a_.heads + head_, block.first + r, key, columns, keep_);
      }
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Vector p = exp2(load(p_row + c) + constant - shift) * factor, grad_p = load(g_row + c);
        if (a_.dropout) {
          const Vector keep = load(keep_ + c);
          store(g_row + c, p * (grad_p * keep - delta + grad_lse));
          store(p_row + c, p * keep);
        } else {
          store(g_row + c, p * (grad_p - delta + grad_lse));
          store(p_row + c, p);
        }
      }
      std::fill_n(g_row + columns, kStrip - 1, 0.0f);
    }
    for (int64_t r = block.rows; r < block.rows + kStrip - 1; ++r) {
      std::fill_n(grad_scores_ + r * kGradPitch, columns, 0.0f);
    }
  }

  // (9): dq_i += sum_e dA^e_i K^e by strips of queries, dK^e += sum_i dA^e_i q_i by strips of distances.
  void add_c2p_gradients(const Block& block, int64_t key, int64_t count) {
    const int64_t first = key - (block.position + block.rows - 1) - a_.first_distance;  // that of the lower left pair
    const float* table = a_.key_by_distance + (head_ * a_.distances + first) * size_;
    for (int64_t r = 0; r < block.rows; r += kStrip) {
      const int64_t strip = std::min<int64_t>(block.rows - r, kStrip);
      gemm_add(strip, size_, count + strip - 1, {grad_scores_ + r * kGradPitch - (strip - 1), kGradPitch + 1, 1},
               table + (block.rows - r - strip) * size_, size_, grad_query_ + r * size_, size_);
    }
    if (b_.pos_key_sums == nullptr) return;
    float* const grad = grad_key_by_distance_ + first * size_;
    const int64_t distances = block.rows + count - 1;
    for (int64_t m = 0; m < distances; m += kStrip) {
      const int64_t strip = std::min<int64_t>(distances - m, kStrip);
      const int64_t from = std::max<int64_t>(block.rows - m - strip, 0), to = std::min(block.rows, distances - m);
      gemm_add(strip, size_, to - from,
               {grad_scores_ + from * (kGradPitch + 1) + m - (block.rows - 1), 1, kGradPitch + 1},
               query_ + from * size_, size_, grad + m * size_, size_);
    }
  }

  // (9): dk_j += sum_e dA^e_j Q^e by strips of keys, dQ^e += sum_j dA^e_j k_j by strips of distances.
  void add_p2c_gradients(const Block& block, int64_t key, int64_t count, float* grad_key) {
    const int64_t last_distance = a_.first_distance + a_.distances - 1;
    const int64_t first = block.position - (key + count - 1) + last_distance;  // that of the upper right pair
    const float* table = a_.query_by_distance + (head_ * a_.distances + first) * size_;
    for (int64_t j = 0; j < count; j += kStrip) {
      const int64_t strip = std::min<int64_t>(count - j, kStrip);
      gemm_add(strip, size_, block.rows + strip - 1,
               {grad_scores_ - (strip - 1) * kGradPitch + j, kGradPitch + 1, kGradPitch},
               table + (count - j - strip) * size_, size_, grad_key + j * size_, size_);
    }
    if (b_.pos_query_sums == nullptr) return;
    float* const grad = grad_query_by_distance_ + first * size_;
    const int64_t distances = block.rows + count - 1;
    for (int64_t m = 0; m < distances; m += kStrip) {
      const int64_t strip = std::min<int64_t>(distances - m, kStrip);
      const int64_t from = std::max<int64_t>(count - m - strip, 0), to = std::min(count, distances - m);
      gemm_add(strip, size_, to - from,
               {grad_scores_ + from * (kGradPitch + 1) + (m - (count - 1)) * kGradPitch, kGradPitch, kGradPitch + 1},
               key_ + (key - first_key_ + from) * size_, size_, grad + m * size_, size_);
    }
  }

  // (10), save what the products of a plain tile have added already.
  void add_far_gradients(const Block& block, Side side, int64_t local, int64_t count) {
    const int64_t columns = round_up(count, kLanes);
    std::fill_n(column_sums_, columns, 0.0f);
    far_row(a_, a_.pos_key, head_, side, 1.0f, row_);
    for (int64_t r = 0; r < block.rows; ++r) {
      const float* row = grad_scores_ + r * kGradPitch;
      Vector total{};
      for (int64_t c = 0; c < columns; c += kLanes) {
        total += load(row + c);
        store(column_sums_ + c, load(column_sums_ + c) + load(row + c));
      }
      const float row_sum = sum(total);
      add_scaled(row_sum, row_, grad_query_ + r * size_, size_);
      add_scaled(row_sum, query_ + r * size_, far_grad_key_ + side * size_, size_);
    }
    for (int64_t j = 0; j < count; ++j) {
      add_scaled(column_sums_[j], key_ + (local + j) * size_, far_grad_query_ + side * size_, size_);
    }
  }

  // (11): row t of `by_distance` is that of i - j = first + step t. In sums of kRun rows first: hundreds of distances
  // share the outermost rows of a table, and rounding grows with the length of a sum.
  void sum_by_slot(const float* by_distance, const float* far, int64_t first, int64_t step, bool start, float* sums) {
    constexpr int64_t kRun = 16;
    if (start) std::fill_n(sums, a_.used_rows * size_, 0.0f);
    const auto row_of = [&](int64_t slot) { return sums + (slot - a_.first_used_row) * size_; };
    const int64_t last_distance = a_.first_distance + a_.distances - 1;
    const int64_t begin =
        step < 0 ? a_.first_reached - a_.first_distance : last_distance - (a_.first_reached + a_.reached - 1);
    for (int64_t t = begin; t < begin + a_.reached;) {
      const int64_t slot = slot_of(a_, first + step * t);
      std::fill_n(row_, size_, 0.0f);
      for (int64_t n = 0; n < kRun && t < begin + a_.reached && slot_of(a_, first + step * t) == slot; ++n, ++t) {
        add_scaled(1.0f, by_distance + t * size_, row_, size_);
      }
      add_scaled(1.0f, row_, row_of(slot), size_);
    }
    for (const Side side : {kPast, kFuture}) {
      const int64_t slot = slot_of(a_, side == kPast ? a_.reach : -a_.reach);
      const bool reached = a_.first_used_row <= slot && slot < a_.first_used_row + a_.used_rows;
      if (reached) add_scaled(1.0f, far + side * size_, row_of(slot), size_);
    }
  }

  void store_heads(const Heads& to, const float* from, int64_t batch, int64_t first, int64_t count, float scale) {
    with_element(a_.element, [&](auto element) {
      using E = decltype(element);
      store_rows<E>(from, size_, count, a_.size, scale, rows_of<E>(to, batch, head_, first));
    });
  }

  const Attention& a_;
  const Backward& b_;
  const int64_t size_;  // D rounded up
  ThreadMemory memory_;
  VisibleKeys visible_;
  Strips strips_;
  int64_t head_ = 0, first_key_ = 0;         // of the keys that are loaded
  float *key_t_, *value_t_, *key_;           // tiles of (D, kTilePitch); (keys, D)
  float *grad_key_, *grad_value_;            // (keys of the sequence, D)
  float *query_, *far_query_;                // (rows, D), times log2(e) s
  float *grad_output_, *grad_query_;         // (rows, D)
  float *scores_, *margins_, *grad_scores_;  // (rows, kGradPitch): P, and dA with its margins
  float *bias_, *row_, *keep_, *column_sums_;
  float *far_grad_key_, *far_grad_query_;                  // (2, D)
  float *grad_key_by_distance_, *grad_query_by_distance_;  // (distances, D)
  float far_constant_[kMaxBlockRows], shift_[kMaxBlockRows], factor_[kMaxBlockRows], delta_[kMaxBlockRows],
      grad_lse_[kMaxBlockRows];
};

}  // namespace

void backward(const Attention& a, const Backward& b, int64_t wave, int64_t begin, int64_t end) {
  BackwardPass(a, b).items(wave, begin, end);
}

void store_sums(const Attention& a, const Backward& b, int64_t begin, int64_t end) {
  const int64_t size = round_up(a.size, kLanes);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % a.heads, s = item / a.heads;
    const Sequence& sequence = a.sequences[s];
    const int64_t query = (b.query_starts[s] * a.heads + head * sequence.queries) * size;
    const int64_t key = (b.key_starts[s] * a.heads + head * sequence.keys) * size;
    with_element(a.element, [&](auto element) {
      using E = decltype(element);
      const auto rows = [&](const Heads& heads, int64_t first) {
        return rows_of<E>(heads, sequence.batch, head, first);
      };
      store_rows<E>(b.query_sums + query, size, sequence.queries, a.size, a.scale,
                    rows(b.grad_query, sequence.first_query));
      store_rows<E>(b.key_sums + key, size, sequence.keys, a.size, static_cast<float>(1 / kLog2e),
                    rows(b.grad_key, sequence.first_key));
      store_rows<E>(b.value_sums + key, size, sequence.keys, a.size, 1.0f, rows(b.grad_value, sequence.first_key));
    });
  }
}

void store_table(const Attention& a, const Backward& b, const float* sums, float scale, void* gradient, int64_t begin,
                 int64_t end) {
  const int64_t size = round_up(a.size, kLanes), items = b.groups * a.parts;
  const int64_t stop = a.first_used_row + a.used_rows;
  ThreadMemory row(kThreadScratch, size);
  with_element(a.element, [&](auto element) {
    using E = decltype(element);
    auto* to = static_cast<typename E::Stored*>(gradient) + begin * a.table_rows * a.size;
    // Short sequences read few of the rows: the others are zero, in every element type.
    const auto clear = [&](int64_t rows) {
      std::memset(to, 0, rows * a.size * sizeof(*to));
      to += rows * a.size;
    };
    for (int64_t head = begin; head < end; ++head) {
      clear(a.first_used_row);
      for (int64_t used = 0; used < a.used_rows; ++used, to += a.size) {
        std::fill_n(row.data(), size, 0.0f);
        for (int64_t item = head * items; item < (head + 1) * items; ++item) {
          add_scaled(1.0f, sums + (item * a.used_rows + used) * size, row.data(), size);
        }
        store_rows<E>(row.data(), size, 1, a.size, scale, [&](int64_t) { return to; });
      }
      clear(a.table_rows - stop);
    }
  });
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
