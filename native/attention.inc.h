// Attention over paged keys and values, one kv head at a time.
//
//   score_p = scale * <q, k_p> (soft-capped), e_p = exp(score_p - max), out = sum_p e_p v_p
//
// Pages of codes (kQ8Kv) are read as floats without their scales: a key's scale is multiplied into its score,
// a value's into its e_p.
//
// A split (64 positions) is processed in three passes over all (query, head) rows: scores, softmax,
// values. Scores form with positions in lanes (keys are stored transposed), values with dimensions in
// lanes; in both a register block of rows shares each converted key or value vector.
// Fixed order per row: the dot product is one chain over the dimensions, the output one chain over the
// positions of the split, and splits are folded in ascending order by merge_stats and merge_values. A
// masked position has e = 0 exactly and drops out of every chain, so the rows that happen to be computed
// together do not matter.

// With 16 registers a broadcast operand must be loaded again for each vector it meets: kept for reuse, it
// would push accumulators out. The compiler cannot know that the index has not changed.
#define RELOAD(index)                                                                                        \
  if (kParts > 1) __asm__("" : "+r"(index))

constexpr float kEmptyMax = -1e30f;
constexpr int kSplitPages = kSplitPositions / kPagePositions;

// ---------------------------------------------------------------- the recurrence

// Two softmax states (max, sum), one per lane: each is rescaled to the larger maximum. With an empty
// state it is the identity: exp(-1e30 - max) = 0 and exp(0) = 1 exactly.
struct MergeWeights {
  VF top, sum, keep, gain;
};
INLINE MergeWeights merge_stats(VF old_max, VF old_sum, VF new_max, VF new_sum) {
  MergeWeights w;
  w.top = max(old_max, new_max);
  w.keep = exp(sub(old_max, w.top));
  w.gain = exp(sub(new_max, w.top));
  w.sum = fma(w.keep, old_sum, mul(w.gain, new_sum));
  return w;
}
INLINE VF merge_values(VF keep, VF old_value, VF gain, VF new_value) {
  return fma(keep, old_value, mul(gain, new_value));
}

// ---------------------------------------------------------------- elements of a page

template <int FORMAT> struct Kv;
template <> struct Kv<kF16Kv> {
  typedef uint16_t Element;
};
template <> struct Kv<kQ8Kv> {
  typedef int8_t Element;
};
INLINE VF load_elements(const uint16_t *p) { return load16_f16(p); }
INLINE VF load_elements(const int8_t *p) { return load16_i8(p); }
INLINE VF load_elements_n(const uint16_t *p, int n) { return load16_f16_n(p, n); }
INLINE VF load_elements_n(const int8_t *p, int n) { return load16_i8_n(p, n); }
template <int FORMAT> constexpr int kLineVectors = 4 / int(sizeof(typename Kv<FORMAT>::Element));

// ---------------------------------------------------------------- one split

// What the passes share. Rows are (query, head) pairs, row = query * heads + head.
struct Split {
  const AttendArgs *args;
  int base;                             // first position of the split
  int first_query, last_query;          // queries that see any of it: [first, last)
  int begin, end;                       // union of the positions they see, relative to base
  int first_page, last_page;            // pages of these, 0..4
  const uint8_t *page[kSplitPages];     // unneeded pages repeat a needed one
  const uint8_t *ahead[kSplitPages];    // same pages of the next split, or null
  float *scores;                        // [row][64], later e
  float *keep, *gain;                   // [row] weights of the merge
  const float *key_scale, *value_scale; // [64], kQ8Kv; the keys' hold args->scale too
};

INLINE const float *query_row(const AttendArgs &a, int row) {
  return a.q + row / a.heads_per_kv * a.q_stride + int64_t(row % a.heads_per_kv) * a.head_dim;
}
INLINE float *out_row(const AttendArgs &a, int row) {
  return a.out + row / a.heads_per_kv * a.out_stride + int64_t(row % a.heads_per_kv) * a.value_dim;
}
INLINE const uint8_t *page_at(const AttendArgs &a, int page) {
  return a.pages + size_t(a.block_table[page]) * a.block_stride;
}
// Where the scales of a page of codes begin: 16 of the keys, 16 of the values.
INLINE size_t scales_at(int head_dim, int value_dim) {
  return size_t(kPagePositions) * size_t(head_dim + value_dim);
}
INLINE int lowest_seen(const AttendArgs &a, int own) {
  return a.window > 0 && own >= a.window ? own - a.window + 1 : 0;
}

// Scores of ROWS rows at kScorePages pages from `first`. Each line of each next page is touched as the same one
// of this page is read: hardware prefetchers stop at page borders.
template <int FORMAT, int ROWS> static void score_block(const Split &s, int row, int first, bool fetch) {
  typedef typename Kv<FORMAT>::Element Element;
  const AttendArgs &a = *s.args;
  const float *q[ROWS];
  const Element *k[kScorePages], *ahead[kScorePages];
  UNROLL for (int r = 0; r < ROWS; r++) q[r] = query_row(a, row + r);
  UNROLL for (int p = 0; p < kScorePages; p++) {
    k[p] = (const Element *)s.page[first + p];
    ahead[p] = fetch ? (const Element *)s.ahead[first + p] : nullptr;
  }
  VF sums[ROWS][kScorePages];
  UNROLL for (int r = 0; r < ROWS; r++) {
    UNROLL for (int p = 0; p < kScorePages; p++) sums[r][p] = splat(0);
  }
  for (int64_t d = 0; d < a.head_dim; d++) {
    if (fetch && d % kLineVectors<FORMAT> == 0) {
      UNROLL for (int p = 0; p < kScorePages; p++) prefetch(ahead[p] + d * kPagePositions);
    }
    int64_t at = d;
    UNROLL for (int p = 0; p < kScorePages; p++) {
      const VF key = load_elements(k[p] + d * kPagePositions);
      UNROLL for (int r = 0; r < ROWS; r++) sums[r][p] = fma(key, splat(q[r][at]), sums[r][p]);
      RELOAD(at);
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++) {
    UNROLL for (int p = 0; p < kScorePages; p++) {
      store16(s.scores + (row + r) * kSplitPositions + (first + p) * kPagePositions, sums[r][p]);
    }
  }
}

template <int FORMAT, int ROWS>
static void score_rows(int rows, const Split &s, int row, int first, bool fetch) {
  if (rows == ROWS) {
    score_block<FORMAT, ROWS>(s, row, first, fetch);
  } else if constexpr (ROWS > 1) {
    score_rows<FORMAT, ROWS - 1>(rows, s, row, first, fetch);
  }
}

// ROWS rows times VECTORS * 16 value dimensions from `dim`. LANES < 16: a partial last vector.
template <int FORMAT, int ROWS, int VECTORS, bool PARTIAL>
static void value_block(const Split &s, int row, int dim, int lanes, bool fetch) {
  typedef typename Kv<FORMAT>::Element Element;
  const AttendArgs &a = *s.args;
  const int64_t values = int64_t(kPagePositions) * a.head_dim + dim;
  const float *e = s.scores + row * kSplitPositions;
  VF sums[ROWS][VECTORS];
  UNROLL for (int r = 0; r < ROWS; r++) { UNROLL for (int i = 0; i < VECTORS; i++) sums[r][i] = splat(0); }
  for (int p = s.begin; p < s.end; p++) {
    const int64_t at = values + int64_t(p % kPagePositions) * a.value_dim;
    const Element *v = (const Element *)s.page[p / kPagePositions] + at;
    if (fetch) {
      const Element *ahead = (const Element *)s.ahead[p / kPagePositions] + at;
      UNROLL for (int i = 0; i < VECTORS; i += kLineVectors<FORMAT>) prefetch(ahead + 16 * i);
    }
    int64_t position = p;
    UNROLL for (int i = 0; i < VECTORS; i++) {
      const VF value = PARTIAL ? load_elements_n(v, lanes) : load_elements(v + 16 * i);
      UNROLL for (int r = 0; r < ROWS; r++) {
        sums[r][i] = fma(value, splat(e[r * kSplitPositions + position]), sums[r][i]);
      }
      RELOAD(position);
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++) {
    const VF keep = splat(s.keep[row + r]), gain = splat(s.gain[row + r]);
    float *out = out_row(a, row + r) + dim;
    UNROLL for (int i = 0; i < VECTORS; i++, out += 16) {
      const VF old_value = PARTIAL ? load16_n(out, lanes) : load16(out);
      const VF merged = merge_values(keep, old_value, gain, sums[r][i]);
      if (PARTIAL) {
        store16_n(out, merged, lanes);
      } else {
        store16(out, merged);
      }
    }
  }
}

template <int FORMAT, int ROWS> static void value_rows(int rows, const Split &s, int row, bool fetch) {
  if (rows != ROWS) {
    if constexpr (ROWS > 1) value_rows<FORMAT, ROWS - 1>(rows, s, row, fetch);
    return;
  }
  const int dims = s.args->value_dim;
  int dim = 0;
  for (; dim + 16 * kValueVectors <= dims; dim += 16 * kValueVectors) {
    value_block<FORMAT, ROWS, kValueVectors, false>(s, row, dim, 16, fetch);
  }
  for (; dim + 16 <= dims; dim += 16) value_block<FORMAT, ROWS, 1, false>(s, row, dim, 16, fetch);
  if (dim < dims) value_block<FORMAT, ROWS, 1, true>(s, row, dim, dims - dim, fetch);
}

// Number of rows of the next block when `left` rows remain: as even as possible, so that no block is
// left with so few rows that it waits for the latency of its chains.
INLINE int even_share(int left, int most) {
  const int blocks = (left + most - 1) / most;
  return (left + blocks - 1) / blocks;
}

// Scale, cap and mask one row; leaves e in place of the scores, times the values' scales where these have any.
template <int FORMAT> INLINE void softmax_row(const Split &s, int row, float &largest, float &total) {
  const AttendArgs &a = *s.args;
  const int own = a.first_position + row / a.heads_per_kv;
  const int low = lowest_seen(a, own) - s.base, high = own - s.base;
  const bool masked = low > kPagePositions * s.first_page || high < kPagePositions * s.last_page - 1;
  alignas(64) static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const VF never = splat(-__builtin_inff());
  float *x = s.scores + row * kSplitPositions;
  VF score[kSplitPages], top = splat(kEmptyMax);
  for (int c = s.first_page; c < s.last_page; c++) {
    VF v = mul(load16(x + 16 * c), FORMAT == kQ8Kv ? load16(s.key_scale + 16 * c) : splat(a.scale));
    if (a.softcap > 0) v = softcap(v, splat(a.softcap));
    if (masked) {
      const VF at = add(load16(lanes), splat(float(16 * c)));
      v = select_less(at, splat(float(low)), never, v);
      v = select_less(splat(float(high)), at, never, v);
    }
    score[c] = v;
    top = max(top, v);
  }
  largest = max_lanes(top);
  const VF shift = splat(largest);
  VF sum = splat(0);
  for (int c = s.first_page; c < s.last_page; c++) {
    const VF e = exp(sub(score[c], shift));
    store16(x + 16 * c, FORMAT == kQ8Kv ? mul(e, load16(s.value_scale + 16 * c)) : e);
    sum = add(sum, e);
  }
  total = sum_lanes(sum);
}

// Softmax of all active rows, 16 at a time, and their weights in the merge with the running state.
template <int FORMAT> static void softmax_rows(const Split &s) {
  const AttendArgs &a = *s.args;
  const int last = s.last_query * a.heads_per_kv;
  for (int row = s.first_query * a.heads_per_kv; row < last; row += 16) {
    const int count = last - row < 16 ? last - row : 16;
    alignas(64) float old_max[16] = {}, old_sum[16] = {}, new_max[16] = {}, new_sum[16] = {};
    for (int i = 0; i < count; i++) {
      softmax_row<FORMAT>(s, row + i, new_max[i], new_sum[i]);
      old_max[i] = a.stats[2 * (row + i)];
      old_sum[i] = a.stats[2 * (row + i) + 1];
    }
    const MergeWeights w = merge_stats(load16(old_max), load16(old_sum), load16(new_max), load16(new_sum));
    store16_n(s.keep + row, w.keep, count);
    store16_n(s.gain + row, w.gain, count);
    store16(new_max, w.top);
    store16(new_sum, w.sum);
    for (int i = 0; i < count; i++) {
      a.stats[2 * (row + i)] = new_max[i];
      a.stats[2 * (row + i) + 1] = new_sum[i];
    }
  }
}

// False if no query of the block sees any position of the split.
static bool prepare_split(const AttendArgs &a, int split, Split &s) {
  const int base = split * kSplitPositions, end = base + kSplitPositions;
  const int last_own = a.first_position + a.num_queries - 1;
  // Query i sees something if own >= base and its lowest position is before `end`.
  const int first = base > a.first_position ? base - a.first_position : 0;
  int last = a.num_queries;
  if (a.window > 0 && last_own - a.window + 1 >= end) last = end + a.window - 1 - a.first_position;
  if (first >= last) return false;
  const int low = lowest_seen(a, a.first_position + first), high = a.first_position + last - 1;
  s.args = &a;
  s.base = base;
  s.first_query = first;
  s.last_query = last;
  s.begin = low > base ? low - base : 0;
  s.end = high + 1 < end ? high + 1 - base : kSplitPositions;
  s.first_page = s.begin / kPagePositions;
  s.last_page = (s.end + kPagePositions - 1) / kPagePositions;
  const int next = (split + 1) * kSplitPages, last_page = last_own / kPagePositions;
  UNROLL for (int p = 0; p < kSplitPages; p++) {
    const int needed = p < s.first_page ? s.first_page : p < s.last_page ? p : s.last_page - 1;
    s.page[p] = page_at(a, split * kSplitPages + needed);
    // The next split is fetched even if another call computes it (the caller goes on with it). Behind
    // the last page there is nothing to fetch: touch the current one again.
    const bool more = next + p <= last_page;
    s.ahead[p] = more ? page_at(a, next + p) : s.page[p];
  }
  return true;
}

// The scales of a split's positions as floats, and a touch of the next split's.
static void load_scales(const Split &s, float *key_scale, float *value_scale) {
  const AttendArgs &a = *s.args;
  const size_t at = scales_at(a.head_dim, a.value_dim);
  for (int c = s.first_page; c < s.last_page; c++) {
    const uint16_t *scales = (const uint16_t *)(s.page[c] + at);
    prefetch(s.ahead[c] + at);
    store16(key_scale + 16 * c, mul(load16_f16(scales), splat(a.scale)));
    store16(value_scale + 16 * c, load16_f16(scales + kPagePositions));
  }
}

template <int FORMAT> static void attend_split(Split &s) {
  alignas(64) float key_scale[kSplitPositions], value_scale[kSplitPositions];
  if (FORMAT == kQ8Kv) load_scales(s, key_scale, value_scale);
  s.key_scale = key_scale;
  s.value_scale = value_scale;
  const int heads = s.args->heads_per_kv, last = s.last_query * heads;
  const int first_row = s.first_query * heads;
  for (int row = first_row, rows; row < last; row += rows) {
    rows = even_share(last - row, kScoreRows);
    for (int p = s.first_page; p < s.last_page;) {
      const int first = p + kScorePages <= kSplitPages ? p : kSplitPages - kScorePages;
      score_rows<FORMAT, kScoreRows>(rows, s, row, first, row == first_row);
      p = first + kScorePages;
    }
  }
  softmax_rows<FORMAT>(s);
  for (int row = first_row, rows; row < last; row += rows) {
    rows = even_share(last - row, kValueRows);
    value_rows<FORMAT, kValueRows>(rows, s, row, row == first_row);
  }
}

template <int FORMAT> static void attend(const AttendArgs &a) {
  const int rows = a.num_queries * a.heads_per_kv;
  for (int row = 0; row < rows; row++) {
    memset(out_row(a, row), 0, size_t(a.value_dim) * sizeof(float));
    a.stats[2 * row] = kEmptyMax;
    a.stats[2 * row + 1] = 0;
  }
  Split s;
  s.scores = a.scratch;
  s.keep = s.scores + rows * kSplitPositions;
  s.gain = s.keep + rows;
  for (int split = a.first_split; split < a.last_split; split++) {
    if (prepare_split(a, split, s)) attend_split<FORMAT>(s);
  }
}

// ---------------------------------------------------------------- merge

static void attend_merge(const float *parts, const float *stats, int splits, int heads, int value_dim,
                         const float *sinks, float *y) {
  for (int head = 0; head < heads; head++, y += value_dim) {
    memset(y, 0, size_t(value_dim) * sizeof(float));
    VF top = splat(kEmptyMax), sum = splat(0);
    for (int s = 0; s < splits; s++) {
      const int64_t part = int64_t(s) * heads + head;
      const float *from = parts + part * value_dim;
      const MergeWeights w = merge_stats(top, sum, splat(stats[2 * part]), splat(stats[2 * part + 1]));
      for (int i = 0; i < value_dim; i += 16) {
        const int left = value_dim - i;
        store_left(y + i, merge_values(w.keep, load_left(y + i, left), w.gain, load_left(from + i, left)),
                   left);
      }
      top = w.top;
      sum = w.sum;
    }
    VF factor = splat(1.f);
    if (sinks) { // one more logit, without a value
      const MergeWeights w = merge_stats(top, sum, splat(sinks[head]), splat(1.f));
      sum = w.sum;
      factor = w.keep;
    }
    // A query that saw nothing at all has output 0.
    factor = select_less(splat(0), sum, div(factor, sum), select_less(sum, splat(1.f), splat(0), sum));
    for (int i = 0; i < value_dim; i += 16) {
      store_left(y + i, mul(load_left(y + i, value_dim - i), factor), value_dim - i);
    }
  }
}

// ---------------------------------------------------------------- cache

// NaN becomes `most`: min and max return their second operand where either is NaN.
INLINE VF clamp(VF x, float most) { return max(min(x, splat(most)), splat(-most)); }

constexpr float kMostHalf = 65504.f;

static void store_key_f16(uint8_t *page, int slot, const KvPart &part) {
  uint16_t *keys = (uint16_t *)page + part.dim * kPagePositions + slot;
  for (int d = 0; d < part.count; d += 16) {
    uint16_t half[16];
    store16_f16(half, clamp(load_left(part.x + d, part.count - d), kMostHalf));
    for (int i = 0; i < 16 && d + i < part.count; i++) keys[(d + i) * kPagePositions] = half[i];
  }
}

static void store_value_f16(uint8_t *page, int slot, const KvPart &part) {
  uint16_t *values = (uint16_t *)page + kPagePositions * part.head_dim + slot * part.value_dim + part.dim;
  for (int d = 0; d < part.count; d += 16) {
    const int left = part.count - d;
    const VF x = clamp(load_left(part.x + d, left), kMostHalf);
    if (left >= 16) {
      store16_f16(values + d, x);
    } else {
      store16_f16_n(values + d, x, left);
    }
  }
}

constexpr float kMostCode = 127.f;

// The scale of one vector, as it is read back from `half`.
static float q8_scale(const float *x, int n, uint16_t *half) {
  VF top = splat(0);
  for (int d = 0; d < n; d += 16) {
    top = max(top, abs(clamp(load_left(x + d, n - d), kMostCode * kMostHalf)));
  }
  *half = float_to_half(max_lanes(top) / kMostCode);
  return half_to_float(*half);
}

// Sixteen codes. A scale below the normal halves is coarse, so that codes have to be clamped.
INLINE void q8_codes(const float *x, int left, float scale, int8_t *codes) {
  const VF exact = clamp(load_left(x, left), kMostCode * kMostHalf);
  const VF ratio = scale > 0 ? div(exact, splat(scale)) : splat(0);
  const VFI code = to_int(clamp(ratio, kMostCode));
  for (int i = 0; i < kParts; i++) store_bytes(codes + kG * i, code.part[i]);
}

static void store_key_q8(uint8_t *page, int slot, const KvPart &part) {
  uint16_t *scales = (uint16_t *)(page + scales_at(part.head_dim, part.value_dim));
  const float scale = q8_scale(part.x, part.count, scales + slot);
  int8_t *keys = (int8_t *)page + slot;
  for (int d = 0; d < part.count; d += 16) {
    int8_t codes[16];
    q8_codes(part.x + d, part.count - d, scale, codes);
    for (int i = 0; i < 16 && d + i < part.count; i++) keys[(d + i) * kPagePositions] = codes[i];
  }
}

static void store_value_q8(uint8_t *page, int slot, const KvPart &part) {
  uint16_t *scales = (uint16_t *)(page + scales_at(part.head_dim, part.value_dim)) + kPagePositions;
  const float scale = q8_scale(part.x, part.count, scales + slot);
  int8_t *values = (int8_t *)page + kPagePositions * part.head_dim + slot * part.value_dim;
  for (int d = 0; d < part.count; d += 16) {
    int8_t codes[16];
    q8_codes(part.x + d, part.count - d, scale, codes);
    memcpy(values + d, codes, size_t(part.count - d < 16 ? part.count - d : 16));
  }
}
