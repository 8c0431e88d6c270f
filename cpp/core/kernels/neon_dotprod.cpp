// NEON with sdot: four inputs of four outputs, times four inputs of a row in a lane. The rest is in neon.inl.
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

constexpr int kLinesAStep = 1;
constexpr int kVectors = 4;

uint8x16_t bytes(const uint8_t* line, int v) { return vld1q_u8(line + 16 * v); }

// A line's inputs of one row: lane p belongs to part p.
template <int PARTS>
int8x8_t row_inputs(const int8_t* q) {
  if constexpr (PARTS == 2) return vld1_s8(q);
  int32_t dword;  // eight bytes may not be there
  memcpy(&dword, q, 4);
  return vreinterpret_s8_s32(vdup_n_s32(dword));
}

template <int ROWS, class Decoder, class Operands>
void block(const Operands& from, const Dot& d, int64_t row, int64_t line, int64_t count, int32_t* acc) {
  constexpr int kParts = Decoder::kParts;
  int32x4_t sum[ROWS][kVectors];
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = line == 0 ? vdupq_n_s32(0) : vld1q_s32(acc + (row + r) * kWidth + 4 * v);
    }
  }
  const int8_t* q = d.q + row * d.q_stride + line * kParts * 4;
  for (int64_t l = 0; l < count; ++l) {
    int8x8_t input[ROWS];
    UNROLL for (int r = 0; r < ROWS; ++r) input[r] = row_inputs<kParts>(q + r * d.q_stride + l * kParts * 4);
    UNROLL for (int v = 0; v < kVectors; ++v) {
      int8x16_t part[kParts];
      from.operands(l, v, part);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        sum[r][v] = vdotq_lane_s32(sum[r][v], part[0], input[r], 0);
        if constexpr (kParts == 2) sum[r][v] = vdotq_lane_s32(sum[r][v], part[1], input[r], 1);
      }
    }
  }
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int v = 0; v < kVectors; ++v) vst1q_s32(acc + (row + r) * kWidth + 4 * v, sum[r][v]);
  }
}

template <class Decoder, class Operands>
void all_rows(const Operands& from, const Dot& d, int64_t line, int64_t count, int32_t* acc) {
  int64_t r = 0;
  for (; r + 4 <= d.m; r += 4) block<4, Decoder>(from, d, r, line, count, acc);
  if (d.m - r == 3) block<3, Decoder>(from, d, r, line, count, acc);
  if (d.m - r == 2) block<2, Decoder>(from, d, r, line, count, acc);
  if (d.m - r == 1) block<1, Decoder>(from, d, r, line, count, acc);
}

}  // namespace
}  // namespace potqat

#include "neon.inl"

namespace potqat {
namespace {

void dot(const Dot& d, const Output& output) {
  d.levels ? dot_with(Nibbles(d.levels), d, output) : dot_with(Bytes(), d, output);
}

bool supported() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }

}  // namespace

const KernelTable kNeonDotTable = {"neondot", supported, dot,           dot_float, absmax, quantize,
                                   assign,    ste,       squared_error, peak,      read};

}  // namespace potqat
