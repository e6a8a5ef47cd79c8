// The CUDA operators as torch sees them, on its stable ABI and without any header of CUDA. Tensors become the plain
// structs of arguments.h; launches go to torch's current stream, on the device of the tensors.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>

#include "../given.h"
#include "plan.h"

namespace deberta_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An emulator (tests/emulator) runs the same kernels on tensors of the CPU, behind operators of its own.
#ifdef DEBERTA_FAST_EMULATED
constexpr bool kEmulated = true;
#define DEBERTA_FAST_NAMESPACE deberta_fast_emulated
#define DEBERTA_FAST_DEVICE CPU
#else
constexpr bool kEmulated = false;
#define DEBERTA_FAST_NAMESPACE deberta_fast
#define DEBERTA_FAST_DEVICE CUDA
#endif

// Torch's function for its current stream, or null. It is in a library of torch's that is loaded where there is CUDA, and
// that this one is not linked to, so that it loads elsewhere too. Python keeps torch's libraries to themselves: a weak
// symbol finds nothing.
using CurrentStream = AOTITorchError (*)(int32_t, void**);
CurrentStream current_stream() {
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  return function;
}

// Asked once, when the package is imported.
bool finds_torch_stream() { return kEmulated || current_stream() != nullptr; }

// setup.py names the targets that it builds the kernels for: "sm_80 sm_90 compute_80".
#ifndef DEBERTA_FAST_ARCHITECTURES
#define DEBERTA_FAST_ARCHITECTURES ""
#endif
std::string cuda_architectures() { return DEBERTA_FAST_ARCHITECTURES; }

// Torch's device and stream while kernels are launched.
class Device {
 public:
  explicit Device(const Tensor& x) {
    if (kEmulated) return;
    STD_TORCH_CHECK(finds_torch_stream(), "deberta_fast: this torch has no libtorch_cuda.so that tells its stream");
    guard_.emplace(x.get_device_index());
    STABLE_TORCH_ERROR_CODE_CHECK(current_stream()(x.get_device_index(), &stream));
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
    const MaybeTensor& seed = given.seed;
    STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long, "deberta_fast: the seed must be int64");
    call.dropout = true, call.seed = static_cast<const int64_t*>(seed->data_ptr());
    call.drop_below = static_cast<uint32_t>(std::min<uint64_t>(drop_below(given.dropout_p), UINT32_MAX));
    call.keep_scale = keep_scale(given.dropout_p);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DEBERTA_FAST_NAMESPACE, DEBERTA_FAST_DEVICE, m) {
  m.impl("fused_forward", TORCH_BOX(&fused_forward));
  m.impl("fused_backward", TORCH_BOX(&fused_backward));
}

STABLE_TORCH_LIBRARY_IMPL(DEBERTA_FAST_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("finds_torch_stream", TORCH_BOX(&finds_torch_stream));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("limit_near_bytes", TORCH_BOX(&limit_near_bytes));
}

}  // namespace deberta_fast::cuda
