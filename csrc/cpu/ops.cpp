// The operators as torch sees them, on its stable ABI: one build serves torch 2.11 and newer. Tensors become the plain
// structs of params.h, and at::parallel_for shares out the kernels' work.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "schedule.h"

namespace deberta_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Kernels& kernels_of(const std::string& capability) {
#if defined(__x86_64__)
  if (capability == "avx512") return avx512::kernels;
  if (capability == "avx2") return avx2::kernels;
#endif
  STD_TORCH_CHECK(capability == "plain", "deberta_fast: built without kernels for ", capability);
  return plain::kernels;
}

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    case ScalarType::Half:
      return Element::float16;
    default:
      STD_TORCH_CHECK(false, "deberta_fast: dtype must be float32, bfloat16 or float16");
      return Element::float32;
  }
}

// A stride is only followed where there is a next element: to torch, [:, :, :0] has any.
bool unit_stride(const Tensor& x, int64_t dim) { return x.stride(dim) == 1 || x.size(dim) == 1 || x.numel() == 0; }

Heads heads_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && unit_stride(x, 3),
                  "deberta_fast: (B, H, L, D) with a unit last stride");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Table table_of(const std::optional<Tensor>& x) {
  if (!x) return {};
  STD_TORCH_CHECK(x->is_cpu() && x->dim() == 3 && unit_stride(*x, 2),
                  "deberta_fast: (H, R, D) with a unit last stride");
  return {x->data_ptr(), x->stride(0), x->stride(1)};
}

Statistic statistic_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && x.scalar_type() == ScalarType::Float,
                  "deberta_fast: (B, H, L) float32");
  return {static_cast<float*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& share) {
  torch::stable::parallel_for(0, count, 1, share);
}

// The arguments that forward and backward share.
struct Arguments {
  Attention attention{};
  std::vector<Sequence> sequences;
  const Kernels& kernels;

  Arguments(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& pos_key,
            const std::optional<Tensor>& pos_query, const std::optional<Tensor>& mask,
            const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& seed,
            const std::optional<Tensor>& slots, int64_t far_past, int64_t far_future, int64_t first_slot,
            int64_t query_offset, double scale, double dropout_p, const std::string& capability)
      : kernels(kernels_of(capability)) {
    Attention& a = attention;
    a.element = element_of(query);
    a.heads = query.size(1), a.size = query.size(3);
    a.scale = static_cast<float>(scale), a.query_offset = query_offset;
    a.query = heads_of(query), a.key = heads_of(key), a.value = heads_of(value);
    a.pos_key = table_of(pos_key), a.pos_query = table_of(pos_query);
    if (slots) {
      a.slots = static_cast<const int32_t*>(slots->data_ptr()), a.reach = slots->size(0) / 2;
      a.first_slot = first_slot, a.table_rows = pos_key ? pos_key->size(1) : pos_query->size(1);
      a.far_past = far_past, a.far_future = far_future;
    }
    if (mask) {
      const auto stride = [&](int64_t d) { return mask->size(d) == 1 ? 0 : mask->stride(d); };
      a.mask = static_cast<const uint8_t*>(mask->data_ptr());
      a.mask_batch = stride(0), a.mask_head = stride(1), a.mask_query = stride(2), a.mask_key = stride(3);
    }
    if (dropout_p > 0) {
      a.dropout = true;
      a.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
      a.drop_below = static_cast<uint64_t>(std::nearbyint(dropout_p * 0x1p32));
      a.keep_scale = static_cast<float>(1 / (1 - dropout_p));
    }
    if (cu_seqlens) {
      const auto* ends = static_cast<const int32_t*>(cu_seqlens->data_ptr());
      const int64_t step = cu_seqlens->stride(0);
      for (int64_t s = 0; s + 1 < cu_seqlens->size(0); ++s) {
        const int64_t start = ends[s * step], length = ends[(s + 1) * step] - start;
        sequences.push_back({0, start, start, length, length, 0});
      }
    } else {
      for (int64_t b = 0; b < query.size(0); ++b) sequences.push_back({b, 0, 0, query.size(2), key.size(2), 0});
    }
  }
};

void cpu_forward(Tensor output, Tensor lse, Tensor query, Tensor key, Tensor value, std::optional<Tensor> pos_key,
                 std::optional<Tensor> pos_query, std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                 std::optional<Tensor> seed, std::optional<Tensor> slots, int64_t far_past, int64_t far_future,
                 int64_t first_slot, int64_t query_offset, double scale, double dropout_p, std::string capability) {
  const Arguments given(query, key, value, pos_key, pos_query, mask, cu_seqlens, seed, slots, far_past, far_future,
                        first_slot, query_offset, scale, dropout_p, capability);
  const Forward forward{heads_of(output), statistic_of(lse)};
  run_forward(given.kernels, given.attention, given.sequences, forward, parallel_for);
}

void cpu_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, std::optional<Tensor> grad_pos_key,
                  std::optional<Tensor> grad_pos_query, Tensor output, Tensor lse, Tensor grad_output, Tensor grad_lse,
                  Tensor query, Tensor key, Tensor value, std::optional<Tensor> pos_key,
                  std::optional<Tensor> pos_query, std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                  std::optional<Tensor> seed, std::optional<Tensor> slots, int64_t far_past, int64_t far_future,
                  int64_t first_slot, int64_t query_offset, double scale, double dropout_p, std::string capability) {
  const Arguments given(query, key, value, pos_key, pos_query, mask, cu_seqlens, seed, slots, far_past, far_future,
                        first_slot, query_offset, scale, dropout_p, capability);
  Backward backward{};
  backward.output = heads_of(output), backward.grad_output = heads_of(grad_output);
  backward.lse = statistic_of(lse), backward.grad_lse = statistic_of(grad_lse);
  backward.grad_query = heads_of(grad_query);
  backward.grad_key = heads_of(grad_key), backward.grad_value = heads_of(grad_value);
  const auto contiguous = [](const std::optional<Tensor>& table) {
    STD_TORCH_CHECK(!table || table->is_contiguous(), "deberta_fast: the gradient of a table must be contiguous");
    return table ? table->data_ptr() : nullptr;
  };
  run_backward(given.kernels, given.attention, given.sequences, backward, contiguous(grad_pos_key),
               contiguous(grad_pos_query), parallel_for);
}

STABLE_TORCH_LIBRARY_IMPL(deberta_fast, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&cpu_backward));
}

}  // namespace
}  // namespace deberta_fast

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
