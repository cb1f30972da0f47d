// Which kernel table this machine can run: CPU features by cpuid, and whether the operating system
// saves the registers they use, by xgetbv. A feature bit alone is not enough (virtual machines, old
// kernels).
#include <cstring>

#include "kernels.h"

#if defined(HAYAI_X86)
#include <cpuid.h>
#endif

namespace hayai {
namespace {

#if defined(HAYAI_X86)
struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx); // zeros if not supported
  return r;
}

bool has(unsigned word, unsigned bits) { return (word & bits) == bits; }

// XCR0: the register state that the operating system saves.
unsigned saved_state() {
  const unsigned osxsave = 1u << 27;
  if (!has(cpuid(1, 0).ecx, osxsave)) {
    return 0;
  }
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

constexpr unsigned kYmmState = 0x06, kZmmState = 0xe6;

bool can_run_scalar() { return true; }

bool can_run_avx2() {
  const unsigned fma = 1u << 12, avx = 1u << 28, f16c = 1u << 29, avx2 = 1u << 5;
  return has(saved_state(), kYmmState) && has(cpuid(1, 0).ecx, fma | avx | f16c) &&
         has(cpuid(7, 0).ebx, avx2);
}

bool can_run_avx512() {
  const unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, vnni = 1u << 11;
  const Registers features = cpuid(7, 0);
  return can_run_avx2() && has(saved_state(), kZmmState) && has(features.ebx, f | dq | bw | vl) &&
         has(features.ecx, vnni);
}
#else
bool can_run_scalar() { return true; }
#endif

struct Candidate {
  const KernelTable &(*table)();
  bool (*can_run)();
};

// Ascending: a ceiling excludes what comes after it.
const Candidate kCandidates[] = {
    {scalar_kernels, can_run_scalar},
#if defined(HAYAI_X86)
    {avx2_kernels, can_run_avx2},
    {avx512_kernels, can_run_avx512},
#endif
};

} // namespace

const KernelTable *choose_kernels(const char *ceiling) {
  const KernelTable *best = nullptr;
  for (const Candidate &candidate : kCandidates) {
    const KernelTable &table = candidate.table();
    if (candidate.can_run()) {
      best = &table;
    }
    if (strcmp(ceiling, table.name) == 0) {
      return best;
    }
  }
  return *ceiling == '\0' ? best : nullptr;
}

} // namespace hayai
