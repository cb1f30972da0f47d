// The output head, split losslessly into nibble planes: the low plane's rows as groups, and screening bounds.
// The algebra of the bound is in pack.h, that of the split in kernels.h.

struct LowRow {
  const uint8_t *scales, *codes;
};

INLINE LowRow low_row(const HeadPlanes &h, int64_t row) {
  const uint8_t *at = h.low + size_t(row) * head_low_row_bytes(h.cols);
  return {at, at + size_t((h.cols / kBlockInputs + 1) / 2) * 4};
}

// Rows lie one after the other, so that a few scattered ones can be scored; the matrix product of kQ4_0 wants
// them in groups. A block of a row is the same 16 bytes in both, a group only interleaves its rows.
static void low_group(const HeadPlanes &h, const int64_t *rows, int64_t first_row, int64_t n, uint8_t *out) {
  const int64_t blocks = h.cols / kBlockInputs;
  constexpr int kBytes = BlockOf<kQ4_0>::kBytes;
  const uint8_t *codes[kG];
  const uint16_t *scales[kG];
  for (int r = 0; r < kG; r++) { // lanes without a row of their own repeat the last one
    const int64_t i = r < n ? r : n - 1;
    const LowRow row = low_row(h, rows ? rows[i] : first_row + i);
    codes[r] = row.codes;
    scales[r] = (const uint16_t *)row.scales;
  }
  // The high plane has the same scales, a group's together. The rows are read in parallel, which no hardware
  // prefetcher takes for the one stream that it is: a block's share of what lies ahead is fetched with it.
  const uint8_t *ahead = h.low + size_t(first_row) * head_low_row_bytes(h.cols) + kPrefetchDistance;
  const uint8_t *together = rows ? nullptr : h.high + size_t(first_row / kG) * size_t(blocks) * kBytes;
  for (int64_t b = 0; b < blocks; b++, out += kBytes) {
    if (together) {
      memcpy(out, together + b * kBytes, 2 * kG);
      prefetch_bytes<kBytes>(ahead + b * kBytes);
    } else {
      for (int r = 0; r < kG; r++) memcpy(out + 2 * r, scales[r] + b, 2);
    }
    transpose_codes(codes, size_t(b) * 16, out + 2 * kG);
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
