// Block sizes that kernels and host share.
#pragma once

// Marks a function that kernels and host both call.
#if defined(__CUDACC__)
#define ANYWHERE __host__ __device__ __forceinline__ constexpr
#else
#define ANYWHERE constexpr inline
#endif

namespace deberta_fast {

// Distances per block of an expanded table.
constexpr int kDistances = 32;

// The largest head size, rounded up, at which a warp of forward makes its position scores alone (scores_alone.h).
constexpr int kAloneSize = 64;

// Rows per block of queries or keys in backward. There a pair of such blocks is near or far as a whole.
constexpr int kBackwardRows = 128;

// The gradients of an expanded table are sums over squares of kSquare rows and kSquare columns. The distances in a
// square, column minus row, are one fewer than kSpan.
constexpr int kSquare = 64, kSpan = 2 * kSquare;

}  // namespace deberta_fast
