// A call as launches of the passes, and the device memory they need besides its tensors. No torch here.
#pragma once

#include "kernels.h"

namespace deberta_fast::cuda {

// What a caller knows: `call` but for tables by distance, far rows and bits of the mask, and what these are made from.
struct Request {
  Call call;
  const int32_t* slots = nullptr;  // sigma over [-reach, reach], on the device
  int reach = 0, first_slot = 0, table_rows = 0;
  int far_past = 0, far_future = 0;  // sigma is constant for delta >= far_past and delta <= far_future,
  int past_row = 0, future_row = 0;  // where it is this row
  int query_offset = 0;
  const int32_t* first_of_slot = nullptr;  // on the device: the first delta of each row of the whole table, and of the
                                           // row after its last
  const uint8_t* mask = nullptr;           // of keys; strides in bytes
  int64_t mask_batch = 0, mask_key = 0;
};

// Hands out device memory, 256 bytes aligned; or only counts.
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

// Each runs the launches, or only takes the memory where the workspace counts. The reason for a failure, or null.
const char* run_forward(const Request& request, const Heads& output, const Statistic& lse, Workspace& workspace,
                        void* stream);

// Backward reads and fills these. The gradients of tables are (H, table_rows, D), contiguous, or null where nobody wants
// them.
struct Gradients {
  Heads output, grad_output, grad_query, grad_key, grad_value;
  Statistic lse, grad_lse;
  void *grad_pos_key = nullptr, *grad_pos_query = nullptr;
};
const char* run_backward(const Request& request, const Gradients& gradients, Workspace& workspace, void* stream);

// How much of dA backward holds at once, for all threads from now on: for benchmarks. Not while another thread calls
// run_backward, which counts its memory first and takes it then.
void limit_near_bytes(int64_t bytes);

}  // namespace deberta_fast::cuda
