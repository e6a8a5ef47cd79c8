// Checks the calls of launch() in primitives.h to CUDA's runtime, whose functions are replaced and only record calls.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "primitives.h"

namespace {

int device = 0;
cudaError_t attribute_result = cudaSuccess, launch_result = cudaSuccess;
// Calls so far, and the latest launch.
int attributes = 0, launches = 0;
const void *kernel = nullptr, *allowed = nullptr;
cudaLaunchConfig_t config;
int given = 0, bytes = 0;

struct Arguments {
  int number;
};

}  // namespace

// The linker is told to use these in place of CUDA's functions of the same names without __wrap_.
extern "C" {
cudaError_t __wrap_cudaGetDevice(int* to) {
  *to = device;
  return cudaSuccess;
}
cudaError_t __wrap_cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  ++attributes, allowed = function, bytes = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize ? value : -1;
  return attribute_result;
}
cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* function, void** arguments) {
  ++launches, config = *how, kernel = function, given = static_cast<const Arguments*>(arguments[0])->number;
  return launch_result;
}
// launch() must not call these, since they return errors of other code too.
cudaError_t __wrap_cudaGetLastError() { std::abort(); }
cudaError_t __wrap_cudaPeekAtLastError() { std::abort(); }
}

namespace deberta_fast {
namespace {

KERNEL(32, 1) first(GRID_CONSTANT const Arguments arguments) {}
KERNEL(32, 1) second(GRID_CONSTANT const Arguments arguments) {}

#define CHECK(condition)                                          \
  if (!(condition)) {                                             \
    std::printf("line %d: not true: %s\n", __LINE__, #condition); \
    std::exit(1);                                                 \
  }

template <auto kernel>
const char* start(int number) {
  return launch<kernel>(2, 3, 64, 50000, &device, Arguments{number});
}

void check_all() {
  CHECK(start<first>(7) == nullptr && attributes == 1 && launches == 1);
  CHECK(kernel == reinterpret_cast<const void*>(first) && allowed == kernel && bytes == 50000 && given == 7);
  CHECK(config.gridDim.x == 2 && config.gridDim.y == 3 && config.gridDim.z == 1 && config.blockDim.x == 64);
  CHECK(config.dynamicSmemBytes == 50000 && config.stream == reinterpret_cast<cudaStream_t>(&device));
  CHECK(config.numAttrs == 0);
  // The attribute is set once per kernel and device.
  CHECK(start<first>(8) == nullptr && attributes == 1 && launches == 2 && given == 8);
  CHECK(start<second>(9) == nullptr && attributes == 2 && launches == 3 && allowed == kernel);
  device = 63;
  CHECK(start<first>(1) == nullptr && attributes == 3 && start<first>(1) == nullptr && attributes == 3);
  device = 64;
  CHECK(start<first>(1) == nullptr && attributes == 4 && start<first>(1) == nullptr && attributes == 5);
  // An empty grid is not launched.
  launches = 0;
  CHECK(launch<first>(0, 3, 64, 0, nullptr, Arguments{}) == nullptr && launches == 0 && attributes == 5);
  CHECK(launch<first>(2, 0, 64, 0, nullptr, Arguments{}) == nullptr && launches == 0 && attributes == 5);
  // Failures are reported, and an attribute that was not set is set by the next launch.
  device = 1, attribute_result = cudaErrorInvalidValue;
  CHECK(std::strcmp(start<first>(1), "invalid argument") == 0 && launches == 0 && attributes == 6);
  attribute_result = cudaSuccess, launch_result = cudaErrorInvalidValue;
  CHECK(std::strcmp(start<first>(1), "invalid argument") == 0 && launches == 1 && attributes == 7);
  launch_result = cudaSuccess;
  CHECK(start<first>(1) == nullptr && launches == 2 && attributes == 7);
}

}  // namespace
}  // namespace deberta_fast

int main() {
  deberta_fast::check_all();
  std::puts("ok");
}
