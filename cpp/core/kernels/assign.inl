// Levels of weights, and the straight-through gradient, written once: included by each ISA unit. Element-wise IEEE
// arithmetic without contraction, so all units give the same bits.

namespace potqat {
namespace {

float signed_level(float magnitude, float w) {
  return __builtin_copysignf(magnitude, w) + 0.0f;  // -0 + 0 = +0: there is one zero
}

// From so many weights with one scale on, thresholds times the scale are found once, and no weight is divided.
constexpr int64_t kManyWeights = 256;

float neighbour(float x, int up) {  // of a positive float
  int32_t bits;
  memcpy(&bits, &x, 4);
  bits += up;
  memcpy(&x, &bits, 4);
  return x;
}

// The smallest positive float whose quotient by scale is at least t, a positive one. Quotients are rounded correctly,
// so they never fall while the dividend rises: comparing with it says what comparing the quotient with t would.
float least_dividend(float t, float scale) {
  float x = t * scale;  // right but for a unit or two in the last place
  while (x > 0 && x / scale >= t) x = neighbour(x, -1);
  while (x / scale < t) x = neighbour(x, 1);
  return x;
}

// Eight magnitudes, by counting thresholds: without branches or an inner loop, so that the compiler vectorizes over the
// weights.
template <bool DIVIDE>
void assign_eight(const Levels& q, const float* w, int64_t count, float scale, float factor, float* out) {
  float t[7], step[7];
  for (int i = 0; i < 7; ++i) {
    t[i] = DIVIDE ? q.thresholds[i] : least_dividend(q.thresholds[i], scale);
    step[i] = q.levels[i + 1] - q.levels[i];
  }
  for (int64_t j = 0; j < count; ++j) {
    const float v = DIVIDE ? __builtin_fabsf(w[j]) / scale : __builtin_fabsf(w[j]);
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
    const auto assign_all = count >= kManyWeights ? assign_eight<false> : assign_eight<true>;
    assign_all(q, w, count, scale, factor, out);
  } else if (q.half_steps) {
    assign_nearest_unit(q, w, count, scale, factor, out);
  } else if (q.unit_steps) {
    assign_by_truncation(q, w, count, scale, factor, out);
  } else {
    assign_any(q, w, count, scale, factor, out);
  }
}

// Without a gradient of the scale.
void pass(const float* __restrict g, const float* __restrict w, int64_t count, float scale, float top, bool clip,
          float* __restrict dw) {
  // What is beyond the top level starts where the quotient is beyond top.
  const float beyond = clip ? least_dividend(neighbour(top, 1), scale) : __builtin_inff();
  for (int64_t j = 0; j < count; ++j) dw[j] = __builtin_fabsf(w[j]) < beyond ? g[j] : 0.0f;
}

// One division serves dw's element and its term of the sum. A vector type, because GCC 12 keeps an array of sums in
// memory; where a machine has no such vectors the compiler makes it of smaller ones.
float ste_with_scale(const float* g, const float* w, const float* level, int64_t count, float scale, float top,
                     bool clip, float* dw) {
  constexpr int kLanes = 16;
  typedef float Floats __attribute__((vector_size(4 * kLanes)));
  typedef int32_t Bits __attribute__((vector_size(4 * kLanes)));
  Floats sum = {};
  const auto step = [&](int64_t j, size_t bytes) {
    Floats gradient = {}, weight = {}, nearest = {};  // what is not there adds 0 * 0, which changes no bit of a sum
    memcpy(&gradient, g + j, bytes);
    memcpy(&weight, w + j, bytes);
    memcpy(&nearest, level + j, bytes);
    const Floats v = weight / scale, magnitude = (Floats)((Bits)v & 0x7fffffff);
    const Bits inside = magnitude <= top;
    const Floats passed = clip ? (Floats)(inside & (Bits)gradient) : gradient;
    memcpy(dw + j, &passed, bytes);
    sum += gradient * (inside ? nearest - v : nearest);
  };
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) step(j, sizeof(Floats));
  if (j < count) step(j, 4 * (count - j));
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}

float ste(const float* g, const float* w, const float* level, int64_t count, float scale, float top, bool clip,
          float* dw) {
  if (level) return ste_with_scale(g, w, level, count, scale, top, clip, dw);
  pass(g, w, count, scale, top, clip, dw);
  return 0;
}

double squared_error(const float* w, const float* level, const float* importance, int64_t count, float scale) {
  constexpr int kLanes = 8;
  typedef float Floats __attribute__((vector_size(4 * kLanes)));
  typedef double Doubles __attribute__((vector_size(8 * kLanes)));
  Doubles sum = {};
  const auto step = [&](int64_t j, size_t bytes) {
    Floats weight = {}, nearest = {}, weigh = {};  // what is not there adds 0
    memcpy(&weight, w + j, bytes);
    memcpy(&nearest, level + j, bytes);
    const Doubles error = __builtin_convertvector(weight, Doubles) - __builtin_convertvector(nearest, Doubles) * scale;
    if (!importance) {
      sum += error * error;
    } else {
      memcpy(&weigh, importance + j, bytes);
      sum += error * error * __builtin_convertvector(weigh, Doubles);
    }
  };
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) step(j, sizeof(Floats));
  if (j < count) step(j, 4 * (count - j));
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}

}  // namespace
}  // namespace potqat
