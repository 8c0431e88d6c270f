// Fake quantization and its straight-through backward, row by row.
#include <vector>

#include "grid.h"
#include "kernels/kernel.h"

namespace potqat {
namespace {

constexpr int64_t kRowGrain = 16;
}  // namespace

Status fake_quantize(const Matrix& w, const float* scale, const Quantization& q, void* out,
                     const ParallelFor& parallel) {
  const Quantizer& quantizer = potqat::quantizer(q.grid, q.rounding);
  FirstError error;
  parallel(w.rows, kRowGrain, [&](int64_t begin, int64_t end) {
    const bool direct = w.dtype == DType::kFloat32;
    std::vector<float> buffer(direct && w.col_stride == 1 ? 0 : w.cols), cast(direct ? 0 : w.cols);
    for (int64_t r = begin; r < end; ++r) {
      int64_t col;
      const float* row = view_row(w, r, buffer.data());
      if (!all_finite(row, w.cols, &col)) return error.report({Status::Code::kNotFinite, r, col});
      float* result = direct ? static_cast<float*>(out) + r * w.cols : cast.data();
      for_each_group(w.cols, q.group_size, [&](int64_t group, int64_t first, int64_t last) {
        const float s = scale[group * w.rows + r];
        if (bad_scale(s)) return error.report({Status::Code::kBadScale, r, group});
        assign_levels(quantizer, row + first, last - first, s, s, result + first);
      });
      if (!direct) store(result, w.cols, w.dtype, out, r * w.cols);
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
    const bool direct = w.dtype == DType::kFloat32;
    std::vector<float> buffer(w.cols), grad_buffer(w.cols), level(dscale ? w.cols : 0), cast(direct ? 0 : w.cols);
    for (int64_t r = begin; r < end; ++r) {
      int64_t col;
      const float* row = view_row(w, r, buffer.data());
      if (!all_finite(row, w.cols, &col)) return error.report({Status::Code::kNotFinite, r, col});
      const float* g = view_row(grad, r, grad_buffer.data());  // may be infinite (loss scaling): it passes as it is
      float* result = direct ? static_cast<float*>(dw) + r * w.cols : cast.data();
      for_each_group(w.cols, q.group_size, [&](int64_t group, int64_t first, int64_t last) {
        const float s = scale[group * w.rows + r];
        if (bad_scale(s)) return error.report({Status::Code::kBadScale, r, group});
        float* levels = dscale ? level.data() + first : nullptr;
        if (dscale) assign_levels(quantizer, row + first, last - first, s, 1.0f, levels);
        const float sum =
            table_or_scalar().ste(g + first, row + first, levels, last - first, s, top, clip, result + first);
        if (dscale) dscale[group * w.rows + r] = sum;
      });
      if (!direct) store(result, w.cols, w.dtype, dw, r * w.cols);
    }
  });
  return error.status();
}

}  // namespace potqat
