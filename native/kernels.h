// Packed layouts, argument records, and the table of kernels that every instruction set fills.
//
// Rules that hold for every table:
//   * An output element is summed in one fixed order, whatever the number of tokens, the tile it is
//     computed in or the thread that computes it: `gemm` of any token count gives the bits of `gemv`.
//   * Nothing here allocates, throws, or reads past what its arguments say (prefetches may).
//   * No std templates in the isa_*.cpp files (weak symbols would mix instruction sets at link time).
#pragma once

#include <cstddef>
#include <cstdint>

namespace hayai {

// ---------------------------------------------------------------- packed weights

// A "group" is table.group_rows output rows (G: 8 for scalar and avx2, 16 for avx512). Rows are padded
// to whole groups with zeros. A "block" is one group x 32 inputs. Groups follow each other; the blocks
// of a group follow each other. Inside a block of 32 inputs, codes are vectors of 4*G bytes: byte 4r+t
// of vector v belongs to row r.
//
//   kQ4_0  G fp16 scales d | 4 vectors: low nibble = input 4v+t, high nibble = input 16+4v+t
//          weight = d * (code - 8)
//   kQ4_1  G fp16 scales d | G fp16 minima m | 4 vectors as above;   weight = d * code + m
//   kQ8_0  G fp16 scales d | 8 vectors of int8, vector v byte 4r+t = input 4v+t;   weight = d * code
//   kF16, kBF16, kF32   [input k][row r]: for each input, the G rows' elements. No blocks of 32: any
//          number of columns.
enum Layout : int32_t { kQ4_0 = 0, kQ4_1, kQ8_0, kF16, kBF16, kF32, kLayoutCount };

constexpr int kBlockInputs = 32;
constexpr int kTileTokens = 4;

static inline bool layout_is_float(int layout) { return layout >= kF16; }

// Bytes of one group of `cols` inputs.
static inline size_t group_bytes(int layout, int group_rows, int64_t cols) {
  const size_t g = size_t(group_rows), blocks = size_t(cols) / kBlockInputs;
  switch (layout) {
  case kQ4_0: return blocks * g * (2 + 16);
  case kQ4_1: return blocks * g * (4 + 16);
  case kQ8_0: return blocks * g * (2 + 32);
  case kF16:
  case kBF16: return size_t(cols) * g * 2;
  default: return size_t(cols) * g * 4;
  }
}

// ---------------------------------------------------------------- activations

// One token's input vector. For integer layouts: q[32b+k] is about x[32b+k] / scale[b], |q| <= 127,
// scale[b] = max|x| / 127 over the block; sum[b] = factor * scale[b] * sum_k q[32b+k], where the factor
// depends on the weight layout (table below). For float layouts only `x` is used. q is 64-byte aligned.
//   kQ4_0: factor -8, y = sum_b d_b * (scale_b * <code, q> + sum_b)
//   kQ4_1: factor  1, y = [sum_b (d_b * scale_b) * <code, q>] + [sum_b m_b * sum_b]
//   kQ8_0: sum unused, y = sum_b (d_b * scale_b) * <code, q>
// All as chains of fused multiply-adds in ascending b, one chain per bracket.
// Float layouts: y = one chain of fused multiply-adds in ascending k.
struct ActRow {
  const int8_t *q;
  const float *scale, *sum;
  const float *x;
};

static inline float sum_factor(int layout) { return layout == kQ4_0 ? -8.f : 1.f; }

// Many tokens, in tiles of 4: q [tile][block][8 chunks of 4 inputs][4 tokens][4 bytes],
// scale, sum [tile][block][4 tokens]. Missing tokens of the last tile hold q = 0, scale = sum = 0.
// Float layouts: x [token][ldx].
struct ActBatch {
  const int8_t *q;
  const float *scale, *sum;
  const float *x;
  int64_t ldx;
};

// ---------------------------------------------------------------- KV pages

// A page holds 16 positions of one layer and kv head: keys [head_dim][16], then values [16][value_dim].
// (Transposed keys: the scores of 16 positions form in lanes.)
//   kF16Kv  fp16 elements
//   kQ8Kv   int8 codes, and behind the values 16 fp16 scales of the keys and 16 of the values, one per
//           position: scale = fp16(max |x| / 127); code = x / scale, rounded half to even, |code| <= 127;
//           0 where the scale is 0.
// What is stored is finite: larger numbers, and NaN, become the largest of the format. A masked position then
// adds exactly nothing, so that no query depends on which later ones share its chunk.
enum KvFormat : int32_t { kF16Kv = 0, kQ8Kv, kKvFormatCount };
constexpr int kPagePositions = 16;
// Attention is cut into splits of 64 positions aligned to position 0. Each split has its own softmax;
// splits are merged in ascending order by one recurrence, so neither threads, chunks nor batch matter.
constexpr int kSplitPositions = 64;

static inline size_t page_bytes(int format, int head_dim, int value_dim) {
  const size_t dims = size_t(head_dim) + size_t(value_dim);
  return size_t(kPagePositions) * (format == kF16Kv ? 2 * dims : dims + 4);
}

// Part of one position's key or value: dimensions [dim, dim + count). kQ8Kv takes whole vectors only.
struct KvPart {
  const float *x;
  int32_t dim, count;
  int32_t head_dim, value_dim; // of the page
};

// Attention of `num_queries` consecutive tokens of one sequence over one kv head, splits
// [first_split, last_split) only. Query i stands at first_position + i and sees positions
// max(0, own - window + 1) .. own (window 0 = no limit). Page b of the sequence is at
// pages + block_table[b] * block_stride.
//   q: query token i, head j (of heads_per_kv) at q + i * q_stride + j * head_dim
//   out: unnormalised running output at out + i * out_stride + j * value_dim
//   stats: running (max, sum) at stats + (i * heads_per_kv + j) * 2
// The running state starts empty (max = -1e30, sum = 0, out = 0); a split in which a query sees nothing
// leaves its state alone. scratch: attend_scratch_floats() floats, 64-byte aligned.
struct AttendArgs {
  const float *q;
  int64_t q_stride;
  int32_t num_queries, heads_per_kv, head_dim, value_dim;
  int32_t first_position, window;
  int32_t first_split, last_split;
  const uint8_t *pages;
  const int32_t *block_table;
  size_t block_stride;
  float scale, softcap;
  float *out;
  int64_t out_stride;
  float *stats;
  float *scratch;
};
constexpr int kMaxQueryBlock = 16; // num_queries per call at most
static inline size_t attend_scratch_floats(int heads_per_kv, int value_dim) {
  return size_t(kMaxQueryBlock) * size_t(heads_per_kv) * size_t(kSplitPositions + value_dim + 16) + 64;
}

// ---------------------------------------------------------------- the screened head

// A Q8_0 head, losslessly split: q = 16 * (high - 8) + low with high, low in 0..15, that is
//   weight = d * (16 * high - 120.5) + d * (low - 7.5).
//   high plane: layout kQ4_0. It is read in full for every token.
//   outlier plane: layout kQ4_0 with 32 inputs (pack.h): what the high plane leaves over, for 32 inputs.
//   low plane: one row after the other, for rows that are scored one by one; per row of B blocks, B rounded
//     up to even: B fp16 scales d, then B times 16 bytes; byte j of a block: low nibble = input j, high
//     nibble = input 16 + j.
// Exact logit = high part + low part. High part: gemv[kQ4_0] of the high plane with scale'_b = 16 * scale_b
// and sum'_b = -120.5 * scale_b * sum_k q. Low part: gemv[kQ4_0] of rows as low_group gives them, with scale_b and
// sum'_b = -7.5 * scale_b * sum_k q.
struct HeadPlanes {
  const uint8_t *high, *outlier, *low;
  int64_t cols;
};

static inline size_t head_low_row_bytes(int64_t cols) {
  return size_t((cols / kBlockInputs + 1) / 2 * 2) * 18;
}

struct ScreenTerms {
  float rest_norm, outlier_norm, slack;
};

enum Act : int32_t { kSilu = 0, kGelu, kGeluTanh, kRelu, kSigmoid };

// ---------------------------------------------------------------- the table

struct KernelTable {
  const char *name;
  int group_rows;

  // y[group_rows * groups] = packed groups times one token. y 64-byte aligned.
  void (*gemv[kLayoutCount])(const uint8_t *w, int64_t groups, int64_t cols, const ActRow &a, float *y);
  // y[t * ldy + r] for t < tokens, r < group_rows * groups; y and ldy multiples of 16 floats.
  // scratch: gemm_scratch_bytes(cols), 64-byte aligned. `next`: what the thread reads afterwards (may be
  // prefetched; null = unknown).
  void (*gemm[kLayoutCount])(const uint8_t *w, int64_t groups, int64_t cols, const ActBatch &a,
                             int64_t tokens, float *y, int64_t ldy, uint8_t *scratch, const uint8_t *next);
  size_t (*gemm_scratch_bytes)(int64_t cols);

  // Quantise n = 32b floats. `quantize_tile` writes token `slot` (0..3) of one tile.
  void (*quantize)(const float *x, int64_t n, float factor, int8_t *q, float *scale, float *sum);
  void (*quantize_tile)(const float *x, int64_t n, float factor, int slot, int8_t *q, float *scale,
                        float *sum);

  // y = x / sqrt(mean(x^2) + eps) * (w + offset). y may be x. Any n.
  void (*rms_norm)(const float *x, const float *w, float offset, float eps, int64_t n, float *y);
  // y = (x - mean) / sqrt(var + eps) * w + b; b may be null.
  void (*layer_norm)(const float *x, const float *w, const float *b, float eps, int64_t n, float *y);
  void (*add)(const float *a, const float *b, int64_t n, float *y);
  void (*scale)(const float *x, float factor, int64_t n, float *y);
  void (*softcap)(const float *x, float cap, int64_t n, float *y);
  void (*activation)(int act, const float *x, int64_t n, float *y);
  void (*glu)(int act, const float *gate, const float *up, int64_t n, float *y);
  // y: groups of G gate values, G up values, alternating (pairs of them); out[G * pairs].
  void (*glu_groups)(int act, const float *y, int64_t pairs, float *out);
  // Rotate one head in place: rotary_dim floats from x; cosine, sine [rotary_dim / 2].
  void (*rope)(float *x, const float *cosine, const float *sine, int rotary_dim, int interleaved);

  // One weight row as floats (embedding lookup): layout kQ4_0..kF32, or the split head planes.
  void (*unpack_row)(int layout, const uint8_t *w, int64_t row, int64_t cols, float *out);
  void (*unpack_head_row)(const HeadPlanes &h, int64_t row, float *out);

  // Store (a part of) one position's key or value of one kv head at `slot` (0..15) of a page.
  void (*store_key[kKvFormatCount])(uint8_t *page, int slot, const KvPart &part);
  void (*store_value[kKvFormatCount])(uint8_t *page, int slot, const KvPart &part);
  void (*attend[kKvFormatCount])(const AttendArgs &args);
  // Merge `splits` partial states in order by attend's recurrence and normalise:
  // partial s, head j: out at parts + (s * heads + j) * value_dim, (max, sum) at
  // stats + (s * heads + j) * 2. sinks: null or one extra logit per head. y [heads * value_dim].
  void (*attend_merge)(const float *parts, const float *stats, int splits, int heads, int value_dim,
                       const float *sinks, float *y);

  // Screening, see HeadPlanes. screen_bounds: bound[i] = y[i] + rest_norm * rest_error[i] +
  // outlier_norm * outlier_error[i] + slack for any n (real rows only); returns the index of the
  // largest y (lowest on ties).
  int64_t (*screen_bounds)(const float *y, const float *rest_error, const float *outlier_error,
                           const ScreenTerms &terms, int64_t n, float *bound);
  // n rows of the low plane, 1 <= n <= group_rows, as one group of kQ4_0: rows[i], or with rows null
  // first_row + i, first_row a multiple of group_rows. What stands in further lanes is of no use.
  void (*low_group)(const HeadPlanes &h, const int64_t *rows, int64_t first_row, int64_t n, uint8_t *out);

  // Index of the largest value, lowest index on ties; NaN never wins (all NaN: 0).
  int64_t (*argmax)(const float *x, int64_t n);
  // y[i] = exp((x[i] - max) * factor) (exactly 0 below e^-87); returns the sum, fixed order. y may be x.
  float (*exp_sum)(const float *x, int64_t n, float max, float factor, float *y);
  // Reads every byte once (the bandwidth test); returns a checksum.
  uint64_t (*read_bytes)(const uint8_t *p, size_t n);
};

const KernelTable &scalar_kernels();
#if defined(HAYAI_X86)
const KernelTable &avx2_kernels();
const KernelTable &avx512_kernels();
#endif

// dispatch.cpp: the best table that this CPU and OS can run, at most `ceiling` ("" = no ceiling).
// Returns null for an unknown name.
const KernelTable *choose_kernels(const char *ceiling);

} // namespace hayai
