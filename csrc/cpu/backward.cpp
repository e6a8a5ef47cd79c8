// Gradients, (8) to (11), for blocks of queries over tiles of keys, with P computed again:
//
//     P = 2^(Z - row_max) / row_sum    dP = dO V^T    dV = P^T dO
//     Delta_i = dO_i . O_i    dA = P o (dP - Delta + dlse)
//
// Near tiles add the position terms of (9), kGroup queries or keys at a time. The left operand is dA summed over runs of
// distances (band.h), or dA itself, read along its diagonals with skewed strides (gemm.h), where no row of the tables is
// shared. A margin of zeros around dA stands for the pairs outside of the tile.
#include "backward.h"

#include "band.h"
#include "dropout.h"
#include "sums.h"
#include "tile.h"

namespace deberta_fast::DEBERTA_FAST_ISA {
namespace {

constexpr int64_t kBackwardKeys = 192;            // keys of a tile; scores and dA fit into the second-level cache
constexpr int64_t kGroup = 48;                    // rows of a band; a multiple of strips and vectors
constexpr int64_t kMarginRows = 8, kMargin = 16;  // zeros above and below dA, and to its left
constexpr int64_t kRightMargin = 2 * kLanes;      // zeros to its right, beyond whole vectors
constexpr int64_t kGradPitch = kBackwardKeys + 48, kGroupPitch = kMaxBlockRows + 48;  // odd numbers of cache lines
static_assert(kMarginRows >= kStrip - 1 && kMargin >= kLanes && kMargin + kRightMargin <= 48);
static_assert(kTileKeys % kBackwardKeys == 0 && kGroup % kStrip == 0 && kGroup % kLanes == 0);

class BackwardPass : ScoreTiles {
 public:
  BackwardPass(const Attention& a, const Backward& b) : ScoreTiles(a), b_(b) {
    memory_ = allocate([&](Carver& carver) { carve(carver); });
    // The margins above and to the left stay zero.
    std::fill_n(margins_, (kMarginRows + kMaxBlockRows + kMarginRows) * kGradPitch, 0.0f);
    std::fill_n(margins_t_, kMargin + kGroup * kGroupPitch, 0.0f);
    da_ = margins_ + kMarginRows * kGradPitch + kMargin, da_t_ = margins_t_ + kMargin;
  }

  void items(int64_t wave, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item % a_.parts, group = item / a_.parts % b_.groups;
      head_ = item / a_.parts / b_.groups;
      const int64_t by_run = a_.run_count * size_;
      if (b_.pos_key_sums) std::fill_n(grad_key_by_run_, by_run, 0.0f);
      if (b_.pos_query_sums) std::fill_n(grad_query_by_run_, by_run, 0.0f);
      std::fill_n(far_grad_key_, 2 * size_, 0.0f);
      std::fill_n(far_grad_query_, 2 * size_, 0.0f);
      for (int64_t s = group == 0 ? 0 : b_.group_ends[group - 1]; s < b_.group_ends[group]; ++s) {
        run(s, part, keys_of_part(a_.sequences[s].keys, a_.parts, (part + wave) % a_.parts));
      }
      const int64_t rows = a_.used_rows * size_;
      if (b_.pos_key_sums) {
        sum_by_slot(a_, grad_key_by_run_, a_.key_runs, far_grad_key_, wave == 0, b_.pos_key_sums + item * rows);
      }
      if (b_.pos_query_sums) {
        sum_by_slot(a_, grad_query_by_run_, a_.query_runs, far_grad_query_, wave == 0, b_.pos_query_sums + item * rows);
      }
    }
  }

 private:
  void carve(Carver& carver) {
    const Range part = keys_of_part(a_.longest_key, a_.parts, 0);
    const int64_t keys = round_up(part.stop, kTileKeys);
    key_t_ = carver(tile_offset(keys, size_)), value_t_ = carver(tile_offset(keys, size_));
    key_ = carver(keys * size_);
    if (a_.parts == 1) dk_ = carver(keys * size_), dv_ = carver(keys * size_);
    dout_ = carver(kMaxBlockRows * size_), dq_ = carver(kMaxBlockRows * size_);
    carve_scores(carver, kGradPitch, true);
    margins_ = carver((kMarginRows + kMaxBlockRows + kMarginRows) * kGradPitch);
    keep_ = carver(round_up(kBackwardKeys, 8 * kLanes)), column_sums_ = carver(kBackwardKeys + kLanes);
    far_grad_key_ = carver(2 * size_), far_grad_query_ = carver(2 * size_);
    if (b_.pos_key_sums) grad_key_by_run_ = carver(a_.run_count * size_);
    if (b_.pos_query_sums) grad_query_by_run_ = carver(a_.run_count * size_);
    margins_t_ = carver(kMargin + kGroup * kGroupPitch);
    by_run_ = carver((kGroup + kBackwardKeys) * kGroup);
  }

  // Processes the stretches of one part of a sequence's queries against these keys.
  void run(int64_t s, int64_t part, Range keys) {
    const Sequence& sequence = a_.sequences[s];
    if (a_.parts == 1) {
      std::fill_n(dk_, sequence.keys * size_, 0.0f);
      std::fill_n(dv_, sequence.keys * size_, 0.0f);
    } else {
      const int64_t offset = (b_.key_starts[s] * a_.heads + head_ * sequence.keys) * size_;
      dk_ = b_.key_sums + offset, dv_ = b_.value_sums + offset;
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
      store_heads(b_.grad_key, dk_, sequence.batch, sequence.first_key, sequence.keys, a_.key_gradient_scale);
      store_heads(b_.grad_value, dv_, sequence.batch, sequence.first_key, sequence.keys, 1.0f);
    }
  }

  void load_keys(const Sequence& sequence, const Range& keys) {
    with_element(a_.element, [&](auto element) {
      using E = decltype(element);
      const auto key = rows_of<E>(a_.key, sequence.batch, head_, sequence.first_key + keys.start);
      const auto value = rows_of<E>(a_.value, sequence.batch, head_, sequence.first_key + keys.start);
      const int64_t count = keys.stop - keys.start;
      transpose_tiles<E>(key, count, a_.size, key_t_);
      transpose_tiles<E>(value, count, a_.size, value_t_);
      copy_rows<E>(key, count, a_.size, 1.0f, key_, size_);
    });
  }

  void run(const Block& block, const Range& keys) {
    load_queries(block);
    std::fill_n(dq_, block.rows * size_, 0.0f);
    for_each_tile(block, block, key_t_, first_key_, keys.start, std::max(keys.start, keys.stop), kBackwardKeys,
                  [&](Side side, int64_t key, int64_t count) { tile(block, side, key, count); });
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
    const int64_t first = sequence.first_query + block.first;
    with_element(a_.element, [&](auto element) {
      using E = decltype(element);
      const auto rows = [&](const Heads& heads) { return rows_of<E>(heads, sequence.batch, head_, first); };
      load_query<E>(sequence, block);
      copy_rows<E>(rows(b_.grad_output), block.rows, a_.size, 1.0f, dout_, size_);
      copy_rows<E>(rows(b_.output), block.rows, a_.size, 1.0f, dq_, size_);  // O for now, dQ later
    });
    row_dots(dout_, dq_, block.rows, size_, delta_);
    rows_.load(a_, b_, block);
  }

  void tile(const Block& block, Side side, int64_t key, int64_t count) {
    const int64_t columns = round_up(count, kLanes), local = key - first_key_;
    const bool near = side == kNear;
    gemm(block.rows, columns, a_.size, {dout_, size_, 1}, value_t_ + tile_offset(local, size_), kTilePitch, nullptr, 0,
         da_, kGradPitch);
    softmax_gradient(block, side, key, columns);

    const Operand by_query{da_, kGradPitch, 1}, by_key{da_, 1, kGradPitch};
    float* const grad_key = dk_ + key * size_;
    gemm_add(count, size_, block.rows, {scores_, 1, kGradPitch}, dout_, size_, dv_ + key * size_, size_);
    gemm_add(count, size_, block.rows, by_key, near ? query_ : far_query_, size_, grad_key, size_);
    gemm_add(block.rows, size_, count, by_query, key_ + local * size_, size_, dq_, size_);
    if (near) {
      if (a_.pos_key.data) add_c2p_gradients(block, key, count);
      if (a_.pos_query.data) add_p2c_gradients(block, key, count, grad_key);
    } else if (a_.pos_key.data || a_.pos_query.data) {
      add_far_gradients(block, side, local, count);
    }
  }

  // Replaces the scores by P with dropout, and dP by dA.
  void softmax_gradient(const Block& block, Side side, int64_t key, int64_t columns) {
    for (int64_t r = 0; r < block.rows; ++r) {
      float *const p_row = scores_ + r * kGradPitch, *const g_row = da_ + r * kGradPitch;
      const float constant = side == kNear ? 0.0f : far_constant_[r], shift = rows_.shift[r];
      const Vector factor = broadcast(rows_.factor[r]), delta = broadcast(delta_[r]),
                   grad_lse = broadcast(rows_.grad_lse[r]);
      if (a_.dropout) {
        keep_row(a_, block.sequence, head_, block.first + r, key, columns, keep_);
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
      std::fill_n(g_row + columns, kRightMargin, 0.0f);
    }
    for (int64_t r = block.rows; r < block.rows + kStrip - 1; ++r) {
      std::fill_n(da_ + r * kGradPitch, columns, 0.0f);
    }
  }

  // Adds the terms of (9) with K^n: to dQ, and to dK^n.
  void add_c2p_gradients(const Block& block, int64_t key, int64_t count) {
    for (int64_t r = 0; r < block.rows; r += kGroup) {
      const int64_t rows = std::min(block.rows - r, kGroup);
      const int32_t* runs = tables_.key.runs.from(key - (block.position + r));
      const float* const da = da_ + r * kGradPitch;
      const Band band = shares_runs(runs, rows, count) ? sum_runs(da, kGradPitch, rows, count, runs, by_run_, kGroup)
                                                       : Band{da + (1 - rows), kGradPitch + 1, 1};
      add_run_gradients(band, rows, count, runs, tables_.key.rows, query_ + r * size_, dq_ + r * size_,
                        b_.pos_key_sums ? grad_key_by_run_ : nullptr);
    }
  }

  // Adds the terms of (9) with Q^n: to dK, and to dQ^n.
  void add_p2c_gradients(const Block& block, int64_t key, int64_t count, float* dk) {
    for (int64_t j = 0; j < count; j += kGroup) {
      const int64_t rows = std::min(count - j, kGroup), columns = block.rows;
      const int32_t* runs = tables_.query.runs.from(block.position - (key + j));
      Band band{da_ + j + (1 - rows) * kGradPitch, kGradPitch + 1, kGradPitch};
      if (shares_runs(runs, rows, columns)) {
        transpose_band(da_ + j, kGradPitch, columns, rows, da_t_, kGroupPitch);
        band = sum_runs(da_t_, kGroupPitch, rows, columns, runs, by_run_, kGroup);
      }
      add_run_gradients(band, rows, columns, runs, tables_.query.rows, key_ + (key - first_key_ + j) * size_,
                        dk + j * size_, b_.pos_query_sums ? grad_query_by_run_ : nullptr);
    }
  }

  // Adds (9) for rows x, which are queries or keys, and their table T: dx_i += sum_n dA^n_i T^n by strips of rows, and
  // dT^n += sum_i dA^n_i x_i by strips of runs, unless grad_table is null. runs[c - r] is the run of cell (r, c).
  void add_run_gradients(const Band& band, int64_t rows, int64_t columns, const int32_t* runs, const float* table,
                         const float* x, float* dx, float* grad_table) {
    const int64_t first = runs[1 - rows], last = runs[columns - 1];
    const auto cell = [&](int64_t r, int64_t n) { return band.cells + r * band.row + (n - first) * band.run; };
    for (int64_t r = 0; r < rows; r += kStrip) {
      const int64_t strip = std::min<int64_t>(rows - r, kStrip);
      const int64_t n = runs[1 - strip - r], stop = runs[columns - 1 - r] + 1;
      gemm_add(strip, size_, stop - n, {cell(r, n), band.row, band.run}, table + n * size_, size_, dx + r * size_,
               size_);
    }
    if (grad_table == nullptr) return;
    for (int64_t n = first, start = 1 - rows, stop = start; n <= last; n += kStrip, start = stop) {
      const int64_t strip = std::min<int64_t>(last + 1 - n, kStrip);
      while (stop < columns && runs[stop] < n + strip) ++stop;
      const int64_t from = std::max<int64_t>(1 - stop, 0), to = std::min(rows, columns - start);
      gemm_add(strip, size_, to - from, {cell(from, n), band.run, band.row}, x + from * size_, size_,
               grad_table + n * size_, size_);
    }
  }

  // Adds the terms of (10) that are not products with dA: t_i K^r_r to dQ, and the sums for the far rows of the tables.
  void add_far_gradients(const Block& block, Side side, int64_t local, int64_t count) {
    const int64_t columns = round_up(count, kLanes);
    std::fill_n(column_sums_, columns, 0.0f);
    far_row(a_, a_.pos_key, head_, side, 1.0f, row_);
    for (int64_t r = 0; r < block.rows; ++r) {
      const float* row = da_ + r * kGradPitch;
      Vector sums{};
      for (int64_t c = 0; c < columns; c += kLanes) {
        sums += load(row + c);
        store(column_sums_ + c, load(column_sums_ + c) + load(row + c));
      }
      const float row_sum = sum(sums);
      add_scaled(row_sum, row_, dq_ + r * size_, size_);
      add_scaled(row_sum, query_ + r * size_, far_grad_key_ + side * size_, size_);
    }
    for (int64_t j = 0; j < count; ++j) {
      add_scaled(column_sums_[j], key_ + (local + j) * size_, far_grad_query_ + side * size_, size_);
    }
  }

  void store_heads(const Heads& to, const float* from, int64_t batch, int64_t first, int64_t count, float scale) {
    with_element(a_.element, [&](auto element) {
      using E = decltype(element);
      store_rows<E>(from, size_, count, a_.size, scale, rows_of<E>(to, batch, head_, first));
    });
  }

  const Backward& b_;
  Scratch memory_;
  int64_t head_ = 0, first_key_ = 0;             // the head, and the first of the loaded keys
  float *key_t_, *value_t_, *key_;               // tiles of (D, kTilePitch); (keys, D)
  float *dk_, *dv_;                              // (keys of the sequence, D)
  float *dout_, *dq_;                            // (rows, D)
  float *margins_, *da_;                         // dA (rows, kGradPitch) with its margins
  float *keep_, *column_sums_;                   // dropout of a row; column sums of dA
  float *far_grad_key_, *far_grad_query_;        // (2, D)
  float *margins_t_, *da_t_;                     // dA of a group of keys (kGroup, kGroupPitch) with its margins
  float* by_run_;                                // dA of a group by runs (runs, kGroup)
  float *grad_key_by_run_, *grad_query_by_run_;  // (runs, D)
  RowStatistics rows_;
  float delta_[kMaxBlockRows];
};

}  // namespace

void backward(const Attention& a, const Backward& b, int64_t wave, int64_t begin, int64_t end) {
  BackwardPass(a, b).items(wave, begin, end);
}

}  // namespace deberta_fast::DEBERTA_FAST_ISA
