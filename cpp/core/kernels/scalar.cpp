// The truth: shifts and adds, one weight at a time. Always built; every other table equals it bit for bit.
#include <string.h>

#include "kernel.h"

#include "assign.inl"
#include "calibrate.inl"
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

// One output: its four bytes of each line.
int32_t dot_output(const Dot& d, const uint8_t* bytes, const int8_t* q) {
  int32_t sum = 0;
  for (int64_t line = 0; line < d.line_count; ++line) {
    for (int i = 0; i < 4; ++i) {
      const uint8_t byte = bytes[line * 64 + i];
      if (d.levels) {
        sum += shift_add(q[line * 8 + i], d.levels[byte & 15]) + shift_add(q[line * 8 + 4 + i], d.levels[byte >> 4]);
      } else {
        sum += shift_add(q[line * 4 + i], static_cast<int8_t>(byte));
      }
    }
  }
  return sum;
}

void dot(const Dot& d, const Output& output) {
  for (int64_t r = 0; r < d.m; ++r) {
    for (int c = 0; c < 16 * d.columns; ++c) {
      d.acc[r * kWidth + c] = dot_output(d, d.lines + c / 16 * d.column_bytes + c % 16 * 4, d.q + r * d.q_stride);
    }
  }
  scale(d.acc, 0, d.m, output);
}

bool supported() { return true; }

}  // namespace

const KernelTable kScalarTable = {"scalar", supported, dot,           dot_float, absmax, quantize,
                                  assign,   ste,       squared_error, peak,      read};

}  // namespace potqat
