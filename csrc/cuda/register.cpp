// Registers the CUDA operators with torch and finds torch's stream, without any header of CUDA.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "ops.h"
#include "plan.h"

namespace deberta_fast::cuda {
namespace {

// Torch's function for its current stream, or null. It is in libtorch_cuda.so, which this library is not linked to, so
// that it loads without CUDA. Python loads torch's libraries with local symbols, so a weak symbol would not find it.
using CurrentStream = AOTITorchError (*)(int32_t, void**);
CurrentStream current_stream() {
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  return function;
}

bool finds_torch_stream() { return current_stream() != nullptr; }

// setup.py names the targets that the kernels are built for, such as "sm_80 sm_90 compute_80".
#ifndef DEBERTA_FAST_ARCHITECTURES
#define DEBERTA_FAST_ARCHITECTURES ""
#endif
std::string cuda_architectures() { return DEBERTA_FAST_ARCHITECTURES; }

}  // namespace

StreamGuard::StreamGuard(const torch::stable::Tensor& x) {
  STD_TORCH_CHECK(finds_torch_stream(), "deberta_fast: this torch has no libtorch_cuda.so that tells its stream");
  guard_.emplace(x.get_device_index());
  STABLE_TORCH_ERROR_CODE_CHECK(current_stream()(x.get_device_index(), &stream));
}

STABLE_TORCH_LIBRARY_IMPL(deberta_fast, CUDA, m) {
  m.impl("fused_forward", TORCH_BOX(&fused_forward));
  m.impl("fused_backward", TORCH_BOX(&fused_backward));
}

STABLE_TORCH_LIBRARY_IMPL(deberta_fast, CompositeExplicitAutograd, m) {
  m.impl("finds_torch_stream", TORCH_BOX(&finds_torch_stream));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("limit_near_bytes", TORCH_BOX(&limit_near_bytes));
}

}  // namespace deberta_fast::cuda
