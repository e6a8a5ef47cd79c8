#include "plan.h"

#include <algorithm>
#include <atomic>

namespace deberta_fast::cuda {
namespace {

constexpr int kMaxDistance = 1 << 29;  // larger than the distance of any pair

// A pair of blocks is near if one of its distances is. Its bands read table rows up to this many distances away from
// that one. Backward needs 223 with blocks of 128 (tests/emulator/plan_test.cpp).
constexpr int kMargin = 224;

int64_t floor_divide(int64_t x, int64_t y) { return x >= 0 ? x / y : -div_up(-x, y); }

int clamp_distance(int64_t x) { return static_cast<int>(std::clamp<int64_t>(x, -kMaxDistance, kMaxDistance)); }

// Sets the near range and the expanded table of this operand, and launches the kernel that fills the table.
// delta = query_offset + direction x distance.
const char* prepare_operand(Operand& rows, const Operand& columns, const Request& request, int direction,
                            bool gradients, Workspace& workspace, void* stream) {
  // If the direction is -1, distances fall as delta grows, so past and future swap.
  const int64_t past = direction * (int64_t{request.far_past} - request.query_offset);
  const int64_t future = direction * (int64_t{request.far_future} - request.query_offset);
  rows.near_after = clamp_distance(std::min(past, future)), rows.near_before = clamp_distance(std::max(past, future));
  rows.far_left = direction < 0 ? request.past_row : request.future_row;
  rows.far_right = direction < 0 ? request.future_row : request.past_row;
  const bool alone = !gradients && padded_size(request.call.size) <= kAloneSize;
  if (rows.table.data == nullptr && !alone) return nullptr;

  const int64_t lowest = std::max<int64_t>(rows.near_after, -rows.length) - kMargin;
  const int64_t first = floor_divide(lowest, kDistances) * kDistances;
  const int64_t last = std::min<int64_t>(rows.near_before, columns.length) + kMargin;
  rows.first_distance = clamp_distance(first);
  rows.blocks = static_cast<int>(std::max<int64_t>(last - first, 0) / kDistances + 1);
  const Call& call = request.call;
  const int64_t bytes = int64_t{call.heads} * rows.blocks * kDistances * padded_size(call.size) * 2;
  char* scores = workspace.take<char>(bytes);
  char* gradient = gradients ? workspace.take<char>(bytes) : nullptr;
  rows.score_table = scores, rows.gradient_table = gradient;
  if (workspace.counts()) return nullptr;
  return expand_table({request, rows, direction, alone, scores, gradient}, stream);
}

// Packed sequences are stretches of one batch row, so their batch strides are 0.
template <class Strided>
Strided zero_batch_if_packed(Strided x, const Call& call) {
  if (call.ends != nullptr) x.batch = 0;
  return x;
}

// Copies the request's call and completes it with near ranges, expanded tables and mask bits.
const char* prepare(Call& call, const Request& request, bool gradients, Workspace& workspace, void* stream) {
  call = request.call;
  for (Heads* x : {&call.query.x, &call.key.x, &call.value}) *x = zero_batch_if_packed(*x, call);
  if (call.query.table.data == nullptr && call.key.table.data == nullptr) {
    // Without position terms every pair counts as far left.
    call.query.near_after = call.query.near_before = kMaxDistance;
    call.key.near_after = call.key.near_before = kMaxDistance;
  } else {
    const char* error = prepare_operand(call.query, request.call.key, request, -1, gradients, workspace, stream);
    if (error == nullptr)
      error = prepare_operand(call.key, request.call.query, request, 1, gradients, workspace, stream);
    if (error != nullptr) return error;
  }
  if (request.mask != nullptr) {
    const bool packed = call.ends != nullptr;
    const int64_t rows = packed ? 1 : call.batches, keys = packed ? call.packed_rows : call.key.length;
    call.visible_words = keys / 32 + 4;
    call.visible_batch = packed ? 0 : call.visible_words;
    uint32_t* bits = workspace.take<uint32_t>(rows * call.visible_words);
    call.visible = bits;
    if (!workspace.counts())
      return pack_mask({request.mask, request.mask_batch, request.mask_key, static_cast<int>(rows),
                        static_cast<int>(keys), call.visible_words, bits},
                       stream);
  }
  return nullptr;
}

int blocks_of(int64_t length) { return static_cast<int>(div_up(length, kBackwardRows)); }

// The range of column block minus row block in near pairs of blocks of 128. It agrees with find_segments.
struct BlockRange {
  int first, last;
};

BlockRange near_blocks(const Operand& rows, const Operand& columns) {
  const int64_t first = floor_divide(int64_t{rows.near_after} - (kBackwardRows - 1), kBackwardRows) + 1;
  const int64_t last = floor_divide(int64_t{rows.near_before} + (kBackwardRows - 1) - 1, kBackwardRows);
  return {static_cast<int>(std::max<int64_t>(first, 1 - blocks_of(rows.length))),
          static_cast<int>(std::min<int64_t>(last, blocks_of(columns.length) - 1))};
}

// These numbers are not based on measurements (docs/measured.md).
std::atomic<int64_t> near_bytes{int64_t{160} << 20};  // the most bytes of dA at once; one head may exceed it
constexpr int kPrograms = 512;                        // diagonals are split into at most so many thread blocks

TableCall table_call(const BackwardCall& backward, const Request& request, void* grad_table, bool keys, int heads,
                     Workspace& workspace) {
  const Call& call = backward.call;
  const Operand &rows = keys ? call.key : call.query, &columns = keys ? call.query : call.key;
  const BlockRange near = near_blocks(rows, columns);
  TableCall table;
  table.backward = backward, table.keys = keys;
  table.first_block = near.first, table.last_block = near.last;
  // Blocks with column block minus row block = n have squares on the diagonals 2 n - 1 to 2 n + 1.
  table.first_diagonal = 2 * near.first - 1;
  table.diagonals = near.last < near.first ? 0 : 2 * (near.last - near.first) + 3;
  const int64_t programs = std::max<int64_t>(int64_t{table.diagonals} * heads, 1);
  const int64_t splits = std::min<int64_t>(block_count(call, rows, kSquare), kPrograms / programs);
  table.splits = table.diagonals == 0 ? 1 : static_cast<int>(std::max<int64_t>(splits, 1));
  table.sums = workspace.take<float>(int64_t{heads} * table.diagonals * table.splits * kSpan * padded_size(call.size));
  table.grad_table = grad_table, table.table_rows = request.table_rows;
  table.first_of_slot = request.first_of_slot, table.first_slot = request.first_slot;
  table.query_offset = request.query_offset;
  return table;
}

}  // namespace

void limit_near_bytes(int64_t bytes) { near_bytes = bytes; }

const char* run_forward(const Request& request, const Heads& output, const Statistic& lse, Workspace& workspace,
                        void* stream) {
  ForwardCall arguments;
  const char* error = prepare(arguments.call, request, false, workspace, stream);
  arguments.output = zero_batch_if_packed(output, arguments.call);
  arguments.lse = zero_batch_if_packed(lse, arguments.call);
  return error != nullptr || workspace.counts() ? error : forward(arguments, stream);
}

const char* run_backward(const Request& request, const Gradients& gradients, Workspace& workspace, void* stream) {
  BackwardCall backward;
  Call& call = backward.call;
  const char* error = prepare(call, request, true, workspace, stream);
  // Launches kernels one after the other until one fails.
  const auto launch = [&](auto kernel, const auto& arguments) {
    if (!workspace.counts() && error == nullptr) error = kernel(arguments, stream);
  };
  backward.output = zero_batch_if_packed(gradients.output, call);
  backward.grad_output = zero_batch_if_packed(gradients.grad_output, call);
  backward.grad_query = zero_batch_if_packed(gradients.grad_query, call);
  backward.grad_key = zero_batch_if_packed(gradients.grad_key, call);
  backward.grad_value = zero_batch_if_packed(gradients.grad_value, call);
  backward.lse = zero_batch_if_packed(gradients.lse, call);
  backward.grad_lse = zero_batch_if_packed(gradients.grad_lse, call);
  backward.statistic_batch = call.ends == nullptr ? call.query.length : 0;
  backward.statistic_rows = call.ends == nullptr ? int64_t{call.batches} * call.query.length : call.packed_rows;
  backward.lse2 = workspace.take<float>(call.heads * backward.statistic_rows);
  backward.delta = workspace.take<float>(call.heads * backward.statistic_rows);
  launch(backward_delta, backward);

  const bool c2p = call.query.table.data != nullptr, p2c = call.key.table.data != nullptr;
  const BlockRange near = near_blocks(call.key, call.query);
  backward.near_blocks = c2p || p2c ? std::max(near.last - near.first + 1, 0) : 0;
  backward.near_blocks = std::min(backward.near_blocks, blocks_of(call.query.length));
  const int64_t head_bytes =
      block_count(call, call.key, kBackwardRows) * backward.near_blocks * kBackwardRows * kBackwardRows * 2;
  // The heads are divided evenly among the launches.
  const int64_t most_heads =
      std::clamp<int64_t>(near_bytes / std::max<int64_t>(head_bytes, 1), 1, std::max(call.heads, 1));
  const int64_t launches = div_up(call.heads, most_heads);
  const int heads = launches == 0 ? 0 : static_cast<int>(div_up(call.heads, launches));
  backward.near = workspace.take<char>(heads * head_bytes);
  backward.query_far_count = static_cast<int>(far_count(call, call.query));
  backward.key_far_count = static_cast<int>(far_count(call, call.key));
  const int64_t far_floats = int64_t{heads} * 2 * padded_size(call.size);
  backward.far_query_sums = workspace.take<float>(c2p ? far_floats * backward.query_far_count : 0);
  backward.far_key_sums = workspace.take<float>(p2c ? far_floats * backward.key_far_count : 0);
  void* const grad_tables[2] = {gradients.grad_pos_key, gradients.grad_pos_query};
  TableCall tables[2];
  for (const bool keys : {false, true})
    if (grad_tables[keys] != nullptr)
      tables[keys] = table_call(backward, request, grad_tables[keys], keys, heads, workspace);

  for (int first = 0; first < call.heads; first += heads) {
    backward.first_head = first, backward.head_count = std::min(heads, call.heads - first);
    launch(backward_key, backward);
    launch(backward_query, backward);
    for (const bool keys : {false, true}) {
      if (grad_tables[keys] == nullptr) continue;
      tables[keys].backward = backward;
      launch(backward_by_distance, tables[keys]);
      launch(backward_by_row, tables[keys]);
    }
  }
  return error;
}

}  // namespace deberta_fast::cuda
