// Backward of queries: dQ by (8) to (10).
//
// A block owns 128 queries of a head and meets tiles of 32 keys from left to right. Far tiles make P and dA again; of near
// ones dA comes from the pass that owns keys, as tiles of (128 keys, 32 queries): a warp reads its own queries.
#include "backward_tile.h"

namespace deberta_fast::cuda {
namespace {

template <class S>
struct Memory {
  // A warp's dA: 32 keys by position, its queries, and 16 bytes that spread the keys over the banks.
  static constexpr int kNearPitch = kHalf * S::kWarpRows + 16, kNearBytes = S::kColumns * kNearPitch;
  static constexpr int kWarpBytes = 2 * S::kStageBytes + S::kRowBandBytes + kNearBytes;
  static constexpr int kBytes = 2 * S::kTileBytes + S::kWarps * kWarpBytes;

  char *keys, *values, *queries, *grads, *gradient_band, *near;

  DEVICE Memory() {
    keys = shared_memory(), values = keys + S::kTileBytes;
    queries = values + S::kTileBytes + warp() * kWarpBytes, grads = queries + S::kStageBytes;
    gradient_band = grads + S::kStageBytes, near = gradient_band + S::kRowBandBytes;
  }
};

template <class T, class S, bool dropout>
struct Pass {
  static constexpr int kFragments = S::kFragments, kSteps = S::kSize / 16, kProducts = S::kColumns / 8;

  const BackwardCall& arguments;
  const Call& call;
  const Place place;
  const Dropout mask;
  const Memory<S> memory;
  const uint32_t exists;
  float sums[kFragments][S::kSize / 8][4] = {};
  float lse2[kFragments][2], delta[kFragments][2], far[kFragments][2];

  DEVICE Pass(const BackwardCall& arguments, const Place& place)
      : arguments(arguments),
        call(arguments.call),
        place(place),
        mask(call, place.batch, place.head),
        exists(own_rows<S>(place)) {}

  DEVICE int own_row(int f, int half) const {
    return place.first_row + warp() * S::kWarpRows + 16 * f + 8 * half + lane() / 4;
  }

  DEVICE void load_tile(int tile, uint64_t there) const {
    load_columns<S>(memory.keys, call.key.x, call, place, tile * S::kColumns, there);
    load_columns<S>(memory.values, call.value, call, place, tile * S::kColumns, there);
    commit_copies();
  }

  // ---- Far tiles: what stands for Q, dO, and the statistics of the rows, the constant of which is in lse2.

  DEVICE void load_rows(int far_row) {
    load_own_rows<S>(memory.queries, call.query.x, call, place, exists);
    load_own_rows<S>(memory.grads, arguments.grad_output, call, place, exists);
    commit_copies();
    wait_copies<0>();
    sync_warp();
    shift_rows<T, S>(memory.queries, call, place, call.query, call.key, far_row);
    const float unit = call.scale * static_cast<float>(kLog2e);
    EACH(f, kFragments)
      EACH(half, 2) {
        const int row = 16 * f + 8 * half + lane() / 4;
        const float constant = bits_float(load_shared_word(memory.queries + row * S::kPitch + kHalf * S::kSize));
        const int64_t at = place.head * arguments.statistic_rows + place.batch * arguments.statistic_batch +
                           place.base + own_row(f, half);
        const bool valid = exists >> row & 1;
        lse2[f][half] = (valid ? arguments.lse2[at] : infinity()) - unit * constant;
        delta[f][half] = valid ? arguments.delta[at] : 0;
        far[f][half] = 0;
      }
  }

  DEVICE void left(uint32_t (&a)[kFragments][4], const char* rows, int step) const {
    EACH(f, kFragments) load_left<S>(a[f], rows, f, step);
  }

  DEVICE void meet_far(int tile, const int end, int far_row, int side) {
    tile = next_tile<S>(call, place, tile, end);
    if (tile >= end) return;
    load_rows(far_row);
    uint64_t there = visible_in_tile<S>(call, place, tile);
    load_tile(tile, there);
    while (tile < end) {
      wait_copies<0>();
      sync_block();
      float scores[kFragments][kProducts][4] = {}, grads[kFragments][kProducts][4] = {};
      EACH(step, kSteps) {
        uint32_t a[kFragments][4];
        left(a, memory.queries, step);
        add_products<T, S>(scores, a, memory.keys, step);
        left(a, memory.grads, step);
        add_products<T, S>(grads, a, memory.values, step);
      }
      differentiate(scores, grads, tile * S::kColumns, there);
      EACH(step, S::kColumns / 16) {
        uint32_t d[kFragments][4];
        EACH(f, kFragments) as_left<T>(d[f], grads[f], step);
        add_weighted<T, S>(sums, d, memory.keys, 16 * step);
      }
      tile = next_tile<S>(call, place, tile + 1, end);
      sync_block();  // nobody reads K and V any more
      if (tile < end) there = visible_in_tile<S>(call, place, tile), load_tile(tile, there);
    }
    add_far_row<T, S>(sums, far, call, place, call.query, far_row);
    if (call.query.table.data != nullptr)
      store_far_sum<T, S>(far_sum<S>(arguments.far_query_sums, arguments.query_far_count, side), memory.queries, far,
                          call.query.x, call, place, exists);
  }

  // dP becomes dA.
  DEVICE void differentiate(const float (&scores)[kFragments][kProducts][4], float (&grads)[kFragments][kProducts][4],
                            int first_key, uint64_t there) {
    const float slope = 2 * call.scale * static_cast<float>(kLog2e);
    const uint32_t seen = static_cast<uint32_t>(there) >> (8 * (lane() % 4));
    EACH(f, kFragments)
      EACH(half, 2) {
        const uint32_t kept = dropout ? mask.keep_eight(own_row(f, half), first_key + 8 * (lane() % 4)) : 0;
        EACH(c, S::kColumns / 4) {
          float& grad = grads[f][c / 2][2 * half + c % 2];
          const float p = probability_of(fused_multiply_add(slope, scores[f][c / 2][2 * half + c % 2], -lse2[f][half]));
          const float factor = dropout ? (kept >> c & 1 ? call.keep_scale : 0) : 1;
          grad = (seen >> c & 1 ? p : 0) * (factor * grad - delta[f][half]);
          far[f][half] += grad;
        }
      }
  }

  // ---- Near tiles.

  // This warp's queries of dA of a tile of keys, by position.
  DEVICE void load_near(int tile, int near_begin) const {
    const int first_key = tile * S::kColumns, first_query = place.first_row + warp() * S::kWarpRows;
    const int query_tile = first_query / 32 - kTilesPerBlock * near_begin;
    const char* from = near_tile(arguments, key_block_of(call, place, first_key), block_y(), query_tile) +
                       64 * (first_key % kBackwardRows) + kHalf * (first_query % 32);
    constexpr int chunks = S::kWarpRows / 8;
    EACH(i, S::kColumns * chunks / 32) {
      const int item = 32 * i + lane(), position = item / chunks, chunk = item % chunks;
      // The last tile of 32 queries may not be there.
      copy_async(memory.near + position * Memory<S>::kNearPitch + 16 * chunk,
                 from + 64 * column_at(position) + 16 * chunk, exists >> (8 * chunk) & 1);
    }
    commit_copies();
  }

  // The first block of queries that is near to the block of keys of this tile.
  DEVICE int near_begin(int tile) const {
    Place keys = place;
    keys.first_row = tile * S::kColumns / kBackwardRows * kBackwardRows;
    keys.rows = place.columns, keys.columns = place.rows;
    return find_segments(call.key, keys, S::kRows, kBackwardRows).near_begin;
  }

  DEVICE GradientBand<T, S> gradient_band(int tile) const {
    return {memory.gradient_band, place, call.query, tile * S::kColumns};
  }

  DEVICE void meet_near(int tile, const int end) {
    tile = next_tile<S>(call, place, tile, end);
    if (tile >= end) return;
    const bool c2p = call.query.gradient_table != nullptr;
    int expected = tile;  // what the band goes on with
    if (c2p) gradient_band(tile).clear();
    const auto load = [&] {
      load_columns<S>(memory.keys, call.key.x, call, place, tile * S::kColumns, visible_in_tile<S>(call, place, tile));
      load_near(tile, near_begin(tile));
    };
    load();
    while (tile < end) {
      wait_copies<0>();
      sync_block();
      if (c2p && tile != expected) {
        gradient_band(expected).finish(sums);
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
      EACH(step, S::kColumns / 16) {
        uint32_t d[kFragments][4];
        EACH(f, kFragments)
          EACH(w, 4) d[f][w] = pairs[f][w % 2][2 * step + w / 2];
        add_weighted<T, S>(sums, d, memory.keys, 16 * step);
      }
      if (c2p) band.take(sums);
      expected = tile + 1;
      tile = next_tile<S>(call, place, tile + 1, end);
      sync_block();  // nobody reads K any more
      if (tile < end) load();
    }
    if (c2p) gradient_band(expected).finish(sums);
  }

  DEVICE void finish() {
    float factors[kFragments][2];
    EACH(f, kFragments) factors[f][0] = factors[f][1] = call.scale;
    store_own_rows<T, S>(arguments.grad_query, memory.queries, call, place, sums, factors);
  }
};

template <class T, int size, bool dropout>
KERNEL(BackwardShape<size>::kThreads, size <= 64 ? 2 : 1)
backward_query_kernel(GRID_CONSTANT const BackwardCall arguments) {
  using S = BackwardShape<size>;
  const Call& call = arguments.call;
  if (call.query.table.data != nullptr) clear_far_sums<S>(arguments.far_query_sums, arguments.query_far_count);
  const Place place = find_place(call, call.query, call.key, S::kRows, arguments.first_head);
  if (place.outside) return;
  Pass<T, S, dropout> pass(arguments, place);
  const Segments near = find_segments(call.query, place, S::kRows, kBackwardRows);
  const int tiles = (place.columns + S::kColumns - 1) / S::kColumns;
  const int begin = minimum(kTilesPerBlock * near.near_begin, tiles);
  const int end = minimum(kTilesPerBlock * near.near_end, tiles);
  pass.meet_far(0, begin, call.query.far_left, 0);
  pass.meet_near(begin, end);
  pass.meet_far(end, tiles, call.query.far_right, 1);
  pass.finish();
}

}  // namespace

int64_t far_count(const Call& call, const Side& rows) {
  const int warps = at_size(padded_size(call.size), [](auto size) { return BackwardShape<size()>::kWarps; });
  return block_count(call, rows, kBackwardRows) * warps;
}

const char* backward_query(const BackwardCall& arguments, void* stream) {
  const Call& call = arguments.call;
  return at_variant(call.element, call.size, call.dropout, [&](auto type, auto size, auto dropout) {
    using S = BackwardShape<size()>;
    return launch<backward_query_kernel<decltype(type), size(), dropout()>>(block_count(call, call.query, S::kRows),
                                                                            arguments.head_count, S::kThreads,
                                                                            Memory<S>::kBytes, stream, arguments);
  });
}

}  // namespace deberta_fast::cuda
