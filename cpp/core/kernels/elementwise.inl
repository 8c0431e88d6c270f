// What surrounds the integer dot products: included by the ISA units, which vectorize it with their own flags (AVX-512
// has its own). Element-wise IEEE arithmetic without contraction, so all units give the same bits.

namespace potqat {
namespace {

float absmax(const float* x, int64_t count) {
  int32_t most = 0;  // bit patterns of non-negative floats are ordered as integers, and integer max vectorizes
  for (int64_t j = 0; j < count; ++j) {
    int32_t bits;
    memcpy(&bits, x + j, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float value;
  memcpy(&value, &most, 4);
  return value;
}

// q = clamp(round-half-even(x / scale), low, high) + zero_point; returns their sum. Clamping first equals clamping
// after, the bounds being integers; adding 1.5 * 2^23 then leaves no fraction bits, which rounds half to even without a
// library call.
int32_t quantize(const float* x, int64_t count, float scale, float low, float high, int32_t zero_point, int8_t* q) {
  constexpr float kMagic = 12582912.0f;
  int32_t total = 0;
  for (int64_t j = 0; j < count; ++j) {
    float v = x[j] / scale;
    v = v < low ? low : v;
    v = v > high ? high : v;
    const float rounded = (v + kMagic) - kMagic;
    const int32_t code = static_cast<int32_t>(rounded) + zero_point;
    q[j] = static_cast<int8_t>(code);
    total += code;
  }
  return total;
}

template <class Start>
void scale_rows(const int32_t* acc, int64_t row, int64_t rows, const Output& o, const Start& start) {
  for (int64_t r = row; r < row + rows; ++r) {
    float* y = o.y + r * o.y_stride;
    for (int c = 0; c < o.width; ++c) {
      const int32_t sum = o.offset ? acc[r * kWidth + c] - o.offset[c] : acc[r * kWidth + c];
      const float product = start(y[c]) + static_cast<float>(sum) * (o.s_x[r] * o.s_w[c]);
      y[c] = o.bias ? product + o.bias[c] : product;
    }
  }
}

// Rows row .. row + rows of acc to y.
void scale(const int32_t* acc, int64_t row, int64_t rows, const Output& o) {
  if (o.first) {
    scale_rows(acc, row, rows, o, [](float) { return 0.0f; });
  } else {
    scale_rows(acc, row, rows, o, [](float sum) { return sum; });
  }
}

}  // namespace
}  // namespace potqat
