// AVX2. Levels are looked up with vpshufb; vpmaddubsw needs an unsigned operand, so the table is biased by 64.
// Its int16 pair sums stay exact: levels + 64 are in 0..128, and 2 * 128 * 128 = 32768 is reached only as a negative.
#include <immintrin.h>
#include <string.h>

#include "kernel.h"

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
void dot4_rows(const uint8_t* lines, int64_t line_count, __m256i table, const int8_t* q, int64_t q_stride,
               const int32_t* q_sum, int64_t q_sum_stride, int32_t* acc) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i sum[ROWS][2];
  for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = _mm256_set1_epi32(-kBias * q_sum[r * q_sum_stride]);
  for (int64_t line = 0; line < line_count; ++line) {
    for (int half = 0; half < 2; ++half) {  // 8 outputs each
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines + line * 64 + half * 32));
      const __m256i first = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, low));
      const __m256i second = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
      for (int r = 0; r < ROWS; ++r) {
        const int8_t* input = q + r * q_stride + line * 8;
        sum[r][half] = dot_u8s8(sum[r][half], first, broadcast4(input));
        sum[r][half] = dot_u8s8(sum[r][half], second, broadcast4(input + 4));
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int half = 0; half < 2; ++half) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * 16 + half * 8), sum[r][half]);
    }
  }
}

void dot4(const uint8_t* lines, int64_t line_count, const int8_t levels[16], const int8_t* q, int64_t q_stride,
          const int32_t* q_sum, int64_t q_sum_stride, int64_t m, int32_t* acc) {
  const __m128i level = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
  const __m256i table = _mm256_broadcastsi128_si256(_mm_add_epi8(level, _mm_set1_epi8(kBias)));
  int64_t r = 0;
  for (; r + 4 <= m; r += 4) {
    dot4_rows<4>(lines, line_count, table, q + r * q_stride, q_stride, q_sum + r * q_sum_stride, q_sum_stride,
                 acc + r * 16);
  }
  for (; r < m; ++r) {
    dot4_rows<1>(lines, line_count, table, q + r * q_stride, q_stride, q_sum + r * q_sum_stride, q_sum_stride,
                 acc + r * 16);
  }
}

// Bytes to +-127 would saturate vpmaddubsw, so they are widened to int16 and multiplied exactly.
void dot8(const uint8_t* lines, int64_t line_count, const int8_t* q, int64_t q_stride, const int32_t*, int64_t,
          int64_t m, int32_t* acc) {
  for (int64_t r = 0; r < m; ++r) {
    __m256i sum[4] = {};  // 4 outputs each, two partial sums an output
    for (int64_t line = 0; line < line_count; ++line) {
      const __m256i input = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(broadcast4(q + r * q_stride + line * 4)));
      for (int part = 0; part < 4; ++part) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lines + line * 64 + part * 16));
        sum[part] = _mm256_add_epi32(sum[part], _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), input));
      }
    }
    for (int part = 0; part < 4; ++part) {
      alignas(32) int32_t pair[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(pair), sum[part]);
      for (int c = 0; c < 4; ++c) acc[r * 16 + part * 4 + c] = pair[2 * c] + pair[2 * c + 1];
    }
  }
}

bool supported() { return __builtin_cpu_supports("avx2"); }

}  // namespace

const KernelTable kAvx2Table = {"avx2", supported, dot4, dot8, dot4_float, dot8_float, quantize, add_scaled};

}  // namespace potqat
