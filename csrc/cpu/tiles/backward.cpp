// Gradients, (8) to (11), in bfloat16 by products in tiles. P and dA of a tile of scores are rounded to bfloat16; sums
// are in float32.
//
// Near tiles add the terms of (9), where x_i and T^e are q_i and K^e, or k_j and Q^e with a transposed dA:
//
//     dx_i += sum_e dA_i,i+e T^e      A: rows of dA, each read one cell further right than the one above
//     dT^e += sum_i dA_i,i+e x_i      transposed, x^T (D, i) times (i, e), B: pairs of rows of dA that are skewed alike
//
// A margin of zeros around dA stands for the pairs outside of the tile.
#include "../backward.h"

#include "../dropout.h"
#include "../sums.h"
#include "scores.h"

namespace deberta_fast::DEBERTA_FAST_ISA {
namespace {

constexpr int64_t kBackwardKeys = 128;  // the most keys of a tile

// dA or its transpose, (rows, pitch), in rows and in pairs of rows, of which the second is shifted one cell to the left.
struct Gradient {
  uint16_t *rows, *pairs;
  int64_t pitch;

  uint16_t* row(int64_t r) const { return rows + r * pitch; }

  // Clears what lies to the right of the columns.
  void clear_margin(int64_t count, int64_t columns) const {
    for (int64_t r = 0; r < count; ++r) std::fill_n(row(r) + columns, kMargin, uint16_t{0});
  }

  void fill_pairs(int64_t count, int64_t columns) const {
    for (int64_t r = 0; r < count; r += 2) {
      interleave(row(r) - kMargin, row(r + 1) - kMargin + 1, columns + 2 * kMargin, pairs + r * pitch - 2 * kMargin);
    }
  }
};

// The gradient of an expanded table, transposed: (D, distances_pitch_), or null if it is not wanted.
struct ByDistance {
  static constexpr Range kNothing{INT64_MAX, 0};

  float* columns = nullptr;
  Range touched = kNothing;  // all columns outside are zero

  void touch(Range more) { touched = {std::min(touched.start, more.start), std::max(touched.stop, more.stop)}; }
};

class BackwardPass : ScoreTiles {
 public:
  BackwardPass(const Attention& a, const Backward& b) : ScoreTiles(a), b_(b) {
    memory_ = allocate([&](Carver& carver) { carve(carver); });
    // The margins to the left stay zero.
    for (const Gradient& g : {da_, da_t_}) std::fill_n(g.rows - kMargin, kMaxBlockRows * g.pitch, uint16_t{0});
    for (const ByDistance& g : {grad_key_by_distance_, grad_query_by_distance_}) {
      if (g.columns) std::fill_n(g.columns, size_ * distances_pitch_, 0.0f);
    }
  }

  void items(int64_t wave, int64_t begin, int64_t end) {
    const int64_t last_distance = a_.first_distance + a_.distances - 1, rows = a_.used_rows * size_;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item % a_.parts, group = item / a_.parts % b_.groups;
      head_ = item / a_.parts / b_.groups;
      std::fill_n(far_grad_key_, 2 * size_, 0.0f);
      std::fill_n(far_grad_query_, 2 * size_, 0.0f);
      for (int64_t s = group == 0 ? 0 : b_.group_ends[group - 1]; s < b_.group_ends[group]; ++s) {
        run(s, part, keys_of_part(a_.sequences[s].keys, a_.parts, (part + wave) % a_.parts));
      }
      if (b_.pos_key_sums) {
        sum_by_slot(grad_key_by_distance_, a_.first_reached - a_.first_distance, a_.key_runs, wave == 0,
                    b_.pos_key_sums + item * rows);
        add_far_rows(a_, far_grad_key_, b_.pos_key_sums + item * rows);
      }
      if (b_.pos_query_sums) {
        sum_by_slot(grad_query_by_distance_, last_distance - (a_.first_reached + a_.reached - 1), a_.query_runs,
                    wave == 0, b_.pos_query_sums + item * rows);
        add_far_rows(a_, far_grad_query_, b_.pos_query_sums + item * rows);
      }
    }
  }

 private:
  void carve(Carver& carver) {
    const int64_t keys = round_up(keys_of_part(a_.longest_key, a_.parts, 0).stop, kPaddedRows) + kPaddedRows;
    keys_pitch_ = keys, distances_pitch_ = round_up(a_.distances, kPaddedRows) + kTile;
    carve_scores(carver, keys, kBackwardKeys);
    const auto halves = [&](int64_t count) { return carve_halves(carver, count); };
    key_pairs_ = halves(keys * size_), value_t_ = halves(keys * size_);
    query_pairs_ = halves(kMaxBlockRows * size_), query_columns_ = halves(size_ * kMaxBlockRows);
    dout_ = halves(kMaxBlockRows * size_), dout_pairs_ = halves(kMaxBlockRows * size_);
    output_ = halves(kMaxBlockRows * size_), output_t_ = halves(kMaxBlockRows * size_);
    p_ = halves(kMaxBlockRows * kBackwardKeys), p_t_ = halves(kBackwardKeys * kMaxBlockRows);
    const auto gradient = [&](int64_t rows, int64_t columns) {
      const int64_t pitch = columns + 2 * kMargin;
      uint16_t* const in_rows = halves(rows * pitch + kMargin) + kMargin;
      return Gradient{in_rows, halves(rows * pitch + 4 * kMargin) + 2 * kMargin, pitch};
    };
    da_ = gradient(kMaxBlockRows, kBackwardKeys), da_t_ = gradient(kBackwardKeys, kMaxBlockRows);
    if (b_.pos_query_sums) key_columns_ = halves(size_ * keys_pitch_);
    dp_ = carver(kMaxBlockRows * kBackwardKeys), dq_ = carver(kMaxBlockRows * size_);
    dk_ = carver(keys * size_), dv_ = carver(keys * size_);
    keep_ = carver(round_up(kBackwardKeys, 8 * kLanes)), row_ = carver(size_);
    for (float*& sums : column_sums_) sums = carver(keys);
    far_grad_key_ = carver(2 * size_), far_grad_query_ = carver(2 * size_);
    if (b_.pos_key_sums) grad_key_by_distance_.columns = carver(size_ * distances_pitch_);
    if (b_.pos_query_sums) grad_query_by_distance_.columns = carver(size_ * distances_pitch_);
    if (b_.pos_key_sums || b_.pos_query_sums) by_distance_ = carver(distances_pitch_ * size_);
  }

  // Processes the stretches of one part of a sequence's queries against these keys.
  void run(int64_t s, int64_t part, Range keys) {
    const Sequence& sequence = a_.sequences[s];
    const Range all = keys;
    visible_ = VisibleKeys(a_, sequence, head_, bias_);
    keys.start = std::max(keys.start, visible_.start), keys.stop = std::min(keys.stop, visible_.stop);
    first_key_ = keys.start, first_sum_ = all.start;
    const int64_t count = round_up(all.stop - all.start, kPaddedRows) + kPaddedRows;
    std::fill_n(dk_, count * size_, 0.0f);
    std::fill_n(dv_, count * size_, 0.0f);
    for (float* sums : column_sums_) std::fill_n(sums, count, 0.0f);
    const int64_t stretches = stretches_of(a_, sequence.queries) / a_.parts;
    if (keys.start < keys.stop && stretches > 0) load_keys(sequence, keys);
    for (int64_t n = part * stretches; n < (part + 1) * stretches; ++n) {
      const Range rows = rows_of_stretch(a_, sequence.queries, n);
      if (rows.start < rows.stop) {
        run({head_, s, rows.start, rows.stop - rows.start, rows.start + a_.query_offset}, keys);
      }
    }
    if (has_positions()) add_far_keys(keys);
    if (a_.parts == 1) {
      store_heads(b_.grad_key, dk_, sequence.batch, sequence.first_key, sequence.keys, a_.key_gradient_scale);
      store_heads(b_.grad_value, dv_, sequence.batch, sequence.first_key, sequence.keys, 1.0f);
    } else {
      const int64_t row = b_.key_starts[s] * a_.heads + head_ * sequence.keys + all.start;
      add_scaled(1.0f, dk_, b_.key_sums + row * size_, (all.stop - all.start) * size_);
      add_scaled(1.0f, dv_, b_.value_sums + row * size_, (all.stop - all.start) * size_);
    }
  }

  bool has_positions() const { return a_.pos_key.data || a_.pos_query.data; }

  void load_keys(const Sequence& sequence, const Range& keys) {
    const int64_t count = keys.stop - keys.start, padded = round_up(count, kPaddedRows) + kPaddedRows;
    // The memory of the keys' rows serves the values first.
    copy_padded(rows_of<Bfloat16>(a_.value, sequence.batch, head_, sequence.first_key + keys.start), count, a_.size,
                key_, size_);
    std::fill_n(key_ + (padded - kPaddedRows) * size_, kPaddedRows * size_, uint16_t{0});
    pack_transposed(key_, padded, size_, value_t_);
    load_key_rows(sequence, head_, keys.start, keys.stop);
    pair_rows(key_, padded, size_, key_pairs_);
    if (b_.pos_query_sums) transpose_halves(key_, size_, padded, size_, key_columns_, keys_pitch_);
  }

  void run(const Block& block, const Range& keys) {
    load_queries(block);
    std::fill_n(dq_, padded_rows(block) * size_, 0.0f);
    for (auto& sums : row_sums_) std::fill_n(sums, kMaxBlockRows, 0.0f);
    for_each_tile(block, block, first_key_, keys.start, std::max(keys.start, keys.stop), kBackwardKeys,
                  [&](Side side, int64_t key, int64_t count) { tile(block, side, key, count); });
    if (has_positions()) add_far_queries(block);
    const Sequence& sequence = a_.sequences[block.sequence];
    if (a_.parts == 1) {
      store_heads(b_.grad_query, dq_, sequence.batch, sequence.first_query + block.first, block.rows, a_.scale);
    } else {
      const int64_t row = b_.query_starts[block.sequence] * a_.heads + head_ * sequence.queries + block.first;
      add_scaled(1.0f, dq_, b_.query_sums + row * size_, block.rows * size_);
    }
  }

  void load_queries(const Block& block) {
    const Sequence& sequence = a_.sequences[block.sequence];
    const int64_t rows = padded_rows(block);
    const auto copy = [&](const Heads& heads, uint16_t* to) {
      copy_padded(rows_of<Bfloat16>(heads, sequence.batch, head_, sequence.first_query + block.first), block.rows,
                  a_.size, to, size_);
    };
    load_query(sequence, block);
    pair_rows(query_, rows, size_, query_pairs_);
    if (b_.pos_key_sums) transpose_halves(query_, size_, rows, size_, query_columns_, kMaxBlockRows);
    copy(b_.grad_output, dout_);
    pair_rows(dout_, rows, size_, dout_pairs_);
    // Delta is summed in the order of dP, so that dP - Delta is exactly 0 if P is 1.
    copy(b_.output, output_);
    pack_transposed(output_, rows, size_, output_t_);
    for (int64_t r = 0; r < rows; r += kTile) {
      float square[kTile][kTile];
      product(1, 1, depth_, {dout_ + r * size_, size_}, packed(output_t_ + r * size_, size_), {}, {square[0], kTile});
      for (int64_t l = 0; l < kTile; ++l) delta_[r + l] = square[l][l];
    }
    statistics_.load(a_, b_, block);
  }

  void tile(const Block& block, Side side, int64_t key, int64_t count) {
    const int64_t local = key - first_key_, rows = padded_rows(block), columns = round_up(count, kPaddedRows);
    product(rows / kTile, columns / kTile, depth_, {dout_, size_}, packed(value_t_ + local * size_, size_), {},
            {dp_, kBackwardKeys});
    softmax_gradient(block, side, key, count);
    transpose_halves(p_, kBackwardKeys, rows, columns, p_t_, kMaxBlockRows);
    transpose_halves(da_.rows, da_.pitch, rows, columns, da_t_.rows, da_t_.pitch);

    const auto add = [&](int64_t of_sum, int64_t count_summed, Left a, const uint16_t* paired, float* to) {
      product(of_sum / kTile, size_ / kTile, count_summed / kDepth, a, pairs(paired, size_), {to, size_}, {to, size_});
    };
    float* const dk = dk_ + (key - first_sum_) * size_;
    add(columns, rows, {p_t_, kMaxBlockRows}, dout_pairs_, dv_ + (key - first_sum_) * size_);
    add(columns, rows, {da_t_.rows, da_t_.pitch}, query_pairs_, dk);
    add(rows, columns, {da_.rows, da_.pitch}, key_pairs_ + local * size_, dq_);
    if (side != kNear) return;
    if (a_.pos_key.data) {
      const int64_t first = key - block.position - a_.first_distance;
      da_.clear_margin(rows, columns);
      add_distance_gradients(rows, columns, da_, first, a_.key_by_distance, dq_, {query_columns_, kMaxBlockRows},
                             grad_key_by_distance_);
    }
    if (a_.pos_query.data) {
      const int64_t first = block.position - key + a_.first_distance + a_.distances - 1;
      da_t_.clear_margin(columns, rows);
      add_distance_gradients(columns, rows, da_t_, first, a_.query_by_distance, dk, {key_columns_ + local, keys_pitch_},
                             grad_query_by_distance_);
    }
  }

  // Computes P with dropout, and dA, from the scores and dP. Both are zero in the padding.
  void softmax_gradient(const Block& block, Side side, int64_t key, int64_t count) {
    const int64_t columns = round_up(count, kLanes), padded = round_up(count, kPaddedRows);
    const Vector scale = broadcast(factor());
    const bool far = side != kNear && has_positions();
    float* const column_sums = far ? column_sums_[side] + (key - first_sum_) : nullptr;
    for (int64_t r = 0; r < block.rows; ++r) {
      const float *const row = scores_ + r * pitch_, *const dp_row = dp_ + r * kBackwardKeys;
      uint16_t *const p_row = p_ + r * kBackwardKeys, *const da_row = da_.row(r);
      const Vector constant = broadcast(constants(side)[r]), p_factor = broadcast(statistics_.factor[r]);
      const Vector delta = broadcast(delta_[r]), grad_lse = broadcast(statistics_.grad_lse[r]);
      const float shift = statistics_.shift[r];
      if (a_.dropout) {
        keep_row(a_, block.sequence, head_, block.first + r, key, columns, keep_);
      }
      Vector sums{};
      for (int64_t c = 0; c < columns; c += kLanes) {
        Vector p = exp2(load(row + c) * scale + constant - shift) * p_factor, dp = load(dp_row + c);
        const Vector keep = a_.dropout ? load(keep_ + c) : broadcast(1.0f);
        const Vector da = p * (dp * keep - delta + grad_lse);
        store_rounded(p_row + c, p * keep);
        store_rounded(da_row + c, da);
        if (!far) continue;
        sums += da;
        store(column_sums + c, load(column_sums + c) + da);
      }
      if (far) row_sums_[side][r] += sum(sums);
      std::fill(p_row + count, p_row + padded, uint16_t{0});
      std::fill(da_row + count, da_row + padded, uint16_t{0});
    }
    for (int64_t r = block.rows; r < padded_rows(block); ++r) {
      std::fill_n(p_ + r * kBackwardKeys, padded, uint16_t{0});
      std::fill_n(da_.row(r), padded, uint16_t{0});
    }
  }

  // Adds (9) for rows x, which are queries or keys, and their table: dx by strips of rows, and the gradient of the table
  // by strips of distances, if it is wanted. Cell `first` of the table is the distance of the tile's
  // first row and column.
  void add_distance_gradients(int64_t rows, int64_t columns, const Gradient& g, int64_t first, const float* tables,
                              float* dx, Left x_columns, ByDistance& grad_table) {
    const uint16_t* const table = reinterpret_cast<const uint16_t*>(tables + head_ * a_.distances * size_);
    for (int64_t r = 0; r < rows; r += kPaddedRows) {
      product(kPaddedRows / kTile, size_ / kTile, (columns + kMargin) / kDepth, {g.row(r) - kMargin, g.pitch + 1},
              pairs(table + (first - r - kMargin) * size_, size_), {dx + r * size_, size_}, {dx + r * size_, size_});
    }
    if (grad_table.columns == nullptr) return;
    grad_table.touch({first - rows, first + columns});
    g.fill_pairs(rows, columns);
    constexpr int64_t kStep = 2 * kTile;
    for (int64_t e = -rows; e < columns; e += kStep) {
      // The rows that have these distances within the tile.
      const int64_t from = std::max<int64_t>(-e - kStep, 0), to = std::min(rows, columns - e);
      const int64_t row = 2 * (g.pitch + 2);
      const Sums sums{grad_table.columns + first + e, distances_pitch_};
      product(size_ / kTile, kStep / kTile, (to - from) / kDepth, {x_columns.data + from, x_columns.row},
              {g.pairs + from * g.pitch + 2 * (from + e), row, kTile * row, 2 * kTile}, {sums.data, sums.row}, sums);
    }
  }

  // Adds the terms of (10) of the queries: t_i K^r_r to dQ, and the sums for the far rows of K^r.
  void add_far_queries(const Block& block) {
    for (const Side side : {kPast, kFuture}) {
      far_row(a_, a_.pos_key, head_, side, 1.0f, row_);
      for (int64_t r = 0; r < block.rows; ++r) {
        if (row_sums_[side][r] == 0) continue;  // also if the query or the table is not finite
        add_scaled(row_sums_[side][r], row_, dq_ + r * size_, size_);
        add_scaled_half(row_sums_[side][r], query_ + r * size_, far_grad_key_ + side * size_);
      }
    }
  }

  // The same for the keys: u_j Q^r_r to dK, and the sums for the far rows of Q^r.
  void add_far_keys(const Range& keys) {
    for (const Side side : {kPast, kFuture}) {
      far_row(a_, a_.pos_query, head_, side, 1.0f, row_);
      for (int64_t j = keys.start; j < keys.stop; ++j) {
        const float sum = column_sums_[side][j - first_sum_];
        if (sum == 0) continue;
        add_scaled(sum, row_, dk_ + (j - first_sum_) * size_, size_);
        add_scaled_half(sum, key_ + (j - first_key_) * size_, far_grad_query_ + side * size_);
      }
    }
  }

  // y += factor x
  void add_scaled_half(float factor, const uint16_t* x, float* y) const {
    for (int64_t d = 0; d < size_; d += kLanes) store(y + d, load(y + d) + Bfloat16::load(x + d) * factor);
  }

  // Adds the gradient of a table to `sums`, the rows of the table (11), which it first clears if `start`, and clears it.
  // Pairs have the a.reached distances from cell first_reached on. Adds sums of kRun rows, because hundreds of distances
  // share the outermost rows of a table and rounding grows with the length of a sum.
  void sum_by_slot(ByDistance& gradient, int64_t first_reached, const Runs& runs, bool start, float* sums) {
    constexpr int64_t kRun = 16;
    if (start) std::fill_n(sums, a_.used_rows * size_, 0.0f);
    const Range touched = gradient.touched;
    if (touched.start >= touched.stop) return;
    for (int64_t t = touched.start; t < touched.stop; t += kTile) {
      for (int64_t d = 0; d < size_; d += kTile) {
        transpose_words(gradient.columns + d * distances_pitch_ + t, distances_pitch_, by_distance_ + t * size_ + d,
                        size_);
      }
    }
    const int64_t stop = std::min(first_reached + a_.reached, touched.stop);
    for (int64_t t = std::max(first_reached, touched.start); t < stop;) {
      const int32_t run = runs.runs[t];
      std::fill_n(row_, size_, 0.0f);
      for (int64_t n = 0; n < kRun && t < stop && runs.runs[t] == run; ++n, ++t) {
        add_scaled(1.0f, by_distance_ + t * size_, row_, size_);
      }
      add_scaled(1.0f, row_, sums + (runs.slots[run] - a_.first_used_row) * size_, size_);
    }
    for (int64_t d = 0; d < size_; ++d) {
      std::fill_n(gradient.columns + d * distances_pitch_ + touched.start, touched.stop - touched.start, 0.0f);
    }
    gradient.touched = ByDistance::kNothing;
  }

  void store_heads(const Heads& to, const float* from, int64_t batch, int64_t first, int64_t count, float scale) {
    store_rows<Bfloat16>(from, size_, count, a_.size, scale, rows_of<Bfloat16>(to, batch, head_, first));
  }

  const Backward& b_;
  Scratch memory_;
  int64_t head_ = 0, first_key_ = 0, first_sum_ = 0;  // the first of the loaded keys; of dk_, dv_
  int64_t keys_pitch_ = 0, distances_pitch_ = 0;
  uint16_t *key_pairs_, *key_columns_, *value_t_;       // pairs of (keys, D); (D, keys_pitch_); packed
  uint16_t *query_pairs_, *query_columns_;              // pairs of (rows, D); (D, rows)
  uint16_t *dout_, *dout_pairs_, *output_, *output_t_;  // (rows, D); pairs; (rows, D); packed
  uint16_t *p_, *p_t_;                                  // (rows, kBackwardKeys); (keys, kMaxBlockRows)
  Gradient da_, da_t_;                                  // dA and its transpose
  float *dp_, *dq_, *dk_, *dv_;                         // (rows, kBackwardKeys); (rows, D); (keys, D)
  float *keep_, *row_, *by_distance_;                   // dropout of a row; (D); (distances, D)
  float *column_sums_[2], row_sums_[2][kMaxBlockRows];  // of dA of far keys on either side
  float *far_grad_key_, *far_grad_query_;               // (2, D)
  ByDistance grad_key_by_distance_, grad_query_by_distance_;
  RowStatistics statistics_;
  float delta_[kMaxBlockRows];
};

}  // namespace

void backward(const Attention& a, const Backward& b, int64_t wave, int64_t begin, int64_t end) {
  const TileConfiguration tiles;
  BackwardPass(a, b).items(wave, begin, end);
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
