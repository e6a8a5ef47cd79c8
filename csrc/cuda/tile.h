// Shared by forward and backward: where a block of rows lies, which tiles of columns it reads, and tiles in shared
// memory.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "skew.h"

namespace deberta_fast::cuda {

constexpr int kHalf = 2;  // bytes per element

// The tile shape of a kernel. Each of kWarps warps owns 16 kFragments rows of the block.
template <int size, int fragments, int warps, int columns, bool alone = false>
struct Shape {
  // Whether each warp makes its position scores alone. If so, tiles have another order of columns.
  static constexpr bool kAlone = alone;
  static ANYWHERE int column(int position) { return alone ? swapped_column(position) : column_at(position); }
  static constexpr int kSize = size;  // D rounded up to a multiple of 32
  static constexpr int kFragments = fragments;
  static constexpr int kWarps = warps;
  static constexpr int kWarpRows = 16 * fragments;
  static constexpr int kBlockM = kWarpRows * warps;  // rows of a block
  static constexpr int kThreads = 32 * warps;
  static constexpr int kBlockN = columns;  // columns of a tile
  // The pitch is 16 bytes modulo 128, so that eight consecutive rows use every bank once.
  static constexpr int kPitch = kHalf * (size + 8);
  static constexpr int kTileBytes = columns * kPitch;
  static constexpr int kRowBandBytes = kHalf * row_band_halves(kWarpRows, columns);
  static constexpr int kRowBandPitch = kHalf * row_band_pitch(columns);
  static constexpr int kColumnPitch = kHalf * column_band_pitch(kBlockM);
  static constexpr int kColumnBandBytes = columns * kColumnPitch;
  static constexpr int kStageBytes = kWarpRows * kPitch;
  static_assert(kBlockM % 32 == 0, "tables by distance are read from multiples of 32 on");
};

// ---- Blocks and tiles.

struct BlockInfo {
  int batch;  // batch row or sequence
  int head;
  int first_row;      // of the block, within its sequence
  int rows, columns;  // lengths of the sequence
  int base;           // first row of the sequence in the tensor; 0 unless packed
  bool outside;       // the sequence has no such block
};

// Maps block_x to a block of rows. Dense: the blocks of one batch row follow those of the one before. Packed: the
// blocks of sequence s begin at (its start / block_rows) + s, which leaves enough indices for each sequence without a
// table.
DEVICE BlockInfo find_block(const Call& call, const Operand& rows, const Operand& columns, int block_rows,
                            int first_head = 0) {
  BlockInfo block;
  block.head = first_head + block_y();
  if (call.ends == nullptr) {
    const int blocks = (rows.length + block_rows - 1) / block_rows;
    block.batch = block_x() / blocks;
    block.first_row = (block_x() % blocks) * block_rows;
    block.rows = rows.length, block.columns = columns.length;
    block.base = 0;
  } else {
    int low = 0, high = call.batches;  // the last sequence that begins at or before this block
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (call.ends[middle] / block_rows + middle <= block_x() ? low : high) = middle;
    }
    const int start = call.ends[low];
    block.batch = low;
    block.first_row = (block_x() - (start / block_rows + low)) * block_rows;
    block.rows = block.columns = call.ends[low + 1] - start;
    block.base = start;
  }
  block.outside = block.first_row >= block.rows;
  return block;
}

// Tiles of columns for a block of rows: far left up to near_begin, near up to near_end, far right up to end (7).
struct Segments {
  int near_begin, near_end, end;
};

DEVICE Segments find_segments(const Operand& rows, const BlockInfo& block, int block_rows, int tile_columns) {
  const auto tiles = [=](int columns) { return columns <= 0 ? 0 : (columns - 1) / tile_columns + 1; };
  Segments found;
  found.end = tiles(block.columns);
  // Tile n has the distances n tile_columns - (first_row + block_rows - 1) to (n + 1) tile_columns - 1 - first_row.
  found.near_begin = minimum(tiles(rows.near_after + block.first_row - tile_columns + 2), found.end);
  found.near_end = minimum(tiles(rows.near_before + block.first_row + block_rows - 1), found.end);
  if (found.near_end < found.near_begin) found.near_end = found.near_begin;
  return found;
}

DEVICE char* row_address(const Heads& x, const BlockInfo& block, int64_t row) {
  return static_cast<char*>(x.data) + kHalf * (block.batch * x.batch + block.head * x.head + row * x.row);
}

DEVICE float* statistic_address(const Statistic& x, const BlockInfo& block, int64_t row) {
  return x.data + block.batch * x.batch + block.head * x.head + row * x.row;
}

ANYWHERE uint64_t first_bits(int count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Bit mask of the keys [first, first + most) that exist and are visible; most <= 64.
DEVICE uint64_t visible_keys(const Call& call, const BlockInfo& block, int64_t base, int first, int length, int most) {
  const int count = minimum(length - first, most);
  if (count <= 0) return 0;
  uint64_t bits = first_bits(count);
  if (call.visible != nullptr) {
    const int64_t bit = base + first;
    const uint32_t* words = call.visible + block.batch * call.visible_batch + bit / 32;
    const int shift = static_cast<int>(bit % 32);
    const uint64_t low = words[0] | uint64_t{words[1]} << 32;  // the mask is padded with two words
    bits &= shift == 0 ? low : low >> shift | uint64_t{words[2]} << (64 - shift);
  }
  return bits;
}

// The same for a tile of columns.
template <class S>
DEVICE uint64_t visible_in_tile(const Call& call, const BlockInfo& block, int tile) {
  return visible_keys(call, block, block.base, tile * S::kBlockN, block.columns, S::kBlockN);
}

// The first tile from `tile` on that has a visible key, or `end`.
template <class S>
DEVICE int next_tile(const Call& call, const BlockInfo& block, int tile, int end) {
  if (call.visible == nullptr) return tile;
  for (; tile < end; tile += 32) {
    const uint32_t found = ballot(tile + lane() < end && visible_in_tile<S>(call, block, tile + lane()) != 0);
    if (found != 0) return tile + lowest_bit(found);
  }
  return end;
}

// ---- Rows in shared memory.

// Copies a tile of columns, ordered by position (skew.h); columns whose bit is not set become zeros. All threads of the
// block take part.
template <class S>
DEVICE void load_columns(char* tile, const Heads& x, const Call& call, const BlockInfo& block, int first,
                         uint64_t exists) {
  constexpr int chunks = S::kSize / 8, across = chunks <= 4 ? 4 : chunks <= 8 ? 8 : 16, down = S::kThreads / across;
  static_assert(S::kBlockN % down == 0, "every thread copies equally many");
  const int chunk = thread() % across, position = thread() / across, row = S::column(position);
  if (across > chunks && chunk >= chunks) return;
  char* to = tile + position * S::kPitch + 16 * chunk;
  const char* from = row_address(x, block, block.base + first + row) + 16 * chunk;
  const int stride = static_cast<int>(kHalf * x.row);  // the host checks that it fits
  const auto copy = [&](int i, bool valid) {
    // position < down, a power of two, so position + i * down holds column row + S::column(i * down).
    copy_async(to + i * down * S::kPitch, from + S::column(i * down) * stride, valid);
  };
  if (exists == first_bits(S::kBlockN) && call.size == S::kSize) {
    EACH(i, S::kBlockN / down) copy(i, true);
  } else {
    const uint64_t wanted = 8 * chunk < call.size ? exists >> row : 0;
    EACH(i, S::kBlockN / down) copy(i, wanted >> S::column(i * down) & 1);
  }
}

// Copies the rows that a warp owns; rows that do not exist become zeros. Only this warp may read them, after
// wait_copies and sync_warp.
template <class S>
DEVICE void load_own_rows(char* stage, const Heads& x, const Call& call, const BlockInfo& block, uint32_t exists) {
  constexpr int chunks = S::kSize / 8;
  const int first = block.first_row + warp() * S::kWarpRows;
  const char* from = row_address(x, block, block.base);
  EACH(i, S::kWarpRows * chunks / 32) {
    const int item = 32 * i + lane(), row = item / chunks, chunk = item % chunks;
    const bool valid = (exists >> row & 1) && 8 * chunk < call.size;
    const char* address = valid ? from + kHalf * ((first + row) * x.row + 8 * chunk) : from;
    copy_async(stage + row * S::kPitch + 16 * chunk, address, valid);
  }
}

// Bit mask of the warp's rows that exist.
template <class S>
DEVICE uint32_t own_rows(const BlockInfo& block) {
  const int count = block.rows - block.first_row - warp() * S::kWarpRows;
  return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
}

// The row of the warp to which elements 2 half and 2 half + 1 of accumulator f belong in this lane. Forward has fewer
// spills with this function. backward_key has fewer if the expression is written out, as below.
DEVICE int fragment_row(int f, int half) { return 16 * f + 8 * half + lane() / 4; }

// The same row, counted within the sequence.
template <class S>
DEVICE int own_row(const BlockInfo& block, int f, int half) {
  return block.first_row + warp() * S::kWarpRows + 16 * f + 8 * half + lane() / 4;
}

// Loads elements 16 step to 16 step + 15 of 16 rows as a left operand.
template <class S>
DEVICE void load_left(uint32_t (&a)[4], const char* rows, int fragment, int step) {
  load_matrices(a, rows + (16 * fragment + lane() % 16) * S::kPitch + 32 * step + 16 * (lane() / 16));
}

template <class S, int fragments>
DEVICE void load_left(uint32_t (&a)[fragments][4], const char* rows, int step) {
  EACH(f, fragments) load_left<S>(a[f], rows, f, step);
}

// Far tiles (7): replaces each row x by (x + far row of the columns' table) / 2, and writes the constant x · far row of
// the rows' table, without C, to the padding of the row. The factor 1/2 keeps the sum within the range of float16.
template <class T, class S>
DEVICE void shift_rows(char* stage, const Call& call, const BlockInfo& block, const Operand& rows,
                       const Operand& columns, int far_row) {
  if (lane() < S::kWarpRows) {
    char* row = stage + lane() * S::kPitch;
    const auto far = [&](const Table& table) {
      return static_cast<const char*>(table.data) + kHalf * (block.head * table.head + far_row * table.row);
    };
    float constant = 0;
    for (int chunk = 0; 8 * chunk < call.size; ++chunk) {
      Vec16 x = load_shared(row + 16 * chunk);
      const Vec16 own = rows.table.data ? load_global(far(rows.table) + 16 * chunk) : Vec16{};
      const Vec16 shift = columns.table.data ? load_global(far(columns.table) + 16 * chunk) : Vec16{};
      EACH(w, 4) {
        const float x0 = low<T>(x.x[w]), x1 = high<T>(x.x[w]);
        constant = fused_multiply_add(x0, low<T>(own.x[w]), constant);
        constant = fused_multiply_add(x1, high<T>(own.x[w]), constant);
        x.x[w] = pack<T>(0.5f * x0 + 0.5f * low<T>(shift.x[w]), 0.5f * x1 + 0.5f * high<T>(shift.x[w]));
      }
      store_shared(row + 16 * chunk, x);
    }
    store_shared_word(row + kHalf * S::kSize, float_bits(constant));
  }
  sync_warp();
}

// scores += rows · columnsᵀ over elements 16 step to 16 step + 15, for 8 * products columns.
template <class T, class S, int fragments, int products>
DEVICE void add_products(float (&scores)[fragments][products][4], const uint32_t (&a)[fragments][4],
                         const char* columns, int step) {
  UNROLL
  for (int n = 0; n < products; n += 2) {
    uint32_t b[4];
    load_matrices(b, columns + (8 * (n + lane() / 16) + lane() % 8) * S::kPitch + 32 * step + 16 * (lane() / 8 % 2));
    EACH(f, fragments) {
      multiply_add<T>(scores[f][n], a[f], b[0], b[1]);
      multiply_add<T>(scores[f][n + 1], a[f], b[2], b[3]);
    }
  }
}

// sums += p · columns for 16 columns, where p is a left operand.
template <class T, class S, int fragments>
DEVICE void add_weighted(float (&sums)[fragments][S::kSize / 8][4], const uint32_t (&p)[fragments][4],
                         const char* columns, int first_position) {
  UNROLL
  for (int n = 0; n < S::kSize / 8; n += 2) {
    uint32_t b[4];
    load_matrices_transposed(b, columns + (first_position + lane() % 16) * S::kPitch + 16 * n + 16 * (lane() / 16));
    EACH(f, fragments) {
      multiply_add<T>(sums[f][n], p[f], b[0], b[1]);
      multiply_add<T>(sums[f][n + 1], p[f], b[2], b[3]);
    }
  }
}

// Packs 16 columns of a tile, which are products 2 step and 2 step + 1, as a left operand.
template <class T, int products>
DEVICE void as_left(uint32_t (&a)[4], const float (&tile)[products][4], int step) {
  EACH(w, 4) a[w] = pack<T>(tile[2 * step + w / 2][2 * (w % 2)], tile[2 * step + w / 2][2 * (w % 2) + 1]);
}

// Writes a warp's rows, scaled by `factors`, through its stage in shared memory, so that each store has 16 bytes.
template <class T, class S>
DEVICE void store_own_rows(const Heads& x, char* stage, const Call& call, const BlockInfo& block,
                           const float (&sums)[S::kFragments][S::kSize / 8][4],
                           const float (&factors)[S::kFragments][2]) {
  sync_warp();
  EACH(f, S::kFragments)
    EACH(n, S::kSize / 8)
      EACH(half, 2) {
        const float factor = factors[f][half];
        store_shared_word(stage + (16 * f + 8 * half + lane() / 4) * S::kPitch + 16 * n + 4 * (lane() % 4),
                          pack<T>(factor * sums[f][n][2 * half], factor * sums[f][n][2 * half + 1]));
      }
  sync_warp();
  constexpr int chunks = S::kSize / 8;
  const uint32_t exists = own_rows<S>(block);
  char* to = row_address(x, block, block.base + block.first_row + warp() * S::kWarpRows);
  EACH(i, S::kWarpRows * chunks / 32) {
    const int item = 32 * i + lane(), row = item / chunks, chunk = item % chunks;
    if ((exists >> row & 1) && 8 * chunk < call.size)
      store_global(to + kHalf * row * x.row + 16 * chunk, load_shared(stage + row * S::kPitch + 16 * chunk));
  }
}

// Returns function(padded_size), with the argument as a compile-time constant.
template <class Function>
auto at_size(int padded_size, Function function) {
  if (padded_size == 32) return function(std::integral_constant<int, 32>{});
  if (padded_size == 64) return function(std::integral_constant<int, 64>{});
  if (padded_size == 96) return function(std::integral_constant<int, 96>{});
  return function(std::integral_constant<int, 128>{});
}

// Returns function(x), where x is an instance of the element type.
template <class Function>
const char* at_element(Element element, Function function) {
  return element == Element::float16 ? function(Float16{}) : function(Bfloat16{});
}

// Returns function(element type, padded head size, flag). A kernel is compiled for each combination.
template <class Function>
const char* at_variant(Element element, int size, bool flag, Function function) {
  return at_size(padded_size(size), [&](auto padded) {
    return at_element(element, [&](auto type) {
      return flag ? function(type, padded, std::true_type{}) : function(type, padded, std::false_type{});
    });
  });
}

}  // namespace deberta_fast::cuda
