// Backward of queries: dQ by (8) to (10).
//
// A block owns 128 queries of a head and iterates over tiles of 32 keys from left to right; each warp owns 16
// kFragments queries, whose dQ accumulates in registers. Far tiles compute P and dA again. Near tiles read dA from
// backward_key, stored as tiles of (128 keys, 32 queries). Shared memory, Memory::kBytes, holds K and V per block, and
// Q, dO, a band of gradients and a tile of dA per warp.
#include "backward_tile.h"

namespace deberta_fast::cuda {
namespace {

template <class S>
struct Memory {
  // dA of a warp is (32 keys, ordered by position, its queries). 16 bytes of padding per key avoid bank conflicts.
  static constexpr int kNearPitch = kHalf * S::kWarpRows + 16, kNearBytes = S::kBlockN * kNearPitch;
  static constexpr int kWarpBytes = 2 * S::kStageBytes + S::kRowBandBytes + kNearBytes;
  static constexpr int kBytes = 2 * S::kTileBytes + S::kWarps * kWarpBytes;

  char *keys, *values, *queries, *dout, *gradient_band, *near;

  DEVICE Memory() {
    keys = shared_memory(), values = keys + S::kTileBytes;
    queries = values + S::kTileBytes + warp() * kWarpBytes, dout = queries + S::kStageBytes;
    gradient_band = dout + S::kStageBytes, near = gradient_band + S::kRowBandBytes;
  }
};

template <class T, class S, bool dropout>
struct Mainloop {
  static constexpr int kFragments = S::kFragments, kSteps = S::kSize / 16, kProducts = S::kBlockN / 8;

  const BackwardCall& arguments;
  const Call& call;
  const BlockInfo block;
  const Dropout mask;
  const Memory<S> memory;
  const uint32_t exists;  // bit mask of this warp's queries that exist
  float dq[kFragments][S::kSize / 8][4] = {};
  float lse2[kFragments][2], delta[kFragments][2];
  float far[kFragments][2];  // t, the row sums of dA over the far keys of a side (10)

  DEVICE Mainloop(const BackwardCall& arguments, const BlockInfo& block)
      : arguments(arguments),
        call(arguments.call),
        block(block),
        mask(call, block.batch, block.head),
        exists(own_rows<S>(block)) {}

  DEVICE void load_tile(int tile, uint64_t visible) const {
    load_columns<S>(memory.keys, call.key.x, call, block, tile * S::kBlockN, visible);
    load_columns<S>(memory.values, call.value, call, block, tile * S::kBlockN, visible);
    commit_copies();
  }

  // ---- Far tiles.

  // Loads Q, shifted (7), dO and the statistics of the rows. The constant of a row is subtracted from its lse2.
  DEVICE void load_rows(int far_row) {
    load_own_rows<S>(memory.queries, call.query.x, call, block, exists);
    load_own_rows<S>(memory.dout, arguments.grad_output, call, block, exists);
    commit_copies();
    wait_copies<0>();
    sync_warp();
    shift_rows<T, S>(memory.queries, call, block, call.query, call.key, far_row);
    const float unit = call.scale * static_cast<float>(kLog2e);
    EACH(f, kFragments)
      EACH(half, 2) {
        const int row = 16 * f + 8 * half + lane() / 4;
        const float constant = bits_float(load_shared_word(memory.queries + row * S::kPitch + kHalf * S::kSize));
        const int64_t at = statistic_index(arguments, block, own_row<S>(block, f, half));
        const bool valid = exists >> row & 1;
        lse2[f][half] = (valid ? arguments.lse2[at] : infinity()) - unit * constant;
        delta[f][half] = valid ? arguments.delta[at] : 0;
        far[f][half] = 0;
      }
  }

  DEVICE void process_far_tiles(int tile, const int end, int far_row, int side) {
    tile = next_tile<S>(call, block, tile, end);
    if (tile >= end) return;
    load_rows(far_row);
    uint64_t visible = visible_in_tile<S>(call, block, tile);
    load_tile(tile, visible);
    while (tile < end) {
      wait_copies<0>();
      sync_block();
      float scores[kFragments][kProducts][4] = {}, dp[kFragments][kProducts][4] = {};
      EACH(step, kSteps) {
        uint32_t a[kFragments][4];
        load_left<S>(a, memory.queries, step);
        add_products<T, S>(scores, a, memory.keys, step);
        load_left<S>(a, memory.dout, step);
        add_products<T, S>(dp, a, memory.values, step);
      }
      softmax_gradient(scores, dp, tile * S::kBlockN, visible);
      EACH(step, S::kBlockN / 16) {
        uint32_t d[kFragments][4];
        EACH(f, kFragments) as_left<T>(d[f], dp[f], step);
        add_weighted<T, S>(dq, d, memory.keys, 16 * step);
      }
      tile = next_tile<S>(call, block, tile + 1, end);
      sync_block();  // all warps have read K and V
      if (tile < end) visible = visible_in_tile<S>(call, block, tile), load_tile(tile, visible);
    }
    add_far_row<T, S>(dq, far, call, block, call.query, far_row);
    if (call.query.table.data != nullptr)
      store_far_sum<T, S>(far_sum<S>(arguments.far_query_sums, arguments.query_far_count, side), memory.queries, far,
                          call.query.x, call, block, exists);
  }

  // Turns dP into dA (8). Scores come from Q divided by two (shift_rows).
  DEVICE void softmax_gradient(const float (&scores)[kFragments][kProducts][4], float (&dp)[kFragments][kProducts][4],
                               int first_key, uint64_t visible) {
    const float slope = 2 * call.scale * static_cast<float>(kLog2e);
    const uint32_t seen = static_cast<uint32_t>(visible) >> (8 * (lane() % 4));
    EACH(f, kFragments)
      EACH(half, 2) {
        const uint32_t kept = dropout ? mask.keep_eight(own_row<S>(block, f, half), first_key + 8 * (lane() % 4)) : 0;
        EACH(c, S::kBlockN / 4) {
          float& element = dp[f][c / 2][2 * half + c % 2];
          const float p = probability_of(fused_multiply_add(slope, scores[f][c / 2][2 * half + c % 2], -lse2[f][half]));
          const float factor = dropout ? (kept >> c & 1 ? call.keep_scale : 0) : 1;
          element = (seen >> c & 1 ? p : 0) * (factor * element - delta[f][half]);
          far[f][half] += element;
        }
      }
  }

  // ---- Near tiles.

  // Copies dA of a tile of keys, ordered by position, and this warp's queries.
  DEVICE void load_near(int tile, int near_begin) const {
    const int first_key = tile * S::kBlockN, first_query = block.first_row + warp() * S::kWarpRows;
    const int query_tile = first_query / 32 - kTilesPerBlock * near_begin;
    const char* from = near_tile(arguments, key_block_of(call, block, first_key), block_y(), query_tile) +
                       64 * (first_key % kBackwardRows) + kHalf * (first_query % 32);
    constexpr int chunks = S::kWarpRows / 8;
    EACH(i, S::kBlockN * chunks / 32) {
      const int item = 32 * i + lane(), position = item / chunks, chunk = item % chunks;
      // Queries beyond the end become zeros, because backward_key does not write their tiles.
      copy_async(memory.near + position * Memory<S>::kNearPitch + 16 * chunk,
                 from + 64 * column_at(position) + 16 * chunk, exists >> (8 * chunk) & 1);
    }
    commit_copies();
  }

  // The first block of queries that is near to the block of keys which includes this tile.
  DEVICE int near_begin(int tile) const {
    BlockInfo keys = block;
    keys.first_row = tile * S::kBlockN / kBackwardRows * kBackwardRows;
    keys.rows = block.columns, keys.columns = block.rows;
    return find_segments(call.key, keys, S::kBlockM, kBackwardRows).near_begin;
  }

  DEVICE GradientBand<T, S> gradient_band(int tile) const {
    return {memory.gradient_band, block, call.query, tile * S::kBlockN};
  }

  DEVICE void process_near_tiles(int tile, const int end) {
    tile = next_tile<S>(call, block, tile, end);
    if (tile >= end) return;
    const bool c2p = call.query.gradient_table != nullptr;
    int expected = tile;  // the tile that would continue the band; masked tiles are skipped
    if (c2p) gradient_band(tile).clear();
    const auto load = [&] {
      load_columns<S>(memory.keys, call.key.x, call, block, tile * S::kBlockN, visible_in_tile<S>(call, block, tile));
      load_near(tile, near_begin(tile));
    };
    load();
    while (tile < end) {
      wait_copies<0>();
      sync_block();
      if (c2p && tile != expected) {
        gradient_band(expected).finish(dq);
        gradient_band(tile).clear();
      }
      const GradientBand<T, S> band = gradient_band(tile);
      uint32_t pairs[kFragments][2][4];
      EACH(f, kFragments)
        EACH(half, 2) {
          const char* at = memory.near + lane() * Memory<S>::kNearPitch + kHalf * (16 * f + 8 * half);
          load_matrices_transposed(pairs[f][half], at);
          if (c2p) band.put(f, half, pairs[f][half]);
        }
      EACH(step, S::kBlockN / 16) {
        uint32_t d[kFragments][4];
        EACH(f, kFragments)
          EACH(w, 4) d[f][w] = pairs[f][w % 2][2 * step + w / 2];
        add_weighted<T, S>(dq, d, memory.keys, 16 * step);
      }
      if (c2p) band.take(dq);
      expected = tile + 1;
      tile = next_tile<S>(call, block, tile + 1, end);
      sync_block();  // all warps have read K
      if (tile < end) load();
    }
    if (c2p) gradient_band(expected).finish(dq);
  }

  DEVICE void finish() {
    float factors[kFragments][2];
    EACH(f, kFragments) factors[f][0] = factors[f][1] = call.scale;
    store_own_rows<T, S>(arguments.grad_query, memory.queries, call, block, dq, factors);
  }
};

template <class T, int size, bool dropout>
KERNEL(BackwardShape<size>::kThreads, size <= 64 ? 2 : 1)
backward_query_kernel(GRID_CONSTANT const BackwardCall arguments) {
  using S = BackwardShape<size>;
  const Call& call = arguments.call;
  if (call.query.table.data != nullptr) clear_far_sums<S>(arguments.far_query_sums, arguments.query_far_count);
  const BlockInfo block = find_block(call, call.query, call.key, S::kBlockM, arguments.first_head);
  if (block.outside) return;
  Mainloop<T, S, dropout> mainloop(arguments, block);
  const Segments segments = find_backward_segments<S>(call.query, block);
  mainloop.process_far_tiles(0, segments.near_begin, call.query.far_left, 0);
  mainloop.process_near_tiles(segments.near_begin, segments.near_end);
  mainloop.process_far_tiles(segments.near_end, segments.end, call.query.far_right, 1);
  mainloop.finish();
}

}  // namespace

int64_t far_count(const Call& call, const Operand& rows) {
  const int warps = at_size(padded_size(call.size), [](auto size) { return BackwardShape<size()>::kWarps; });
  return block_count(call, rows, kBackwardRows) * warps;
}

const char* backward_query(const BackwardCall& arguments, void* stream) {
  const Call& call = arguments.call;
  return at_variant(call.element, call.size, call.dropout, [&](auto type, auto size, auto dropout) {
    using S = BackwardShape<size()>;
    return launch<backward_query_kernel<decltype(type), size(), dropout()>>(block_count(call, call.query, S::kBlockM),
                                                                            arguments.head_count, S::kThreads,
                                                                            Memory<S>::kBytes, stream, arguments);
  });
}

}  // namespace deberta_fast::cuda
