// Plans a call as kernel launches, and the device memory that they need. This file does not depend on torch.
#pragma once

#include "kernels.h"

namespace deberta_fast::cuda {

// Hands out pieces of device memory aligned to 256 bytes, or only counts them.
class Workspace {
 public:
  Workspace() : counts_(true) {}
  explicit Workspace(char* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    char* start = counts_ ? nullptr : base_ + bytes_;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return reinterpret_cast<T*>(start);
  }
  int64_t bytes() const { return bytes_; }
  bool counts() const { return counts_; }

 private:
  char* base_ = nullptr;
  int64_t bytes_ = 0;
  bool counts_ = false;
};

// Both launch the kernels, or launch nothing if the workspace only counts. Return the reason for a failure, or null.
const char* run_forward(const Request& request, const Heads& output, const Statistic& lse, Workspace& workspace,
                        void* stream);

// The tensors that backward reads and writes. The gradients of tables are (H, table_rows, D), contiguous, or null if
// they are not wanted.
struct Gradients {
  Heads output, grad_output, grad_query, grad_key, grad_value;
  Statistic lse, grad_lse;
  void *grad_pos_key = nullptr, *grad_pos_query = nullptr;
};
const char* run_backward(const Request& request, const Gradients& gradients, Workspace& workspace, void* stream);

// Limits the bytes of dA that backward holds at once, for all threads; for benchmarks. 0 stands for the default. Must
// not run while another thread is in run_backward, which counts its memory first and takes it afterwards.
void limit_near_bytes(int64_t bytes);

}  // namespace deberta_fast::cuda
