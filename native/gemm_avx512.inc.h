// The AVX-512 matrix product of byte weights. vpdpbusd wants an unsigned operand, so it gets w + 128 and
// every dot product starts from -128 * (sum of the activations). These sums are the same for all rows:
// they are taken once for a run of tokens and handed to the tiles in the free `sum` of kQ8_0.

constexpr int64_t kRunTokens = 64; // the corrections of a run are 256 bytes per block

static size_t gemm_scratch_bytes(int64_t cols) {
  return size_t(cols / kBlockInputs) * size_t(kRunTokens) * sizeof(int32_t) + 64;
}

static void gemm_bytes(const uint8_t *w, int64_t groups, int64_t cols, const ActBatch &a, int64_t tokens,
                       float *y, int64_t ldy, uint8_t *scratch, const uint8_t *next) {
  const int64_t blocks = cols / kBlockInputs;
  for (int64_t first = 0; first < tokens; first += kRunTokens) {
    const int64_t count = tokens - first < kRunTokens ? tokens - first : kRunTokens;
    const int64_t at = first / kTileTokens * blocks;
    const int64_t tile_blocks = (count + kTileTokens - 1) / kTileTokens * blocks;
    for (int64_t b = 0; b < tile_blocks; b++) {
      _mm_storeu_si128((__m128i *)scratch + b, tile_corrections(a.q + (at + b) * 128));
    }
    const ActBatch run = {a.q + at * 128, a.scale + at * 4, (const float *)scratch, nullptr, 0};
    gemm_blocks<kQ8_0>(w, groups, cols, run, count, y + first * ldy, ldy, scratch, next);
  }
}

template <int LAYOUT>
static void gemm_any(const uint8_t *w, int64_t groups, int64_t cols, const ActBatch &a, int64_t tokens,
                     float *y, int64_t ldy, uint8_t *scratch, const uint8_t *next) {
  if constexpr (LAYOUT == kQ8_0) {
    gemm_bytes(w, groups, cols, a, tokens, y, ldy, scratch, next);
  } else {
    gemm_blocks<LAYOUT>(w, groups, cols, a, tokens, y, ldy, scratch, next);
  }
}
