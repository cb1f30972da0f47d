// Vectors of 16 floats on top of an instruction set's own width, and the functions of mathematics.
//
// simd_<isa>.inc.h defines V (kG floats: one lane per row of a weight group), VI (kG int32), VM (a
// mask), the primitives below, and the integer dot products. VF is 16 lanes in every table, so
// reductions have the same order for 8 and 16 lanes per register: avx2 and avx512 agree bit for bit.
// max(a, b) and min(a, b) return b if either is a NaN.

constexpr int kParts = 16 / kG;

struct VF {
  V part[kParts];
};
struct VFI {
  VI part[kParts];
};

#define LIFT_1(result, name, type)                                                                           \
  INLINE result name(type a) {                                                                               \
    result r;                                                                                                \
    for (int i = 0; i < kParts; i++) r.part[i] = name(a.part[i]);                                            \
    return r;                                                                                                \
  }
#define LIFT_2(result, name, type)                                                                           \
  INLINE result name(type a, type b) {                                                                       \
    result r;                                                                                                \
    for (int i = 0; i < kParts; i++) r.part[i] = name(a.part[i], b.part[i]);                                 \
    return r;                                                                                                \
  }
LIFT_1(VF, abs, VF)
LIFT_1(VF, swap_pairs, VF)
LIFT_1(VFI, bits, VF)
LIFT_1(VFI, to_int, VF)
LIFT_1(VF, to_float, VFI)
LIFT_1(VF, power_of_two, VFI)
LIFT_2(VF, add, VF)
LIFT_2(VF, sub, VF)
LIFT_2(VF, mul, VF)
LIFT_2(VF, div, VF)
LIFT_2(VF, max, VF)
LIFT_2(VF, min, VF)
LIFT_2(VF, flip, VF)
LIFT_2(VFI, max_int, VFI)
LIFT_2(VFI, add_int, VFI)
#undef LIFT_1
#undef LIFT_2

INLINE VF fma(VF a, VF b, VF c) {
  VF r;
  for (int i = 0; i < kParts; i++) r.part[i] = fma(a.part[i], b.part[i], c.part[i]);
  return r;
}
// a < b ? yes : no
INLINE VF select_less(VF a, VF b, VF yes, VF no) {
  VF r;
  for (int i = 0; i < kParts; i++) {
    r.part[i] = select(less(a.part[i], b.part[i]), yes.part[i], no.part[i]);
  }
  return r;
}
INLINE VF splat(float x) {
  VF r;
  for (int i = 0; i < kParts; i++) r.part[i] = set1(x);
  return r;
}
INLINE VF load16(const float *p) {
  VF r;
  for (int i = 0; i < kParts; i++) r.part[i] = load(p + kG * i);
  return r;
}
INLINE void store16(float *p, VF v) {
  for (int i = 0; i < kParts; i++) store(p + kG * i, v.part[i]);
}
INLINE VF load16_f16(const uint16_t *p) {
  VF r;
  for (int i = 0; i < kParts; i++) r.part[i] = load_f16(p + kG * i);
  return r;
}
INLINE void store16_f16(uint16_t *p, VF v) {
  for (int i = 0; i < kParts; i++) store_f16(p + kG * i, v.part[i]);
}
INLINE VF load16_twice(const float *p) { // p0 p0 p1 p1 ... p7 p7
  VF r;
  for (int i = 0; i < kParts; i++) r.part[i] = load_twice(p + kG / 2 * i);
  return r;
}

// Lanes of part i among the first n of 16.
INLINE int part_lanes(int n, int i) {
  const int left = n - kG * i;
  return left < 0 ? 0 : left < kG ? left : kG;
}
// The first n of 16 lanes; lanes not read are 0.
INLINE VF load16_n(const float *p, int n) {
  VF r;
  for (int i = 0; i < kParts; i++) r.part[i] = load_n(p + kG * i, part_lanes(n, i));
  return r;
}
INLINE void store16_n(float *p, VF v, int n) {
  for (int i = 0; i < kParts; i++) store_n(p + kG * i, v.part[i], part_lanes(n, i));
}
INLINE VF load16_f16_n(const uint16_t *p, int n) {
  VF r;
  for (int i = 0; i < kParts; i++) r.part[i] = load_f16_n(p + kG * i, part_lanes(n, i));
  return r;
}
INLINE VF load16_i8(const int8_t *p) {
  VF r;
  for (int i = 0; i < kParts; i++) r.part[i] = load_i8(p + kG * i);
  return r;
}
INLINE VF load16_i8_n(const int8_t *p, int n) {
  int8_t bytes[16] = {};
  memcpy(bytes, p, size_t(n));
  return load16_i8(bytes);
}
INLINE void store16_f16_n(uint16_t *p, VF v, int n) {
  for (int i = 0; i < kParts; i++) store_f16_n(p + kG * i, v.part[i], part_lanes(n, i));
}
// All 16 lanes while `left` allows, else a partial vector.
INLINE VF load_left(const float *p, int64_t left) { return left >= 16 ? load16(p) : load16_n(p, int(left)); }
INLINE void store_left(float *p, VF v, int64_t left) {
  if (left >= 16) {
    store16(p, v);
  } else {
    store16_n(p, v, int(left));
  }
}

INLINE float sum_lanes(VF v) {
  V sum = v.part[0];
  for (int i = 1; i < kParts; i++) sum = add(sum, v.part[i]);
  return reduce_add(sum);
}
INLINE float max_lanes(VF v) {
  V top = v.part[0];
  for (int i = 1; i < kParts; i++) top = max(top, v.part[i]);
  return reduce_max(top);
}
INLINE int32_t sum_lanes_int(VFI v) {
  VI sum = v.part[0];
  for (int i = 1; i < kParts; i++) sum = add_int(sum, v.part[i]);
  return reduce_add_int(sum);
}
INLINE int32_t max_lanes_int(VFI v) {
  VI top = v.part[0];
  for (int i = 1; i < kParts; i++) top = max_int(top, v.part[i]);
  return reduce_max_int(top);
}

// ---------------------------------------------------------------- functions

// exp(x) = 2^r * e^f, r = round(x / ln 2), |f| <= ln(2) / 2, e^f by the polynomial of Cephes expf.
// Relative error below 2e-7. Exactly 1 at 0, exactly 0 below -87, constant above 88. NaN stays NaN.
INLINE VF exp(VF x) {
  const VF low = splat(-87.f), clamped = min(splat(88.f), max(low, x));
  const VF r = to_float(to_int(mul(clamped, splat(1.44269504f))));
  VF f = fma(r, splat(-0.693359375f), clamped);
  f = fma(r, splat(2.12194440e-4f), f);
  VF p = splat(1.9875691500e-4f);
  p = fma(p, f, splat(1.3981999507e-3f));
  p = fma(p, f, splat(8.3334519073e-3f));
  p = fma(p, f, splat(4.1665795894e-2f));
  p = fma(p, f, splat(1.6666665459e-1f));
  p = fma(p, f, splat(5.0000001201e-1f));
  p = add(fma(p, mul(f, f), f), splat(1.f));
  const VF e = mul(p, power_of_two(to_int(r)));
  return select_less(x, low, splat(0.f), e);
}

INLINE VF negative(VF x) { return flip(x, splat(-0.f)); }

// 1 / (1 + exp(-x)); absolute error below 2e-7.
INLINE VF sigmoid(VF x) { return div(splat(1.f), add(splat(1.f), exp(negative(x)))); }

// Near 0 by the odd polynomial of Cephes tanhf, elsewhere from exp, with the sign put back.
// Relative error below 4e-7.
INLINE VF tanh(VF x) {
  const VF a = abs(x), squared = mul(x, x);
  VF p = splat(-5.70498872745e-3f);
  p = fma(p, squared, splat(2.06390887954e-2f));
  p = fma(p, squared, splat(-5.37397155531e-2f));
  p = fma(p, squared, splat(1.33314422036e-1f));
  p = fma(p, squared, splat(-3.33332819422e-1f));
  const VF near = fma(mul(p, squared), x, x);
  const VF large = sub(splat(1.f), div(splat(2.f), add(exp(add(a, a)), splat(1.f))));
  const VF far = select_less(x, splat(0.f), negative(large), large);
  return select_less(a, splat(0.625f), near, far);
}

// erf by Abramowitz and Stegun 7.1.26: absolute error below 2e-7 (the coefficients' own 1.5e-7).
INLINE VF erf(VF x) {
  const VF a = abs(x);
  const VF t = div(splat(1.f), fma(a, splat(0.3275911f), splat(1.f)));
  VF p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const VF tail = mul(mul(p, t), exp(negative(mul(a, a))));
  const VF positive = sub(splat(1.f), tail);
  return select_less(x, splat(0.f), negative(positive), positive);
}

INLINE float square_root(float x) { return __builtin_sqrtf(x); }
INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }
