// Private to the executor's files: per-thread scratch, attention units, the work-stealing loop.
#pragma once

#include "executor.h"

namespace hayai {

// One logit row's input, quantised, in the forms that the planes of the head want it (kernels.h, HeadPlanes).
struct Executor::HeadInput {
  Region region;
  int8_t *q = nullptr; // the inputs; the outlier block's stand behind them, on a whole pair of blocks
  int8_t *outlier_q = nullptr;
  float *scale = nullptr, *low_sum = nullptr;       // of the low plane
  float *high_scale = nullptr, *high_sum = nullptr; // of the high plane
  float outlier_scale = 0, outlier_sum = 0;
  ScreenTerms terms{};

  explicit HeadInput(int64_t max_cols) : region(size_t(max_cols) * 2 + 1024, false) {
    const size_t floats = round_up(size_t(max_cols) / kBlockInputs, 16);
    q = reinterpret_cast<int8_t *>(region.data());
    outlier_q = q + round_up(size_t(max_cols), kCacheLine);
    scale = reinterpret_cast<float *>(outlier_q + kCacheLine);
    low_sum = scale + floats;
    high_scale = low_sum + floats;
    high_sum = high_scale + floats;
  }
};

// Groups of the low plane that are made and multiplied at a time: the products of some tables take two.
constexpr int64_t kLowGroups = 2;

// One thread's scratch, so that phases allocate nothing.
struct Executor::ThreadState {
  Region region;
  float *row = nullptr; // one input vector
  int8_t *q = nullptr;
  float *scale = nullptr, *sum = nullptr;
  float *y = nullptr; // chunk results: [tokens][chunk rows]
  uint8_t *gemm = nullptr;
  uint8_t *low = nullptr; // groups of the head's low plane
  float *attend = nullptr, *attend_out = nullptr, *attend_stats = nullptr;
  float *zeros = nullptr;
  std::vector<Candidate> candidates;   // of all screened rows, one after the other
  std::vector<size_t> candidate_start; // where each row's begin
  HeadInput head;
  Sampler::Scratch sampler;

  ThreadState(const KernelTable &k, int64_t max_cols, int64_t tokens, int64_t max_chunk, int64_t per_kv,
              int64_t value_dim, int64_t vocab)
      : head(max_cols) {
    const size_t cols = size_t(max_cols), blocks = cols / kBlockInputs;
    const size_t y_floats = size_t(tokens) * round_up(size_t(max_chunk), 16);
    const size_t attend_floats = attend_scratch_floats(int(per_kv), int(value_dim));
    const size_t out_floats = size_t(kMaxQueryBlock) * size_t(per_kv) * size_t(value_dim);
    const size_t sizes[] = {cols * 4,
                            cols,
                            blocks * 4,
                            blocks * 4,
                            y_floats * 4,
                            k.gemm_scratch_bytes(max_cols),
                            attend_floats * 4,
                            out_floats * 4,
                            size_t(kMaxQueryBlock) * size_t(per_kv) * 8,
                            cols * 4,
                            kLowGroups * group_bytes(kQ4_0, k.group_rows, max_cols)};
    size_t total = 0;
    for (size_t s : sizes) total += round_up(s, kCacheLine) + kCacheLine;
    region = Region(total, false);
    uint8_t *at = region.data();
    size_t i = 0;
    auto next = [&] {
      uint8_t *p = at;
      at += round_up(sizes[i++], kCacheLine) + kCacheLine;
      return p;
    };
    auto floats = [&] { return reinterpret_cast<float *>(next()); };
    row = floats();
    q = reinterpret_cast<int8_t *>(next());
    scale = floats();
    sum = floats();
    y = floats();
    gemm = next();
    attend = floats();
    attend_out = floats();
    attend_stats = floats();
    zeros = floats();
    low = next();
    candidates.reserve(size_t(vocab) / 8);
  }
};

// A piece of attention work of one sequence, for every kv head: queries [token, token + num_queries),
// splits [first_split, last_split). part >= 0: one query, each split is written on its own, to be merged
// in order by who finishes the last one; -1: the splits are merged in place.
struct Executor::Unit {
  int32_t seq, token, num_queries, position;
  int32_t first_split, last_split;
  int32_t part;
};

// What one thread knows about the best row of one logit row.
struct Executor::HeadRow {
  float best = 0, first_exact = 0;
  int64_t row = 0;
};

inline Executor::HeadRow &Executor::head_row(int thread, int i) {
  return head_rows_[size_t(thread) * kRowTile + size_t(i)];
}

// Chunks of a phase: a thread does the first 70 % of its own share without any atomic operation, then
// takes the rest of its share from the front, then its neighbours' from the back. Owner and thief both
// keep reading linearly. One core is often some per cent slower than another; without stealing that is
// waiting time in every phase (measured 0.1 to 0.2 ms per token; docs/log.md).
template <class Work> void Executor::for_chunks(int thread, int range_index, int64_t count, Work &&work) {
  if (active_ == 1) {
    for (int64_t i = 0; i < count; i++) work(i);
    return;
  }
  const int64_t fixed = static_end(count, thread);
  for (int64_t i = share_begin(count, thread); i < fixed; i++) work(i);
  WorkRange *ranges = &ranges_[size_t(range_index) * size_t(pool_.max_threads())];
  for (int64_t i; (i = take(ranges[thread], true)) >= 0;) work(i);
  for (int other = 1; other < active_; other++)
    for (int64_t i; (i = take(ranges[(thread + other) % active_], false)) >= 0;) work(i);
}

} // namespace hayai
