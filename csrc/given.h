// The arguments of the extension's operators in the order of their schema (deberta_fast/op/backends/extension.py), and
// the checks that both devices share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "tensors.h"

namespace deberta_fast {

using MaybeTensor = std::optional<torch::stable::Tensor>;

struct Given {
  const torch::stable::Tensor &query, &key, &value;
  const MaybeTensor &pos_key, &pos_query, &mask, &cu_seqlens, &seed;
  const MaybeTensor &slots, &first_of_slot;  // DeviceTables of relative_position.py
  int64_t far_past, far_future, past_row, future_row, first_slot, query_offset, max_seqlen;
  double scale, band_scale, dropout_p;

  bool has_positions() const { return pos_key || pos_query; }
  int64_t table_rows() const { return pos_key ? pos_key->size(1) : pos_query->size(1); }
};

// The parameter list of an operator, and the initializer of a Given from it.
#define DEBERTA_FAST_GIVEN                                                                                          \
  torch::stable::Tensor query, torch::stable::Tensor key, torch::stable::Tensor value,                              \
      ::deberta_fast::MaybeTensor pos_key, ::deberta_fast::MaybeTensor pos_query, ::deberta_fast::MaybeTensor mask, \
      ::deberta_fast::MaybeTensor cu_seqlens, ::deberta_fast::MaybeTensor seed, ::deberta_fast::MaybeTensor slots,  \
      ::deberta_fast::MaybeTensor first_of_slot, int64_t far_past, int64_t far_future, int64_t past_row,            \
      int64_t future_row, int64_t first_slot, int64_t query_offset, int64_t max_seqlen, double scale,               \
      double band_scale, double dropout_p
#define DEBERTA_FAST_NAMED                                                                                             \
  {query,    key,        value,    pos_key,    pos_query,  mask,         cu_seqlens, seed,  slots,      first_of_slot, \
   far_past, far_future, past_row, future_row, first_slot, query_offset, max_seqlen, scale, band_scale, dropout_p}

inline Statistic statistic_of(const torch::stable::Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.scalar_type() == torch::headeronly::ScalarType::Float,
                  "deberta_fast: (B, H, L) float32");
  return {static_cast<float*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

inline void* gradient_of_table(const MaybeTensor& x) {
  STD_TORCH_CHECK(!x || x->is_contiguous(), "deberta_fast: the gradient of a table must be contiguous");
  return x ? x->data_ptr() : nullptr;
}

// The seed of dropout (12), followed by the four numbers of a DropoutOrigin if there are five.
inline const int64_t* seed_of(const Given& given) {
  const MaybeTensor& seed = given.seed;
  STD_TORCH_CHECK(seed && seed->scalar_type() == torch::headeronly::ScalarType::Long && seed->is_contiguous() &&
                      (seed->numel() == 1 || seed->numel() == 5),
                  "deberta_fast: the seed must be contiguous int64, (1,) or (5,)");
  return static_cast<const int64_t*>(seed->data_ptr());
}

// Dropout (12) drops the probabilities whose 16 random bits are below this; 0 < p < 1.
inline uint32_t drop_below(double dropout_p) {
  return static_cast<uint32_t>(std::clamp(std::nearbyint(dropout_p * 0x1p16), 1.0, 0x1p16 - 1));
}
// Kept probabilities are divided by the probability of keeping that is really used.
inline float keep_scale(double dropout_p) { return 0x1p16f / static_cast<float>(0x10000 - drop_below(dropout_p)); }

}  // namespace deberta_fast
