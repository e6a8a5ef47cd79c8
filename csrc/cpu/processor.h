// Tells what the processor supports and the operating system lets the process use, on x86-64. This file does not depend
// on torch.
#pragma once

namespace deberta_fast {

// Tells whether the instructions of AVX512_BF16 may run. Other parts of AVX-512 are not asked about.
bool has_avx512_bf16();

// Tells whether the instructions of AMX-TILE and AMX-BF16 may run. The first call asks the kernel for permission to use
// tiles, which holds for all threads of the process.
bool has_amx();

}  // namespace deberta_fast
