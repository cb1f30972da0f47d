// The executor: a flat list of phases, walked by all threads, one call per step.
//
// A phase is what stands between two barriers. The Python side (backends/cpu.py) has matched the plan's
// ops into phases: [norm +] [quantise +] linear + epilogue is one phase where the plan allows it.
// Determinism: a phase's result never depends on which thread computes a chunk, nor on how many tokens
// are in the step (see kernels.h).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "arena.h"
#include "kernels.h"
#include "pack.h"
#include "pool.h"
#include "sampling.h"

namespace hayai {

struct Weight {
  int layout = kF32;
  int64_t cols = 0, groups = 0;
  size_t group_bytes = 0;
  const uint8_t *data = nullptr;
};

// A [rows][stride] array of floats; `per_logit_row` ones have max_rows rows, others max_tokens.
struct Buffer {
  float *data = nullptr;
  int64_t width = 0, stride = 0;
};

struct RopeTable {
  std::vector<float> cosine, sine; // [position][rotary_dim / 2]
  int rotary_dim = 0, start = 0;
  bool interleaved = true;
};

// Pages of one cache group: [block][layer][kv head][page].
struct KvGroup {
  int format = kF16Kv;
  int num_layers = 0, num_heads = 0, head_dim = 0, value_dim = 0;
  int64_t num_blocks = 0;
  size_t page = 0, block_stride = 0;
  Region region;
  uint8_t *head_pages(int layer, int head) const {
    return region.data() + (size_t(layer) * num_heads + head) * page;
  }
};

// The output head where it can be screened: Q8_0 rows split into planes (kernels.h, HeadPlanes).
struct ScreenedHead {
  HeadPlanes planes{};
  uint8_t *high = nullptr, *outlier = nullptr, *low = nullptr;
  int64_t vocab = 0, groups = 0;
  int32_t outlier_inputs[kOutliers] = {};
  float *rest_error = nullptr, *outlier_error = nullptr;
  float max_code_norm = 0, max_row_norm = 0;
};

// Logit rows that go through the head together. Their logits stay in cache until they have been read, memory
// does not grow with the number of rows, and the weights of so many rows' products are read often enough.
constexpr int kRowTile = 16;

struct RowTile {
  const int32_t *rows = nullptr; // which logit rows of the step
  int count = 0;
  bool screened = false;
};

// A GLU chunk's outputs fit this many floats on the stack.
constexpr int64_t kMaxGluChunk = 512;

struct NormSpec {
  const float *weight = nullptr; // null: no norm
  float offset = 0, eps = 0;
};

enum class PhaseKind {
  kEmbed,
  kLinear,
  kAttention,
  kHead,
  kRmsNorm,
  kLayerNorm,
  kHeadNorm,
  kRope,
  kKvAppend,
  kGlu,
  kActivation,
  kAdd,
  kScale,
  kSoftcap,
  kCopy,
};
enum class Epilogue { kStore, kAdd, kGlu, kQkv };
enum class InputKind { kBuffer, kQuantised };

struct Segment {
  int64_t rows = 0;
  Buffer out;
};

// One record for all kinds; a kind uses the fields that its runner names. Kept flat on purpose: it is
// read in order, once per step, and is easy to print.
struct Phase {
  PhaseKind kind = PhaseKind::kCopy;
  Buffer x, y, out; // inputs and output
  // linear and head
  InputKind input = InputKind::kBuffer;
  int attention_phase = -1; // of an attention phase: how many came before it
  NormSpec norm;
  Weight weight;
  const float *bias = nullptr;
  Epilogue epilogue = Epilogue::kStore;
  std::vector<Segment> segments;
  int64_t chunk_groups = 1, num_chunks = 0;
  int act = kSilu;
  bool glu_quantise = false;
  float glu_factor = 1;
  // heads, rope, kv
  int num_heads = 0, num_kv_heads = 0, head_dim = 0, value_dim = 0;
  const RopeTable *rope = nullptr;
  NormSpec q_norm, k_norm;
  int group = 0, layer = 0;
  // attention
  float scale = 1, softcap = 0;
  int window = 0;
  const float *sinks = nullptr;
  // embed and head
  const ScreenedHead *head = nullptr;
  int range_index = -1; // linear, attention and head phases: index into the work ranges
};

// What one step is asked to do. Pointers stay valid during the call.
struct StepArgs {
  int num_tokens = 0, num_seqs = 0, num_rows = 0;
  const int32_t *tokens = nullptr, *positions = nullptr, *query_start = nullptr;
  std::vector<const int32_t *> tables; // per group: [num_seqs][table_stride]
  int64_t table_stride = 0;
  const int32_t *logit_rows = nullptr;
  const SamplingSpec *sampling = nullptr;
  RowExtras extras;
  int32_t *out_tokens = nullptr;
  float *out_logprobs = nullptr;
  int max_top = 0;
  int32_t *out_top_ids = nullptr;
  float *out_top_logprobs = nullptr;
  float *out_logits = nullptr; // [num_rows][vocab] or null
};

struct StepStats {
  double step_ns = 0, lost_ns = 0, waited_ns = 0, threads = 0, survivors = 0;
};

class Executor {
public:
  Executor(const KernelTable &table, int threads, int max_tokens, int max_rows, int max_context);
  ~Executor();

  const KernelTable &table() const { return k_; }

  // Building, in any order before finish().
  void reserve_weights(size_t bytes);
  int add_weight(int layout, int64_t groups, int64_t cols);
  void fill_weight(int weight, const uint8_t *rows, int64_t num_rows, int64_t first_group, int64_t step);
  int add_head(const uint8_t *q8_rows, int64_t vocab, int64_t cols);
  // After finish(), before the first step: choose the outlier inputs by running `tokens`.
  void calibrate_head(int head, const int32_t *tokens, int count);
  int add_vector(const float *data, int64_t n);
  int add_buffer(int64_t width, bool per_logit_row);
  int add_rope(const float *cosine, const float *sine, int64_t positions, int rotary_dim, int start,
               bool interleaved);
  int add_group(int format, int layers, int heads, int head_dim, int value_dim, int64_t num_blocks);
  int add_phase(Phase phase);
  void finish(int64_t vocab);

  const Weight &weight(int i) const { return weights_.at(size_t(i)); }
  const ScreenedHead &head(int i) const { return *heads_.at(size_t(i)); }
  const float *vector(int i) const { return i < 0 ? nullptr : vectors_.at(size_t(i)); }
  const Buffer &buffer(int i) const { return buffers_.at(size_t(i)); }
  const RopeTable *rope(int i) const { return i < 0 ? nullptr : ropes_.at(size_t(i)).get(); }
  KvGroup &group(int i) { return *groups_.at(size_t(i)); }
  size_t weight_bytes() const { return weight_arena_ ? weight_arena_->used() : 0; }

  int max_tokens() const { return max_tokens_; }
  int max_rows() const { return max_rows_; }
  int64_t vocab() const { return vocab_; } // 0 before finish()
  size_t num_groups() const { return groups_.size(); }

  void step(const StepArgs &args);
  void copy_blocks(int group, int64_t source, int64_t target);
  const StepStats &stats() const { return stats_; }

private:
  struct ThreadState;
  struct Unit; // a piece of attention work
  struct HeadRow;
  struct HeadInput;
  struct Candidate {
    int64_t row;
    float bound, high;
  };

  // Quantised inputs. store 0: filled by a phase's prologue (many tokens); store 1: by a GLU epilogue, and for
  // the outlier plane of the head.
  struct ActStore {
    int8_t *q = nullptr;
    float *scale = nullptr, *sum = nullptr, *x = nullptr;
    int64_t ldx = 0;
  };
  static void fill_slot(const ActStore &store, int tile, int slot, int64_t blocks, const int8_t *q,
                        const float *scale, const float *sum);

  void check(const StepArgs &args) const;
  void run_silently(const int32_t *tokens, int count);
  void run_thread(int thread);
  void run_phase(int thread, const Phase &p);
  void reset_ranges(int thread);
  void reset_range(int thread, const Phase &p);
  template <class Work> void for_chunks(int thread, int range_index, int64_t count, Work &&work);
  // A thread's share of `count` pieces of work, and the end of the part that nobody may steal.
  int64_t share_begin(int64_t count, int thread) const { return count * thread / active_; }
  int64_t share_end(int64_t count, int thread) const {
    return thread < active_ ? count * (thread + 1) / active_ : 0;
  }
  int64_t static_end(int64_t count, int thread) const {
    if (thread >= active_) return 0;
    const int64_t begin = share_begin(count, thread);
    return begin + (share_end(count, thread) - begin) * 7 / 10;
  }
  int64_t work_count(const Phase &p) const;

  void linear(int thread, const Phase &p);
  void linear_one(int thread, const Phase &p);
  void linear_many(int thread, const Phase &p);
  const float *input_row(int thread, const Phase &p, int token);
  void epilogue(const Phase &p, int token, int64_t first_group, int64_t groups, float *y);
  void epilogue_glu(const Phase &p, int token, int64_t first_group, int64_t groups, float *y);
  void epilogue_qkv(const Phase &p, int token, int64_t row, int64_t rows, float *y);
  uint8_t *page_of(const Phase &p, int token, int head) const;
  void store_kv(const Phase &p, int token, int head, int dim, int dims, const float *y, bool key);
  void attention(int thread, const Phase &p);
  void attend_unit(int thread, const Phase &p, const Unit &u, int head);
  void plan_units();
  void plan_rows();
  void plan_row_tiles(const std::vector<int32_t> &rows, bool screened);
  void attend_splits(int thread, const Phase &p);
  int64_t part_row(const Phase &p, const Unit &u, int head, int split) const;
  void merge_head(const Phase &p, const Unit &u, int head) const;
  void elementwise(int thread, const Phase &p);
  void elementwise_token(const Phase &p, int token);
  void lm_head(int thread, const Phase &p);
  const float *head_row_input(int thread, const Phase &p, int row);
  void prepare_planes(int thread, const Phase &p, int row, HeadInput &input);
  HeadInput &head_input(int thread, int i, const RowTile &tile);
  HeadRow &head_row(int thread, int i);
  float *logits_of(int i) { return logits_ + i * padded_vocab_; } // i: within the tile
  void prepare_rows(int thread, const Phase &p, const RowTile &tile);
  void high_parts(int thread, const Phase &p, const RowTile &tile, int64_t first, int64_t groups);
  void low_parts(int thread, const Phase &p, const HeadInput &input, const int64_t *rows, int64_t n,
                 float *y);
  void low_chunk(int thread, const Phase &p, const RowTile &tile, int64_t first, int64_t groups);
  void screened_pass(int thread, const Phase &p, const RowTile &tile);
  void rescore(int thread, const Phase &p, const RowTile &tile);
  void store_best(const RowTile &tile);
  static void collect_candidates(const float *bound, const float *high, int64_t begin, int64_t end,
                                 float threshold, std::vector<Candidate> &found);
  void score_candidates(int thread, const Phase &p, const RowTile &tile, int i, const Candidate *candidates,
                        size_t n);
  void full_pass(int thread, const Phase &p, const RowTile &tile);
  void prepare_plain(int thread, const Phase &p, const RowTile &tile);
  void plain_logits(int thread, const Phase &p, const RowTile &tile, int64_t first, int64_t groups);
  void sample_rows(int thread, const RowTile &tile);

  const KernelTable &k_;
  Pool pool_;
  Governor governor_;
  const int max_tokens_, max_rows_, max_context_;
  int64_t vocab_ = 0;
  int active_ = 1;

  std::unique_ptr<Arena> weight_arena_;
  std::vector<Weight> weights_;
  std::vector<std::unique_ptr<ScreenedHead>> heads_;
  std::vector<std::unique_ptr<Region>> owned_;
  std::vector<float *> vectors_;
  std::vector<Buffer> buffers_;
  std::vector<std::unique_ptr<RopeTable>> ropes_;
  std::vector<std::unique_ptr<KvGroup>> groups_;
  std::vector<Phase> phases_;
  int num_ranges_ = 0;

  ActStore stores_[2];
  Region act_region_;
  struct alignas(64) WorkRange {
    std::atomic<uint64_t> packed{0}; // end << 32 | next
  };
  static int64_t take(WorkRange &range, bool from_front);
  std::unique_ptr<WorkRange[]> ranges_;
  std::vector<std::unique_ptr<ThreadState>> threads_;

  // Per step.
  std::atomic<bool> running_{false};
  const StepArgs *args_ = nullptr;
  std::vector<int32_t> seq_of_token_;
  std::vector<Unit> units_;
  bool by_split_ = false; // few single tokens: attention is cut by splits, in cache order
  alignas(64) std::atomic<int> next_unit_[2] = {};
  std::vector<std::atomic<int>> splits_done_[2]; // per sequence and kv head, of every other attention phase
  int attention_count_ = 0;
  Region parts_region_;
  float *parts_ = nullptr, *part_stats_ = nullptr;
  int64_t part_capacity_ = 0;
  Region head_region_;
  float *logits_ = nullptr, *bounds_ = nullptr;
  int64_t padded_vocab_ = 0;
  std::vector<int32_t> screened_rows_, full_rows_; // of this step: logit rows by way of serving them
  std::vector<RowTile> row_tiles_;
  std::vector<std::unique_ptr<HeadInput>> head_inputs_; // per row of a tile, where there are several
  std::vector<HeadRow> head_rows_;                      // [thread][row of the tile]
  std::atomic<float> thresholds_[kRowTile] = {};        // per screened row: the best exact logit known
  std::atomic<int64_t> next_candidate_{0};
  std::atomic<int64_t> survivors_{0};
  StepStats stats_;
};

} // namespace hayai
