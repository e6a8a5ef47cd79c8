// Backward of keys: dK and dV by (8) to (10), and dA of near pairs for the passes that follow.
//
// A block owns 128 keys of a head and meets tiles of 32 queries from left to right. Rows are keys here, so tiles are
// transposed: S = K Qᵀ, dP = V dOᵀ, dV += P dO, dK += dA Q. Sums stay in registers; K, V, Q, dO and the bands are in shared
// memory. dA leaves as tiles of (128 keys, 32 queries), rows of 64 bytes.
#include "backward_tile.h"

namespace deberta_fast::cuda {
namespace {

template <class S>
struct Memory {
  static constexpr int kWarpBytes = 2 * S::kStageBytes + 2 * S::kRowBandBytes;
  static constexpr int kStatisticBytes = 2 * 4 * S::kColumns;
  static constexpr int kBytes = 2 * S::kTileBytes + kStatisticBytes + S::kWarps * kWarpBytes + S::kColumnBandBytes;

  char *queries, *grads, *statistics, *column_band, *keys, *values, *row_band, *gradient_band;

  DEVICE explicit Memory(char* shared) {
    queries = shared, grads = queries + S::kTileBytes, statistics = grads + S::kTileBytes;
    column_band = statistics + kStatisticBytes;
    keys = column_band + S::kColumnBandBytes + warp() * kWarpBytes, values = keys + S::kStageBytes;
    row_band = values + S::kStageBytes + kHalf * kRowBandMargin;
    gradient_band = values + S::kStageBytes + S::kRowBandBytes;
  }
};

template <class T, class S, bool dropout>
struct Pass {
  static constexpr int kFragments = S::kFragments, kSteps = S::kSize / 16, kProducts = S::kColumns / 8;

  const BackwardCall& arguments;
  const Call& call;
  const Place place;
  const Dropout mask;
  Memory<S> memory;
  const uint32_t exists;  // keys of this warp that may be attended to
  float grad_key[kFragments][S::kSize / 8][4] = {}, grad_value[kFragments][S::kSize / 8][4] = {};
  float far[kFragments][2];

  DEVICE Pass(const BackwardCall& arguments, const Place& place, uint32_t exists)
      : arguments(arguments),
        call(arguments.call),
        place(place),
        mask(call, place.batch, place.head),
        memory(shared_memory()),
        exists(exists) {}

  // V, and K or for far tiles what stands for it. The constants of rows, minus infinity for keys that nobody sees, stay in
  // the padding of K: registers are scarce.
  template <bool near>
  DEVICE void load_rows(int far_row) {
    load_own_rows<S>(memory.keys, call.key.x, call, place, exists);
    load_own_rows<S>(memory.values, call.value, call, place, exists);
    commit_copies();
    wait_copies<0>();
    sync_warp();
    if (!near) shift_rows<T, S>(memory.keys, call, place, call.key, call.query, far_row);
    if (lane() < S::kWarpRows) {
      char* constant = memory.keys + lane() * S::kPitch + kHalf * S::kSize;
      const float far_constant = near ? 0 : bits_float(load_shared_word(constant));
      store_shared_word(constant, float_bits(exists >> lane() & 1 ? far_constant : -infinity()));
    }
    EACH(f, kFragments) far[f][0] = far[f][1] = 0;
  }

  DEVICE void load_tile(int tile) const {
    const int first = tile * S::kColumns;
    const uint64_t there = first_bits(minimum(place.columns - first, S::kColumns));
    load_columns<S>(memory.queries, call.query.x, call, place, first, there);
    load_columns<S>(memory.grads, arguments.grad_output, call, place, first, there);
    commit_copies();
    if (thread() < S::kColumns) {
      const int64_t at = place.head * arguments.statistic_rows + place.batch * arguments.statistic_batch + place.base +
                         first + thread();
      const bool valid = there >> thread() & 1;
      // Of a query that is not there P is nothing.
      store_shared_word(memory.statistics + 4 * thread(), float_bits(valid ? arguments.lse2[at] : infinity()));
      store_shared_word(memory.statistics + 4 * (S::kColumns + thread()), float_bits(valid ? arguments.delta[at] : 0));
    }
  }

  // Bits of the eight queries from `query` on of row 16 f + 8 half + lane / 4: kept by dropout or not. A call of the
  // generator serves four neighbouring keys, which are rows of four lanes: each makes it for two of the queries.
  DEVICE uint32_t keep(int f, int half, int query) const {
    const int own = lane() / 4 % 4, key = place.first_row + warp() * S::kWarpRows + 16 * f + 8 * half + lane() / 4;
    uint32_t all = 0;
    EACH(i, 2) {
      const Words four = mask.words(query + 2 * own + i, key);
      EACH(w, 4) all |= mask.keeps(four.x[w]) << (4 * (2 * own + i) + w);
    }
    all |= shuffle_xor(all, 4);
    all |= shuffle_xor(all, 8);
    return all >> own;  // bit 4 q is that of query q
  }

  template <bool near>
  DEVICE void meet(int tile, int end, int far_row, int side) {
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
          write_column_band<T, S>(memory.column_band, call, place, call.query, memory.queries, tile * S::kColumns,
                                  tile);
        if (p2c)
          write_row_band<T, S>(memory.row_band, call, place, call.key, tile * S::kColumns, tile > first_tile,
                               [&](uint32_t (&a)[kFragments][4], int step) { left(a, memory.keys, step); });
        sync_block();
        begin_scores<T, S>(scores, memory.row_band, memory.column_band, 1 / call.band_scale);
      }
      EACH(step, kSteps) {
        uint32_t a[kFragments][4];
        left(a, memory.keys, step);
        add_products<T, S>(scores, a, memory.queries, step);
      }
      // P as halves: as float32 it would not fit into the registers besides dP.
      uint32_t p[kFragments][2][4], kept[kFragments][2];
      soften<near>(p, scores);
      if (dropout)
        EACH(f, kFragments)
          EACH(half, 2) kept[f][half] = keep(f, half, tile * S::kColumns + 8 * (lane() % 4));
      EACH(step, S::kColumns / 16) {
        uint32_t a[kFragments][4];
        EACH(f, kFragments)
          EACH(w, 4) {
            const int pair = 2 * step + w / 2;
            a[f][w] = p[f][w % 2][pair];
            if (dropout) a[f][w] &= pair_mask(kept[f][w % 2] >> (8 * pair));
          }
        add_weighted<T, S>(grad_value, a, memory.grads, 16 * step);
      }
      float grads[kFragments][kProducts][4] = {};
      EACH(step, kSteps) {
        uint32_t a[kFragments][4];
        left(a, memory.values, step);
        add_products<T, S>(grads, a, memory.grads, step);
      }
      differentiate<near>(grads, p, kept);
      EACH(step, S::kColumns / 16) {
        uint32_t d[kFragments][4];
        EACH(f, kFragments) as_left<T>(d[f], grads[f], step);
        add_weighted<T, S>(grad_key, d, memory.queries, 16 * step);
      }
      if (near) {
        char* out = near_tile(arguments, block_x(), block_y(), tile - first_tile);
        const GradientBand<T, S> band = gradient_band(tile);
        EACH(f, kFragments)
          EACH(half, 2) {
            uint32_t pairs[4];
            as_pairs<T>(pairs, grads[f], half, 1);
            const int row = warp() * S::kWarpRows + 16 * f + 8 * half + lane() / 4;
            store_global(out + 64 * row + 16 * (lane() % 4), {{pairs[0], pairs[1], pairs[2], pairs[3]}});
            if (p2c) band.put(f, half, pairs);
          }
        if (p2c) band.take(grad_key);
      }
      sync_block();  // nobody reads the tiles any more
      if (tile + 1 < end) load_tile(tile + 1);
    }
    if (near && p2c) gradient_band(end).finish(grad_key);
    if (!near) {
      add_far_row<T, S>(grad_key, far, call, place, call.key, far_row);
      if (call.key.table.data != nullptr)
        store_far_sum<T, S>(far_sum<S>(arguments.far_key_sums, arguments.key_far_count, side), memory.keys, far,
                            call.key.x, call, place, exists);
    }
  }

  DEVICE GradientBand<T, S> gradient_band(int tile) const {
    return {memory.gradient_band, place, call.key, tile * S::kColumns};
  }

  DEVICE void left(uint32_t (&a)[kFragments][4], const char* rows, int step) const {
    EACH(f, kFragments) load_left<S>(a[f], rows, f, step);
  }

  // Bits 0 and 4 of `kept` for both halves of a pair.
  static DEVICE uint32_t pair_mask(uint32_t kept) {
    return (kept & 1 ? 0x0000ffffu : 0) | (kept & 16 ? 0xffff0000u : 0);
  }

  DEVICE Words statistics(int which, int four) const {
    return load_shared(memory.statistics + 4 * S::kColumns * which + 32 * (lane() % 4) + 16 * four);
  }

  // P without dropout, eight columns of a row in four pairs.
  template <bool near>
  DEVICE void soften(uint32_t (&p)[kFragments][2][4], const float (&scores)[kFragments][kProducts][4]) const {
    const float unit = call.scale * static_cast<float>(kLog2e), slope = near ? unit : 2 * unit;
    const Words lse2[2] = {statistics(0, 0), statistics(0, 1)};
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

  // dP becomes dA.
  template <bool near>
  DEVICE void differentiate(float (&grads)[kFragments][kProducts][4], const uint32_t (&p)[kFragments][2][4],
                            const uint32_t (&kept)[kFragments][2]) {
    const Words delta[2] = {statistics(1, 0), statistics(1, 1)};
    EACH(f, kFragments)
      EACH(half, 2)
        EACH(c, 8) {
          float& grad = grads[f][c / 2][2 * half + c % 2];
          const float factor = dropout ? (kept[f][half] >> (4 * c) & 1 ? call.keep_scale : 0) : 1;
          const uint32_t pair = p[f][half][c / 2];
          grad = (c % 2 ? high<T>(pair) : low<T>(pair)) * (factor * grad - bits_float(delta[c / 4].x[c % 4]));
          if (!near) far[f][half] += grad;
        }
  }

  DEVICE void finish() {
    float key_factors[kFragments][2], value_factors[kFragments][2];
    EACH(f, kFragments)
      EACH(half, 2) {
        key_factors[f][half] = call.scale;
        value_factors[f][half] = dropout ? call.keep_scale : 1;
      }
    store_own_rows<T, S>(arguments.grad_key, memory.keys, call, place, grad_key, key_factors);
    store_own_rows<T, S>(arguments.grad_value, memory.keys, call, place, grad_value, value_factors);
  }
};

template <class T, int size, bool dropout>
KERNEL(BackwardShape<size>::kThreads, size <= 64 ? 2 : 1)
backward_key_kernel(GRID_CONSTANT const BackwardCall arguments) {
  using S = BackwardShape<size>;
  static_assert(S::kRows == kBackwardRows, "blocks of all backward passes are alike");
  const Call& call = arguments.call;
  if (call.key.table.data != nullptr) clear_far_sums<S>(arguments.far_key_sums, arguments.key_far_count);
  const Place place = find_place(call, call.key, call.query, S::kRows, arguments.first_head);
  if (place.outside) return;
  const int first = warp() * S::kWarpRows;
  const uint32_t exists =
      static_cast<uint32_t>(visible_keys(call, place, place.base, place.first_row + first, place.rows, S::kWarpRows));
  Pass<T, S, dropout> pass(arguments, place, exists);
  if (!any_visible(call, place, place.base, place.first_row, place.rows)) return pass.finish();
  const Segments near = find_segments(call.key, place, S::kRows, kBackwardRows);
  const int tiles = (place.columns + S::kColumns - 1) / S::kColumns;
  const int begin = minimum(kTilesPerBlock * near.near_begin, tiles);
  const int end = minimum(kTilesPerBlock * near.near_end, tiles);
  pass.template meet<false>(0, begin, call.key.far_left, 0);
  pass.template meet<true>(begin, end, 0, 0);
  pass.template meet<false>(end, tiles, call.key.far_right, 1);
  pass.finish();
}

}  // namespace

int backward_shared_bytes(int padded_size) {
  return at_size(padded_size, [](auto size) { return Memory<BackwardShape<size()>>::kBytes; });
}

const char* backward_key(const BackwardCall& arguments, void* stream) {
  const Call& call = arguments.call;
  return at_variant(call.element, call.size, call.dropout, [&](auto type, auto size, auto dropout) {
    using S = BackwardShape<size()>;
    return launch<backward_key_kernel<decltype(type), size(), dropout()>>(
        block_count(call, call.key, S::kRows), arguments.head_count, S::kThreads, Memory<S>::kBytes, stream, arguments);
  });
}

}  // namespace deberta_fast::cuda
