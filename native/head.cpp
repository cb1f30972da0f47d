// The output head: which rows are screened, which need all logits, and the choice of tokens.
//
// Screening (greedy rows, Q8_0 head): a first pass over the 4-bit high plane plus one block that holds
// the plane's error in 32 outlier inputs gives, for every row i of the vocabulary,
//   |logit_i - estimate_i| <= rest_error_i * ||a_R|| + outlier_error_i * ||a_S||
//                             + max||code|| * ||a_S - a'_S|| + rounding
// by Cauchy-Schwarz (R: the other inputs, S: the outlier inputs, a' their requantised values). Rows whose
// upper bound reaches the best exact logit known are scored exactly; the largest is the argmax, by
// proof. `rounding` covers the fp32 chains: gamma_n * ||w|| * ||a|| with n < 128 terms.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "executor_state.h"

namespace hayai {

namespace {

constexpr float kNormSlack = 1.0001f; // room for fp32 rounding of the norms themselves
constexpr float kChainRounding = 1.6e-5f;
constexpr size_t kCandidateBatch = 16;
constexpr float kOutlierZero = -7.5f, kPlaneZero = -120.5f; // middle of the lower 4 bits: 16 * -8 + 7.5

} // namespace

void Executor::plan_rows() {
  screened_rows_.clear();
  full_rows_.clear();
  const Phase *head = nullptr;
  for (const Phase &p : phases_)
    if (p.kind == PhaseKind::kHead) head = &p;
  for (int r = 0; r < args_->num_rows; r++) {
    const bool screen = head && head->head && args_->sampling[r].plain_greedy && !args_->out_logits &&
                        !(args_->extras.masks && args_->extras.masks[r]);
    (screen ? screened_rows_ : full_rows_).push_back(r);
  }
}

void Executor::lm_head(int thread, const Phase &p) {
  if (!screened_rows_.empty()) {
    screened_pass(thread, p);
    pool_.barrier(thread);
    rescore(thread, p);
    pool_.barrier(thread);
    if (thread == 0)
      for (size_t i = 0; i < screened_rows_.size(); i++) {
        const HeadRow *best = &head_rows_[i];
        for (int t = 1; t < active_; t++) {
          const HeadRow &other = head_rows_[size_t(t) * size_t(max_rows_) + i];
          if (other.best > best->best || (other.best == best->best && other.row < best->row)) best = &other;
        }
        args_->out_tokens[screened_rows_[i]] = int32_t(best->row);
      }
  }
  if (!full_rows_.empty()) {
    full_pass(thread, p);
    pool_.barrier(thread);
    sample_rows(thread, p);
  }
}

// The normalised fp32 input of one logit row.
const float *Executor::head_row_input(int thread, const Phase &p, int row) {
  ThreadState &s = *threads_[size_t(thread)];
  const float *x = p.x.data + args_->logit_rows[row] * p.x.stride;
  if (!p.norm.weight) return x;
  k_.rms_norm(x, p.norm.weight, p.norm.offset, p.norm.eps, p.x.width, s.row);
  return s.row;
}

// ---------------------------------------------------------------- screening

// From the quantised input (q, scale): what the outlier block is multiplied with, and the bound's terms.
void Executor::outlier_block(const ScreenedHead &head, const float *dequantised, ScreenTerms &terms,
                             float *values) const {
  float all = 0, outliers = 0;
  for (int64_t i = 0; i < head.planes.cols; i++) all += dequantised[i] * dequantised[i];
  for (int i = 0; i < ScreenedHead::kOutliers; i++) {
    values[i] = dequantised[head.outlier_inputs[i]];
    outliers += values[i] * values[i];
  }
  const float rest = std::max(0.f, all - outliers);
  terms.rest_norm = std::sqrt(rest) * kNormSlack + 1e-5f * std::sqrt(all);
  terms.outlier_norm = std::sqrt(outliers) * kNormSlack;
  terms.slack = kChainRounding * head.max_row_norm * std::sqrt(all) + 1e-6f;
}

void Executor::screened_pass(int thread, const Phase &p) {
  const ScreenedHead &head = *p.head;
  ThreadState &s = *threads_[size_t(thread)];
  const int64_t cols = head.planes.cols, blocks = cols / kBlockInputs, wide = cols + kBlockInputs;
  const int rows = int(screened_rows_.size());
  const size_t group_size = group_bytes(kQ4_0, k_.group_rows, wide);

  // One row's quantised input with the outlier block behind it; sum[] holds the zero-point terms.
  auto prepare = [&](int i) {
    const float *x = head_row_input(thread, p, screened_rows_[size_t(i)]);
    k_.quantize(x, cols, 1.f, s.q, s.scale, s.sum);
    for (int64_t c = 0; c < cols; c++) s.row2[c] = float(s.q[c]) * s.scale[c / kBlockInputs];
    alignas(64) float values[ScreenedHead::kOutliers];
    ScreenTerms &terms = terms_[size_t(i)];
    ScreenTerms own;
    outlier_block(head, s.row2, own, values);
    k_.quantize(values, ScreenedHead::kOutliers, 1.f, s.q + cols, s.scale + blocks, s.sum + blocks);
    float lost = 0;
    for (int j = 0; j < ScreenedHead::kOutliers; j++) {
      const float e = values[j] - s.scale[blocks] * float(s.q[cols + j]);
      lost += e * e;
    }
    own.slack += std::sqrt(lost) * kNormSlack * head.max_code_norm;
    for (int64_t b = 0; b < blocks; b++) {
      s.sum[b] *= kPlaneZero;
      s.scale[b] *= 16.f;
    }
    s.sum[blocks] *= kOutlierZero;
    terms = own;
  };

  HeadRow *best = &head_rows_[size_t(thread) * size_t(max_rows_)];
  for (int i = 0; i < rows; i++) best[i] = {-INFINITY, -INFINITY, 0};
  // y holds estimates of rows [first, first + n); padding rows are left out.
  auto offer = [&](int i, int64_t first_group, int64_t groups, const float *y, const ScreenTerms &terms) {
    const int64_t first = first_group * k_.group_rows;
    const int64_t n = std::min(groups * k_.group_rows, head.vocab - first);
    const int64_t top = k_.screen_bounds(y, head.rest_error + first, head.outlier_error + first, terms,
                                         groups * k_.group_rows, bounds_ + i * padded_vocab_ + first);
    if (top < n && (y[top] > best[i].best)) {
      best[i].best = y[top];
      best[i].row = first + top;
    }
  };

  if (rows == 1) {
    prepare(0);
    const ScreenTerms terms = terms_[0];
    const ActRow a{s.q, s.scale, s.sum, nullptr};
    for_chunks(thread, p, 0, [&](int64_t chunk) {
      const int64_t first = chunk * p.chunk_groups, groups = std::min(p.chunk_groups, head.groups - first);
      k_.gemv[kQ4_0](head.planes.high + size_t(first) * group_size, groups, wide, a, s.y);
      offer(0, first, groups, s.y, terms);
    });
  } else {
    const ActStore &store = stores_[0];
    const int64_t tile_blocks = blocks + 1;
    for (int64_t tile = thread; tile * kTileTokens < rows; tile += active_)
      for (int slot = 0; slot < kTileTokens; slot++) {
        const int i = int(tile) * kTileTokens + slot;
        if (i < rows) prepare(i);
        for (int64_t b = 0; b < tile_blocks; b++) {
          const int64_t at = tile * tile_blocks + b;
          for (int c = 0; c < 8; c++) {
            int8_t *to = store.q + size_t(at) * kBlockInputs * kTileTokens + c * 16 + slot * 4;
            if (i < rows)
              std::memcpy(to, s.q + b * kBlockInputs + c * 4, 4);
            else
              std::memset(to, 0, 4);
          }
          store.scale[at * kTileTokens + slot] = i < rows ? s.scale[b] : 0;
          store.sum[at * kTileTokens + slot] = i < rows ? s.sum[b] : 0;
        }
      }
    pool_.barrier(thread);
    const ActBatch a{store.q, store.scale, store.sum, nullptr, 0};
    const int64_t ldy = int64_t(round_up(size_t(p.chunk_groups * k_.group_rows), 16));
    for_chunks(thread, p, 0, [&](int64_t chunk) {
      const int64_t first = chunk * p.chunk_groups, groups = std::min(p.chunk_groups, head.groups - first);
      const uint8_t *w = head.planes.high + size_t(first) * group_size;
      k_.gemm[kQ4_0](w, groups, wide, a, rows, s.y, ldy, s.gemm, w + size_t(groups) * group_size);
      for (int i = 0; i < rows; i++) offer(i, first, groups, s.y + i * ldy, terms_[size_t(i)]);
    });
  }
  // An exact score of this thread's best estimate is the first threshold.
  for (int i = 0; i < rows; i++) exact_rows(thread, p, i, &best[i].row, 1, &best[i].first_exact);
  for (int i = 0; i < rows; i++) best[i].best = best[i].first_exact;
}

// Exact logits of a few rows for screened row i (same bits as head_gemv).
void Executor::exact_rows(int thread, const Phase &p, int i, const int64_t *rows, int64_t n, float *y) {
  ThreadState &s = *threads_[size_t(thread)];
  if (s.exact_for != i || s.exact_step != step_count_) {
    const ScreenedHead &head = *p.head;
    const float *x = head_row_input(thread, p, screened_rows_[size_t(i)]);
    k_.quantize(x, head.planes.cols, -128.f, s.q, s.scale, s.offset);
    s.exact_for = i;
    s.exact_step = step_count_;
  }
  k_.head_rows(p.head->planes, rows, n, s.q, s.scale, s.offset, y);
}

// Append the rows of [begin, end) whose bound reaches the threshold. Few do, so whole runs are ruled out at once.
static void collect_candidates(const float *bound, int64_t begin, int64_t end, float threshold,
                               std::vector<int64_t> &found) {
  constexpr int64_t kRun = 64;
  for (int64_t at = begin; at < end; at += kRun) {
    const int64_t stop = std::min(end, at + kRun);
    int any = 0;
    for (int64_t row = at; row < stop; row++) any |= bound[row] >= threshold;
    if (any)
      for (int64_t row = at; row < stop; row++)
        if (bound[row] >= threshold) found.push_back(row);
  }
}

// The rows that may still win are collected by all threads, each from its share of the vocabulary, and then
// scored in batches that any thread takes: how many there are differs much between the shares. The
// threshold of a row rises as its candidates are scored.
void Executor::rescore(int thread, const Phase &p) {
  const ScreenedHead &head = *p.head;
  ThreadState &s = *threads_[size_t(thread)];
  const size_t rows = screened_rows_.size();
  const int64_t begin = head.vocab * thread / active_, end = head.vocab * (thread + 1) / active_;
  s.candidates.clear();
  s.candidate_start.assign(1, 0);
  for (size_t i = 0; i < rows; i++) {
    float threshold = -INFINITY;
    for (int t = 0; t < active_; t++)
      threshold = std::max(threshold, head_rows_[size_t(t) * size_t(max_rows_) + i].first_exact);
    if (thread == 0) thresholds_[i].store(threshold, std::memory_order_relaxed);
    collect_candidates(bounds_ + int64_t(i) * padded_vocab_, begin, end, threshold, s.candidates);
    s.candidate_start.push_back(s.candidates.size());
  }
  pool_.barrier(thread);

  int64_t mine = next_candidate_.fetch_add(1, std::memory_order_relaxed), batch = 0;
  for (size_t i = 0; i < rows; i++)
    for (int t = 0; t < active_; t++) {
      const ThreadState &other = *threads_[size_t(t)];
      for (size_t at = other.candidate_start[i]; at < other.candidate_start[i + 1];
           at += kCandidateBatch, batch++) {
        if (batch < mine) continue;
        const size_t n = std::min(kCandidateBatch, other.candidate_start[i + 1] - at);
        score_candidates(thread, p, i, other.candidates.data() + at, n);
        mine = next_candidate_.fetch_add(1, std::memory_order_relaxed);
      }
    }
}

void Executor::score_candidates(int thread, const Phase &p, size_t i, const int64_t *candidates, size_t n) {
  HeadRow &best = head_rows_[size_t(thread) * size_t(max_rows_) + i];
  const float *bound = bounds_ + int64_t(i) * padded_vocab_;
  float threshold = thresholds_[i].load(std::memory_order_relaxed);
  int64_t rows[kCandidateBatch], count = 0;
  for (size_t j = 0; j < n; j++)
    if (bound[candidates[j]] >= threshold) rows[count++] = candidates[j];
  if (count == 0) return;
  float y[kCandidateBatch];
  exact_rows(thread, p, int(i), rows, count, y);
  for (int64_t j = 0; j < count; j++)
    if (y[j] > best.best || (y[j] == best.best && rows[j] < best.row)) {
      best.best = y[j];
      best.row = rows[j];
    }
  while (best.best > threshold &&
         !thresholds_[i].compare_exchange_weak(threshold, best.best, std::memory_order_relaxed)) {
  }
  survivors_.fetch_add(count, std::memory_order_relaxed);
}

// ---------------------------------------------------------------- all logits

void Executor::full_pass(int thread, const Phase &p) {
  ThreadState &s = *threads_[size_t(thread)];
  const int rows = int(full_rows_.size());
  const int64_t cols = p.head ? p.head->planes.cols : p.weight.cols, blocks = cols / kBlockInputs;
  const int64_t total_groups = p.head ? p.head->groups : p.weight.groups;
  const bool is_float = !p.head && layout_is_float(p.weight.layout);
  const float factor = p.head ? -128.f : sum_factor(p.weight.layout);
  if (rows == 1) {
    const float *x = head_row_input(thread, p, full_rows_[0]);
    if (!is_float) k_.quantize(x, cols, factor, s.q, s.scale, s.sum);
    const ActRow a{s.q, s.scale, s.sum, x};
    for_chunks(thread, p, 1, [&](int64_t chunk) {
      const int64_t first = chunk * p.chunk_groups, groups = std::min(p.chunk_groups, total_groups - first);
      float *y = logits_ + first * k_.group_rows;
      if (p.head)
        k_.head_gemv(p.head->planes, first, groups, s.q, s.scale, s.sum, y);
      else
        k_.gemv[p.weight.layout](p.weight.data + size_t(first) * p.weight.group_bytes, groups, cols, a, y);
      if (p.softcap > 0) k_.softcap(y, p.softcap, groups * k_.group_rows, y);
    });
    return;
  }
  const ActStore &store = stores_[0];
  for (int64_t tile = thread; tile * kTileTokens < rows; tile += active_)
    for (int slot = 0; slot < kTileTokens; slot++) {
      const int i = int(tile) * kTileTokens + slot;
      const float *x = i < rows ? head_row_input(thread, p, full_rows_[size_t(i)]) : s.zeros;
      if (is_float) {
        if (i < rows) std::memcpy(store.x + i * store.ldx, x, size_t(cols) * sizeof(float));
        continue;
      }
      const int64_t at = tile * blocks;
      k_.quantize_tile(x, cols, factor, slot, store.q + size_t(at) * kBlockInputs * kTileTokens,
                       store.scale + at * kTileTokens, store.sum + at * kTileTokens);
    }
  pool_.barrier(thread);
  const ActBatch a{store.q, store.scale, store.sum, store.x, store.ldx};
  for_chunks(thread, p, 1, [&](int64_t chunk) {
    const int64_t first = chunk * p.chunk_groups, groups = std::min(p.chunk_groups, total_groups - first);
    float *y = logits_ + first * k_.group_rows;
    if (p.head)
      k_.head_gemm(p.head->planes, first, groups, a, rows, y, padded_vocab_, s.gemm);
    else
      k_.gemm[p.weight.layout](p.weight.data + size_t(first) * p.weight.group_bytes, groups, cols, a, rows, y,
                               padded_vocab_, s.gemm, nullptr);
    if (p.softcap > 0)
      for (int i = 0; i < rows; i++)
        k_.softcap(y + i * padded_vocab_, p.softcap, groups * k_.group_rows, y + i * padded_vocab_);
  });
}

void Executor::sample_rows(int thread, const Phase &) {
  ThreadState &s = *threads_[size_t(thread)];
  for (size_t i = size_t(thread); i < full_rows_.size(); i += size_t(active_)) {
    const int row = full_rows_[i];
    const float *logits = logits_ + int64_t(i) * padded_vocab_;
    if (args_->out_logits)
      std::memcpy(args_->out_logits + row * vocab_, logits, size_t(vocab_) * sizeof(float));
    const int64_t position = args_->positions[args_->logit_rows[row]];
    const SampleResult result =
        Sampler::sample(k_, args_->sampling[row], args_->extras, row, position, logits, vocab_, s.sampler,
                        args_->out_top_ids + int64_t(row) * args_->max_top,
                        args_->out_top_logprobs + int64_t(row) * args_->max_top);
    args_->out_tokens[row] = result.token;
    args_->out_logprobs[row] = result.logprob;
  }
}

} // namespace hayai
