// The CUDA operators as torch sees them, on its stable ABI and without any header of CUDA. Tensors become the plain
// structs of arguments.h; launches go to torch's current stream, on the device of the tensors.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "plan.h"

namespace deberta_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Given = const std::optional<Tensor>&;

// An emulator (tests/emulator) runs the same kernels on tensors of the CPU.
#ifdef DEBERTA_FAST_EMULATED
constexpr bool kEmulated = true;
#define DEBERTA_FAST_DEVICE CPU
#else
constexpr bool kEmulated = false;
#define DEBERTA_FAST_DEVICE CUDA
#endif

// Torch's current stream. The function is in a library of torch's that is loaded where there is CUDA, and that this one is
// not linked to, so that it loads elsewhere too. Python keeps torch's libraries to themselves: a weak symbol finds nothing.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function != nullptr, "deberta_fast: this torch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// Torch's device and stream while kernels are launched.
class Device {
 public:
  explicit Device(const Tensor& x) {
    if (kEmulated) return;
    guard_.emplace(x.get_device_index());
    stream = current_stream(x.get_device_index());
  }
  void* stream = nullptr;

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// In a tile, offsets are 32-bit numbers.
constexpr int64_t kLargestStride = 1 << 24;

// Kernels read and write 16 bytes at once.
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

Table table_of(Given x) {
  if (!x) return {};
  STD_TORCH_CHECK(x->dim() == 3 && aligned(*x), "deberta_fast: (H, R, D) with a unit last stride, aligned to 16 bytes");
  return {x->data_ptr(), x->stride(0), x->stride(1)};
}

Statistic statistic_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.scalar_type() == ScalarType::Float, "deberta_fast: (B, H, L) float32");
  return {static_cast<float*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// Position scores of float16 are held as b times themselves: as large as the scores that softmax meets, at most.
float band_scale_of(Element element, double scale) {
  if (element != Element::float16) return 1;
  int exponent = 0;
  std::frexp(scale * kLog2e, &exponent);
  return std::ldexp(1.0f, std::max(-14, std::min(14, exponent - 1)));
}

Request request_of(const Tensor& query, const Tensor& key, const Tensor& value, Given pos_key, Given pos_query,
                   Given mask, Given cu_seqlens, Given seed, Given slots, int64_t far_past, int64_t far_future,
                   int64_t first_slot, int64_t past_row, int64_t future_row, int64_t query_offset, int64_t max_seqlen,
                   double scale, double dropout_p) {
  Request request;
  Call& call = request.call;
  STD_TORCH_CHECK(query.scalar_type() == ScalarType::BFloat16 || query.scalar_type() == ScalarType::Half,
                  "deberta_fast: dtype must be bfloat16 or float16");
  call.element = query.scalar_type() == ScalarType::Half ? Element::float16 : Element::bfloat16;
  call.heads = static_cast<int>(query.size(1)), call.size = static_cast<int>(query.size(3));
  call.batches = static_cast<int>(query.size(0));
  call.query.x = heads_of(query), call.key.x = heads_of(key), call.value = heads_of(value);
  call.query.length = static_cast<int>(query.size(2)), call.key.length = static_cast<int>(key.size(2));
  if (cu_seqlens) {
    STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->is_contiguous(),
                    "deberta_fast: cu_seqlens must be contiguous int32");
    call.ends = static_cast<const int32_t*>(cu_seqlens->data_ptr());
    call.batches = static_cast<int>(cu_seqlens->size(0) - 1), call.packed_rows = query.size(2);
    call.query.length = call.key.length = static_cast<int>(max_seqlen);
  }
  call.scale = static_cast<float>(scale), call.band_scale = band_scale_of(call.element, scale);
  call.query.table = table_of(pos_key), call.key.table = table_of(pos_query);
  if (slots) {
    request.slots = static_cast<const int32_t*>(slots->data_ptr());
    request.reach = static_cast<int>(slots->size(0) / 2), request.first_slot = static_cast<int>(first_slot);
    request.table_rows = static_cast<int>(pos_key ? pos_key->size(1) : pos_query->size(1));
    request.far_past = static_cast<int>(far_past), request.far_future = static_cast<int>(far_future);
    request.past_row = static_cast<int>(past_row), request.future_row = static_cast<int>(future_row);
    request.query_offset = static_cast<int>(query_offset);
  }
  if (mask) {
    STD_TORCH_CHECK(mask->dim() == 4 && mask->size(1) == 1 && mask->size(2) == 1,
                    "deberta_fast: a mask must be one of keys, (B or 1, 1, 1, Lk)");
    request.mask = static_cast<const uint8_t*>(mask->data_ptr());
    request.mask_batch = mask->size(0) == 1 ? 0 : mask->stride(0);
    request.mask_key = mask->size(3) == 1 ? 0 : mask->stride(3);
  }
  if (dropout_p > 0) {
    STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long, "deberta_fast: the seed must be int64");
    call.dropout = true, call.seed = static_cast<const int64_t*>(seed->data_ptr());
    call.drop_below = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 0x1p32), 0x1p32 - 1));
    call.keep_scale = static_cast<float>(1 / (1 - dropout_p));
  }
  return request;
}

// Counts the memory that the launches need, takes it from torch, and launches.
template <class Launches>
void run(const Tensor& query, Launches launches) {
  Workspace counted;
  launches(counted, nullptr);
  const Device device(query);
  Tensor memory = torch::stable::new_empty(query, {counted.bytes()}, ScalarType::Byte);
  Workspace workspace(static_cast<char*>(memory.data_ptr()));
  const char* error = launches(workspace, device.stream);
  STD_TORCH_CHECK(error == nullptr, "deberta_fast: a kernel did not start: ", error);
}

void cuda_forward(Tensor output, Tensor lse, Tensor query, Tensor key, Tensor value, std::optional<Tensor> pos_key,
                  std::optional<Tensor> pos_query, std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                  std::optional<Tensor> seed, std::optional<Tensor> slots, int64_t far_past, int64_t far_future,
                  int64_t first_slot, int64_t past_row, int64_t future_row, int64_t query_offset, int64_t max_seqlen,
                  double scale, double dropout_p) {
  const Request request =
      request_of(query, key, value, pos_key, pos_query, mask, cu_seqlens, seed, slots, far_past, far_future, first_slot,
                 past_row, future_row, query_offset, max_seqlen, scale, dropout_p);
  const Heads to = heads_of(output);
  const Statistic to_lse = statistic_of(lse);
  run(query, [&](Workspace& workspace, void* stream) { return run_forward(request, to, to_lse, workspace, stream); });
}

void* contiguous(Given table) {
  STD_TORCH_CHECK(!table || table->is_contiguous(), "deberta_fast: the gradient of a table must be contiguous");
  return table ? table->data_ptr() : nullptr;
}

void cuda_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, std::optional<Tensor> grad_pos_key,
                   std::optional<Tensor> grad_pos_query, Tensor output, Tensor lse, Tensor grad_output, Tensor grad_lse,
                   Tensor query, Tensor key, Tensor value, std::optional<Tensor> pos_key,
                   std::optional<Tensor> pos_query, std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                   std::optional<Tensor> seed, std::optional<Tensor> slots, int64_t far_past, int64_t far_future,
                   int64_t first_slot, int64_t past_row, int64_t future_row, int64_t query_offset, int64_t max_seqlen,
                   double scale, double dropout_p, std::optional<Tensor> first_of_slot) {
  const Request request =
      request_of(query, key, value, pos_key, pos_query, mask, cu_seqlens, seed, slots, far_past, far_future, first_slot,
                 past_row, future_row, query_offset, max_seqlen, scale, dropout_p);
  Gradients gradients;
  gradients.output = heads_of(output), gradients.grad_output = heads_of(grad_output);
  gradients.grad_query = heads_of(grad_query), gradients.grad_key = heads_of(grad_key);
  gradients.grad_value = heads_of(grad_value);
  gradients.lse = statistic_of(lse), gradients.grad_lse = statistic_of(grad_lse);
  gradients.grad_pos_key = contiguous(grad_pos_key), gradients.grad_pos_query = contiguous(grad_pos_query);
  if (first_of_slot) gradients.first_of_slot = static_cast<const int32_t*>(first_of_slot->data_ptr());
  run(query, [&](Workspace& workspace, void* stream) { return run_backward(request, gradients, workspace, stream); });
}

STABLE_TORCH_LIBRARY_IMPL(deberta_fast, DEBERTA_FAST_DEVICE, m) {
  m.impl("cuda_forward", TORCH_BOX(&cuda_forward));
  m.impl("cuda_backward", TORCH_BOX(&cuda_backward));
}

}  // namespace
}  // namespace deberta_fast::cuda
