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
  const bool keys = arguments.keys;
  const int size = padded_size(call.size);
  const int row = block_x(), pairs = size / 2, shares = kThreads / pairs;
  const int pair = thread() % pairs, share = thread() / pairs;
  float sum[2] = {};
  const auto add = [&](const float* from) { sum[0] += from[2 * pair], sum[1] += from[2 * pair + 1]; };
  if (share < shares) {
    // Distances of near pairs that read this row: delta in [from, to).
    const int from = arguments.first_of_slot[row + arguments.first_slot];
    const int to = arguments.first_of_slot[row + arguments.first_slot + 1];
    const int first = kSquare * (arguments.first_diagonal - 1) + 1;
    const int last = kSquare * (arguments.first_diagonal + arguments.diagonals) - 1;
    const int offset = arguments.query_offset;
    const int begin = keys ? from - offset : offset - to + 1,
              end = minimum(keys ? to - 1 - offset : offset - from, last);
    int turn = 0;
    for (int distance = begin < first ? first : begin; distance <= end; ++distance) {
      // Diagonal d has the distances 64 d - 63 to 64 d + 63, so one or two diagonals have this one.
      const int low = (distance - kSquare * arguments.first_diagonal + kSpan) / kSquare - 2;
      for (int d = low; d < low + 2; ++d) {
        if (d < 0 || d >= arguments.diagonals) continue;
        const int at = distance - kSquare * (arguments.first_diagonal + d) + kSquare;
        if (at == 0) continue;
        const float* sums =
            arguments.sums + (int64_t{block_y()} * arguments.diagonals + d) * arguments.splits * kSpan * size;
        for (int split = 0; split < arguments.splits; ++split, ++turn)
          if (turn % shares == share) add(sums + (int64_t{split} * kSpan + at) * size);
      }
    }
    const Operand& rows = keys ? call.key : call.query;
    const float* far_sums = keys ? backward.far_key_sums : backward.far_query_sums;
    const int far_count = keys ? backward.key_far_count : backward.query_far_count;
    for (int side = 0; side < 2; ++side)
      if (row == (side == 0 ? rows.far_left : rows.far_right)) {
        const float* sums = far_sums + (int64_t{block_y()} * 2 + side) * far_count * size;
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
  static_cast<uint32_t*>(arguments.grad_table)[at / 2] = pack<T>(call.scale * sum[0], call.scale * sum[1]);
}

}  // namespace

const char* backward_by_row(const TableCall& arguments, void* stream) {
  return at_element(arguments.backward.call.element, [&](auto type) {
    return launch<by_row_kernel<decltype(type)>>(arguments.table_rows, arguments.backward.head_count, kThreads,
                                                 8 * kThreads, stream, arguments);
  });
}

}  // namespace deberta_fast::cuda
