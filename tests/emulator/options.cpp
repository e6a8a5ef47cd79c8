// The emulator's options and results as C functions, for Python.
#include <dlfcn.h>

#include <string>

#include "emulator.h"
#include "plan.h"

using namespace deberta_fast;

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

EXPORTED void emulator_options(uint64_t seed, bool check_races, bool count_conflicts, int skip_barrier) {
  emulator::Options& options = emulator::options();
  options.seed = seed, options.check_races = check_races, options.count_conflicts = count_conflicts;
  options.skip_barrier = skip_barrier;
}

EXPORTED int emulator_barrier_sites() { return emulator::barrier_sites(); }

EXPORTED const char* emulator_barrier_site(int i) {
  static std::string text;
  text = emulator::barrier_site(i);
  return text.c_str();
}

EXPORTED void emulator_clear_counts() { emulator::clear_counts(); }
EXPORTED int64_t emulator_launches() { return emulator::the_machine->launched; }
EXPORTED int emulator_exposed_waits() { return emulator::the_machine->exposed_waits; }

EXPORTED const char* emulator_conflicts() {
  static std::string table;
  table = emulator::conflict_table();
  return table.c_str();
}

// The same with everything else that is counted, per launch; kernels' addresses are those of the library's symbols.
EXPORTED const char* emulator_counts() {
  static std::string table;
  Dl_info library;
  dladdr(reinterpret_cast<const void*>(&emulator_counts), &library);
  table = emulator::count_table(static_cast<const char*>(library.dli_fbase));
  return table.c_str();
}

// Shared memory per block of forward or backward.
EXPORTED int emulator_shared_bytes(int padded_size, bool backward) {
  return backward ? cuda::backward_shared_bytes(padded_size) : cuda::forward_shared_bytes(padded_size);
}

// Device memory that a call with both terms needs besides its tensors; packed if `ends` is not null.
EXPORTED int64_t emulator_workspace_bytes(int batches, int heads, int length, int size, const int32_t* ends,
                                          int far_past, int far_future, int table_rows, bool backward) {
  static char something[16];
  cuda::Request request;
  cuda::Call& call = request.call;
  call.batches = batches, call.heads = heads, call.size = size, call.ends = ends;
  call.query.length = call.key.length = length;
  if (ends != nullptr) call.packed_rows = ends[batches];
  call.query.table.data = call.key.table.data = something;
  request.far_past = far_past, request.far_future = far_future, request.table_rows = table_rows;
  cuda::Workspace workspace;
  if (backward) {
    cuda::Gradients gradients;
    gradients.grad_pos_key = gradients.grad_pos_query = something;
    cuda::run_backward(request, gradients, workspace, nullptr);
  } else {
    cuda::run_forward(request, {}, {}, workspace, nullptr);
  }
  return workspace.bytes();
}
}
