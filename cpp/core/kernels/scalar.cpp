// The truth: shifts and adds, one weight at a time. Always built; every other table equals it bit for bit.
#include "kernel.h"

#include "elementwise.inl"
#include "float_lines.inl"

namespace potqat {
namespace {

// q * level without a multiplication: a shifted copy of q for each bit of the level. One bit for a power of two, at
// most two for e2m1.
int32_t shift_add(int32_t q, int level) {
  const int magnitude = level < 0 ? -level : level;
  int32_t sum = 0;
  for (int bit = 0; magnitude >> bit; ++bit) {
    if (magnitude >> bit & 1) sum += q << bit;
  }
  return level < 0 ? -sum : sum;
}

void dot4(const uint8_t* lines, int64_t line_count, const int8_t levels[16], const int8_t* q, int64_t q_stride,
          const int32_t*, int64_t, int64_t m, int32_t* acc) {
  for (int64_t r = 0; r < m; ++r) {
    for (int c = 0; c < 16; ++c) {
      int32_t sum = 0;
      for (int64_t line = 0; line < line_count; ++line) {
        const int8_t* input = q + r * q_stride + line * 8;
        for (int i = 0; i < 4; ++i) {
          const uint8_t byte = lines[line * 64 + 4 * c + i];
          sum += shift_add(input[i], levels[byte & 15]) + shift_add(input[4 + i], levels[byte >> 4]);
        }
      }
      acc[r * 16 + c] = sum;
    }
  }
}

void dot8(const uint8_t* lines, int64_t line_count, const int8_t* q, int64_t q_stride, const int32_t*, int64_t,
          int64_t m, int32_t* acc) {
  for (int64_t r = 0; r < m; ++r) {
    for (int c = 0; c < 16; ++c) {
      int32_t sum = 0;
      for (int64_t line = 0; line < line_count; ++line) {
        const int8_t* input = q + r * q_stride + line * 4;
        for (int i = 0; i < 4; ++i) sum += shift_add(input[i], static_cast<int8_t>(lines[line * 64 + 4 * c + i]));
      }
      acc[r * 16 + c] = sum;
    }
  }
}

bool supported() { return true; }

}  // namespace

const KernelTable kScalarTable = {"scalar", supported, dot4, dot8, dot4_float, dot8_float, quantize, add_scaled};

}  // namespace potqat
