// Coroutines for the threads of a block. Each has a stack of its own, and all run on the CPU thread that launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if !defined(__x86_64__) && !defined(DEBERTA_FAST_EMULATOR_UCONTEXT)
#define DEBERTA_FAST_EMULATOR_UCONTEXT
#endif
#if defined(DEBERTA_FAST_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define DEBERTA_FAST_EMULATOR_ASAN
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) && !defined(DEBERTA_FAST_EMULATOR_ASAN)
#define DEBERTA_FAST_EMULATOR_ASAN
#endif

#if defined(DEBERTA_FAST_EMULATOR_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
void __asan_unpoison_memory_region(void const volatile* begin, size_t size);
}
#endif

// Excludes interprocedural analysis, since no compiler can see what these functions do to the stack.
#if defined(__clang__)
#define DEBERTA_FAST_EMULATOR_OPAQUE __attribute__((noinline, no_sanitize("address")))
#else
#define DEBERTA_FAST_EMULATOR_OPAQUE __attribute__((noinline, noipa, no_sanitize_address))
#endif

namespace deberta_fast {
namespace emulator {

struct Coroutine {
#if defined(DEBERTA_FAST_EMULATOR_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  // The stack, also that of the host, since AddressSanitizer must know the target of a switch.
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
};

#if !defined(DEBERTA_FAST_EMULATOR_UCONTEXT)
// Pushes all registers that a callee must keep onto the old stack, and pops them from the new one. The arguments are in
// rdi (the address to store the old stack pointer at) and rsi (the new stack pointer).
__attribute__((naked)) DEBERTA_FAST_EMULATOR_OPAQUE inline void swap_stacks(void**, void*) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}
#endif

// Leaves `from`, which continues here when something switches to it, unless it `ends`.
inline void switch_coroutine(Coroutine& from, Coroutine& to, bool ends = false) {
#if defined(DEBERTA_FAST_EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.bottom, to.size);
#else
  (void)ends;
#endif
#if defined(DEBERTA_FAST_EMULATOR_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#endif
#if defined(DEBERTA_FAST_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// A new coroutine calls this first. `host` is the host if it switched to the coroutine, else null.
inline void entered_coroutine(Coroutine* host) {
#if defined(DEBERTA_FAST_EMULATOR_ASAN)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (host) {
    host->bottom = bottom;
    host->size = size;
  }
#else
  (void)host;
#endif
}

// Stacks that are reused.
class Stacks {
 public:
#if defined(DEBERTA_FAST_EMULATOR_ASAN)
  static constexpr size_t kBytes = 1 << 20;
#else
  static constexpr size_t kBytes = 256 << 10;
#endif

  void reserve(int count) {
    if (count <= count_) return;
    std::free(memory_);
    memory_ = static_cast<char*>(std::malloc(count * kBytes + 64));
    if (!memory_) std::abort();
    count_ = count;
  }

  // Prepares a coroutine on stack i that starts with `entry`, which must not return. A stack is `dirty` if a coroutine
  // was abandoned on it.
  void prepare(Coroutine& coroutine, int i, void (*entry)(), bool dirty) {
    char* bottom = memory_ + i * kBytes;
    bottom += -reinterpret_cast<uintptr_t>(bottom) % 64;
    // Tops at the same offset in all stacks would be in the same set of the cache.
    const size_t size = kBytes - 64 - i % 61 * 192;
#if defined(DEBERTA_FAST_EMULATOR_ASAN)
    const size_t used = dirty ? size : 16 << 10;
    __asan_unpoison_memory_region(bottom + size - used, used);
#else
    (void)dirty;
#endif
    std::memcpy(bottom, &kCanary, sizeof(kCanary));
    coroutine.bottom = bottom;
    coroutine.size = size;
    coroutine.fake_stack = nullptr;
#if defined(DEBERTA_FAST_EMULATOR_UCONTEXT)
    getcontext(&coroutine.context);
    coroutine.context.uc_stack.ss_sp = bottom;
    coroutine.context.uc_stack.ss_size = size;
    coroutine.context.uc_link = nullptr;
    makecontext(&coroutine.context, entry, 0);
#else
    // The frame has six registers, the entry to which swap_stacks() returns, and no caller. It is aligned as after a
    // call.
    void* frame[8] = {};
    std::memcpy(&frame[6], &entry, sizeof(entry));
    coroutine.stack_pointer = bottom + size - 80 + 16;
    std::memcpy(coroutine.stack_pointer, frame, sizeof(frame));
#endif
  }

  static bool overflowed(const Coroutine& coroutine) {
    return std::memcmp(coroutine.bottom, &kCanary, sizeof(kCanary)) != 0;
  }

 private:
  static constexpr uint64_t kCanary = 0x7c3a9be5d1f20846u;
  char* memory_ = nullptr;
  int count_ = 0;
};

}  // namespace emulator
}  // namespace deberta_fast
