// The output head: which rows are screened, which need all logits, and the choice of tokens.
//
// Screening (greedy rows, Q8_0 head): a first pass over the 4-bit high plane plus the outlier plane gives
// every row of the vocabulary an estimate and a bound of its error (pack.h). Rows whose upper bound reaches
// the best exact logit known are scored exactly; the largest is the argmax, by proof. Where a mask forbids
// rows, they have neither an estimate nor a bound, and are not scored.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "executor_state.h"

namespace hayai {

namespace {

constexpr double kNormSlack = 1.0001; // room for fp32 rounding of the bound itself
constexpr size_t kCandidateBatch = 64;
constexpr float kLowZero = -7.5f, kHighZero = -120.5f; // kernels.h, HeadPlanes

// Estimate and exact logit share the high part's bits; they differ by the rounding of the low part's chains,
// of the outlier block, and of one addition each. A low block's terms add up to at most (15 + 7.5) * d *
// sqrt(32) * ||a||, 3 times its share of max_row_norm. Besides the chains, 32 roundings are more than enough.
double chain_rounding(int64_t blocks) { return 3 * 0x1p-24 * double(blocks + 32); }

} // namespace

void Executor::plan_rows() {
  screened_rows_.clear();
  full_rows_.clear();
  const Phase *head = nullptr;
  for (const Phase &p : phases_)
    if (p.kind == PhaseKind::kHead) head = &p;
  // A soft cap may round two logits to one value, and then the lower id wins: only all logits tell.
  const bool screened = head && head->head && head->softcap <= 0;
  for (int r = 0; r < args_->num_rows; r++) {
    const bool screen =
        screened && args_->sampling[r].plain_greedy && !args_->out_logits && args_->extras.target(r) < 0;
    (screen ? screened_rows_ : full_rows_).push_back(r);
  }
  row_tiles_.clear();
  plan_row_tiles(screened_rows_, true);
  plan_row_tiles(full_rows_, false);
}

// As even as whole tiles of tokens allow, so that no tile is left with a row or two.
void Executor::plan_row_tiles(const std::vector<int32_t> &rows, bool screened) {
  const int count = int(rows.size());
  if (count == 0) return;
  const int tiles = (count + kRowTile - 1) / kRowTile;
  const int most = int(round_up(size_t((count + tiles - 1) / tiles), kTileTokens));
  for (int at = 0; at < count; at += most)
    row_tiles_.push_back({rows.data() + at, std::min(most, count - at), screened});
}

void Executor::lm_head(int thread, const Phase &p) {
  for (size_t i = 0; i < row_tiles_.size(); i++) {
    if (i > 0) { // what the last tile left is still being read, and its chunks are used up
      reset_range(thread, p);
      pool_.barrier(thread);
    }
    const RowTile &tile = row_tiles_[i];
    if (tile.screened) {
      screened_pass(thread, p, tile);
      pool_.barrier(thread);
      rescore(thread, p, tile);
      pool_.barrier(thread);
      if (thread == 0) store_best(tile);
    } else {
      full_pass(thread, p, tile);
      pool_.barrier(thread);
      sample_rows(thread, tile);
    }
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

// ---------------------------------------------------------------- the planes' inputs

// Quantise one logit row for all planes, and the terms of its bound (pack.h). The norms are taken in double:
// what the outlier inputs leave over is a difference that may lose most of its digits.
void Executor::prepare_planes(int thread, const Phase &p, int row, HeadInput &input) {
  const ScreenedHead &head = *p.head;
  ThreadState &s = *threads_[size_t(thread)];
  const int64_t cols = head.planes.cols, blocks = cols / kBlockInputs;
  k_.quantize(head_row_input(thread, p, row), cols, 1.f, input.q, input.scale, s.sum);
  for (int64_t b = 0; b < blocks; b++) {
    input.high_scale[b] = input.scale[b] * 16.f;
    input.high_sum[b] = s.sum[b] * kHighZero;
    input.low_sum[b] = s.sum[b] * kLowZero;
  }
  double all = 0, outliers = 0, lost = 0;
  for (int64_t b = 0; b < blocks; b++) {
    int squares = 0;
    for (int64_t c = b * kBlockInputs; c < (b + 1) * kBlockInputs; c++)
      squares += int(input.q[c]) * int(input.q[c]);
    all += double(input.scale[b]) * input.scale[b] * squares;
  }
  alignas(64) float values[kOutliers];
  for (int i = 0; i < kOutliers; i++) {
    const int32_t at = head.outlier_inputs[i];
    const double value = double(input.q[at]) * input.scale[at / kBlockInputs];
    values[i] = float(value);
    outliers += value * value;
  }
  k_.quantize(values, kOutliers, kLowZero, input.outlier_q, &input.outlier_scale, &input.outlier_sum);
  for (int i = 0; i < kOutliers; i++) {
    const double e = values[i] - double(input.outlier_scale) * input.outlier_q[i];
    lost += e * e;
  }
  const double norm = std::sqrt(all);
  input.terms.rest_norm = float(std::sqrt(std::max(0.0, all - outliers)) * kNormSlack + 1e-6 * norm);
  input.terms.outlier_norm = float(std::sqrt(outliers) * kNormSlack);
  input.terms.slack = float(chain_rounding(blocks) * head.max_row_norm * norm +
                            std::sqrt(lost) * kNormSlack * head.max_code_norm + 1e-6);
}

// A single row is prepared by every thread for itself; several are shared.
Executor::HeadInput &Executor::head_input(int thread, int i, const RowTile &tile) {
  return tile.count == 1 ? threads_[size_t(thread)]->head : *head_inputs_[size_t(i)];
}

// Quantise all rows; several also into tiles, for the products of many tokens: the high plane's in store 0,
// the outlier plane's or the low plane's in store 1.
void Executor::prepare_rows(int thread, const Phase &p, const RowTile &tile) {
  if (tile.count == 1) {
    prepare_planes(thread, p, tile.rows[0], threads_[size_t(thread)]->head);
    return;
  }
  const int64_t blocks = p.head->planes.cols / kBlockInputs;
  const int count = tile.count;
  const float *zeros = threads_[size_t(thread)]->zeros; // a missing token: zero codes, scales and sums
  const int8_t *no_q = reinterpret_cast<const int8_t *>(zeros);
  for (int four = thread; four * kTileTokens < count; four += active_)
    for (int slot = 0; slot < kTileTokens; slot++) {
      const int i = four * kTileTokens + slot;
      if (i >= count) {
        fill_slot(stores_[0], four, slot, blocks, no_q, zeros, zeros);
        fill_slot(stores_[1], four, slot, tile.screened ? 1 : blocks, no_q, zeros, zeros);
        continue;
      }
      HeadInput &input = *head_inputs_[size_t(i)];
      prepare_planes(thread, p, tile.rows[i], input);
      fill_slot(stores_[0], four, slot, blocks, input.q, input.high_scale, input.high_sum);
      if (tile.screened)
        fill_slot(stores_[1], four, slot, 1, input.outlier_q, &input.outlier_scale, &input.outlier_sum);
      else
        fill_slot(stores_[1], four, slot, blocks, input.q, input.scale, input.low_sum);
    }
  pool_.barrier(thread);
}

// One token's place in a tile (kernels.h, ActBatch).
void Executor::fill_slot(const ActStore &store, int tile, int slot, int64_t blocks, const int8_t *q,
                         const float *scale, const float *sum) {
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t at = tile * blocks + b;
    for (int c = 0; c < 8; c++)
      std::memcpy(store.q + size_t(at) * kBlockInputs * kTileTokens + c * 16 + slot * 4,
                  q + b * kBlockInputs + c * 4, 4);
    store.scale[at * kTileTokens + slot] = scale[b];
    store.sum[at * kTileTokens + slot] = sum[b];
  }
}

// High parts of a chunk's logits, of all rows, into logits_.
void Executor::high_parts(int thread, const Phase &p, const RowTile &tile, int64_t first, int64_t groups) {
  ThreadState &s = *threads_[size_t(thread)];
  const int64_t cols = p.head->planes.cols;
  const size_t size = group_bytes(kQ4_0, k_.group_rows, cols);
  const uint8_t *w = p.head->planes.high + size_t(first) * size;
  float *y = logits_ + first * k_.group_rows;
  if (tile.count == 1) {
    k_.gemv[kQ4_0](w, groups, cols, {s.head.q, s.head.high_scale, s.head.high_sum, nullptr}, y);
    return;
  }
  const ActBatch a{stores_[0].q, stores_[0].scale, stores_[0].sum, nullptr, 0};
  k_.gemm[kQ4_0](w, groups, cols, a, tile.count, y, padded_vocab_, s.gemm, w + size_t(groups) * size);
}

// ---------------------------------------------------------------- screening

void Executor::screened_pass(int thread, const Phase &p, const RowTile &tile) {
  const ScreenedHead &head = *p.head;
  ThreadState &s = *threads_[size_t(thread)];
  const int rows = tile.count;
  const size_t outlier_size = group_bytes(kQ4_0, k_.group_rows, kBlockInputs);
  if (thread == 0) next_candidate_.store(0, std::memory_order_relaxed);
  prepare_rows(thread, p, tile);
  HeadRow *best = &head_row(thread, 0);
  for (int i = 0; i < rows; i++) best[i] = {-INFINITY, -INFINITY, 0};
  const int64_t ldy = int64_t(round_up(size_t(p.chunk_groups * k_.group_rows), 16));
  for_chunks(thread, p.range_index, p.num_chunks, [&](int64_t chunk) {
    const int64_t first = chunk * p.chunk_groups, groups = std::min(p.chunk_groups, head.groups - first);
    const int64_t first_row = first * k_.group_rows;
    const int64_t n = std::min(groups * k_.group_rows, head.vocab - first_row); // padding rows are left out
    high_parts(thread, p, tile, first, groups);
    const uint8_t *w = head.planes.outlier + size_t(first) * outlier_size;
    if (rows == 1) {
      k_.gemv[kQ4_0](w, groups, kBlockInputs,
                     {s.head.outlier_q, &s.head.outlier_scale, &s.head.outlier_sum, nullptr}, s.y);
    } else {
      const ActBatch a{stores_[1].q, stores_[1].scale, stores_[1].sum, nullptr, 0};
      k_.gemm[kQ4_0](w, groups, kBlockInputs, a, rows, s.y, ldy, s.gemm, nullptr);
    }
    for (int i = 0; i < rows; i++) {
      float *estimate = s.y + i * ldy;
      k_.add(estimate, logits_of(i) + first_row, n, estimate);
      if (const uint32_t *mask = args_->extras.mask(tile.rows[i])) forbid(mask, first_row, n, estimate);
      const int64_t top =
          k_.screen_bounds(estimate, head.rest_error + first_row, head.outlier_error + first_row,
                           head_input(thread, i, tile).terms, n, bounds_ + i * padded_vocab_ + first_row);
      if (estimate[top] > best[i].best) {
        best[i].best = estimate[top];
        best[i].row = first_row + top;
        best[i].first_exact = logits_of(i)[best[i].row];
      }
    }
  });
  // The exact score of this thread's best estimate is the first threshold.
  for (int i = 0; i < rows; i++) {
    if (best[i].best > -INFINITY)
      low_parts(thread, p, head_input(thread, i, tile), &best[i].row, 1, &best[i].first_exact);
    best[i].best = best[i].first_exact;
    if (std::isnan(best[i].best)) best[i] = {-INFINITY, -INFINITY, 0}; // the sum overflowed: no threshold
  }
}

// Add the low part to the high parts y of some rows: their exact logits. Rows that survive the screening are
// few and scattered, and the hardware cannot foresee them: the next ones are fetched meanwhile.
void Executor::low_parts(int thread, const Phase &p, const HeadInput &input, const int64_t *rows, int64_t n,
                         float *y) {
  const HeadPlanes &planes = p.head->planes;
  const ActRow a{input.q, input.scale, input.low_sum, nullptr};
  const int64_t g = k_.group_rows;
  const size_t bytes = head_low_row_bytes(planes.cols);
  uint8_t *group = threads_[size_t(thread)]->low;
  alignas(64) float low[16];
  for (int64_t at = 0; at < n; at += g) {
    for (int64_t i = at + g; i < std::min(n, at + 2 * g); i++)
      for (size_t line = 0; line < bytes; line += kCacheLine)
        __builtin_prefetch(planes.low + size_t(rows[i]) * bytes + line);
    const int64_t count = std::min(g, n - at);
    k_.low_group(planes, rows + at, 0, count, group);
    k_.gemv[kQ4_0](group, 1, planes.cols, a, low);
    k_.add(y + at, low, count, y + at);
  }
}

// Append the rows of [begin, end) whose bound reaches the threshold, with what scoring them will need: by
// then another thread may do it, and the arrays lie in this one's cache. Few rows reach it, so whole runs are
// ruled out at once. A bound that is NaN rules nothing out.
void Executor::collect_candidates(const float *bound, const float *high, int64_t begin, int64_t end,
                                  float threshold, std::vector<Candidate> &found) {
  constexpr int64_t kRun = 64;
  for (int64_t at = begin; at < end; at += kRun) {
    const int64_t stop = std::min(end, at + kRun);
    int any = 0;
    for (int64_t row = at; row < stop; row++) any |= !(bound[row] < threshold);
    if (any)
      for (int64_t row = at; row < stop; row++)
        if (!(bound[row] < threshold)) found.push_back({row, bound[row], high[row]});
  }
}

// The rows that may still win are collected by all threads, each from its share of the vocabulary, and then
// scored in batches that any thread takes: how many there are differs much between the shares. The
// threshold of a row rises as its candidates are scored.
void Executor::rescore(int thread, const Phase &p, const RowTile &tile) {
  const ScreenedHead &head = *p.head;
  ThreadState &s = *threads_[size_t(thread)];
  const int rows = tile.count;
  const int64_t begin = head.vocab * thread / active_, end = head.vocab * (thread + 1) / active_;
  s.candidates.clear();
  s.candidate_start.assign(1, 0);
  for (int i = 0; i < rows; i++) {
    float threshold = -INFINITY;
    for (int t = 0; t < active_; t++) threshold = std::max(threshold, head_row(t, i).first_exact);
    if (thread == 0) thresholds_[i].store(threshold, std::memory_order_relaxed);
    collect_candidates(bounds_ + i * padded_vocab_, logits_of(i), begin, end, threshold, s.candidates);
    s.candidate_start.push_back(s.candidates.size());
  }
  pool_.barrier(thread);

  int64_t mine = next_candidate_.fetch_add(1, std::memory_order_relaxed), batch = 0;
  for (int i = 0; i < rows; i++)
    for (int t = 0; t < active_; t++) {
      const ThreadState &other = *threads_[size_t(t)];
      const size_t first = other.candidate_start[size_t(i)], stop = other.candidate_start[size_t(i) + 1];
      for (size_t at = first; at < stop; at += kCandidateBatch, batch++) {
        if (batch < mine) continue;
        const size_t n = std::min(kCandidateBatch, stop - at);
        score_candidates(thread, p, tile, i, other.candidates.data() + at, n);
        mine = next_candidate_.fetch_add(1, std::memory_order_relaxed);
      }
    }
}

void Executor::score_candidates(int thread, const Phase &p, const RowTile &tile, int i,
                                const Candidate *candidates, size_t n) {
  HeadRow &best = head_row(thread, i);
  float threshold = thresholds_[i].load(std::memory_order_relaxed);
  int64_t rows[kCandidateBatch], count = 0;
  float y[kCandidateBatch];
  const uint32_t *mask = args_->extras.mask(tile.rows[i]);
  for (size_t j = 0; j < n; j++)
    if (!(candidates[j].bound < threshold) && (!mask || allowed(mask, candidates[j].row))) {
      rows[count] = candidates[j].row;
      y[count++] = candidates[j].high;
    }
  if (count == 0) return;
  low_parts(thread, p, head_input(thread, i, tile), rows, count, y);
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

// The best row that any thread has found, per logit row.
void Executor::store_best(const RowTile &tile) {
  for (int i = 0; i < tile.count; i++) {
    const HeadRow *best = &head_row(0, i);
    for (int t = 1; t < active_; t++) {
      const HeadRow &other = head_row(t, i);
      if (other.best > best->best || (other.best == best->best && other.row < best->row)) best = &other;
    }
    const uint32_t *mask = args_->extras.mask(tile.rows[i]);
    const bool found = !mask || allowed(mask, best->row);
    args_->out_tokens[tile.rows[i]] = int32_t(found ? best->row : lowest_allowed(mask, vocab_));
  }
}

// ---------------------------------------------------------------- all logits

void Executor::full_pass(int thread, const Phase &p, const RowTile &tile) {
  if (p.head)
    prepare_rows(thread, p, tile);
  else
    prepare_plain(thread, p, tile);
  const int64_t total_groups = p.head ? p.head->groups : p.weight.groups;
  for_chunks(thread, p.range_index, p.num_chunks, [&](int64_t chunk) {
    const int64_t first = chunk * p.chunk_groups, groups = std::min(p.chunk_groups, total_groups - first);
    const int64_t first_row = first * k_.group_rows, n = std::min(groups * k_.group_rows, vocab_ - first_row);
    if (p.head)
      high_parts(thread, p, tile, first, groups);
    else
      plain_logits(thread, p, tile, first, groups);
    if (p.head) low_chunk(thread, p, tile, first, groups);
    for (int i = 0; i < tile.count && p.softcap > 0; i++)
      k_.softcap(logits_of(i) + first_row, p.softcap, n, logits_of(i) + first_row);
  });
}

// Add the low parts of all rows to a chunk's logits.
void Executor::low_chunk(int thread, const Phase &p, const RowTile &tile, int64_t first, int64_t groups) {
  ThreadState &s = *threads_[size_t(thread)];
  const HeadPlanes &planes = p.head->planes;
  const int64_t g = k_.group_rows, ldy = int64_t(round_up(size_t(kLowGroups * g), 16));
  const size_t bytes = group_bytes(kQ4_0, int(g), planes.cols);
  const ActBatch a{stores_[1].q, stores_[1].scale, stores_[1].sum, nullptr, 0};
  for (int64_t at = first; at < first + groups; at += kLowGroups) {
    const int64_t count = std::min(kLowGroups, first + groups - at);
    const int64_t row = at * g, rows = std::min(count * g, p.head->vocab - row);
    for (int64_t i = 0; i < count; i++)
      k_.low_group(planes, nullptr, row + i * g, std::min(g, rows - i * g), s.low + size_t(i) * bytes);
    if (tile.count == 1)
      k_.gemv[kQ4_0](s.low, count, planes.cols, {s.head.q, s.head.scale, s.head.low_sum, nullptr}, s.y);
    else
      k_.gemm[kQ4_0](s.low, count, planes.cols, a, tile.count, s.y, ldy, s.gemm, nullptr);
    for (int i = 0; i < tile.count; i++) k_.add(logits_of(i) + row, s.y + i * ldy, rows, logits_of(i) + row);
  }
}

// A head in a layout of its own: its rows' inputs, in the thread's scratch or in store 0.
void Executor::prepare_plain(int thread, const Phase &p, const RowTile &tile) {
  ThreadState &s = *threads_[size_t(thread)];
  const int rows = tile.count;
  const int64_t cols = p.weight.cols, blocks = cols / kBlockInputs;
  const float factor = sum_factor(p.weight.layout);
  const bool is_float = layout_is_float(p.weight.layout);
  if (rows == 1) {
    const float *x = head_row_input(thread, p, tile.rows[0]);
    if (!is_float)
      k_.quantize(x, cols, factor, s.q, s.scale, s.sum);
    else if (x != s.row)
      std::memcpy(s.row, x, size_t(cols) * sizeof(float));
    return;
  }
  const ActStore &store = stores_[0];
  for (int64_t four = thread; four * kTileTokens < rows; four += active_)
    for (int slot = 0; slot < kTileTokens; slot++) {
      const int i = int(four) * kTileTokens + slot;
      const float *x = i < rows ? head_row_input(thread, p, tile.rows[i]) : s.zeros;
      if (!is_float)
        k_.quantize_tile(x, cols, factor, slot, store.q + size_t(four * blocks) * kBlockInputs * kTileTokens,
                         store.scale + four * blocks * kTileTokens, store.sum + four * blocks * kTileTokens);
      else if (i < rows)
        std::memcpy(store.x + i * store.ldx, x, size_t(cols) * sizeof(float));
    }
  pool_.barrier(thread);
}

void Executor::plain_logits(int thread, const Phase &p, const RowTile &tile, int64_t first, int64_t groups) {
  ThreadState &s = *threads_[size_t(thread)];
  const uint8_t *w = p.weight.data + size_t(first) * p.weight.group_bytes;
  float *y = logits_ + first * k_.group_rows;
  if (tile.count == 1) {
    k_.gemv[p.weight.layout](w, groups, p.weight.cols, {s.q, s.scale, s.sum, s.row}, y);
    return;
  }
  const ActBatch a{stores_[0].q, stores_[0].scale, stores_[0].sum, stores_[0].x, stores_[0].ldx};
  k_.gemm[p.weight.layout](w, groups, p.weight.cols, a, tile.count, y, padded_vocab_, s.gemm, nullptr);
}

void Executor::sample_rows(int thread, const RowTile &tile) {
  ThreadState &s = *threads_[size_t(thread)];
  for (int i = thread; i < tile.count; i += active_) {
    const int row = tile.rows[i];
    const float *logits = logits_of(i);
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
