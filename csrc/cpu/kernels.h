// What each instruction set's kernels offer. Ranges are shares of the work, to be run in any order and by any thread.
#pragma once

#include <new>
#include <string>

#include "params.h"

namespace deberta_fast {

struct Kernels {
  // Heads [begin, end) of the tables by distance (6); with_rows: the rows that backward needs too.
  void (*expand_tables)(const Attention&, bool with_rows, int64_t begin, int64_t end);
  // Query blocks [begin, end) of heads * blocks_per_head.
  void (*forward)(const Attention&, const Forward&, int64_t begin, int64_t end);
  // Items [begin, end) of heads * groups * parts, in wave 0 to parts - 1; a wave ends before the next one begins.
  void (*backward)(const Attention&, const Backward&, int64_t wave, int64_t begin, int64_t end);
  // Where parts > 1, after the last wave: heads [begin, end) of heads * sequence_count.
  void (*store_sums)(const Attention&, const Backward&, int64_t begin, int64_t end);
  // Heads [begin, end) of a table's gradient (11): scale times the items' sums, (items, used_rows, D rounded up), as
  // (H, table_rows, D).
  void (*store_table)(const Attention&, const Backward&, const float* sums, float scale, void* gradient, int64_t begin,
                      int64_t end);
  int64_t lanes;  // D is rounded up to a multiple of it
};

namespace plain {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

// Torch makes a MemoryError of it, with these words.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(int64_t bytes)
      : message_("deberta_fast: out of memory: the CPU kernels need " + std::to_string(bytes) +
                 " bytes more for one thread") {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

enum MemoryUse { kThreadScratch, kCallScratch, kMemoryUses };

// Memory of the calling thread, aligned to cache lines. It stays with the thread afterwards unless it is large: fresh
// memory costs more to touch than a short sequence to attend. One at a time for each use.
class ThreadMemory {
 public:
  ThreadMemory() = default;
  ThreadMemory(MemoryUse use, int64_t floats);
  ThreadMemory(ThreadMemory&& other) noexcept { *this = static_cast<ThreadMemory&&>(other); }
  ThreadMemory& operator=(ThreadMemory&& other) noexcept;
  ~ThreadMemory();
  float* data() const { return data_; }

 private:
  MemoryUse use_ = kMemoryUses;
  float* data_ = nullptr;
};

}  // namespace deberta_fast
