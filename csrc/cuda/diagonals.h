// The squares of 64 x 64 pairs over which the gradients of the expanded tables are summed: their diagonals, and how
// these are divided into shares, one per thread block. Host and kernels share this file.
#pragma once

#include <cstdint>

#include "block_sizes.h"

namespace deberta_fast {

// The near squares of one diagonal: of queries first, first + step, ..., `count` of them.
struct DiagonalSquares {
  int first, step, count;
};

// Diagonal d of the squares, square of keys minus square of queries, has the distances kSquare d - 63 to kSquare d +
// 63.
struct Diagonals {
  int first = 0, count = 0;  // diagonals `first` to first + count - 1
  int first_block = 0,
      last_block = -1;  // the range of block of keys minus block of queries in near pairs of blocks of 128
  int query_squares = 0, key_squares = 0;  // of the longest sequence
  int shares = 0;                          // at least one per diagonal

  // The near squares of diagonal first + d of a sequence with so many squares.
  ANYWHERE DiagonalSquares squares(int d, int queries, int keys) const {
    static_assert(kBackwardRows == 2 * kSquare, "a block has an even and an odd square");
    const int diagonal = first + d;
    // The distances of blocks for even and odd squares of queries.
    const int even = diagonal >> 1, odd = (diagonal + 1) >> 1;
    const bool even_near = first_block <= even && even <= last_block,
               odd_near = first_block <= odd && odd <= last_block;
    int begin = diagonal < 0 ? -diagonal : 0;
    const int end = queries < keys - diagonal ? queries : keys - diagonal;
    const int step = even_near && odd_near ? 1 : 2;
    if (step == 2 && begin % 2 != (odd_near ? 1 : 0)) ++begin;
    const bool none = (!even_near && !odd_near) || begin >= end;
    return {begin, step, none ? 0 : (end - begin + step - 1) / step};
  }

  // The first share of diagonal first + d; the shares of a diagonal are in proportion to its squares in the longest
  // sequence.
  ANYWHERE int first_share(int d) const {
    int64_t before = 0, all = 0;
    for (int i = 0; i < count; ++i) {
      if (i == d) before = all;
      all += squares(i, query_squares, key_squares).count;
    }
    if (d == count) before = all;
    return d + static_cast<int>(all == 0 ? 0 : (shares - count) * before / all);
  }
};

}  // namespace deberta_fast
