// The kernels of each instruction set. The ranges of a function may run in any order and on any thread.
#pragma once

#include <cstdlib>

#include "norm.h"
#include "params.h"

namespace deberta_fast {

struct Kernels {
  // Expands heads [begin, end) of the tables (6) to distances; with_rows: also the rows for backward. Null if the
  // passes expand them to runs.
  void (*expand_tables)(const Attention&, bool with_rows, int64_t begin, int64_t end);
  // Computes query blocks [begin, end) of heads * blocks_per_head.
  void (*forward)(const Attention&, const Forward&, int64_t begin, int64_t end);
  // Computes items [begin, end) of heads * groups * parts in one of `parts` waves, which run one after the other.
  void (*backward)(const Attention&, const Backward&, int64_t wave, int64_t begin, int64_t end);
  // Call after the last wave if parts > 1: stores heads [begin, end) of heads * sequence_count.
  void (*store_sums)(const Attention&, const Backward&, int64_t begin, int64_t end);
  // Stores heads [begin, end) of a table's gradient (11), (H, table_rows, D): scale times the sum over items of `sums`,
  // (items, used_rows, D rounded up).
  void (*store_table)(const Attention&, const Backward&, const float* sums, float scale, void* gradient, int64_t begin,
                      int64_t end);
  int64_t size_step;     // D is rounded up to a multiple of it
  int64_t row_step;      // blocks of queries begin at multiples of it
  int64_t fewest_items;  // work is divided into so many items if parts do not become too small
  bool scales_queries;   // before products
};

struct NormKernels {
  // Computes rows [begin, end).
  void (*add_norm)(const AddNorm&, int64_t begin, int64_t end);
  // Computes rows [begin, end), which are a part.
  void (*add_norm_backward)(const AddNormBackward&, int64_t part, int64_t begin, int64_t end);
  // Call after all parts: stores the gradient of weight (which = 0) or bias (1).
  void (*store_norm_sums)(const AddNormBackward&, int64_t parts, int64_t which, void* gradient);
};

namespace plain {
extern const Kernels kernels;
extern const NormKernels norm_kernels;
}  // namespace plain
namespace avx2 {
extern const Kernels kernels;
extern const NormKernels norm_kernels;
}  // namespace avx2
namespace avx512 {
extern const Kernels kernels;
extern const NormKernels norm_kernels;
}  // namespace avx512
// Kernels for bfloat16 alone (tiles/).
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}

// Memory for floats, aligned to cache lines and not initialised. Throws a std::bad_alloc that names the size.
// A thread keeps the memory of up to two objects, at most 32 MiB each, for its next calls, because fresh memory costs more
// to touch than a short sequence to attend.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t floats);
  Scratch(Scratch&& other) noexcept { *this = static_cast<Scratch&&>(other); }
  Scratch& operator=(Scratch&& other) noexcept;
  ~Scratch();
  float* data() const { return data_; }

 private:
  float* data_ = nullptr;
  int64_t floats_ = 0;
};

// Frees what the calling thread keeps, and returns the number of bytes.
int64_t release_memory();

}  // namespace deberta_fast
