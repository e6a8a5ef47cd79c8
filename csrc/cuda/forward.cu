// Forward: O and its log-sum-exp by (1) to (3), with near and far tiles of keys by (6) and (7).
//
// A block owns kBlockM = 128 queries of a head, each warp 16 kFragments of them, and iterates over tiles of kBlockN =
// 64 keys from left to right: far left, near, far right. Scores, probabilities and O stay in registers. Shared memory,
// Memory::kBytes, holds K, V and the band by columns per block, and the band by rows per warp. K of the next tile is
// copied while V is used, and V while K is used.
#include "band.h"
#include "dropout.h"
#include "kernels.h"

namespace deberta_fast::cuda {
namespace {

template <int size>
using ForwardShape = Shape<size, (size <= 64 ? 2 : 1), (size <= 64 ? 4 : 8), 64>;

// The layout of shared memory. A warp loads its rows of Q through a stage. If registers hold Q afterwards, the stage
// shares its memory with the warp's band.
template <class S>
struct Memory {
  static constexpr bool kRowsInRegisters = S::kSize <= 64;
  static constexpr int kWarpBytes = S::kRowBandBytes + (kRowsInRegisters ? 0 : S::kStageBytes);
  static constexpr int kBytes = 2 * S::kTileBytes + S::kWarps * kWarpBytes + S::kColumnBandBytes;
  static_assert(!kRowsInRegisters || S::kStageBytes <= S::kRowBandBytes, "the stage fits into the band");

  char *keys, *values, *column_band, *row_band, *stage;

  DEVICE Memory() {
    keys = shared_memory(), values = keys + S::kTileBytes, column_band = values + S::kTileBytes;
    char* own = column_band + S::kColumnBandBytes + warp() * kWarpBytes;
    row_band = own + kHalf * kRowBandMargin, stage = own + (kRowsInRegisters ? 0 : S::kRowBandBytes);
  }
};

template <class T, class S, bool dropout>
struct Mainloop {
  static constexpr int kFragments = S::kFragments, kSteps = S::kSize / 16;
  using M = Memory<S>;

  const ForwardCall& arguments;
  const Call& call;
  const BlockInfo block;
  const Dropout mask;
  const M memory;
  uint32_t query[M::kRowsInRegisters ? kSteps : 1][kFragments][4];
  float output[kFragments][S::kSize / 8][4] = {};
  float row_max[kFragments][2], row_sum[kFragments][2] = {}, constant[kFragments][2];

  DEVICE Mainloop(const ForwardCall& arguments, const BlockInfo& block)
      : arguments(arguments), call(arguments.call), block(block), mask(call, block.batch, block.head) {
    EACH(f, kFragments) row_max[f][0] = row_max[f][1] = kLowest;
  }

  DEVICE void left(uint32_t (&a)[kFragments][4], int step) const {
    EACH(f, kFragments)
      if constexpr (M::kRowsInRegisters) {
        EACH(w, 4) a[f][w] = query[step][f][w];
      } else {
        load_left<S>(a[f], memory.stage, f, step);
      }
  }

  // Loads Q, and shifts it for far tiles.
  template <bool near>
  DEVICE void load_rows(int far_row) {
    load_own_rows<S>(memory.stage, call.query.x, call, block, own_rows<S>(block));
    commit_copies();
    wait_copies<0>();
    sync_warp();
    if (!near) shift_rows<T, S>(memory.stage, call, block, call.query, call.key, far_row);
    EACH(f, kFragments) {
      if (!near)
        EACH(half, 2) {
          const char* row = memory.stage + fragment_row(f, half) * S::kPitch;
          constant[f][half] = bits_float(load_shared_word(row + kHalf * S::kSize));
        }
      if constexpr (M::kRowsInRegisters) {
        EACH(step, kSteps) load_left<S>(query[step][f], memory.stage, f, step);
      }
    }
  }

  template <bool near>
  DEVICE void process_tiles(int tile, const int end, int far_row) {
    tile = next_tile<S>(call, block, tile, end);
    if (tile >= end) return;
    load_rows<near>(far_row);
    uint64_t exists = visible_in_tile<S>(call, block, tile);
    load_columns<S>(memory.keys, call.key.x, call, block, tile * S::kBlockN, exists);
    commit_copies();
    const bool c2p = call.query.score_table != nullptr, p2c = call.key.score_table != nullptr;
    if (near && !c2p) clear_row_band<S>(memory.row_band);
    if (near && !p2c) clear_column_band<S>(memory.column_band);
    bool follows = false;
    while (tile < end) {
      wait_copies<0>();
      sync_block();  // K has arrived; all warps have read V and the band by columns
      load_columns<S>(memory.values, call.value, call, block, tile * S::kBlockN, exists);
      commit_copies();
      float scores[kFragments][S::kBlockN / 8][4];
      if (near) {
        if (p2c)
          write_column_band<T, S>(memory.column_band, call, block, call.key, memory.keys, tile * S::kBlockN, tile);
        if (c2p)
          write_row_band<T, S>(memory.row_band, call, block, call.query, tile * S::kBlockN, follows,
                               [&](uint32_t (&a)[kFragments][4], int step) { left(a, step); });
        sync_block();  // the band by columns is complete
        begin_scores<T, S>(scores, memory.row_band, memory.column_band, 1 / call.band_scale);
      } else {
        EACH(f, kFragments)
          EACH(n, S::kBlockN / 8)
            EACH(w, 4) scores[f][n][w] = 0;
      }
      EACH(step, kSteps) {
        uint32_t a[kFragments][4];
        left(a, step);
        add_products<T, S>(scores, a, memory.keys, step);
      }
      const int following = next_tile<S>(call, block, tile + 1, end);
      const uint64_t seen = exists;
      wait_copies<0>();
      sync_block();  // V has arrived; all warps have read K
      if (following < end) {
        exists = visible_in_tile<S>(call, block, following);
        load_columns<S>(memory.keys, call.key.x, call, block, following * S::kBlockN, exists);
        commit_copies();
      }
      if (seen != first_bits(S::kBlockN)) hide(scores, seen);
      online_softmax<near>(scores, tile * S::kBlockN);
      EACH(step, S::kBlockN / 16) {
        uint32_t p[kFragments][4];
        EACH(f, kFragments) as_left<T>(p[f], scores[f], step);
        add_weighted<T, S>(output, p, memory.values, 16 * step);
      }
      follows = following == tile + 1;
      tile = following;
    }
  }

  DEVICE void hide(float (&scores)[kFragments][S::kBlockN / 8][4], uint64_t seen) const {
    EACH(n, S::kBlockN / 8)
      EACH(w, 2) {
        const bool there = seen >> (column_at(8 * n) + 8 * (lane() % 4) + w) & 1;
        EACH(f, kFragments) {
          scores[f][n][w] = there ? scores[f][n][w] : -infinity();
          scores[f][n][2 + w] = there ? scores[f][n][2 + w] : -infinity();
        }
      }
  }

  // Turns scores into probabilities and rescales the sums by alpha. All in base 2: Z = C score for near tiles, and Z =
  // C (2 score + constant) for far tiles, whose scores are halved. Any number near the largest score serves as row_max,
  // so row_max rises only if a probability would exceed 2^kHeadroom.
  static constexpr float kHeadroom = 8;
  static constexpr float kLowest = -3.0e38f;  // the first row_max; finite, because infinities would cancel to NaN
  template <bool near>
  DEVICE void online_softmax(float (&scores)[kFragments][S::kBlockN / 8][4], int first_key) {
    const float unit = call.scale * static_cast<float>(kLog2e), slope = near ? unit : 2 * unit;
    float now[kFragments][2];
    bool rises = false;
    EACH(f, kFragments)
      EACH(half, 2) {
        float most = -infinity();
        EACH(n, S::kBlockN / 8) most = maximum(most, maximum(scores[f][n][2 * half], scores[f][n][2 * half + 1]));
        most = maximum(most, shuffle_xor(most, 1));
        most = maximum(most, shuffle_xor(most, 2));
        const float highest = fused_multiply_add(slope, most, near ? 0 : unit * constant[f][half]);
        const bool higher = highest > row_max[f][half] + kHeadroom;
        now[f][half] = higher ? highest : row_max[f][half];
        rises |= higher;
      }
    if (ballot(rises) != 0) {
      EACH(f, kFragments)
        EACH(half, 2) {
          const float alpha = exp2_fast(row_max[f][half] - now[f][half]);
          row_max[f][half] = now[f][half], row_sum[f][half] *= alpha;
          EACH(n, S::kSize / 8) output[f][n][2 * half] *= alpha, output[f][n][2 * half + 1] *= alpha;
        }
    }
    EACH(f, kFragments)
      EACH(half, 2) {
        const float origin = (near ? 0 : unit * constant[f][half]) - row_max[f][half];
        EACH(n, S::kBlockN / 8)
          EACH(w, 2) {
            float& score = scores[f][n][2 * half + w];
            score = exp2_fast(fused_multiply_add(slope, score, origin));
            row_sum[f][half] += score;
          }
        if (dropout) drop(scores[f], half, first_key + 8 * (lane() % 4), own_row<S>(block, f, half));
      }
  }

  // Dropout does not change row_sum.
  DEVICE void drop(float (&probabilities)[S::kBlockN / 8][4], int half, int key, int query) const {
    EACH(group, S::kBlockN / 32) {
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
        float sum = row_sum[f][half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const bool none = sum == 0;
        factors[f][half] = none ? 0 : (dropout ? call.keep_scale : 1.0f) / sum;
        const int row = own_row<S>(block, f, half);
        if (lane() % 4 == 0 && row < block.rows) {
          const float lse = (row_max[f][half] + log2_fast(sum)) * static_cast<float>(1 / kLog2e);
          *statistic_address(arguments.lse, block, block.base + row) = none ? -infinity() : lse;
        }
      }
    store_own_rows<T, S>(arguments.output, memory.stage, call, block, output, factors);
  }
};

template <class T, int size, bool dropout>
KERNEL(ForwardShape<size>::kThreads, size <= 64 ? 2 : 1)
forward_kernel(GRID_CONSTANT const ForwardCall arguments) {
  using S = ForwardShape<size>;
  const Operand& rows = arguments.call.query;
  const BlockInfo block = find_block(arguments.call, rows, arguments.call.key, S::kBlockM);
  if (block.outside) return;
  Mainloop<T, S, dropout> mainloop(arguments, block);
  const Segments segments = find_segments(rows, block, S::kBlockM, S::kBlockN);
  mainloop.template process_tiles<false>(0, segments.near_begin, rows.far_left);
  mainloop.template process_tiles<true>(segments.near_begin, segments.near_end, 0);
  mainloop.template process_tiles<false>(segments.near_end, segments.end, rows.far_right);
  mainloop.finish();
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
        block_count(call, call.query, S::kBlockM), call.heads, S::kThreads, Memory<S>::kBytes, stream, arguments);
  });
}

}  // namespace deberta_fast::cuda
