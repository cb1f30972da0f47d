// The kernel table for AVX-512 with VNNI.
// gcc 12's own AVX-512 headers pass deliberately undefined vectors and warn about it (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "isa.h"

namespace hayai {
namespace avx512 {
namespace {

constexpr char kName[] = "avx512";
#include "simd_avx512.inc.h"
//
#include "simd.inc.h"
//
#include "elementwise.inc.h"
#include "gemm.inc.h"
#include "head.inc.h"
//
#include "attention.inc.h"
#include "gemm_avx512.inc.h"

#define GEMM_BLOCKS gemm_any
#include "table.inc.h"

} // namespace
} // namespace avx512

const KernelTable &avx512_kernels() { return avx512::kTable; }

} // namespace hayai
