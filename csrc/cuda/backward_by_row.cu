// Backward, last: gradients of the tables' rows (11), sums over the distances that read a row, and over far pairs.
#include "kernels.h"
#include "tile.h"

namespace deberta_fast::cuda {
namespace {

constexpr int kThreads = 256;

// A block owns a row of a head, a thread two of its elements and a share of the terms; shares are added in order.
template <class T>
KERNEL(kThreads, 1)
by_row_kernel(GRID_CONSTANT const RowCall arguments) {
  const int row = block_x(), pairs = arguments.padded_size / 2, shares = kThreads / pairs;
  const int pair = thread() % pairs, share = thread() / pairs;
  float sum[2] = {};
  const auto add = [&](const float* from) { sum[0] += from[2 * pair], sum[1] += from[2 * pair + 1]; };
  if (share < shares) {
    // Distances of near pairs that read this row: delta in [from, to).
    const int from = arguments.first_of_slot[row + arguments.first_slot];
    const int to = arguments.first_of_slot[row + arguments.first_slot + 1];
    const int first = kSquare * (arguments.first_diagonal - 1) + 1;
    const int last = kSquare * (arguments.first_diagonal + arguments.diagonals) - 1;
    int begin = arguments.direction * (from - arguments.offset),
        end = arguments.direction * (to - 1 - arguments.offset);
    if (begin > end) begin = end, end = arguments.direction * (from - arguments.offset);
    begin = begin < first ? first : begin, end = minimum(end, last);
    int turn = 0;
    for (int distance = begin; distance <= end; ++distance) {
      // 64 d - 63 to 64 d + 63: two diagonals, or one.
      const int low = (distance - kSquare * arguments.first_diagonal + kSpan) / kSquare - 2;
      for (int d = low; d < low + 2; ++d) {
        if (d < 0 || d >= arguments.diagonals) continue;
        const int at = distance - kSquare * (arguments.first_diagonal + d) + kSquare;
        if (at == 0) continue;
        const float* sums = arguments.sums + (int64_t{block_y()} * arguments.diagonals + d) * arguments.splits * kSpan *
                                                 arguments.padded_size;
        for (int split = 0; split < arguments.splits; ++split, ++turn)
          if (turn % shares == share) add(sums + (int64_t{split} * kSpan + at) * arguments.padded_size);
      }
    }
    for (int side = 0; side < 2; ++side)
      if (row == (side == 0 ? arguments.left_row : arguments.right_row)) {
        const float* sums =
            arguments.far_sums + (int64_t{block_y()} * 2 + side) * arguments.far_count * arguments.padded_size;
        for (int part = share; part < arguments.far_count; part += shares)
          add(sums + int64_t{part} * arguments.padded_size);
      }
  }
  char* memory = shared_memory();
  store_shared_word(memory + 8 * thread(), float_bits(sum[0]));
  store_shared_word(memory + 8 * thread() + 4, float_bits(sum[1]));
  sync_block();
  if (share > 0 || 2 * pair >= arguments.size) return;
  for (int other = 1; other < shares; ++other)
    for (int i = 0; i < 2; ++i) sum[i] += bits_float(load_shared_word(memory + 8 * (other * pairs + pair) + 4 * i));
  const int64_t at = (int64_t{arguments.first_head + block_y()} * arguments.rows + row) * arguments.size + 2 * pair;
  static_cast<uint32_t*>(arguments.grad_table)[at / 2] = pack<T>(arguments.scale * sum[0], arguments.scale * sum[1]);
}

}  // namespace

const char* backward_by_row(const RowCall& arguments, void* stream) {
  return at_element(arguments.element, [&](auto type) {
    return launch<by_row_kernel<decltype(type)>>(arguments.rows, arguments.head_count, kThreads, 8 * kThreads, stream,
                                                 arguments);
  });
}

}  // namespace deberta_fast::cuda
