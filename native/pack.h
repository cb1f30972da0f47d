// From rows as they lie in a model file to the packed layouts of kernels.h. A pure permutation of
// the file's bits, in portable C++: it runs once per load, at memory speed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hayai {

// Bytes of one row of `cols` inputs as it lies in a file: blocks of 18 (q4_0), 20 (q4_1) or 34 (q8_0)
// bytes, or plain f16, bf16, f32 elements.
size_t file_row_bytes(int layout, int64_t cols);

// Write num_rows rows (row i at rows + i * row_bytes) as rows first_row .. first_row + num_rows - 1
// of a packed matrix whose group g lies at out + g * group_stride. The last group touched is
// zero-filled behind the last row, so matrices are concatenated by ascending calls. Two matrices are
// interleaved group by group (gate, up) with group_stride = 2 * group_bytes and the second one's
// `out` moved by group_bytes. Disjoint ranges of whole groups may be packed by several threads.
void pack_rows(int layout, int group_rows, const uint8_t *rows, size_t row_bytes, int64_t num_rows,
               int64_t cols, int64_t first_row, uint8_t *out, size_t group_stride);

// ---------------------------------------------------------------- the screened head

constexpr int kOutliers = 32;

// Split Q8_0 rows into the high and the low plane of HeadPlanes. Rows padded up to a whole group are zero.
void split_head_rows(int group_rows, const uint8_t *rows, size_t row_bytes, int64_t num_rows, int64_t cols,
                     uint8_t *high, uint8_t *low);

// The outlier plane and the error norms of rows [first_row, end_row), first_row a multiple of group_rows, from
// the low plane, with this algebra. Let plane = d * (16 * high - 120.5), so that a weight is plane + e with
// |e| <= 7.5 d. S is a set of 32 inputs whose activations tend to be large; there e is approximated by
// c = s * (code - 7.5) with one scale s per row: the outlier plane. With a' the activations of S requantised
// to bytes,
//   logit = <plane, a> + <c, a'> + [ <e_rest, a_rest> + <e_S - c, a_S> + <c, a_S - a'> ]
// and by Cauchy-Schwarz the bracket is at most
//   rest_error * ||a_rest|| + outlier_error * ||a_S|| + max ||c|| * ||a_S - a'||.
// A row whose bound is below some exact logit cannot be the argmax: a proof, not a tolerance, for any S.
// The norms are taken in double and enlarged by 1e-4, which covers the fp32 rounding of the bound.
// Returns the largest ||c|| of these rows, enlarged likewise.
float pack_outlier_plane(int group_rows, const uint8_t *low, int64_t first_row, int64_t end_row, int64_t cols,
                         const int32_t outlier_inputs[kOutliers], uint8_t *outlier, float *rest_error,
                         float *outlier_error);

} // namespace hayai
