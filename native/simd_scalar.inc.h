// Vector primitives of the portable table: compiler vectors of 8 lanes, no instruction set assumed.
// Multiply-adds are two roundings here (a fused one is a library call on baseline x86-64).
// Included inside hayai::scalar's anonymous namespace. See simd.inc.h for the contract.
#pragma GCC diagnostic ignored "-Wpsabi" // vectors are passed only to inlined functions

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed layouts are little endian");

constexpr int kG = 8;

typedef float V __attribute__((vector_size(32)));
typedef int32_t VI __attribute__((vector_size(32)));
typedef int32_t VM __attribute__((vector_size(32)));
typedef uint32_t U32 __attribute__((vector_size(32)));
typedef int16_t I16 __attribute__((vector_size(32)));
typedef uint16_t U16 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));

INLINE V load(const float *p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float *p, V v) { memcpy(p, &v, sizeof v); }
INLINE V set1(float x) { return V{x, x, x, x, x, x, x, x}; }
INLINE V load_n(const float *p, int n) {
  V v = set1(0);
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
}
INLINE void store_n(float *p, V v, int n) {
  for (int i = 0; i < n; i++) p[i] = v[i];
}

INLINE V add(V a, V b) { return a + b; }
INLINE V sub(V a, V b) { return a - b; }
INLINE V mul(V a, V b) { return a * b; }
INLINE V div(V a, V b) { return a / b; }
INLINE V fma(V a, V b, V c) { return a * b + c; }
INLINE V max(V a, V b) { return a > b ? a : b; }
INLINE V min(V a, V b) { return a < b ? a : b; }
INLINE VM less(V a, V b) { return a < b; }
INLINE V select(VM m, V yes, V no) { return m ? yes : no; }
INLINE V abs(V a) { return V(VI(a) & 0x7fffffff); }
INLINE V flip(V a, V sign_bits) { return V(VI(a) ^ VI(sign_bits)); }
INLINE VI max_int(VI a, VI b) { return a > b ? a : b; }
// Integers wrap, as they do in the other tables: NaN and infinity become codes whose sums may overflow.
INLINE VI add_int(VI a, VI b) { return VI(U32(a) + U32(b)); }
INLINE VI shift_left_4(VI a) { return VI(U32(a) << 4); }
INLINE VI bits(V a) { return VI(a); }
INLINE V from_bits(VI a) { return V(a); }
INLINE V to_float(VI a) { return __builtin_convertvector(a, V); }
// Nearest even for |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits.
INLINE VI to_int(V x) { return VI(U32(x + 12582912.f) - 0x4b400000u); }
INLINE V power_of_two(VI exponent) { return V(U32(exponent + 127) << 23); }

INLINE float reduce_add(V v) {
  const float a = v[0] + v[4], b = v[1] + v[5], c = v[2] + v[6], d = v[3] + v[7];
  return (a + c) + (b + d);
}
INLINE int32_t reduce_add_int(VI v) {
  uint32_t sum = 0;
  for (int i = 0; i < kG; i++) sum += uint32_t(v[i]);
  return int32_t(sum);
}
INLINE float reduce_max(V v) {
  float top = v[0];
  for (int i = 1; i < kG; i++) top = v[i] < top ? top : v[i];
  return top;
}
INLINE int32_t reduce_max_int(VI v) {
  int32_t top = v[0];
  for (int i = 1; i < kG; i++) top = v[i] < top ? top : v[i];
  return top;
}

// Same arithmetic as half_to_float of half.h, on eight lanes.
INLINE V widen_half(H8 h) {
  const U32 h32 = __builtin_convertvector(h, U32), rest = h32 & 0x7fff;
  const U32 finite = U32(V(rest << 13) * 0x1p112f);
  const U32 special = rest << 13 | 0x7f800000 | U32(U32(rest > 0x7c00) & 0x400000);
  return V((h32 & 0x8000) << 16 | (rest >= 0x7c00 ? special : finite));
}
INLINE V load_f16(const void *p) {
  H8 h;
  memcpy(&h, p, sizeof h);
  return widen_half(h);
}
INLINE V load_f16_n(const void *p, int n) {
  H8 h = {};
  memcpy(&h, p, 2 * size_t(n));
  return widen_half(h);
}
INLINE V load_bf16(const void *p) {
  H8 h;
  memcpy(&h, p, sizeof h);
  return V(__builtin_convertvector(h, U32) << 16);
}
INLINE void store_f16_n(void *p, V v, int n) {
  uint16_t h[kG];
  for (int i = 0; i < kG; i++) h[i] = float_to_half(v[i]);
  memcpy(p, h, 2 * size_t(n));
}
INLINE void store_f16(void *p, V v) { store_f16_n(p, v, kG); }
INLINE V load_i8(const void *p) {
  int8_t b[kG];
  memcpy(b, p, sizeof b);
  V v;
  for (int i = 0; i < kG; i++) v[i] = float(b[i]);
  return v;
}
INLINE void store_bytes(int8_t *p, VI v) {
  for (int i = 0; i < kG; i++) p[i] = int8_t(v[i]);
}

// x1 x0 x3 x2 ...
INLINE V swap_pairs(V v) { return V{v[1], v[0], v[3], v[2], v[5], v[4], v[7], v[6]}; }
// p0 p0 p1 p1 ... from kG / 2 floats
INLINE V load_twice(const float *p) { return V{p[0], p[0], p[1], p[1], p[2], p[2], p[3], p[3]}; }

// ---------------------------------------------------------------- integer dot products
//
// A vector of codes is used as 16 lanes of 16 bits, two per row. Shifts by 0, 4, 8 and 12 select the
// low and high nibbles of the even and odd bytes; 16 products of at most 15 * 127 fit 16 bits.

// Bytes `odd`, `odd` + 2 of a chunk of 4 activations, repeated over all rows.
INLINE I16 chunk_pair(const int8_t *q, int odd) {
  const uint32_t pair = uint32_t(uint16_t(q[odd])) | uint32_t(uint16_t(q[odd + 2])) << 16;
  return I16(U32{pair, pair, pair, pair, pair, pair, pair, pair});
}
INLINE VI add_halves(I16 v) { return (VI(v) << 16 >> 16) + (VI(v) >> 16); }

template <int T, int CHUNK> INLINE void nibble_dots(const uint8_t *codes, const int8_t *q, int64_t, VI *out) {
  I16 sum[T] = {};
  UNROLL for (int v = 0; v < 4; v++) {
    U16 w;
    memcpy(&w, codes + 32 * v, sizeof w);
    const I16 part[4] = {I16(w & 15), I16(w >> 8 & 15), I16(w >> 4 & 15), I16(w >> 12)};
    UNROLL for (int t = 0; t < T; t++) {
      const int8_t *first = q + v * CHUNK + 4 * t, *second = first + 4 * CHUNK;
      sum[t] += part[0] * chunk_pair(first, 0) + part[1] * chunk_pair(first, 1);
      sum[t] += part[2] * chunk_pair(second, 0) + part[3] * chunk_pair(second, 1);
    }
  }
  UNROLL for (int t = 0; t < T; t++) out[t] = add_halves(sum[t]);
}

// Sixteen bytes of each of 8 rows, at rows[r] + at, as 4 vectors: vector v byte 4r + t = byte 4v + t of row r.
INLINE void transpose_codes(const uint8_t *const *rows, size_t at, uint8_t *out) {
  for (int v = 0; v < 4; v++) {
    for (int r = 0; r < kG; r++) memcpy(out + 4 * (v * kG + r), rows[r] + at + 4 * v, 4);
  }
}

// Two products of at most 128 * 127 fit 16 bits, so each vector is widened at once.
template <int T, int CHUNK>
INLINE void byte_dots(const uint8_t *codes, const int8_t *q, const float *, int64_t, VI *out) {
  UNROLL for (int t = 0; t < T; t++) out[t] = VI{};
  UNROLL for (int v = 0; v < 8; v++) {
    I16 w;
    memcpy(&w, codes + 32 * v, sizeof w);
    const I16 even = I16(U16(w) << 8) >> 8, odd = w >> 8;
    UNROLL for (int t = 0; t < T; t++) {
      const int8_t *chunk = q + v * CHUNK + 4 * t;
      out[t] += add_halves(even * chunk_pair(chunk, 0) + odd * chunk_pair(chunk, 1));
    }
  }
}

constexpr size_t kPrefetchDistance = 1536;
constexpr int kMaxTileTokens = 4; // tokens per integer tile
constexpr int kFloatGroups = 2, kFloatTokens = 3;
constexpr int kScoreRows = 2, kScorePages = 1; // attention register blocks
constexpr int kValueRows = 2, kValueVectors = 2;
