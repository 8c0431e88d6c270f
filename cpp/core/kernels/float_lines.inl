// Float activations, written once: included by each ISA unit, which compiles (and vectorizes over the 16 outputs)
// with its own flags. A Decoder turns a line into float levels [inputs of the line][16 outputs].
// Every output has one accumulator and takes its inputs in ascending order, so all units give the same bits.

namespace {

template <class Decoder>
void dot_float(const Decoder& decoder, const uint8_t* lines, int64_t line_count, const float* x, int64_t x_stride,
               int64_t m, float* acc) {
  alignas(64) float level[Decoder::kInputs * 16];
  for (int64_t i = 0; i < m * 16; ++i) acc[i] = 0;
  for (int64_t line = 0; line < line_count; ++line) {
    decoder.decode(lines + line * 64, level);
    for (int64_t r = 0; r < m; ++r) {
      const float* input = x + r * x_stride + line * Decoder::kInputs;
      float* sum = acc + r * 16;
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

void dot4_float(const uint8_t* lines, int64_t line_count, const int8_t levels[16], const float* x, int64_t x_stride,
                int64_t m, float* acc) {
  dot_float(Decode4(levels), lines, line_count, x, x_stride, m, acc);
}

void dot8_float(const uint8_t* lines, int64_t line_count, const float* x, int64_t x_stride, int64_t m, float* acc) {
  dot_float(Decode8(), lines, line_count, x, x_stride, m, acc);
}

}  // namespace
