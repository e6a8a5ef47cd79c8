// Backward of the expanded tables (9): dK^e, the sum of dA^e_i q_i, and dQ^e, the sum of dA^e_j k_j, over near pairs.
// Blocks of the launch of backward_query that own no queries do this.
//
// A block owns a share of the squares of 64 queries and 64 keys on a diagonal, over all sequences. A skewed square of
// dA has 64 rows and the distances -63 to 63. Its product with the rows has 8 x 4 fragments of 16 x 16, of which 20 are
// not zero. Four warps accumulate them in registers for each table; warp x has fragments x and x + 4 of the distances,
// five of the 20. Up to a head size of 64 the same four warps do so for both tables. Shared memory, kBytes, holds the
// square of dA, Q, K and a band for each table. Q and K have two buffers, and the next square, Q and K are copied
// during the products.
#pragma once

#include "backward_tile.h"

namespace deberta_fast::cuda {

template <class T, class S>
struct DistanceLoop {
  static constexpr int kGroup = 4;                             // warps
  static constexpr int kTables = S::kWarps == kGroup ? 2 : 1;  // that a warp accumulates
  static constexpr int kPitch = kHalf * kSquare + 16;          // of the square: avoids bank conflicts
  static constexpr int kBandPitch = kHalf * kSpan + 16;        // likewise
  static constexpr int kSquareBytes = kSquare * kPitch, kRowBytes = kSquare * S::kPitch;
  static constexpr int kBandBytes = kSquare * kBandPitch;
  static constexpr int kBytes = kSquareBytes + 4 * kRowBytes + 2 * kBandBytes;
  static_assert(S::kWarps * kTables == 2 * kGroup, "four warps for each table");

  const TableCall& arguments;
  const BackwardCall& backward;
  const Call& call;
  const int share, diagonal;  // the share counts from the first one of the diagonal
  const int shares;           // of the diagonal
  BlockInfo block = {};       // the sequence
  DiagonalSquares squares = {};
  int at;  // the current square of the sequence
  float sums[kTables][2][S::kSize / 8][4] = {};

  DEVICE DistanceLoop(const TableCall& arguments, int share, int diagonal)
      : arguments(arguments),
        backward(arguments.backward),
        call(backward.call),
        share(share - arguments.first_share[diagonal]),
        diagonal(diagonal),
        shares(arguments.first_share[diagonal + 1] - arguments.first_share[diagonal]) {
    block.head = backward.first_head + block_y();
    block.batch = -1;
    at = this->share - shares;
  }

  // The diagonal that has this share.
  static DEVICE int find_diagonal(const TableCall& arguments, int share) {
    for (int first = 0;; first += 32) {
      const int d = first + lane();
      const uint32_t after = ballot(d >= arguments.diagonals.count || arguments.first_share[d] > share);
      if (after != 0) return first + lowest_bit(after) - 1;
    }
  }

  static DEVICE char* square() { return shared_memory(); }
  static DEVICE char* rows(bool keys, int turn) { return square() + kSquareBytes + (turn % 2 * 2 + keys) * kRowBytes; }
  static DEVICE char* band(bool keys) { return square() + kSquareBytes + 4 * kRowBytes + keys * kBandBytes; }

  // The cell of row r and column c of a square; distance c - r lies at 64 + c - r of its row.
  static DEVICE int cell(int row, int column) { return row * (kBandPitch / kHalf - 1) + kSquare + column; }

  DEVICE bool wanted(bool keys) const { return (keys ? arguments.sums[1] : arguments.sums[0]) != nullptr; }

  // The table of this warp's i-th sums.
  static DEVICE bool table(int i) { return kTables == 2 ? i : warp() / kGroup; }

  DEVICE int first_query() const { return kSquare * (squares.first + squares.step * at); }
  DEVICE int first_key() const { return first_query() + kSquare * (arguments.diagonals.first + diagonal); }
  DEVICE uint64_t seen() const { return visible_keys(call, block, block.base, first_key(), block.columns, kSquare); }

  // Goes to the next square of this share that has a visible key. False after the last.
  DEVICE bool advance() {
    do {
      at += shares;
      while (at >= squares.count) {
        at -= squares.count;
        if (++block.batch >= call.batches) return false;
        begin_sequence();
      }
    } while (seen() == 0);
    return true;
  }

  DEVICE void begin_sequence() {
    if (call.ends == nullptr) {
      block.rows = call.query.length, block.columns = call.key.length;
    } else {
      block.base = call.ends[block.batch];
      block.rows = block.columns = call.ends[block.batch + 1] - block.base;
    }
    squares = arguments.diagonals.squares(diagonal, (block.rows + kSquare - 1) / kSquare,
                                          (block.columns + kSquare - 1) / kSquare);
  }

  DEVICE void walk() {
    for (int i = thread(); i < 2 * kBandBytes / 16; i += S::kThreads) store_shared(band(false) + 16 * i, {});
    bool more = advance();
    if (more) load(0);
    for (int turn = 0; more; ++turn) {
      wait_copies<0>();
      sync_block();  // the square, Q and K have arrived; all warps have read the bands
      EACH(i, kTables)
        if (wanted(table(i))) skew(table(i));
      sync_block();  // the bands are complete; all warps have read the square
      more = advance();
      if (more) load(turn + 1);
      EACH(i, kTables)
        if (wanted(table(i))) multiply(sums[i], rows(table(i), turn), band(table(i)));
    }
  }

  // Copies dA, its keys ordered by position, Q and K. Hidden keys are never read.
  DEVICE void load(int turn) const {
    BlockInfo of_keys = block;
    of_keys.first_row = first_key() / kBackwardRows * kBackwardRows;
    of_keys.rows = block.columns, of_keys.columns = block.rows;
    const int near_begin = find_segments(call.key, of_keys, kBackwardRows, kBackwardRows).near_begin;
    const char* from = near_tile(backward, key_block_of(call, block, first_key()), block_y(),
                                 first_query() / 32 - kTilesPerBlock * near_begin) +
                       64 * (first_key() % kBackwardRows);
    EACH(i, kSquare * kSquare / 8 / S::kThreads) {
      const int item = i * S::kThreads + thread(), position = item / 8, chunk = item % 8;
      // The last tile of 32 queries may be absent.
      const bool valid = first_query() + 8 * chunk < block.rows;
      const char* address = from + chunk / 4 * kNearTileBytes + 64 * column_at(position) + 16 * (chunk % 4);
      copy_async(square() + position * kPitch + 16 * chunk, valid ? address : backward.near, valid);
    }
    if (wanted(false))
      load_rows(rows(false, turn), call.query.x, first_query(), first_bits(minimum(block.rows - first_query(), 64)));
    if (wanted(true)) load_rows(rows(true, turn), call.key.x, first_key(), seen());
    commit_copies();
  }

  DEVICE void load_rows(char* to, const Heads& x, int first, uint64_t exists) const {
    constexpr int chunks = S::kSize / 8;
    const char* from = row_address(x, block, block.base + first);
    EACH(i, kSquare * chunks / S::kThreads) {
      const int item = i * S::kThreads + thread(), row = item / chunks, chunk = item % chunks;
      const bool valid = (exists >> row & 1) && 8 * chunk < call.size;
      const char* address = from + kHalf * row * x.row + 16 * chunk;
      copy_async(to + row * S::kPitch + 16 * chunk, valid ? address : static_cast<const char*>(x.data), valid);
    }
  }

  // Moves 16 rows per warp from the square to the band, eight columns of a row at a time. Every square writes the same
  // cells.
  DEVICE void skew(bool keys) const {
    EACH(i, 4) {
      const int half = i / 2, group = 32 * (i % 2), first = 16 * (warp() % kGroup) + 8 * half, row = first + lane() / 4;
      uint32_t pairs[4];
      if (keys) {
        const Vec16 words = load_shared(square() + column_at(row) * kPitch + kHalf * group + 16 * (lane() % 4));
        EACH(w, 4) pairs[w] = words.x[w];
      } else {
        load_matrices_transposed(pairs, square() + (group + lane()) * kPitch + kHalf * first);
      }
      EightHalves<true>(band(keys), cell(row, group + 8 * (lane() % 4))).store(0, pairs);
    }
  }

  static DEVICE void multiply(float (&sums)[2][S::kSize / 8][4], const char* rows, const char* band) {
    const int fragment = warp() % kGroup, both = 3 - fragment;  // the step in which both of its fragments are nonzero
    for (int step = 0; step < 4; ++step) {
      uint32_t a[2][4];
      EACH(i, 2)
        load_matrices_transposed(a[i], band + (16 * step + lane() / 16 * 8 + lane() % 8) * kBandPitch +
                                           kHalf * (16 * (fragment + 4 * i) + 8 * (lane() / 8 % 2)));
      UNROLL
      for (int n = 0; n < S::kSize / 8; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, rows + (16 * step + lane() % 16) * S::kPitch + 16 * n + 16 * (lane() / 16));
        if (step >= both)
          multiply_add<T>(sums[0][n], a[0], b[0], b[1]), multiply_add<T>(sums[0][n + 1], a[0], b[2], b[3]);
        if (step <= both)
          multiply_add<T>(sums[1][n], a[1], b[0], b[1]), multiply_add<T>(sums[1][n + 1], a[1], b[2], b[3]);
      }
    }
  }

  DEVICE void finish() const {
    const int64_t program =
        int64_t{block_y() + backward.sum_head} * arguments.diagonals.shares + arguments.first_share[diagonal] + share;
    EACH(t, kTables) {
      if (!wanted(table(t))) continue;
      float* to = (table(t) ? arguments.sums[1] : arguments.sums[0]) + program * kSpan * S::kSize;
      EACH(i, 2)
        EACH(n, S::kSize / 8)
          EACH(w, 4)
            to[(16 * (warp() % kGroup + 4 * i) + w / 2 * 8 + lane() / 4) * S::kSize + 8 * n + 2 * (lane() % 4) +
               w % 2] = sums[t][i][n][w];
    }
  }
};

// Processes a share of the squares.
template <class T, class S>
DEVICE void sum_by_distance(const TableCall& arguments, int share) {
  DistanceLoop<T, S> loop(arguments, share, DistanceLoop<T, S>::find_diagonal(arguments, share));
  loop.walk();
  loop.finish();
}

}  // namespace deberta_fast::cuda
