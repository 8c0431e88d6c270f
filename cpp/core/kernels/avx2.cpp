// AVX2. Levels are looked up with vpshufb; vpmaddubsw needs an unsigned operand, so the table is biased by 64.
// Its int16 pair sums stay exact: levels + 64 are in 0..128, and 2 * 128 * 128 = 32768 is reached only as a negative.
#include <immintrin.h>
#include <string.h>

#include "kernel.h"

#include "assign.inl"
#include "calibrate.inl"
#include "elementwise.inl"
#include "float_lines.inl"

namespace potqat {
namespace {

constexpr int kBias = 64;

__m256i broadcast4(const int8_t* q) {
  int32_t dword;
  memcpy(&dword, q, 4);
  return _mm256_set1_epi32(dword);
}

// sum += u8 * s8 in int32, four neighbours at a time.
__m256i dot_u8s8(__m256i sum, __m256i u8, __m256i s8) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u8, s8), _mm256_set1_epi16(1)));
}

template <int ROWS>
void dot4_rows(const Dot& d, const uint8_t* lines, __m256i table, int64_t row, int32_t* acc) {
  const __m256i low = _mm256_set1_epi8(15);
  const int8_t* q = d.q + row * d.q_stride;
  __m256i sum[ROWS][2];
  for (int r = 0; r < ROWS; ++r) {
    sum[r][0] = sum[r][1] = _mm256_set1_epi32(-kBias * d.q_sum[(row + r) * d.q_sum_stride]);
  }
  for (int64_t line = 0; line < d.line_count; ++line) {
    for (int half = 0; half < 2; ++half) {  // 8 outputs each
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines + line * 64 + half * 32));
      const __m256i first = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, low));
      const __m256i second = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
      for (int r = 0; r < ROWS; ++r) {
        const int8_t* input = q + r * d.q_stride + line * 8;
        sum[r][half] = dot_u8s8(sum[r][half], first, broadcast4(input));
        sum[r][half] = dot_u8s8(sum[r][half], second, broadcast4(input + 4));
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int half = 0; half < 2; ++half) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + (row + r) * kWidth + half * 8), sum[r][half]);
    }
  }
}

void dot4_column(const Dot& d, const uint8_t* lines, int32_t* acc) {
  const __m128i level = _mm_loadu_si128(reinterpret_cast<const __m128i*>(d.levels));
  const __m256i table = _mm256_broadcastsi128_si256(_mm_add_epi8(level, _mm_set1_epi8(kBias)));
  int64_t r = 0;
  for (; r + 4 <= d.m; r += 4) dot4_rows<4>(d, lines, table, r, acc);
  for (; r < d.m; ++r) dot4_rows<1>(d, lines, table, r, acc);
}

// Bytes to +-127 would saturate vpmaddubsw, so they are widened to int16 and multiplied exactly.
void dot8_column(const Dot& d, const uint8_t* lines, int32_t* acc) {
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
  for (int column = 0; column < d.columns; ++column) {
    const uint8_t* lines = d.lines + column * d.column_bytes;
    d.levels ? dot4_column(d, lines, d.acc + 16 * column) : dot8_column(d, lines, d.acc + 16 * column);
  }
  scale(d.acc, 0, d.m, output);
}

bool supported() { return __builtin_cpu_supports("avx2"); }

}  // namespace

const KernelTable kAvx2Table = {"avx2", supported, dot, dot_float, absmax, quantize, assign, ste, peak, read};

}  // namespace potqat
