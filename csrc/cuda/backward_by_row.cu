// Backward, last pass: the gradients of the tables' rows (11), which sum over the distances that read a row and over
// far pairs (10).
//
// A block of 256 threads owns one row of one head. Each thread sums two elements over a share of the terms; the shares
// are added in order, in 8 bytes of shared memory per thread.
#include "kernels.h"
#include "tile.h"

namespace deberta_fast::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
KERNEL(kThreads, 1)
by_row_kernel(GRID_CONSTANT const TableCall arguments) {
  const BackwardCall& backward = arguments.backward;
  const Call& call = backward.call;
  const Diagonals& diagonals = arguments.diagonals;
  const bool keys = arguments.grad_tables[0] == nullptr || block_x() >= arguments.table_rows;
  const int size = padded_size(call.size);
  const int row = block_x() % arguments.table_rows, pairs = size / 2, shares = kThreads / pairs;
  const int pair = thread() % pairs, share = thread() / pairs, head = block_y() + backward.sum_head;
  float sum[2] = {};
  const auto add = [&](const float* from) { sum[0] += from[2 * pair], sum[1] += from[2 * pair + 1]; };
  if (share < shares) {
    // The near pairs that read this row have delta in [from, to), and the distance key minus query is query_offset -
    // delta.
    const int from = arguments.first_of_slot[row + arguments.first_slot];
    const int to = arguments.first_of_slot[row + arguments.first_slot + 1];
    const int first = kSquare * (diagonals.first - 1) + 1, last = kSquare * (diagonals.first + diagonals.count) - 1;
    const int begin = arguments.query_offset - to + 1, end = minimum(arguments.query_offset - from, last);
    const float* sums =
        (keys ? arguments.sums[1] : arguments.sums[0]) + int64_t{head} * diagonals.shares * kSpan * size;
    int turn = 0;
    for (int distance = begin < first ? first : begin; distance <= end; ++distance) {
      // Diagonal d has the distances 64 d - 63 to 64 d + 63, so one or two diagonals have this one.
      const int low = (distance - kSquare * diagonals.first + kSpan) / kSquare - 2;
      for (int d = low; d < low + 2; ++d) {
        if (d < 0 || d >= diagonals.count) continue;
        const int across = distance - kSquare * (diagonals.first + d);
        if (across == -kSquare) continue;
        // Seen from the keys, distances are negated.
        const int at = kSquare + (keys ? -across : across);
        const int stop = arguments.first_share[d + 1];
        for (int part = arguments.first_share[d]; part < stop; ++part, ++turn)
          if (turn % shares == share) add(sums + (int64_t{part} * kSpan + at) * size);
      }
    }
    const Operand& rows = keys ? call.key : call.query;
    const float* far_sums = keys ? backward.far_key_sums : backward.far_query_sums;
    const int far_count = keys ? backward.key_far_count : backward.query_far_count;
    for (int side = 0; side < 2; ++side)
      if (row == (side == 0 ? rows.far_left : rows.far_right)) {
        const float* sums = far_sums + (int64_t{head} * 2 + side) * far_count * size;
        for (int part = share; part < far_count; part += shares) add(sums + int64_t{part} * size);
      }
  }
  char* memory = shared_memory();
  store_shared_word(memory + 8 * thread(), float_bits(sum[0]));
  store_shared_word(memory + 8 * thread() + 4, float_bits(sum[1]));
  sync_block();
  if (share > 0 || 2 * pair >= call.size) return;
  for (int other = 1; other < shares; ++other)
    for (int i = 0; i < 2; ++i) sum[i] += bits_float(load_shared_word(memory + 8 * (other * pairs + pair) + 4 * i));
  const int64_t at = (int64_t{backward.first_head + block_y()} * arguments.table_rows + row) * call.size + 2 * pair;
  void* grad_table = keys ? arguments.grad_tables[1] : arguments.grad_tables[0];
  static_cast<uint32_t*>(grad_table)[at / 2] = pack<T>(call.scale * sum[0], call.scale * sum[1]);
}

}  // namespace

const char* backward_by_row(const TableCall& arguments, void* stream) {
  const int tables = (arguments.grad_tables[0] != nullptr) + (arguments.grad_tables[1] != nullptr);
  return at_element(arguments.backward.call.element, [&](auto type) {
    return launch<by_row_kernel<decltype(type)>>(int64_t{tables} * arguments.table_rows, arguments.backward.head_count,
                                                 kThreads, 8 * kThreads, stream, arguments);
  });
}

}  // namespace deberta_fast::cuda
