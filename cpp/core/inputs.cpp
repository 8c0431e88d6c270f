// Activations on their way to the kernels: one scale a token, rounded, padded.
#include "inputs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "grid.h"

namespace potqat {
namespace {

// Below this many inputs a second thread costs more than it saves.
constexpr int64_t kMinThreadInputs = 1 << 16;

// One token: x [k] -> q and its sums [groups], returns s_x.
float quantize_row(const Linear& a, const KernelTable& table, const float* x, int8_t* q, int32_t* q_sum) {
  const float most = table.absmax(x, a.k);
  if (!std::isfinite(most)) {
    std::memset(q, 0, a.k);
    std::memset(q_sum, 0, group_count(a.k, a.q.group_size) * sizeof(int32_t));
    return std::numeric_limits<float>::quiet_NaN();
  }
  const bool is_static = a.activations == Activations::kStatic;
  float scale = a.input_scale, low = -128.0f - a.input_zero_point, high = 127.0f - a.input_zero_point;
  if (!is_static) {
    scale = most == 0 ? 1.0f : std::fmax(most / 127.0f, std::numeric_limits<float>::min());
    low = -127.0f;
    high = 127.0f;
  }
  const int32_t zero_point = is_static ? a.input_zero_point : 0;
  for_each_group(a.k, a.q.group_size, [&](int64_t group, int64_t first, int64_t last) {
    q_sum[group] = table.quantize(x + first, last - first, scale, low, high, zero_point, q + first);
  });
  return scale;
}

int64_t padded(int64_t rows) {
  const int64_t multiple = rows < kManyRows ? 2 : kRowPadding;
  return (rows + multiple - 1) / multiple * multiple;
}

template <class T>
void pad(Kept<T>& data, int64_t rows, int64_t used, int64_t stride) {
  const int64_t all = padded(rows);
  data.need(all * stride);
  for (int64_t r = 0; r < rows; ++r) std::memset(data.get() + r * stride + used, 0, (stride - used) * sizeof(T));
  std::memset(data.get() + rows * stride, 0, (all - rows) * stride * sizeof(T));
}

}  // namespace

void Inputs::prepare(const Linear& a, const KernelTable& table, int64_t first, int64_t count,
                     const ParallelFor& parallel) {
  const bool quantized = a.activations != Activations::kFloat, is_static = a.activations == Activations::kStatic;
  const int64_t groups = group_count(a.k, a.q.group_size);
  rows = count;
  // An odd number of cache lines: rows a multiple of 4 KiB apart would all fall into one set of the cache.
  stride = ((a.k + kTileInputs - 1) / kTileInputs | 1) * kTileInputs;
  parts = a.activations == Activations::kInt16 ? 2 : 1;
  part_rows = parts > 1 ? padded(count) : 0;
  zero_point = is_static ? a.input_zero_point : 0;
  const int64_t all = (parts - 1) * part_rows + count + is_static;
  scale.assign(all, 1.0f);
  if (quantized) {
    pad(q, all, a.k, stride);
    if (part_rows) std::memset(q.get() + count * stride, 0, (part_rows - count) * stride);
    q_sum.resize(all * groups);
  } else {
    pad(x, all, a.k, stride);
  }
  const Matrix tokens = {a.x, a.dtype, a.m, a.k, a.k, 1};
  const int64_t grain = std::max<int64_t>(1, kMinThreadInputs / std::max<int64_t>(1, a.k));
  parallel(count, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(a.dtype == DType::kFloat32 ? 0 : a.k), rest(parts > 1 ? a.k : 0);
    const auto quantize = [&](int64_t to, const float* values) {
      scale[to] = quantize_row(a, table, values, q.get() + to * stride, q_sum.data() + to * groups);
    };
    for (int64_t r = begin; r < end; ++r) {
      const float* row = view_row(tokens, first + r, buffer.data());
      if (quantized) {
        quantize(r, row);
        if (parts > 1) {
          const int8_t* codes = q.get() + r * stride;
          for (int64_t j = 0; j < a.k; ++j) rest[j] = row[j] - static_cast<float>(codes[j]) * scale[r];
          quantize(part_rows + r, rest.data());
        }
      } else if (a.k) {
        std::memcpy(x.get() + r * stride, row, a.k * sizeof(float));
      }
    }
  });
  if (is_static) {
    std::memset(q.get() + count * stride, 1, a.k);
    for_each_group(a.k, a.q.group_size, [&](int64_t group, int64_t begin, int64_t end) {
      q_sum[count * groups + group] = static_cast<int32_t>(end - begin);
    });
  }
}

}  // namespace potqat
