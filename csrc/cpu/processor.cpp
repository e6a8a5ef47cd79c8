#include "processor.h"

#if defined(__x86_64__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace deberta_fast {
namespace {

// The parts of a thread's state that the operating system must save, by their bits in XCR0.
constexpr uint64_t kVectors = 1u << 1 | 1u << 2;           // the lower half of vector registers: SSE and AVX
constexpr uint64_t kAvx512 = 1u << 5 | 1u << 6 | 1u << 7;  // masks, upper halves, and registers 16 to 31
constexpr uint64_t kTileData = 18;
constexpr uint64_t kTiles = 1u << 17 | 1u << kTileData;

bool system_saves(uint64_t states) {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return false;  // xgetbv is illegal
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & states) == states;
}

// Linux gives a process no memory for tiles until it asks for it. These names are missing in older headers.
constexpr long kGetPermission = 0x1022, kRequestPermission = 0x1023;  // ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM

bool kernel_permits_tiles() {
  uint64_t permitted = 0;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 &&
         syscall(SYS_arch_prctl, kGetPermission, &permitted) == 0 && (permitted & kTiles) == kTiles;
}

}  // namespace

bool has_avx512_bf16() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax & 1u << 5 && system_saves(kVectors | kAvx512);
}

bool has_amx() {
  constexpr unsigned kAmx = 1u << 22 | 1u << 24;  // AMX-BF16 and AMX-TILE
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmx) == kAmx && system_saves(kTiles) &&
         kernel_permits_tiles();
}

}  // namespace deberta_fast

#endif
