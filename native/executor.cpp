// Building the program, and the walk over its phases. The phases themselves: phases.cpp, head.cpp.
#include "executor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "executor_state.h"
#include "half.h"

namespace hayai {

Executor::Executor(const KernelTable &table, int threads, int max_tokens, int max_rows, int max_context)
    : k_(table), pool_(threads), governor_(threads), max_tokens_(max_tokens), max_rows_(max_rows),
      max_context_(max_context) {}

Executor::~Executor() = default;

// ---------------------------------------------------------------- building

void Executor::reserve_weights(size_t bytes) { weight_arena_ = std::make_unique<Arena>(bytes, true); }

int Executor::add_weight(int layout, int64_t groups, int64_t cols) {
  if (layout < 0 || layout >= kLayoutCount || groups <= 0 || cols <= 0 ||
      (!layout_is_float(layout) && cols % kBlockInputs != 0))
    throw std::invalid_argument("weight: bad layout or shape");
  Weight w;
  w.layout = layout;
  w.cols = cols;
  w.groups = groups;
  w.group_bytes = group_bytes(layout, k_.group_rows, cols);
  w.data = weight_arena_->take(w.group_bytes * size_t(groups));
  weights_.push_back(w);
  return int(weights_.size()) - 1;
}

void Executor::fill_weight(int weight, const uint8_t *rows, int64_t num_rows, int64_t first_group,
                           int64_t step) {
  const Weight &w = this->weight(weight);
  const int64_t groups = (num_rows + k_.group_rows - 1) / k_.group_rows;
  if (num_rows <= 0 || first_group < 0 || step < 1 || first_group + (groups - 1) * step >= w.groups)
    throw std::invalid_argument("weight: rows do not fit");
  pack_rows(w.layout, k_.group_rows, rows, file_row_bytes(w.layout, w.cols), num_rows, w.cols, 0,
            const_cast<uint8_t *>(w.data) + size_t(first_group) * w.group_bytes,
            size_t(step) * w.group_bytes);
}

namespace {

// The largest norm of a dequantised Q8_0 row together with what its high plane leaves over, at most 7.5 d per
// input.
float largest_row_norm(const uint8_t *rows, int64_t num_rows, int64_t cols) {
  const size_t row_bytes = file_row_bytes(kQ8_0, cols);
  float largest = 0;
  for (int64_t row = 0; row < num_rows; row++) {
    const uint8_t *at = rows + size_t(row) * row_bytes;
    float norm = 0;
    for (int64_t b = 0; b < cols / kBlockInputs; b++, at += 34) {
      int squares = 0;
      for (int i = 0; i < kBlockInputs; i++) {
        const int q = int8_t(at[2 + i]);
        squares += q * q;
      }
      const float d = half_to_float(uint16_t(at[0] | at[1] << 8));
      norm += d * d * (float(squares) + 7.5f * 7.5f * kBlockInputs);
    }
    largest = std::max(largest, norm);
  }
  return std::sqrt(largest) * 1.0001f;
}

} // namespace

int Executor::add_head(const uint8_t *q8_rows, int64_t vocab, int64_t cols) {
  if (cols < kOutliers) throw std::invalid_argument("head: too few inputs");
  auto head = std::make_unique<ScreenedHead>();
  const int64_t g = k_.group_rows;
  head->vocab = vocab;
  head->groups = (vocab + g - 1) / g;
  const size_t groups = size_t(head->groups);
  head->high = weight_arena_->take(group_bytes(kQ4_0, int(g), cols) * groups);
  head->outlier = weight_arena_->take(group_bytes(kQ4_0, int(g), kBlockInputs) * groups);
  head->low = weight_arena_->take(head_low_row_bytes(cols) * size_t(vocab));
  head->rest_error = weight_arena_->take_floats(groups * size_t(g));
  head->outlier_error = weight_arena_->take_floats(groups * size_t(g));
  head->planes = {head->high, head->outlier, head->low, cols};
  split_head_rows(int(g), q8_rows, file_row_bytes(kQ8_0, cols), vocab, cols, head->high, head->low);
  head->max_row_norm = largest_row_norm(q8_rows, vocab, cols);
  heads_.push_back(std::move(head));
  return int(heads_.size()) - 1;
}

// Any 32 inputs are correct; good ones leave fewer rows to score. The ones whose activations are largest on
// a few tokens of the model itself leave about a third of what a guess from the norm's weights does.
void Executor::calibrate_head(int index, const int32_t *tokens, int count) {
  ScreenedHead &head = *heads_.at(size_t(index));
  const int64_t cols = head.planes.cols;
  std::vector<double> energy(size_t(cols), 0.0);
  const Phase *phase = nullptr;
  for (const Phase &p : phases_)
    if (p.kind == PhaseKind::kHead && p.head == &head) phase = &p;
  if (phase && count > 0) {
    run_silently(tokens, count);
    ThreadState &s = *threads_[0];
    for (int t = 0; t < count; t++) {
      const float *x = phase->x.data + t * phase->x.stride;
      if (phase->norm.weight) {
        k_.rms_norm(x, phase->norm.weight, phase->norm.offset, phase->norm.eps, cols, s.row);
        x = s.row;
      }
      for (int64_t c = 0; c < cols; c++)
        if (std::isfinite(x[c])) energy[size_t(c)] += double(x[c]) * x[c];
    }
  }
  std::vector<int32_t> order(size_t(cols), 0);
  for (int64_t c = 0; c < cols; c++) order[size_t(c)] = int32_t(c);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return energy[size_t(a)] > energy[size_t(b)]; });
  std::copy(order.begin(), order.begin() + kOutliers, head.outlier_inputs);
  std::vector<float> norms(size_t(pool_.max_threads()), 0.f);
  pool_.run(pool_.max_threads(), [&](int thread) {
    const int64_t g = k_.group_rows, threads = pool_.max_threads();
    const int64_t first = head.groups * thread / threads * g;
    const int64_t end = std::min(head.vocab, head.groups * (thread + 1) / threads * g);
    if (first < end)
      norms[size_t(thread)] = pack_outlier_plane(int(g), head.low, first, end, cols, head.outlier_inputs,
                                                 head.outlier, head.rest_error, head.outlier_error);
  });
  head.max_code_norm = *std::max_element(norms.begin(), norms.end());
}

// One step of a sequence in cache blocks 0, 1, ... that asks for no logits.
void Executor::run_silently(const int32_t *tokens, int count) {
  std::vector<int32_t> positions(size_t(count), 0), table(size_t(count / kPagePositions + 1), 0);
  for (int i = 0; i < count; i++) positions[size_t(i)] = i;
  for (size_t i = 0; i < table.size(); i++) table[i] = int32_t(i);
  const int32_t starts[2] = {0, count};
  StepArgs args;
  args.num_tokens = count;
  args.num_seqs = 1;
  args.tokens = tokens;
  args.positions = positions.data();
  args.query_start = starts;
  args.tables.assign(groups_.size(), table.data());
  args.table_stride = int64_t(table.size());
  step(args);
}

int Executor::add_vector(const float *data, int64_t n) {
  // Padded with zeros to whole vectors: kernels may be handed rounded-up counts.
  owned_.push_back(std::make_unique<Region>((size_t(n) + 64) * sizeof(float), false));
  float *to = reinterpret_cast<float *>(owned_.back()->data());
  std::memcpy(to, data, size_t(n) * sizeof(float));
  vectors_.push_back(to);
  return int(vectors_.size()) - 1;
}

int Executor::add_buffer(int64_t width, bool per_logit_row) {
  Buffer b;
  b.width = width;
  b.stride = int64_t(round_up(size_t(width), 16));
  const size_t rows = size_t(per_logit_row ? max_rows_ : max_tokens_);
  owned_.push_back(std::make_unique<Region>(rows * size_t(b.stride) * sizeof(float), false));
  b.data = reinterpret_cast<float *>(owned_.back()->data());
  buffers_.push_back(b);
  return int(buffers_.size()) - 1;
}

int Executor::add_rope(const float *cosine, const float *sine, int64_t positions, int rotary_dim, int start,
                       bool interleaved) {
  if (positions < max_context_ || rotary_dim <= 0 || rotary_dim % 2)
    throw std::invalid_argument("rope: table too short or odd rotary dim");
  auto rope = std::make_unique<RopeTable>();
  const size_t n = size_t(positions) * size_t(rotary_dim / 2);
  rope->cosine.assign(cosine, cosine + n);
  rope->sine.assign(sine, sine + n);
  rope->rotary_dim = rotary_dim;
  rope->start = start;
  rope->interleaved = interleaved;
  ropes_.push_back(std::move(rope));
  return int(ropes_.size()) - 1;
}

int Executor::add_group(int format, int layers, int heads, int head_dim, int value_dim, int64_t num_blocks) {
  auto group = std::make_unique<KvGroup>();
  group->format = format;
  group->num_layers = layers;
  group->num_heads = heads;
  group->head_dim = head_dim;
  group->value_dim = value_dim;
  group->num_blocks = num_blocks;
  group->page = page_bytes(format, head_dim, value_dim);
  group->block_stride = size_t(layers) * size_t(heads) * group->page;
  if (group->block_stride == 0 || num_blocks < 0 ||
      size_t(num_blocks) > (SIZE_MAX >> 1) / group->block_stride)
    throw std::bad_alloc();
  group->region = Region(group->block_stride * size_t(num_blocks), true);
  groups_.push_back(std::move(group));
  return int(groups_.size()) - 1;
}

int Executor::add_phase(Phase phase) {
  if (phase.kind == PhaseKind::kLinear) {
    phase.num_chunks = (phase.weight.groups + phase.chunk_groups - 1) / phase.chunk_groups;
    phase.range_index = num_ranges_++;
  } else if (phase.kind == PhaseKind::kHead) {
    const int64_t groups = phase.head ? phase.head->groups : phase.weight.groups;
    phase.num_chunks = (groups + phase.chunk_groups - 1) / phase.chunk_groups;
    phase.range_index = num_ranges_++;
  } else if (phase.kind == PhaseKind::kAttention) {
    phase.attention_phase = attention_count_++;
    phase.range_index = num_ranges_++;
  }
  phases_.push_back(std::move(phase));
  return int(phases_.size()) - 1;
}

void Executor::finish(int64_t vocab) {
  vocab_ = vocab;
  if (weight_arena_) weight_arena_->trim();
  int64_t max_cols = 32, max_chunk = 1, max_heads = 1, max_value = 1, max_per_kv = 1;
  for (const Phase &p : phases_) {
    if (p.kind == PhaseKind::kLinear || p.kind == PhaseKind::kHead) {
      const int64_t cols = p.head ? p.head->planes.cols : p.weight.cols;
      max_cols = std::max(max_cols, cols + kBlockInputs);
      max_chunk = std::max(max_chunk, p.chunk_groups * k_.group_rows);
    }
    if (p.kind == PhaseKind::kAttention) {
      max_heads = std::max<int64_t>(max_heads, p.num_heads);
      max_value = std::max<int64_t>(max_value, p.value_dim);
      max_per_kv = std::max<int64_t>(max_per_kv, p.num_heads / p.num_kv_heads);
    }
    max_cols = std::max({max_cols, p.x.width, p.y.width, p.out.width});
  }
  max_cols = int64_t(round_up(size_t(max_cols), 64));
  const size_t tokens = round_up(size_t(std::max(max_tokens_, max_rows_)), kTileTokens);
  const size_t q = tokens * size_t(max_cols), blocks = q / kBlockInputs;
  act_region_ = Region(2 * (q * (1 + sizeof(float)) + 2 * blocks * sizeof(float) + 4 * kCacheLine), false);
  uint8_t *at = act_region_.data();
  auto take = [&](size_t bytes) {
    uint8_t *p = at;
    at += round_up(bytes, kCacheLine);
    return p;
  };
  for (ActStore &store : stores_) {
    store.q = reinterpret_cast<int8_t *>(take(q));
    store.scale = reinterpret_cast<float *>(take(blocks * sizeof(float)));
    store.sum = reinterpret_cast<float *>(take(blocks * sizeof(float)));
    store.x = reinterpret_cast<float *>(take(q * sizeof(float)));
    store.ldx = max_cols;
  }
  part_capacity_ = 2 * (max_context_ / kSplitPositions + 1) + 64;
  for (auto &done : splits_done_)
    done = std::vector<std::atomic<int>>(size_t(4 * pool_.max_threads() + max_heads));
  parts_region_ = Region(size_t(part_capacity_) * size_t(max_heads) * size_t(max_value + 2) * sizeof(float) +
                             2 * kCacheLine,
                         false);
  parts_ = reinterpret_cast<float *>(parts_region_.data());
  part_stats_ = parts_ + round_up(size_t(part_capacity_ * max_heads * max_value), 16);
  padded_vocab_ = int64_t(round_up(size_t(vocab), 64));
  head_region_ = Region(2 * size_t(kRowTile) * size_t(padded_vocab_) * sizeof(float), false);
  logits_ = reinterpret_cast<float *>(head_region_.data());
  bounds_ = logits_ + kRowTile * padded_vocab_;
  for (int i = 0; i < kRowTile; i++) head_inputs_.push_back(std::make_unique<HeadInput>(max_cols));
  ranges_ = std::make_unique<WorkRange[]>(size_t(num_ranges_) * size_t(pool_.max_threads()));
  for (int t = 0; t < pool_.max_threads(); t++)
    threads_.push_back(std::make_unique<ThreadState>(k_, max_cols, int64_t(tokens), max_chunk, max_per_kv,
                                                     max_value, vocab));
  seq_of_token_.resize(tokens);
  head_rows_.resize(size_t(pool_.max_threads()) * kRowTile);
}

void Executor::copy_blocks(int group, int64_t source, int64_t target) {
  KvGroup &g = this->group(group);
  if (source < 0 || target < 0 || source >= g.num_blocks || target >= g.num_blocks)
    throw std::invalid_argument("copy_blocks: no such block");
  std::memcpy(g.region.data() + size_t(target) * g.block_stride,
              g.region.data() + size_t(source) * g.block_stride, g.block_stride);
}

// ---------------------------------------------------------------- one step

namespace {

void require(bool ok, const char *what) {
  if (!ok) throw std::invalid_argument(what);
}

} // namespace

// Compressed rows (sampling.h, RowExtras): ascending from 0, ids within the vocabulary.
static void check_sparse(const int32_t *start, const int32_t *ids, int rows, int64_t vocab,
                         const char *what) {
  if (!start) return;
  require(start[0] == 0, what);
  for (int r = 0; r < rows; r++) require(start[r] <= start[r + 1], what);
  for (int i = 0; i < start[rows]; i++) require(ids[i] >= 0 && ids[i] < vocab, what);
}

// Values that would make a phase read or write outside its arrays. Costs some nanoseconds per token.
void Executor::check(const StepArgs &a) const {
  require(a.query_start[0] == 0 && a.query_start[a.num_seqs] == a.num_tokens,
          "step: query_start must span the tokens");
  for (int s = 0; s < a.num_seqs; s++) {
    const int first = a.query_start[s], end = a.query_start[s + 1];
    require(first < end && end <= a.num_tokens, "step: a sequence without tokens");
    const int64_t position = a.positions[first], last = position + (end - first) - 1;
    require(position >= 0 && last < max_context_, "step: position beyond the context");
    for (int t = first; t < end; t++) {
      require(a.positions[t] == position + (t - first), "step: positions must be consecutive");
      require(a.tokens[t] >= 0 && a.tokens[t] < vocab_, "step: token id beyond the vocabulary");
    }
    const int64_t blocks = last / kPagePositions + 1;
    require(blocks <= a.table_stride, "step: block table too short");
    for (size_t g = 0; g < groups_.size(); g++)
      for (int64_t b = 0; b < blocks; b++) {
        const int32_t block = a.tables[g][int64_t(s) * a.table_stride + b];
        require(block >= 0 && block < groups_[g]->num_blocks, "step: block number out of range");
      }
  }
  for (int r = 0; r < a.num_rows; r++)
    require(a.logit_rows[r] >= 0 && a.logit_rows[r] < a.num_tokens, "step: logit row out of range");
  const RowExtras &x = a.extras;
  check_sparse(x.bias_start, x.bias_ids, a.num_rows, vocab_, "step: bias rows or token ids out of range");
  check_sparse(x.history_start, x.history_ids, a.num_rows, vocab_,
               "step: history rows or token ids out of range");
  for (int r = 0; r < a.num_rows && x.targets; r++)
    require(x.targets[r] < vocab_, "step: target beyond the vocabulary");
  for (int r = 0; r < a.num_rows; r++)
    require(a.sampling[r].num_logprobs <= a.max_top || a.sampling[r].num_logprobs <= 0,
            "step: top_ids has fewer places than a row asks for");
}

void Executor::step(const StepArgs &args) {
  check(args);
  if (running_.exchange(true, std::memory_order_acquire))
    throw std::runtime_error("step: this model is running another step on another thread");
  struct Running {
    Executor &e;
    ~Running() {
      e.args_ = nullptr;
      e.running_.store(false, std::memory_order_release);
    }
  } running{*this};
  const int64_t started = now_ns();
  args_ = &args;
  active_ = governor_.threads();
  for (int s = 0; s < args.num_seqs; s++)
    for (int t = args.query_start[s]; t < args.query_start[s + 1]; t++) seq_of_token_[size_t(t)] = s;
  survivors_.store(0, std::memory_order_relaxed);
  plan_units();
  plan_rows();
  pool_.run(active_, [this](int thread) { run_thread(thread); });
  governor_.step_done(active_, pool_.lost_ns(), now_ns() - started);
  stats_.threads = active_;
  stats_.lost_ns = double(pool_.lost_ns());
  stats_.waited_ns = double(pool_.waited_ns());
  stats_.survivors = double(survivors_.load(std::memory_order_relaxed));
  stats_.step_ns = double(now_ns() - started);
}

void Executor::run_thread(int thread) {
  reset_ranges(thread);
  if (thread == 0) {
    next_unit_[0].store(0, std::memory_order_relaxed);
    for (std::atomic<int> &done : splits_done_[0]) done.store(0, std::memory_order_relaxed);
  }
  for (const Phase &p : phases_) run_phase(thread, p);
}

void Executor::run_phase(int thread, const Phase &p) {
  switch (p.kind) {
  case PhaseKind::kLinear: linear(thread, p); break;
  case PhaseKind::kAttention: attention(thread, p); break;
  case PhaseKind::kHead: lm_head(thread, p); return; // ends in the pool's own join
  default: elementwise(thread, p); break;
  }
  pool_.barrier(thread);
}

int64_t Executor::work_count(const Phase &p) const {
  return p.kind == PhaseKind::kAttention ? int64_t(units_.size()) * p.num_kv_heads : p.num_chunks;
}

void Executor::reset_ranges(int thread) {
  // Only a barrier after this may other threads steal from these ranges; the embedding phase ends in one.
  for (const Phase &p : phases_)
    if (p.range_index >= 0) reset_range(thread, p);
}

void Executor::reset_range(int thread, const Phase &p) {
  const int64_t count = work_count(p);
  const uint64_t end = uint64_t(share_end(count, thread)), next = uint64_t(static_end(count, thread));
  ranges_[size_t(p.range_index) * size_t(pool_.max_threads()) + size_t(thread)].packed.store(
      end << 32 | next, std::memory_order_relaxed);
}

int64_t Executor::take(WorkRange &range, bool from_front) {
  uint64_t old = range.packed.load(std::memory_order_relaxed);
  for (;;) {
    const uint64_t next = old & 0xffffffffu, end = old >> 32;
    if (next >= end) return -1;
    const uint64_t left = from_front ? end << 32 | (next + 1) : (end - 1) << 32 | next;
    if (range.packed.compare_exchange_weak(old, left, std::memory_order_acq_rel))
      return int64_t(from_front ? next : end - 1);
  }
}

} // namespace hayai
