// Defines the names of primitives.h for compilers other than nvcc: kernels run on the CPU, under checks that a GPU
// lacks. An error in a kernel ends its launch, which returns the reason: a race or an access out of bounds in shared
// memory, or lanes that do not meet. primitives.h says what each of the functions does.
#pragma once

#include "primitives.h"

// These need the types of primitives.h.
#include "halves.h"
#include "machine.h"

#define DEVICE inline
#define KERNEL(threads, blocks_at_once) inline void
#define GRID_CONSTANT
#define UNROLL
#define KEEP_ROLLED
#define EACH(i, count) for (int i = 0; i < (count); ++i)

namespace deberta_fast {

using emulator::Kind;
using emulator::Operands;
using emulator::Site;
using emulator::the_machine;

inline int block_x() { return the_machine->block_x(); }
inline int block_y() { return the_machine->block_y(); }
inline int thread() { return the_machine->thread(); }
inline int lane() { return the_machine->thread() % 32; }
inline int warp() { return the_machine->thread() / 32; }

inline void sync_block(Site site = Site::here()) { the_machine->sync_block(site); }
inline void sync_warp(Site site = Site::here()) { the_machine->sync_warp(site); }

// ---- Shared memory.

inline char* shared_memory() { return the_machine->shared(); }
inline char* shared_memory_anew() { return the_machine->shared(); }
inline int anew(int x) { return x; }

inline Vec16 load_shared(const void* from, Site site = Site::here()) {
  the_machine->reads(Kind::load_shared, site, from, 16);
  Vec16 words;
  std::memcpy(&words, from, 16);
  return words;
}
inline void store_shared(void* to, Vec16 words, Site site = Site::here()) {
  the_machine->writes(Kind::store_shared, site, to, 16);
  std::memcpy(to, &words, 16);
}
inline uint32_t load_shared_word(const void* from, Site site = Site::here()) {
  the_machine->reads(Kind::load_shared_word, site, from, 4);
  uint32_t word;
  std::memcpy(&word, from, 4);
  return word;
}
inline void store_shared_word(void* to, uint32_t word, Site site = Site::here()) {
  the_machine->writes(Kind::store_shared_word, site, to, 4);
  std::memcpy(to, &word, 4);
}
inline void store_shared_half(void* to, uint16_t half, Site site = Site::here()) {
  the_machine->writes(Kind::store_shared_half, site, to, 2);
  std::memcpy(to, &half, 2);
}

inline Vec16 load_global(const void* from, Site site = Site::here()) {
  the_machine->global(Kind::load_global, site, from);
  Vec16 words;
  std::memcpy(&words, from, 16);
  return words;
}

inline void store_global(void* to, Vec16 words, Site site = Site::here()) {
  the_machine->global(Kind::store_global, site, to);
  std::memcpy(to, &words, 16);
}

inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(shared) -
                               reinterpret_cast<uintptr_t>(the_machine->shared()));
}

inline void copy_async(void* shared, const void* global, bool valid, Site site = Site::here()) {
  the_machine->copy_async(Kind::copy_async, 16, shared, global, valid, site);
}
inline void copy_async_word(void* shared, const void* global, bool valid, Site site = Site::here()) {
  the_machine->copy_async(Kind::copy_async_word, 4, shared, global, valid, site);
}
inline void commit_copies() { the_machine->commit_copies(); }
template <int pending>
inline void wait_copies() {
  the_machine->wait_copies(pending);
}

// ---- Tensor cores.

inline void load_matrices(uint32_t (&to)[4], const void* row, Site site = Site::here()) {
  the_machine->reads(Kind::load_matrices, site, row, 16);
  const auto bring = [&](Operands& operands, int lane) {
    operands.from[lane] = row;
    operands.to[lane] = to;
  };
  the_machine->meet(Kind::load_matrices, site, bring, [](Operands& operands) {
    for (int lane = 0; lane < 32; lane++) {
      uint32_t* words = static_cast<uint32_t*>(operands.to[lane]);
      for (int i = 0; i < 4; i++) {
        std::memcpy(words + i, static_cast<const char*>(operands.from[i * 8 + lane / 4]) + lane % 4 * 4, 4);
      }
    }
  });
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row, Site site = Site::here()) {
  the_machine->reads(Kind::load_matrices_transposed, site, row, 16);
  const auto bring = [&](Operands& operands, int lane) {
    operands.from[lane] = row;
    operands.to[lane] = to;
  };
  the_machine->meet(Kind::load_matrices_transposed, site, bring, [](Operands& operands) {
    uint16_t halves[32][8];
    for (int i = 0; i < 32; i++) std::memcpy(halves[i], operands.from[i], 16);
    for (int lane = 0; lane < 32; lane++) {
      uint32_t* words = static_cast<uint32_t*>(operands.to[lane]);
      for (int i = 0; i < 4; i++) {
        const int row = i * 8 + lane % 4 * 2;
        words[i] = halves[row][lane / 4] | static_cast<uint32_t>(halves[row + 1][lane / 4]) << 16;
      }
    }
  });
}

namespace emulator {

struct Fragments {
  float* c;
  const uint32_t* a;
};

// One product for the whole warp, summed in the order of the rows of b.
template <class T>
void multiply_add_all(Operands& operands) {
  using Row = float __attribute__((vector_size(16)));
  float a[16][16];
  alignas(16) float b[16][8];
  alignas(16) float c[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const Fragments& own = *static_cast<const Fragments*>(operands.from[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; i++) {
      a[g + i % 2 * 8][t + i / 2 * 8] = low<T>(own.a[i]);
      a[g + i % 2 * 8][t + i / 2 * 8 + 1] = high<T>(own.a[i]);
      c[g + i / 2 * 8][t + i % 2] = own.c[i];
    }
    b[t][g] = low<T>(operands.x[lane]);
    b[t + 1][g] = high<T>(operands.x[lane]);
    b[t + 8][g] = low<T>(operands.y[lane]);
    b[t + 9][g] = high<T>(operands.y[lane]);
  }
  Row rows[16][2];
  std::memcpy(rows, b, sizeof(b));
  for (int i = 0; i < 16; i++) {
    Row sums[2];
    std::memcpy(sums, c[i], 32);
    for (int k = 0; k < 16; k++) {
      sums[0] += a[i][k] * rows[k][0];
      sums[1] += a[i][k] * rows[k][1];
    }
    std::memcpy(c[i], sums, 32);
  }
  for (int lane = 0; lane < 32; lane++) {
    const Fragments& own = *static_cast<const Fragments*>(operands.from[lane]);
    for (int i = 0; i < 4; i++) own.c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace emulator

template <class T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = Site::here()) {
  const emulator::Fragments own = {c, a};
  const auto bring = [&](Operands& operands, int lane) {
    operands.from[lane] = &own;
    operands.x[lane] = b0;
    operands.y[lane] = b1;
  };
  the_machine->meet(Kind::multiply_add, site, bring, emulator::multiply_add_all<T>);
}

// ---- Warps.

inline uint32_t shuffle_xor(uint32_t x, int mask, Site site = Site::here()) {
  const auto bring = [&](Operands& operands, int lane) {
    operands.x[lane] = x;
    operands.y[lane] = static_cast<uint32_t>(mask) % 32;
  };
  const auto work = [](Operands& operands) {
    for (uint32_t lane = 0; lane < 32; lane++) operands.result[lane] = operands.x[lane ^ operands.y[lane]];
  };
  return the_machine->meet(Kind::shuffle_xor, site, bring, work).result[lane()];
}
inline float shuffle_xor(float x, int mask, Site site = Site::here()) {
  return emulator::as_float(shuffle_xor(emulator::as_bits(x), mask, site));
}
inline uint32_t shuffle(uint32_t x, int from, Site site = Site::here()) {
  const auto bring = [&](Operands& operands, int lane) {
    operands.x[lane] = x;
    operands.y[lane] = static_cast<uint32_t>(from) % 32;
  };
  const auto work = [](Operands& operands) {
    for (int lane = 0; lane < 32; lane++) operands.result[lane] = operands.x[operands.y[lane]];
  };
  return the_machine->meet(Kind::shuffle, site, bring, work).result[lane()];
}
inline uint32_t ballot(bool x, Site site = Site::here()) {
  const auto bring = [&](Operands& operands, int lane) { operands.x[lane] = x; };
  const auto work = [](Operands& operands) {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; lane++) all |= operands.x[lane] << lane;
    for (uint32_t& result : operands.result) result = all;
  };
  return the_machine->meet(Kind::ballot, site, bring, work).result[lane()];
}

// ---- Numbers; the others are in halves.h.

inline uint32_t float_bits(float x) { return emulator::as_bits(x); }
inline float bits_float(uint32_t x) { return emulator::as_float(x); }
inline const char* opaque(const char* address) { return address; }

// ---- Launches. The blocks have run when launch() returns. Its error message is valid until another launch fails.

template <class Arguments>
const char* launch(void (*kernel)(Arguments), int64_t blocks_x, int64_t blocks_y, int threads, int shared_bytes, void*,
                   const Arguments& arguments) {
  const auto call = [](const void* kernel, const void* arguments) {
    (**static_cast<void (*const*)(Arguments)>(kernel))(*static_cast<const Arguments*>(arguments));
  };
  return the_machine->run(call, &kernel, &arguments, sizeof(arguments), blocks_x, blocks_y, threads, shared_bytes);
}

}  // namespace deberta_fast
