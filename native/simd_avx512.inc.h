// Vector primitives and integer dot products for AVX-512 (F, BW, VL, DQ, VNNI): 16 lanes, 32 registers.
// Included inside hayai::avx512's anonymous namespace. See simd.inc.h for the contract.

constexpr int kG = 16;

typedef __m512 V;
typedef __m512i VI;
typedef __mmask16 VM;

INLINE V load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, V v) { _mm512_storeu_ps(p, v); }
INLINE V set1(float x) { return _mm512_set1_ps(x); }
INLINE VM first_lanes(int n) { return VM((1u << n) - 1); }
INLINE V load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
INLINE void store_n(float *p, V v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }

INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
INLINE VM less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE V select(VM m, V yes, V no) { return _mm512_mask_blend_ps(m, no, yes); }
INLINE V abs(V a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.f), a); }
INLINE V flip(V a, V sign_bits) { return _mm512_xor_ps(a, sign_bits); }
INLINE VI max_int(VI a, VI b) { return _mm512_max_epi32(a, b); }
INLINE VI add_int(VI a, VI b) { return _mm512_add_epi32(a, b); }
INLINE VI shift_left_4(VI a) { return _mm512_slli_epi32(a, 4); }
INLINE VI bits(V a) { return _mm512_castps_si512(a); }
INLINE V to_float(VI a) { return _mm512_cvtepi32_ps(a); }
INLINE VI to_int(V x) { return _mm512_cvtps_epi32(x); }
INLINE V power_of_two(VI exponent) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(exponent, _mm512_set1_epi32(127)), 23));
}

// Halves are added first: the order of 8-lane tables.
INLINE float reduce_add(V v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
INLINE float reduce_max(V v) {
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
INLINE int32_t reduce_add_int(VI v) { // not _mm512_reduce_add_epi32: gcc's adds signed, and sums may wrap
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
INLINE int32_t reduce_max_int(VI v) { return _mm512_reduce_max_epi32(v); }

INLINE V load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE V load_f16_n(const void *p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
INLINE V load_bf16(const void *p) {
  const __m256i half = _mm256_loadu_si256((const __m256i *)p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
INLINE void store_f16(void *p, V v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, 0)); }
INLINE void store_f16_n(void *p, V v, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(v, 0));
}
INLINE V load_i8(const void *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE void store_bytes(int8_t *p, VI v) { // 16 lanes, saturated to 8 bits
  _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(v));
}

INLINE V swap_pairs(V v) { return _mm512_permute_ps(v, 0xb1); }
INLINE V load_twice(const float *p) {
  const __m512 v = _mm512_castps256_ps512(_mm256_loadu_ps(p));
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), v);
}

// ---------------------------------------------------------------- integer dot products

INLINE __m512i chunk_of(const int8_t *q) {
  int32_t four;
  memcpy(&four, q, 4);
  return _mm512_set1_epi32(four);
}
INLINE __m512i codes_at(const uint8_t *p) { return _mm512_loadu_si512(p); }

// vpdpbusd adds four products of unsigned and signed bytes to a 32-bit lane without saturation.
template <int T, int CHUNK>
INLINE void nibble_dots(const uint8_t *codes, const int8_t *q, int64_t tile_bytes, VI *out) {
  const __m512i mask = _mm512_set1_epi8(15);
  UNROLL for (int t = 0; t < T; t++) out[t] = _mm512_setzero_si512();
  UNROLL for (int v = 0; v < 4; v++) {
    const __m512i w = codes_at(codes + 64 * v);
    const __m512i low = _mm512_and_si512(w, mask);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(w, 4), mask);
    UNROLL for (int t = 0; t < T; t++) {
      const int8_t *chunk = q + t / 4 * tile_bytes + v * CHUNK + t % 4 * 4;
      out[t] = _mm512_dpbusd_epi32(out[t], low, chunk_of(chunk));
      out[t] = _mm512_dpbusd_epi32(out[t], high, chunk_of(chunk + 4 * CHUNK));
    }
  }
}

// Sixteen bytes of each of 16 rows, at rows[r] + at, as 4 vectors: vector v byte 4r + t = byte 4v + t of row r.
// Lane i of four[j] holds row 4i + j, so that a transposition within lanes leaves the rows in order.
INLINE void transpose_codes(const uint8_t *const *rows, size_t at, uint8_t *out) {
  __m512i four[4];
  UNROLL for (int j = 0; j < 4; j++) {
    four[j] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[j] + at)));
    four[j] = _mm512_inserti32x4(four[j], _mm_loadu_si128((const __m128i *)(rows[4 + j] + at)), 1);
    four[j] = _mm512_inserti32x4(four[j], _mm_loadu_si128((const __m128i *)(rows[8 + j] + at)), 2);
    four[j] = _mm512_inserti32x4(four[j], _mm_loadu_si128((const __m128i *)(rows[12 + j] + at)), 3);
  }
  const __m512i low01 = _mm512_unpacklo_epi32(four[0], four[1]),
                high01 = _mm512_unpackhi_epi32(four[0], four[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(four[2], four[3]),
                high23 = _mm512_unpackhi_epi32(four[2], four[3]);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low01, low23));
  _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi64(low01, low23));
  _mm512_storeu_si512(out + 128, _mm512_unpacklo_epi64(high01, high23));
  _mm512_storeu_si512(out + 192, _mm512_unpackhi_epi64(high01, high23));
}

// -128 * (sum of a token's 32 activations), exactly: with w + 128 as the unsigned operand, this takes the
// surplus back. One token in a row: in every lane. A tile of four: in the lowest four lanes.
INLINE __m512i row_correction(const int8_t *q) {
  const __m256i all = _mm256_loadu_si256((const __m256i *)q);
  const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(-128), all);
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1));
  return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_broadcastd_epi32(x));
}
INLINE __m128i tile_corrections(const int8_t *q) {
  const __m512i offset = _mm512_set1_epi8(-128);
  __m512i x = _mm512_dpbusd_epi32(_mm512_setzero_si512(), offset, codes_at((const uint8_t *)q));
  x = _mm512_dpbusd_epi32(x, offset, codes_at((const uint8_t *)q + 64));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
  const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return _mm_sub_epi32(_mm_setzero_si128(), sums);
}

// Tiles find their corrections in `sum`, as int32 (gemm_bytes below).
template <int T, int CHUNK>
INLINE void byte_dots(const uint8_t *codes, const int8_t *q, const float *sum, int64_t tile_bytes, VI *out) {
  UNROLL for (int t = 0; t < T; t++) {
    if constexpr (CHUNK == 4) {
      out[t] = row_correction(q);
    } else {
      out[t] = chunk_of((const int8_t *)(sum + t / 4 * (tile_bytes / 32) + t % 4));
    }
  }
  UNROLL for (int v = 0; v < 8; v++) {
    const __m512i w = _mm512_xor_si512(codes_at(codes + 64 * v), _mm512_set1_epi8(-128));
    UNROLL for (int t = 0; t < T; t++) {
      const int8_t *chunk = q + t / 4 * tile_bytes + v * CHUNK + t % 4 * 4;
      out[t] = _mm512_dpbusd_epi32(out[t], w, chunk_of(chunk));
    }
  }
}

// Bytes. Share of a pure read on two Zen 5 cores, from L3 and from memory: 1536 gives 0.70 and 0.87, 4096
// gives 0.80 and 0.97, 8192 gives 0.90 and 0.96; 32768 falls to 0.83 from L3.
constexpr size_t kPrefetchDistance = 8192;
constexpr int kMaxTileTokens = 8; // tokens per integer tile
constexpr int kFloatGroups = 4, kFloatTokens = 6;
constexpr int kScoreRows = 6, kScorePages = 4; // attention register blocks
constexpr int kValueRows = 6, kValueVectors = 4;
