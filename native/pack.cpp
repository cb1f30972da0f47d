#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "half.h"
#include "kernels.h"

namespace hayai {
namespace {

// How a file block maps to a packed block: `scales` fp16 values, then `words` groups of 4 code bytes.
struct BlockShape {
  int scales, words;
};

BlockShape block_shape(int layout) {
  switch (layout) {
  case kQ4_0: return {1, 4};
  case kQ4_1: return {2, 4};
  default: return {1, 8};
  }
}

size_t element_bytes(int layout) { return layout == kF32 ? 4 : 2; }

// One row's share of every block of its group: word v of the file's codes becomes word r of vector v.
// A null `from` writes zeros.
void pack_block_row(BlockShape shape, int group_rows, const uint8_t *from, int64_t blocks, int r,
                    uint8_t *group) {
  static const uint8_t zeros[64] = {};
  const size_t file_step = from ? size_t(2 * shape.scales + 4 * shape.words) : 0;
  const size_t step = size_t(group_rows) * size_t(2 * shape.scales + 4 * shape.words);
  const uint8_t *source = from ? from : zeros;
  for (int64_t b = 0; b < blocks; b++, source += file_step, group += step) {
    for (int s = 0; s < shape.scales; s++) {
      memcpy(group + 2 * (s * group_rows + r), source + 2 * s, 2);
    }
    uint8_t *codes = group + 2 * shape.scales * group_rows + 4 * r;
    for (int v = 0; v < shape.words; v++) {
      memcpy(codes + 4 * v * group_rows, source + 2 * shape.scales + 4 * v, 4);
    }
  }
}

template <class Element>
void pack_float_row(int group_rows, const uint8_t *from, int64_t cols, int r, uint8_t *group) {
  for (int64_t k = 0; k < cols; k++) {
    Element value = 0;
    if (from) {
      memcpy(&value, from + k * int64_t(sizeof(Element)), sizeof(Element));
    }
    memcpy(group + (k * group_rows + r) * int64_t(sizeof(Element)), &value, sizeof(Element));
  }
}

void pack_row(int layout, int group_rows, const uint8_t *from, int64_t cols, int r, uint8_t *group) {
  if (!layout_is_float(layout)) {
    pack_block_row(block_shape(layout), group_rows, from, cols / kBlockInputs, r, group);
  } else if (element_bytes(layout) == 4) {
    pack_float_row<uint32_t>(group_rows, from, cols, r, group);
  } else {
    pack_float_row<uint16_t>(group_rows, from, cols, r, group);
  }
}

} // namespace

size_t file_row_bytes(int layout, int64_t cols) {
  if (layout_is_float(layout)) {
    return size_t(cols) * element_bytes(layout);
  }
  const BlockShape shape = block_shape(layout);
  return size_t(cols / kBlockInputs) * size_t(2 * shape.scales + 4 * shape.words);
}

void pack_rows(int layout, int group_rows, const uint8_t *rows, size_t row_bytes, int64_t num_rows,
               int64_t cols, int64_t first_row, uint8_t *out, size_t group_stride) {
  const int64_t end = first_row + num_rows, padded = (end + group_rows - 1) / group_rows * group_rows;
  for (int64_t row = first_row; row < padded; row++) {
    const uint8_t *from = row < end ? rows + size_t(row - first_row) * row_bytes : nullptr;
    pack_row(layout, group_rows, from, cols, int(row % group_rows),
             out + size_t(row / group_rows) * group_stride);
  }
}

// ---------------------------------------------------------------- the screened head

namespace {

constexpr double kErrorSafety = 1.0001;

// A row of the low plane: what the high plane leaves over of each weight.
struct LowPlaneRow {
  const uint8_t *scales, *codes;
  LowPlaneRow(const uint8_t *at, int64_t blocks) : scales(at), codes(at + (blocks + 1) / 2 * 4) {}
  float scale(int64_t block) const {
    uint16_t bits;
    memcpy(&bits, scales + 2 * block, 2);
    return half_to_float(bits);
  }
  float error(int64_t input) const {
    const uint8_t pair = codes[input / 32 * 16 + input % 16];
    return scale(input / 32) * (float(input % 32 < 16 ? pair & 15 : pair >> 4) - 7.5f);
  }
};

// Four bytes at a time: byte j of `first` and of `second` (16 inputs later) make one code byte.
uint32_t join_nibbles(const uint8_t *first, const uint8_t *second, int shift, uint32_t flip) {
  uint32_t a, b;
  memcpy(&a, first, 4);
  memcpy(&b, second, 4);
  a = (a >> shift & 0x0f0f0f0f) ^ flip;
  b = (b >> shift & 0x0f0f0f0f) ^ flip;
  return a | b << 4;
}

// Codes of one row in all blocks. The signed upper half plus 8 is the upper nibble with its top bit
// flipped.
void split_row(int group_rows, const uint8_t *file, int64_t blocks, int r, uint8_t *high, uint8_t *low) {
  uint8_t *low_codes = low + (blocks + 1) / 2 * 4;
  for (int64_t b = 0; b < blocks; b++) {
    uint8_t *high_block = high + b * group_rows * 18;
    memcpy(high_block + 2 * r, file + b * 34, 2);
    memcpy(low + 2 * b, file + b * 34, 2);
    const uint8_t *q = file + b * 34 + 2;
    for (int v = 0; v < 4; v++) {
      const uint32_t upper = join_nibbles(q + 4 * v, q + 16 + 4 * v, 4, 0x08080808);
      const uint32_t lower = join_nibbles(q + 4 * v, q + 16 + 4 * v, 0, 0);
      memcpy(high_block + 2 * group_rows + 4 * (v * group_rows + r), &upper, 4);
      memcpy(low_codes + 16 * b + 4 * v, &lower, 4);
    }
  }
}

struct OutlierCode {
  uint16_t scale = 0;
  uint8_t codes[kOutliers] = {};
  double left_over = 0, code_norm = 0; // ||e_S - c||, ||c||
};

OutlierCode code_outliers(const LowPlaneRow &row, const int32_t *inputs) {
  OutlierCode result;
  float error[kOutliers], largest = 0;
  for (int k = 0; k < kOutliers; k++) {
    error[k] = row.error(inputs[k]);
    largest = std::max(largest, std::fabs(error[k]));
  }
  result.scale = float_to_half(largest / 7.5f);
  const float scale = half_to_float(result.scale);
  double left_over = 0, norm = 0;
  for (int k = 0; k < kOutliers; k++) {
    const float code = scale > 0 ? std::nearbyint(error[k] / scale + 7.5f) : 7.f;
    result.codes[k] = uint8_t(std::min(15.f, std::max(0.f, code)));
    const double value = double(scale) * (result.codes[k] - 7.5), lost = error[k] - value;
    left_over += lost * lost;
    norm += value * value;
  }
  result.left_over = std::sqrt(left_over);
  result.code_norm = std::sqrt(norm);
  return result;
}

void store_outliers(int group_rows, const OutlierCode &code, int r, uint8_t *block) {
  memcpy(block + 2 * r, &code.scale, 2);
  for (int k = 0; k < 16; k++) {
    block[2 * group_rows + 4 * (k / 4 * group_rows + r) + k % 4] =
        uint8_t(code.codes[k] | code.codes[16 + k] << 4);
  }
}

// ||e|| over the inputs outside S. The squares 4 * (low - 7.5)^2 are small odd integers squared, so
// the sum over a block is exact in integers. `keep` has one byte per input, 0 inside S.
double rest_norm(const LowPlaneRow &row, int64_t blocks, const uint8_t *keep) {
  double sum = 0;
  for (int64_t b = 0; b < blocks; b++, keep += 32) {
    const uint8_t *codes = row.codes + 16 * b;
    int squares = 0;
    for (int k = 0; k < 16; k++) {
      const int first = 2 * (codes[k] & 15) - 15, second = 2 * (codes[k] >> 4) - 15;
      squares += keep[k] * first * first + keep[16 + k] * second * second;
    }
    const double d = row.scale(b);
    sum += d * d * squares;
  }
  return std::sqrt(sum / 4);
}

} // namespace

void split_head_rows(int group_rows, const uint8_t *rows, size_t row_bytes, int64_t num_rows, int64_t cols,
                     uint8_t *high, uint8_t *low) {
  const int64_t blocks = cols / kBlockInputs;
  const size_t high_bytes = group_bytes(kQ4_0, group_rows, cols), low_bytes = head_low_row_bytes(cols);
  memset(high + size_t((num_rows - 1) / group_rows) * high_bytes, 0, high_bytes);
  for (int64_t i = 0; i < num_rows; i++) {
    uint8_t *low_row = low + size_t(i) * low_bytes;
    memset(low_row, 0, low_bytes);
    split_row(group_rows, rows + size_t(i) * row_bytes, blocks, int(i % group_rows),
              high + size_t(i / group_rows) * high_bytes, low_row);
  }
}

float pack_outlier_plane(int group_rows, const uint8_t *low, int64_t first_row, int64_t end_row, int64_t cols,
                         const int32_t outlier_inputs[kOutliers], uint8_t *outlier, float *rest_error,
                         float *outlier_error) {
  const int64_t blocks = cols / kBlockInputs;
  const size_t bytes = group_bytes(kQ4_0, group_rows, kBlockInputs), low_bytes = head_low_row_bytes(cols);
  std::vector<uint8_t> keep(size_t(cols), 1);
  for (int k = 0; k < kOutliers; k++) keep[size_t(outlier_inputs[k])] = 0;
  double largest = 0;
  for (int64_t i = first_row; i < end_row; i++) {
    uint8_t *group = outlier + size_t(i / group_rows) * bytes;
    if (i % group_rows == 0) memset(group, 0, bytes);
    const LowPlaneRow row(low + size_t(i) * low_bytes, blocks);
    const OutlierCode code = code_outliers(row, outlier_inputs);
    store_outliers(group_rows, code, int(i % group_rows), group);
    rest_error[i] = float(rest_norm(row, blocks, keep.data()) * kErrorSafety);
    outlier_error[i] = float(code.left_over * kErrorSafety);
    largest = std::max(largest, code.code_norm);
  }
  return float(largest * kErrorSafety);
}

} // namespace hayai
