// Float activations on AVX-512: the sums of float_lines.inl, in registers. A line becomes one vector of float levels an
// input; four rows or one, and four columns of tiles or one, are under way at once, each sum in ascending order.

#ifndef UNROLL
#define UNROLL _Pragma("GCC unroll 8")
#endif

namespace potqat {
namespace {

struct FloatNibbles {
  static constexpr int kInputs = 8;
  __m512 table;
  explicit FloatNibbles(const int8_t levels[16]) {
    const __m128i level = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
    table = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(level));
  }
  // Of each index vpermps reads four bits: the nibble.
  __m512 decode(__m512i line, int j) const {
    const int shift = j < 4 ? 8 * j : 8 * (j - 4) + 4;
    return _mm512_permutexvar_ps(_mm512_srli_epi32(line, shift), table);
  }
};

struct FloatBytes {
  static constexpr int kInputs = 4;
  __m512 decode(__m512i line, int j) const {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(line, 24 - 8 * j), 24));
  }
};

template <int ROWS, int COLUMNS, class Decoder>
void float_rows(const Decoder& decoder, const DotFloat& d, const uint8_t* lines, int64_t row, float* acc) {
  constexpr int kInputs = Decoder::kInputs;
  __m512 sum[ROWS][COLUMNS];
  UNROLL for (int r = 0; r < ROWS; ++r) { UNROLL for (int c = 0; c < COLUMNS; ++c) sum[r][c] = _mm512_setzero_ps(); }
  for (int64_t line = 0; line < d.line_count; ++line) {
    __m512i bytes[COLUMNS];
    UNROLL for (int c = 0; c < COLUMNS; ++c) bytes[c] = _mm512_loadu_si512(lines + c * d.column_bytes + line * 64);
    UNROLL for (int j = 0; j < kInputs; ++j) {
      UNROLL for (int c = 0; c < COLUMNS; ++c) {
        const __m512 level = decoder.decode(bytes[c], j);
        UNROLL for (int r = 0; r < ROWS; ++r) {
          const __m512 input = _mm512_set1_ps(d.x[(row + r) * d.x_stride + line * kInputs + j]);
          sum[r][c] = _mm512_add_ps(sum[r][c], _mm512_mul_ps(input, level));
        }
      }
    }
  }
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int c = 0; c < COLUMNS; ++c) _mm512_storeu_ps(acc + (row + r) * kWidth + 16 * c, sum[r][c]);
  }
}

template <int COLUMNS, class Decoder>
void float_columns(const Decoder& decoder, const DotFloat& d, const uint8_t* lines, float* acc) {
  int64_t r = 0;
  for (; r + 4 <= d.m; r += 4) float_rows<4, COLUMNS>(decoder, d, lines, r, acc);
  for (; r < d.m; ++r) float_rows<1, COLUMNS>(decoder, d, lines, r, acc);
}

template <class Decoder>
void dot_float_with(const Decoder& decoder, const DotFloat& d) {
  if (d.columns == kMaxColumns) return float_columns<kMaxColumns>(decoder, d, d.lines, d.acc);
  for (int c = 0; c < d.columns; ++c) float_columns<1>(decoder, d, d.lines + c * d.column_bytes, d.acc + 16 * c);
}

void dot_float(const DotFloat& d) {
  d.levels ? dot_float_with(FloatNibbles(d.levels), d) : dot_float_with(FloatBytes(), d);
}

}  // namespace
}  // namespace potqat
