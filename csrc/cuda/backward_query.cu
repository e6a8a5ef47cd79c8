// Backward of queries: dQ by (8) to (10). The same launch sums the gradients of the tables by distance
// (backward_by_distance.h); both read dA of backward_key.
//
// A block owns 128 queries of a head and iterates over tiles of 32 keys from left to right; each warp owns 16
// kFragments queries, whose dQ accumulates in registers. Far tiles compute P and dA again. Near tiles read dA from
// backward_key, stored as tiles of (128 keys, 32 queries). Shared memory, Memory::kBytes, holds K and V per block, and
// Q, dO and a band of gradients per warp. K and V have two buffers, and the next tile's are copied during this tile.
// Near tiles need neither Q nor dO and copy dA there.
#include "backward_by_distance.h"

namespace deberta_fast::cuda {
namespace {

template <class S>
struct Memory {
  // dA of a warp is (32 keys, ordered by position, its queries). 16 bytes of padding per key avoid bank conflicts.
  static constexpr int kNearPitch = kHalf * S::kWarpRows + 16;
  static constexpr int kWarpBytes = 2 * S::kStageBytes + S::kRowBandBytes;
  static constexpr int kBytes = 4 * S::kTileBytes + S::kWarps * kWarpBytes;
  static_assert(S::kBlockN * kNearPitch <= S::kStageBytes, "dA of a tile fits into a stage");

  char *shared, *queries, *dout, *gradient_band;

  DEVICE Memory() {
    shared = shared_memory();
    queries = shared + 4 * S::kTileBytes + warp() * kWarpBytes, dout = queries + S::kStageBytes;
    gradient_band = dout + S::kStageBytes;
  }

  // The buffers of a tile.
  DEVICE char* keys(int turn) const { return shared + turn % 2 * 2 * S::kTileBytes; }
  DEVICE char* values(int turn) const { return keys(turn) + S::kTileBytes; }
  DEVICE char* near(int turn) const { return queries + turn % 2 * S::kStageBytes; }
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
  int turn = 0;              // number of tiles so far

  DEVICE Mainloop(const BackwardCall& arguments, const BlockInfo& block)
      : arguments(arguments),
        call(arguments.call),
        block(block),
        mask(call, block.batch, block.head),
        exists(own_rows<S>(block)) {}

  // Bit mask of the visible keys of a tile.
  DEVICE uint32_t visible(int tile) const { return static_cast<uint32_t>(visible_in_tile<S>(call, block, tile)); }

  // ---- Far tiles.

  DEVICE void load_far(int tile, uint32_t seen, int turn) const {
    load_tile<S>(memory.keys(turn), call.key.x, call, block, tile * S::kBlockN, seen);
    load_tile<S>(memory.values(turn), call.value, call, block, tile * S::kBlockN, seen);
    commit_copies();
  }

  DEVICE void load_queries() const { load_rows<S>(memory.queries, call.query.x, call, block, exists); }

  // Loads Q, shifted (7), dO and the statistics of the rows, and waits for them and for the copies before. The constant
  // of a row is subtracted from its lse2.
  DEVICE void load_own(int far_row) {
    load_queries();
    load_rows<S>(memory.dout, arguments.grad_output, call, block, exists);
    commit_copies();
    EACH(f, kFragments)
      EACH(half, 2) {
        const int64_t at = statistic_index(arguments, block, own_row<S>(block, f, half));
        const bool valid = exists >> (16 * f + 8 * half + lane() / 4) & 1;
        lse2[f][half] = valid ? arguments.lse2[at] : infinity();
        delta[f][half] = valid ? arguments.delta[at] : 0;
        far[f][half] = 0;
      }
    wait_copies<0>();
    sync_warp();
    shift_rows<T, S>(memory.queries, call, block, call.query, call.key, far_row);
    EACH(f, kFragments)
      EACH(half, 2) {
        const char* row = memory.queries + (16 * f + 8 * half + lane() / 4) * S::kPitch;
        const float constant = bits_float(load_shared_word(row + kHalf * S::kSize));
        lse2[f][half] -= call.scale * static_cast<float>(kLog2e) * constant;
      }
  }

  DEVICE void process_far_tiles(int tile, const int end, int far_row, int side) {
    tile = next_tile<S>(call, block, tile, end);
    if (tile >= end) return;
    uint32_t seen = visible(tile);
    load_far(tile, seen, turn);
    load_own(far_row);
    int following = next_tile<S>(call, block, tile + 1, end);
    while (tile < end) {
      wait_copies<0>();
      sync_block();  // the tile has arrived; all warps have read the one before it
      const uint32_t next_seen = following < end ? visible(following) : 0;
      if (following < end) load_far(following, next_seen, turn + 1);
      const char *keys = memory.keys(turn), *values = memory.values(turn);
      float scores[kFragments][kProducts][4] = {}, dp[kFragments][kProducts][4] = {};
      EACH(step, kSteps) {
        uint32_t a[kFragments][4];
        load_left<S>(a, memory.queries, step);
        add_products<T, S>(scores, a, keys, step);
        load_left<S>(a, memory.dout, step);
        add_products<T, S>(dp, a, values, step);
      }
      if (following >= end) {
        sync_warp();
        load_queries();  // for store_far_sum
        commit_copies();
      }
      softmax_gradient(scores, dp, tile * S::kBlockN, seen);
      EACH(step, S::kBlockN / 16) {
        uint32_t d[kFragments][4];
        EACH(f, kFragments) as_left<T>(d[f], dp[f], step);
        add_weighted<T, S>(dq, d, keys, 16 * step);
      }
      tile = following, seen = next_seen, ++turn;
      following = next_tile<S>(call, block, tile + 1, end);
    }
    add_far_row<T, S>(dq, far, call, block, call.query, far_row);
    wait_copies<0>();
    store_far_sum<T, S>(far_sum<S>(arguments, arguments.far_query_sums, arguments.query_far_count, side),
                        memory.queries, far, call.query, exists);
  }

  // Turns dP into dA (8). Scores come from Q divided by two (shift_rows).
  DEVICE void softmax_gradient(const float (&scores)[kFragments][kProducts][4], float (&dp)[kFragments][kProducts][4],
                               int first_key, uint32_t visible) {
    const float slope = 2 * call.scale * static_cast<float>(kLog2e);
    const uint32_t seen = visible >> (8 * (lane() % 4));
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

  // Copies K, and dA of this warp's queries; both ordered by position.
  DEVICE void load_near(int tile, int turn) const {
    load_tile<S>(memory.keys(turn), call.key.x, call, block, tile * S::kBlockN, visible(tile));
    const int first_key = tile * S::kBlockN, first_query = block.first_row + warp() * S::kWarpRows;
    const int query_tile = first_query / 32 - kTilesPerBlock * near_begin(tile);
    const char* from = near_tile(arguments, key_block_of(call, block, first_key), block_y(), query_tile) +
                       64 * (first_key % kBackwardRows) + kHalf * (first_query % 32);
    constexpr int chunks = S::kWarpRows / 8;
    EACH(i, S::kBlockN * chunks / 32) {
      const int item = 32 * i + lane(), position = item / chunks, chunk = item % chunks;
      // Queries beyond the end become zeros, because backward_key does not write their tiles.
      const bool valid = exists >> (8 * chunk) & 1;
      copy_async(memory.near(turn) + position * Memory<S>::kNearPitch + 16 * chunk,
                 valid ? from + 64 * column_at(position) + 16 * chunk : arguments.near, valid);
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
    load_near(tile, turn);
    int following = next_tile<S>(call, block, tile + 1, end);
    while (tile < end) {
      wait_copies<0>();
      sync_block();  // the tile has arrived; all warps have read the one before it
      if (following < end) load_near(following, turn + 1);
      if (c2p && tile != expected) {
        gradient_band(expected).finish(dq);
        gradient_band(tile).clear();
      }
      const GradientBand<T, S> band = gradient_band(tile);
      uint32_t pairs[kFragments][2][4];
      EACH(f, kFragments)
        EACH(half, 2) {
          const char* at = memory.near(turn) + lane() * Memory<S>::kNearPitch + kHalf * (16 * f + 8 * half);
          load_matrices_transposed(pairs[f][half], at);
          if (c2p) band.put(f, half, pairs[f][half]);
        }
      EACH(step, S::kBlockN / 16) {
        uint32_t d[kFragments][4];
        EACH(f, kFragments)
          EACH(w, 4) d[f][w] = pairs[f][w % 2][2 * step + w / 2];
        add_weighted<T, S>(dq, d, memory.keys(turn), 16 * step);
      }
      if (c2p) band.take(dq);
      expected = tile + 1, tile = following, ++turn;
      following = next_tile<S>(call, block, tile + 1, end);
    }
    if (c2p) gradient_band(expected).finish(dq);
    sync_warp();  // far tiles to the right write Q and dO where dA is
  }

  DEVICE void finish() {
    float factors[kFragments][2];
    EACH(f, kFragments) factors[f][0] = factors[f][1] = call.scale;
    store_own_rows<T, S>(arguments.grad_query, memory.queries, call, block, dq, factors);
  }
};

template <class T, int size, bool dropout>
KERNEL(BackwardShape<size>::kThreads, size <= 64 ? 2 : 1)
backward_query_kernel(GRID_CONSTANT const TableCall table) {
  using S = BackwardShape<size>;
  const BackwardCall& arguments = table.backward;
  const Call& call = arguments.call;
  // Each block of queries has as many sums as warps.
  const int share = block_x() - arguments.query_far_count / S::kWarps;
  if (share >= 0) return sum_by_distance<T, S>(table, share);
  if (call.query.table.data != nullptr)
    clear_far_sums<S>(arguments, arguments.far_query_sums, arguments.query_far_count);
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

const char* backward_query(const TableCall& arguments, void* stream) {
  const Call& call = arguments.backward.call;
  return at_variant(call.element, call.size, call.dropout, [&](auto type, auto size, auto dropout) {
    using S = BackwardShape<size()>;
    constexpr int own = Memory<S>::kBytes, by_distance = DistanceLoop<decltype(type), S>::kBytes;
    return launch<backward_query_kernel<decltype(type), size(), dropout()>>(
        block_count(call, call.query, S::kBlockM) + arguments.diagonals.shares, arguments.backward.head_count,
        S::kThreads, own > by_distance ? own : by_distance, stream, arguments);
  });
}

}  // namespace deberta_fast::cuda
