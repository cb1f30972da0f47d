// Vector primitives and integer dot products for AVX2 + FMA + F16C: 8 lanes, 16 registers.
// Included inside hayai::avx2's anonymous namespace. See simd.inc.h for the contract.

constexpr int kG = 8;

typedef __m256 V;
typedef __m256i VI;
typedef __m256 VM; // all bits of a lane set or clear

INLINE V load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, V v) { _mm256_storeu_ps(p, v); }
INLINE V set1(float x) { return _mm256_set1_ps(x); }
INLINE VI first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE V load_n(const float *p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
INLINE void store_n(float *p, V v, int n) { _mm256_maskstore_ps(p, first_lanes(n), v); }

INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
INLINE VM less(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
INLINE V select(VM m, V yes, V no) { return _mm256_blendv_ps(no, yes, m); }
INLINE V abs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
INLINE V flip(V a, V sign_bits) { return _mm256_xor_ps(a, sign_bits); }
INLINE VI max_int(VI a, VI b) { return _mm256_max_epi32(a, b); }
INLINE VI add_int(VI a, VI b) { return _mm256_add_epi32(a, b); }
INLINE VI shift_left_4(VI a) { return _mm256_slli_epi32(a, 4); }
INLINE VI bits(V a) { return _mm256_castps_si256(a); }
INLINE V to_float(VI a) { return _mm256_cvtepi32_ps(a); }
INLINE VI to_int(V x) { return _mm256_cvtps_epi32(x); }
INLINE V power_of_two(VI exponent) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
}

INLINE float reduce_add(V v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
INLINE float reduce_max(V v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
INLINE int32_t reduce_add_int(VI v) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
INLINE int32_t reduce_max_int(VI v) {
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}

INLINE V load_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE V load_f16_n(const void *p, int n) {
  if (n % 2 == 0) { // whole pairs: a masked load of 32-bit lanes
    const __m128i pairs = _mm_cmpgt_epi32(_mm_set1_epi32(n / 2), _mm_setr_epi32(0, 1, 2, 3));
    return _mm256_cvtph_ps(_mm_maskload_epi32((const int *)p, pairs));
  }
  alignas(16) uint16_t half[kG] = {};
  memcpy(half, p, 2 * size_t(n));
  return load_f16(half);
}
INLINE V load_bf16(const void *p) {
  const __m128i half = _mm_loadu_si128((const __m128i *)p);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
INLINE void store_f16(void *p, V v) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, 0)); }
INLINE void store_f16_n(void *p, V v, int n) {
  alignas(16) uint16_t half[kG];
  store_f16(half, v);
  memcpy(p, half, 2 * size_t(n));
}
INLINE V load_i8(const void *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE void store_bytes(int8_t *p, VI v) { // 8 lanes, saturated to 8 bits
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(words, words));
}

INLINE V swap_pairs(V v) { return _mm256_permute_ps(v, 0xb1); }
INLINE V load_twice(const float *p) {
  const __m256 v = _mm256_castps128_ps256(_mm_loadu_ps(p));
  return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}

// ---------------------------------------------------------------- integer dot products

INLINE __m256i chunk_of(const int8_t *q) {
  int32_t four;
  memcpy(&four, q, 4);
  return _mm256_set1_epi32(four);
}
INLINE __m256i codes_at(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

// Unsigned nibbles times signed bytes: 16 products of at most 15 * 128 per 16-bit lane, 30720 < 32767,
// so they are added in 16 bits and widened once.
template <int T, int CHUNK> INLINE void nibble_dots(const uint8_t *codes, const int8_t *q, int64_t, VI *out) {
  const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i sum[T], other[T];
  UNROLL for (int v = 0; v < 4; v++) {
    const __m256i w = codes_at(codes + 32 * v);
    const __m256i low = _mm256_and_si256(w, mask);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(w, 4), mask);
    UNROLL for (int t = 0; t < T; t++) {
      const int8_t *chunk = q + v * CHUNK + 4 * t;
      const __m256i first = _mm256_maddubs_epi16(low, chunk_of(chunk));
      const __m256i second = _mm256_maddubs_epi16(high, chunk_of(chunk + 4 * CHUNK));
      sum[t] = v == 0 ? first : _mm256_add_epi16(sum[t], first);
      other[t] = v == 0 ? second : _mm256_add_epi16(other[t], second);
    }
  }
  UNROLL for (int t = 0; t < T; t++) sum[t] = _mm256_add_epi16(sum[t], other[t]);
  UNROLL for (int t = 0; t < T; t++) out[t] = _mm256_madd_epi16(sum[t], ones);
}

// Sixteen bytes of each of 8 rows, at rows[r] + at, as 4 vectors: vector v byte 4r + t = byte 4v + t of row r.
// Half i of four[j] holds row 4i + j, so that a transposition within halves leaves the rows in order.
INLINE void transpose_codes(const uint8_t *const *rows, size_t at, uint8_t *out) {
  __m256i four[4];
  UNROLL for (int j = 0; j < 4; j++) {
    const __m128i first = _mm_loadu_si128((const __m128i *)(rows[j] + at));
    const __m128i second = _mm_loadu_si128((const __m128i *)(rows[4 + j] + at));
    four[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
  }
  const __m256i low01 = _mm256_unpacklo_epi32(four[0], four[1]),
                high01 = _mm256_unpackhi_epi32(four[0], four[1]);
  const __m256i low23 = _mm256_unpacklo_epi32(four[2], four[3]),
                high23 = _mm256_unpackhi_epi32(four[2], four[3]);
  _mm256_storeu_si256((__m256i *)out, _mm256_unpacklo_epi64(low01, low23));
  _mm256_storeu_si256((__m256i *)(out + 32), _mm256_unpackhi_epi64(low01, low23));
  _mm256_storeu_si256((__m256i *)(out + 64), _mm256_unpacklo_epi64(high01, high23));
  _mm256_storeu_si256((__m256i *)(out + 96), _mm256_unpackhi_epi64(high01, high23));
}

// maddubs wants an unsigned operand: |w| and q * sign(w). Two products of at most 128 * 127 fit 16
// bits (|q| <= 127), no more than that is added before widening.
template <int T, int CHUNK>
INLINE void byte_dots(const uint8_t *codes, const int8_t *q, const float *, int64_t, VI *out) {
  const __m256i ones = _mm256_set1_epi16(1);
  UNROLL for (int v = 0; v < 8; v++) {
    const __m256i w = codes_at(codes + 32 * v), size = _mm256_abs_epi8(w);
    UNROLL for (int t = 0; t < T; t++) {
      const __m256i turned = _mm256_sign_epi8(chunk_of(q + v * CHUNK + 4 * t), w);
      const __m256i dots = _mm256_madd_epi16(_mm256_maddubs_epi16(size, turned), ones);
      out[t] = v == 0 ? dots : _mm256_add_epi32(out[t], dots);
    }
  }
}

// Bytes. Measured on Zen 3, from memory: 1024-2048 are level, 4096 costs 5 %, none at all costs 10 %. The far
// end of the level range, because faster memory wants more (simd_avx512.inc.h).
constexpr size_t kPrefetchDistance = 2048;
constexpr int kMaxTileTokens = 4; // tokens per integer tile
constexpr int kFloatGroups = 3, kFloatTokens = 4;
constexpr int kScoreRows = 3, kScorePages = 2; // attention register blocks
constexpr int kValueRows = 3, kValueVectors = 2;
