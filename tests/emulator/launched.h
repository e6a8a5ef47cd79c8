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

bool fails_with(const char* error, const char* part) {
  if (error && std::strstr(error, part)) return true;
  std::fprintf(stderr, "error: %s; expected: %s\n", error ? error : "none", part);
  return false;
}

// Returns small numbers, which are exact in both half formats.
float small(int i) { return static_cast<float>((i * 37 + i / 7 * 11) % 29 - 14) / 4; }

struct Arguments {
  const void* in;
  void* out;
  int variant;
};

const char* run(void (*kernel)(Arguments), int threads, int shared_bytes, const void* in, void* out, int variant = 0,
                int blocks_x = 1, int blocks_y = 1) {
  return launch(kernel, blocks_x, blocks_y, threads, shared_bytes, nullptr, Arguments{in, out, variant});
}
// Fills the fragments element by element, by the tables of the PTX manual.
template <class T>
KERNEL(32, 1)
product(Arguments arguments) {
  const float* a = static_cast<const float*>(arguments.in);  // 16 x 16
  const float* b = a + 256;                                  // 16 x 8
  const float* c = b + 128;                                  // 16 x 8
  const int group = lane() >> 2, in_group = lane() % 4;
  uint32_t wa[4], wb[2];
  float elements[8];
  for (int i = 0; i < 8; i++) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    elements[i] = a[row * 16 + column];
  }
  for (int i = 0; i < 4; i++) wa[i] = pack<T>(elements[2 * i], elements[2 * i + 1]);
  for (int i = 0; i < 4; i++) {
    const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
    elements[i] = b[row * 8 + group];
  }
  for (int i = 0; i < 2; i++) wb[i] = pack<T>(elements[2 * i], elements[2 * i + 1]);
  float wc[4];
  const auto at = [&](int i) { return (i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1); };
  for (int i = 0; i < 4; i++) wc[i] = c[at(i)];
  multiply_add<T>(wc, wa, wb[0], wb[1]);
  for (int i = 0; i < 4; i++) static_cast<float*>(arguments.out)[at(i)] = wc[i];
}

template <class T>
void test_product() {
  std::vector<float> in(512), out(128);
  for (int i = 0; i < 512; i++) in[i] = small(i);
  CHECK(!run(product<T>, 32, 0, in.data(), out.data()));
  for (int i = 0; i < 16; i++) {
    for (int j = 0; j < 8; j++) {
      float sum = in[384 + i * 8 + j];
      for (int k = 0; k < 16; k++) sum += in[i * 16 + k] * in[256 + k * 8 + j];
      CHECK(out[i * 8 + j] == sum);
    }
  }
}

}  // namespace
