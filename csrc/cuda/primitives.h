// The only interface between the kernels and the GPU: PTX, collectives of a warp or a block, shared memory, launches.
// Under a compiler other than nvcc, an emulator on the CPU (tests/emulator) implements the same functions and runs the
// same kernels, so a kernel must not use a CUDA built-in directly.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "block_sizes.h"

namespace deberta_fast {

struct Bfloat16 {};
struct Float16 {};
template <class T>
constexpr bool kIsBfloat16 = std::is_same_v<T, Bfloat16>;

// The largest unit that a lane loads or stores at once.
struct alignas(16) Vec16 {
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
#define KERNEL(threads, blocks_at_once) __global__ void __launch_bounds__(threads, blocks_at_once)
// Before a kernel's arguments: keeps them in constant memory, even behind references.
#define GRID_CONSTANT __grid_constant__
#define UNROLL _Pragma("unroll")
#define KEEP_ROLLED _Pragma("unroll 1")
// Runs a statement for i from 0 to count - 1, unrolled.
#define EACH(i, count) _Pragma("unroll") for (int i = 0; i < (count); ++i)

namespace deberta_fast {

// ---- Indices. Blocks are numbered in two dimensions, threads in one.

DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int thread() { return threadIdx.x; }
DEVICE int lane() { return threadIdx.x % 32; }
DEVICE int warp() { return threadIdx.x / 32; }

// ---- Barriers. Writes to shared memory (sync_block: also to global memory) before a barrier are visible after it.

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

// ---- Shared memory: one array per block, aligned to 16 bytes, of the size that the launch gives.

DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char bytes[];
  return bytes;
}

// Returns shared_memory() as a value that is unknown to the compiler. In a loop it computes derived addresses again,
// and does not keep more of them than there are registers.
DEVICE char* shared_memory_anew() {
  int zero = 0;
  asm volatile("" : "+r"(zero));
  return shared_memory() + zero;
}

// Returns x as a value that is unknown to the compiler. In a loop it computes what follows from x again.
DEVICE int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

DEVICE Vec16 load_shared(const void* from) { return *static_cast<const Vec16*>(from); }
DEVICE void store_shared(void* to, Vec16 words) { *static_cast<Vec16*>(to) = words; }
DEVICE uint32_t load_shared_word(const void* from) { return *static_cast<const uint32_t*>(from); }
DEVICE void store_shared_word(void* to, uint32_t word) { *static_cast<uint32_t*>(to) = word; }
DEVICE void store_shared_half(void* to, uint16_t half) { *static_cast<uint16_t*>(to) = half; }

// Reads 16 bytes of global memory that the kernel does not write.
DEVICE Vec16 load_global(const void* from) {
  const uint4 v = __ldg(static_cast<const uint4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}
DEVICE void store_global(void* to, Vec16 words) { *static_cast<Vec16*>(to) = words; }

// ---- Asynchronous copies of 16 bytes from global to shared memory. If `valid` is false, a copy writes zeros and does
// not read `global`. The issuing thread sees the data after wait_copies, other threads after wait_copies and a barrier.

DEVICE uint32_t shared_address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

DEVICE void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// The same for four bytes.
DEVICE void copy_async_word(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the latest `pending` groups are outstanding.
template <int pending>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- Tensor cores. With g = lane / 4 and t = lane % 4, a lane holds the elements (g, 2t) and (g, 2t + 1) of a matrix
// of 8 x 8 16-bit elements in one word.

// Loads four matrices from shared memory: lane l gives the address of row l % 8, 16 bytes, of matrix l / 8.
#define DEBERTA_FAST_LDMATRIX(transposed)                                                       \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" transposed ".shared.b16 {%0, %1, %2, %3}, [%4];" \
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])                             \
               : "r"(shared_address(row))                                                       \
               : "memory")
DEVICE void load_matrices(uint32_t (&to)[4], const void* row) { DEBERTA_FAST_LDMATRIX(""); }
// The same with each matrix transposed: a lane holds the elements (2t, g) and (2t + 1, g).
DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row) { DEBERTA_FAST_LDMATRIX(".trans"); }
#undef DEBERTA_FAST_LDMATRIX

// c += a b, where a is 16 x 16, b is 16 x 8 and c is 16 x 8. The words of a are its quarters (rows 0-7, columns 0-7),
// (8-15, 0-7), (0-7, 8-15), (8-15, 8-15) in the layout above. b0 and b1 are rows 0-7 and 8-15 of b, transposed: a lane
// holds rows 2t and 2t + 1 of column g. c has the elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#define DEBERTA_FAST_MMA(type)                                               \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class T>
DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kIsBfloat16<T>) {
    DEBERTA_FAST_MMA("bf16");
  } else {
    DEBERTA_FAST_MMA("f16");
  }
}
#undef DEBERTA_FAST_MMA

// ---- Warp collectives. All lanes take part.

DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
// x of the lane `from`.
DEVICE uint32_t shuffle(uint32_t x, int from) { return __shfl_sync(~0u, x, from); }
DEVICE uint32_t ballot(bool x) { return __ballot_sync(~0u, x); }

// ---- Two 16-bit elements in a word, the first one in the low half.

template <class T>
DEVICE uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (kIsBfloat16<T>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

template <class T>
DEVICE float low(uint32_t pair) {
  if constexpr (kIsBfloat16<T>) {
    return __uint_as_float(pair << 16);
  } else {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
  }
}

template <class T>
DEVICE float high(uint32_t pair) {
  if constexpr (kIsBfloat16<T>) {
    return __uint_as_float(pair & 0xffff0000u);
  } else {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
  }
}

template <class T>
DEVICE uint32_t add_pairs(uint32_t a, uint32_t b) {
  uint32_t sum;
  if constexpr (kIsBfloat16<T>) {
    // sm_80 has no instruction that adds bfloat16. a * 1 + b is rounded once, as a sum is.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  } else {
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  }
  return sum;
}

// ---- Numbers.

// The hexadecimal digits of `selector` choose the bytes of the result, from low to high: 0 to 3 from a, 4 to 7 from b.
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
// 2^x and log2 x, accurate to about 2 ulp; 2^-inf = 0.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_fast(float x) { return __log2f(x); }
DEVICE float maximum(float a, float b) { return fmaxf(a, b); }  // the number if one argument is NaN
DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
// Returns the same address as a value that is unknown to the compiler, which would replace one pointer plus constants
// by many pointers, which takes registers.
DEVICE const char* opaque(const char* address) {
  asm("" : "+l"(address));
  return address;
}
DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }
DEVICE uint32_t high_product(uint32_t a, uint32_t b) { return __umulhi(a, b); }
DEVICE int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }  // -1 if x is 0
DEVICE float infinity() { return __int_as_float(0x7f800000); }

// ---- Launches, from the host.

// Allows a kernel this many bytes of shared memory. A kernel must always pass the same number, since CUDA is called
// only once per kernel and device.
template <auto kernel>
cudaError_t allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> allowed{0};  // one bit per device; for devices from the 65th on CUDA is always called
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (error != cudaSuccess || (allowed.load(std::memory_order_relaxed) & bit) != 0) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// Returns the reason why this launch failed, or null. It does not ask for CUDA's last error, which could belong to
// another launch.
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

namespace deberta_fast {

ANYWHERE int minimum(int a, int b) { return a < b ? a : b; }
ANYWHERE int clamp(int x, int low, int high) { return minimum(x < low ? low : x, high); }

}  // namespace deberta_fast
