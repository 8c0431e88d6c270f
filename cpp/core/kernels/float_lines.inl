// Float activations, written once: included by each ISA unit, which compiles (and vectorizes over the 16 outputs)
// with its own flags. A Decoder turns a line into float levels [inputs of the line][16 outputs].
// Every output has one accumulator and takes its inputs in ascending order, so all units give the same bits.

namespace potqat {
namespace {

template <class Decoder>
void dot_column(const Decoder& decoder, const uint8_t* lines, const DotFloat& d, float* acc) {
  alignas(64) float level[Decoder::kInputs * 16];
  for (int64_t r = 0; r < d.m; ++r) {
    for (int c = 0; c < 16; ++c) acc[r * kWidth + c] = 0;
  }
  for (int64_t line = 0; line < d.line_count; ++line) {
    decoder.decode(lines + line * 64, level);
    for (int64_t r = 0; r < d.m; ++r) {
      const float* input = d.x + r * d.x_stride + line * Decoder::kInputs;
      float* sum = acc + r * kWidth;
      for (int j = 0; j < Decoder::kInputs; ++j) {
        for (int c = 0; c < 16; ++c) sum[c] += input[j] * level[j * 16 + c];
      }
    }
  }
}

struct Decode4 {
  static constexpr int kInputs = 8;
  float table[16];
  explicit Decode4(const int8_t levels[16]) {
    for (int i = 0; i < 16; ++i) table[i] = levels[i];
  }
  void decode(const uint8_t* line, float* level) const {
    for (int c = 0; c < 16; ++c) {
      for (int i = 0; i < 4; ++i) {
        const uint8_t byte = line[4 * c + i];
        level[i * 16 + c] = table[byte & 15];
        level[(4 + i) * 16 + c] = table[byte >> 4];
      }
    }
  }
};

struct Decode8 {
  static constexpr int kInputs = 4;
  void decode(const uint8_t* line, float* level) const {
    for (int c = 0; c < 16; ++c) {
      for (int i = 0; i < 4; ++i) level[i * 16 + c] = static_cast<int8_t>(line[4 * c + i]);
    }
  }
};

void dot_float(const DotFloat& d) {
  for (int column = 0; column < d.columns; ++column) {
    const uint8_t* lines = d.lines + column * d.column_bytes;
    if (d.levels) {
      dot_column(Decode4(d.levels), lines, d, d.acc + 16 * column);
    } else {
      dot_column(Decode8(), lines, d, d.acc + 16 * column);
    }
  }
}

}  // namespace
}  // namespace potqat
