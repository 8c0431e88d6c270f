// The packed linear layer around the kernels: quantize activations, walk the tiles, scale, add the bias, cast.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "grid.h"
#include "kernels/kernel.h"

namespace potqat {
namespace {

// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kMinThreadWork = 1 << 20;

// What the blocks read: activations padded with zeros to whole tiles of inputs and of rows.
struct Inputs {
  int64_t stride;               // inputs, padded
  std::unique_ptr<int8_t[]> q;  // [rows, stride]; where a zero point needs sums of levels, row m is ones
  std::vector<int32_t> q_sum;   // [m + 1, groups]
  std::unique_ptr<float[]> x;   // [rows, stride], float activations
  std::vector<float> scale;     // [m] s_x; NaN for a row that holds NaN or infinity
  int32_t zero_point = 0;
};

// One token: x [k] -> q, returns s_x.
float quantize_row(const Linear& a, const KernelTable& table, const float* x, int8_t* q) {
  const float most = table.absmax(x, a.k);
  if (!std::isfinite(most)) {
    std::memset(q, 0, a.k);
    return std::numeric_limits<float>::quiet_NaN();
  }
  if (a.activations == Activations::kStatic) {
    const int32_t zero_point = a.input_zero_point;
    table.quantize(x, a.k, a.input_scale, -128.0f - zero_point, 127.0f - zero_point, zero_point, q);
    return a.input_scale;
  }
  const float scale = most == 0 ? 1.0f : std::fmax(most / 127.0f, std::numeric_limits<float>::min());
  table.quantize(x, a.k, scale, -127.0f, 127.0f, 0, q);
  return scale;
}

template <class T>
std::unique_ptr<T[]> padded_rows(int64_t rows, int64_t used, int64_t stride) {
  const int64_t all = (rows + kRowPadding - 1) / kRowPadding * kRowPadding;
  auto data = std::make_unique_for_overwrite<T[]>(all * stride);
  for (int64_t r = 0; r < rows; ++r) std::memset(data.get() + r * stride + used, 0, (stride - used) * sizeof(T));
  std::memset(data.get() + rows * stride, 0, (all - rows) * stride * sizeof(T));
  return data;
}

Inputs prepare(const Linear& a, const KernelTable& table, int64_t groups, const ParallelFor& parallel) {
  Inputs in;
  in.stride = std::max<int64_t>(1, (a.k + kTileInputs - 1) / kTileInputs) * kTileInputs;
  const bool quantized = a.activations != Activations::kFloat;
  const int64_t rows = a.m + (a.activations == Activations::kStatic);
  in.zero_point = a.activations == Activations::kStatic ? a.input_zero_point : 0;
  in.scale.assign(a.m, 1.0f);
  if (quantized) {
    in.q = padded_rows<int8_t>(rows, a.k, in.stride);
    in.q_sum.resize(rows * groups);
    if (rows > a.m) std::memset(in.q.get() + a.m * in.stride, 1, a.k);
  } else {
    in.x = padded_rows<float>(rows, a.k, in.stride);
  }
  const Matrix x = {a.x, a.dtype, a.m, a.k, a.k, 1};
  const int64_t grain = std::max<int64_t>(1, kMinThreadWork / 16 / std::max<int64_t>(1, a.k));
  parallel(rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(a.dtype == DType::kFloat32 ? 0 : a.k);
    for (int64_t r = begin; r < end; ++r) {
      const float* row = r < a.m ? view_row(x, r, buffer.data()) : nullptr;
      if (!quantized) {
        if (a.k) std::memcpy(in.x.get() + r * in.stride, row, a.k * sizeof(float));
        continue;
      }
      int8_t* q = in.q.get() + r * in.stride;
      if (row) in.scale[r] = quantize_row(a, table, row, q);
      for_each_group(a.k, a.q.group_size, [&](int64_t group, int64_t first, int64_t last) {
        in.q_sum[r * groups + group] = table.sum(q + first, last - first);
      });
    }
  });
  return in;
}

// Blocks of the output: up to kMaxRows tokens times kMaxColumns columns of tiles.
class Blocks {
 public:
  Blocks(const Linear& a, const Inputs& in, const KernelTable& table, const int8_t* levels, int64_t groups)
      : a_(a), in_(in), table_(table), levels_(levels), groups_(groups) {}

  void run(int64_t column, int64_t columns) {
    columns_ = static_cast<int>(columns);
    n0_ = column * kTileOutputs;
    width_ = static_cast<int>(std::min(columns * kTileOutputs, a_.n - n0_));
    column_bytes_ = (a_.k + kTileInputs - 1) / kTileInputs * tile_bytes(a_.q.grid);
    tiles_ = a_.packed + column * column_bytes_;
    for (int64_t r0 = 0; r0 < a_.m; r0 += kMaxRows) rows(r0, std::min<int64_t>(kMaxRows, a_.m - r0));
  }

 private:
  void rows(int64_t r0, int64_t count) {
    // One group of float32: results go where they belong. Else they gather here, and are cast and copied at the end.
    const bool direct = groups_ == 1 && a_.dtype == DType::kFloat32;
    float* y = direct ? static_cast<float*>(a_.out) + r0 * a_.n + n0_ : y_;
    const int64_t y_stride = direct ? a_.n : kWidth;
    for_each_group(a_.k, a_.q.group_size, [&](int64_t group, int64_t first, int64_t last) {
      float scale[kWidth] = {}, bias[kWidth] = {};
      std::memcpy(scale, a_.scale + group * a_.n + n0_, width_ * sizeof(float));
      const bool add_bias = a_.bias && last == a_.k;
      if (add_bias) std::memcpy(bias, a_.bias + n0_, width_ * sizeof(float));
      sums(group, first, last, r0, count);
      if (a_.activations == Activations::kFloat) {
        scale_float(scale, add_bias ? bias : nullptr, group == 0, count, y, y_stride);
      } else {
        table_.scale(acc_, count, width_, in_.scale.data() + r0, scale, add_bias ? bias : nullptr, group == 0, y,
                     y_stride);
      }
    });
    if (direct) return;
    for (int64_t r = 0; r < count; ++r) store(y_ + r * kWidth, width_, a_.dtype, a_.out, (r0 + r) * a_.n + n0_);
  }

  // acc_ = sums over the inputs of one group.
  void sums(int64_t group, int64_t first, int64_t last, int64_t r0, int64_t count) {
    const int64_t inputs_a_line = kLineBytes * 8 / a_.q.grid.bits / kTileOutputs;
    const uint8_t* lines =
        tiles_ + first / kTileInputs * tile_bytes(a_.q.grid) + first % kTileInputs / inputs_a_line * kLineBytes;
    const int64_t line_count = (last - first + inputs_a_line - 1) / inputs_a_line;
    const int8_t* levels = a_.q.grid.bits == 4 ? levels_ : nullptr;
    if (a_.activations == Activations::kFloat) {
      const float* x = in_.x.get() + r0 * in_.stride + first;
      return table_.dot_float({lines, column_bytes_, columns_, line_count, levels, x, in_.stride, count, sum_});
    }
    const bool whole_tiles = first % kTileInputs == 0 && (last % kTileInputs == 0 || last == a_.k);
    Dot block = {lines,   column_bytes_, columns_, line_count, whole_tiles, levels,
                 nullptr, in_.stride,    nullptr,  groups_,    count,       acc_};
    const auto dot = [&](int64_t row, int64_t m, int32_t* acc) {
      block.q = in_.q.get() + row * in_.stride + first;
      block.q_sum = in_.q_sum.data() + row * groups_ + group;
      block.m = m;
      block.acc = acc;
      table_.dot(block);
    };
    dot(r0, count, acc_);
    if (in_.zero_point) {  // sum of level * (q - zp) = sum of level * q - zp * sum of level
      dot(a_.m, 1, level_sum_);
      for (int64_t r = 0; r < count; ++r) {
        for (int c = 0; c < width_; ++c) acc_[r * kWidth + c] -= in_.zero_point * level_sum_[c];
      }
    }
  }

  // y = or += sum * s_w, and + bias.
  void scale_float(const float* scale, const float* bias, bool first, int64_t count, float* y, int64_t y_stride) {
    for (int64_t r = 0; r < count; ++r) {
      for (int c = 0; c < width_; ++c) {
        float& out = y[r * y_stride + c];
        out = (first ? 0.0f : out) + sum_[r * kWidth + c] * scale[c];
        if (bias) out += bias[c];
      }
    }
  }

  const Linear& a_;
  const Inputs& in_;
  const KernelTable& table_;
  const int8_t* levels_;
  const int64_t groups_;
  int columns_ = 0, width_ = 0;
  int64_t n0_ = 0, column_bytes_ = 0;
  const uint8_t* tiles_ = nullptr;
  alignas(64) int32_t acc_[kMaxRows * kWidth], level_sum_[kRowPadding * kWidth];
  alignas(64) float sum_[kMaxRows * kWidth], y_[kMaxRows * kWidth];
};

}  // namespace

Status linear(const Linear& a, const ParallelFor& parallel) {
  const KernelTable* table = active_table();
  if (!table) return {Status::Code::kBadIsa};
  if (a.m == 0 || a.n == 0) return {};
  int8_t levels[16] = {};
  if (a.q.grid.bits == 4) {
    const Quantizer& quantizer = potqat::quantizer(a.q.grid, Rounding::kNearest);
    for (int i = 0; i < 16; ++i) {
      const int8_t magnitude = static_cast<int8_t>(quantizer.levels[i & 7]);
      levels[i] = i & 8 ? -magnitude : magnitude;
    }
  }
  const int64_t groups = group_count(a.k, a.q.group_size);
  const Inputs in = prepare(a, *table, groups, parallel);
  const int64_t columns = (a.n + kTileOutputs - 1) / kTileOutputs;
  const int64_t count = (columns + kMaxColumns - 1) / kMaxColumns;
  const int64_t work = std::max<int64_t>(1, a.m * in.stride * kTileOutputs * kMaxColumns);
  parallel(count, std::max<int64_t>(1, kMinThreadWork / work), [&](int64_t begin, int64_t end) {
    Blocks blocks(a, in, *table, levels, groups);  // 260 KB, mostly untouched: the stack of any thread has them
    for (int64_t i = begin; i < end; ++i) {
      blocks.run(i * kMaxColumns, std::min<int64_t>(kMaxColumns, columns - i * kMaxColumns));
    }
  });
  return {};
}

}  // namespace potqat
