// The CUDA operators as functions, and what they need from the device. register.cpp implements the latter on torch's
// CUDA streams and registers the operators; the tests' emulator has a file of its own in its place.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "../given.h"

namespace deberta_fast::cuda {

// Makes the device of a tensor current while kernels are launched to torch's current stream there.
class StreamGuard {
 public:
  explicit StreamGuard(const torch::stable::Tensor& x);
  void* stream = nullptr;

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

void fused_forward(torch::stable::Tensor output, MaybeTensor lse, DEBERTA_FAST_GIVEN);
void fused_backward(torch::stable::Tensor grad_query, torch::stable::Tensor grad_key, torch::stable::Tensor grad_value,
                    MaybeTensor grad_pos_key, MaybeTensor grad_pos_query, torch::stable::Tensor output,
                    torch::stable::Tensor lse, torch::stable::Tensor grad_output, MaybeTensor grad_lse,
                    DEBERTA_FAST_GIVEN);

}  // namespace deberta_fast::cuda
