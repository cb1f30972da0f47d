// Quantisation, norms, activations, rotary embedding, reductions: everything that is linear in the
// length of a vector. All lengths may be odd; partial vectors go through the same operations.

// ---------------------------------------------------------------- quantisation

// One block of 32: scale = max|x| / 127, q = nearest even of x * (127 / max|x|).
// The maximum is taken on the bits of |x|, where a NaN is the largest, so that it reaches the scale and
// with it every output. Below 1e-35 the inverse would overflow: such a block becomes zero.
struct QuantBlock {
  VFI codes[2];
  float scale, sum;
};

INLINE QuantBlock quantize_block(const float *x, float factor) {
  const VF x0 = load16(x), x1 = load16(x + 16);
  const int32_t top = max_lanes_int(max_int(bits(abs(x0)), bits(abs(x1))));
  const float largest = bits_to_float(uint32_t(top));
  const bool normal = largest > 1e-35f;
  const VF inverse = splat(normal ? 127.f / largest : 0.f);
  QuantBlock block;
  block.codes[0] = to_int(mul(x0, inverse));
  block.codes[1] = to_int(mul(x1, inverse));
  block.scale = normal || largest != largest ? largest / 127.f : 0.f;
  block.sum = factor * block.scale * float(sum_lanes_int(add_int(block.codes[0], block.codes[1])));
  return block;
}

INLINE void store_codes(int8_t *q, const QuantBlock &block) {
  for (int half = 0; half < 2; half++) {
    for (int i = 0; i < kParts; i++) store_bytes(q + 16 * half + kG * i, block.codes[half].part[i]);
  }
}

static void quantize(const float *x, int64_t n, float factor, int8_t *q, float *scale, float *sum) {
  for (int64_t b = 0; b < n / 32; b++) {
    const QuantBlock block = quantize_block(x + 32 * b, factor);
    store_codes(q + 32 * b, block);
    scale[b] = block.scale;
    sum[b] = block.sum;
  }
}

static void quantize_tile(const float *x, int64_t n, float factor, int slot, int8_t *q, float *scale,
                          float *sum) {
  for (int64_t b = 0; b < n / 32; b++) {
    const QuantBlock block = quantize_block(x + 32 * b, factor);
    int8_t codes[32];
    store_codes(codes, block);
    int8_t *to = q + 128 * b + 4 * slot;
    for (int c = 0; c < 8; c++) memcpy(to + 16 * c, codes + 4 * c, 4);
    scale[4 * b + slot] = block.scale;
    sum[4 * b + slot] = block.sum;
  }
}

// ---------------------------------------------------------------- norms

static void rms_norm(const float *x, const float *w, float offset, float eps, int64_t n, float *y) {
  VF squares[2] = {splat(0), splat(0)};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const VF a = load16(x + i), b = load16(x + i + 16);
    squares[0] = fma(a, a, squares[0]);
    squares[1] = fma(b, b, squares[1]);
  }
  for (; i < n; i += 16) {
    const VF a = load_left(x + i, n - i);
    squares[0] = fma(a, a, squares[0]);
  }
  const float mean = sum_lanes(add(squares[0], squares[1])) / float(n);
  const VF factor = splat(1.f / square_root(mean + eps)), shift = splat(offset);
  for (i = 0; i < n; i += 16) {
    const VF weight = add(load_left(w + i, n - i), shift);
    store_left(y + i, mul(mul(load_left(x + i, n - i), factor), weight), n - i);
  }
}

static void layer_norm(const float *x, const float *w, const float *b, float eps, int64_t n, float *y) {
  VF total = splat(0), squares = splat(0);
  for (int64_t i = 0; i < n; i += 16) total = add(total, load_left(x + i, n - i));
  const VF mean = splat(sum_lanes(total) / float(n));
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const VF d = sub(load16(x + i), mean);
    squares = fma(d, d, squares);
  }
  if (i < n) { // lanes past the end must not count as 0 - mean
    alignas(64) float kept[16] = {};
    store16_n(kept, sub(load16_n(x + i, int(n - i)), mean), int(n - i));
    const VF d = load16(kept);
    squares = fma(d, d, squares);
  }
  const VF factor = splat(1.f / square_root(sum_lanes(squares) / float(n) + eps));
  for (i = 0; i < n; i += 16) {
    const VF normal = mul(sub(load_left(x + i, n - i), mean), factor);
    const VF shift = b ? load_left(b + i, n - i) : splat(0);
    store_left(y + i, fma(normal, load_left(w + i, n - i), shift), n - i);
  }
}

// ---------------------------------------------------------------- element by element

static void add(const float *a, const float *b, int64_t n, float *y) {
  for (int64_t i = 0; i < n; i += 16) {
    store_left(y + i, add(load_left(a + i, n - i), load_left(b + i, n - i)), n - i);
  }
}

static void scale(const float *x, float factor, int64_t n, float *y) {
  const VF f = splat(factor);
  for (int64_t i = 0; i < n; i += 16) store_left(y + i, mul(load_left(x + i, n - i), f), n - i);
}

INLINE VF softcap(VF x, VF cap) { return mul(cap, tanh(div(x, cap))); }

static void softcap(const float *x, float cap, int64_t n, float *y) {
  const VF c = splat(cap);
  for (int64_t i = 0; i < n; i += 16) store_left(y + i, softcap(load_left(x + i, n - i), c), n - i);
}

template <int ACT> INLINE VF activate(VF x) {
  switch (ACT) {
  case kSilu: return div(x, add(splat(1.f), exp(negative(x))));
  case kGelu: {
    const VF half = mul(x, splat(0.5f));
    return fma(half, erf(mul(x, splat(0.70710678f))), half);
  }
  case kGeluTanh: { // 0.5 x (1 + tanh u) = x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    const VF inner = fma(mul(x, x), splat(0.044715f), splat(1.f));
    return mul(x, sigmoid(mul(mul(x, splat(1.5957691f)), inner)));
  }
  case kRelu: return max(splat(0.f), x);
  default: return sigmoid(x);
  }
}

template <int ACT> static void activate_all(const float *x, int64_t n, float *y) {
  for (int64_t i = 0; i < n; i += 16) store_left(y + i, activate<ACT>(load_left(x + i, n - i)), n - i);
}
template <int ACT> static void glu_all(const float *gate, const float *up, int64_t n, float *y) {
  for (int64_t i = 0; i < n; i += 16) {
    const VF a = activate<ACT>(load_left(gate + i, n - i));
    store_left(y + i, mul(a, load_left(up + i, n - i)), n - i);
  }
}

#define FOR_ACT(call)                                                                                        \
  switch (act) {                                                                                             \
  case kSilu: call(kSilu); break;                                                                            \
  case kGelu: call(kGelu); break;                                                                            \
  case kGeluTanh: call(kGeluTanh); break;                                                                    \
  case kRelu: call(kRelu); break;                                                                            \
  default: call(kSigmoid);                                                                                   \
  }

static void activation(int act, const float *x, int64_t n, float *y) {
#define CALL(kind) activate_all<kind>(x, n, y)
  FOR_ACT(CALL)
#undef CALL
}
static void glu(int act, const float *gate, const float *up, int64_t n, float *y) {
#define CALL(kind) glu_all<kind>(gate, up, n, y)
  FOR_ACT(CALL)
#undef CALL
}
static void glu_groups(int act, const float *y, int64_t pairs, float *out) {
  for (int64_t i = 0; i < pairs; i++) {
    const float *gate = y + 2 * kG * i;
#define CALL(kind) glu_all<kind>(gate, gate + kG, kG, out + kG * i)
    FOR_ACT(CALL)
#undef CALL
  }
}
#undef FOR_ACT

// ---------------------------------------------------------------- rotary embedding

static void rope_interleaved(float *x, const float *cosine, const float *sine, int pairs) {
  alignas(64) static const float minus_plus[16] = {-0.f, 0.f, -0.f, 0.f, -0.f, 0.f, -0.f, 0.f,
                                                   -0.f, 0.f, -0.f, 0.f, -0.f, 0.f, -0.f, 0.f};
  const VF flips = load16(minus_plus);
  int i = 0;
  for (; i + 8 <= pairs; i += 8) {
    const VF v = load16(x + 2 * i);
    const VF turned = flip(mul(swap_pairs(v), load16_twice(sine + i)), flips);
    store16(x + 2 * i, fma(v, load16_twice(cosine + i), turned));
  }
  if (i < pairs) {
    alignas(64) float c[8] = {}, s[8] = {};
    memcpy(c, cosine + i, size_t(pairs - i) * 4);
    memcpy(s, sine + i, size_t(pairs - i) * 4);
    const int left = 2 * (pairs - i);
    const VF v = load16_n(x + 2 * i, left);
    const VF turned = flip(mul(swap_pairs(v), load16_twice(s)), flips);
    store16_n(x + 2 * i, fma(v, load16_twice(c), turned), left);
  }
}

// Pairs (2i, 2i + 1) if interleaved, else (i, i + rotary_dim / 2):
//   a' = a cos - b sin,  b' = b cos + a sin
static void rope(float *x, const float *cosine, const float *sine, int rotary_dim, int interleaved) {
  const int pairs = rotary_dim / 2;
  if (interleaved) {
    rope_interleaved(x, cosine, sine, pairs);
    return;
  }
  for (int i = 0; i < pairs; i += 16) {
    const int left = pairs - i;
    const VF c = load_left(cosine + i, left), s = load_left(sine + i, left);
    const VF a = load_left(x + i, left), b = load_left(x + pairs + i, left);
    store_left(x + i, fma(a, c, negative(mul(b, s))), left);
    store_left(x + pairs + i, fma(b, c, mul(a, s)), left);
  }
}

// ---------------------------------------------------------------- reductions

static int64_t argmax(const float *x, int64_t n) {
  const float lowest = -__builtin_inff();
  VF top = splat(lowest);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) top = max(load16(x + i), top); // a NaN in x keeps `top`
  float best = max_lanes(top);
  for (; i < n; i++) best = x[i] > best ? x[i] : best;
  for (i = 0; i < n; i++) {
    if (x[i] == best) return i;
  }
  return 0; // all NaN
}

static float exp_sum(const float *x, int64_t n, float max, float factor, float *y) {
  const VF top = splat(max), f = splat(factor);
  VF sum = splat(0);
  for (int64_t i = 0; i < n; i += 16) {
    VF e = exp(mul(sub(load_left(x + i, n - i), top), f));
    store_left(y + i, e, n - i);
    if (n - i < 16) {
      e = load16_n(y + i, int(n - i));
    }
    sum = add(sum, e);
  }
  return sum_lanes(sum);
}

static uint64_t read_bytes(const uint8_t *p, size_t n) {
  constexpr int kVectors = 4 * kParts; // 256 bytes per turn
  VI sums[kVectors];
  UNROLL for (int i = 0; i < kVectors; i++) sums[i] = bits(set1(0));
  size_t at = 0;
  for (; at + 256 <= n; at += 256) {
    const float *from = (const float *)(p + at);
    UNROLL for (int i = 0; i < kVectors; i++) sums[i] = add_int(sums[i], bits(load(from + kG * i)));
  }
  uint64_t total = 0;
  for (int i = 0; i < kVectors; i++) total += uint32_t(reduce_add_int(sums[i]));
  for (; at < n; at++) total += p[at];
  return total;
}
