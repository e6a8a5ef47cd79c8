// Backward of the tables by distance (9): dK^e, the sum of dA^e_i q_i, or dQ^e, the sum of dA^e_j k_j, over near pairs.
//
// A program owns a diagonal of squares of 64 rows and 64 columns, and walks along it through a share of all sequences.
// Skewed, a square of dA is 64 rows of distances -63 to 63; its product with the rows has 8 x 4 fragments of 16 x 16, of
// which 20 meet anything: fragments x and x + 4 of the distances are warp x's, which makes five for each warp.
#include "backward_tile.h"

namespace deberta_fast::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
// Rows of dA and of the band, in bytes: 16 more than a multiple of 128.
constexpr int kPitch = kHalf * kSquare + 16, kBandPitch = kHalf * kSpan + 16;

// Row r, column c of a square: distance c - r lies at 64 + c - r.
ANYWHERE int square_band(int row, int column) { return row * (kBandPitch / kHalf - 1) + kSquare + column; }

template <int size>
struct Memory {
  static constexpr int kRowPitch = kHalf * (size + 8);
  static constexpr int kBytes = kSquare * (kPitch + kRowPitch + kBandPitch);
};

template <class T, int size, bool keys>
struct Pass {
  static constexpr int kRowPitch = Memory<size>::kRowPitch;

  const TableCall& arguments;
  const BackwardCall& backward;
  const Call& call;
  const Side &rows, &columns;
  char *square, *own, *band;
  float sums[2][size / 8][4] = {};

  DEVICE explicit Pass(const TableCall& arguments)
      : arguments(arguments),
        backward(arguments.backward),
        call(backward.call),
        rows(keys ? call.key : call.query),
        columns(keys ? call.query : call.key) {
    square = shared_memory(), own = square + kSquare * kPitch, band = own + kSquare * kRowPitch;
  }

  // All squares of the diagonal, this program's share of them.
  DEVICE void walk(int diagonal, int share) {
    for (int i = thread(); i < kSquare * kBandPitch / 16; i += kThreads) store_shared(band + 16 * i, {});
    Place place;
    place.head = backward.first_head + block_y();
    int turn = 0;  // squares so far, modulo the splits
    for (int s = 0; s < call.batches; ++s) {
      place.batch = s;
      if (call.ends == nullptr) {
        place.base = 0;
        place.rows = rows.length, place.columns = columns.length;
      } else {
        place.base = call.ends[s];
        place.rows = place.columns = call.ends[s + 1] - call.ends[s];
      }
      const int first = diagonal < 0 ? -diagonal : 0;
      const int last =
          minimum((place.rows + kSquare - 1) / kSquare, (place.columns + kSquare - 1) / kSquare - diagonal);
      const int splits = arguments.splits, count = last > first ? last - first : 0;
      for (int row = first + (share + splits - turn) % splits; row < last; row += splits)
        meet(place, row * kSquare, (row + diagonal) * kSquare);
      turn = (turn + count) % splits;
    }
  }

  DEVICE void meet(Place& place, int first_row, int first_column) {
    const int distance = first_column / kBackwardRows - first_row / kBackwardRows;
    if (distance < arguments.first_block || distance > arguments.last_block) return;
    const int first_key = keys ? first_row : first_column, first_query = keys ? first_column : first_row;
    const uint64_t seen = visible_keys(call, place, place.base, first_key, keys ? place.rows : place.columns, kSquare);
    if (seen == 0) return;
    place.first_row = first_row;
    load(place, first_key, first_query, seen);
    wait_copies<0>();
    sync_block();
    skew();
    sync_block();
    multiply();
    sync_block();
  }

  // dA by keys: their order, or by position where they are columns. And the rows themselves; what a key that nobody sees
  // holds is never read.
  DEVICE void load(const Place& place, int first_key, int first_query, uint64_t seen) const {
    Place of_keys = place;
    of_keys.first_row = first_key / kBackwardRows * kBackwardRows;
    of_keys.rows = keys ? place.rows : place.columns, of_keys.columns = keys ? place.columns : place.rows;
    const int near_begin = find_segments(call.key, of_keys, kBackwardRows, kBackwardRows).near_begin;
    const char* from = near_tile(backward, key_block_of(call, place, first_key), block_y(),
                                 first_query / 32 - kTilesPerBlock * near_begin) +
                       64 * (first_key % kBackwardRows);
    EACH(i, kSquare * kSquare / 8 / kThreads) {
      const int item = i * kThreads + thread(), row = item / 8, chunk = item % 8, key = keys ? row : column_at(row);
      // The last tile of 32 queries may not be there.
      const bool valid = first_query + 8 * chunk < (keys ? place.columns : place.rows);
      copy_async(square + row * kPitch + 16 * chunk, from + chunk / 4 * kNearTileBytes + 64 * key + 16 * (chunk % 4),
                 valid);
    }
    const char* x = row_address(rows.x, place, place.base + place.first_row);
    EACH(i, kSquare * size / 8 / kThreads) {
      const int item = i * kThreads + thread(), row = item / (size / 8), chunk = item % (size / 8);
      const bool exists = keys ? seen >> row & 1 : place.first_row + row < place.rows;
      const bool valid = exists && 8 * chunk < call.size;
      copy_async(own + row * kRowPitch + 16 * chunk, x + kHalf * row * rows.x.row + 16 * chunk, valid);
    }
    commit_copies();
  }

  // Sixteen rows a warp. Eight columns of a row come at once; its cells in the band are always the same ones.
  DEVICE void skew() const {
    EACH(i, 4) {
      const int half = i / 2, group = 32 * (i % 2), row = 16 * warp() + 8 * half + lane() / 4;
      uint32_t pairs[4];
      if (keys) {
        const Words words = load_shared(square + row * kPitch + kHalf * group + 16 * (lane() % 4));
        EACH(w, 4) pairs[w] = words.x[w];
      } else {
        load_matrices_transposed(pairs, square + (group + lane()) * kPitch + kHalf * (16 * warp() + 8 * half));
      }
      EightHalves<true>(band, square_band(row, group + 8 * (lane() % 4))).store(0, pairs);
    }
  }

  DEVICE void multiply() {
    const int both = 3 - warp();  // the step in which both of this warp's fragments meet rows
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
  Pass<T, size, keys> pass(arguments);
  pass.walk(arguments.first_diagonal + diagonal, share);
  pass.finish(diagonal, share);
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
