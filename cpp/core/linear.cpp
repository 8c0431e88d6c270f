// The packed linear layer around the kernels: quantize activations, walk the tiles, scale, add the bias, cast.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "grid.h"
#include "kernels/kernel.h"

namespace potqat {
namespace {

// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kMinThreadWork = 1 << 20;

// What the tile loop reads: one row of activations per token, padded with zeros to whole tiles.
struct Inputs {
  int64_t stride;              // inputs, padded
  std::vector<int8_t> q;       // [m + 1, stride]; the last row is ones where a zero point needs row sums
  std::vector<int32_t> q_sum;  // [m + 1, groups]
  std::vector<float> x;        // [m, stride], float activations
  std::vector<float> scale;    // [m] s_x; NaN for a row that holds NaN or infinity
  int32_t zero_point = 0;
};

// One token: x [k] -> q, returns s_x.
float quantize_row(const Linear& a, const KernelTable& table, const float* x, int8_t* q) {
  const float most = absmax(x, a.k);
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

Inputs prepare(const Linear& a, const KernelTable& table, int64_t groups, const ParallelFor& parallel) {
  Inputs in;
  in.stride = std::max<int64_t>(1, (a.k + kTileInputs - 1) / kTileInputs) * kTileInputs;
  const bool quantized = a.activations != Activations::kFloat;
  const int64_t rows = a.m + (a.activations == Activations::kStatic);
  in.zero_point = a.activations == Activations::kStatic ? a.input_zero_point : 0;
  in.scale.assign(a.m, 1.0f);
  if (quantized) {
    in.q.assign(rows * in.stride, 0);
    in.q_sum.assign(rows * groups, 0);
    if (rows > a.m) std::memset(in.q.data() + a.m * in.stride, 1, a.k);
  } else {
    in.x.assign(rows * in.stride, 0);
  }
  const Matrix x = {a.x, a.dtype, a.m, a.k, a.k, 1};
  parallel(rows, std::max<int64_t>(1, kMinThreadWork / 16 / std::max<int64_t>(1, a.k)),
           [&](int64_t begin, int64_t end) {
             std::vector<float> row(quantized ? a.k : 0);
             for (int64_t r = begin; r < end; ++r) {
               int64_t col;
               if (!quantized) {
                 load_row(x, r, in.x.data() + r * in.stride, &col);
                 continue;
               }
               int8_t* q = in.q.data() + r * in.stride;
               if (r < a.m) {
                 load_row(x, r, row.data(), &col);
                 in.scale[r] = quantize_row(a, table, row.data(), q);
               }
               for_each_group(a.k, a.q.group_size, [&](int64_t group, int64_t first, int64_t last) {
                 int32_t sum = 0;
                 for (int64_t j = first; j < last; ++j) sum += q[j];
                 in.q_sum[r * groups + group] = sum;
               });
             }
           });
  return in;
}

// One column of tiles: outputs n0 .. n0 + 15 of every token.
class TileColumn {
 public:
  TileColumn(const Linear& a, const Inputs& in, const KernelTable& table, const int8_t* levels, int64_t groups)
      : a_(a), in_(in), table_(table), levels_(levels), groups_(groups) {}

  void run(int64_t n0) {
    const int64_t width = std::min(kTileOutputs, a_.n - n0);
    const uint8_t* tiles =
        a_.packed + n0 / kTileOutputs * ((a_.k + kTileInputs - 1) / kTileInputs) * tile_bytes(a_.q.grid);
    float bias[kTileOutputs] = {};
    if (a_.bias) std::memcpy(bias, a_.bias + n0, width * sizeof(float));
    for (int64_t r0 = 0; r0 < a_.m; r0 += kMaxTableRows) {
      const int64_t rows = std::min<int64_t>(kMaxTableRows, a_.m - r0);
      float y[kMaxTableRows * kTileOutputs] = {};
      for_each_group(a_.k, a_.q.group_size, [&](int64_t group, int64_t first, int64_t last) {
        float scale[kTileOutputs] = {};
        std::memcpy(scale, a_.scale + group * a_.n + n0, width * sizeof(float));
        add_group(tiles, group, first, last, r0, rows, scale, y);
      });
      for (int64_t r = 0; r < rows; ++r) {
        float* row = y + r * kTileOutputs;
        if (a_.bias) {
          for (int64_t c = 0; c < kTileOutputs; ++c) row[c] += bias[c];
        }
        store(row, width, a_.dtype, a_.out, (r0 + r) * a_.n + n0);
      }
    }
  }

 private:
  // y += float(acc) * (s_x * s_w)
  void add_group(const uint8_t* tiles, int64_t group, int64_t first, int64_t last, int64_t r0, int64_t rows,
                 const float* scale, float* y) {
    const int64_t inputs_a_line = kLineBytes * 8 / a_.q.grid.bits / kTileOutputs;
    const uint8_t* lines = tiles + first / inputs_a_line * kLineBytes;
    const int64_t line_count = (last - first + inputs_a_line - 1) / inputs_a_line;
    if (a_.activations == Activations::kFloat) {
      float sum[kMaxTableRows * kTileOutputs];
      const float* x = in_.x.data() + r0 * in_.stride + first;
      if (a_.q.grid.bits == 4) {
        table_.dot4_float(lines, line_count, levels_, x, in_.stride, rows, sum);
      } else {
        table_.dot8_float(lines, line_count, x, in_.stride, rows, sum);
      }
      for (int64_t i = 0; i < rows * kTileOutputs; ++i) y[i] += sum[i] * scale[i % kTileOutputs];
      return;
    }
    int32_t acc[kMaxTableRows * kTileOutputs], level_sum[kTileOutputs];
    dot(lines, line_count, group, first, r0, rows, acc);
    if (in_.zero_point) {  // sum of level * (q - zp) = sum of level * q - zp * sum of level
      dot(lines, line_count, group, first, a_.m, 1, level_sum);
      for (int64_t i = 0; i < rows * kTileOutputs; ++i) acc[i] -= in_.zero_point * level_sum[i % kTileOutputs];
    }
    table_.add_scaled(acc, rows, in_.scale.data() + r0, scale, y);
  }

  void dot(const uint8_t* lines, int64_t line_count, int64_t group, int64_t first, int64_t row, int64_t rows,
           int32_t* acc) {
    const int8_t* q = in_.q.data() + row * in_.stride + first;
    const int32_t* q_sum = in_.q_sum.data() + row * groups_ + group;
    if (a_.q.grid.bits == 4) {
      table_.dot4(lines, line_count, levels_, q, in_.stride, q_sum, groups_, rows, acc);
    } else {
      table_.dot8(lines, line_count, q, in_.stride, q_sum, groups_, rows, acc);
    }
  }

  const Linear& a_;
  const Inputs& in_;
  const KernelTable& table_;
  const int8_t* levels_;
  const int64_t groups_;
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
  const int64_t tile_work = std::max<int64_t>(1, a.m * in.stride * kTileOutputs);
  const int64_t columns = (a.n + kTileOutputs - 1) / kTileOutputs;
  parallel(columns, std::max<int64_t>(1, kMinThreadWork / tile_work), [&](int64_t begin, int64_t end) {
    TileColumn column(a, in, *table, levels, groups);
    for (int64_t i = begin; i < end; ++i) column.run(i * kTileOutputs);
  });
  return {};
}

}  // namespace potqat
