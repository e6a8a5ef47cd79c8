// All that the kernels know of the machine below them: PTX, collectives of a warp or a block, shared memory, launches.
// Compiled by any other compiler than nvcc, the same names come from an emulator on the CPU (tests/emulator), which runs
// the same kernels: so no kernel may reach for a CUDA built-in by itself.
#pragma once

#include <atomic>
#include <cstdint>

namespace deberta_fast {

struct Bfloat16 {};
struct Float16 {};

// What a lane moves at once, at most.
struct alignas(16) Words {
  uint32_t x[4];
};

}  // namespace deberta_fast

#if !defined(__CUDACC__)
#include "emulator.h"

namespace deberta_fast {

template <auto kernel, class Arguments>
const char* launch(int64_t blocks_x, int64_t blocks_y, int threads, int shared_bytes, void* stream,
                   const Arguments& arguments) {
  return launch(kernel, blocks_x, blocks_y, threads, shared_bytes, stream, arguments);
}

}  // namespace deberta_fast

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE __device__ __forceinline__
// For index arithmetic that tests check on the host.
#define ANYWHERE __host__ __device__ __forceinline__ constexpr
#define KERNEL(threads, blocks_at_once) __global__ void __launch_bounds__(threads, blocks_at_once)
// Before a kernel's arguments: it reads them where the launch put them, even through references.
#define GRID_CONSTANT __grid_constant__
#define UNROLL _Pragma("unroll")
// For i from 0 to count - 1, unrolled.
#define EACH(i, count) _Pragma("unroll") for (int i = 0; i < (count); ++i)

namespace deberta_fast {

// ---- Who am I. Blocks are numbered in two dimensions, threads in one.

DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int thread() { return threadIdx.x; }
DEVICE int lane() { return threadIdx.x % 32; }
DEVICE int warp() { return threadIdx.x / 32; }

// ---- Barriers. What was written to shared (block: also to global) memory before them is seen after them.

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

// ---- Shared memory: one array a block, of as many bytes as the launch says, aligned to 16.

DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char bytes[];
  return bytes;
}

// The same, of which the compiler knows nothing yet: in a loop it makes addresses anew then, where it would else keep more
// of them than there are registers.
DEVICE char* shared_memory_anew() {
  int zero = 0;
  asm volatile("" : "+r"(zero));
  return shared_memory() + zero;
}

DEVICE Words load_shared(const void* from) { return *static_cast<const Words*>(from); }
DEVICE void store_shared(void* to, Words words) { *static_cast<Words*>(to) = words; }
DEVICE uint32_t load_shared_word(const void* from) { return *static_cast<const uint32_t*>(from); }
DEVICE void store_shared_word(void* to, uint32_t word) { *static_cast<uint32_t*>(to) = word; }
DEVICE void store_shared_half(void* to, uint16_t half) { *static_cast<uint16_t*>(to) = half; }

// Read-only global memory, 16 bytes.
DEVICE Words load_global(const void* from) {
  const uint4 v = __ldg(static_cast<const uint4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}
DEVICE void store_global(void* to, Words words) { *static_cast<Words*>(to) = words; }

// ---- Asynchronous copies of 16 bytes, global to shared; zeros where not valid (`global` is then not read). They have
// landed for the thread that issued them after wait_copies, for the others after a barrier besides.

DEVICE uint32_t shared_address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

DEVICE void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all groups but the latest `pending` have landed.
template <int pending>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- Tensor cores. With g = lane / 4 and t = lane % 4, a lane holds of a matrix of 8 x 8 halves, in one word, the
// elements (g, 2t) and (g, 2t + 1).

// Four matrices from shared memory: lane l gives the address of row l % 8, 16 bytes, of matrix l / 8.
DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed: a lane holds the elements (2t, g) and (2t + 1, g).
DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b with a 16 x 16, b 16 x 8, c 16 x 8. Words of a: its quarters (rows 0-7, columns 0-7), (8-15, 0-7), (0-7,
// 8-15), (8-15, 8-15), laid out as above. b0 and b1: rows 0-7 and 8-15 of b, transposed: a lane holds rows 2t and 2t + 1
// of column g. c: elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class T>
DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define DEBERTA_FAST_MMA(Type, name)                                                                \
  template <>                                                                                       \
  DEVICE void multiply_add<Type>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                      \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                      \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                            \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                            \
  }
DEBERTA_FAST_MMA(Bfloat16, "bf16")
DEBERTA_FAST_MMA(Float16, "f16")
#undef DEBERTA_FAST_MMA

// ---- Warps. All lanes take part.

DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
DEVICE uint32_t ballot(bool x) { return __ballot_sync(~0u, x); }

// ---- Two halves in a word, the first one low.

template <class T>
DEVICE uint32_t pack(float low, float high);
template <class T>
DEVICE float low(uint32_t pair);
template <class T>
DEVICE float high(uint32_t pair);
template <class T>
DEVICE uint32_t add_pairs(uint32_t a, uint32_t b);

template <>
DEVICE uint32_t pack<Bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
DEVICE float low<Bfloat16>(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
template <>
DEVICE float high<Bfloat16>(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}
template <>
DEVICE float low<Float16>(uint32_t pair) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
}
template <>
DEVICE float high<Float16>(uint32_t pair) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}
template <>
DEVICE uint32_t add_pairs<Bfloat16>(uint32_t a, uint32_t b) {
  uint32_t sum;
  // As a product with one, since sm_80 has no sum of its own: rounded once.
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return sum;
}
template <>
DEVICE uint32_t add_pairs<Float16>(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

// ---- Numbers.

// Bytes of the result, from low to high, by the digits of `selector`: 0 to 3 are bytes of a, 4 to 7 of b.
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
// 2^x and log2 x to about 2 in the last place; 2^-inf = 0.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_fast(float x) { return __log2f(x); }
DEVICE float maximum(float a, float b) { return fmaxf(a, b); }  // of a number and NaN the number
DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
// The same address, of which the compiler knows nothing: it may not trade one pointer and constants for many pointers.
DEVICE const char* opaque(const char* address) {
  asm("" : "+l"(address));
  return address;
}
DEVICE int minimum(int a, int b) { return a < b ? a : b; }
DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }
DEVICE uint32_t high_product(uint32_t a, uint32_t b) { return __umulhi(a, b); }
DEVICE int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }  // -1 where there is none
DEVICE float infinity() { return __int_as_float(0x7f800000); }

// ---- Launches, from the host.

// Lets a kernel take so much shared memory, always the same for it. CUDA is told once for each device.
template <auto kernel>
cudaError_t allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> allowed{0};  // a bit for each device, and none from the 65th on
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (error != cudaSuccess || (allowed.load(std::memory_order_relaxed) & bit) != 0) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// The reason for which it failed, or null. It is this launch's own: CUDA's last error may be somebody else's.
template <auto kernel, class Arguments>
const char* launch(int64_t blocks_x, int64_t blocks_y, int threads, int shared_bytes, void* stream,
                   const Arguments& arguments) {
  if (blocks_x == 0 || blocks_y == 0) return nullptr;
  cudaError_t error = allow_shared_memory<kernel>(shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, arguments);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace deberta_fast

#endif
