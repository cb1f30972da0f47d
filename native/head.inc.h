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

INLINE float low_part(const LowRow &row, int64_t blocks, const int8_t *q, const float *scale,
                      const float *off) {
  VF products = splat(0), offsets = splat(0);
  for (int64_t first = 0; first < blocks; first += 16) {
    const int64_t n = blocks - first < 16 ? blocks - first : 16;
    const uint16_t *half = (const uint16_t *)(row.scales + 2 * first);
    const VF d = n == 16 ? load16_f16(half) : load16_f16_n(half, int(n));
    alignas(64) float ds[16];
    store16(ds, mul(d, load_left(scale + first, n)));
    offsets = fma(d, load_left(off + first, n), offsets);
    for (int64_t b = 0; b < n; b += 2) {
      VFI dots;
      VF scales;
      pair_dots(row.codes + (first + b) * 16, q + (first + b) * kBlockInputs, dots.part);
      splat_pair(ds + b, scales.part);
      products = fma(to_float(dots), scales, products);
    }
  }
  return sum_lanes(products) + sum_lanes(offsets);
}

// Rows that survive the screening are few and scattered: the hardware cannot foresee them, so each is
// asked for some rows ahead.
static void head_low(const HeadPlanes &h, const int64_t *rows, int64_t first_row, int64_t num_rows,
                     const int8_t *q, const float *scale, const float *off, float *y) {
  constexpr int64_t kAhead = 8;
  const int64_t blocks = h.cols / kBlockInputs;
  const size_t bytes = head_low_row_bytes(h.cols);
  int64_t asked = rows ? 0 : num_rows;
  for (int64_t i = 0; i < num_rows; i++) {
    for (; asked < num_rows && asked <= i + kAhead; asked++) {
      const uint8_t *next = h.low + size_t(rows[asked]) * bytes;
      for (size_t at = 0; at < bytes + 63; at += 64) prefetch(next + (at < bytes ? at : bytes - 1));
    }
    const int64_t row = rows ? rows[i] : first_row + i;
    y[i] += low_part(low_row(h, row), blocks, q, scale, off);
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
