// The phases of a layer: linear with its prologue and epilogue, attention, and the plain ops.
#include <algorithm>
#include <cstring>

#include "executor_state.h"

namespace hayai {

namespace {

constexpr size_t kTileBlockBytes = kBlockInputs * kTileTokens;

int64_t tiles_of(int tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }

} // namespace

// ---------------------------------------------------------------- inputs of a linear phase

// The fp32 input row of one token, normalised if the phase asks for it.
const float *Executor::input_row(int thread, const Phase &p, int token) {
  ThreadState &s = *threads_[size_t(thread)];
  const float *x = p.x.data + token * p.x.stride;
  if (p.norm.weight) {
    k_.rms_norm(x, p.norm.weight, p.norm.offset, p.norm.eps, p.weight.cols, s.row);
    x = s.row;
  }
  return x;
}

void Executor::linear(int thread, const Phase &p) {
  if (args_->num_tokens == 1)
    linear_one(thread, p);
  else
    linear_many(thread, p);
}

// One token. Every thread prepares the input for itself: half a microsecond each is cheaper than
// sharing it across one more barrier.
void Executor::linear_one(int thread, const Phase &p) {
  ThreadState &s = *threads_[size_t(thread)];
  ActRow a{};
  if (p.input == InputKind::kQuantised) {
    a = {stores_[1].q, stores_[1].scale, stores_[1].sum, nullptr};
  } else {
    const float *x = input_row(thread, p, 0);
    if (layout_is_float(p.weight.layout)) {
      a.x = x;
    } else {
      k_.quantize(x, p.weight.cols, sum_factor(p.weight.layout), s.q, s.scale, s.sum);
      a = {s.q, s.scale, s.sum, nullptr};
    }
  }
  const auto gemv = k_.gemv[p.weight.layout];
  for_chunks(thread, p.range_index, p.num_chunks, [&](int64_t chunk) {
    const int64_t first = chunk * p.chunk_groups;
    const int64_t groups = std::min(p.chunk_groups, p.weight.groups - first);
    gemv(p.weight.data + size_t(first) * p.weight.group_bytes, groups, p.weight.cols, a, s.y);
    epilogue(p, 0, first, groups, s.y);
  });
}

// Many tokens: the inputs are prepared once, by all threads, in tiles of 4; then every chunk of rows is
// multiplied with all of them.
void Executor::linear_many(int thread, const Phase &p) {
  ThreadState &s = *threads_[size_t(thread)];
  const int tokens = args_->num_tokens;
  const int64_t cols = p.weight.cols, blocks = cols / kBlockInputs;
  const bool is_float = layout_is_float(p.weight.layout);
  const ActStore &store = stores_[p.input == InputKind::kQuantised ? 1 : 0];
  ActBatch a{store.q, store.scale, store.sum, store.x, store.ldx};
  if (p.input != InputKind::kQuantised) {
    for (int64_t tile = thread; tile < tiles_of(tokens); tile += active_)
      for (int slot = 0; slot < kTileTokens; slot++) {
        const int token = int(tile) * kTileTokens + slot;
        if (is_float) {
          if (token < tokens)
            std::memcpy(store.x + token * store.ldx, input_row(thread, p, token),
                        size_t(cols) * sizeof(float));
          continue;
        }
        const float *x = token < tokens ? input_row(thread, p, token) : s.zeros;
        k_.quantize_tile(x, cols, sum_factor(p.weight.layout), slot,
                         store.q + size_t(tile * blocks) * kTileBlockBytes,
                         store.scale + tile * blocks * kTileTokens, store.sum + tile * blocks * kTileTokens);
      }
    pool_.barrier(thread);
  }
  const auto gemm = k_.gemm[p.weight.layout];
  const int64_t ldy = int64_t(round_up(size_t(p.chunk_groups * k_.group_rows), 16));
  for_chunks(thread, p.range_index, p.num_chunks, [&](int64_t chunk) {
    const int64_t first = chunk * p.chunk_groups;
    const int64_t groups = std::min(p.chunk_groups, p.weight.groups - first);
    const uint8_t *w = p.weight.data + size_t(first) * p.weight.group_bytes;
    gemm(w, groups, cols, a, tokens, s.y, ldy, s.gemm, w + size_t(groups) * p.weight.group_bytes);
    for (int t = 0; t < tokens; t++) epilogue(p, t, first, groups, s.y + t * ldy);
    if (p.epilogue == Epilogue::kGlu && p.glu_quantise)
      for (int t = tokens; t < int(tiles_of(tokens)) * kTileTokens; t++)
        epilogue_glu(p, t, first, groups, nullptr);
  });
}

// ---------------------------------------------------------------- epilogues

void Executor::epilogue(const Phase &p, int token, int64_t first_group, int64_t groups, float *y) {
  const int64_t row = first_group * k_.group_rows, rows = groups * k_.group_rows;
  if (p.bias) k_.add(y, p.bias + row, rows, y);
  switch (p.epilogue) {
  case Epilogue::kGlu: epilogue_glu(p, token, first_group, groups, y); return;
  case Epilogue::kQkv: epilogue_qkv(p, token, row, rows, y); return;
  case Epilogue::kStore:
  case Epilogue::kAdd: break;
  }
  int64_t base = 0;
  for (const Segment &segment : p.segments) {
    const int64_t begin = std::max(row, base), end = std::min(row + rows, base + segment.rows);
    if (begin < end) {
      float *out = segment.out.data + token * segment.out.stride + (begin - base);
      if (p.epilogue == Epilogue::kAdd)
        k_.add(out, y + (begin - row), end - begin, out);
      else
        std::memcpy(out, y + (begin - row), size_t(end - begin) * sizeof(float));
    }
    base += segment.rows;
  }
}

// Groups alternate gate, up. The result is quantised at once where only a linear reads it: a chunk covers
// whole blocks of 32. y null: a missing token of the last tile, stored as zero.
void Executor::epilogue_glu(const Phase &p, int token, int64_t first_group, int64_t groups, float *y) {
  alignas(64) float values[kMaxGluChunk];
  const int64_t row = first_group / 2 * k_.group_rows;
  const int64_t n = std::min(groups / 2 * k_.group_rows, p.out.width - row);
  if (y)
    k_.glu_groups(p.act, y, groups / 2, values);
  else
    std::fill_n(values, n, 0.f);
  if (!p.glu_quantise) {
    std::memcpy(p.out.data + token * p.out.stride + row, values, size_t(n) * sizeof(float));
    return;
  }
  const ActStore &store = stores_[1];
  const int64_t block = row / kBlockInputs, blocks = p.out.width / kBlockInputs;
  if (args_->num_tokens == 1) {
    k_.quantize(values, n, p.glu_factor, store.q + row, store.scale + block, store.sum + block);
    return;
  }
  const int64_t at = token / kTileTokens * blocks + block;
  k_.quantize_tile(values, n, p.glu_factor, token % kTileTokens, store.q + size_t(at) * kTileBlockBytes,
                   store.scale + at * kTileTokens, store.sum + at * kTileTokens);
}

uint8_t *Executor::page_of(const Phase &p, int token, int head) const {
  const KvGroup &g = *groups_[size_t(p.group)];
  const int seq = seq_of_token_[size_t(token)];
  const int32_t *table = args_->tables[size_t(p.group)] + int64_t(seq) * args_->table_stride;
  const int32_t block = table[args_->positions[token] / kPagePositions];
  return g.head_pages(p.layer, head) + size_t(block) * g.block_stride;
}

// Write dims [dim, dim + dims) of one head's key or value.
void Executor::store_kv(const Phase &p, int token, int head, int dim, int dims, const float *y, bool key) {
  const int format = groups_[size_t(p.group)]->format;
  const auto store = key ? k_.store_key[format] : k_.store_value[format];
  store(page_of(p, token, head), args_->positions[token] % kPagePositions,
        {y, dim, dims, p.head_dim, p.value_dim});
}

// Rows are the heads of q, then k, then v; a chunk lies inside one head (whole heads where the norm or the
// rotation needs them).
void Executor::epilogue_qkv(const Phase &p, int token, int64_t row, int64_t rows, float *y) {
  const int64_t q_rows = int64_t(p.num_heads) * p.head_dim;
  const int64_t k_rows = int64_t(p.num_kv_heads) * p.head_dim;
  if (row >= q_rows + k_rows) {
    const int64_t at = row - q_rows - k_rows;
    store_kv(p, token, int(at / p.value_dim), int(at % p.value_dim), int(rows), y, false);
    return;
  }
  const bool is_q = row < q_rows;
  const int64_t at = is_q ? row : row - q_rows;
  const int dim = int(at % p.head_dim);
  const NormSpec &norm = is_q ? p.q_norm : p.k_norm;
  if (norm.weight) k_.rms_norm(y, norm.weight, norm.offset, norm.eps, p.head_dim, y);
  if (p.rope && dim < p.rope->rotary_dim) {
    const size_t half = size_t(p.rope->rotary_dim / 2);
    const size_t table = size_t(args_->positions[token]) * half + size_t(dim / 2);
    const int rotated = int(std::min<int64_t>(rows, p.rope->rotary_dim - dim));
    k_.rope(y, p.rope->cosine.data() + table, p.rope->sine.data() + table, rotated, p.rope->interleaved);
  }
  if (is_q)
    std::memcpy(p.out.data + token * p.out.stride + row, y, size_t(rows) * sizeof(float));
  else
    store_kv(p, token, int(at / p.head_dim), dim, int(rows), y, true);
}

// ---------------------------------------------------------------- attention

// Cut the step's attention into units. Few single-token sequences are cut by splits, so that all threads
// have work; else a unit is a whole query block. Both give the same bits (kernels.h, AttendArgs).
void Executor::plan_units() {
  const StepArgs &a = *args_;
  units_.clear();
  int kv_heads = 1; // layers may differ; splits_done_ holds what this allows
  for (const Phase &p : phases_)
    if (p.kind == PhaseKind::kAttention) kv_heads = std::max(kv_heads, p.num_kv_heads);
  by_split_ = a.num_tokens == a.num_seqs && a.num_seqs * kv_heads < 4 * active_;
  int32_t part = 0;
  for (int s = 0; s < a.num_seqs; s++) {
    for (int32_t t = a.query_start[s]; t < a.query_start[s + 1]; t += kMaxQueryBlock) {
      const int32_t n = std::min(kMaxQueryBlock, a.query_start[s + 1] - t), position = a.positions[t];
      const int32_t splits = (position + n - 1) / kSplitPositions + 1;
      const bool parts = by_split_ && part + splits <= part_capacity_;
      const int32_t step = parts ? (splits > 32 ? 4 : 1) : splits;
      for (int32_t first = 0; first < splits; first += step)
        units_.push_back({s, t, n, position, first, std::min(first + step, splits), parts ? part : -1});
      part += parts ? splits : 0;
    }
  }
  // The longest units first: the last ones to be claimed decide how long threads wait.
  if (!by_split_)
    std::sort(units_.begin(), units_.end(), [](const Unit &x, const Unit &y) {
      return x.last_split - x.first_split > y.last_split - y.first_split;
    });
}

void Executor::attention(int thread, const Phase &p) {
  if (by_split_) {
    attend_splits(thread, p);
    return;
  }
  if (thread == 0) next_unit_[(p.attention_phase + 1) & 1].store(0, std::memory_order_relaxed);
  std::atomic<int> &next = next_unit_[p.attention_phase & 1];
  const int tasks = int(work_count(p));
  for (int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
    attend_unit(thread, p, units_[size_t(task / p.num_kv_heads)], task % p.num_kv_heads);
}

// Head by head, a thread's splits following each other, because each split prefetches the next one. Who
// finishes the last split of a head merges it. (Units for which there was no room in parts_ are merged.)
void Executor::attend_splits(int thread, const Phase &p) {
  const int parity = p.attention_phase & 1;
  if (thread == 0)
    for (std::atomic<int> &done : splits_done_[1 - parity]) done.store(0, std::memory_order_relaxed);
  const Unit *unit = nullptr;
  int head = 0, finished = 0;
  auto report = [&] {
    if (!unit) return;
    const int splits = unit->position / kSplitPositions + 1;
    std::atomic<int> &done = splits_done_[parity][size_t(unit->seq * p.num_kv_heads + head)];
    if (done.fetch_add(finished, std::memory_order_acq_rel) + finished == splits && unit->part >= 0)
      merge_head(p, *unit, head);
    finished = 0;
  };
  const int64_t units = int64_t(units_.size());
  for_chunks(thread, p.range_index, work_count(p), [&](int64_t task) {
    const Unit &next = units_[size_t(task % units)];
    const int next_head = int(task / units);
    if (unit && (next_head != head || next.seq != unit->seq)) report();
    unit = &next;
    head = next_head;
    attend_unit(thread, p, next, next_head);
    finished += next.last_split - next.first_split;
  });
  report();
}

// Partial states lie [token][kv head][split][query head of the kv head].
int64_t Executor::part_row(const Phase &p, const Unit &u, int head, int split) const {
  const int64_t per_kv = p.num_heads / p.num_kv_heads, splits = u.position / kSplitPositions + 1;
  return int64_t(u.part) * p.num_heads + (head * splits + split) * per_kv;
}

void Executor::merge_head(const Phase &p, const Unit &u, int head) const {
  const int per_kv = p.num_heads / p.num_kv_heads, first_query_head = head * per_kv;
  const int64_t at = part_row(p, u, head, 0);
  k_.attend_merge(parts_ + at * p.value_dim, part_stats_ + at * 2, u.position / kSplitPositions + 1, per_kv,
                  p.value_dim, p.sinks ? p.sinks + first_query_head : nullptr,
                  p.out.data + u.token * p.out.stride + int64_t(first_query_head) * p.value_dim);
}

void Executor::attend_unit(int thread, const Phase &p, const Unit &u, int head) {
  ThreadState &s = *threads_[size_t(thread)];
  const KvGroup &g = *groups_[size_t(p.group)];
  const int per_kv = p.num_heads / p.num_kv_heads, first_query_head = head * per_kv;
  AttendArgs a{};
  a.q = p.x.data + u.token * p.x.stride + int64_t(first_query_head) * p.head_dim;
  a.q_stride = p.x.stride;
  a.num_queries = u.num_queries;
  a.heads_per_kv = per_kv;
  a.head_dim = p.head_dim;
  a.value_dim = p.value_dim;
  a.first_position = u.position;
  a.window = p.window;
  a.pages = g.head_pages(p.layer, head);
  a.block_table = args_->tables[size_t(p.group)] + int64_t(u.seq) * args_->table_stride;
  a.block_stride = g.block_stride;
  a.scale = p.scale;
  a.softcap = p.softcap;
  a.scratch = s.attend;
  a.out_stride = int64_t(per_kv) * p.value_dim;
  if (u.part >= 0) {
    for (int split = u.first_split; split < u.last_split; split++) {
      const int64_t at = part_row(p, u, head, split);
      a.first_split = split;
      a.last_split = split + 1;
      a.out = parts_ + at * p.value_dim;
      a.stats = part_stats_ + at * 2;
      k_.attend[g.format](a);
    }
    return;
  }
  // Splits that lie wholly before the window of the first query are nobody's.
  const int oldest = p.window > 0 ? std::max(0, u.position - p.window + 1) : 0;
  a.first_split = oldest / kSplitPositions;
  a.last_split = u.last_split;
  a.out = s.attend_out;
  a.stats = s.attend_stats;
  k_.attend[g.format](a);
  for (int i = 0; i < u.num_queries; i++)
    k_.attend_merge(a.out + i * a.out_stride, a.stats + int64_t(i) * per_kv * 2, 1, per_kv, p.value_dim,
                    p.sinks ? p.sinks + first_query_head : nullptr,
                    p.out.data + (u.token + i) * p.out.stride + int64_t(first_query_head) * p.value_dim);
}

// ---------------------------------------------------------------- ops on their own

void Executor::elementwise(int thread, const Phase &p) {
  for (int token = thread; token < args_->num_tokens; token += active_) elementwise_token(p, token);
}

void Executor::elementwise_token(const Phase &p, int token) {
  const float *x = p.x.data ? p.x.data + token * p.x.stride : nullptr;
  const float *y = p.y.data ? p.y.data + token * p.y.stride : nullptr;
  float *out = p.out.data ? p.out.data + token * p.out.stride : nullptr;
  switch (p.kind) {
  case PhaseKind::kEmbed:
    if (p.head)
      k_.unpack_head_row(p.head->planes, args_->tokens[token], out);
    else
      k_.unpack_row(p.weight.layout, p.weight.data, args_->tokens[token], p.weight.cols, out);
    if (p.scale != 1) k_.scale(out, p.scale, p.out.width, out);
    break;
  case PhaseKind::kRmsNorm: k_.rms_norm(x, p.norm.weight, p.norm.offset, p.norm.eps, p.x.width, out); break;
  case PhaseKind::kLayerNorm: k_.layer_norm(x, p.norm.weight, p.bias, p.norm.eps, p.x.width, out); break;
  case PhaseKind::kHeadNorm:
    for (int64_t at = 0; at < p.x.width; at += p.head_dim)
      k_.rms_norm(x + at, p.norm.weight, p.norm.offset, p.norm.eps, p.head_dim, out + at);
    break;
  case PhaseKind::kRope: {
    if (out != x) std::memcpy(out, x, size_t(p.x.width) * sizeof(float));
    const size_t table = size_t(args_->positions[token]) * size_t(p.rope->rotary_dim / 2);
    for (int64_t at = p.rope->start; at < p.x.width; at += p.head_dim)
      k_.rope(out + at, p.rope->cosine.data() + table, p.rope->sine.data() + table, p.rope->rotary_dim,
              p.rope->interleaved);
    break;
  }
  case PhaseKind::kKvAppend:
    for (int head = 0; head < p.num_kv_heads; head++) {
      store_kv(p, token, head, 0, p.head_dim, x + head * p.head_dim, true);
      store_kv(p, token, head, 0, p.value_dim, y + head * p.value_dim, false);
    }
    break;
  case PhaseKind::kGlu: k_.glu(p.act, x, y, p.x.width, out); break;
  case PhaseKind::kActivation: k_.activation(p.act, x, p.x.width, out); break;
  case PhaseKind::kAdd: k_.add(x, y, p.x.width, out); break;
  case PhaseKind::kScale: k_.scale(x, p.scale, p.x.width, out); break;
  case PhaseKind::kSoftcap: k_.softcap(x, p.softcap, p.x.width, out); break;
  case PhaseKind::kCopy: std::memcpy(out, x, size_t(p.x.width) * sizeof(float)); break;
  case PhaseKind::kLinear:
  case PhaseKind::kAttention:
  case PhaseKind::kHead: break; // have runners of their own
  }
}

} // namespace hayai
