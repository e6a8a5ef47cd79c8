// Replaces csrc/cuda/register.cpp: registers the CUDA operators for CPU tensors, under a namespace of the tests.
#include <torch/csrc/stable/library.h>

#include "ops.h"
#include "plan.h"

namespace deberta_fast::cuda {

StreamGuard::StreamGuard(const torch::stable::Tensor&) {}

STABLE_TORCH_LIBRARY_IMPL(deberta_fast_emulated, CPU, m) {
  m.impl("fused_forward", TORCH_BOX(&fused_forward));
  m.impl("fused_backward", TORCH_BOX(&fused_backward));
}

STABLE_TORCH_LIBRARY_IMPL(deberta_fast_emulated, CompositeExplicitAutograd, m) {
  m.impl("limit_near_bytes", TORCH_BOX(&limit_near_bytes));
}

}  // namespace deberta_fast::cuda
