// fp16 and fp32 in portable integer code, bit for bit what the conversion instructions do (round to
// nearest even, overflow to infinity, quiet NaN). `static inline`: this header is compiled with
// several instruction sets and must leave no shared symbol behind.
#pragma once

#include <cstdint>
#include <cstring>

namespace hayai {

static inline float bits_to_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) { // infinity, or a NaN made quiet
    return bits_to_float(sign | 0x7f800000 | rest << 13 | (rest > 0x7c00 ? 0x400000 : 0));
  }
  // The exponent fields differ by 112; as a multiplication it is exact for subnormals too.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

static inline uint16_t float_to_half(float f) {
  const uint32_t bits = float_to_bits(f), rest = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (rest > 0x7f800000) {
    return uint16_t(sign | 0x7e00 | (rest >> 13 & 0x3ff));
  }
  if (rest >= 0x477ff000) { // 65520 and more round to infinity
    return uint16_t(sign | 0x7c00);
  }
  if (rest < 0x38800000) { // below 2^-14: the unit of 0.5 is the subnormal step 2^-24
    return uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
}

} // namespace hayai
