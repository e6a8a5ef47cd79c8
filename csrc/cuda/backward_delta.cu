// Backward, first pass: Delta_i = dO_i · O_i - dlse_i (8) of each query, and its log-sum-exp in base 2.
//
// A block of 128 threads owns 16 queries of a head, eight lanes per query. It uses no shared memory.
#include "backward_tile.h"

namespace deberta_fast::cuda {
namespace {

constexpr int kThreads = 128, kRows = kThreads / 8;

template <class T>
KERNEL(kThreads, 1)
delta_kernel(GRID_CONSTANT const BackwardCall arguments) {
  const Call& call = arguments.call;
  const BlockInfo block = find_block(call, call.query, call.key, kRows);
  if (block.outside) return;
  const int row = block.first_row + thread() / 8;
  const bool exists = row < block.rows;
  float sum = 0;
  if (exists)
    for (int chunk = thread() % 8; 8 * chunk < call.size; chunk += 8) {
      const Vec16 o = load_global(row_address(arguments.output, block, block.base + row) + 16 * chunk);
      const Vec16 d = load_global(row_address(arguments.grad_output, block, block.base + row) + 16 * chunk);
      for (int w = 0; w < 4; ++w) {
        sum = fused_multiply_add(low<T>(o.x[w]), low<T>(d.x[w]), sum);
        sum = fused_multiply_add(high<T>(o.x[w]), high<T>(d.x[w]), sum);
      }
    }
  for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
  if (!exists || thread() % 8 != 0) return;
  const float lse = *statistic_address(arguments.lse, block, block.base + row);
  const int64_t at = statistic_index(arguments, block, row);
  arguments.lse2[at] = lse == -infinity() ? infinity() : lse * static_cast<float>(kLog2e);
  arguments.delta[at] = sum - *statistic_address(arguments.grad_lse, block, block.base + row);
}

}  // namespace

const char* backward_delta(const BackwardCall& arguments, void* stream) {
  const Call& call = arguments.call;
  return at_element(call.element, [&](auto type) {
    return launch<delta_kernel<decltype(type)>>(block_count(call, call.query, kRows), call.heads, kThreads, 0, stream,
                                                arguments);
  });
}

}  // namespace deberta_fast::cuda
