// AVX2: vpmaddubsw, vpmaddwd and vpaddd are a dot product. The levels' int16 pair sums stay exact: levels + 64 are in
// 0..128, and 2 * 128 * 128 = 32768 is reached only as a negative. The kernels of 4-bit codes are in avx2.inl.
#include <immintrin.h>
#include <string.h>

#include "kernel.h"

#include "assign.inl"
#include "calibrate.inl"
#include "elementwise.inl"
#include "float_lines.inl"
#include "avx2.inl"

namespace potqat {
namespace {

// Bytes to +-127 would saturate vpmaddubsw, so they are widened to int16 and multiplied exactly.
void bytes_column(const Dot& d, const uint8_t* lines, int32_t* acc) {
  for (int64_t r = 0; r < d.m; ++r) {
    __m256i sum[4] = {};  // 4 outputs each, two partial sums an output
    for (int64_t line = 0; line < d.line_count; ++line) {
      const __m256i input = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(broadcast4(d.q + r * d.q_stride + line * 4)));
      for (int part = 0; part < 4; ++part) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lines + line * 64 + part * 16));
        sum[part] = _mm256_add_epi32(sum[part], _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), input));
      }
    }
    for (int part = 0; part < 4; ++part) {
      alignas(32) int32_t pair[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(pair), sum[part]);
      for (int c = 0; c < 4; ++c) acc[r * kWidth + part * 4 + c] = pair[2 * c] + pair[2 * c + 1];
    }
  }
}

void dot(const Dot& d, const Output& output) {
  if (!d.levels) {
    return each_group(d, output, 4, [](const Dot& group) {
      for (int c = 0; c < group.columns; ++c) {
        bytes_column(group, group.lines + c * group.column_bytes, group.acc + 16 * c);
      }
    });
  }
  int top = 0;
  for (int i = 0; i < 16; ++i) top = d.levels[i] > top ? d.levels[i] : top;
  // A part adds two products to each int16.
  const auto fits = [&](int chain) { return 2 * chain * top * d.largest_q <= 32767; };
  const Nibbles nibbles(d.levels);
  if (fits(8)) return dot_with<8>(nibbles, d, output);
  if (fits(2)) return dot_with<2>(nibbles, d, output);
  dot_with<0>(nibbles, d, output);
}

bool supported() { return __builtin_cpu_supports("avx2"); }

}  // namespace

const KernelTable kAvx2Table = {"avx2", supported, dot,           dot_float, absmax, quantize,
                                assign, ste,       squared_error, peak,      read,   kFewRowsTwice};

}  // namespace potqat
