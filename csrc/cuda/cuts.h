// How tables by distance and pairs of queries and keys are cut, said once for kernels and host. No device code here.
#pragma once

namespace deberta_fast {

// A table by distance is cut into blocks of so many.
constexpr int kDistances = 32;

// Backward cuts queries and keys into blocks of this many rows, and tells near from far by pairs of blocks.
constexpr int kBackwardRows = 128;

// Gradients of a table by distance come from squares of so many rows and columns. Distances in a square, column minus
// row, are fewer than kSpan.
constexpr int kSquare = 64, kSpan = 2 * kSquare;

}  // namespace deberta_fast
