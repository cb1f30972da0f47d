// The output head, split losslessly into nibble planes: screening bounds and the low part of exact
// logits. The algebra of the bound is in pack.h, that of the split in kernels.h.
//
// Low part of a row: <low - 7.5, q> scaled, summed in 16 lanes. Blocks are taken in pairs: lanes 0-7 hold
// partial sums of the even block, lanes 8-15 of the odd one, so one multiply-add serves both. The order
// depends on nothing but the row's length.

struct LowRow {
  const uint8_t *scales, *codes;
};

INLINE LowRow low_row(const HeadPlanes &h, int64_t row) {
  const uint8_t *at = h.low + size_t(row) * head_low_row_bytes(h.cols);
  return {at, at + size_t((h.cols / kBlockInputs + 1) / 2) * 4};
}

// Of T tokens; what is unpacked serves all of them.
template <int T> INLINE void low_parts(const LowRow &row, int64_t blocks, const LowInput *in, float *out) {
  VF products[T], offsets[T];
  UNROLL for (int t = 0; t < T; t++) products[t] = offsets[t] = splat(0);
  for (int64_t first = 0; first < blocks; first += 16) {
    const int64_t n = blocks - first < 16 ? blocks - first : 16;
    const uint16_t *half = (const uint16_t *)(row.scales + 2 * first);
    const VF d = n == 16 ? load16_f16(half) : load16_f16_n(half, int(n));
    alignas(64) float ds[T][16];
    UNROLL for (int t = 0; t < T; t++) {
      store16(ds[t], mul(d, load_left(in[t].scale + first, n)));
      offsets[t] = fma(d, load_left(in[t].off + first, n), offsets[t]);
    }
    for (int64_t b = 0; b < n; b += 2) {
      const PairCodes codes = unpack_pair(row.codes + (first + b) * 16);
      UNROLL for (int t = 0; t < T; t++) {
        VFI dots;
        VF scales;
        pair_dots(codes, in[t].q + (first + b) * kBlockInputs, dots.part);
        splat_pair(ds[t] + b, scales.part);
        products[t] = fma(to_float(dots), scales, products[t]);
      }
    }
  }
  UNROLL for (int t = 0; t < T; t++) out[t] = sum_lanes(products[t]) + sum_lanes(offsets[t]);
}

// Rows that survive the screening are few and scattered: the hardware cannot foresee them, so each is
// asked for some rows ahead.
static void head_low(const HeadPlanes &h, const int64_t *rows, int64_t num_rows, const LowInput &in,
                     float *y) {
  constexpr int64_t kAhead = 8;
  const int64_t blocks = h.cols / kBlockInputs;
  const size_t bytes = head_low_row_bytes(h.cols);
  int64_t asked = 0;
  for (int64_t i = 0; i < num_rows; i++) {
    for (; asked < num_rows && asked <= i + kAhead; asked++) {
      const uint8_t *next = h.low + size_t(rows[asked]) * bytes;
      for (size_t at = 0; at < bytes + 63; at += 64) prefetch(next + (at < bytes ? at : bytes - 1));
    }
    float part;
    low_parts<1>(low_row(h, rows[i]), blocks, &in, &part);
    y[i] += part;
  }
}

template <int T>
static void low_tokens(int tokens, const LowRow &row, int64_t blocks, const LowInput *in, float *y,
                       int64_t ldy) {
  if (tokens < T) {
    if constexpr (T > 1) low_tokens<T - 1>(tokens, row, blocks, in, y, ldy);
    return;
  }
  float parts[T];
  low_parts<T>(row, blocks, in, parts);
  for (int t = 0; t < T; t++) y[t * ldy] += parts[t];
}

// Row by row: it stays in L1 for all tokens.
static void head_low_many(const HeadPlanes &h, int64_t first_row, int64_t num_rows, const LowInput *in,
                          int tokens, float *y, int64_t ldy) {
  const int64_t blocks = h.cols / kBlockInputs;
  for (int64_t i = 0; i < num_rows; i++) {
    const LowRow row = low_row(h, first_row + i);
    for (int t = 0; t < tokens; t += kLowTokens)
      low_tokens<kLowTokens>(tokens - t, row, blocks, in + t, y + t * ldy + i, ldy);
  }
}

static void unpack_head_row(const HeadPlanes &h, int64_t row, float *out) {
  const int64_t blocks = h.cols / kBlockInputs;
  const uint8_t *high = h.high + size_t(row / kG) * size_t(blocks) * size_t(BlockOf<kQ4_0>::kBytes);
  const uint8_t *low = low_row(h, row).codes;
  const int r = int(row % kG);
  for (int64_t b = 0; b < blocks; b++, out += 32) {
    const float d = half_at(high + 2 * r);
    for (int k = 0; k < 32; k++) {
      const int lower = k < 16 ? low[k] & 15 : low[k - 16] >> 4;
      out[k] = d * float(16 * (nibble(high + 2 * kG, r, k) - 8) + lower);
    }
    high += BlockOf<kQ4_0>::kBytes;
    low += 16;
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
