// What forward and backward have in common: where a block stands, tiles of rows in shared memory, bands of position scores.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "skew.h"

namespace deberta_fast::cuda {

constexpr int kHalf = 2;  // bytes of an element

// How a kernel cuts its work: each of kWarps warps owns 16 kFragments rows.
template <int size, int fragments, int warps, int columns>
struct Shape {
  static constexpr int kSize = size;  // D, padded to a multiple of 32
  static constexpr int kFragments = fragments;
  static constexpr int kWarps = warps;
  static constexpr int kWarpRows = 16 * fragments;
  static constexpr int kRows = kWarpRows * warps;
  static constexpr int kThreads = 32 * warps;
  static constexpr int kColumns = columns;  // met at once
  // Rows of shared memory are 16 bytes apart modulo 128: eight of them under each other meet all banks once.
  static constexpr int kPitch = kHalf * (size + 8);
  static constexpr int kTileBytes = columns * kPitch;
  static constexpr int kRowBandBytes = kHalf * row_band_halves(kWarpRows, columns);
  static constexpr int kRowBandPitch = kHalf * row_band_pitch(columns);
  static constexpr int kColumnPitch = kHalf * column_band_pitch(kRows);
  static constexpr int kColumnBandBytes = columns * kColumnPitch;
  static constexpr int kStageBytes = kWarpRows * kPitch;
  static_assert(kRows % 32 == 0, "tables by distance are read from multiples of 32 on");
};

// ---- Where a block stands.

struct Place {
  int batch;  // batch row or sequence
  int head;
  int first_row;      // of the block, within its sequence
  int rows, columns;  // lengths of the sequence
  int base;           // where it begins along the length: only packed ones are not at 0
  bool outside;       // there is no such block
};

// Blocks of the first dimension: dense, those of a batch row after those of the one before. Packed, sequence s has room
// for blocks from (its start / rows a block) + s on, which is enough and needs no table.
DEVICE Place find_place(const Call& call, const Side& rows, const Side& columns, int block_rows, int first_head = 0) {
  Place place;
  place.head = first_head + block_y();
  if (call.ends == nullptr) {
    const int blocks = (rows.length + block_rows - 1) / block_rows;
    place.batch = block_x() / blocks;
    place.first_row = (block_x() % blocks) * block_rows;
    place.rows = rows.length, place.columns = columns.length;
    place.base = 0;
  } else {
    int low = 0, high = call.batches;  // the last sequence that begins at or before this block
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (call.ends[middle] / block_rows + middle <= block_x() ? low : high) = middle;
    }
    const int start = call.ends[low];
    place.batch = low;
    place.first_row = (block_x() - (start / block_rows + low)) * block_rows;
    place.rows = place.columns = call.ends[low + 1] - start;
    place.base = start;
  }
  place.outside = place.first_row >= place.rows;
  return place;
}

// Tiles of columns that a block of rows meets: far left up to near_begin, near up to near_end, far right up to end (7).
struct Segments {
  int near_begin, near_end, end;
};

DEVICE Segments find_segments(const Side& rows, const Place& place, int block_rows, int tile_columns) {
  const auto tiles = [=](int columns) { return columns <= 0 ? 0 : (columns - 1) / tile_columns + 1; };
  Segments found;
  found.end = tiles(place.columns);
  // Distances of tile n: from n tile_columns - (first_row + block_rows - 1) to (n + 1) tile_columns - 1 - first_row.
  found.near_begin = minimum(tiles(rows.near_after + place.first_row - tile_columns + 2), found.end);
  found.near_end = minimum(tiles(rows.near_before + place.first_row + block_rows - 1), found.end);
  if (found.near_end < found.near_begin) found.near_end = found.near_begin;
  return found;
}

DEVICE char* row_address(const Heads& x, const Place& place, int64_t row) {
  return static_cast<char*>(x.data) + kHalf * (place.batch * x.batch + place.head * x.head + row * x.row);
}

DEVICE float* statistic_address(const Statistic& x, const Place& place, int64_t row) {
  return x.data + place.batch * x.batch + place.head * x.head + row * x.row;
}

ANYWHERE uint64_t first_bits(int count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Which of `most` keys, 64 at most, from `first` on exist and may be attended to, a bit each.
DEVICE uint64_t visible_keys(const Call& call, const Place& place, int64_t base, int first, int length, int most) {
  const int count = minimum(length - first, most);
  if (count <= 0) return 0;
  uint64_t bits = first_bits(count);
  if (call.visible != nullptr) {
    const int64_t bit = base + first;
    const uint32_t* words = call.visible + place.batch * call.visible_batch + bit / 32;
    const int shift = static_cast<int>(bit % 32);
    const uint64_t low = words[0] | uint64_t{words[1]} << 32;  // two words more than needed are there
    bits &= shift == 0 ? low : low >> shift | uint64_t{words[2]} << (64 - shift);
  }
  return bits;
}

// Those of a tile of columns.
template <class S>
DEVICE uint64_t visible_in_tile(const Call& call, const Place& place, int tile) {
  return visible_keys(call, place, place.base, tile * S::kColumns, place.columns, S::kColumns);
}

// The first tile from `tile` on with a key that may be attended to.
template <class S>
DEVICE int next_tile(const Call& call, const Place& place, int tile, int end) {
  if (call.visible == nullptr) return tile;
  for (; tile < end; tile += 32) {
    const uint32_t found = ballot(tile + lane() < end && visible_in_tile<S>(call, place, tile + lane()) != 0);
    if (found != 0) return tile + lowest_bit(found);
  }
  return end;
}

// ---- Rows in shared memory.

// A tile of a column side by position, zeros for those whose bit is not set. A block's threads share the work.
template <class S>
DEVICE void load_columns(char* tile, const Heads& x, const Call& call, const Place& place, int first, uint64_t exists) {
  constexpr int chunks = S::kSize / 8, across = chunks <= 4 ? 4 : chunks <= 8 ? 8 : 16, down = S::kThreads / across;
  static_assert(S::kColumns % down == 0, "every thread takes as many");
  const int chunk = thread() % across, position = thread() / across, row = column_at(position);
  if (across > chunks && chunk >= chunks) return;
  char* to = tile + position * S::kPitch + 16 * chunk;
  const char* from = row_address(x, place, place.base + first + row) + 16 * chunk;
  const int stride = static_cast<int>(kHalf * x.row);  // as the host has checked
  const auto copy = [&](int i, bool valid) {
    // Positions so far apart are columns that far apart, whatever the thread.
    copy_async(to + i * down * S::kPitch, from + column_at(i * down) * stride, valid);
  };
  if (exists == first_bits(S::kColumns) && call.size == S::kSize) {
    EACH(i, S::kColumns / down) copy(i, true);
  } else {
    const uint64_t wanted = 8 * chunk < call.size ? exists >> row : 0;
    EACH(i, S::kColumns / down) copy(i, wanted >> column_at(i * down) & 1);
  }
}

// The rows that a warp owns, zeros where they do not exist. Only this warp may read them, after wait_copies and sync_warp.
template <class S>
DEVICE void load_own_rows(char* stage, const Heads& x, const Call& call, const Place& place, uint32_t exists) {
  constexpr int chunks = S::kSize / 8;
  const int first = place.first_row + warp() * S::kWarpRows;
  const char* from = row_address(x, place, place.base);
  EACH(i, S::kWarpRows * chunks / 32) {
    const int item = 32 * i + lane(), row = item / chunks, chunk = item % chunks;
    const bool valid = (exists >> row & 1) && 8 * chunk < call.size;
    const char* address = valid ? from + kHalf * ((first + row) * x.row + 8 * chunk) : from;
    copy_async(stage + row * S::kPitch + 16 * chunk, address, valid);
  }
}

// Which of a warp's rows exist.
template <class S>
DEVICE uint32_t own_rows(const Place& place) {
  const int count = place.rows - place.first_row - warp() * S::kWarpRows;
  return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
}

// The left operand of 16 rows: step `step` of 16 elements.
template <class S>
DEVICE void load_left(uint32_t (&a)[4], const char* rows, int fragment, int step) {
  load_matrices(a, rows + (16 * fragment + lane() % 16) * S::kPitch + 32 * step + 16 * (lane() / 16));
}

// Far tiles (7): rows of half (x + the other side's far row), in place, and C-less constants x · own far row, which go
// where the padding of each row is. Halves, so that float16 has room for the sum.
template <class T, class S>
DEVICE void shift_rows(char* stage, const Call& call, const Place& place, const Side& rows, const Side& columns,
                       int far_row) {
  if (lane() < S::kWarpRows) {
    char* row = stage + lane() * S::kPitch;
    const auto far = [&](const Table& table) {
      return static_cast<const char*>(table.data) + kHalf * (place.head * table.head + far_row * table.row);
    };
    float constant = 0;
    for (int chunk = 0; 8 * chunk < call.size; ++chunk) {
      Words x = load_shared(row + 16 * chunk);
      const Words own = rows.table.data ? load_global(far(rows.table) + 16 * chunk) : Words{};
      const Words shift = columns.table.data ? load_global(far(columns.table) + 16 * chunk) : Words{};
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

// scores += rows · columnsᵀ for 8 n columns from a position on.
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

// sums += p · columns, where p, 16 columns of it, is a left operand.
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

// Sixteen columns of a tile as left operand: products 2 step and 2 step + 1, which are columns by position.
template <class T, int products>
DEVICE void as_left(uint32_t (&a)[4], const float (&tile)[products][4], int step) {
  EACH(w, 4) a[w] = pack<T>(tile[2 * step + w / 2][2 * (w % 2)], tile[2 * step + w / 2][2 * (w % 2) + 1]);
}

// Writes a warp's rows: through its stage, so that 16 bytes go at once. factors: of rows g and g + 8 of each fragment.
template <class T, class S>
DEVICE void store_own_rows(const Heads& x, char* stage, const Call& call, const Place& place,
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
  const uint32_t exists = own_rows<S>(place);
  char* to = row_address(x, place, place.base + place.first_row + warp() * S::kWarpRows);
  EACH(i, S::kWarpRows * chunks / 32) {
    const int item = 32 * i + lane(), row = item / chunks, chunk = item % chunks;
    if ((exists >> row & 1) && 8 * chunk < call.size)
      store_global(to + kHalf * row * x.row + 16 * chunk, load_shared(stage + row * S::kPitch + 16 * chunk));
  }
}

// Calls the function with the padded head size as a constant; its result.
template <class Function>
auto at_size(int padded_size, Function function) {
  switch (padded_size) {
    case 32:
      return function(std::integral_constant<int, 32>{});
    case 64:
      return function(std::integral_constant<int, 64>{});
    case 96:
      return function(std::integral_constant<int, 96>{});
    default:
      return function(std::integral_constant<int, 128>{});
  }
}

// Calls the function with the type of elements.
template <class Function>
const char* at_element(Element element, Function function) {
  return element == Element::float16 ? function(Float16{}) : function(Bfloat16{});
}

// Calls the function with all that a pass is compiled for: the type of elements, the padded head size, a flag.
template <class Function>
const char* at_variant(Element element, int size, bool flag, Function function) {
  return at_size(padded_size(size), [&](auto padded) {
    return at_element(element, [&](auto type) {
      return flag ? function(type, padded, std::true_type{}) : function(type, padded, std::false_type{});
    });
  });
}

}  // namespace deberta_fast::cuda
