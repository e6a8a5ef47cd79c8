// Backward of the expanded tables (9): dK^e, the sum of dA^e_i q_i, or dQ^e, the sum of dA^e_j k_j, over near pairs.
//
// A block of four warps owns a diagonal of squares of 64 rows and 64 columns, and iterates over its share of the
// squares of all sequences. A skewed square of dA has 64 rows and the distances -63 to 63. Its product with the rows
// has 8 x 4 fragments of 16 x 16, of which 20 are not zero. Warp x accumulates fragments x and x + 4 of the distances,
// five of the 20, in registers. Shared memory, Memory::kBytes, holds the square of dA, the rows and the band.
#include "backward_tile.h"

namespace deberta_fast::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
// Bytes per row of dA and of the band: 16 more than a multiple of 128, which avoids bank conflicts.
constexpr int kPitch = kHalf * kSquare + 16, kBandPitch = kHalf * kSpan + 16;

// The cell of row r and column c of a square; distance c - r lies at 64 + c - r of its row.
ANYWHERE int square_band(int row, int column) { return row * (kBandPitch / kHalf - 1) + kSquare + column; }

template <int size>
struct Memory {
  static constexpr int kRowPitch = kHalf * (size + 8);
  static constexpr int kBytes = kSquare * (kPitch + kRowPitch + kBandPitch);
};

template <class T, int size, bool keys>
struct Mainloop {
  static constexpr int kRowPitch = Memory<size>::kRowPitch;

  const TableCall& arguments;
  const BackwardCall& backward;
  const Call& call;
  const Operand &rows, &columns;
  char *square, *own, *band;
  float sums[2][size / 8][4] = {};

  DEVICE explicit Mainloop(const TableCall& arguments)
      : arguments(arguments),
        backward(arguments.backward),
        call(backward.call),
        rows(keys ? call.key : call.query),
        columns(keys ? call.query : call.key) {
    square = shared_memory(), own = square + kSquare * kPitch, band = own + kSquare * kRowPitch;
  }

  // Processes this block's share of the squares of a diagonal.
  DEVICE void walk(int diagonal, int share) {
    for (int i = thread(); i < kSquare * kBandPitch / 16; i += kThreads) store_shared(band + 16 * i, {});
    BlockInfo block;
    block.head = backward.first_head + block_y();
    int turn = 0;  // number of squares so far, modulo the splits
    for (int s = 0; s < call.batches; ++s) {
      block.batch = s;
      if (call.ends == nullptr) {
        block.base = 0;
        block.rows = rows.length, block.columns = columns.length;
      } else {
        block.base = call.ends[s];
        block.rows = block.columns = call.ends[s + 1] - call.ends[s];
      }
      const int first = diagonal < 0 ? -diagonal : 0;
      const int last =
          minimum((block.rows + kSquare - 1) / kSquare, (block.columns + kSquare - 1) / kSquare - diagonal);
      const int splits = arguments.splits, count = last > first ? last - first : 0;
      for (int row = first + (share + splits - turn) % splits; row < last; row += splits)
        process_square(block, row * kSquare, (row + diagonal) * kSquare);
      turn = (turn + count) % splits;
    }
  }

  DEVICE void process_square(BlockInfo& block, int first_row, int first_column) {
    const int distance = first_column / kBackwardRows - first_row / kBackwardRows;
    if (distance < arguments.first_block || distance > arguments.last_block) return;
    const int first_key = keys ? first_row : first_column, first_query = keys ? first_column : first_row;
    const uint64_t seen = visible_keys(call, block, block.base, first_key, keys ? block.rows : block.columns, kSquare);
    if (seen == 0) return;
    block.first_row = first_row;
    load(block, first_key, first_query, seen);
    wait_copies<0>();
    sync_block();
    skew();
    sync_block();
    multiply();
    sync_block();
  }

  // Copies dA by key, or by position of the key if keys are columns, and the rows. Hidden keys are never read.
  DEVICE void load(const BlockInfo& block, int first_key, int first_query, uint64_t seen) const {
    BlockInfo of_keys = block;
    of_keys.first_row = first_key / kBackwardRows * kBackwardRows;
    of_keys.rows = keys ? block.rows : block.columns, of_keys.columns = keys ? block.columns : block.rows;
    const int near_begin = find_segments(call.key, of_keys, kBackwardRows, kBackwardRows).near_begin;
    const char* from = near_tile(backward, key_block_of(call, block, first_key), block_y(),
                                 first_query / 32 - kTilesPerBlock * near_begin) +
                       64 * (first_key % kBackwardRows);
    EACH(i, kSquare * kSquare / 8 / kThreads) {
      const int item = i * kThreads + thread(), row = item / 8, chunk = item % 8, key = keys ? row : column_at(row);
      // The last tile of 32 queries may be absent.
      const bool valid = first_query + 8 * chunk < (keys ? block.columns : block.rows);
      copy_async(square + row * kPitch + 16 * chunk, from + chunk / 4 * kNearTileBytes + 64 * key + 16 * (chunk % 4),
                 valid);
    }
    const char* x = row_address(rows.x, block, block.base + block.first_row);
    EACH(i, kSquare * size / 8 / kThreads) {
      const int item = i * kThreads + thread(), row = item / (size / 8), chunk = item % (size / 8);
      const bool exists = keys ? seen >> row & 1 : block.first_row + row < block.rows;
      const bool valid = exists && 8 * chunk < call.size;
      copy_async(own + row * kRowPitch + 16 * chunk, x + kHalf * row * rows.x.row + 16 * chunk, valid);
    }
    commit_copies();
  }

  // Moves 16 rows per warp from the square to the band, eight columns of a row at a time. Every square writes the same
  // cells.
  DEVICE void skew() const {
    EACH(i, 4) {
      const int half = i / 2, group = 32 * (i % 2), row = 16 * warp() + 8 * half + lane() / 4;
      uint32_t pairs[4];
      if (keys) {
        const Vec16 words = load_shared(square + row * kPitch + kHalf * group + 16 * (lane() % 4));
        EACH(w, 4) pairs[w] = words.x[w];
      } else {
        load_matrices_transposed(pairs, square + (group + lane()) * kPitch + kHalf * (16 * warp() + 8 * half));
      }
      EightHalves<true>(band, square_band(row, group + 8 * (lane() % 4))).store(0, pairs);
    }
  }

  DEVICE void multiply() {
    const int both = 3 - warp();  // the step in which both fragments of this warp are nonzero
    for (int step = 0; step < 4; ++step) {
      uint32_t a[2][4];
      EACH(i, 2)
        load_matrices_transposed(a[i], band + (16 * step + lane() / 16 * 8 + lane() % 8) * kBandPitch +
                                           kHalf * (16 * (warp() + 4 * i) + 8 * (lane() / 8 % 2)));
      UNROLL
      for (int n = 0; n < size / 8; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, own + (16 * step + lane() % 16) * kRowPitch + 16 * n + 16 * (lane() / 16));
        if (step >= both)
          multiply_add<T>(sums[0][n], a[0], b[0], b[1]), multiply_add<T>(sums[0][n + 1], a[0], b[2], b[3]);
        if (step <= both)
          multiply_add<T>(sums[1][n], a[1], b[0], b[1]), multiply_add<T>(sums[1][n + 1], a[1], b[2], b[3]);
      }
    }
  }

  DEVICE void finish(int diagonal, int share) const {
    float* to = arguments.sums +
                ((int64_t{block_y()} * arguments.diagonals + diagonal) * arguments.splits + share) * kSpan * size;
    EACH(i, 2)
      EACH(n, size / 8)
        EACH(w, 4)
          to[(16 * (warp() + 4 * i) + w / 2 * 8 + lane() / 4) * size + 8 * n + 2 * (lane() % 4) + w % 2] =
              sums[i][n][w];
  }
};

template <class T, int size, bool keys>
KERNEL(kThreads, size <= 64 ? 3 : 2)
by_distance_kernel(GRID_CONSTANT const TableCall arguments) {
  const int diagonal = block_x() / arguments.splits, share = block_x() % arguments.splits;
  Mainloop<T, size, keys> mainloop(arguments);
  mainloop.walk(arguments.first_diagonal + diagonal, share);
  mainloop.finish(diagonal, share);
}

}  // namespace

const char* backward_by_distance(const TableCall& arguments, void* stream) {
  const Call& call = arguments.backward.call;
  return at_variant(call.element, call.size, arguments.keys, [&](auto type, auto size, auto keys) {
    return launch<by_distance_kernel<decltype(type), size(), keys()>>(int64_t{arguments.diagonals} * arguments.splits,
                                                                      arguments.backward.head_count, kThreads,
                                                                      Memory<size()>::kBytes, stream, arguments);
  });
}

}  // namespace deberta_fast::cuda
