#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace hayai {

static uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

double uniform(uint64_t seed, uint64_t position) {
  return double(splitmix64(splitmix64(seed) ^ position) >> 40) / double(1 << 24);
}

// Eight tokens at a time, without a branch per token: masks of grammars are dense here and empty there.
void forbid(const uint32_t *mask, int64_t first, int64_t count, float *y) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; i += 8) {
    const uint32_t bits = mask[(first + i) / 32] >> ((first + i) % 32) & 255;
    if (bits == 255) continue;
    const int64_t n = std::min<int64_t>(8, count - i);
    for (int64_t j = 0; j < n; j++) y[i + j] = bits & (1u << j) ? y[i + j] : kNever;
  }
}

int64_t lowest_allowed(const uint32_t *mask, int64_t vocab) {
  for (int64_t i = 0; i < vocab; i++)
    if (allowed(mask, i)) return i;
  return 0;
}

namespace {

using Scratch = Sampler::Scratch;

// Sparse penalties, bias and mask, in this order (backends/base.SamplingRow).
void adjust(const SamplingSpec &spec, const RowExtras &extras, int row, int64_t vocab, float *x) {
  if (extras.history_start) {
    for (int i = extras.history_start[row]; i < extras.history_start[row + 1]; i++) {
      float &v = x[extras.history_ids[i]];
      const int count = extras.history_counts[i];
      v = v > 0 ? v / spec.repetition_penalty : v * spec.repetition_penalty;
      if (count > 0) v -= spec.presence_penalty + spec.frequency_penalty * float(count);
    }
  }
  if (extras.bias_start)
    for (int i = extras.bias_start[row]; i < extras.bias_start[row + 1]; i++)
      x[extras.bias_ids[i]] += extras.bias_values[i];
  if (const uint32_t *mask = extras.mask(row)) forbid(mask, 0, vocab, x);
}

// Tokens by descending logit, ties by ascending id.
struct Better {
  const float *x;
  bool operator()(int32_t a, int32_t b) const { return x[a] > x[b] || (x[a] == x[b] && a < b); }
};

// The n best ids, best first, NaN counting as -infinity. The heap's front is the worst of them; ids ascend,
// so an equal one that comes later never replaces it.
void find_best(const float *x, int64_t vocab, int64_t n, std::vector<int32_t> &best) {
  const auto value = [x](int32_t id) {
    return std::isnan(x[id]) ? -std::numeric_limits<float>::infinity() : x[id];
  };
  const auto better = [&](int32_t a, int32_t b) {
    return value(a) > value(b) || (value(a) == value(b) && a < b);
  };
  best.clear();
  for (int64_t i = 0; i < n; i++) best.push_back(int32_t(i));
  std::make_heap(best.begin(), best.end(), better);
  float worst = value(best.front());
  for (int64_t i = n; i < vocab; i++) {
    if (!(x[i] > worst)) continue;
    std::pop_heap(best.begin(), best.end(), better);
    best.back() = int32_t(i);
    std::push_heap(best.begin(), best.end(), better);
    worst = value(best.front());
  }
  std::sort_heap(best.begin(), best.end(), better);
}

// Fills `order` with the ids whose weight is at least `cut`, best first.
void collect(const float *weights, const float *x, int64_t vocab, float cut, std::vector<int32_t> &order) {
  order.clear();
  for (int64_t i = 0; i < vocab; i++)
    if (weights[i] >= cut && weights[i] > 0) order.push_back(int32_t(i));
  std::sort(order.begin(), order.end(), Better{x});
}

// Inverse CDF over the candidates that min_p, top_k and top_p leave. Only the head of the distribution
// is sorted: ids with a weight of at least `cut` times the largest, and `cut` falls until enough mass
// or enough ids are there.
int32_t draw(const SamplingSpec &spec, double u, int64_t vocab, const float *x, double total, Scratch &s) {
  const float *w = s.weights.data();
  const float floor = spec.min_p; // weights are relative to the best one, which has 1
  if (floor > 0) {
    total = 0;
    for (int64_t i = 0; i < vocab; i++)
      if (w[i] >= floor) total += w[i];
  }
  for (float cut = std::max(floor, 1e-3f);; cut = std::max(floor, cut * 0.02f)) {
    const bool everything = !(cut > floor) || cut < 1e-30f;
    collect(w, x, vocab, everything ? floor : cut, s.order);
    size_t count = s.order.size();
    bool complete = everything; // no candidate is missing from s.order[:count]
    if (spec.top_k > 0 && count >= size_t(spec.top_k)) {
      count = size_t(spec.top_k);
      complete = true;
    }
    if (spec.top_k > 0 && !complete) continue;
    double mass = total;
    if (complete) {
      mass = 0;
      for (size_t i = 0; i < count; i++) mass += w[s.order[i]];
    }
    double target = u * mass;
    if (spec.top_p < 1) {
      size_t kept = 0;
      double nucleus = 0;
      while (kept < count && (kept == 0 || nucleus < spec.top_p * mass)) nucleus += w[s.order[kept++]];
      if (nucleus < spec.top_p * mass && !complete) continue;
      count = kept;
      target = u * nucleus;
    }
    double sum = 0;
    for (size_t i = 0; i < count; i++) {
      sum += w[s.order[i]];
      if (sum > target) return s.order[i];
    }
    if (complete) return count ? s.order[count - 1] : 0;
  }
}

} // namespace

SampleResult Sampler::sample(const KernelTable &k, const SamplingSpec &spec, const RowExtras &extras, int row,
                             int64_t position, const float *logits, int64_t vocab, Scratch &s,
                             int32_t *top_ids, float *top_logprobs) {
  const int64_t best = k.argmax(logits, vocab);
  const int32_t target = extras.target(row);
  const bool logprobs = spec.num_logprobs >= 0 || target >= 0;
  float log_total = 0;
  if (logprobs || spec.temperature > 0) s.weights.resize(size_t(vocab));
  if (logprobs) {
    const float sum = k.exp_sum(logits, vocab, logits[best], 1.f, s.weights.data());
    log_total = logits[best] + std::log(sum);
    if (spec.num_logprobs > 0) {
      const auto n = std::min<int64_t>(spec.num_logprobs, vocab);
      find_best(logits, vocab, n, s.order);
      for (int64_t i = 0; i < n; i++) {
        top_ids[i] = s.order[size_t(i)];
        top_logprobs[i] = logits[s.order[size_t(i)]] - log_total;
      }
    }
  }
  if (target >= 0) return {int32_t(best), logits[target] - log_total};
  const float *x = logits;
  int64_t top = best;
  const uint32_t *mask = extras.mask(row);
  if (spec.has_extras || mask) {
    s.logits.assign(logits, logits + vocab);
    adjust(spec, extras, row, vocab, s.logits.data());
    x = s.logits.data();
    top = k.argmax(x, vocab);
    // Where all that is allowed is NaN or -infinity, any index may be the largest.
    if (mask && !allowed(mask, top)) top = lowest_allowed(mask, vocab);
  }
  int64_t token = top;
  if (spec.temperature > 0) {
    const double total = k.exp_sum(x, vocab, x[top], 1.f / spec.temperature, s.weights.data());
    // Logits that are all NaN or infinite leave no distribution to draw from: take the best id.
    if (std::isfinite(total) && total > 0)
      token = draw(spec, uniform(spec.seed, uint64_t(position)), vocab, x, total, s);
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  return {int32_t(token), logprobs ? logits[token] - log_total : nan};
}

} // namespace hayai
