// How a call is cut into work for the kernels, and its memory: no torch here.
#pragma once

#include <functional>
#include <vector>

#include "kernels.h"

namespace deberta_fast {

// Calls the function on ranges that make up [0, count), by several threads.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>&)>;

// A call. What its caller leaves open in `attention` (sequences, blocks, distances, tables by distance) is filled in here.
struct Request {
  Attention attention{};
  std::vector<Sequence> sequences;
};

// Work is cut by shape alone, so neither results nor gradients depend on the number of threads.
void run_forward(const Kernels& kernels, Request& request, const Forward& forward, const ParallelFor& parallel_for);
void run_backward(const Kernels& kernels, Request& request, Backward& backward, const ParallelFor& parallel_for);

}  // namespace deberta_fast
