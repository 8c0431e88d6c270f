// NEON with smmla for two rows and more, sdot for one. smmla multiplies eight inputs of two rows by eight of two
// outputs. Two lines zipped by dwords, before the lookup, give each output eight bytes: of 4-bit codes, inputs 0..3 and
// 8..11 in the low nibbles, 4..7 and 12..15 in the high ones; the rows' inputs are unzipped to the same order. The rest
// is in neon.inl.
#include <arm_neon.h>
#include <asm/hwcap.h>
#include <string.h>
#include <sys/auxv.h>

#include "kernel.h"

#include "assign.inl"
#include "calibrate.inl"
#include "elementwise.inl"
#include "float_lines.inl"

// Loops over registers must be gone before GCC decides what lives in memory.
#define UNROLL _Pragma("GCC unroll 8")

namespace potqat {
namespace {

constexpr int kLinesAStep = 2;
constexpr int kVectors = 8;  // of two outputs

uint8x16_t bytes(const uint8_t* lines, int v) {
  const uint32x4_t first = vreinterpretq_u32_u8(vld1q_u8(lines + v / 2 * 16));
  const uint32x4_t second = vreinterpretq_u32_u8(vld1q_u8(lines + 64 + v / 2 * 16));
  return vreinterpretq_u8_u32(v % 2 ? vzip2q_u32(first, second) : vzip1q_u32(first, second));
}

// A step's inputs of two rows, eight of each a part.
template <int PARTS>
void row_inputs(const int8_t* q, int64_t q_stride, int8x16_t input[PARTS]) {
  if constexpr (PARTS == 2) {
    const int32x4_t upper = vreinterpretq_s32_s8(vld1q_s8(q)), lower = vreinterpretq_s32_s8(vld1q_s8(q + q_stride));
    input[0] = vreinterpretq_s8_s32(vuzp1q_s32(upper, lower));
    input[1] = vreinterpretq_s8_s32(vuzp2q_s32(upper, lower));
  } else {
    input[0] = vcombine_s8(vld1_s8(q), vld1_s8(q + q_stride));
  }
}

// Swaps between sums of two rows and two outputs (smmla's) and sums of one row and four outputs (acc's).
void swap_halves(int32x4_t* a, int32x4_t* b) {
  const int64x2_t first = vreinterpretq_s64_s32(*a), second = vreinterpretq_s64_s32(*b);
  *a = vreinterpretq_s32_s64(vzip1q_s64(first, second));
  *b = vreinterpretq_s32_s64(vzip2q_s64(first, second));
}

template <int PAIRS, class Decoder, class Operands>
void block(const Operands& from, const Dot& d, int64_t row, int64_t step, int64_t count, int32_t* acc) {
  constexpr int kParts = Decoder::kParts;
  int32x4_t sum[PAIRS][kVectors];
  UNROLL for (int r = 0; r < PAIRS; ++r) {
    const int32_t* at = acc + (row + 2 * r) * kWidth;
    UNROLL for (int v = 0; v < kVectors; v += 2) {
      sum[r][v] = step == 0 ? vdupq_n_s32(0) : vld1q_s32(at + 2 * v);
      sum[r][v + 1] = step == 0 ? vdupq_n_s32(0) : vld1q_s32(at + kWidth + 2 * v);
      swap_halves(&sum[r][v], &sum[r][v + 1]);
    }
  }
  const int8_t* q = d.q + row * d.q_stride + step * kParts * 8;
  for (int64_t s = 0; s < count; ++s) {
    int8x16_t input[PAIRS][kParts];
    UNROLL for (int r = 0; r < PAIRS; ++r) {
      row_inputs<kParts>(q + 2 * r * d.q_stride + s * kParts * 8, d.q_stride, input[r]);
    }
    UNROLL for (int v = 0; v < kVectors; ++v) {
      int8x16_t part[kParts];
      from.operands(s, v, part);
      UNROLL for (int r = 0; r < PAIRS; ++r) {
        UNROLL for (int p = 0; p < kParts; ++p) sum[r][v] = vmmlaq_s32(sum[r][v], input[r][p], part[p]);
      }
    }
  }
  UNROLL for (int r = 0; r < PAIRS; ++r) {
    int32_t* at = acc + (row + 2 * r) * kWidth;
    UNROLL for (int v = 0; v < kVectors; v += 2) {
      swap_halves(&sum[r][v], &sum[r][v + 1]);
      vst1q_s32(at + 2 * v, sum[r][v]);
      vst1q_s32(at + kWidth + 2 * v, sum[r][v + 1]);
    }
  }
}

// An odd last row is multiplied with the padding row after it.
template <class Decoder, class Operands>
void all_rows(const Operands& from, const Dot& d, int64_t step, int64_t count, int32_t* acc) {
  for (int64_t r = 0; r < d.m; r += 4) {
    d.m - r > 2 ? block<2, Decoder>(from, d, r, step, count, acc) : block<1, Decoder>(from, d, r, step, count, acc);
  }
}

}  // namespace
}  // namespace potqat

#include "neon.inl"

namespace potqat {
namespace {

void dot(const Dot& d, const Output& output) {
  if (d.m == 1) return kNeonDotTable.dot(d, output);
  d.levels ? dot_with(Nibbles(d.levels), d, output) : dot_with(Bytes(), d, output);
}

bool supported() { return kNeonDotTable.supported() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM); }

}  // namespace

const KernelTable kNeonI8mmTable = {"neoni8mm", supported, dot,           dot_float, absmax, quantize,
                                    assign,     ste,       squared_error, peak,      read};

}  // namespace potqat
