// The 256-bit kernels, written once over the dot product: by the units with and without VNNI.
//
// A line is two vectors: four inputs of 8 outputs a part. Instructions want their first operand unsigned, so levels are
// biased, and the bias times the activations is taken off.
//
// With VNNI (CHAIN = 0) one instruction adds four products to an int32 sum; the bias times the sum of the activations
// is taken off modulo 2^32, so this is exact. Without, vpmaddubsw gives sums of two products in int16 and vpmaddwd
// widens them, and some processors have one multiplier for both. So the sums of CHAIN parts are added before they are
// widened. Biased they would not fit: each chain starts with its bias taken off. What is added is then the products
// alone, modulo 2^16, which is exact where CHAIN parts of them fit (see `dot` in avx2.cpp).
//
// Few rows: the weights are read once (of 4 to 6 rows twice), looked up and used, group by group. More rows: a panel of
// lines is looked up once, kept in the first-level cache, and used for all rows.

// Loops over registers must be gone before GCC decides what lives in memory.
#define UNROLL _Pragma("GCC unroll 8")
#define ALWAYS_INLINE __attribute__((always_inline)) inline

namespace potqat {
namespace {

constexpr int kFewRows = 3;       // x 2 sums; more, and GCC 12 keeps half of them in memory
constexpr int kFewRowsTwice = 6;  // looking levels up twice is less work than a panel's way through memory
constexpr int kPanelRows = 4;     // 4 x 2 sums, 4 operands and a broadcast: 16 registers are not more
constexpr int kPanelLines = 64;   // 8 KiB of looked-up operands
constexpr int kStepLines = 4;     // what a chain's lines divide; groups are whole steps, but for the last
constexpr int kLinesAhead = 4;    // prefetched into the first-level cache while few rows are multiplied

__m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

__m256i broadcast4(const void* dword) {
  int32_t value;
  memcpy(&value, dword, 4);
  return _mm256_set1_epi32(value);
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
    const uint8_t* bytes = lines + column * column_bytes + line * 64;
    if (half == 0) {  // streams of a few KB are too short for the hardware: what follows here, and the next columns
      _mm_prefetch(bytes + kLinesAhead * 64, _MM_HINT_T0);
      _mm_prefetch(bytes + kMaxColumns * column_bytes, _MM_HINT_T1);
    }
    decoder.decode(load(bytes + half * 32), part);
  }
};

template <class Decoder>
struct Panel {
  const __m256i (*panel)[2][Decoder::kParts];
  void operands(int64_t line, int, int half, __m256i part[Decoder::kParts]) const {
    UNROLL for (int p = 0; p < Decoder::kParts; ++p) part[p] = panel[line][half][p];
  }
};

// int16 pairs to int32 sums. The ones stay in memory: as an intrinsic, GCC 12 gives them a register that the sums need.
alignas(32) const int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
__m256i widen(__m256i pairs) {
  __m256i sum;
  asm("vpmaddwd %2, %1, %0" : "=x"(sum) : "x"(pairs), "m"(kOnes));
  return sum;
}

// Lines that are read: whole steps of a chain. Those beyond the run are a tile's padding, levels 0.
template <int CHAIN>
int64_t whole_steps(int64_t lines) {
  return CHAIN ? (lines + kStepLines - 1) / kStepLines * kStepLines : lines;
}

// The biases of the chains in a step's 8 parts, each at its first part, as vpmaddubsw gives them.
template <int CHAIN>
__m256i chain_bias(int bias, const int8_t* q) {
  __m256i sum = _mm256_maddubs_epi16(_mm256_set1_epi8(static_cast<char>(bias)), load(q));
  if (CHAIN > 1) sum = _mm256_add_epi16(sum, _mm256_shuffle_epi32(sum, 0xb1));
  if (CHAIN > 2) sum = _mm256_add_epi16(sum, _mm256_shuffle_epi32(sum, 0x4e));
  if (CHAIN > 4) sum = _mm256_add_epi16(sum, _mm256_permute2x128_si256(sum, sum, 1));
  return sum;
}

// sum += ROWS rows of q times `count` lines of COLUMNS columns.
template <int CHAIN, int ROWS, int COLUMNS, class Decoder, class Operands>
ALWAYS_INLINE void multiply(const Operands& from, const int8_t* q, int64_t q_stride, int64_t count,
                            __m256i (&sum)[ROWS][COLUMNS][2]) {
  constexpr int kParts = Decoder::kParts;
  constexpr int kLines = CHAIN > kParts ? CHAIN / kParts : 1;
  for (int64_t step = 0; step < count; step += kStepLines) {
    alignas(32) int32_t bias[ROWS][kStepLines * kParts];
    if constexpr (CHAIN > 0) {
      UNROLL for (int r = 0; r < ROWS; ++r) {
        const __m256i all = chain_bias<CHAIN>(Decoder::kBias, q + r * q_stride + step * kParts * 4);
        _mm256_store_si256(reinterpret_cast<__m256i*>(bias[r]), all);
      }
    }
    for (int l = 0; l < kStepLines && step + l < count; l += kLines) {
      const int64_t line = step + l;
      __m256i chain[ROWS][COLUMNS][2];
      UNROLL for (int part = 0; part < kLines * kParts; part += kParts) {
        UNROLL for (int c = 0; c < COLUMNS; ++c) {
          __m256i operand[2][kParts];
          UNROLL for (int half = 0; half < 2; ++half) from.operands(line + part / kParts, c, half, operand[half]);
          UNROLL for (int r = 0; r < ROWS; ++r) {
            UNROLL for (int p = 0; p < kParts; ++p) {
              const __m256i input = broadcast4(q + r * q_stride + (line * kParts + part + p) * 4);
              UNROLL for (int half = 0; half < 2; ++half) {
                __m256i& all = sum[r][c][half];
                if constexpr (CHAIN == 0) {
                  all = dot_step(all, operand[half][p], input);
                } else {
                  __m256i& pairs = chain[r][c][half];
                  const __m256i products = _mm256_maddubs_epi16(operand[half][p], input);
                  pairs = part + p == 0 ? _mm256_sub_epi16(products, broadcast4(&bias[r][l * kParts]))
                                        : _mm256_add_epi16(pairs, products);
                  if (part + p + 1 == CHAIN) all = _mm256_add_epi32(all, widen(pairs));
                }
              }
            }
          }
        }
      }
    }
  }
}

// What the sums of a row start with.
template <int CHAIN, class Decoder>
__m256i start(const Dot& d, int64_t row) {
  const uint32_t q_sum = static_cast<uint32_t>(d.q_sum[row * d.q_sum_stride]);
  return _mm256_set1_epi32(CHAIN ? 0 : static_cast<int32_t>(0 - Decoder::kBias * q_sum));
}

// To acc, from the sums' first row and column on.
template <int ROWS, int COLUMNS>
ALWAYS_INLINE void store(const __m256i (&sum)[ROWS][COLUMNS][2], int32_t* acc) {
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int c = 0; c < COLUMNS; ++c) {
      UNROLL for (int half = 0; half < 2; ++half) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * kWidth + 16 * c + 8 * half), sum[r][c][half]);
      }
    }
  }
}

// ROWS rows times a panel of `count` lines, the run's from `line` on: acc = or += .
template <int CHAIN, int ROWS, class Decoder>
void panel_rows(const Panel<Decoder>& panel, const Dot& d, int64_t row, int64_t line, int64_t count, int32_t* acc) {
  acc += row * kWidth;
  __m256i sum[ROWS][1][2];
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int half = 0; half < 2; ++half) {
      sum[r][0][half] = line == 0 ? start<CHAIN, Decoder>(d, row + r) : load(acc + r * kWidth + 8 * half);
    }
  }
  const int8_t* q = d.q + row * d.q_stride + line * Decoder::kParts * 4;
  multiply<CHAIN, ROWS, 1, Decoder>(panel, q, d.q_stride, count, sum);
  store(sum, acc);
}

template <int CHAIN, class Decoder>
void many_rows(const Decoder& decoder, const Dot& d, const uint8_t* lines, int32_t* acc) {
  __m256i panel[kPanelLines][2][Decoder::kParts];
  const Panel<Decoder> from = {panel};
  const int64_t all = whole_steps<CHAIN>(d.line_count);
  for (int64_t line = 0; line == 0 || line < all; line += kPanelLines) {
    const int64_t count = all - line < kPanelLines ? all - line : kPanelLines;
    for (int64_t l = 0; l < count; ++l) {
      for (int half = 0; half < 2; ++half) decoder.decode(load(lines + (line + l) * 64 + half * 32), panel[l][half]);
    }
    // The lines of the next panel, or column, come from memory while this one is used.
    for (int64_t l = line + count; l < line + count + kPanelLines; ++l) {
      _mm_prefetch(reinterpret_cast<const char*>(lines + l * 64), _MM_HINT_T1);
    }
    int64_t r = 0;
    for (; r + kPanelRows <= d.m; r += kPanelRows) panel_rows<CHAIN, kPanelRows>(from, d, r, line, count, acc);
    if (d.m - r == 3) panel_rows<CHAIN, 3>(from, d, r, line, count, acc);
    if (d.m - r == 2) panel_rows<CHAIN, 2>(from, d, r, line, count, acc);
    if (d.m - r == 1) panel_rows<CHAIN, 1>(from, d, r, line, count, acc);
  }
}

// COLUMNS columns from `column` on: acc = .
template <int CHAIN, int ROWS, int COLUMNS, class Decoder>
void few_rows(const Decoder& decoder, const Dot& d, int column) {
  __m256i sum[ROWS][COLUMNS][2];
  UNROLL for (int r = 0; r < ROWS; ++r) {
    UNROLL for (int c = 0; c < COLUMNS; ++c) {
      UNROLL for (int half = 0; half < 2; ++half) sum[r][c][half] = start<CHAIN, Decoder>(d, r);
    }
  }
  const Lines<Decoder> from = {decoder, d.lines + column * d.column_bytes, d.column_bytes};
  multiply<CHAIN, ROWS, COLUMNS, Decoder>(from, d.q, d.q_stride, whole_steps<CHAIN>(d.line_count), sum);
  store(sum, d.acc + 16 * column);
}

template <int CHAIN, int ROWS, class Decoder>
void few_columns(const Decoder& decoder, const Dot& d) {
  if (ROWS == 1 && d.columns == kMaxColumns) return few_rows<CHAIN, 1, kMaxColumns>(decoder, d, 0);
  for (int c = 0; c < d.columns; ++c) few_rows<CHAIN, ROWS, 1>(decoder, d, c);
}

// Gives the groups one by one to `sums`, which fills acc, and adds each to y.
template <class Sums>
void each_group(Dot d, Output output, int line_inputs, const Sums& sums) {
  const int64_t groups = d.groups, all = d.line_count, lines = groups > 1 ? d.group_inputs / line_inputs : all;
  const float* const bias = output.bias;
  d.groups = 1;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t left = all - group * lines;
    d.line_count = left < lines ? left : lines;
    sums(d);
    output.bias = group + 1 == groups ? bias : nullptr;
    scale(d.acc, 0, d.m, output);
    output.first = false;
    output.s_w += output.s_w_stride;
    d.lines += lines * 64;
    d.q += lines * line_inputs;
    d.q_sum += 1;
  }
}

template <int CHAIN, class Decoder>
void dot_few(const Decoder& decoder, Dot d, Output output) {
  const int64_t all = d.m, pass = all > kFewRows ? (all + 1) / 2 : all;
  for (int64_t row = 0; row < all; row += pass) {
    d.m = all - row < pass ? all - row : pass;
    each_group(d, output, 4 * Decoder::kParts, [&](const Dot& group) {
      if (group.m == 1) few_columns<CHAIN, 1>(decoder, group);
      if (group.m == 2) few_columns<CHAIN, 2>(decoder, group);
      if (group.m == 3) few_columns<CHAIN, 3>(decoder, group);
    });
    d.q += pass * d.q_stride;
    d.q_sum += pass * d.q_sum_stride;
    output.s_x += pass;
    output.y += pass * output.y_stride;
  }
}

template <int CHAIN, class Decoder>
void dot_with(const Decoder& decoder, const Dot& d, const Output& output) {
  if (d.m <= kFewRowsTwice) return dot_few<CHAIN>(decoder, d, output);
  for (int c = 0; c < d.columns; ++c) many_rows<CHAIN>(decoder, d, d.lines + c * d.column_bytes, d.acc + 16 * c);
  scale(d.acc, 0, d.m, output);
}

}  // namespace
}  // namespace potqat
