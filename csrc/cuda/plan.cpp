#include "plan.h"

#include <algorithm>
#include <atomic>
#include <initializer_list>

namespace deberta_fast::cuda {
namespace {

constexpr int kNever = 1 << 29;  // a distance beyond any

// From a distance that makes a pair of blocks near to the farthest one that their bands read: 223 at most, which backward
// needs with blocks of 128 (tests/emulator/plan_test.cpp).
constexpr int kMargin = 224;

int64_t floor_to_block(int64_t x) { return (x >= 0 ? x : x - (kDistances - 1)) / kDistances * kDistances; }

int clamp_distance(int64_t x) { return static_cast<int>(std::clamp<int64_t>(x, -kNever, kNever)); }

// What is near of this side, its table by distance, and the launch that fills it. `direction`: delta = offset + direction
// times distance.
const char* prepare_side(Side& side, const Side& other, const Request& request, int direction, bool gradients,
                         Workspace& workspace, void* stream) {
  // In distances: -1 turns (past, future) around.
  const int64_t past = direction * (int64_t{request.far_past} - request.query_offset);
  const int64_t future = direction * (int64_t{request.far_future} - request.query_offset);
  side.near_after = clamp_distance(std::min(past, future)), side.near_before = clamp_distance(std::max(past, future));
  side.far_left = direction < 0 ? request.past_row : request.future_row;
  side.far_right = direction < 0 ? request.future_row : request.past_row;
  if (side.table.data == nullptr) return nullptr;

  const int64_t first = floor_to_block(std::max<int64_t>(side.near_after, -side.length) - kMargin);
  const int64_t last = std::min<int64_t>(side.near_before, other.length) + kMargin;
  side.first_distance = clamp_distance(first);
  side.blocks = static_cast<int>(std::max<int64_t>(last - first, 0) / kDistances + 1);
  const Call& call = request.call;
  const int64_t bytes = int64_t{call.heads} * side.blocks * kDistances * padded_size(call.size) * 2;
  char* scores = workspace.take<char>(bytes);
  char* gradient = gradients ? workspace.take<char>(bytes) : nullptr;
  side.score_table = scores, side.gradient_table = gradient;
  if (workspace.counts()) return nullptr;
  return expand_table({side.table.data, side.table.head, side.table.row, request.slots, request.reach,
                       request.first_slot, request.table_rows, call.size, padded_size(call.size), call.heads,
                       side.blocks, side.first_distance, request.query_offset, direction, scores, gradient},
                      stream);
}

template <class Strided>
Strided unpacked(Strided x, const Call& call) {
  if (call.ends != nullptr) x.batch = 0;
  return x;
}

// `call` with tables by distance and bits of the mask.
const char* prepare(Call& call, const Request& request, bool gradients, Workspace& workspace, void* stream) {
  call = request.call;
  for (Heads* x : {&call.query.x, &call.key.x, &call.value}) *x = unpacked(*x, call);
  if (call.query.table.data == nullptr && call.key.table.data == nullptr) {
    call.query.near_after = call.query.near_before = kNever;  // all is far left, of tables that are not there
    call.key.near_after = call.key.near_before = kNever;
  } else {
    const char* error = prepare_side(call.query, request.call.key, request, -1, gradients, workspace, stream);
    if (error == nullptr) error = prepare_side(call.key, request.call.query, request, 1, gradients, workspace, stream);
    if (error != nullptr) return error;
  }
  if (request.mask != nullptr) {
    const int64_t rows = call.ends == nullptr ? call.batches : 1;
    const int64_t keys = call.ends == nullptr ? call.key.length : call.packed_rows;
    call.visible_words = keys / 32 + 4;
    call.visible_batch = call.ends == nullptr ? call.visible_words : 0;
    uint32_t* bits = workspace.take<uint32_t>(rows * call.visible_words);
    call.visible = bits;
    if (!workspace.counts())
      return pack_mask({request.mask, request.mask_batch, request.mask_key, static_cast<int>(rows),
                        static_cast<int>(keys), call.visible_words, bits},
                       stream);
  }
  return nullptr;
}

int blocks_of(int64_t length) { return static_cast<int>((length + kBackwardRows - 1) / kBackwardRows); }

int64_t floor_divide(int64_t x, int64_t y) { return x >= 0 ? x / y : -((-x + y - 1) / y); }

// Near pairs of blocks of 128: column block minus row block is one of these. As find_segments tells them apart.
struct BlockRange {
  int first, last;
};

BlockRange near_blocks(const Side& rows, const Side& columns) {
  const int64_t first = floor_divide(int64_t{rows.near_after} - (kBackwardRows - 1), kBackwardRows) + 1;
  const int64_t last = floor_divide(int64_t{rows.near_before} + (kBackwardRows - 1) - 1, kBackwardRows);
  return {static_cast<int>(std::max<int64_t>(first, 1 - blocks_of(rows.length))),
          static_cast<int>(std::min<int64_t>(last, blocks_of(columns.length) - 1))};
}

// Launches one after the other until one fails.
class Launches {
 public:
  explicit Launches(bool counts) : counts_(counts) {}
  template <class Launch>
  void add(Launch launch) {
    if (!counts_ && error == nullptr) error = launch();
  }
  const char* error = nullptr;

 private:
  bool counts_;
};

#ifndef DEBERTA_FAST_NEAR_BYTES
#define DEBERTA_FAST_NEAR_BYTES (int64_t{160} << 20)
#endif
// Chosen, not measured yet (docs/measured.md).
std::atomic<int64_t> near_bytes{DEBERTA_FAST_NEAR_BYTES};  // of dA at once, or that of one head
constexpr int kPrograms = 512;                             // of a pass over diagonals, if there is work for them

// The gradients of one table, for the heads at work.
struct TablePass {
  TableCall call;
  RowCall rows;
};

TablePass table_pass(const BackwardCall& backward, const Request& request, const Gradients& gradients, bool keys,
                     int heads, Workspace& workspace) {
  const Call& call = backward.call;
  const Side &rows = keys ? call.key : call.query, &columns = keys ? call.query : call.key;
  const BlockRange near = near_blocks(rows, columns);
  const int diagonals = near.last < near.first ? 0 : 2 * (near.last - near.first) + 3;
  const int64_t squares = block_count(call, rows, kSquare);
  const int64_t splits = diagonals == 0 ? 1 : std::min<int64_t>(squares, kPrograms / (int64_t{diagonals} * heads));
  TablePass pass;
  TableCall& table = pass.call;
  table.keys = keys, table.first_diagonal = 2 * near.first - 1, table.diagonals = diagonals;
  table.splits = static_cast<int>(std::max<int64_t>(splits, 1));
  table.first_block = near.first, table.last_block = near.last;
  const int size = padded_size(call.size);
  table.sums = workspace.take<float>(int64_t{heads} * diagonals * table.splits * kSpan * size);
  RowCall& by_row = pass.rows;
  by_row.element = call.element, by_row.grad_table = keys ? gradients.grad_pos_query : gradients.grad_pos_key;
  by_row.rows = request.table_rows, by_row.size = call.size, by_row.padded_size = size, by_row.scale = call.scale;
  by_row.first_of_slot = request.first_of_slot, by_row.first_slot = request.first_slot;
  by_row.left_row = rows.far_left, by_row.right_row = rows.far_right;
  by_row.offset = request.query_offset, by_row.direction = keys ? 1 : -1;
  by_row.first_diagonal = table.first_diagonal, by_row.diagonals = diagonals, by_row.splits = table.splits;
  by_row.sums = table.sums, by_row.far_sums = keys ? backward.far_key_sums : backward.far_query_sums;
  by_row.far_count = keys ? backward.key_far_count : backward.query_far_count;
  return pass;
}

}  // namespace

void limit_near_bytes(int64_t bytes) { near_bytes = bytes; }

const char* run_forward(const Request& request, const Heads& output, const Statistic& lse, Workspace& workspace,
                        void* stream) {
  ForwardCall arguments;
  const char* error = prepare(arguments.call, request, false, workspace, stream);
  arguments.output = unpacked(output, arguments.call), arguments.lse = unpacked(lse, arguments.call);
  return error != nullptr || workspace.counts() ? error : forward(arguments, stream);
}

const char* run_backward(const Request& request, const Gradients& gradients, Workspace& workspace, void* stream) {
  BackwardCall backward;
  Call& call = backward.call;
  Launches launches(workspace.counts());
  launches.error = prepare(call, request, true, workspace, stream);
  backward.output = unpacked(gradients.output, call), backward.grad_output = unpacked(gradients.grad_output, call);
  backward.grad_query = unpacked(gradients.grad_query, call), backward.grad_key = unpacked(gradients.grad_key, call);
  backward.grad_value = unpacked(gradients.grad_value, call);
  backward.lse = unpacked(gradients.lse, call), backward.grad_lse = unpacked(gradients.grad_lse, call);
  backward.statistic_batch = call.ends == nullptr ? call.query.length : 0;
  backward.statistic_rows = call.ends == nullptr ? int64_t{call.batches} * call.query.length : call.packed_rows;
  backward.lse2 = workspace.take<float>(call.heads * backward.statistic_rows);
  backward.delta = workspace.take<float>(call.heads * backward.statistic_rows);
  launches.add([&] { return backward_delta(backward, stream); });

  const bool c2p = call.query.table.data != nullptr, p2c = call.key.table.data != nullptr;
  const BlockRange near = near_blocks(call.key, call.query);
  backward.near_blocks = c2p || p2c ? std::max(near.last - near.first + 1, 0) : 0;
  backward.near_blocks = std::min(backward.near_blocks, blocks_of(call.query.length));
  const int64_t head_bytes =
      block_count(call, call.key, kBackwardRows) * backward.near_blocks * kBackwardRows * kBackwardRows * 2;
  // Even shares of the heads.
  const int64_t most = std::clamp<int64_t>(near_bytes / std::max<int64_t>(head_bytes, 1), 1, std::max(call.heads, 1));
  const int parts = static_cast<int>((call.heads + most - 1) / most);
  const int heads = parts == 0 ? 0 : (call.heads + parts - 1) / parts;
  backward.near = workspace.take<char>(heads * head_bytes);
  backward.query_far_count = static_cast<int>(far_count(call, call.query));
  backward.key_far_count = static_cast<int>(far_count(call, call.key));
  const int64_t far_floats = int64_t{heads} * 2 * padded_size(call.size);
  backward.far_query_sums = workspace.take<float>(c2p ? far_floats * backward.query_far_count : 0);
  backward.far_key_sums = workspace.take<float>(p2c ? far_floats * backward.key_far_count : 0);
  const bool wanted[2] = {gradients.grad_pos_key != nullptr, gradients.grad_pos_query != nullptr};
  TablePass passes[2];
  for (const bool keys : {false, true})
    if (wanted[keys]) passes[keys] = table_pass(backward, request, gradients, keys, heads, workspace);

  for (int first = 0; first < call.heads; first += heads) {
    backward.first_head = first, backward.head_count = std::min(heads, call.heads - first);
    launches.add([&] { return backward_key(backward, stream); });
    launches.add([&] { return backward_query(backward, stream); });
    for (const bool keys : {false, true}) {
      if (!wanted[keys]) continue;
      TablePass& pass = passes[keys];
      pass.call.backward = backward;
      pass.rows.first_head = first, pass.rows.head_count = backward.head_count;
      launches.add([&] { return backward_by_distance(pass.call, stream); });
      launches.add([&] { return backward_by_row(pass.rows, stream); });
    }
  }
  return launches.error;
}

}  // namespace deberta_fast::cuda
