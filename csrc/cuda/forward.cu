// Forward: O and its log-sum-exp by (1) to (3), with near and far tiles of keys by (6) and (7).
//
// A block owns kBlockM = 128 queries of a head, each warp 16 kFragments of them, and iterates over tiles of kBlockN =
// 64 keys from left to right: far left, near, far right. Scores, probabilities and O stay in registers. Shared memory,
// Memory::kBytes, holds two tiles of K and V per block and rows of Q per warp, and at head sizes above 64 the bands of
// position scores. The next tile is copied while the present one is used.
#include "dropout.h"
#include "kernels.h"
#include "scores_alone.h"

namespace deberta_fast::cuda {
namespace {

template <int size>
using ForwardShape = Shape<size, (size <= kAloneSize ? 2 : 1), (size <= kAloneSize ? 4 : 8), 64, size <= kAloneSize>;

// The layout of shared memory. A warp loads its rows of Q through a stage. At head sizes up to kAloneSize registers hold
// them afterwards.
template <class S>
struct Memory {
  static constexpr bool kRowsInRegisters = S::kAlone;
  static constexpr int kPairBytes = 2 * S::kTileBytes;  // K and V of a tile
  static constexpr int kColumnBandBytes = S::kAlone ? 0 : S::kColumnBandBytes;
  static constexpr int kRowBandBytes = S::kAlone ? 0 : S::kRowBandBytes;
  static constexpr int kWarpBytes = S::kStageBytes + kRowBandBytes;
  static constexpr int kBytes = 2 * kPairBytes + kColumnBandBytes + S::kWarps * kWarpBytes;

  // They are computed where they are needed, because registers are short.
  static DEVICE char* tiles() { return shared_memory(); }
  static DEVICE char* column_band() { return tiles() + 2 * kPairBytes; }
  static DEVICE char* stage() { return column_band() + kColumnBandBytes + anew(warp()) * kWarpBytes; }
  static DEVICE char* row_band() { return stage() + S::kStageBytes + kHalf * kRowBandMargin; }
};

// Keeps the place of a block in the padding of the first two rows of a warp's stage. It is read from there again for each
// tile, because registers are full.
template <class S>
struct StoredBlock {
  static DEVICE char* word(int i) {
    return Memory<S>::stage() + i / 3 * S::kPitch + kHalf * S::kSize + 4 * (1 + i % 3);
  }

  DEVICE explicit StoredBlock(const BlockInfo& block) {
    if (lane() == 0) {
      const int numbers[4] = {block.first_row, block.base, block.columns, block.batch};
      EACH(i, 4) store_shared_word(word(i), static_cast<uint32_t>(numbers[i]));
    }
    sync_warp();
  }

  static DEVICE int number(int i) { return static_cast<int>(load_shared_word(word(i))); }

  static DEVICE BlockInfo load(const Call& call) {
    BlockInfo block;
    block.first_row = number(0), block.base = number(1), block.columns = number(2), block.batch = number(3);
    block.head = block_y(), block.outside = false;
    block.rows = call.ends == nullptr ? call.query.length : block.columns;
    return block;
  }
};

// Stands for NearScores where a tile has none.
struct Nothing {
  const Call& call;
};

template <class T, class S, bool dropout>
struct Mainloop {
  static constexpr int kFragments = S::kFragments, kSteps = S::kSize / 16;
  using M = Memory<S>;

  const ForwardCall& arguments;
  const Call& call;
  const StoredBlock<S> stored;
  const Dropout mask;
  uint32_t query[M::kRowsInRegisters ? kSteps : 1][kFragments][4];
  float output[kFragments][S::kSize / 8][4] = {};
  int next = 0;  // the place in M::tiles() of the next tile to be copied
  float row_max[kFragments][2], row_sum[kFragments][2] = {}, constant[kFragments][2];

  DEVICE Mainloop(const ForwardCall& arguments, const BlockInfo& block)
      : arguments(arguments), call(arguments.call), stored(block), mask(call, block.batch, block.head) {
    EACH(f, kFragments) row_max[f][0] = row_max[f][1] = kLowest;
  }

  DEVICE void left(uint32_t (&a)[4], int f, int step) const {
    if constexpr (M::kRowsInRegisters) {
      EACH(w, 4) a[w] = query[step][f][w];
    } else {
      load_left<S>(a, M::stage(), f, step);
    }
  }

  DEVICE void left(uint32_t (&a)[kFragments][4], int step) const {
    EACH(f, kFragments) left(a[f], f, step);
  }

  // Takes Q, which has arrived in the stage, and shifts it for far tiles.
  template <bool near>
  DEVICE void take_rows(int far_row) {
    sync_warp();
    if (!near) shift_rows<T, S>(M::stage(), call, stored.load(call), call.query, call.key, far_row);
    EACH(f, kFragments) {
      if (!near)
        EACH(half, 2) {
          const char* row = M::stage() + fragment_row(f, half) * S::kPitch;
          constant[f][half] = bits_float(load_shared_word(row + kHalf * S::kSize));
        }
      if constexpr (M::kRowsInRegisters) {
        EACH(step, kSteps) load_left<S>(query[step][f], M::stage(), f, step);
      }
    }
  }

  DEVICE void load_tile(const BlockInfo& block, int tile) const {
    const uint64_t exists = visible_in_tile<S>(call, block, tile);
    char* to = M::tiles() + next;
    load_columns<S>(to, call.key.x, call, block, tile * S::kBlockN, exists);
    load_columns<S>(to + S::kTileBytes, call.value, call, block, tile * S::kBlockN, exists);
    commit_copies();
  }

  template <bool near>
  DEVICE void process_tiles(int tile, const int end, int far_row) {
    BlockInfo block = stored.load(call);
    tile = next_tile<S>(call, block, tile, end);
    if (tile >= end) return;
    if (!M::kRowsInRegisters) sync_warp();  // all lanes have read Q of the tiles before
    load_own_rows<S>(M::stage(), call.query.x, call, block, own_rows<S>(block));
    load_tile(block, tile);
    wait_copies<0>();
    take_rows<near>(far_row);
    if (near && !S::kAlone) clear_absent_bands();
    // Where warps make position scores alone, half a tile at a time: registers do not hold scores of a whole one besides.
    constexpr bool alone = near && S::kAlone;
    constexpr int parts = alone ? 2 : 1, products = S::kBlockN / 8 / parts;
    std::conditional_t<alone, NearScores<T, S>, Nothing> positions = {call};
    bool follows = false;
    while (tile < end) {
      wait_copies<0>();
      sync_block();  // K and V have arrived; all warps have read the tile before
      const char *keys = M::tiles() + next, *values = keys + S::kTileBytes;
      next = M::kPairBytes - next;
      block = stored.load(call);
      const int following = next_tile<S>(call, block, tile + 1, end);
      if (following < end) load_tile(block, following);
      const bool whole = call.visible == nullptr && (tile + 1) * S::kBlockN <= block.columns;
      const auto rows = [&](auto& a, auto... place) { left(a, place...); };
      if constexpr (alone) positions.begin(tile * S::kBlockN - block.first_row - warp() * S::kWarpRows, follows, rows);
      KEEP_ROLLED
      for (int part = 0; part < parts; ++part) {
        float scores[kFragments][products][4];
        if constexpr (alone) {
          EACH(i, 2) positions.multiply(scores, i, 2 * part + i, keys, rows);
        } else {
          begin<near>(scores, block, keys, tile, follows);
          EACH(step, kSteps) {
            uint32_t a[kFragments][4];
            left(a, step);
            add_products<T, S>(scores, a, keys, step);
          }
        }
        if (!whole) hide(scores, visible_in_tile<S>(call, stored.load(call), tile) >> (32 * part));
        online_softmax<near>(scores, tile * S::kBlockN + 32 * part);
        EACH(step, products / 2) {
          uint32_t p[kFragments][4];
          EACH(f, kFragments) as_left<T>(p[f], scores[f], step);
          add_weighted<T, S>(output, p, values, 16 * (2 * part + step));
        }
      }
      follows = following == tile + 1;
      tile = following;
    }
  }

  DEVICE void clear_absent_bands() const {
    if (call.query.score_table == nullptr) clear_row_band<S>(M::row_band());
    if (call.key.score_table == nullptr) clear_column_band<S>(M::column_band());
  }

  // Sets scores to the position scores that bands hold, or to zero in a far tile.
  template <bool near>
  DEVICE void begin(float (&scores)[kFragments][S::kBlockN / 8][4], const BlockInfo& block, const char* keys, int tile,
                    bool follows) const {
    if constexpr (near) {
      if (call.key.score_table != nullptr)
        write_column_band<T, S>(M::column_band(), call, block, call.key, keys, tile * S::kBlockN, tile);
      if (call.query.score_table != nullptr)
        write_row_band<T, S>(M::row_band(), call, block, call.query, tile * S::kBlockN, follows,
                             [&](uint32_t (&a)[kFragments][4], int step) { left(a, step); });
      sync_block();  // the band by columns is complete
      begin_scores<T, S>(scores, M::row_band(), M::column_band(), 1 / call.band_scale);
    } else {
      EACH(f, kFragments)
        EACH(n, S::kBlockN / 8)
          EACH(w, 4) scores[f][n][w] = 0;
    }
  }

  // The first key of this lane in eight positions, counted within them.
  static DEVICE int own_key() { return S::column(2 * (lane() % 4)); }

  template <int products>
  DEVICE void hide(float (&scores)[kFragments][products][4], uint64_t seen) const {
    seen >>= own_key();
    EACH(n, products)
      EACH(w, 2) {
        const bool there = seen >> (S::column(8 * n) + S::column(w)) & 1;
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
  template <bool near, int products>
  DEVICE void online_softmax(float (&scores)[kFragments][products][4], int first_key) {
    const float unit = call.scale * static_cast<float>(kLog2e), slope = near ? unit : 2 * unit;
    float now[kFragments][2];
    bool rises = false;
    EACH(f, kFragments)
      EACH(half, 2) {
        float most = -infinity();
        EACH(n, products) most = maximum(most, maximum(scores[f][n][2 * half], scores[f][n][2 * half + 1]));
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
        EACH(n, products)
          EACH(w, 2) {
            float& score = scores[f][n][2 * half + w];
            score = exp2_fast(fused_multiply_add(slope, score, origin));
            row_sum[f][half] += score;
          }
        if (dropout) drop(scores[f], half, first_key, own_row<S>(stored.load(call), f, half));
      }
  }

  // Dropout does not change row_sum.
  template <int products>
  DEVICE void drop(float (&probabilities)[products][4], int half, int first_key, int query) const {
    EACH(group, products / 4) {
      const uint32_t keep = kept(query, first_key + 32 * group);
      EACH(n, 4)
        EACH(w, 2) {
          float& probability = probabilities[4 * group + n][2 * half + w];
          probability = keep >> (S::column(8 * n) + S::column(w)) & 1 ? probability : 0;
        }
    }
  }

  // Bit mask of the keys that dropout keeps, from this lane's first of 32 on. Each lane of a row makes eight bits.
  DEVICE uint32_t kept(int query, int first_key) const {
    uint32_t bits = mask.keep_eight(query, first_key + 8 * (lane() % 4));
    if (!S::kAlone) return bits;
    bits <<= 8 * (lane() % 4);
    bits |= shuffle_xor(bits, 1);
    return (bits | shuffle_xor(bits, 2)) >> own_key();
  }

  DEVICE void finish() {
    const BlockInfo block = stored.load(call);
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
    store_own_rows<T, S>(arguments.output, M::stage(), call, block, output, factors);
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
