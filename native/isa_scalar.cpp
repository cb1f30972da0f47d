// The portable kernel table: any CPU, baseline instructions only.
#include <cstring>

#include "half.h"
#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
// Register tiles are arrays indexed by constants: without full unrolling they would live in memory.
#define UNROLL _Pragma("GCC unroll 32")

namespace hayai {
namespace scalar {
namespace {

constexpr char kName[] = "scalar";
#include "simd_scalar.inc.h"
//
#include "simd.inc.h"
//
#include "elementwise.inc.h"
#include "gemm.inc.h"
#include "head.inc.h"
//
#include "attention.inc.h"

static size_t gemm_scratch_bytes(int64_t) { return 64; }
#define GEMM_BLOCKS gemm_blocks
#include "table.inc.h"

} // namespace
} // namespace scalar

const KernelTable &scalar_kernels() { return scalar::kTable; }

} // namespace hayai
