#include "plan.h"

#include <algorithm>

namespace deberta_fast::cuda {
namespace {

constexpr int kDistances = 32;  // as in skew.h, which is for the kernels' compiler
constexpr int kNever = 1 << 29;  // a distance beyond any

// Blocks of 128 rows and tiles of 64 columns read bands that begin and end up to this far beyond what is near.
constexpr int kMargin = 288;

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

// `call` with tables by distance and bits of the mask.
const char* prepare(Call& call, const Request& request, bool gradients, Workspace& workspace, void* stream) {
  call = request.call;
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
    uint32_t* bits = workspace.take<uint32_t>(rows * call.visible_words);
    call.visible = bits;
    if (!workspace.counts())
      return pack_mask({request.mask, request.mask_batch, request.mask_key, static_cast<int>(rows),
                        static_cast<int>(keys), call.visible_words, bits},
                       stream);
  }
  return nullptr;
}

}  // namespace

const char* run_forward(const Request& request, const Heads& output, const Statistic& lse, Workspace& workspace,
                        void* stream) {
  ForwardCall arguments;
  arguments.output = output, arguments.lse = lse;
  const char* error = prepare(arguments.call, request, false, workspace, stream);
  return error != nullptr || workspace.counts() ? error : forward(arguments, stream);
}

}  // namespace deberta_fast::cuda
