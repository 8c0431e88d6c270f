// What surrounds the integer dot products, written once: included by each ISA unit, which vectorizes it with its own
// flags. Element-wise IEEE arithmetic without contraction, so all units give the same bits.

namespace {

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

// y[r][c] += float(acc[r][c]) * (s_x[r] * s_w[c])
void add_scaled(const int32_t* acc, int64_t m, const float* s_x, const float s_w[16], float* y) {
  for (int64_t r = 0; r < m; ++r) {
    for (int c = 0; c < 16; ++c) y[r * 16 + c] += static_cast<float>(acc[r * 16 + c]) * (s_x[r] * s_w[c]);
  }
}

}  // namespace
