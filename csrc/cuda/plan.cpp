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

// Sets the near range of this operand, and takes memory for its expanded table.
void complete_operand(bool keys, Preparation& preparation, Workspace& workspace) {
  const Request& request = preparation.request;
  Call& call = preparation.table.backward.call;
  Operand& rows = keys ? call.key : call.query;
  const Operand& columns = keys ? request.call.query : request.call.key;
  const int direction = keys ? 1 : -1;  // delta = query_offset + direction x distance
  // If the direction is -1, distances fall as delta grows, so past and future swap.
  const int64_t past = direction * (int64_t{request.far_past} - request.query_offset);
  const int64_t future = direction * (int64_t{request.far_future} - request.query_offset);
  rows.near_after = clamp_distance(std::min(past, future)), rows.near_before = clamp_distance(std::max(past, future));
  rows.far_left = direction < 0 ? request.past_row : request.future_row;
  rows.far_right = direction < 0 ? request.future_row : request.past_row;
  const bool alone = !preparation.backward && padded_size(call.size) <= kAloneSize;
  if (rows.table.data == nullptr && !alone) return;

  const int64_t lowest = std::max<int64_t>(rows.near_after, -rows.length) - kMargin;
  const int64_t first = floor_divide(lowest, kDistances) * kDistances;
  const int64_t last = std::min<int64_t>(rows.near_before, columns.length) + kMargin;
  rows.first_distance = clamp_distance(first);
  rows.blocks = static_cast<int>(std::max<int64_t>(last - first, 0) / kDistances + 1);
  const int64_t bytes = int64_t{call.heads} * rows.blocks * kDistances * padded_size(call.size) * 2;
  rows.score_table = preparation.scores[keys] = workspace.take<char>(bytes);
  if (preparation.backward) rows.gradient_table = preparation.gradients[keys] = workspace.take<char>(bytes);
}

// Packed sequences are stretches of one batch row, so their batch strides are 0.
template <class Strided>
Strided zero_batch_if_packed(Strided x, const Call& call) {
  if (call.ends != nullptr) x.batch = 0;
  return x;
}

// Copies the request's call and completes it with near ranges, and takes memory for expanded tables and mask bits.
Preparation complete(const Request& request, bool backward, Workspace& workspace) {
  Preparation preparation;
  preparation.request = request, preparation.backward = backward;
  Call& call = preparation.table.backward.call;
  call = request.call;
  for (Heads* x : {&call.query.x, &call.key.x, &call.value}) *x = zero_batch_if_packed(*x, call);
  if (call.query.table.data == nullptr && call.key.table.data == nullptr) {
    // Without position terms every pair counts as far left.
    call.query.near_after = call.query.near_before = kMaxDistance;
    call.key.near_after = call.key.near_before = kMaxDistance;
  } else {
    for (const bool keys : {false, true}) complete_operand(keys, preparation, workspace);
  }
  if (request.mask != nullptr) {
    const bool packed = call.ends != nullptr;
    const int64_t rows = packed ? 1 : call.batches, keys = packed ? call.packed_rows : call.key.length;
    call.visible_words = keys / 32 + 4;
    call.visible_batch = packed ? 0 : call.visible_words;
    uint32_t* bits = workspace.take<uint32_t>(rows * call.visible_words);
    call.visible = bits;
    preparation.mask = {request.mask,
                        request.mask_batch,
                        request.mask_key,
                        static_cast<int>(rows),
                        static_cast<int>(keys),
                        call.visible_words,
                        bits};
  }
  return preparation;
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
constexpr int64_t kNearBytes = int64_t{32} << 20;  // of dA at once, which the second-level cache should hold, ...
constexpr int kBlocks = 256;                       // ... but at least for the heads that so many thread blocks process
constexpr int64_t kMostNearBytes = int64_t{160} << 20;  // in no more than this; one head may exceed it
constexpr int64_t kSumBytes = 32'000'000;               // of gradients by distance
constexpr int kSquares = 4;                             // the fewest squares per share of a diagonal, in the mean
std::atomic<int64_t> near_limit{0};

// How many heads have dA at once, if one has so many bytes and blocks of keys.
int heads_at_once(const Call& call, int64_t bytes, int64_t blocks) {
  bytes = std::max<int64_t>(bytes, 1), blocks = std::max<int64_t>(blocks, 1);
  const int64_t limit = near_limit;
  const int64_t filling = std::min(div_up(kBlocks, blocks), kMostNearBytes / bytes);
  const int64_t most = limit > 0 ? limit / bytes : std::max(kNearBytes / bytes, filling);
  // The heads are divided evenly among the launches.
  const int64_t parts = div_up(call.heads, std::clamp<int64_t>(most, 1, std::max(call.heads, 1)));
  return parts == 0 ? 0 : static_cast<int>(div_up(call.heads, parts));
}

// The diagonals of the near squares, and their shares if the gradients of so many tables are summed. Sums are held for
// `heads` heads.
Diagonals find_diagonals(const Call& call, int tables, int heads) {
  const BlockRange near = near_blocks(call.query, call.key);
  Diagonals found;
  found.first_block = near.first, found.last_block = near.last;
  // Blocks with block of keys minus block of queries = n have squares on the diagonals 2 n - 1 to 2 n + 1.
  found.first = 2 * near.first - 1;
  found.count = near.last < near.first ? 0 : 2 * (near.last - near.first) + 3;
  found.query_squares = static_cast<int>(div_up(call.query.length, kSquare));
  found.key_squares = static_cast<int>(div_up(call.key.length, kSquare));
  if (found.count == 0 || tables == 0 || heads == 0) return found;
  int64_t squares = 0;
  for (int d = 0; d < found.count; ++d)
    squares += found.squares(d, found.query_squares, found.key_squares).count * int64_t{call.batches};
  const int64_t share_bytes = int64_t{heads} * tables * kSpan * padded_size(call.size) * 4;
  const int64_t shares = std::min(kSumBytes / share_bytes, squares / kSquares);
  found.shares = static_cast<int>(std::max<int64_t>(shares, found.count));
  return found;
}

}  // namespace

void limit_near_bytes(int64_t bytes) { near_limit = bytes; }

const char* run_forward(const Request& request, const Heads& output, const Statistic& lse, Workspace& workspace,
                        void* stream) {
  const Preparation preparation = complete(request, false, workspace);
  ForwardCall arguments;
  arguments.call = preparation.table.backward.call;
  arguments.output = zero_batch_if_packed(output, arguments.call);
  arguments.lse = zero_batch_if_packed(lse, arguments.call);
  if (workspace.counts()) return nullptr;
  const char* error = prepare(preparation, stream);
  return error != nullptr ? error : forward(arguments, stream);
}

const char* run_backward(const Request& request, const Gradients& gradients, Workspace& workspace, void* stream) {
  Preparation preparation = complete(request, true, workspace);
  TableCall& table = preparation.table;
  BackwardCall& backward = table.backward;
  Call& call = backward.call;
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

  const bool c2p = call.query.table.data != nullptr, p2c = call.key.table.data != nullptr;
  const BlockRange near = near_blocks(call.key, call.query);
  backward.near_blocks = c2p || p2c ? std::max(near.last - near.first + 1, 0) : 0;
  backward.near_blocks = std::min(backward.near_blocks, blocks_of(call.query.length));
  const int64_t key_blocks = block_count(call, call.key, kBackwardRows);
  const int64_t head_bytes = key_blocks * backward.near_blocks * kBackwardRows * kBackwardRows * 2;
  const int heads = heads_at_once(call, head_bytes, key_blocks);
  backward.near = workspace.take<char>(heads * head_bytes);

  void* const grad_tables[2] = {gradients.grad_pos_key, gradients.grad_pos_query};
  const int tables = (grad_tables[0] != nullptr) + (grad_tables[1] != nullptr);
  // Sums are held for all heads if they fit, and otherwise for the heads of a launch.
  table.diagonals = find_diagonals(call, tables, call.heads);
  const int64_t program = int64_t{kSpan} * padded_size(call.size);  // elements
  const bool all = call.heads * table.diagonals.shares * tables * program * 4 <= kSumBytes;
  if (!all) table.diagonals = find_diagonals(call, tables, heads);
  const int sum_heads = all ? call.heads : heads;
  backward.query_far_count = static_cast<int>(far_count(call, call.query));
  backward.key_far_count = static_cast<int>(far_count(call, call.key));
  const int64_t far_floats = int64_t{sum_heads} * 2 * padded_size(call.size);
  backward.far_query_sums = workspace.take<float>(c2p ? far_floats * backward.query_far_count : 0);
  backward.far_key_sums = workspace.take<float>(p2c ? far_floats * backward.key_far_count : 0);
  table.first_share = workspace.take<int32_t>(table.diagonals.count + 1);
  for (const bool keys : {false, true}) {
    table.grad_tables[keys] = grad_tables[keys];
    if (grad_tables[keys] != nullptr)
      table.sums[keys] = workspace.take<float>(sum_heads * table.diagonals.shares * program);
  }
  table.table_rows = request.table_rows, table.first_slot = request.first_slot;
  table.query_offset = request.query_offset, table.first_of_slot = request.first_of_slot;
  if (workspace.counts()) return nullptr;

  const char* error = nullptr;
  // Launches kernels one after the other until one fails.
  const auto launch = [&](auto kernel, const auto& arguments) {
    if (error == nullptr) error = kernel(arguments, stream);
  };
  const auto sum_rows = [&](int first, int count) {
    if (tables == 0) return;
    backward.first_head = first, backward.head_count = count, backward.sum_head = 0;
    launch(backward_by_row, table);
  };
  launch(prepare, preparation);
  for (int first = 0; first < call.heads; first += heads) {
    const int count = std::min(heads, call.heads - first);
    backward.first_head = first, backward.head_count = count, backward.sum_head = all ? first : 0;
    launch(backward_key, backward);
    launch(backward_query, table);
    if (!all) sum_rows(first, count);
  }
  if (all) sum_rows(0, call.heads);
  return error;
}

}  // namespace deberta_fast::cuda
