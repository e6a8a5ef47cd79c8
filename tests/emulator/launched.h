// Shared by the programs that check the emulator: launched kernels must succeed, or fail for the right reason.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "primitives.h"

using namespace deberta_fast;

namespace {

#define CHECK(condition) check((condition), #condition, __LINE__)
void check(bool condition, const char* text, int line) {
  if (condition) return;
  std::fprintf(stderr, "line %d: not so: %s\n", line, text);
  std::exit(1);
}

inline bool fails_with(const char* error, const char* part) {
  if (error && std::strstr(error, part)) return true;
  std::fprintf(stderr, "error: %s; expected: %s\n", error ? error : "none", part);
  return false;
}

struct Arguments {
  const void* in;
  void* out;
  int variant;
};

const char* run(void (*kernel)(Arguments), int threads, int shared_bytes, const void* in, void* out, int variant = 0,
                int blocks_x = 1, int blocks_y = 1) {
  return launch(kernel, blocks_x, blocks_y, threads, shared_bytes, nullptr, Arguments{in, out, variant});
}

}  // namespace
