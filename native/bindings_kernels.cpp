// Every entry of a kernel table on numpy arrays, for tests and benchmarks. Arrays must fit: shapes are
// checked here, so that a wrong test fails with a message and not with a broken heap. The engine does
// not use this file.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "kernels.h"
#include "pack.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hayai {

void bind_kernels(nb::module_ &m);

namespace {

template <class T> using Vec = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T> using Mat = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = Vec<const uint8_t>;
using Floats = Vec<const float>;
using Out = Vec<float>;

void need(bool ok, const char *what) {
  if (!ok) {
    throw std::invalid_argument(what);
  }
}

template <class T> int64_t len(const T &a) { return int64_t(a.size()); }

struct Kernels {
  const KernelTable *table;
};

// 64-byte aligned scratch.
struct Scratch {
  void *p;
  explicit Scratch(size_t bytes) : p(aligned_alloc(64, (bytes + 127) / 64 * 64)) {}
  ~Scratch() { free(p); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
};

Kernels kernels(const std::string &isa) {
  const KernelTable *table = choose_kernels(isa.c_str());
  need(table != nullptr, "unknown instruction set");
  return {table};
}

// Names of the tables this machine can run, weakest first.
std::vector<std::string> kernel_isas() {
  std::vector<std::string> names;
  for (const char *ceiling : {"scalar", "avx2", "avx512"}) {
    const KernelTable *table = choose_kernels(ceiling);
    if (table && (names.empty() || names.back() != table->name)) {
      names.push_back(table->name);
    }
  }
  return names;
}

int checked_layout(int layout, int64_t cols) {
  need(layout >= 0 && layout < kLayoutCount, "unknown layout");
  need(cols >= 1 && (layout_is_float(layout) || cols % kBlockInputs == 0), "bad number of columns");
  return layout;
}

// ---------------------------------------------------------------- packing

void pack(int layout, int group_rows, Mat<const uint8_t> rows, int64_t cols, int64_t first_row,
          Vec<uint8_t> out, size_t group_stride) {
  checked_layout(layout, cols);
  const int64_t n = int64_t(rows.shape(0)), groups = (first_row + n + group_rows - 1) / group_rows;
  need(rows.shape(1) == file_row_bytes(layout, cols), "rows do not fit the layout");
  need(group_stride >= group_bytes(layout, group_rows, cols) &&
           len(out) >= int64_t(group_stride) * (groups - 1) + int64_t(group_bytes(layout, group_rows, cols)),
       "packed bytes do not fit");
  nb::gil_scoped_release release;
  pack_rows(layout, group_rows, rows.data(), rows.shape(1), n, cols, first_row, out.data(), group_stride);
}

float pack_head(int group_rows, Mat<const uint8_t> rows, int64_t cols, Vec<const int32_t> outliers,
                Vec<uint8_t> high, Vec<uint8_t> outlier, Vec<uint8_t> low, Out rest_error,
                Out outlier_error) {
  checked_layout(kQ8_0, cols);
  const int64_t n = int64_t(rows.shape(0)), groups = (n + group_rows - 1) / group_rows;
  need(rows.shape(1) == file_row_bytes(kQ8_0, cols) && len(outliers) == kOutliers && n > 0, "bad rows");
  need(len(high) == groups * int64_t(group_bytes(kQ4_0, group_rows, cols)) &&
           len(outlier) == groups * int64_t(group_bytes(kQ4_0, group_rows, kBlockInputs)) &&
           len(low) == n * int64_t(head_low_row_bytes(cols)) && len(rest_error) == n &&
           len(outlier_error) == n,
       "planes do not fit");
  nb::gil_scoped_release release;
  split_head_rows(group_rows, rows.data(), rows.shape(1), n, cols, high.data(), low.data());
  return pack_outlier_plane(group_rows, low.data(), 0, n, cols, outliers.data(), outlier.data(),
                            rest_error.data(), outlier_error.data());
}

// ---------------------------------------------------------------- linear

int64_t groups_of(const Kernels &k, int layout, const Bytes &w, int64_t cols) {
  checked_layout(layout, cols);
  const int64_t bytes = int64_t(group_bytes(layout, k.table->group_rows, cols));
  need(len(w) > 0 && len(w) % bytes == 0, "weights are not whole groups");
  return len(w) / bytes;
}

void gemv(const Kernels &k, int layout, Bytes w, int64_t cols, Vec<const int8_t> q, Floats scale, Floats sum,
          Floats x, Out y, int repeats) {
  const int64_t groups = groups_of(k, layout, w, cols), blocks = cols / kBlockInputs;
  need(layout_is_float(layout) ? len(x) == cols
                               : len(q) == cols && len(scale) == blocks && len(sum) == blocks,
       "input does not fit");
  need(len(y) == groups * k.table->group_rows, "output does not fit");
  const ActRow a{q.data(), scale.data(), sum.data(), x.data()};
  nb::gil_scoped_release release;
  for (int i = 0; i < repeats; i++) {
    k.table->gemv[layout](w.data(), groups, cols, a, y.data());
  }
}

void check_batch(int64_t tokens, int64_t cols, const Vec<const int8_t> &q, const Floats &scale,
                 const Floats &sum) {
  const int64_t tiles = (tokens + kTileTokens - 1) / kTileTokens, values = tiles * (cols / kBlockInputs) * 4;
  need(len(q) == values * kBlockInputs && len(scale) == values && len(sum) == values,
       "input tiles do not fit");
}

void gemm(const Kernels &k, int layout, Bytes w, int64_t cols, int64_t tokens, Vec<const int8_t> q,
          Floats scale, Floats sum, Mat<const float> x, Mat<float> y, int repeats) {
  const int64_t groups = groups_of(k, layout, w, cols), ldy = int64_t(y.shape(1));
  if (layout_is_float(layout)) {
    need(int64_t(x.shape(0)) == tokens && int64_t(x.shape(1)) >= cols, "input does not fit");
  } else {
    check_batch(tokens, cols, q, scale, sum);
  }
  need(int64_t(y.shape(0)) == tokens && ldy % 16 == 0 && ldy >= groups * k.table->group_rows,
       "output does not fit");
  const ActBatch a{q.data(), scale.data(), sum.data(), x.data(), int64_t(x.shape(1))};
  Scratch scratch(k.table->gemm_scratch_bytes(cols));
  nb::gil_scoped_release release;
  for (int i = 0; i < repeats; i++) {
    k.table->gemm[layout](w.data(), groups, cols, a, tokens, y.data(), ldy, (uint8_t *)scratch.p, nullptr);
  }
}

void quantize(const Kernels &k, Floats x, float factor, Vec<int8_t> q, Out scale, Out sum, int repeats) {
  need(len(x) % 32 == 0 && len(q) == len(x) && len(scale) == len(x) / 32 && len(sum) == len(x) / 32,
       "quantize: arrays do not fit");
  nb::gil_scoped_release release;
  for (int i = 0; i < repeats; i++) {
    k.table->quantize(x.data(), len(x), factor, q.data(), scale.data(), sum.data());
  }
}

void quantize_tile(const Kernels &k, Floats x, float factor, int slot, Vec<int8_t> q, Out scale, Out sum) {
  need(len(x) % 32 == 0 && slot >= 0 && slot < 4 && len(q) == 4 * len(x) && len(scale) == len(x) / 8 &&
           len(sum) == len(x) / 8,
       "quantize_tile: arrays do not fit");
  k.table->quantize_tile(x.data(), len(x), factor, slot, q.data(), scale.data(), sum.data());
}

// ---------------------------------------------------------------- elementwise

void rms_norm(const Kernels &k, Floats x, Floats w, float offset, float eps, Out y, int repeats) {
  need(len(x) == len(w) && len(x) == len(y), "rms_norm: arrays do not fit");
  nb::gil_scoped_release release;
  for (int i = 0; i < repeats; i++) {
    k.table->rms_norm(x.data(), w.data(), offset, eps, len(x), y.data());
  }
}

void layer_norm(const Kernels &k, Floats x, Floats w, std::optional<Floats> b, float eps, Out y) {
  need(len(x) == len(w) && len(x) == len(y) && (!b || len(*b) == len(x)), "layer_norm: arrays do not fit");
  k.table->layer_norm(x.data(), w.data(), b ? b->data() : nullptr, eps, len(x), y.data());
}

void add(const Kernels &k, Floats a, Floats b, Out y) {
  need(len(a) == len(b) && len(a) == len(y), "add: arrays do not fit");
  k.table->add(a.data(), b.data(), len(a), y.data());
}

void scale(const Kernels &k, Floats x, float factor, Out y) {
  need(len(x) == len(y), "scale: arrays do not fit");
  k.table->scale(x.data(), factor, len(x), y.data());
}

void softcap(const Kernels &k, Floats x, float cap, Out y) {
  need(len(x) == len(y), "softcap: arrays do not fit");
  k.table->softcap(x.data(), cap, len(x), y.data());
}

void activation(const Kernels &k, int act, Floats x, Out y) {
  need(len(x) == len(y), "activation: arrays do not fit");
  k.table->activation(act, x.data(), len(x), y.data());
}

void glu(const Kernels &k, int act, Floats gate, Floats up, Out y, int repeats) {
  need(len(gate) == len(up) && len(gate) == len(y), "glu: arrays do not fit");
  nb::gil_scoped_release release;
  for (int i = 0; i < repeats; i++) {
    k.table->glu(act, gate.data(), up.data(), len(gate), y.data());
  }
}

void glu_groups(const Kernels &k, int act, Floats y, Out out) {
  need(len(y) == 2 * len(out) && len(out) % k.table->group_rows == 0, "glu_groups: arrays do not fit");
  k.table->glu_groups(act, y.data(), len(out) / k.table->group_rows, out.data());
}

void rope(const Kernels &k, Out x, Floats cosine, Floats sine, bool interleaved) {
  need(len(x) == 2 * len(cosine) && len(cosine) == len(sine), "rope: arrays do not fit");
  k.table->rope(x.data(), cosine.data(), sine.data(), int(len(x)), interleaved);
}

int64_t argmax(const Kernels &k, Floats x) { return k.table->argmax(x.data(), len(x)); }

float exp_sum(const Kernels &k, Floats x, float max, float factor, Out y) {
  need(len(x) == len(y), "exp_sum: arrays do not fit");
  return k.table->exp_sum(x.data(), len(x), max, factor, y.data());
}

uint64_t read_bytes(const Kernels &k, Bytes p, int repeats) {
  nb::gil_scoped_release release;
  uint64_t sum = 0;
  for (int i = 0; i < repeats; i++) {
    sum += k.table->read_bytes(p.data(), p.size());
  }
  return sum;
}

void unpack_row(const Kernels &k, int layout, Bytes w, int64_t row, int64_t cols, Out out) {
  need(row >= 0 && row < groups_of(k, layout, w, cols) * k.table->group_rows && len(out) == cols,
       "unpack_row: no such row");
  k.table->unpack_row(layout, w.data(), row, cols, out.data());
}

// ---------------------------------------------------------------- attention

int checked_kv_format(int format) {
  need(format >= 0 && format < kKvFormatCount, "unknown KV format");
  return format;
}

void kv_store(const Kernels &k, Vec<uint8_t> page, int slot, Floats key, Floats value, int format) {
  const int head_dim = int(len(key)), value_dim = int(len(value));
  need(slot >= 0 && slot < kPagePositions &&
           page.size() == page_bytes(checked_kv_format(format), head_dim, value_dim),
       "kv_store: page does not fit");
  k.table->store_key[format](page.data(), slot, {key.data(), 0, head_dim, head_dim, value_dim});
  k.table->store_value[format](page.data(), slot, {value.data(), 0, value_dim, head_dim, value_dim});
}

// q [queries][heads][head_dim], out [queries][heads][value_dim], stats [queries][heads][2],
// pages [blocks][page bytes].
void attend(const Kernels &k, Floats q, int num_queries, int heads, int head_dim, int value_dim,
            int first_position, int window, int first_split, int last_split, Mat<const uint8_t> pages,
            Vec<const int32_t> table, float scale, float softcap, Out out, Out stats, int format,
            int repeats) {
  const int64_t rows = int64_t(num_queries) * heads;
  need(num_queries >= 1 && num_queries <= kMaxQueryBlock && len(q) == rows * head_dim &&
           len(out) == rows * value_dim && len(stats) == rows * 2,
       "attend: arrays do not fit");
  need(pages.shape(1) == page_bytes(checked_kv_format(format), head_dim, value_dim),
       "attend: pages do not fit");
  const int last = first_position + num_queries - 1;
  need(first_position >= 0 && last / kPagePositions < len(table), "attend: block table too short");
  Scratch scratch(attend_scratch_floats(heads, value_dim) * sizeof(float));
  const AttendArgs args{q.data(),
                        int64_t(heads) * head_dim,
                        num_queries,
                        heads,
                        head_dim,
                        value_dim,
                        first_position,
                        window,
                        first_split,
                        last_split,
                        pages.data(),
                        table.data(),
                        pages.shape(1),
                        scale,
                        softcap,
                        out.data(),
                        int64_t(heads) * value_dim,
                        stats.data(),
                        (float *)scratch.p};
  nb::gil_scoped_release release;
  for (int i = 0; i < repeats; i++) {
    k.table->attend[format](args);
  }
}

void attend_merge(const Kernels &k, Floats parts, Floats stats, int splits, int heads, int value_dim,
                  std::optional<Floats> sinks, Out y) {
  need(len(parts) == int64_t(splits) * heads * value_dim && len(stats) == int64_t(splits) * heads * 2 &&
           len(y) == int64_t(heads) * value_dim && (!sinks || len(*sinks) == heads),
       "attend_merge: arrays do not fit");
  k.table->attend_merge(parts.data(), stats.data(), splits, heads, value_dim, sinks ? sinks->data() : nullptr,
                        y.data());
}

// ---------------------------------------------------------------- head

HeadPlanes planes(const Kernels &k, const Bytes &high, const Bytes &low, int64_t cols, int64_t rows) {
  checked_layout(kQ8_0, cols);
  const int64_t g = k.table->group_rows, groups = (rows + g - 1) / g;
  need(len(high) >= groups * int64_t(group_bytes(kQ4_0, int(g), cols)) &&
           len(low) >= rows * int64_t(head_low_row_bytes(cols)),
       "planes do not fit");
  return {high.data(), nullptr, low.data(), cols};
}

// rows None: first_row + i for i < count, first_row a multiple of the group's rows. out: one group of kQ4_0.
void low_group(const Kernels &k, Bytes high, Bytes low, int64_t cols, std::optional<Vec<const int64_t>> rows,
               int64_t first_row, int64_t count, Vec<uint8_t> out, int repeats) {
  const int64_t g = k.table->group_rows;
  need(count >= 1 && count <= g && first_row >= 0 && first_row % g == 0 && (!rows || len(*rows) == count),
       "low_group: rows do not fit");
  int64_t last = rows ? 0 : first_row + count - 1;
  for (int64_t i = 0; rows && i < count; i++) {
    need(rows->data()[i] >= 0, "low_group: negative row");
    last = std::max(last, rows->data()[i]);
  }
  const HeadPlanes h = planes(k, high, low, cols, last + 1);
  need(len(out) == int64_t(group_bytes(kQ4_0, int(g), cols)), "low_group: output does not fit");
  nb::gil_scoped_release release;
  for (int i = 0; i < repeats; i++) {
    k.table->low_group(h, rows ? rows->data() : nullptr, first_row, count, out.data());
  }
}

void unpack_head_row(const Kernels &k, Bytes high, Bytes low, int64_t cols, int64_t row, Out out) {
  const HeadPlanes h = planes(k, high, low, cols, row + 1);
  need(row >= 0 && len(out) == cols, "unpack_head_row: bad row");
  k.table->unpack_head_row(h, row, out.data());
}

int64_t screen_bounds(const Kernels &k, Floats y, Floats rest_error, Floats outlier_error, float rest_norm,
                      float outlier_norm, float slack, Out bound) {
  need(len(rest_error) == len(y) && len(outlier_error) == len(y) && len(bound) == len(y),
       "screen_bounds: arrays do not fit");
  return k.table->screen_bounds(y.data(), rest_error.data(), outlier_error.data(),
                                ScreenTerms{rest_norm, outlier_norm, slack}, len(y), bound.data());
}

void bind_linear(nb::class_<Kernels> &c) {
  c.def("gemv", &gemv, "layout"_a, "w"_a, "cols"_a, "q"_a, "scale"_a, "sum"_a, "x"_a, "y"_a, "repeats"_a = 1)
      .def("gemm", &gemm, "layout"_a, "w"_a, "cols"_a, "tokens"_a, "q"_a, "scale"_a, "sum"_a, "x"_a, "y"_a,
           "repeats"_a = 1)
      .def("quantize", &quantize, "x"_a, "factor"_a, "q"_a, "scale"_a, "sum"_a, "repeats"_a = 1)
      .def("quantize_tile", &quantize_tile, "x"_a, "factor"_a, "slot"_a, "q"_a, "scale"_a, "sum"_a)
      .def("unpack_row", &unpack_row, "layout"_a, "w"_a, "row"_a, "cols"_a, "out"_a)
      .def(
          "gemm_scratch_bytes",
          [](const Kernels &k, int64_t cols) { return k.table->gemm_scratch_bytes(cols); }, "cols"_a);
}

void bind_elementwise(nb::class_<Kernels> &c) {
  c.def("rms_norm", &rms_norm, "x"_a, "w"_a, "offset"_a, "eps"_a, "y"_a, "repeats"_a = 1)
      .def("layer_norm", &layer_norm, "x"_a, "w"_a, "b"_a.none(), "eps"_a, "y"_a)
      .def("add", &add, "a"_a, "b"_a, "y"_a)
      .def("scale", &scale, "x"_a, "factor"_a, "y"_a)
      .def("softcap", &softcap, "x"_a, "cap"_a, "y"_a)
      .def("activation", &activation, "act"_a, "x"_a, "y"_a)
      .def("glu", &glu, "act"_a, "gate"_a, "up"_a, "y"_a, "repeats"_a = 1)
      .def("glu_groups", &glu_groups, "act"_a, "y"_a, "out"_a)
      .def("rope", &rope, "x"_a, "cosine"_a, "sine"_a, "interleaved"_a)
      .def("argmax", &argmax, "x"_a)
      .def("exp_sum", &exp_sum, "x"_a, "max"_a, "factor"_a, "y"_a)
      .def("read_bytes", &read_bytes, "p"_a, "repeats"_a = 1);
}

void bind_attention_and_head(nb::class_<Kernels> &c) {
  c.def("kv_store", &kv_store, "page"_a, "slot"_a, "key"_a, "value"_a, "format"_a = 0)
      .def("attend", &attend, "q"_a, "num_queries"_a, "heads"_a, "head_dim"_a, "value_dim"_a,
           "first_position"_a, "window"_a, "first_split"_a, "last_split"_a, "pages"_a, "table"_a, "scale"_a,
           "softcap"_a, "out"_a, "stats"_a, "format"_a = 0, "repeats"_a = 1)
      .def("attend_merge", &attend_merge, "parts"_a, "stats"_a, "splits"_a, "heads"_a, "value_dim"_a,
           "sinks"_a.none(), "y"_a)
      .def("low_group", &low_group, "high"_a, "low"_a, "cols"_a, "rows"_a.none(), "first_row"_a, "count"_a,
           "out"_a, "repeats"_a = 1)
      .def("unpack_head_row", &unpack_head_row, "high"_a, "low"_a, "cols"_a, "row"_a, "out"_a)
      .def("screen_bounds", &screen_bounds, "y"_a, "rest_error"_a, "outlier_error"_a, "rest_norm"_a,
           "outlier_norm"_a, "slack"_a, "bound"_a);
}

} // namespace

void bind_kernels(nb::module_ &m) {
  m.def("kernel_isas", &kernel_isas);
  m.def("pack_rows", &pack, "layout"_a, "group_rows"_a, "rows"_a, "cols"_a, "first_row"_a, "out"_a,
        "group_stride"_a);
  m.def("pack_head_planes", &pack_head, "group_rows"_a, "rows"_a, "cols"_a, "outliers"_a, "high"_a,
        "outlier"_a, "low"_a, "rest_error"_a, "outlier_error"_a);
  nb::class_<Kernels> c(m, "Kernels");
  c.def(nb::new_(&kernels), "isa"_a);
  c.def_prop_ro("name", [](const Kernels &k) { return k.table->name; });
  c.def_prop_ro("group_rows", [](const Kernels &k) { return k.table->group_rows; });
  bind_linear(c);
  bind_elementwise(c);
  bind_attention_and_head(c);
}

} // namespace hayai
