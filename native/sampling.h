// Choosing tokens from logits. The order and the generator are those of backends/base.SamplingRow.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace hayai {

// One row's parameters; mirrors backends/cpu.SPEC_DTYPE field by field.
struct SamplingSpec {
  float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  int32_t top_k, num_logprobs;
  int32_t plain_greedy, has_extras;
  uint64_t seed;
};
static_assert(sizeof(SamplingSpec) == 48, "the Python side packs 48 bytes");

// Sparse additions per row, compressed: row r owns [start[r], start[r+1]). Null = none for any row.
struct RowExtras {
  const int32_t *bias_start = nullptr, *bias_ids = nullptr;
  const float *bias_values = nullptr;
  const int32_t *history_start = nullptr, *history_ids = nullptr, *history_counts = nullptr;
  const uint32_t *const *masks = nullptr; // per row, null = all tokens allowed
  const int32_t *targets = nullptr;       // per row: whose log-probability is asked for, -1 = the choice's

  const uint32_t *mask(int row) const { return masks ? masks[row] : nullptr; }
  int32_t target(int row) const { return targets ? targets[row] : -1; }
};

// Masks are packed bits: bit i % 32 of word i / 32 allows token i.
inline bool allowed(const uint32_t *mask, int64_t token) { return mask[token / 32] >> (token % 32) & 1; }
// y[i] = -infinity where token first + i is not allowed, i < count; first must be a multiple of 8.
void forbid(const uint32_t *mask, int64_t first, int64_t count, float *y);
// The lowest token allowed, or 0 where none is.
int64_t lowest_allowed(const uint32_t *mask, int64_t vocab);

// The uniform number in [0, 1) for one token: 24 bits of splitmix64(splitmix64(seed) ^ position).
double uniform(uint64_t seed, uint64_t position);

struct SampleResult {
  int32_t token;
  float logprob; // NaN unless asked for
};

// Scratch of one thread; no shared state.
class Sampler {
public:
  struct Scratch {
    std::vector<float> logits, weights;
    std::vector<int32_t> order;
  };
  // logits [vocab] are left as they are. top_ids, top_logprobs: spec.num_logprobs entries. A row with a
  // target has its log-probability, and the best token of the raw logits.
  static SampleResult sample(const KernelTable &k, const SamplingSpec &spec, const RowExtras &extras, int row,
                             int64_t position, const float *logits, int64_t vocab, Scratch &scratch,
                             int32_t *top_ids, float *top_logprobs);
};

} // namespace hayai
