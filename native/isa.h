// What every isa_*.cpp starts with: the contract and the two macros that the *.inc.h files rely on.
#pragma once

#include <cstring>

#include "half.h"
#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))

// Register tiles are arrays indexed by constants: without full unrolling they would live in memory, at half
// the speed.
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
