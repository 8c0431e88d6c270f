// What surrounds the integer dot products, written once: included by each ISA unit, which vectorizes it with its own
// flags. Element-wise IEEE arithmetic without contraction, so all units give the same bits.

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

// q = clamp(round-half-even(x / scale), low, high) + zero_point. Clamping first equals clamping after, the bounds being
// integers; adding 1.5 * 2^23 then leaves no fraction bits, which rounds half to even without a library call.
void quantize(const float* x, int64_t count, float scale, float low, float high, int32_t zero_point, int8_t* q) {
  constexpr float kMagic = 12582912.0f;
  for (int64_t j = 0; j < count; ++j) {
    float v = x[j] / scale;
    v = v < low ? low : v;
    v = v > high ? high : v;
    const float rounded = (v + kMagic) - kMagic;
    q[j] = static_cast<int8_t>(static_cast<int32_t>(rounded) + zero_point);
  }
}

int32_t sum(const int8_t* q, int64_t count) {
  int32_t total = 0;
  for (int64_t j = 0; j < count; ++j) total += q[j];
  return total;
}

template <class Start>
void scale_rows(const int32_t* acc, int64_t m, int width, const float* s_x, const float* s_w, const float* bias,
                float* y, int64_t y_stride, const Start& start) {
  for (int64_t r = 0; r < m; ++r) {
    const int32_t* from = acc + r * kWidth;
    float* to = y + r * y_stride;
    if (bias) {
      for (int c = 0; c < width; ++c) to[c] = start(to[c]) + static_cast<float>(from[c]) * (s_x[r] * s_w[c]) + bias[c];
    } else {
      for (int c = 0; c < width; ++c) to[c] = start(to[c]) + static_cast<float>(from[c]) * (s_x[r] * s_w[c]);
    }
  }
}

void scale(const int32_t* acc, int64_t m, int width, const float* s_x, const float* s_w, const float* bias, bool first,
           float* y, int64_t y_stride) {
  if (first) {
    scale_rows(acc, m, width, s_x, s_w, bias, y, y_stride, [](float) { return 0.0f; });
  } else {
    scale_rows(acc, m, width, s_x, s_w, bias, y, y_stride, [](float sum) { return sum; });
  }
}

}  // namespace
}  // namespace potqat
