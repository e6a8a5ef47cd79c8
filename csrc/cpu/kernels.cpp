// The kernels of one instruction set.
#include "kernels.h"

#include "vector.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

void forward(const Attention&, const Forward&, int64_t begin, int64_t end);
void backward(const Attention&, const Backward&, int64_t wave, int64_t begin, int64_t end);
void store_sums(const Attention&, const Backward&, int64_t begin, int64_t end);
void store_table(const Attention&, const Backward&, const float* sums, float scale, void* gradient, int64_t begin,
                 int64_t end);
void add_norm(const AddNorm&, int64_t begin, int64_t end);
void add_norm_backward(const AddNormBackward&, int64_t part, int64_t begin, int64_t end);
void store_norm_sums(const AddNormBackward&, int64_t parts, int64_t which, void* gradient);

const Kernels kernels = {nullptr, forward, backward, store_sums, store_table, kLanes, 1, 24, true};
const NormKernels norm_kernels = {add_norm, add_norm_backward, store_norm_sums};

}  // namespace deberta_fast::DEBERTA_FAST_ISA
