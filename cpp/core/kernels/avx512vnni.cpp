// AVX-512 VNNI. A line is one vector: vpshufb looks its 64 levels up, vpdpbusd multiplies four inputs of 16 outputs
// by one broadcast dword of activations. vpdpbusd wants its first operand unsigned, so the table is biased by 64
// (bytes by 128) and the bias times the sum of the activations is taken off; sums wrap modulo 2^32, so this is exact.
#include <immintrin.h>
#include <string.h>

#include "kernel.h"

#include "elementwise.inl"
#include "float_lines.inl"

namespace potqat {
namespace {

constexpr int kBlockRows = 8;  // 2 accumulators a row: 16 of the 32 registers

__m512i broadcast4(const int8_t* q) {
  int32_t dword;
  memcpy(&dword, q, 4);
  return _mm512_set1_epi32(dword);
}

// Decoders turn a line into unsigned operands: kParts vectors of four inputs each.
struct Nibbles {
  static constexpr int kParts = 2, kBias = 64;
  __m512i table, low = _mm512_set1_epi8(15);
  explicit Nibbles(const int8_t levels[16]) {
    const __m128i level = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
    table = _mm512_broadcast_i32x4(_mm_add_epi8(level, _mm_set1_epi8(kBias)));
  }
  void decode(__m512i bytes, __m512i part[kParts]) const {
    part[0] = _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, low));
    part[1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low));
  }
};

struct Bytes {
  static constexpr int kParts = 1, kBias = 128;
  void decode(__m512i bytes, __m512i part[kParts]) const {
    part[0] = _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(128)));
  }
};

template <int ROWS, class Decoder>
void dot_rows(const Decoder& decoder, const uint8_t* lines, int64_t line_count, const int8_t* q, int64_t q_stride,
              const int32_t* q_sum, int64_t q_sum_stride, int32_t* acc) {
  constexpr int kParts = Decoder::kParts;
  __m512i sum[ROWS][kParts], part[kParts];
  for (int r = 0; r < ROWS; ++r) {
    for (int p = 0; p < kParts; ++p) sum[r][p] = _mm512_setzero_si512();
  }
  for (int64_t line = 0; line < line_count; ++line) {
    decoder.decode(_mm512_loadu_si512(lines + line * 64), part);
    for (int r = 0; r < ROWS; ++r) {
      const int8_t* input = q + r * q_stride + line * 4 * kParts;
      for (int p = 0; p < kParts; ++p) sum[r][p] = _mm512_dpbusd_epi32(sum[r][p], part[p], broadcast4(input + 4 * p));
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    __m512i total = sum[r][0];
    for (int p = 1; p < kParts; ++p) total = _mm512_add_epi32(total, sum[r][p]);
    const uint32_t bias = static_cast<uint32_t>(Decoder::kBias) * static_cast<uint32_t>(q_sum[r * q_sum_stride]);
    total = _mm512_sub_epi32(total, _mm512_set1_epi32(static_cast<int32_t>(bias)));
    _mm512_storeu_si512(acc + r * 16, total);
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

template <class Decoder>
void dot(const Decoder& decoder, const uint8_t* lines, int64_t line_count, const int8_t* q, int64_t q_stride,
         const int32_t* q_sum, int64_t q_sum_stride, int64_t m, int32_t* acc) {
  int64_t r = 0;
  const auto rows = [&](auto count) {
    for (; r + count.value <= m; r += count.value) {
      dot_rows<count.value>(decoder, lines, line_count, q + r * q_stride, q_stride, q_sum + r * q_sum_stride,
                            q_sum_stride, acc + r * 16);
    }
  };
  rows(Count<kBlockRows>{});
  rows(Count<4>{});
  rows(Count<2>{});
  rows(Count<1>{});
}

void dot4(const uint8_t* lines, int64_t line_count, const int8_t levels[16], const int8_t* q, int64_t q_stride,
          const int32_t* q_sum, int64_t q_sum_stride, int64_t m, int32_t* acc) {
  dot(Nibbles(levels), lines, line_count, q, q_stride, q_sum, q_sum_stride, m, acc);
}

void dot8(const uint8_t* lines, int64_t line_count, const int8_t* q, int64_t q_stride, const int32_t* q_sum,
          int64_t q_sum_stride, int64_t m, int32_t* acc) {
  dot(Bytes(), lines, line_count, q, q_stride, q_sum, q_sum_stride, m, acc);
}

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const KernelTable kAvx512VnniTable = {"avx512vnni", supported,  dot4,     dot8,
                                      dot4_float,   dot8_float, quantize, add_scaled};

}  // namespace potqat
