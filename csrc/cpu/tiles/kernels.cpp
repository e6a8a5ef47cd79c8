// The kernels for bfloat16 of one implementation of tiles.
#include "../kernels.h"

#include "pack.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

void expand_tables(const Attention&, bool with_rows, int64_t begin, int64_t end);
void forward(const Attention&, const Forward&, int64_t begin, int64_t end);
void backward(const Attention&, const Backward&, int64_t wave, int64_t begin, int64_t end);
void store_sums(const Attention&, const Backward&, int64_t begin, int64_t end);
void store_table(const Attention&, const Backward&, const float* sums, float scale, void* gradient, int64_t begin,
                 int64_t end);

const Kernels kernels = {expand_tables, forward, backward, store_sums, store_table, kDepth, kTile, 12, false};

}  // namespace deberta_fast::DEBERTA_FAST_ISA
