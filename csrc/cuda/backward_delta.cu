// Backward, first: of each query Delta = dO · O - dlse (8), and its log-sum-exp in base 2. Eight lanes a query.
#include "backward_tile.h"

namespace deberta_fast::cuda {
namespace {

constexpr int kThreads = 128, kRows = kThreads / 8;

template <class T>
KERNEL(kThreads, 1)
delta_kernel(GRID_CONSTANT const BackwardCall arguments) {
  const Call& call = arguments.call;
  const Place place = find_place(call, call.query, call.key, kRows);
  if (place.outside) return;
  const int row = place.first_row + thread() / 8;
  const bool exists = row < place.rows;
  float sum = 0;
  if (exists)
    for (int chunk = thread() % 8; 8 * chunk < call.size; chunk += 8) {
      const Words o = load_global(row_address(arguments.output, place, place.base + row) + 16 * chunk);
      const Words d = load_global(row_address(arguments.grad_output, place, place.base + row) + 16 * chunk);
      for (int w = 0; w < 4; ++w) {
        sum = fused_multiply_add(low<T>(o.x[w]), low<T>(d.x[w]), sum);
        sum = fused_multiply_add(high<T>(o.x[w]), high<T>(d.x[w]), sum);
      }
    }
  for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
  if (!exists || thread() % 8 != 0) return;
  const float lse = *statistic_address(arguments.lse, place, place.base + row);
  const int64_t at = place.head * arguments.statistic_rows + place.batch * arguments.statistic_batch + place.base + row;
  arguments.lse2[at] = lse == -infinity() ? infinity() : lse * static_cast<float>(kLog2e);
  arguments.delta[at] = sum - *statistic_address(arguments.grad_lse, place, place.base + row);
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
