// Levels of weights, and the straight-through gradient, written once: included by each ISA unit. Element-wise IEEE
// arithmetic without contraction, so all units give the same bits.

namespace potqat {
namespace {

float signed_level(float magnitude, float w) {
  return __builtin_copysignf(magnitude, w) + 0.0f;  // -0 + 0 = +0: there is one zero
}

// Eight magnitudes, by counting thresholds: without branches or an inner loop, so that the compiler vectorizes over the
// weights.
void assign_eight(const Levels& q, const float* w, int64_t count, float scale, float factor, float* out) {
  float t[7], step[7];
  for (int i = 0; i < 7; ++i) {
    t[i] = q.thresholds[i];
    step[i] = q.levels[i + 1] - q.levels[i];
  }
  for (int64_t j = 0; j < count; ++j) {
    const float v = __builtin_fabsf(w[j]) / scale;
    const auto above = [&](int i) { return v >= t[i] ? step[i] : 0.0f; };
    const float magnitude = above(0) + above(1) + above(2) + above(3) + above(4) + above(5) + above(6);
    out[j] = factor * signed_level(magnitude, w[j]);
  }
}

void assign_any(const Levels& q, const float* w, int64_t count, float scale, float factor, float* out) {
  for (int64_t j = 0; j < count; ++j) {
    const float v = __builtin_fabsf(w[j]) / scale;
    int index = 0;
    for (int i = 0; i + 1 < q.count; ++i) index += v >= q.thresholds[i];
    out[j] = factor * signed_level(q.levels[index], w[j]);
  }
}

// Levels 0, 1, 2, ...: threshold i lies in (i, i + 1), so only one comparison is needed.
void assign_by_truncation(const Levels& q, const float* w, int64_t count, float scale, float factor, float* out) {
  const float top = q.levels[q.count - 1];
  for (int64_t j = 0; j < count; ++j) {
    const float v = __builtin_fabsf(w[j]) / scale;
    float magnitude = top;
    if (v < top) {
      const int below = static_cast<int>(v);
      magnitude = static_cast<float>(below + (v >= q.thresholds[below]));
    }
    out[j] = factor * signed_level(magnitude, w[j]);
  }
}

// The same where threshold i is i + 0.5: without a table and branches, so that the compiler vectorizes it.
void assign_nearest_unit(const Levels& q, const float* w, int64_t count, float scale, float factor, float* out) {
  const float top = q.levels[q.count - 1];
  for (int64_t j = 0; j < count; ++j) {
    const float v = __builtin_fabsf(w[j]) / scale, inside = v < top ? v : top;
    const float below = static_cast<float>(static_cast<int>(inside));
    out[j] = factor * signed_level(below + (inside - below >= 0.5f ? 1.0f : 0.0f), w[j]);
  }
}

void assign(const Levels& q, const float* w, int64_t count, float scale, float factor, float* out) {
  if (q.count == 8) {
    assign_eight(q, w, count, scale, factor, out);
  } else if (q.half_steps) {
    assign_nearest_unit(q, w, count, scale, factor, out);
  } else if (q.unit_steps) {
    assign_by_truncation(q, w, count, scale, factor, out);
  } else {
    assign_any(q, w, count, scale, factor, out);
  }
}

template <bool SCALE>
float ste_loop(const float* __restrict g, const float* __restrict w, const float* __restrict level, int64_t count,
               float scale, float top, bool clip, float* __restrict dw) {
  constexpr int kLanes = 16;
  float lanes[kLanes] = {};
  // dw's element, and its term of the sum: one division serves both.
  const auto term = [&](int64_t j) {
    const float v = w[j] / scale;
    const bool inside = __builtin_fabsf(v) <= top;
    dw[j] = clip && !inside ? 0.0f : g[j];
    if constexpr (SCALE) return g[j] * (inside ? level[j] - v : level[j]);
    return 0.0f;
  };
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
#pragma GCC unroll 1  // a loop of 16 that is unrolled is not vectorized
    for (int i = 0; i < kLanes; ++i) lanes[i] += term(j + i);
  }
  for (int i = 0; j + i < count; ++i) lanes[i] += term(j + i);
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

float ste(const float* g, const float* w, const float* level, int64_t count, float scale, float top, bool clip,
          float* dw) {
  return level ? ste_loop<true>(g, w, level, count, scale, top, clip, dw)
               : ste_loop<false>(g, w, level, count, scale, top, clip, dw);
}

}  // namespace
}  // namespace potqat
