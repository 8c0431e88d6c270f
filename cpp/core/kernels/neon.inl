// The NEON kernels around the dot-product instruction: included by the units of sdot and of smmla, which define
//   kLinesAStep, kVectors  a step is so many lines, and has so many vectors of operands a part
//   bytes                  vector v of a step, not looked up yet
//   all_rows               the sums of all rows over a run of steps, acc = or +=
// Both multiply signed by signed, so there is no bias.
//
// Up to four rows: operands are looked up when used. More: a panel of steps is looked up once, kept in the first-level
// cache, and used for all rows.

namespace potqat {
namespace {

constexpr int kFewRows = 4;
constexpr int kPanelSteps = 128 / kLinesAStep;  // 16 KiB of looked-up operands

// Decoders turn a vector of a line's bytes into signed operands: kParts vectors of four inputs each.
struct Nibbles {
  static constexpr int kParts = 2;
  int8x16_t table;
  explicit Nibbles(const int8_t levels[16]) : table(vld1q_s8(levels)) {}
  void decode(uint8x16_t bytes, int8x16_t part[kParts]) const {
    part[0] = vqtbl1q_s8(table, vandq_u8(bytes, vdupq_n_u8(15)));
    part[1] = vqtbl1q_s8(table, vshrq_n_u8(bytes, 4));
  }
};

struct Bytes {
  static constexpr int kParts = 1;
  void decode(uint8x16_t bytes, int8x16_t part[kParts]) const { part[0] = vreinterpretq_s8_u8(bytes); }
};

// Where operands come from: lines that are looked up when used, or a panel of steps that were.
template <class Decoder>
struct Lines {
  const Decoder& decoder;
  const uint8_t* lines;
  void operands(int64_t step, int v, int8x16_t part[Decoder::kParts]) const {
    decoder.decode(bytes(lines + step * kLinesAStep * 64, v), part);
  }
};

template <class Decoder>
struct Panel {
  int8x16_t (*panel)[kVectors][Decoder::kParts];
  void operands(int64_t step, int v, int8x16_t part[Decoder::kParts]) const {
    for (int p = 0; p < Decoder::kParts; ++p) part[p] = panel[step][v][p];
  }
};

// A run whose last step is not whole ends its weight: what follows it in its tile, and in q, is zero.
template <class Decoder>
void dot_column(const Decoder& decoder, const Dot& d, const uint8_t* lines, int32_t* acc) {
  const int64_t steps = (d.line_count + kLinesAStep - 1) / kLinesAStep;
  if (d.m <= kFewRows) return all_rows<Decoder>(Lines<Decoder>{decoder, lines}, d, 0, steps, acc);
  int8x16_t panel[kPanelSteps][kVectors][Decoder::kParts];
  for (int64_t step = 0; step == 0 || step < steps; step += kPanelSteps) {
    const int64_t count = steps - step < kPanelSteps ? steps - step : kPanelSteps;
    const Lines<Decoder> from = {decoder, lines + step * kLinesAStep * 64};
    for (int64_t s = 0; s < count; ++s) {
      for (int v = 0; v < kVectors; ++v) from.operands(s, v, panel[s][v]);
    }
    all_rows<Decoder>(Panel<Decoder>{panel}, d, step, count, acc);
  }
}

template <class Decoder>
void dot_with(const Decoder& decoder, const Dot& d, const Output& output) {
  for (int c = 0; c < d.columns; ++c) {
    dot_column(decoder, d, d.lines + c * d.column_bytes, d.acc + 16 * c);
  }
  scale(d.acc, 0, d.m, output);
}

}  // namespace
}  // namespace potqat
