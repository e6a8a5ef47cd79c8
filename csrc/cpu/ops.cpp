// The CPU operators on torch's stable ABI, so that one build serves torch 2.11 and newer. They convert tensors to the
// plain structs of params.h and run the kernels by torch's parallel_for.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <iterator>
#include <mutex>
#include <string>

#include "../given.h"
#include "processor.h"
#include "schedule.h"

namespace deberta_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct InstructionSet {
  const char* name;
  const Kernels &kernels, &bfloat16_kernels;
  const NormKernels& norm_kernels;
};
constexpr InstructionSet kInstructionSets[] = {
#if defined(DEBERTA_FAST_AMX)
    {"amx", avx512::kernels, amx::kernels, avx512::norm_kernels},
#endif
#if defined(DEBERTA_FAST_AVX512_BF16)
    {"avx512_bf16", avx512::kernels, avx512_bf16::kernels, avx512::norm_kernels},
#endif
#if defined(__x86_64__)
    {"avx512", avx512::kernels, avx512::kernels, avx512::norm_kernels},
    {"avx2", avx2::kernels, avx2::kernels, avx2::norm_kernels},
#endif
    {"plain", plain::kernels, plain::kernels, plain::norm_kernels},
};

const InstructionSet* in_use = std::end(kInstructionSets) - 1;

const Kernels& kernels_of(const Request& request) {
  return request.attention.element == Element::bfloat16 ? in_use->bfloat16_kernels : in_use->kernels;
}

// The package calls this at import, because torch's stable ABI does not tell what the processor supports.
void use_instruction_set(std::string name) {
  for (const auto& set : kInstructionSets)
    if (name == set.name) {
      in_use = &set;
      return;
    }
  STD_TORCH_CHECK(false, "deberta_fast: built without kernels for ", name);
}

std::string built_instruction_sets() {
  std::string sets;
  for (const auto& set : kInstructionSets) sets += std::string(set.name) + " ";
  return sets;
}

// The instruction sets with products of bfloat16 that were built and that this processor has, the fastest first.
std::string bfloat16_instruction_sets() {
  std::string sets;
#if defined(DEBERTA_FAST_AMX)
  if (has_avx512_bf16() && has_amx()) sets += "amx ";
#endif
#if defined(DEBERTA_FAST_AVX512_BF16)
  if (has_avx512_bf16()) sets += "avx512_bf16 ";
#endif
  return sets;
}

Element element_of(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return Element::float32;
  if (x.scalar_type() == ScalarType::BFloat16) return Element::bfloat16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, "deberta_fast: dtype must be float32, bfloat16 or float16");
  return Element::float16;
}

// The stride of a dimension with at most one element is arbitrary, also in an empty tensor.
bool unit_stride(const Tensor& x, int64_t dim) { return x.stride(dim) == 1 || x.size(dim) == 1 || x.numel() == 0; }

Heads heads_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && unit_stride(x, 3),
                  "deberta_fast: (B, H, L, D) with a unit last stride");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Table table_of(const MaybeTensor& x) {
  if (!x) return {};
  STD_TORCH_CHECK(x->is_cpu() && x->dim() == 3 && unit_stride(*x, 2),
                  "deberta_fast: (H, R, D) with a unit last stride");
  return {x->data_ptr(), x->stride(0), x->stride(1)};
}

// (B, H, L) is the log-sum-exp; (3, B, H, L) has the log-sum-exp, row_max and row_sum.
template <class Pass>
void place_statistics(const Tensor& x, Pass& pass) {
  if (x.dim() == 3) {
    pass.lse = statistic_of(x);
    return;
  }
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == 3 && x.scalar_type() == ScalarType::Float,
                  "deberta_fast: (3, B, H, L) float32");
  Statistic* const each[] = {&pass.lse, &pass.row_max, &pass.row_sum};
  for (int64_t n = 0; n < 3; ++n) {
    *each[n] = {static_cast<float*>(x.data_ptr()) + n * x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  }
}

// Rethrows the first exception of a share; torch would lose its message.
void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& share) {
  std::mutex one_at_a_time;
  std::exception_ptr first;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    try {
      share(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(one_at_a_time);
      if (!first) first = std::current_exception();
    }
  });
  if (first) std::rethrow_exception(first);
}

constexpr int64_t kFarOffset = int64_t{1} << 40;  // beyond every table and length; sums with it fit into 64 bits

Request request_of(const Given& given) {
  Request request;
  Attention& a = request.attention;
  const Tensor &query = given.query, &key = given.key;
  a.element = element_of(query);
  a.heads = query.size(1), a.size = query.size(3);
  a.scale = static_cast<float>(given.scale), a.query_offset = std::clamp(given.query_offset, -kFarOffset, kFarOffset);
  a.query = heads_of(query), a.key = heads_of(key), a.value = heads_of(given.value);
  a.pos_key = table_of(given.pos_key), a.pos_query = table_of(given.pos_query);
  if (given.has_positions()) {
    a.slots = static_cast<const int32_t*>(given.slots->data_ptr()), a.reach = given.slots->size(0) / 2;
    a.first_slot = given.first_slot, a.table_rows = given.table_rows();
    a.far_past = given.far_past, a.far_future = given.far_future;
  }
  if (const MaybeTensor& mask = given.mask) {
    const auto stride = [&](int64_t d) { return mask->size(d) == 1 ? 0 : mask->stride(d); };
    a.mask = static_cast<const uint8_t*>(mask->data_ptr());
    a.mask_batch = stride(0), a.mask_head = stride(1), a.mask_query = stride(2), a.mask_key = stride(3);
  }
  if (given.dropout_p > 0) {
    const int64_t* const seed = seed_of(given);
    a.dropout = true, a.seed = static_cast<uint64_t>(seed[0]), a.origin.heads = a.heads;
    if (given.seed->numel() > 1) a.origin = {seed[1], seed[2], seed[3], seed[4]};
    a.drop_below = drop_below(given.dropout_p), a.keep_scale = keep_scale(given.dropout_p);
  }
  if (given.cu_seqlens) {
    const auto* ends = static_cast<const int32_t*>(given.cu_seqlens->data_ptr());
    const int64_t step = given.cu_seqlens->stride(0), count = given.cu_seqlens->size(0) - 1, total = query.size(2);
    bool rises = ends[0] == 0 && ends[count * step] == total;
    for (int64_t s = 0; s < count; ++s) {
      const int64_t start = ends[s * step], stop = ends[(s + 1) * step];
      rises = rises && start <= stop && stop <= total;
      request.sequences.push_back({0, start, start, stop - start, stop - start, 0});
    }
    STD_TORCH_CHECK(rises, "deberta_fast: cu_seqlens must rise from 0 to ", total);
  } else {
    for (int64_t b = 0; b < query.size(0); ++b) request.sequences.push_back({b, 0, 0, query.size(2), key.size(2), 0});
  }
  return request;
}

void fused_forward(Tensor output, MaybeTensor lse, DEBERTA_FAST_GIVEN) {
  Request request = request_of(DEBERTA_FAST_NAMED);
  Forward forward{};
  forward.output = heads_of(output);
  if (lse) place_statistics(*lse, forward);
  run_forward(kernels_of(request), request, forward, parallel_for);
}

void fused_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, MaybeTensor grad_pos_key,
                    MaybeTensor grad_pos_query, Tensor output, Tensor lse, Tensor grad_output, MaybeTensor grad_lse,
                    DEBERTA_FAST_GIVEN) {
  Request request = request_of(DEBERTA_FAST_NAMED);
  Backward backward{};
  backward.output = heads_of(output), backward.grad_output = heads_of(grad_output);
  place_statistics(lse, backward);
  if (grad_lse) backward.grad_lse = statistic_of(*grad_lse);
  backward.grad_query = heads_of(grad_query);
  backward.grad_key = heads_of(grad_key), backward.grad_value = heads_of(grad_value);
  backward.grad_pos_key = gradient_of_table(grad_pos_key);
  backward.grad_pos_query = gradient_of_table(grad_pos_query);
  run_backward(kernels_of(request), request, backward, parallel_for);
}

// The data of a contiguous tensor with these elements.
void* rows_of(const Tensor& x, const Tensor& like, int64_t count) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == like.scalar_type() && x.numel() == count,
                  "deberta_fast: add_norm takes contiguous tensors of one dtype and of fitting shapes");
  return x.data_ptr();
}

float* statistics_of(const Tensor& x, int64_t rows) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.numel() == 2 * rows,
                  "deberta_fast: the statistics of add_norm are (2, rows) float32");
  return static_cast<float*>(x.data_ptr());
}

void add_norm(Tensor output, MaybeTensor sum, MaybeTensor statistics, Tensor x, Tensor residual, Tensor weight,
              Tensor bias, double eps) {
  const int64_t size = weight.numel(), all = x.numel(), rows = size > 0 ? all / size : 0;
  AddNorm a{};
  a.element = element_of(x), a.rows = rows, a.size = size, a.eps = static_cast<float>(eps);
  a.x = rows_of(x, x, rows * size), a.residual = rows_of(residual, x, all);
  a.weight = rows_of(weight, x, size), a.bias = rows_of(bias, x, size);
  a.output = rows_of(output, x, all), a.sum = sum ? rows_of(*sum, x, all) : nullptr;
  a.mean = statistics ? statistics_of(*statistics, rows) : nullptr, a.inverse_root = a.mean + rows;
  parallel_for(div_up(rows, kNormRows), [&](int64_t begin, int64_t end) {
    in_use->norm_kernels.add_norm(a, begin * kNormRows, std::min(end * kNormRows, rows));
  });
}

void add_norm_backward(Tensor grad_sum, MaybeTensor grad_weight, MaybeTensor grad_bias, Tensor grad_output, Tensor sum,
                       Tensor statistics, Tensor weight) {
  const int64_t size = weight.numel(), all = sum.numel(), rows = size > 0 ? all / size : 0;
  AddNormBackward a{};
  a.element = element_of(sum), a.rows = rows, a.size = size;
  a.grad_output = rows_of(grad_output, sum, rows * size), a.sum = rows_of(sum, sum, all);
  a.weight = rows_of(weight, sum, size), a.grad_sum = rows_of(grad_sum, sum, all);
  a.mean = statistics_of(statistics, rows), a.inverse_root = a.mean + rows;
  // The parts do not depend on the number of threads, so neither do the sums.
  const int64_t parts = std::min(kMostNormParts, div_up(rows, kPartRows));
  const Scratch partial(grad_weight || grad_bias ? parts * 2 * size : 0);
  a.partial = partial.data();
  parallel_for(parts, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      in_use->norm_kernels.add_norm_backward(a, p, p * rows / parts, (p + 1) * rows / parts);
    }
  });
  if (grad_weight) in_use->norm_kernels.store_norm_sums(a, parts, 0, rows_of(*grad_weight, sum, size));
  if (grad_bias) in_use->norm_kernels.store_norm_sums(a, parts, 1, rows_of(*grad_bias, sum, size));
}

// Whether two contiguous tensors hold the same bytes. Compares on all threads, unlike torch.equal.
bool same_bits(Tensor x, Tensor y) {
  const int64_t bytes = x.numel() * int64_t(x.element_size());
  STD_TORCH_CHECK(x.is_contiguous() && y.is_contiguous() && bytes == y.numel() * int64_t(y.element_size()),
                  "deberta_fast: same_bits takes contiguous tensors of one size");
  const char *left = static_cast<const char*>(x.data_ptr()), *right = static_cast<const char*>(y.data_ptr());
  constexpr int64_t kPart = 1 << 18;
  std::atomic<bool> same{true};
  parallel_for((bytes + kPart - 1) / kPart, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPart;
    if (same && std::memcmp(left + first, right + first, std::min(end * kPart, bytes) - first) != 0) same = false;
  });
  return same;
}

STABLE_TORCH_LIBRARY_IMPL(deberta_fast, CPU, m) {
  m.impl("same_bits", TORCH_BOX(&same_bits));
  m.impl("add_norm", TORCH_BOX(&add_norm));
  m.impl("add_norm_backward", TORCH_BOX(&add_norm_backward));
  m.impl("fused_forward", TORCH_BOX(&fused_forward));
  m.impl("fused_backward", TORCH_BOX(&fused_backward));
}

STABLE_TORCH_LIBRARY_IMPL(deberta_fast, CompositeExplicitAutograd, m) {
  m.impl("use_instruction_set", TORCH_BOX(&use_instruction_set));
  m.impl("built_instruction_sets", TORCH_BOX(&built_instruction_sets));
  m.impl("bfloat16_instruction_sets", TORCH_BOX(&bfloat16_instruction_sets));
  m.impl("release_memory", TORCH_BOX(&release_memory));
}

}  // namespace
}  // namespace deberta_fast

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
