// The CUDA operators on torch's stable ABI. They convert tensors to the plain structs of arguments.h and launch the
// kernels.
#include "ops.h"

#include <algorithm>

#include "plan.h"

namespace deberta_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Offsets within a tile are 32-bit numbers.
constexpr int64_t kLargestStride = 1 << 24;

// Kernels read and write 16 bytes at once, so rows begin at multiples of 16 bytes.
bool aligned(const Tensor& x) {
  if (reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 != 0) return false;
  for (int64_t d = 0; d + 1 < x.dim(); ++d)
    if (x.size(d) > 1 && x.stride(d) % 8 != 0) return false;
  return x.dim() == 0 || x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1;
}

Heads heads_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && (x.numel() == 0 || (aligned(x) && x.stride(2) <= kLargestStride)),
                  "deberta_fast: (B, H, L, D) with a unit last stride, rows aligned to 16 bytes and not too far apart");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Table table_of(const MaybeTensor& x) {
  if (!x) return {};
  STD_TORCH_CHECK(x->dim() == 3 && aligned(*x), "deberta_fast: (H, R, D) with a unit last stride, aligned to 16 bytes");
  return {x->data_ptr(), x->stride(0), x->stride(1)};
}

Request request_of(const Given& given) {
  Request request;
  Call& call = request.call;
  const Tensor &query = given.query, &key = given.key;
  STD_TORCH_CHECK(query.scalar_type() == ScalarType::BFloat16 || query.scalar_type() == ScalarType::Half,
                  "deberta_fast: dtype must be bfloat16 or float16");
  call.element = query.scalar_type() == ScalarType::Half ? Element::float16 : Element::bfloat16;
  call.heads = static_cast<int>(query.size(1)), call.size = static_cast<int>(query.size(3));
  call.batches = static_cast<int>(query.size(0));
  call.query.x = heads_of(query), call.key.x = heads_of(key), call.value = heads_of(given.value);
  call.query.length = static_cast<int>(query.size(2)), call.key.length = static_cast<int>(key.size(2));
  if (const MaybeTensor& ends = given.cu_seqlens) {
    STD_TORCH_CHECK(ends->scalar_type() == ScalarType::Int && ends->is_contiguous(),
                    "deberta_fast: cu_seqlens must be contiguous int32");
    call.ends = static_cast<const int32_t*>(ends->data_ptr());
    call.batches = static_cast<int>(ends->size(0) - 1), call.packed_rows = query.size(2);
    call.query.length = call.key.length = static_cast<int>(given.max_seqlen);
  }
  call.scale = static_cast<float>(given.scale), call.band_scale = static_cast<float>(given.band_scale);
  call.query.table = table_of(given.pos_key), call.key.table = table_of(given.pos_query);
  if (given.has_positions()) {
    request.slots = static_cast<const int32_t*>(given.slots->data_ptr());
    request.first_of_slot = static_cast<const int32_t*>(given.first_of_slot->data_ptr());
    request.reach = static_cast<int>(given.slots->size(0) / 2);
    request.first_slot = static_cast<int>(given.first_slot);
    request.table_rows = static_cast<int>(given.table_rows());
    request.far_past = static_cast<int>(given.far_past), request.far_future = static_cast<int>(given.far_future);
    request.past_row = static_cast<int>(given.past_row), request.future_row = static_cast<int>(given.future_row);
    request.query_offset = static_cast<int>(given.query_offset);
  }
  if (const MaybeTensor& mask = given.mask) {
    STD_TORCH_CHECK(mask->dim() == 4 && mask->size(1) == 1 && mask->size(2) == 1,
                    "deberta_fast: a mask must be one of keys, (B or 1, 1, 1, Lk)");
    request.mask = static_cast<const uint8_t*>(mask->data_ptr());
    request.mask_batch = mask->size(0) == 1 ? 0 : mask->stride(0);
    request.mask_key = mask->size(3) == 1 ? 0 : mask->stride(3);
  }
  if (given.dropout_p > 0) {
    call.dropout = true, call.seed = seed_of(given);
    if (given.seed->numel() > 1) call.origin = reinterpret_cast<const DropoutOrigin*>(call.seed + 1);
    call.drop_below = drop_below(given.dropout_p) << 16, call.keep_scale = keep_scale(given.dropout_p);
  }
  return request;
}

// Counts the memory that the launches need, allocates it by torch, and launches.
template <class Launches>
void run(const Tensor& query, Launches launches) {
  Workspace counted;
  launches(counted, nullptr);
  const StreamGuard guard(query);
  Tensor memory = torch::stable::new_empty(query, {counted.bytes()}, ScalarType::Byte);
  Workspace workspace(static_cast<char*>(memory.data_ptr()));
  const char* error = launches(workspace, guard.stream);
  STD_TORCH_CHECK(error == nullptr, "deberta_fast: a kernel did not start: ", error);
}

}  // namespace

void fused_forward(Tensor output, MaybeTensor lse, DEBERTA_FAST_GIVEN) {
  const Request request = request_of(DEBERTA_FAST_NAMED);
  const Heads to = heads_of(output);
  STD_TORCH_CHECK(lse, "deberta_fast: the kernels write a log-sum-exp");
  const Statistic to_lse = statistic_of(*lse);
  run(query, [&](Workspace& workspace, void* stream) { return run_forward(request, to, to_lse, workspace, stream); });
}

void fused_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, MaybeTensor grad_pos_key,
                    MaybeTensor grad_pos_query, Tensor output, Tensor lse, Tensor grad_output, MaybeTensor grad_lse,
                    DEBERTA_FAST_GIVEN) {
  const Request request = request_of(DEBERTA_FAST_NAMED);
  Gradients gradients;
  gradients.output = heads_of(output), gradients.grad_output = heads_of(grad_output);
  gradients.grad_query = heads_of(grad_query), gradients.grad_key = heads_of(grad_key);
  gradients.grad_value = heads_of(grad_value);
  STD_TORCH_CHECK(grad_lse, "deberta_fast: the kernels read a gradient of the log-sum-exp");
  gradients.lse = statistic_of(lse), gradients.grad_lse = statistic_of(*grad_lse);
  gradients.grad_pos_key = gradient_of_table(grad_pos_key);
  gradients.grad_pos_query = gradient_of_table(grad_pos_query);
  run(query, [&](Workspace& workspace, void* stream) { return run_backward(request, gradients, workspace, stream); });
}

}  // namespace deberta_fast::cuda
