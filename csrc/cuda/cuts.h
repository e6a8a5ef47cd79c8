// Block sizes that kernels and host share.
#pragma once

// A function for both.
#if defined(__CUDACC__)
#define ANYWHERE __host__ __device__ __forceinline__ constexpr
#else
#define ANYWHERE constexpr inline
#endif

namespace deberta_fast {

// Distances per block of an expanded table.
constexpr int kDistances = 32;

// Rows per block of queries or keys in backward, which tells near from far by pairs of such blocks.
constexpr int kBackwardRows = 128;

// The gradients of an expanded table come from squares of kSquare rows and columns. The distances in a square, column
// minus row, are fewer than kSpan.
constexpr int kSquare = 64, kSpan = 2 * kSquare;

}  // namespace deberta_fast
