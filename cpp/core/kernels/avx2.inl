// The 256-bit kernels, written once over the dot-product instruction (`dot_step` in calibrate.inl, included before): by
// the units with and without VNNI.
//
// A line is two vectors: four inputs of 8 outputs a part. The dot product wants its first operand unsigned, so levels
// are biased, and the bias times the sum of the activations is taken off; sums wrap modulo 2^32, so this is exact.
//
// One row: four columns of tiles are read at a time. More than four rows: a panel of lines is looked up once, kept in
// the first-level cache, and used for all rows.

// Loops over registers must be gone before GCC decides what lives in memory.
#define UNROLL _Pragma("GCC unroll 8")

namespace potqat {
namespace {

constexpr int kFewRows = 4;      // 4 x 2 sums, 4 operands and a broadcast: 16 registers are not more
constexpr int kPanelLines = 64;  // 8 KiB of looked-up operands

__m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

__m256i broadcast4(const int8_t* q) {
  int32_t dword;
  memcpy(&dword, q, 4);
  return _mm256_set1_epi32(dword);
}

// Decoders turn half a line into unsigned operands: kParts vectors of four inputs each.
struct Nibbles {
  static constexpr int kParts = 2, kBias = 64;
  __m256i table, low = _mm256_set1_epi8(15);
  explicit Nibbles(const int8_t levels[16]) {
    const __m128i level = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
    table = _mm256_broadcastsi128_si256(_mm_add_epi8(level, _mm_set1_epi8(kBias)));
  }
  void decode(__m256i bytes, __m256i part[kParts]) const {
    part[0] = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, low));
    part[1] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
  }
};

// Where operands come from: lines that are looked up when used, or a panel of lines that were.
template <class Decoder>
struct Lines {
  const Decoder& decoder;
  const uint8_t* lines;
  int64_t column_bytes;
  void operands(int64_t line, int column, int half, __m256i part[Decoder::kParts]) const {
    decoder.decode(load(lines + column * column_bytes + line * 64 + half * 32), part);
  }
};

template <class Decoder>
struct Panel {
  __m256i (*panel)[2][Decoder::kParts];
  void operands(int64_t line, int, int half, __m256i part[Decoder::kParts]) const {
    UNROLL for (int p = 0; p < Decoder::kParts; ++p) part[p] = panel[line][half][p];
  }
};

// ROWS rows times COLUMNS columns over `count` lines from `line` on: acc = or += .
template <int ROWS, int COLUMNS, class Decoder, class Operands>
void block(const Operands& from, const Dot& d, int64_t row, int64_t line, int64_t count, int32_t* acc) {
  constexpr int kParts = Decoder::kParts;
  __m256i sum[ROWS][COLUMNS][2];
  UNROLL for (int r = 0; r < ROWS; ++r) {
    const uint32_t bias = Decoder::kBias * static_cast<uint32_t>(d.q_sum[(row + r) * d.q_sum_stride]);
    UNROLL for (int c = 0; c < COLUMNS; ++c) {
      UNROLL for (int half = 0; half < 2; ++half) {
        const int32_t* at = acc + (row + r) * kWidth + 16 * c + 8 * half;
        sum[r][c][half] = line == 0 ? _mm256_set1_epi32(static_cast<int32_t>(0 - bias)) : load(at);
      }
    }
  }
  const int8_t* q = d.q + row * d.q_stride + line * kParts * 4;
  for (int64_t l = 0; l < count; ++l) {
    UNROLL for (int c = 0; c < COLUMNS; ++c) {
      __m256i part[2][kParts];
      UNROLL for (int half = 0; half < 2; ++half) from.operands(l, c, half, part[half]);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        UNROLL for (int p = 0; p < kParts; ++p) {
          const __m256i input = broadcast4(q + r * d.q_stride + (l * kParts + p) * 4);
          UNROLL for (int half = 0; half < 2; ++half) {
            sum[r][c][half] = dot_step(sum[r][c][half], part[half][p], input);
          }
        }
      }
    }
  }
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int c = 0; c < COLUMNS; ++c) {
      UNROLL for (int half = 0; half < 2; ++half) {
        int32_t* at = acc + (row + r) * kWidth + 16 * c + 8 * half;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), sum[r][c][half]);
      }
    }
  }
}

template <class Decoder, class Operands>
void all_rows(const Operands& from, const Dot& d, int64_t line, int64_t count, int32_t* acc) {
  int64_t r = 0;
  for (; r + 4 <= d.m; r += 4) block<4, 1, Decoder>(from, d, r, line, count, acc);
  if (d.m - r == 3) block<3, 1, Decoder>(from, d, r, line, count, acc);
  if (d.m - r == 2) block<2, 1, Decoder>(from, d, r, line, count, acc);
  if (d.m - r == 1) block<1, 1, Decoder>(from, d, r, line, count, acc);
}

template <class Decoder>
void many_rows(const Decoder& decoder, const Dot& d, const uint8_t* lines, int32_t* acc) {
  __m256i panel[kPanelLines][2][Decoder::kParts];
  for (int64_t line = 0; line == 0 || line < d.line_count; line += kPanelLines) {
    const int64_t count = d.line_count - line < kPanelLines ? d.line_count - line : kPanelLines;
    const Lines<Decoder> from = {decoder, lines + line * 64, 0};
    for (int64_t l = 0; l < count; ++l) {
      for (int half = 0; half < 2; ++half) from.operands(l, 0, half, panel[l][half]);
    }
    all_rows<Decoder>(Panel<Decoder>{panel}, d, line, count, acc);
  }
}

template <class Decoder>
void dot_columns(const Decoder& decoder, const Dot& d) {
  if (d.m == 1 && d.columns == kMaxColumns) {
    return block<1, kMaxColumns, Decoder>(Lines<Decoder>{decoder, d.lines, d.column_bytes}, d, 0, 0, d.line_count,
                                          d.acc);
  }
  for (int c = 0; c < d.columns; ++c) {
    const Lines<Decoder> from = {decoder, d.lines + c * d.column_bytes, d.column_bytes};
    if (d.m <= kFewRows) {
      all_rows<Decoder>(from, d, 0, d.line_count, d.acc + 16 * c);
    } else {
      many_rows(decoder, d, from.lines, d.acc + 16 * c);
    }
  }
}

template <class Decoder>
void dot_with(const Decoder& decoder, const Dot& d, const Output& output) {
  dot_columns(decoder, d);
  scale(d.acc, 0, d.m, output);
}

}  // namespace
}  // namespace potqat
