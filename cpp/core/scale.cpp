// Scales from weights: absmax, or a search for the least (weighted) squared error around it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "grid.h"
#include "kernels/kernel.h"

namespace potqat {
namespace {

// Candidates are absmax / top * 2^(i / 16), i = kFirst .. kLast: one octave of phases (the error of a power-of-two
// grid is periodic in log2 of the scale) at the shifts that can win: the top level from 2x to absmax / 4.
constexpr int kSteps = 16, kFirst = -2 * kSteps, kLast = kSteps, kCandidates = kLast - kFirst + 1;
// 2^(i / 16) as written constants: libm's exp2 may differ in the last bit between machines.
constexpr float kRoots[kSteps] = {1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                                  1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                  1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};

float candidate(float base, int i) {
  const int octave = (i < 0 ? i - kSteps + 1 : i) / kSteps;
  return std::ldexp(base * kRoots[i - octave * kSteps], octave);
}

float absmax_scale(float absmax, float top) {
  if (absmax == 0) return 1;
  float scale = absmax / top;
  if (scale < std::numeric_limits<float>::min()) scale = std::numeric_limits<float>::min();
  // Division rounds: where absmax / scale would land a hair past the top level, take the next float up.
  if (absmax / scale > top) scale = std::nextafter(scale, std::numeric_limits<float>::infinity());
  return scale;
}

// The candidate with the least error; on a tie the first, and absmax itself if nothing is better.
float best_candidate(float base, const double* errors) {
  int best = 0;
  for (int i = kFirst; i <= kLast; ++i) {
    if (errors[i - kFirst] < errors[best - kFirst]) best = i;
  }
  return candidate(base, best);
}

// absmax of each (group, row), or of everything.
Status absmax_scales(const Matrix& w, const Quantization& q, float top, bool per_tensor, float* scale,
                     const ParallelFor& parallel) {
  FirstError error;
  parallel(w.rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> row(w.cols);
    for (int64_t r = begin; r < end; ++r) {
      int64_t col;
      const float* weights = view_row(w, r, row.data());
      if (!all_finite(weights, w.cols, &col)) return error.report({Status::Code::kNotFinite, r, col});
      for_each_group(w.cols, q.group_size, [&](int64_t group, int64_t first, int64_t last) {
        scale[group * w.rows + r] = absmax(weights + first, last - first);
      });
    }
  });
  if (!error.status().ok()) return error.status();
  const int64_t count = group_count(w.cols, q.group_size) * w.rows;
  if (per_tensor) {
    const float most = absmax(scale, count);
    for (int64_t i = 0; i < count; ++i) scale[i] = most;
  }
  for (int64_t i = 0; i < count; ++i) scale[i] = absmax_scale(scale[i], top);
  return {};
}

}  // namespace

Status compute_scale(const Matrix& w, const float* importance, const Quantization& q, ScaleMethod method,
                     bool per_tensor, float* scale, const ParallelFor& parallel) {
  const Quantizer& quantizer = potqat::quantizer(q.grid, q.rounding);
  const Status status = absmax_scales(w, q, quantizer.top(), per_tensor, scale, parallel);
  if (!status.ok() || method == ScaleMethod::kAbsmax || w.rows == 0) return status;

  std::vector<double> row_errors(per_tensor ? w.rows * kCandidates : 0);
  parallel(w.rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(w.cols), level(w.cols);
    for (int64_t r = begin; r < end; ++r) {
      const float* weights = view_row(w, r, row.data());
      for_each_group(w.cols, q.group_size, [&](int64_t group, int64_t first, int64_t last) {
        double errors[kCandidates];
        float* base = scale + group * w.rows + r;
        for (int i = kFirst; i <= kLast; ++i) {
          const float tried = candidate(*base, i);
          assign_levels(quantizer, weights + first, last - first, tried, 1.0f, level.data());
          errors[i - kFirst] = table_or_scalar().squared_error(
              weights + first, level.data(), importance ? importance + first : nullptr, last - first, tried);
        }
        if (per_tensor) {
          std::copy(errors, errors + kCandidates, row_errors.begin() + r * kCandidates);
        } else {
          *base = best_candidate(*base, errors);
        }
      });
    }
  });
  if (per_tensor) {
    double errors[kCandidates] = {};
    for (int64_t r = 0; r < w.rows; ++r) {
      for (int i = 0; i < kCandidates; ++i) errors[i] += row_errors[r * kCandidates + i];
    }
    const float best = best_candidate(scale[0], errors);
    for (int64_t r = 0; r < w.rows; ++r) scale[r] = best;
  }
  return {};
}

}  // namespace potqat
