// The Python module hayai._native. Nothing below this file knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "executor.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hayai {

void bind_kernels(nb::module_ &m); // bindings_kernels.cpp

template <class T> using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T> using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

namespace {

void require(bool ok, const char *what) {
  if (!ok) throw std::invalid_argument(what);
}

std::unique_ptr<Executor> make_executor(const std::string &isa, int threads, int max_tokens, int max_rows,
                                        int max_context) {
  const KernelTable *table = choose_kernels(isa.c_str());
  require(table != nullptr, "unknown instruction set; known: scalar, avx2, avx512");
  require(threads >= 1 && max_tokens >= 1 && max_rows >= 1 && max_context >= 1, "executor: bad limits");
  return std::make_unique<Executor>(*table, threads, max_tokens, max_rows, max_context);
}

// Indexed by KvFormat; backends/base.KV_FORMATS.
constexpr const char *kKvFormats[] = {"f16", "q8"};

int add_group(Executor &e, const std::string &format, int layers, int heads, int head_dim, int value_dim,
              int64_t num_blocks) {
  for (int i = 0; i < kKvFormatCount; i++)
    if (format == kKvFormats[i]) return e.add_group(i, layers, heads, head_dim, value_dim, num_blocks);
  throw std::invalid_argument("unknown format of the KV cache; known: f16, q8");
}

void fill_weight(Executor &e, int weight, Matrix<const uint8_t> rows, int64_t num_rows, int64_t first_group,
                 int64_t step) {
  const Weight &w = e.weight(weight);
  require(int64_t(rows.shape(0)) == num_rows && rows.shape(1) == file_row_bytes(w.layout, w.cols),
          "weight: bytes do not fit the layout");
  nb::gil_scoped_release release;
  e.fill_weight(weight, rows.data(), num_rows, first_group, step);
}

int add_head(Executor &e, Matrix<const uint8_t> rows, int64_t cols) {
  require(cols % kBlockInputs == 0 && rows.shape(1) == file_row_bytes(kQ8_0, cols) && rows.shape(0) > 0,
          "head: bytes do not fit");
  nb::gil_scoped_release release;
  return e.add_head(rows.data(), int64_t(rows.shape(0)), cols);
}

void calibrate_head(Executor &e, int head, Vector<const int32_t> tokens) {
  require(int(tokens.shape(0)) <= e.max_tokens(), "calibrate: too many tokens");
  nb::gil_scoped_release release;
  e.calibrate_head(head, tokens.data(), int(tokens.shape(0)));
}

NormSpec norm_spec(Executor &e, int weight, float offset, float eps) {
  return {e.vector(weight), offset, eps};
}

Buffer buffer_or_none(Executor &e, int id) { return id < 0 ? Buffer{} : e.buffer(id); }

int add_linear(Executor &e, int weight, int x, std::vector<std::tuple<int, int64_t>> outs,
               int64_t chunk_groups, const std::string &epilogue, bool quantised, int norm, float norm_offset,
               float norm_eps, int bias, int act, bool glu_quantise, float glu_factor) {
  Phase p;
  p.kind = PhaseKind::kLinear;
  p.weight = e.weight(weight);
  p.x = buffer_or_none(e, x);
  p.input = quantised ? InputKind::kQuantised : InputKind::kBuffer;
  p.norm = norm_spec(e, norm, norm_offset, norm_eps);
  p.bias = e.vector(bias);
  p.chunk_groups = chunk_groups;
  p.act = act;
  p.glu_quantise = glu_quantise;
  p.glu_factor = glu_factor;
  for (auto &[buffer, rows] : outs) {
    p.segments.push_back({rows, e.buffer(buffer)});
    p.out = e.buffer(buffer);
  }
  require(!p.segments.empty() && chunk_groups >= 1, "linear: no output");
  if (epilogue == "add") {
    p.epilogue = Epilogue::kAdd;
  } else if (epilogue == "glu") {
    p.epilogue = Epilogue::kGlu;
    const int64_t rows = chunk_groups / 2 * e.table().group_rows;
    require(chunk_groups % 2 == 0 && rows <= kMaxGluChunk && (!glu_quantise || rows % kBlockInputs == 0),
            "linear: glu chunks must hold whole pairs and blocks");
  } else {
    require(epilogue == "store", "linear: unknown epilogue");
  }
  return e.add_phase(std::move(p));
}

int add_qkv(Executor &e, int weight, int x, int norm, float norm_offset, float norm_eps, int bias, int q_out,
            int num_heads, int num_kv_heads, int head_dim, int value_dim, int rope, int q_norm, int k_norm,
            float head_norm_offset, float head_norm_eps, int group, int layer, int64_t chunk_groups) {
  Phase p;
  p.kind = PhaseKind::kLinear;
  p.epilogue = Epilogue::kQkv;
  p.weight = e.weight(weight);
  p.x = e.buffer(x);
  p.norm = norm_spec(e, norm, norm_offset, norm_eps);
  p.bias = e.vector(bias);
  p.out = e.buffer(q_out);
  p.num_heads = num_heads;
  p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim;
  p.value_dim = value_dim;
  p.rope = e.rope(rope);
  p.q_norm = norm_spec(e, q_norm, head_norm_offset, head_norm_eps);
  p.k_norm = norm_spec(e, k_norm, head_norm_offset, head_norm_eps);
  p.group = group;
  p.layer = layer;
  p.chunk_groups = chunk_groups;
  const int64_t rows = chunk_groups * e.table().group_rows;
  require(head_dim % rows == 0 && value_dim % rows == 0, "qkv: chunks must divide heads");
  require(e.group(group).format != kQ8Kv || (rows == head_dim && rows == value_dim),
          "qkv: a q8 cache takes whole heads");
  return e.add_phase(std::move(p));
}

int add_attention(Executor &e, int q, int out, int group, int layer, int num_heads, int num_kv_heads,
                  int head_dim, int value_dim, float scale, float softcap, int window, int sinks) {
  Phase p;
  p.kind = PhaseKind::kAttention;
  p.x = e.buffer(q);
  p.out = e.buffer(out);
  p.group = group;
  p.layer = layer;
  p.num_heads = num_heads;
  p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim;
  p.value_dim = value_dim;
  p.scale = scale;
  p.softcap = softcap;
  p.window = window;
  p.sinks = e.vector(sinks);
  return e.add_phase(std::move(p));
}

// Where a phase finds the vocabulary's rows: in the planes of a head, or in a matrix of its own.
void use_table(Executor &e, Phase &p, int weight, int head) {
  if (head >= 0)
    p.head = &e.head(head);
  else
    p.weight = e.weight(weight);
}

int add_lm_head(Executor &e, int weight, int head, int x, int norm, float norm_offset, float norm_eps,
                float softcap, int64_t chunk_groups) {
  Phase p;
  p.kind = PhaseKind::kHead;
  use_table(e, p, weight, head);
  p.x = e.buffer(x);
  p.norm = norm_spec(e, norm, norm_offset, norm_eps);
  p.softcap = softcap;
  p.chunk_groups = chunk_groups;
  return e.add_phase(std::move(p));
}

int add_embed(Executor &e, int weight, int head, int out, float scale) {
  Phase p;
  p.kind = PhaseKind::kEmbed;
  use_table(e, p, weight, head);
  p.out = e.buffer(out);
  p.scale = scale;
  return e.add_phase(std::move(p));
}

constexpr std::pair<const char *, PhaseKind> kPlainKinds[] = {
    {"rms_norm", PhaseKind::kRmsNorm},
    {"layer_norm", PhaseKind::kLayerNorm},
    {"head_norm", PhaseKind::kHeadNorm},
    {"rope", PhaseKind::kRope},
    {"kv_append", PhaseKind::kKvAppend},
    {"glu", PhaseKind::kGlu},
    {"activation", PhaseKind::kActivation},
    {"add", PhaseKind::kAdd},
    {"scale", PhaseKind::kScale},
    {"softcap", PhaseKind::kSoftcap},
    {"copy", PhaseKind::kCopy},
};

int add_plain(Executor &e, const std::string &kind, int x, int y, int out, int weight, int bias, float eps,
              float offset, float factor, int act, int head_dim, int value_dim, int num_kv_heads, int rope,
              int group, int layer) {
  Phase p;
  bool found = false;
  for (auto &[name, value] : kPlainKinds)
    if (kind == name) {
      p.kind = value;
      found = true;
    }
  require(found, "unknown phase kind");
  p.x = e.buffer(x);
  p.y = buffer_or_none(e, y);
  p.out = buffer_or_none(e, out);
  p.norm = norm_spec(e, weight, offset, eps);
  p.bias = e.vector(bias);
  p.scale = p.softcap = factor;
  p.act = act;
  p.head_dim = head_dim;
  p.value_dim = value_dim;
  p.num_kv_heads = num_kv_heads;
  p.rope = e.rope(rope);
  p.group = group;
  p.layer = layer;
  return e.add_phase(std::move(p));
}

template <class T> const T *data_or_null(const std::optional<Vector<const T>> &a) {
  return a ? a->data() : nullptr;
}

// Compressed rows: start [rows + 1], ids and values as many as start says (its values: Executor::check).
template <class T>
void require_sparse(int rows, const std::optional<Vector<const int32_t>> &start,
                    const std::optional<Vector<const int32_t>> &ids,
                    const std::optional<Vector<const T>> &values, const char *what) {
  if (!start) return;
  require(ids && values && start->shape(0) == size_t(rows) + 1, what);
  const int32_t count = start->data()[rows];
  require(count >= 0 && ids->shape(0) == size_t(count) && values->shape(0) == size_t(count), what);
}

template <class A, class B> bool same_shape(const A &a, const B &b) {
  return a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1);
}

// Shapes are checked here, values (ids, positions, block numbers) in Executor::check.
void step(Executor &e, Vector<const int32_t> tokens, Vector<const int32_t> positions,
          Vector<const int32_t> query_start, std::vector<Matrix<const int32_t>> tables,
          Vector<const int32_t> logit_rows, Vector<const uint8_t> sampling, Vector<int32_t> out_tokens,
          Vector<float> out_logprobs, std::optional<Vector<const int32_t>> bias_start,
          std::optional<Vector<const int32_t>> bias_ids, std::optional<Vector<const float>> bias_values,
          std::optional<Vector<const int32_t>> history_start,
          std::optional<Vector<const int32_t>> history_ids,
          std::optional<Vector<const int32_t>> history_counts,
          std::vector<std::optional<Vector<const uint32_t>>> masks,
          std::optional<Vector<const int32_t>> targets, std::optional<Matrix<int32_t>> top_ids,
          std::optional<Matrix<float>> top_logprobs, std::optional<Matrix<float>> out_logits) {
  StepArgs a;
  a.num_tokens = int(tokens.shape(0));
  a.num_seqs = int(query_start.shape(0)) - 1;
  a.num_rows = int(logit_rows.shape(0));
  require(a.num_tokens >= 1 && a.num_tokens <= e.max_tokens() && a.num_rows <= e.max_rows() &&
              a.num_seqs >= 1 && a.num_seqs <= a.num_tokens,
          "step: more tokens or rows than the executor was made for");
  require(int(positions.shape(0)) == a.num_tokens && int(out_tokens.shape(0)) == a.num_rows &&
              int(out_logprobs.shape(0)) == a.num_rows &&
              sampling.shape(0) == size_t(a.num_rows) * sizeof(SamplingSpec) &&
              tables.size() == e.num_groups(),
          "step: array sizes disagree");
  a.tokens = tokens.data();
  a.positions = positions.data();
  a.query_start = query_start.data();
  for (auto &table : tables) {
    require(int(table.shape(0)) == a.num_seqs && table.shape(1) == tables[0].shape(1),
            "step: block tables need a row per sequence and one width");
    a.tables.push_back(table.data());
    a.table_stride = int64_t(table.shape(1));
  }
  a.logit_rows = logit_rows.data();
  a.sampling = reinterpret_cast<const SamplingSpec *>(sampling.data());
  a.extras = {data_or_null(bias_start),
              data_or_null(bias_ids),
              data_or_null(bias_values),
              data_or_null(history_start),
              data_or_null(history_ids),
              data_or_null(history_counts),
              nullptr,
              data_or_null(targets)};
  require(!targets || int(targets->shape(0)) == a.num_rows, "step: targets need an entry per logit row");
  require_sparse(a.num_rows, bias_start, bias_ids, bias_values, "step: bias arrays disagree");
  require_sparse(a.num_rows, history_start, history_ids, history_counts, "step: history arrays disagree");
  require(masks.empty() || int(masks.size()) == a.num_rows, "step: masks need an entry per logit row");
  std::vector<const uint32_t *> mask_rows;
  for (auto &mask : masks) {
    require(!mask || int64_t(mask->shape(0)) * 32 >= e.vocab(), "step: mask shorter than the vocabulary");
    mask_rows.push_back(mask ? mask->data() : nullptr);
  }
  if (!mask_rows.empty()) a.extras.masks = mask_rows.data();
  a.out_tokens = out_tokens.data();
  a.out_logprobs = out_logprobs.data();
  require(bool(top_ids) == bool(top_logprobs) && (!top_ids || same_shape(*top_ids, *top_logprobs)) &&
              (!top_ids || int(top_ids->shape(0)) == a.num_rows),
          "step: top_ids and top_logprobs need a row per logit row and one shape");
  if (top_ids) {
    a.max_top = int(top_ids->shape(1));
    a.out_top_ids = top_ids->data();
    a.out_top_logprobs = top_logprobs->data();
  }
  require(!out_logits ||
              (int(out_logits->shape(0)) == a.num_rows && int64_t(out_logits->shape(1)) == e.vocab()),
          "step: out_logits must be logit rows by vocabulary");
  if (out_logits) a.out_logits = out_logits->data();
  nb::gil_scoped_release release;
  e.step(a);
}

nb::dict stats(const Executor &e) {
  const StepStats &s = e.stats();
  nb::dict d;
  d["step_ns"] = s.step_ns;
  d["lost_ns"] = s.lost_ns;
  d["waited_ns"] = s.waited_ns;
  d["threads"] = s.threads;
  d["survivors"] = s.survivors;
  return d;
}

// Seconds that `threads` threads take to read `bytes` once, `repeats` times after one warm-up: the
// roofline. Own memory on the same kind of pages as the weights.
std::vector<double> read_bandwidth(size_t bytes, int threads, bool huge_pages, int repeats) {
  require(threads >= 1 && threads <= 1024 && repeats >= 1 && bytes >= 4096 * size_t(threads),
          "read_bandwidth: bad arguments");
  nb::gil_scoped_release release;
  Region region(bytes, huge_pages);
  for (size_t i = 0; i < bytes; i += 64) region.data()[i] = uint8_t(i >> 6);
  const KernelTable &k = *choose_kernels("");
  Pool pool(threads);
  const size_t share = bytes / size_t(threads) / 4096 * 4096;
  std::vector<double> seconds;
  std::atomic<uint64_t> sum{0};
  for (int i = 0; i <= repeats; i++) {
    const int64_t start = now_ns();
    pool.run(threads, [&](int t) {
      sum.fetch_xor(k.read_bytes(region.data() + size_t(t) * share, share), std::memory_order_relaxed);
    });
    if (i > 0)
      seconds.push_back(double(now_ns() - start) * 1e-9 * double(bytes) / double(share * size_t(threads)));
  }
  return seconds;
}

// Gives what malloc holds free in its arenas back to the system. Only glibc has to be asked.
void release_free_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

} // namespace

NB_MODULE(_native, m) {
  // A model that the program holds until its end is no leak, but nanobind would print one for each.
  nb::set_leak_warnings(false);
  bind_kernels(m);
  nb::class_<Executor>(m, "Executor")
      .def(nb::new_(&make_executor), "isa"_a, "threads"_a, "max_tokens"_a, "max_rows"_a, "max_context"_a)
      .def_prop_ro("isa", [](const Executor &e) { return e.table().name; })
      .def_prop_ro("group_rows", [](const Executor &e) { return e.table().group_rows; })
      .def_prop_ro("weight_bytes", &Executor::weight_bytes)
      .def("reserve_weights", &Executor::reserve_weights)
      .def("add_weight", &Executor::add_weight, "layout"_a, "groups"_a, "cols"_a)
      .def("fill_weight", &fill_weight, "weight"_a, "rows"_a, "num_rows"_a, "first_group"_a, "step"_a)
      .def("add_head", &add_head, "rows"_a, "cols"_a)
      .def("calibrate_head", &calibrate_head, "head"_a, "tokens"_a)
      .def("add_vector",
           [](Executor &e, Vector<const float> v) { return e.add_vector(v.data(), int64_t(v.shape(0))); })
      .def("add_buffer", &Executor::add_buffer, "width"_a, "per_logit_row"_a)
      .def(
          "add_rope",
          [](Executor &e, Matrix<const float> cosine, Matrix<const float> sine, int start, bool interleaved) {
            return e.add_rope(cosine.data(), sine.data(), int64_t(cosine.shape(0)), int(cosine.shape(1)) * 2,
                              start, interleaved);
          },
          "cosine"_a, "sine"_a, "start"_a, "interleaved"_a)
      .def("add_group", &add_group, "format"_a, "layers"_a, "heads"_a, "head_dim"_a, "value_dim"_a,
           "num_blocks"_a)
      .def("add_embed", &add_embed, "weight"_a, "head"_a, "out"_a, "scale"_a)
      .def("add_linear", &add_linear, "weight"_a, "x"_a, "outs"_a, "chunk_groups"_a, "epilogue"_a,
           "quantised"_a = false, "norm"_a = -1, "norm_offset"_a = 0.f, "norm_eps"_a = 0.f, "bias"_a = -1,
           "act"_a = 0, "glu_quantise"_a = false, "glu_factor"_a = 1.f)
      .def("add_qkv", &add_qkv, "weight"_a, "x"_a, "norm"_a, "norm_offset"_a, "norm_eps"_a, "bias"_a,
           "q_out"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "value_dim"_a, "rope"_a, "q_norm"_a,
           "k_norm"_a, "head_norm_offset"_a, "head_norm_eps"_a, "group"_a, "layer"_a, "chunk_groups"_a)
      .def("add_attention", &add_attention, "q"_a, "out"_a, "group"_a, "layer"_a, "num_heads"_a,
           "num_kv_heads"_a, "head_dim"_a, "value_dim"_a, "scale"_a, "softcap"_a, "window"_a, "sinks"_a)
      .def("add_lm_head", &add_lm_head, "weight"_a, "head"_a, "x"_a, "norm"_a, "norm_offset"_a, "norm_eps"_a,
           "softcap"_a, "chunk_groups"_a)
      .def("add_plain", &add_plain, "kind"_a, "x"_a, "y"_a = -1, "out"_a = -1, "weight"_a = -1, "bias"_a = -1,
           "eps"_a = 0.f, "offset"_a = 0.f, "factor"_a = 1.f, "act"_a = 0, "head_dim"_a = 0,
           "value_dim"_a = 0, "num_kv_heads"_a = 0, "rope"_a = -1, "group"_a = 0, "layer"_a = 0)
      .def("finish", &Executor::finish, "vocab"_a)
      .def("step", &step, "tokens"_a, "positions"_a, "query_start"_a, "tables"_a, "logit_rows"_a,
           "sampling"_a, "out_tokens"_a, "out_logprobs"_a, "bias_start"_a = nb::none(),
           "bias_ids"_a = nb::none(), "bias_values"_a = nb::none(), "history_start"_a = nb::none(),
           "history_ids"_a = nb::none(), "history_counts"_a = nb::none(),
           "masks"_a = std::vector<std::optional<Vector<const uint32_t>>>{}, "targets"_a = nb::none(),
           "top_ids"_a = nb::none(), "top_logprobs"_a = nb::none(), "out_logits"_a = nb::none())
      .def("copy_blocks", &Executor::copy_blocks, "group"_a, "source"_a, "target"_a)
      .def("stats", &stats, nb::sig("def stats(self) -> dict[str, float]"));
  m.def("group_bytes", &group_bytes, "layout"_a, "group_rows"_a, "cols"_a);
  m.def("head_low_row_bytes", &head_low_row_bytes, "cols"_a);
  m.def("release_free_memory", &release_free_memory, nb::call_guard<nb::gil_scoped_release>());
  m.def("read_bandwidth", &read_bandwidth, "bytes"_a, "threads"_a, "huge_pages"_a, "repeats"_a);
}

} // namespace hayai
