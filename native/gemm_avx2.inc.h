// The AVX2 matrix product for nibble layouts: 16 rows x 4 tokens per register tile, from a panel of weights
// unpacked to bytes.
//
// Without VNNI a block of 32 inputs costs 8 maddubs and 8 additions per 8 rows and token, and unpacking
// nibbles as much again for 4 tokens. So two groups (16 rows) are unpacked once into a panel that stays in
// L1 or L2, for all tokens. The inner block needs 8 accumulators, 2 weight vectors, 2 broadcasts and 2
// products: 14 of 16 registers. gcc spills when given this loop in intrinsics (86-128 GMAC/s on two Zen 3
// cores against 283 in assembly), hence the inline assembly; everything around it is C++.
// Measured on one Zen 5 core: 100 GMAC/s without the panel.

constexpr int kPanelRows = 16, kChunks = 8;

// Bytes per block of a panel: 8 chunks x 2 groups x 32 code bytes, then per-row scales and minima.
constexpr size_t kPanelCodes = 512, kPanelFloats = 2 * kPanelRows * sizeof(float);

struct Panel {
  uint8_t *codes;         // [block][chunk][2 groups][32]
  float *scales, *minima; // [block][16 rows]
};

static size_t gemm_scratch_bytes(int64_t cols) {
  return size_t(cols / kBlockInputs) * (kPanelCodes + kPanelFloats) + 64;
}

INLINE Panel panel_in(uint8_t *scratch, int64_t blocks) {
  float *floats = (float *)(scratch + size_t(blocks) * kPanelCodes);
  return {scratch, floats, floats + blocks * kPanelRows};
}

template <int LAYOUT> static void unpack_panel(const uint8_t *w, int64_t blocks, const Panel &panel) {
  constexpr int kBytes = BlockOf<LAYOUT>::kBytes;
  const __m256i mask = _mm256_set1_epi8(15);
  for (int group = 0; group < 2; group++) {
    uint8_t *to = panel.codes + 32 * group;
    float *scales = panel.scales + 8 * group, *minima = panel.minima + 8 * group;
    for (int64_t b = 0; b < blocks; b++, w += kBytes, to += kPanelCodes) {
      prefetch_bytes<kBytes>(w + kPrefetchDistance);
      store(scales + b * kPanelRows, load_f16(w));
      if (LAYOUT == kQ4_1) store(minima + b * kPanelRows, load_f16(w + 2 * kG));
      UNROLL for (int v = 0; v < 4; v++) {
        const __m256i both = codes_at(w + 2 * kG * BlockOf<LAYOUT>::kScales + 32 * v);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
        _mm256_store_si256((__m256i *)(to + 64 * v), _mm256_and_si256(both, mask));
        _mm256_store_si256((__m256i *)(to + 64 * (v + 4)), high);
      }
    }
  }
}

// clang-format off
#define LOAD_WEIGHTS(chunk)                                                                        \
  "vmovdqa 64*" #chunk "(%[codes]), %[w0]\n\t"                                                     \
  "vmovdqa 64*" #chunk "+32(%[codes]), %[w1]\n\t"
#define LOAD_TOKEN(chunk, token, to)                                                               \
  "vpbroadcastd 16*" #chunk "+4*" #token "(%[q]), %[" #to "]\n\t"
#define START(token, from)                                                                         \
  "vpmaddubsw %[" #from "], %[w0], %[s0" #token "]\n\t"                                            \
  "vpmaddubsw %[" #from "], %[w1], %[s1" #token "]\n\t"
#define MORE(token, from)                                                                          \
  "vpmaddubsw %[" #from "], %[w0], %[p0]\n\t"                                                      \
  "vpmaddubsw %[" #from "], %[w1], %[p1]\n\t"                                                      \
  "vpaddw %[p0], %[s0" #token "], %[s0" #token "]\n\t"                                             \
  "vpaddw %[p1], %[s1" #token "], %[s1" #token "]\n\t"
#define ONE_CHUNK(chunk, STEP)                                                                     \
  LOAD_WEIGHTS(chunk)                                                                              \
  LOAD_TOKEN(chunk, 0, x0) LOAD_TOKEN(chunk, 1, x1)                                                \
  STEP(0, x0) LOAD_TOKEN(chunk, 2, x0)                                                             \
  STEP(1, x1) LOAD_TOKEN(chunk, 3, x1)                                                             \
  STEP(2, x0) STEP(3, x1)

// 16-bit sums of one block: sums[group][token]. Range as in nibble_dots: 30720 < 32767.
INLINE void panel_block(const uint8_t *codes, const int8_t *q, __m256i (&sums)[2][4]) {
  __m256i w0, w1, x0, x1, p0, p1;
  __asm__(ONE_CHUNK(0, START)
          ONE_CHUNK(1, MORE) ONE_CHUNK(2, MORE) ONE_CHUNK(3, MORE) ONE_CHUNK(4, MORE)
          ONE_CHUNK(5, MORE) ONE_CHUNK(6, MORE) ONE_CHUNK(7, MORE)
          : [s00] "=&x"(sums[0][0]), [s01] "=&x"(sums[0][1]), [s02] "=&x"(sums[0][2]),
            [s03] "=&x"(sums[0][3]), [s10] "=&x"(sums[1][0]), [s11] "=&x"(sums[1][1]),
            [s12] "=&x"(sums[1][2]), [s13] "=&x"(sums[1][3]), [w0] "=&x"(w0), [w1] "=&x"(w1),
            [x0] "=&x"(x0), [x1] "=&x"(x1), [p0] "=&x"(p0), [p1] "=&x"(p1)
          : [codes] "r"(codes), [q] "r"(q), "m"(*(const uint8_t(*)[kPanelCodes])codes),
            "m"(*(const int8_t(*)[128])q));
}
#undef LOAD_WEIGHTS
#undef LOAD_TOKEN
#undef START
#undef MORE
#undef ONE_CHUNK
// clang-format on

// sum_b m_b * sum_b, the second chain of kQ4_1, for 16 rows x 4 tokens: to [token][16].
static void panel_minima(const Panel &panel, int64_t blocks, const float *sum, float *to) {
  V chains[2][4];
  UNROLL for (int t = 0; t < 4; t++) chains[0][t] = chains[1][t] = set1(0);
  for (int64_t b = 0; b < blocks; b++, sum += 4) {
    const V m0 = load(panel.minima + b * kPanelRows), m1 = load(panel.minima + b * kPanelRows + 8);
    UNROLL for (int t = 0; t < 4; t++) {
      chains[0][t] = fma(m0, set1(sum[t]), chains[0][t]);
      chains[1][t] = fma(m1, set1(sum[t]), chains[1][t]);
    }
  }
  UNROLL for (int t = 0; t < 4; t++) {
    store(to + 16 * t, chains[0][t]);
    store(to + 16 * t + 8, chains[1][t]);
  }
}

// One tile: products to [token][16]. The fp32 chains live in L1, the integer sums take the registers.
template <int LAYOUT>
static void panel_tile(const Panel &panel, int64_t blocks, const int8_t *q, const float *scale,
                       const float *sum, const uint8_t *ahead, float *to) {
  const __m256i ones = _mm256_set1_epi16(1);
  UNROLL for (int t = 0; t < 4; t++) {
    store(to + 16 * t, set1(0));
    store(to + 16 * t + 8, set1(0));
  }
  for (int64_t b = 0; b < blocks; b++, q += 128, scale += 4, sum += 4) {
    if (ahead) prefetch_bytes<2 * BlockOf<LAYOUT>::kBytes>(ahead + b * 2 * BlockOf<LAYOUT>::kBytes);
    __m256i sums[2][4];
    panel_block(panel.codes + size_t(b) * kPanelCodes, q, sums);
    UNROLL for (int group = 0; group < 2; group++) {
      const V d = load(panel.scales + b * kPanelRows + 8 * group);
      UNROLL for (int t = 0; t < 4; t++) {
        float *chain = to + 16 * t + 8 * group;
        const V dot = to_float(_mm256_madd_epi16(sums[group][t], ones)), x = set1(scale[t]);
        if constexpr (LAYOUT == kQ4_0) {
          store(chain, fma(fma(dot, x, set1(sum[t])), d, load(chain)));
        } else {
          store(chain, fma(dot, mul(d, x), load(chain)));
        }
      }
    }
  }
}

// Tokens per call from which on the panel pays for its unpacking.
constexpr int64_t kPanelTokens = 4;

template <int LAYOUT>
static void gemm_panel(const Panel &panel, int64_t blocks, const ActBatch &a, int64_t first, int64_t count,
                       const uint8_t *ahead, float *y, int64_t ldy) {
  const int64_t at = first / kTileTokens * blocks;
  alignas(64) float products[kTileTokens * kPanelRows], minima[kTileTokens * kPanelRows];
  panel_tile<LAYOUT>(panel, blocks, a.q + at * 128, a.scale + at * 4, a.sum + at * 4, ahead, products);
  if (LAYOUT == kQ4_1) panel_minima(panel, blocks, a.sum + at * 4, minima);
  for (int64_t t = 0; t < count; t++) {
    for (int i = 0; i < kPanelRows; i += 8) {
      const V chain = load(products + kPanelRows * t + i);
      store(y + (first + t) * ldy + i,
            LAYOUT == kQ4_1 ? add(chain, load(minima + kPanelRows * t + i)) : chain);
    }
  }
}

template <int LAYOUT>
static void gemm_panels(const uint8_t *w, int64_t groups, int64_t cols, const ActBatch &a, int64_t tokens,
                        float *y, int64_t ldy, uint8_t *scratch, const uint8_t *next) {
  if (LAYOUT == kQ8_0 || tokens < kPanelTokens) {
    gemm_blocks<LAYOUT>(w, groups, cols, a, tokens, y, ldy, scratch, next);
    return;
  }
  const int64_t blocks = cols / kBlockInputs;
  const size_t bytes = size_t(blocks) * BlockOf<LAYOUT>::kBytes;
  const Panel panel = panel_in(scratch, blocks);
  int64_t g = 0;
  for (; g + 2 <= groups; g += 2, w += 2 * bytes, y += kPanelRows) {
    unpack_panel<LAYOUT>(w, blocks, panel);
    const uint8_t *ahead = g + 4 <= groups ? w + 2 * bytes : next;
    int64_t t = 0;
    // A tile of three tokens and an idle one still beats the direct kernel; with one or two it does not.
    for (; t + 3 <= tokens; t += kTileTokens) {
      const int64_t count = tokens - t < kTileTokens ? tokens - t : kTileTokens;
      gemm_panel<LAYOUT>(panel, blocks, a, t, count, ahead, y, ldy);
      ahead = nullptr;
    }
    if (t < tokens) {
      for (int i = 0; i < 2; i++) {
        tile_of<LAYOUT>(int(tokens - t), w + size_t(i) * bytes, blocks, a, t, nullptr, y + kG * i, ldy);
      }
    }
  }
  if (g < groups) gemm_blocks<LAYOUT>(w, groups - g, cols, a, tokens, y, ldy, scratch, next);
}
