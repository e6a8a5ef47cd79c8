// Forward: O and its log-sum-exp by (1) to (3), with near and far tiles of keys by (6) and (7).
//
// A block owns S::kRows queries of a head, each warp 16 S::kFragments of them, and meets tiles of 64 keys from left to
// right: far left, near, far right. Scores, probabilities and sums of O stay in registers; K, V and the bands are in
// shared memory. K of the next tile is on its way while V is used, V while K is.
#include "band.h"
#include "dropout.h"
#include "kernels.h"

namespace deberta_fast::cuda {
namespace {

template <int size>
using ForwardShape = Shape<size, (size <= 64 ? 2 : 1), (size <= 64 ? 4 : 8), 64>;

// What lies where in shared memory: K, V, then the bands. A warp's rows of Q pass through a stage, which shares its place
// with that warp's band where there is room: the registers hold Q then.
template <class S>
struct Memory {
  static constexpr bool kRowsInRegisters = S::kSize <= 64;
  static constexpr int kWarpBytes = S::kRowBandBytes + (kRowsInRegisters ? 0 : S::kStageBytes);
  static constexpr int kBytes = 2 * S::kTileBytes + S::kWarps * kWarpBytes + S::kColumnBandBytes;
  static_assert(!kRowsInRegisters || S::kStageBytes <= S::kRowBandBytes, "the stage lies in the band");

  char *keys, *values, *column_band, *row_band, *stage;

  DEVICE Memory() {
    keys = shared_memory(), values = keys + S::kTileBytes, column_band = values + S::kTileBytes;
    char* own = column_band + S::kColumnBandBytes + warp() * kWarpBytes;
    row_band = own + kHalf * kRowBandMargin, stage = own + (kRowsInRegisters ? 0 : S::kRowBandBytes);
  }
};

template <class T, class S, bool dropout>
struct Pass {
  static constexpr int kFragments = S::kFragments, kSteps = S::kSize / 16;
  using M = Memory<S>;

  const ForwardCall& arguments;
  const Call& call;
  const Place place;
  const Dropout mask;
  const M memory;
  uint32_t rows[M::kRowsInRegisters ? kSteps : 1][kFragments][4];
  float sums[kFragments][S::kSize / 8][4] = {};
  float peak[kFragments][2], total[kFragments][2] = {}, constant[kFragments][2];

  DEVICE Pass(const ForwardCall& arguments, const Place& place)
      : arguments(arguments), call(arguments.call), place(place), mask(call, place.batch, place.head) {
    EACH(f, kFragments) peak[f][0] = peak[f][1] = kLowest;
  }

  DEVICE void left(uint32_t (&a)[kFragments][4], int step) const {
    EACH(f, kFragments)
      if constexpr (M::kRowsInRegisters) {
        EACH(w, 4) a[f][w] = rows[step][f][w];
      } else {
        load_left<S>(a[f], memory.stage, f, step);
      }
  }

  // Q, or for far tiles what stands for it.
  template <bool near>
  DEVICE void load_rows(int far_row) {
    load_own_rows<S>(memory.stage, call.query.x, call, place, own_rows<S>(place));
    commit_copies();
    wait_copies<0>();
    sync_warp();
    if (!near) shift_rows<T, S>(memory.stage, call, place, call.query, call.key, far_row);
    EACH(f, kFragments) {
      if (!near)
        EACH(half, 2) {
          const char* row = memory.stage + (16 * f + 8 * half + lane() / 4) * S::kPitch;
          constant[f][half] = bits_float(load_shared_word(row + kHalf * S::kSize));
        }
      if constexpr (M::kRowsInRegisters) {
        EACH(step, kSteps) load_left<S>(rows[step][f], memory.stage, f, step);
      }
    }
  }

  template <bool near>
  DEVICE void meet(int tile, const int end, int far_row) {
    tile = next_tile<S>(call, place, tile, end);
    if (tile >= end) return;
    load_rows<near>(far_row);
    uint64_t exists = visible_in_tile<S>(call, place, tile);
    load_columns<S>(memory.keys, call.key.x, call, place, tile * S::kColumns, exists);
    commit_copies();
    const bool c2p = call.query.score_table != nullptr, p2c = call.key.score_table != nullptr;
    if (near && !c2p) clear_row_band<S>(memory.row_band);
    if (near && !p2c) clear_column_band<S>(memory.column_band);
    bool follows = false;
    while (tile < end) {
      wait_copies<0>();
      sync_block();  // K is there; nobody reads V or the band by columns any more
      load_columns<S>(memory.values, call.value, call, place, tile * S::kColumns, exists);
      commit_copies();
      float scores[kFragments][S::kColumns / 8][4];
      if (near) {
        if (p2c)
          write_column_band<T, S>(memory.column_band, call, place, call.key, memory.keys, tile * S::kColumns, tile);
        if (c2p)
          write_row_band<T, S>(memory.row_band, call, place, call.query, tile * S::kColumns, follows,
                               [&](uint32_t (&a)[kFragments][4], int step) { left(a, step); });
        sync_block();  // the band by columns is complete
        begin_scores<T, S>(scores, memory.row_band, memory.column_band, 1 / call.band_scale);
      } else {
        EACH(f, kFragments)
          EACH(n, S::kColumns / 8)
            EACH(w, 4) scores[f][n][w] = 0;
      }
      EACH(step, kSteps) {
        uint32_t a[kFragments][4];
        left(a, step);
        add_products<T, S>(scores, a, memory.keys, step);
      }
      const int following = next_tile<S>(call, place, tile + 1, end);
      const uint64_t seen = exists;
      wait_copies<0>();
      sync_block();  // V is there; nobody reads K any more
      if (following < end) {
        exists = visible_in_tile<S>(call, place, following);
        load_columns<S>(memory.keys, call.key.x, call, place, following * S::kColumns, exists);
        commit_copies();
      }
      if (seen != first_bits(S::kColumns)) hide(scores, seen);
      soften<near>(scores, tile * S::kColumns);
      EACH(step, S::kColumns / 16) {
        uint32_t p[kFragments][4];
        EACH(f, kFragments) as_left<T>(p[f], scores[f], step);
        add_weighted<T, S>(sums, p, memory.values, 16 * step);
      }
      follows = following == tile + 1;
      tile = following;
    }
  }

  DEVICE void hide(float (&scores)[kFragments][S::kColumns / 8][4], uint64_t seen) const {
    EACH(n, S::kColumns / 8)
      EACH(w, 2) {
        const bool there = seen >> (column_at(8 * n) + 8 * (lane() % 4) + w) & 1;
        EACH(f, kFragments) {
          scores[f][n][w] = there ? scores[f][n][w] : -infinity();
          scores[f][n][2 + w] = there ? scores[f][n][2 + w] : -infinity();
        }
      }
  }

  // Scores become probabilities, those so far shrink to the new peak. All in base 2: Z = C score, or of far ones,
  // which are halved, C (2 score + constant).
  // Any number near the largest score serves as the peak, so it follows only where probabilities would pass 2^kHeadroom.
  static constexpr float kHeadroom = 8, kLowest = -3.0e38f;  // before any score, and finite: infinities cancel to NaN
  template <bool near>
  DEVICE void soften(float (&scores)[kFragments][S::kColumns / 8][4], int first_key) {
    const float unit = call.scale * static_cast<float>(kLog2e), slope = near ? unit : 2 * unit;
    float now[kFragments][2];
    bool rises = false;
    EACH(f, kFragments)
      EACH(half, 2) {
        float most = -infinity();
        EACH(n, S::kColumns / 8) most = maximum(most, maximum(scores[f][n][2 * half], scores[f][n][2 * half + 1]));
        most = maximum(most, shuffle_xor(most, 1));
        most = maximum(most, shuffle_xor(most, 2));
        const float highest = fused_multiply_add(slope, most, near ? 0 : unit * constant[f][half]);
        const bool higher = highest > peak[f][half] + kHeadroom;
        now[f][half] = higher ? highest : peak[f][half];
        rises |= higher;
      }
    if (ballot(rises) != 0) {
      EACH(f, kFragments)
        EACH(half, 2) {
          const float shrink = exp2_fast(peak[f][half] - now[f][half]);
          peak[f][half] = now[f][half], total[f][half] *= shrink;
          EACH(n, S::kSize / 8) sums[f][n][2 * half] *= shrink, sums[f][n][2 * half + 1] *= shrink;
        }
    }
    EACH(f, kFragments)
      EACH(half, 2) {
        const float origin = (near ? 0 : unit * constant[f][half]) - peak[f][half];
        EACH(n, S::kColumns / 8)
          EACH(w, 2) {
            float& score = scores[f][n][2 * half + w];
            score = exp2_fast(fused_multiply_add(slope, score, origin));
            total[f][half] += score;
          }
        if (dropout) drop(scores[f], half, first_key + 8 * (lane() % 4), own_row(f, half));
      }
  }

  DEVICE int own_row(int f, int half) const {
    return place.first_row + warp() * S::kWarpRows + 16 * f + 8 * half + lane() / 4;
  }

  // The sum keeps what dropout takes.
  DEVICE void drop(float (&probabilities)[S::kColumns / 8][4], int half, int key, int query) const {
    EACH(group, S::kColumns / 32) {
      const uint32_t keep = mask.keep_eight(query, key + 32 * group);
      EACH(k, 8) {
        float& probability = probabilities[4 * group + k / 2][2 * half + k % 2];
        probability = keep >> k & 1 ? probability : 0;
      }
    }
  }

  DEVICE void finish() {
    float factors[kFragments][2];
    EACH(f, kFragments)
      EACH(half, 2) {
        float sum = total[f][half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const bool none = sum == 0;
        factors[f][half] = none ? 0 : (dropout ? call.keep_scale : 1.0f) / sum;
        const int row = own_row(f, half);
        if (lane() % 4 == 0 && row < place.rows) {
          const float lse = (peak[f][half] + log2_fast(sum)) * static_cast<float>(1 / kLog2e);
          *statistic_address(arguments.lse, place, place.base + row) = none ? -infinity() : lse;
        }
      }
    store_own_rows<T, S>(arguments.output, memory.stage, call, place, sums, factors);
  }
};

template <class T, int size, bool dropout>
KERNEL(ForwardShape<size>::kThreads, size <= 64 ? 2 : 1)
forward_kernel(GRID_CONSTANT const ForwardCall arguments) {
  using S = ForwardShape<size>;
  const Side& rows = arguments.call.query;
  const Place place = find_place(arguments.call, rows, arguments.call.key, S::kRows);
  if (place.outside) return;
  Pass<T, S, dropout> pass(arguments, place);
  const Segments segments = find_segments(rows, place, S::kRows, S::kColumns);
  pass.template meet<false>(0, segments.near_begin, rows.far_left);
  pass.template meet<true>(segments.near_begin, segments.near_end, 0);
  pass.template meet<false>(segments.near_end, segments.end, rows.far_right);
  pass.finish();
}

}  // namespace

int forward_shared_bytes(int padded_size) {
  return at_size(padded_size, [](auto size) { return Memory<ForwardShape<size()>>::kBytes; });
}

const char* forward(const ForwardCall& arguments, void* stream) {
  const Call& call = arguments.call;
  return at_variant(call.element, call.size, call.dropout, [&](auto type, auto size, auto dropout) {
    using S = ForwardShape<size()>;
    return launch<forward_kernel<decltype(type), size(), dropout()>>(
        block_count(call, call.query, S::kRows), call.heads, S::kThreads, Memory<S>::kBytes, stream, arguments);
  });
}

}  // namespace deberta_fast::cuda
