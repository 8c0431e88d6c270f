// Fake quantization and its straight-through backward, row by row.
#include <cmath>
#include <vector>

#include "grid.h"

namespace potqat {
namespace {

constexpr int64_t kRowGrain = 16;
// dscale is summed in this many interleaved lanes, so that it can be vectorized and stays the same sum everywhere.
constexpr int kLanes = 16;

float lane_sum(const float* lanes) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

}  // namespace

Status fake_quantize(const Matrix& w, const float* scale, const Quantization& q, void* out,
                     const ParallelFor& parallel) {
  const Quantizer& quantizer = potqat::quantizer(q.grid, q.rounding);
  FirstError error;
  parallel(w.rows, kRowGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> row(w.cols), level(w.cols);
    for (int64_t r = begin; r < end; ++r) {
      int64_t col;
      if (!load_row(w, r, row.data(), &col)) return error.report({Status::Code::kNotFinite, r, col});
      for_each_group(w.cols, q.group_size, [&](int64_t group, int64_t first, int64_t last) {
        const float s = scale[group * w.rows + r];
        if (bad_scale(s)) return error.report({Status::Code::kBadScale, r, group});
        assign_levels(quantizer, row.data() + first, last - first, s, level.data() + first);
        for (int64_t j = first; j < last; ++j) level[j] *= s;
      });
      store(level.data(), w.cols, w.dtype, out, r * w.cols);
    }
  });
  return error.status();
}

Status ste_backward(const Matrix& grad, const Matrix& w, const float* scale, const Quantization& q, bool clip, void* dw,
                    float* dscale, const ParallelFor& parallel) {
  const Quantizer& quantizer = potqat::quantizer(q.grid, q.rounding);
  const float top = quantizer.top();
  FirstError error;
  parallel(w.rows, kRowGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> row(w.cols), level(w.cols), g(w.cols);
    for (int64_t r = begin; r < end; ++r) {
      int64_t col;
      if (!load_row(w, r, row.data(), &col)) return error.report({Status::Code::kNotFinite, r, col});
      load_row(grad, r, g.data(), &col);  // a gradient may be infinite (loss scaling): it passes as it is
      for_each_group(w.cols, q.group_size, [&](int64_t group, int64_t first, int64_t last) {
        const float s = scale[group * w.rows + r];
        if (bad_scale(s)) return error.report({Status::Code::kBadScale, r, group});
        if (dscale) {
          float lanes[kLanes] = {};
          assign_levels(quantizer, row.data() + first, last - first, s, level.data() + first);
          for (int64_t j = first; j < last; ++j) {
            const float v = row[j] / s;
            lanes[(j - first) % kLanes] += g[j] * (std::fabs(v) <= top ? level[j] - v : level[j]);
          }
          dscale[group * w.rows + r] = lane_sum(lanes);
        }
        if (clip) {
          for (int64_t j = first; j < last; ++j) g[j] = std::fabs(row[j]) / s <= top ? g[j] : 0.0f;
        }
      });
      store(g.data(), w.cols, w.dtype, dw, r * w.cols);
    }
  });
  return error.status();
}

}  // namespace potqat
