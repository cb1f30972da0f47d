// The portable kernel table: any CPU, baseline instructions only.
#include "isa.h"

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
