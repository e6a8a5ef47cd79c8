// Divides a call into work for the kernels and allocates its memory. This file does not depend on torch.
#pragma once

#include <functional>
#include <vector>

#include "kernels.h"

namespace deberta_fast {

// Calls the function on ranges that make up [0, count), on several threads.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>&)>;

// A call. The functions below fill in the sequences, blocks, distances and expanded tables of `attention`.
struct Request {
  Attention attention{};
  std::vector<Sequence> sequences;
};

// Work is divided by shape, so neither results nor gradients depend on the number of threads.
void run_forward(const Kernels& kernels, Request& request, const Forward& forward, const ParallelFor& parallel_for);
void run_backward(const Kernels& kernels, Request& request, Backward& backward, const ParallelFor& parallel_for);

}  // namespace deberta_fast
