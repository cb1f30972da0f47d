// Matrix times one token (gemv) or many (gemm), for all packed layouts; see kernels.h for the layouts
// and the exact order of operations. The functions here work for every instruction set:
//   nibble_dots<T, CHUNK>, byte_dots<T, CHUNK>   int32 dot products of one block, kG rows x T tokens;
//     chunk c (4 inputs) of token t at q + t / 4 * tile_bytes + c * CHUNK + t % 4 * 4. byte_dots gets
//     the block's `sum` too, which kQ8_0 leaves free (avx512 passes something of its own in it).
// One lane belongs to one row, so no sum ever crosses lanes and a tile of any shape gives the bits
// of gemv.

// How far ahead a stream of weights is prefetched (kPrefetchDistance) is each table's own. Float tiles read
// several groups at once and use less, or the streams would push each other out of L1.
constexpr size_t kFloatPrefetch = 1536;
constexpr int kRowChunk = 4, kTileChunk = 16; // CHUNK of ActRow and of ActBatch

template <int LAYOUT> struct BlockOf {
  static constexpr int kScales = LAYOUT == kQ4_1 ? 2 : 1;
  static constexpr int kVectors = LAYOUT == kQ8_0 ? 8 : 4;
  static constexpr int kBytes = kG * (2 * kScales + 4 * kVectors);
};

template <int BYTES> INLINE void prefetch_bytes(const uint8_t *p) {
  for (int i = 0; i < BYTES; i += 64) prefetch(p + i);
}

template <int LAYOUT, int T, int CHUNK>
INLINE void block_dots(const uint8_t *codes, const int8_t *q, const float *sum, int64_t tile_bytes, VI *out) {
  if constexpr (LAYOUT == kQ8_0) {
    byte_dots<T, CHUNK>(codes, q, sum, tile_bytes, out);
  } else {
    nibble_dots<T, CHUNK>(codes, q, tile_bytes, out);
  }
}

// One group times T tokens. scale, sum: value of token t in block b at
// [t / 4 * blocks * 4 + b * STEP + t % 4], STEP 1 for ActRow and 4 for ActBatch.
// `ahead`: where the block's share of prefetching starts, or null.
template <int LAYOUT, int T, int CHUNK>
INLINE void group_times_tokens(const uint8_t *w, int64_t blocks, const int8_t *q, const float *scale,
                               const float *sum, const uint8_t *ahead, V *y) {
  constexpr int kStep = CHUNK / 4, kBytes = BlockOf<LAYOUT>::kBytes;
  V products[T], minima[T];
  UNROLL for (int t = 0; t < T; t++) products[t] = minima[t] = set1(0);
  for (int64_t b = 0; b < blocks; b++, w += kBytes, q += 8 * CHUNK, scale += kStep, sum += kStep) {
    if (ahead) prefetch_bytes<kBytes>(ahead + b * kBytes);
    const V d = load_f16(w);
    VI dots[T];
    block_dots<LAYOUT, T, CHUNK>(w + 2 * kG * BlockOf<LAYOUT>::kScales, q, sum, blocks * 128, dots);
    UNROLL for (int t = 0; t < T; t++) {
      const int64_t at = t / 4 * blocks * 4 + t % 4;
      const V x = set1(scale[at]), dot = to_float(dots[t]);
      if constexpr (LAYOUT == kQ4_0) {
        products[t] = fma(fma(dot, x, set1(sum[at])), d, products[t]);
      } else {
        products[t] = fma(dot, mul(d, x), products[t]);
      }
      if constexpr (LAYOUT == kQ4_1) {
        minima[t] = fma(load_f16(w + 2 * kG), set1(sum[at]), minima[t]);
      }
    }
  }
  UNROLL for (int t = 0; t < T; t++) { y[t] = LAYOUT == kQ4_1 ? add(products[t], minima[t]) : products[t]; }
}

template <int LAYOUT>
static void gemv_blocks(const uint8_t *w, int64_t groups, int64_t cols, const ActRow &a, float *y) {
  const int64_t blocks = cols / kBlockInputs;
  const size_t bytes = size_t(blocks) * BlockOf<LAYOUT>::kBytes;
  for (int64_t g = 0; g < groups; g++, w += bytes) {
    V out;
    group_times_tokens<LAYOUT, 1, kRowChunk>(w, blocks, a.q, a.scale, a.sum, w + kPrefetchDistance, &out);
    store(y + kG * g, out);
  }
}

// ---------------------------------------------------------------- many tokens

// T tokens that start at a multiple of 4, of one group.
template <int LAYOUT, int T>
static void tile(const uint8_t *w, int64_t blocks, const ActBatch &a, int64_t first, const uint8_t *ahead,
                 float *y, int64_t ldy) {
  const int64_t at = first / kTileTokens * blocks;
  V out[T];
  group_times_tokens<LAYOUT, T, kTileChunk>(w, blocks, a.q + at * 128, a.scale + at * 4, a.sum + at * 4,
                                            ahead, out);
  UNROLL for (int t = 0; t < T; t++) store(y + (first + t) * ldy, out[t]);
}

template <int LAYOUT>
static void tile_of(int tokens, const uint8_t *w, int64_t blocks, const ActBatch &a, int64_t first,
                    const uint8_t *ahead, float *y, int64_t ldy) {
  switch (tokens) {
  case 1: return tile<LAYOUT, 1>(w, blocks, a, first, ahead, y, ldy);
  case 2: return tile<LAYOUT, 2>(w, blocks, a, first, ahead, y, ldy);
  case 3: return tile<LAYOUT, 3>(w, blocks, a, first, ahead, y, ldy);
  case 4: return tile<LAYOUT, 4>(w, blocks, a, first, ahead, y, ldy);
  case 8:
    if constexpr (kMaxTileTokens >= 8) return tile<LAYOUT, 8>(w, blocks, a, first, ahead, y, ldy);
    break;
  case 12:
    if constexpr (kMaxTileTokens >= 12) return tile<LAYOUT, 12>(w, blocks, a, first, ahead, y, ldy);
  }
}

// The largest tile shape for what is left: whole tiles of 4, then 1 to 3 tokens.
INLINE int next_tile(int64_t left) {
  if (left >= kMaxTileTokens) return kMaxTileTokens;
  return left >= 4 ? int(left) & ~3 : int(left);
}

// While the first tile of a group is computed, the group after it is fetched.
template <int LAYOUT>
static void gemm_blocks(const uint8_t *w, int64_t groups, int64_t cols, const ActBatch &a, int64_t tokens,
                        float *y, int64_t ldy, uint8_t *, const uint8_t *next) {
  const int64_t blocks = cols / kBlockInputs;
  const size_t bytes = size_t(blocks) * BlockOf<LAYOUT>::kBytes;
  for (int64_t g = 0; g < groups; g++, w += bytes) {
    const uint8_t *ahead = g + 1 < groups ? w + bytes : next;
    for (int64_t t = 0; t < tokens;) {
      const int count = next_tile(tokens - t);
      tile_of<LAYOUT>(count, w, blocks, a, t, ahead, y + kG * g, ldy);
      t += count;
      ahead = nullptr;
    }
  }
}

// ---------------------------------------------------------------- float layouts

template <int LAYOUT> INLINE V load_weights(const uint8_t *p) {
  if constexpr (LAYOUT == kF16) return load_f16(p);
  if constexpr (LAYOUT == kBF16) return load_bf16(p);
  if constexpr (LAYOUT == kF32) return load((const float *)p);
}

// GROUPS x T register tile; every element is one chain over the inputs.
template <int LAYOUT, int GROUPS, int T>
static void float_tile(const uint8_t *w, size_t bytes, int64_t cols, const float *x, int64_t ldx, float *y,
                       int64_t ldy) {
  constexpr int kInput = kG * (LAYOUT == kF32 ? 4 : 2);
  V sums[GROUPS][T];
  UNROLL for (int g = 0; g < GROUPS; g++) { UNROLL for (int t = 0; t < T; t++) sums[g][t] = set1(0); }
  for (int64_t k = 0; k < cols; k++, w += kInput) {
    V weights[GROUPS];
    UNROLL for (int g = 0; g < GROUPS; g++) {
      const uint8_t *at = w + size_t(g) * bytes;
      if (T == 1) prefetch(at + kFloatPrefetch);
      weights[g] = load_weights<LAYOUT>(at);
    }
    UNROLL for (int t = 0; t < T; t++) {
      const V input = set1(x[t * ldx + k]);
      UNROLL for (int g = 0; g < GROUPS; g++) sums[g][t] = fma(weights[g], input, sums[g][t]);
    }
  }
  UNROLL for (int g = 0; g < GROUPS; g++) {
    UNROLL for (int t = 0; t < T; t++) store(y + t * ldy + g * kG, sums[g][t]);
  }
}

template <int LAYOUT, int GROUPS>
static void float_tiles(const uint8_t *w, size_t bytes, int64_t cols, const float *x, int64_t ldx,
                        int64_t tokens, float *y, int64_t ldy) {
  int64_t t = 0;
  for (; t + kFloatTokens <= tokens; t += kFloatTokens) {
    float_tile<LAYOUT, GROUPS, kFloatTokens>(w, bytes, cols, x + t * ldx, ldx, y + t * ldy, ldy);
  }
  for (; t + 2 <= tokens; t += 2) {
    float_tile<LAYOUT, GROUPS, 2>(w, bytes, cols, x + t * ldx, ldx, y + t * ldy, ldy);
  }
  if (t < tokens) {
    float_tile<LAYOUT, GROUPS, 1>(w, bytes, cols, x + t * ldx, ldx, y + t * ldy, ldy);
  }
}

template <int LAYOUT>
static void gemm_float(const uint8_t *w, int64_t groups, int64_t cols, const ActBatch &a, int64_t tokens,
                       float *y, int64_t ldy, uint8_t *, const uint8_t *) {
  const size_t bytes = group_bytes(LAYOUT, kG, cols);
  int64_t g = 0;
  for (; g + kFloatGroups <= groups; g += kFloatGroups) {
    float_tiles<LAYOUT, kFloatGroups>(w + size_t(g) * bytes, bytes, cols, a.x, a.ldx, tokens, y + g * kG,
                                      ldy);
  }
  for (; g < groups; g++) {
    float_tiles<LAYOUT, 1>(w + size_t(g) * bytes, bytes, cols, a.x, a.ldx, tokens, y + g * kG, ldy);
  }
}

template <int LAYOUT>
static void gemv_float(const uint8_t *w, int64_t groups, int64_t cols, const ActRow &a, float *y) {
  const ActBatch one = {nullptr, nullptr, nullptr, a.x, 0};
  gemm_float<LAYOUT>(w, groups, cols, one, 1, y, 0, nullptr, nullptr);
}

// ---------------------------------------------------------------- single rows as floats

INLINE int nibble(const uint8_t *codes, int r, int k) {
  const int byte = codes[4 * (k % 16 / 4 * kG + r) + k % 4];
  return k < 16 ? byte & 15 : byte >> 4;
}

INLINE float half_at(const uint8_t *p) {
  uint16_t bits;
  memcpy(&bits, p, 2);
  return half_to_float(bits);
}

template <int LAYOUT> static void unpack_block_row(const uint8_t *group, int r, int64_t blocks, float *out) {
  for (int64_t b = 0; b < blocks; b++, group += BlockOf<LAYOUT>::kBytes, out += 32) {
    const float d = half_at(group + 2 * r);
    const uint8_t *codes = group + 2 * kG * BlockOf<LAYOUT>::kScales;
    for (int k = 0; k < 32; k++) {
      if constexpr (LAYOUT == kQ8_0) {
        out[k] = d * float(int8_t(codes[4 * (k / 4 * kG + r) + k % 4]));
      } else if constexpr (LAYOUT == kQ4_0) {
        out[k] = d * float(nibble(codes, r, k) - 8);
      } else {
        out[k] = d * float(nibble(codes, r, k)) + half_at(group + 2 * (kG + r));
      }
    }
  }
}

static void unpack_row(int layout, const uint8_t *w, int64_t row, int64_t cols, float *out) {
  const uint8_t *group = w + size_t(row / kG) * group_bytes(layout, kG, cols);
  const int r = int(row % kG);
  switch (layout) {
  case kQ4_0: return unpack_block_row<kQ4_0>(group, r, cols / 32, out);
  case kQ4_1: return unpack_block_row<kQ4_1>(group, r, cols / 32, out);
  case kQ8_0: return unpack_block_row<kQ8_0>(group, r, cols / 32, out);
  }
  for (int64_t k = 0; k < cols; k++) {
    if (layout == kF32) {
      memcpy(out + k, group + 4 * (k * kG + r), 4);
    } else if (layout == kF16) {
      out[k] = half_at(group + 2 * (k * kG + r));
    } else {
      uint16_t bits;
      memcpy(&bits, group + 2 * (k * kG + r), 2);
      out[k] = bits_to_float(uint32_t(bits) << 16);
    }
  }
}
