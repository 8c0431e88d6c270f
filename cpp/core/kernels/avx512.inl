// The AVX-512 kernels, written once over how levels are looked up: included by the units with and without VBMI, which
// define `Nibbles` (see avx512vnni.cpp) before.
//
// A line is one vector: four inputs of 16 outputs a part. vpdpbusd multiplies it by one broadcast dword of activations.
// It wants its first operand unsigned, so levels are biased by 64 (bytes by 128) and the bias times the sum of the
// activations is taken off; sums wrap modulo 2^32, so this is exact.
//
// Few rows: the weights are read once (of 7 to 12 rows twice), looked up and used, four columns of tiles at a time so
// that enough sums are under way. More rows: a panel of lines is looked up once, kept in the first-level cache, and
// used for all rows.

namespace potqat {
namespace {

constexpr int kFewRows = kAvx512FewRows / 2;  // x 4 sums, 4 operands and a broadcast fill the 32 registers
constexpr int kPanelLines = 32;               // 16 KiB of looked-up operands
constexpr int kPanelParts = 2 * kPanelLines;
constexpr int kLinesAhead = 8;  // prefetched into the first-level cache while few rows are multiplied

__m512i broadcast4(const int8_t* q) {
  int32_t dword;
  memcpy(&dword, q, 4);
  return _mm512_set1_epi32(dword);
}

// Decoders turn a line into unsigned operands: kParts vectors of four inputs each.
struct Bytes {
  static constexpr int kParts = 1, kBias = 128;
  void decode(__m512i bytes, __m512i part[kParts]) const {
    part[0] = _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(128)));
  }
};

__m512i times(int32_t bias, int32_t q_sum) {
  return _mm512_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(bias) * static_cast<uint32_t>(q_sum)));
}

// Rows of y, from column of tiles `column` on: group by group, so that the sums never leave the registers.
template <int ROWS, int COLUMNS, class Decoder>
void few_rows(const Decoder& decoder, const Dot& d, const Output& o, int column) {
  constexpr int kParts = Decoder::kParts;
  // With few sums under way each part has its own, or they would wait for each other.
  constexpr int kChains = ROWS * COLUMNS < 8 ? kParts : 1;
  const int64_t ahead = COLUMNS * d.column_bytes;
  const int64_t group_lines = d.groups > 1 ? d.group_inputs / (4 * kParts) : d.line_count;
  const uint8_t* lines = d.lines + column * d.column_bytes;
  const int8_t* q = d.q;
  const float* s_w = o.s_w + 16 * column;
  int64_t left = d.line_count;
  for (int64_t group = 0; group < d.groups; ++group) {
    __m512i sum[kChains][ROWS][COLUMNS], part[kParts];
    for (auto& chain : sum) {
      for (auto& row : chain) {
        for (auto& s : row) s = _mm512_setzero_si512();
      }
    }
    const int64_t count = left < group_lines ? left : group_lines;
    for (int64_t line = 0; line < count; ++line) {
      UNROLL for (int c = 0; c < COLUMNS; ++c) {
        const uint8_t* bytes = lines + c * d.column_bytes + line * 64;
        // Streams of a few KB are too short for the hardware: what follows here, and the next columns.
        _mm_prefetch(bytes + kLinesAhead * 64, _MM_HINT_T0);
        _mm_prefetch(bytes + ahead, _MM_HINT_T1);
        decoder.decode(_mm512_loadu_si512(bytes), part);
        UNROLL for (int r = 0; r < ROWS; ++r) {
          UNROLL for (int p = 0; p < kParts; ++p) {
            const __m512i input = broadcast4(q + r * d.q_stride + (line * kParts + p) * 4);
            // As an intrinsic GCC 12 copies each sum for every line, and of more than 3 rows it has no registers left.
            asm("vpdpbusd %2, %1, %0" : "+v"(sum[p % kChains][r][c]) : "v"(part[p]), "v"(input));
          }
        }
      }
    }
    const bool first = o.first && group == 0, last = group + 1 == d.groups;
    UNROLL for (int r = 0; r < ROWS; ++r) {
      const __m512i bias = times(Decoder::kBias, d.q_sum[r * d.q_sum_stride + group]);
      const __m512 token = _mm512_set1_ps(o.s_x[r]);
      UNROLL for (int c = 0; c < COLUMNS; ++c) {
        const int at = 16 * (column + c);
        const __mmask16 used = first_lanes(o.width - at);
        __m512i all = _mm512_sub_epi32(sum[0][r][c], bias);
        for (int chain = 1; chain < kChains; ++chain) all = _mm512_add_epi32(all, sum[chain][r][c]);
        if (o.offset) all = _mm512_sub_epi32(all, _mm512_loadu_si512(o.offset + at));
        const __m512 scale = _mm512_mul_ps(token, _mm512_maskz_loadu_ps(used, s_w + 16 * c));
        float* const to = o.y + r * o.y_stride + at;
        __m512 y = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(used, to);
        y = _mm512_add_ps(y, _mm512_mul_ps(_mm512_cvtepi32_ps(all), scale));
        if (last && o.bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(used, o.bias + at));
        _mm512_mask_storeu_ps(to, used, y);
      }
    }
    // The scales of a group are far from those of the next one: those of the next columns.
    UNROLL for (int c = 0; c < COLUMNS; ++c) _mm_prefetch(s_w + 16 * (COLUMNS + c), _MM_HINT_T1);
    lines += count * 64;
    q += count * 4 * kParts;
    s_w += o.s_w_stride;
    left -= count;
  }
}

// ROWS rows times a panel [parts][COLUMNS]; `first`: acc holds nothing yet, `bias` is taken off after the last panel.
template <int ROWS, int COLUMNS>
void panel_rows(const __m512i* panel, int64_t parts, const Dot& d, int64_t row, const int8_t* q, bool first,
                int32_t bias, int32_t* acc) {
  __m512i sum[ROWS][COLUMNS];
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int c = 0; c < COLUMNS; ++c) {
      sum[r][c] = first ? _mm512_setzero_si512() : _mm512_loadu_si512(acc + (row + r) * kWidth + 16 * c);
    }
  }
  // Unrolled: where a core's other thread is busy, the loop's own instructions cost time.
  _Pragma("GCC unroll 4") for (int64_t p = 0; p < parts; ++p) {
    __m512i part[COLUMNS];
    UNROLL for (int c = 0; c < COLUMNS; ++c) part[c] = _mm512_load_si512(panel + p * COLUMNS + c);
    UNROLL for (int r = 0; r < ROWS; ++r) {
      const __m512i input = broadcast4(q + r * d.q_stride + 4 * p);
      UNROLL for (int c = 0; c < COLUMNS; ++c) sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], part[c], input);
    }
  }
  UNROLL for (int r = 0; r < ROWS; ++r) {
    const __m512i off = times(bias, d.q_sum[(row + r) * d.q_sum_stride]);
    UNROLL for (int c = 0; c < COLUMNS; ++c) {
      _mm512_storeu_si512(acc + (row + r) * kWidth + 16 * c, _mm512_sub_epi32(sum[r][c], off));
    }
  }
}

// f.template operator()<rows>(), 1 .. kFewRows.
template <class F>
void with_rows(int64_t rows, const F& f) {
  switch (rows) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    default:
      return f.template operator()<kFewRows>();
  }
}

// Calls done(row, rows) when the sums of these rows are complete.
template <int COLUMNS, class Decoder, class Done>
void many_rows(const Decoder& decoder, const Dot& d, const uint8_t* lines, int32_t* acc, const Done& done) {
  constexpr int kParts = Decoder::kParts;
  alignas(64) __m512i panel[kPanelParts * COLUMNS];
  const int64_t step = kPanelParts / kParts;
  for (int64_t line = 0; line == 0 || line < d.line_count; line += step) {
    const int64_t count = d.line_count - line < step ? d.line_count - line : step;
    for (int64_t l = 0; l < count; ++l) {
      UNROLL for (int c = 0; c < COLUMNS; ++c) {
        __m512i part[kParts];
        decoder.decode(_mm512_loadu_si512(lines + c * d.column_bytes + (line + l) * 64), part);
        UNROLL for (int p = 0; p < kParts; ++p) panel[(l * kParts + p) * COLUMNS + c] = part[p];
      }
    }
    const bool last = line + count >= d.line_count;
    // The lines of the next panel come from memory while this one is used, some with every pass.
    const uint8_t* next = lines + (last ? COLUMNS * d.column_bytes : (line + count) * 64);
    const int64_t asked = (step * kFewRows + d.m - 1) / d.m;
    for (int64_t r = 0; r < d.m; r += kFewRows) {
      for (int64_t l = r / kFewRows * asked; l < step && l < (r / kFewRows + 1) * asked; ++l) {
        UNROLL for (int c = 0; c < COLUMNS; ++c) _mm_prefetch(next + c * d.column_bytes + l * 64, _MM_HINT_T1);
      }
      const int64_t rows = d.m - r < kFewRows ? d.m - r : kFewRows;
      const int8_t* q = d.q + r * d.q_stride + line * kParts * 4;
      with_rows(rows, [&]<int ROWS>() {
        panel_rows<ROWS, COLUMNS>(panel, count * kParts, d, r, q, line == 0, last ? Decoder::kBias : 0, acc);
      });
      if (last) done(r, rows);
    }
  }
}

// In two passes beyond kFewRows: looking levels up twice is less work than a panel's way through memory.
template <class Decoder>
void dot_few(const Decoder& decoder, Dot d, Output output) {
  const int64_t all = d.m, pass = all > kFewRows ? (all + 1) / 2 : all;
  for (int64_t row = 0; row < all; row += pass) {
    d.m = all - row < pass ? all - row : pass;
    with_rows(d.m, [&]<int ROWS>() {
      if (d.columns == kMaxColumns) return few_rows<ROWS, kMaxColumns>(decoder, d, output, 0);
      for (int c = 0; c < d.columns; ++c) few_rows<ROWS, 1>(decoder, d, output, c);
    });
    d.q += d.m * d.q_stride;
    d.q_sum += d.m * d.q_sum_stride;
    output.s_x += d.m;
    output.y += d.m * output.y_stride;
  }
}

template <class Decoder>
void dot_many(const Decoder& decoder, const Dot& d, const Output& output) {
  const auto scaled = [&](int64_t row, int64_t rows) {
    with_scale<kMaxColumns>(output, 0, [&](const auto& scale) ALWAYS_INLINE {
      for (int64_t r = row; r < row + rows; ++r) scale.row(d.acc + r * kWidth, r);
    });
  };
  if (d.columns == kMaxColumns) return many_rows<kMaxColumns>(decoder, d, d.lines, d.acc, scaled);
  for (int c = 0; c < d.columns; ++c) {
    many_rows<1>(decoder, d, d.lines + c * d.column_bytes, d.acc + 16 * c, [](int64_t, int64_t) {});
  }
  scaled(0, d.m);
}

template <class Decoder>
void dot_with(const Decoder& decoder, const Dot& d, const Output& output) {
  d.m > kAvx512FewRows ? dot_many(decoder, d, output) : dot_few(decoder, d, output);
}

void dot(const Dot& d, const Output& output) {
  d.levels ? dot_with(Nibbles(d.levels), d, output) : dot_with(Bytes(), d, output);
  finish(output);
}

}  // namespace
}  // namespace potqat
