// Backward of keys: dK and dV by (8) to (10), and dA of near pairs for the later kernels.
//
// A block owns 128 keys of a head and iterates over tiles of 32 queries from left to right; each warp owns 16
// kFragments keys. Rows are keys, so tiles are transposed: S = K Qᵀ, dP = V dOᵀ, dV += P dO, dK += dA Q. dK and dV
// accumulate in registers. Shared memory, Memory::kBytes, holds Q, dO and the band by columns per block, and K, V and
// two bands by rows per warp. Q and the statistics have two buffers, and the next tile's are copied during the whole of
// this tile. dO has one, and the next is copied after the last product with this one. dA is written as tiles of (128
// keys, 32 queries), in rows of 64 bytes.
#include "backward_tile.h"

namespace deberta_fast::cuda {
namespace {

template <class S>
struct Memory {
  static constexpr int kWarpBytes = 2 * S::kStageBytes + 2 * S::kRowBandBytes;
  static constexpr int kStatisticBytes = 2 * 4 * S::kBlockN;
  static constexpr int kBufferBytes = S::kTileBytes + kStatisticBytes;  // Q and the statistics
  static constexpr int kBytes = 2 * kBufferBytes + S::kTileBytes + S::kColumnBandBytes + S::kWarps * kWarpBytes;

  char *queries, *statistics, *dout, *column_band, *keys, *values, *row_band, *gradient_band;

  // Takes the buffers of this tile.
  DEVICE Memory(char* shared, int tile) {
    queries = shared + tile % 2 * kBufferBytes, statistics = queries + S::kTileBytes;
    dout = shared + 2 * kBufferBytes, column_band = dout + S::kTileBytes;
    keys = column_band + S::kColumnBandBytes + anew(thread()) / 32 * kWarpBytes, values = keys + S::kStageBytes;
    row_band = values + S::kStageBytes + kHalf * kRowBandMargin;
    gradient_band = values + S::kStageBytes + S::kRowBandBytes;
  }
};

// Keeps the place of the block and its near tiles in the padding of two rows of each warp's V. They are read from there
// again each time, because registers are full.
template <class S>
struct StoredBlock {
  static DEVICE char* words(int i) {
    return Memory<S>(shared_memory_anew(), 0).values + i * S::kPitch + kHalf * S::kSize;
  }

  DEVICE StoredBlock(const BlockInfo& block, const Segments& segments) {
    if (lane() == 0) {
      const auto word = [](int x) { return static_cast<uint32_t>(x); };
      store_shared(words(0), {{word(block.batch), word(block.head), word(block.first_row), word(block.base)}});
      store_shared(words(1),
                   {{word(block.rows), word(block.columns), word(segments.near_begin), word(segments.near_end)}});
    }
    sync_warp();
  }

  DEVICE operator BlockInfo() const {
    const Vec16 a = load_shared(words(0)), b = load_shared(words(1));
    const auto number = [](uint32_t x) { return static_cast<int>(x); };
    BlockInfo block;
    block.batch = number(a.x[0]), block.head = number(a.x[1]), block.first_row = number(a.x[2]);
    block.base = number(a.x[3]), block.rows = number(b.x[0]), block.columns = number(b.x[1]);
    block.outside = false;
    return block;
  }

  DEVICE int near_begin() const { return static_cast<int>(load_shared_word(words(1) + 8)); }
  DEVICE int near_end() const { return static_cast<int>(load_shared_word(words(1) + 12)); }
};

template <class T, class S, bool dropout>
struct Mainloop {
  static constexpr int kFragments = S::kFragments, kSteps = S::kSize / 16, kProducts = S::kBlockN / 8;

  const BackwardCall& arguments;
  const Call& call;
  const StoredBlock<S> block;
  const Dropout mask;
  Memory<S> memory;
  const uint32_t exists;  // bit mask of the visible keys of this warp
  float dk[kFragments][S::kSize / 8][4] = {}, dv[kFragments][S::kSize / 8][4] = {};
  float far[kFragments][2];

  DEVICE Mainloop(const BackwardCall& arguments, const BlockInfo& block, const Segments& segments, uint32_t exists)
      : arguments(arguments),
        call(arguments.call),
        block(block, segments),
        mask(call, block.batch, block.head),
        memory(shared_memory(), 0),
        exists(exists) {}

  DEVICE void load_keys() const {
    load_rows<S>(memory.keys, call.key.x, call, block, exists);
    commit_copies();
  }

  // Shifts K, which is in the stage, for far tiles. The constants of rows, minus infinity for hidden keys, stay in the
  // padding of K to save registers.
  template <bool near>
  DEVICE void begin_rows(int far_row) {
    if (!near) shift_rows<T, S>(memory.keys, call, block, call.key, call.query, far_row);
    if (lane() < S::kWarpRows) {
      char* constant = memory.keys + lane() * S::kPitch + kHalf * S::kSize;
      const float far_constant = near ? 0 : bits_float(load_shared_word(constant));
      store_shared_word(constant, float_bits(exists >> lane() & 1 ? far_constant : -infinity()));
    }
    EACH(f, kFragments) far[f][0] = far[f][1] = 0;
  }

  // Copies Q, and lse2 and Delta. Those of a query that does not exist are zeros: P is at most 1 (probability_of), and
  // as dO is 0 too, P dO and dA = P (0 - 0) are.
  DEVICE void load_queries(int tile) const {
    const int first = tile * S::kBlockN, query = first + lane(), which = warp();
    const Memory<S> to(shared_memory_anew(), tile);
    const BlockInfo block = this->block;
    if (first >= block.columns) return;
    load_tile<S>(to.queries, call.query.x, call, block, first, there(block, first));
    if (which < 2) {
      const float* from = which == 0 ? arguments.lse2 : arguments.delta;
      const bool valid = query < block.columns;
      copy_async_word(to.statistics + 4 * S::kBlockN * which + 4 * lane(),
                      from + (valid ? statistic_index(arguments, block, query) : 0), valid);
    }
    commit_copies();
  }

  DEVICE void load_dout(int tile) const {
    const int first = tile * S::kBlockN;
    const BlockInfo block = this->block;
    if (first >= block.columns) return;
    load_tile<S>(memory.dout, arguments.grad_output, call, block, first, there(block, first));
    commit_copies();
  }

  // Bit mask of the queries of a tile that exist.
  static DEVICE uint32_t there(const BlockInfo& block, int first) {
    const int count = block.columns - first;
    return count >= 32 ? ~0u : (1u << count) - 1;
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

  // Copies K, V and the first tile, and waits for them.
  DEVICE void begin() {
    load_keys();
    load_rows<S>(memory.values, call.value, call, block, exists);
    load_queries(0);
    load_dout(0);
    wait_copies<0>();
    sync_warp();
  }

  // The tiles of a segment. K is in its stage before and after. The tile after the segment is copied too.
  template <bool near>
  DEVICE void process_tiles(int tile, const int end, int far_row, int side) {
    if (tile >= end) return;
    begin_rows<near>(far_row);
    const bool c2p = call.query.score_table != nullptr, p2c = call.key.score_table != nullptr;
    if (near && !p2c) clear_row_band<S>(memory.row_band);
    if (near && !c2p) clear_column_band<S>(memory.column_band);
    if (near && p2c) gradient_band(tile).clear();
    for (; tile < end; ++tile) {
      memory = Memory<S>(shared_memory_anew(), tile);
      wait_copies<0>();
      sync_block();  // the tile has arrived; all warps have read the Q before it, and the band by columns
      load_queries(anew(tile) + 1);
      float scores[kFragments][kProducts][4] = {};
      if (near) {
        if (c2p)
          write_column_band<T, S>(memory.column_band, call, block, call.query, memory.queries, tile * S::kBlockN, tile);
        if (p2c)
          write_row_band<T, S>(memory.row_band, call, block, call.key, tile * S::kBlockN, tile > block.near_begin(),
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
      sync_block();  // all warps have read dO
      if (!near && tile + 1 == end) load_keys();
      load_dout(anew(tile) + 1);
      EACH(step, S::kBlockN / 16) {
        uint32_t d[kFragments][4];
        EACH(f, kFragments) as_left<T>(d[f], dp[f], step);
        add_weighted<T, S>(dk, d, memory.queries, 16 * step);
      }
      if (near) {
        char* out = near_tile(arguments, anew(block_x()), block_y(), tile - block.near_begin());
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
    }
    if (near && p2c) gradient_band(end).finish(dk);
    if (!near) {
      add_far_row<T, S>(dk, far, call, block, call.key, far_row);
      wait_copies<0>();
      store_far_sum<T, S>(far_sum<S>(arguments, arguments.far_key_sums, arguments.key_far_count, side), memory.keys,
                          far, call.key, exists);
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
  if (call.key.table.data != nullptr) clear_far_sums<S>(arguments, arguments.far_key_sums, arguments.key_far_count);
  const BlockInfo block = find_block(call, call.key, call.query, S::kBlockM, arguments.first_head);
  if (block.outside) return;
  const int first = warp() * S::kWarpRows;
  const uint32_t exists =
      static_cast<uint32_t>(visible_keys(call, block, block.base, block.first_row + first, block.rows, S::kWarpRows));
  const Segments segments = find_backward_segments<S>(call.key, block);
  Mainloop<T, S, dropout> mainloop(arguments, block, segments, exists);
  if (block.columns == 0 || !any_visible(call, block, block.base, block.first_row, block.rows))
    return mainloop.finish();
  mainloop.begin();
  const auto& stored = mainloop.block;
  mainloop.template process_tiles<false>(0, stored.near_begin(), call.key.far_left, 0);
  mainloop.template process_tiles<true>(stored.near_begin(), stored.near_end(), 0, 0);
  const int end = (BlockInfo(stored).columns + S::kBlockN - 1) / S::kBlockN;
  mainloop.template process_tiles<false>(stored.near_end(), end, call.key.far_right, 1);
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
