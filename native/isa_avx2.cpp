// The kernel table for AVX2 + FMA + F16C.
#include <immintrin.h>

#include "isa.h"

namespace hayai {
namespace avx2 {
namespace {

constexpr char kName[] = "avx2";
#include "simd_avx2.inc.h"
//
#include "simd.inc.h"
//
#include "elementwise.inc.h"
#include "gemm.inc.h"
#include "head.inc.h"
//
#include "attention.inc.h"
#include "gemm_avx2.inc.h"

#define GEMM_BLOCKS gemm_panels
#include "table.inc.h"

} // namespace
} // namespace avx2

const KernelTable &avx2_kernels() { return avx2::kTable; }

} // namespace hayai
