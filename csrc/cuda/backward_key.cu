// Backward of keys: dK and dV by (8) to (10), and dA of near pairs for the later kernels.
//
// A block owns 128 keys of a head and iterates over tiles of 32 queries from left to right; each warp owns 16
// kFragments keys. Rows are keys, so tiles are transposed: S = K Qᵀ, dP = V dOᵀ, dV += P dO, dK += dA Q. dK and dV
// accumulate in registers. Shared memory, Memory::kBytes, holds Q, dO and the band by columns per block, and K, V and
// two bands by rows per warp. dA is written as tiles of (128 keys, 32 queries), in rows of 64 bytes.
#include "backward_tile.h"

namespace deberta_fast::cuda {
namespace {

template <class S>
struct Memory {
  static constexpr int kWarpBytes = 2 * S::kStageBytes + 2 * S::kRowBandBytes;
  static constexpr int kStatisticBytes = 2 * 4 * S::kBlockN;
  static constexpr int kBytes = 2 * S::kTileBytes + kStatisticBytes + S::kWarps * kWarpBytes + S::kColumnBandBytes;

  char *queries, *dout, *statistics, *column_band, *keys, *values, *row_band, *gradient_band;

  DEVICE explicit Memory(char* shared) {
    queries = shared, dout = queries + S::kTileBytes, statistics = dout + S::kTileBytes;
    column_band = statistics + kStatisticBytes;
    keys = column_band + S::kColumnBandBytes + warp() * kWarpBytes, values = keys + S::kStageBytes;
    row_band = values + S::kStageBytes + kHalf * kRowBandMargin;
    gradient_band = values + S::kStageBytes + S::kRowBandBytes;
  }
};

template <class T, class S, bool dropout>
struct Mainloop {
  static constexpr int kFragments = S::kFragments, kSteps = S::kSize / 16, kProducts = S::kBlockN / 8;

  const BackwardCall& arguments;
  const Call& call;
  const BlockInfo block;
  const Dropout mask;
  Memory<S> memory;
  const uint32_t exists;  // bit mask of the visible keys of this warp
  float dk[kFragments][S::kSize / 8][4] = {}, dv[kFragments][S::kSize / 8][4] = {};
  float far[kFragments][2];

  DEVICE Mainloop(const BackwardCall& arguments, const BlockInfo& block, uint32_t exists)
      : arguments(arguments),
        call(arguments.call),
        block(block),
        mask(call, block.batch, block.head),
        memory(shared_memory()),
        exists(exists) {}

  // Loads V and K, and shifts K for far tiles. The constants of rows, minus infinity for hidden keys, stay in the
  // padding of K to save registers.
  template <bool near>
  DEVICE void load_rows(int far_row) {
    load_own_rows<S>(memory.keys, call.key.x, call, block, exists);
    load_own_rows<S>(memory.values, call.value, call, block, exists);
    commit_copies();
    wait_copies<0>();
    sync_warp();
    if (!near) shift_rows<T, S>(memory.keys, call, block, call.key, call.query, far_row);
    if (lane() < S::kWarpRows) {
      char* constant = memory.keys + lane() * S::kPitch + kHalf * S::kSize;
      const float far_constant = near ? 0 : bits_float(load_shared_word(constant));
      store_shared_word(constant, float_bits(exists >> lane() & 1 ? far_constant : -infinity()));
    }
    EACH(f, kFragments) far[f][0] = far[f][1] = 0;
  }

  DEVICE void load_tile(int tile) const {
    const int first = tile * S::kBlockN;
    const uint64_t there = first_bits(minimum(block.columns - first, S::kBlockN));
    load_columns<S>(memory.queries, call.query.x, call, block, first, there);
    load_columns<S>(memory.dout, arguments.grad_output, call, block, first, there);
    commit_copies();
    if (thread() < S::kBlockN) {
      const int64_t at = statistic_index(arguments, block, first) + thread();
      const bool valid = there >> thread() & 1;
      // An infinite log-sum-exp makes P = 0 for a query that does not exist.
      store_shared_word(memory.statistics + 4 * thread(), float_bits(valid ? arguments.lse2[at] : infinity()));
      store_shared_word(memory.statistics + 4 * (S::kBlockN + thread()), float_bits(valid ? arguments.delta[at] : 0));
    }
  }

  // Whether dropout keeps the rows 16 f + 8 half + lane / 4 for each of the queries [query, query + 8); bit
  // 8 (2 f + half) + q for query q. One call of the generator serves eight neighbouring keys, the rows of eight lanes. So
  // each lane makes it for one query, and the eight lanes transpose their bytes by exchanging halves, pairs and bits.
  DEVICE uint32_t keep(int query) const {
    const int own = lane() / 4;
    uint32_t bits = 0;
    EACH(f, kFragments)
      EACH(half, 2) bits |= mask.keep_eight(query + own, own_row<S>(block, f, half)) << (8 * (2 * f + half));
    EACH(step, 3) {
      const int distance = 4 >> step;
      const uint32_t lower = 0xffffffffu / ((1 << distance) + 1);  // the bits whose number lacks `distance`
      const bool upper = own & distance;
      const uint32_t others = shuffle_xor(bits, 4 * distance), mine = upper ? ~lower : lower;
      bits = (bits & mine) | ((upper ? others >> distance : others << distance) & ~mine);
    }
    return bits;
  }

  template <bool near>
  DEVICE void process_tiles(int tile, int end, int far_row, int side) {
    if (tile >= end) return;
    load_rows<near>(far_row);
    const bool c2p = call.query.score_table != nullptr, p2c = call.key.score_table != nullptr;
    if (near && !p2c) clear_row_band<S>(memory.row_band);
    if (near && !c2p) clear_column_band<S>(memory.column_band);
    if (near && p2c) gradient_band(tile).clear();
    load_tile(tile);
    for (const int first_tile = tile; tile < end; ++tile) {
      memory = Memory<S>(shared_memory_anew());
      wait_copies<0>();
      sync_block();
      float scores[kFragments][kProducts][4] = {};
      if (near) {
        if (c2p)
          write_column_band<T, S>(memory.column_band, call, block, call.query, memory.queries, tile * S::kBlockN, tile);
        if (p2c)
          write_row_band<T, S>(memory.row_band, call, block, call.key, tile * S::kBlockN, tile > first_tile,
                               [&](uint32_t (&a)[kFragments][4], int step) { load_left<S>(a, memory.keys, step); });
        sync_block();
        begin_scores<T, S>(scores, memory.row_band, memory.column_band, 1 / call.band_scale);
      }
      EACH(step, kSteps) {
        uint32_t a[kFragments][4];
        load_left<S>(a, memory.keys, step);
        add_products<T, S>(scores, a, memory.queries, step);
      }
      // P in 16 bits: registers do not hold it in float32 besides dP.
      uint32_t p[kFragments][2][4];
      probabilities<near>(p, scores);
      const uint32_t kept = dropout ? keep(tile * S::kBlockN + 8 * (lane() % 4)) : 0;
      EACH(step, S::kBlockN / 16) {
        uint32_t a[kFragments][4];
        EACH(f, kFragments)
          EACH(w, 4) {
            const int pair = 2 * step + w / 2;
            a[f][w] = p[f][w % 2][pair];
            if (dropout) a[f][w] &= pair_mask(kept >> (8 * (2 * f + w % 2) + 2 * pair));
          }
        add_weighted<T, S>(dv, a, memory.dout, 16 * step);
      }
      float dp[kFragments][kProducts][4] = {};
      EACH(step, kSteps) {
        uint32_t a[kFragments][4];
        load_left<S>(a, memory.values, step);
        add_products<T, S>(dp, a, memory.dout, step);
      }
      softmax_gradient<near>(dp, p, kept);
      EACH(step, S::kBlockN / 16) {
        uint32_t d[kFragments][4];
        EACH(f, kFragments) as_left<T>(d[f], dp[f], step);
        add_weighted<T, S>(dk, d, memory.queries, 16 * step);
      }
      if (near) {
        char* out = near_tile(arguments, block_x(), block_y(), tile - first_tile);
        const GradientBand<T, S> band = gradient_band(tile);
        EACH(f, kFragments)
          EACH(half, 2) {
            uint32_t pairs[4];
            as_pairs<T>(pairs, dp[f], half, 1);
            const int row = warp() * S::kWarpRows + 16 * f + 8 * half + lane() / 4;
            store_global(out + 64 * row + 16 * (lane() % 4), {{pairs[0], pairs[1], pairs[2], pairs[3]}});
            if (p2c) band.put(f, half, pairs);
          }
        if (p2c) band.take(dk);
      }
      sync_block();  // all warps have read the tiles
      if (tile + 1 < end) load_tile(tile + 1);
    }
    if (near && p2c) gradient_band(end).finish(dk);
    if (!near) {
      add_far_row<T, S>(dk, far, call, block, call.key, far_row);
      if (call.key.table.data != nullptr)
        store_far_sum<T, S>(far_sum<S>(arguments.far_key_sums, arguments.key_far_count, side), memory.keys, far,
                            call.key.x, call, block, exists);
    }
  }

  DEVICE GradientBand<T, S> gradient_band(int tile) const {
    return {memory.gradient_band, block, call.key, tile * S::kBlockN};
  }

  // The mask of a pair of 16-bit elements from bits 0 and 1 of `kept`.
  static DEVICE uint32_t pair_mask(uint32_t kept) {
    return (kept & 1 ? 0x0000ffffu : 0) | (kept & 2 ? 0xffff0000u : 0);
  }

  DEVICE Vec16 statistics(int which, int four) const {
    return load_shared(memory.statistics + 4 * S::kBlockN * which + 32 * (lane() % 4) + 16 * four);
  }

  // P before dropout, as four pairs of columns per row.
  template <bool near>
  DEVICE void probabilities(uint32_t (&p)[kFragments][2][4], const float (&scores)[kFragments][kProducts][4]) const {
    const float unit = call.scale * static_cast<float>(kLog2e), slope = near ? unit : 2 * unit;
    const Vec16 lse2[2] = {statistics(0, 0), statistics(0, 1)};
    EACH(f, kFragments)
      EACH(half, 2) {
        const char* row = memory.keys + (16 * f + 8 * half + lane() / 4) * S::kPitch;
        const float shift = unit * bits_float(load_shared_word(row + kHalf * S::kSize));
        const auto probability = [&](int c) {
          return probability_of(
              fused_multiply_add(slope, scores[f][c / 2][2 * half + c % 2], shift - bits_float(lse2[c / 4].x[c % 4])));
        };
        EACH(pair, 4) p[f][half][pair] = pack<T>(probability(2 * pair), probability(2 * pair + 1));
      }
  }

  // Turns dP into dA (8).
  template <bool near>
  DEVICE void softmax_gradient(float (&dp)[kFragments][kProducts][4], const uint32_t (&p)[kFragments][2][4],
                               uint32_t kept) {
    const Vec16 delta[2] = {statistics(1, 0), statistics(1, 1)};
    EACH(f, kFragments)
      EACH(half, 2)
        EACH(c, 8) {
          float& element = dp[f][c / 2][2 * half + c % 2];
          const float factor = dropout ? (kept >> (8 * (2 * f + half) + c) & 1 ? call.keep_scale : 0) : 1;
          const uint32_t pair = p[f][half][c / 2];
          element = (c % 2 ? high<T>(pair) : low<T>(pair)) * (factor * element - bits_float(delta[c / 4].x[c % 4]));
          if (!near) far[f][half] += element;
        }
  }

  DEVICE void finish() {
    float key_factors[kFragments][2], value_factors[kFragments][2];
    EACH(f, kFragments)
      EACH(half, 2) {
        key_factors[f][half] = call.scale;
        value_factors[f][half] = dropout ? call.keep_scale : 1;
      }
    store_own_rows<T, S>(arguments.grad_key, memory.keys, call, block, dk, key_factors);
    store_own_rows<T, S>(arguments.grad_value, memory.keys, call, block, dv, value_factors);
  }
};

template <class T, int size, bool dropout>
KERNEL(BackwardShape<size>::kThreads, size <= 64 ? 2 : 1)
backward_key_kernel(GRID_CONSTANT const BackwardCall arguments) {
  using S = BackwardShape<size>;
  static_assert(S::kBlockM == kBackwardRows, "all backward kernels use the same blocks");
  const Call& call = arguments.call;
  if (call.key.table.data != nullptr) clear_far_sums<S>(arguments.far_key_sums, arguments.key_far_count);
  const BlockInfo block = find_block(call, call.key, call.query, S::kBlockM, arguments.first_head);
  if (block.outside) return;
  const int first = warp() * S::kWarpRows;
  const uint32_t exists =
      static_cast<uint32_t>(visible_keys(call, block, block.base, block.first_row + first, block.rows, S::kWarpRows));
  Mainloop<T, S, dropout> mainloop(arguments, block, exists);
  if (!any_visible(call, block, block.base, block.first_row, block.rows)) return mainloop.finish();
  const Segments segments = find_backward_segments<S>(call.key, block);
  mainloop.template process_tiles<false>(0, segments.near_begin, call.key.far_left, 0);
  mainloop.template process_tiles<true>(segments.near_begin, segments.near_end, 0, 0);
  mainloop.template process_tiles<false>(segments.near_end, segments.end, call.key.far_right, 1);
  mainloop.finish();
}

}  // namespace

int backward_shared_bytes(int padded_size) {
  return at_size(padded_size, [](auto size) { return Memory<BackwardShape<size()>>::kBytes; });
}

const char* backward_key(const BackwardCall& arguments, void* stream) {
  const Call& call = arguments.call;
  return at_variant(call.element, call.size, call.dropout, [&](auto type, auto size, auto dropout) {
    using S = BackwardShape<size()>;
    return launch<backward_key_kernel<decltype(type), size(), dropout()>>(block_count(call, call.key, S::kBlockM),
                                                                          arguments.head_count, S::kThreads,
                                                                          Memory<S>::kBytes, stream, arguments);
  });
}

}  // namespace deberta_fast::cuda
