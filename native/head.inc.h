// The output head, split losslessly into nibble planes: screening bounds and exact logits. The algebra
// of the bound is in pack.h, the exact chain in kernels.h.

// Exact logits of one group for T tokens. scale and off as in group_times_tokens.
template <int T, int CHUNK>
INLINE void head_group(const uint8_t *high, const uint8_t *low, int64_t blocks, const int8_t *q,
                       const float *scale, const float *off, const uint8_t *high_ahead,
                       const uint8_t *low_ahead, V *y) {
  constexpr int kStep = CHUNK / 4, kHigh = BlockOf<kQ4_0>::kBytes, kLow = 16 * kG;
  UNROLL for (int t = 0; t < T; t++) y[t] = set1(0);
  for (int64_t b = 0; b < blocks; b++, q += 8 * CHUNK, scale += kStep, off += kStep) {
    prefetch_bytes<kHigh>(high_ahead + b * kHigh);
    prefetch_bytes<kLow>(low_ahead + b * kLow);
    VI upper[T], lower[T];
    nibble_dots<T, CHUNK>(high + b * kHigh + 2 * kG, q, blocks * 128, upper);
    nibble_dots<T, CHUNK>(low + b * kLow, q, blocks * 128, lower);
    const V d = load_f16(high + b * kHigh);
    UNROLL for (int t = 0; t < T; t++) {
      const V dot = to_float(add_int(shift_left_4(upper[t]), lower[t]));
      y[t] = fma(fma(dot, set1(scale[t]), set1(off[t])), d, y[t]);
    }
  }
}

struct HeadGroups {
  const uint8_t *high, *low;
  int64_t blocks;
  size_t high_bytes, low_bytes;
  INLINE_MEMBER const uint8_t *high_at(int64_t g) const { return high + size_t(g) * high_bytes; }
  INLINE_MEMBER const uint8_t *low_at(int64_t g) const { return low + size_t(g) * low_bytes; }
};

INLINE HeadGroups head_groups(const HeadPlanes &h) {
  const int64_t blocks = h.cols / kBlockInputs;
  return {h.high, h.low, blocks, size_t(blocks + 1) * size_t(BlockOf<kQ4_0>::kBytes),
          size_t(blocks) * size_t(16 * kG)};
}

static void head_gemv(const HeadPlanes &h, int64_t first_group, int64_t groups, const int8_t *q,
                      const float *scale, const float *off, float *y) {
  const HeadGroups at = head_groups(h);
  for (int64_t g = first_group; g < first_group + groups; g++, y += kG) {
    const uint8_t *high = at.high_at(g), *low = at.low_at(g);
    V out;
    head_group<1, kRowChunk>(high, low, at.blocks, q, scale, off, high + kPrefetchDistance,
                             low + kPrefetchDistance, &out);
    store(y, out);
  }
}

// A row's bytes are spread over all cache lines of its group, so scoring the whole group costs no
// more traffic than the row; neighbouring rows of one group share the work. The next group is fetched
// meanwhile: survivors are scattered and the hardware cannot foresee them.
static void head_rows(const HeadPlanes &h, const int64_t *rows, int64_t num_rows, const int8_t *q,
                      const float *scale, const float *off, float *y) {
  const HeadGroups at = head_groups(h);
  for (int64_t i = 0; i < num_rows;) {
    const int64_t group = rows[i] / kG;
    int64_t end = i + 1;
    while (end < num_rows && rows[end] / kG == group) end++;
    const int64_t next = end < num_rows ? rows[end] / kG : group;
    V out;
    head_group<1, kRowChunk>(at.high_at(group), at.low_at(group), at.blocks, q, scale, off, at.high_at(next),
                             at.low_at(next), &out);
    alignas(64) float logits[kG];
    store(logits, out);
    for (; i < end; i++) y[i] = logits[rows[i] % kG];
  }
}

template <int T>
static void head_tile(const HeadGroups &at, int64_t g, const ActBatch &a, int64_t first, float *y,
                      int64_t ldy) {
  const int64_t tile = first / kTileTokens * at.blocks;
  V out[T];
  head_group<T, kTileChunk>(at.high_at(g), at.low_at(g), at.blocks, a.q + tile * 128, a.scale + tile * 4,
                            a.sum + tile * 4, at.high_at(g + 1), at.low_at(g + 1), out);
  UNROLL for (int t = 0; t < T; t++) store(y + (first + t) * ldy, out[t]);
}

static void head_gemm(const HeadPlanes &h, int64_t first_group, int64_t groups, const ActBatch &a,
                      int64_t tokens, float *y, int64_t ldy, uint8_t *) {
  const HeadGroups at = head_groups(h);
  for (int64_t g = first_group; g < first_group + groups; g++, y += kG) {
    for (int64_t t = 0; t < tokens; t += kTileTokens) {
      switch (tokens - t) {
      case 1: head_tile<1>(at, g, a, t, y, ldy); break;
      case 2: head_tile<2>(at, g, a, t, y, ldy); break;
      case 3: head_tile<3>(at, g, a, t, y, ldy); break;
      default: head_tile<4>(at, g, a, t, y, ldy);
      }
    }
  }
}

static void unpack_head_row(const HeadPlanes &h, int64_t row, float *out) {
  const HeadGroups at = head_groups(h);
  const uint8_t *high = at.high_at(row / kG), *low = at.low_at(row / kG);
  const int r = int(row % kG);
  for (int64_t b = 0; b < at.blocks; b++, out += 32) {
    const float d = half_at(high + 2 * r);
    for (int k = 0; k < 32; k++) {
      out[k] = d * float(16 * (nibble(high + 2 * kG, r, k) - 8) + nibble(low, r, k));
    }
    high += BlockOf<kQ4_0>::kBytes;
    low += 16 * kG;
  }
}

static int64_t screen_bounds(const float *y, const float *rest_error, const float *outlier_error,
                             const ScreenTerms &terms, int64_t n, float *bound) {
  const VF rest = splat(terms.rest_norm), outlier = splat(terms.outlier_norm);
  const VF slack = splat(terms.slack);
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t left = n - i;
    VF error = fma(outlier, load_left(outlier_error + i, left), slack);
    error = fma(rest, load_left(rest_error + i, left), error);
    store_left(bound + i, add(load_left(y + i, left), error), left);
  }
  return argmax(y, n);
}
