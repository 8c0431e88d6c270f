// The packed linear layer around the kernels: walk the tiles, scale, add the bias, cast.
#include <algorithm>

#include "grid.h"
#include "inputs.h"
#include "kernels/kernel.h"

namespace potqat {
namespace {

// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kMinThreadWork = 1 << 20;
// Outputs that leave no room for activations in the second-level cache are written around it: half the traffic.
constexpr int64_t kStreamBytes = 1 << 20;

// Inputs beyond which a block has half the rows.
constexpr int64_t kLongRow = 2112;

// Blocks of the output: up to kMaxRows tokens times kMaxColumns columns of tiles.
class Blocks {
 public:
  // levels: of the nibbles; null for int8.
  Blocks(const Linear& a, const Inputs& in, const KernelTable& table, const int8_t* levels, int64_t groups)
      : a_(a), in_(in), table_(table), levels_(levels), groups_(groups) {
    const bool aligned = reinterpret_cast<uintptr_t>(a.out) % kLineBytes == 0 && a.n % kTileOutputs == 0;
    stream_ = aligned && a.m * a.n * static_cast<int64_t>(sizeof(float)) > kStreamBytes;
  }

  // The inputs are those of the layer's tokens from `token` on.
  void run(int64_t token, int64_t column, int64_t columns) {
    token_ = token;
    columns_ = static_cast<int>(columns);
    n0_ = column * kTileOutputs;
    width_ = static_cast<int>(std::min(columns * kTileOutputs, a_.n - n0_));
    column_bytes_ = (a_.k + kTileInputs - 1) / kTileInputs * tile_bytes(a_.q.grid);
    tiles_ = a_.packed + column * column_bytes_;
    rows(in_.rows);
  }

 private:
  void rows(int64_t count) {
    // float32 of one pass, or of few rows: results go where they belong. Else they gather here, and are cast and
    // copied at the end.
    const bool taken = count <= table_.few_rows_grouped ||
                       (table_.many_rows_grouped && count >= kManyRows && a_.q.group_size % kTileInputs == 0);
    const bool together =
        taken && groups_ > 1 && a_.activations != Activations::kFloat && in_.parts == 1 && !in_.zero_point;
    const bool one_pass = together || groups_ * in_.parts == 1;
    const bool direct = a_.dtype == DType::kFloat32 && (one_pass || count <= kRowPadding);
    float* y = direct ? static_cast<float*>(a_.out) + token_ * a_.n + n0_ : y_;
    const int64_t y_stride = direct ? a_.n : kWidth;
    if (together) {
      dot_together(count, y, y_stride);
    } else {
      dot_each(count, y, y_stride, one_pass && direct && stream_);
    }
    if (direct) return;
    for (int64_t r = 0; r < count; ++r) store(y_ + r * kWidth, width_, a_.dtype, a_.out, (token_ + r) * a_.n + n0_);
  }

  void dot_together(int64_t count, float* y, int64_t y_stride) {
    const int64_t step = std::max<int64_t>(1, kGroupedInputs / a_.q.group_size);
    for (int64_t group = 0; group < groups_; group += step) {
      const int64_t groups = std::min(step, groups_ - group), first = group * a_.q.group_size;
      const bool last = group + groups == groups_;
      const bool stream = stream_ && y != y_ && groups == groups_;
      const Output output = {in_.scale.data(),
                             a_.scale + group * a_.n + n0_,
                             last && a_.bias ? a_.bias + n0_ : nullptr,
                             nullptr,
                             group == 0,
                             stream,
                             width_,
                             y,
                             y_stride,
                             a_.n};
      dot(group, groups, first, last ? a_.k : first + groups * a_.q.group_size, 0, count, output);
    }
  }

  void dot_each(int64_t count, float* y, int64_t y_stride, bool stream) {
    float padded[2][kWidth];
    for_each_group(a_.k, a_.q.group_size, [&](int64_t group, int64_t first, int64_t last) {
      const float* scale = whole_width(a_.scale + group * a_.n + n0_, padded[0]);
      const float* bias = a_.bias && last == a_.k ? whole_width(a_.bias + n0_, padded[1]) : nullptr;
      for (int64_t part = 0; part < in_.parts; ++part) {
        const int64_t row = part * in_.part_rows;
        const bool start = group == 0 && part == 0, end = part + 1 == in_.parts;
        const Output output = {
            in_.scale.data() + row, scale, end ? bias : nullptr, nullptr, start, stream, width_, y, y_stride, 0};
        if (a_.activations == Activations::kFloat) {
          dot_float(first, last, count, output);
        } else {
          dot(group, 1, first, last, row, count, output);
        }
      }
    });
  }

  // kWidth numbers that can be read: a copy where the output ends before. Touches those of the next columns: the scales
  // of a group are far from those of the next one.
  const float* whole_width(const float* values, float* copy) const {
    if (width_ < kWidth) return std::fill(std::copy_n(values, width_, copy), copy + kWidth, 0.0f), copy;
    for (int i = 0; i < kWidth; i += 16) __builtin_prefetch(values + kWidth + i);
    return values;
  }

  int64_t inputs_a_line() const { return kLineBytes * 8 / a_.q.grid.bits / kTileOutputs; }
  const uint8_t* lines(int64_t input) const {
    return tiles_ + input / kTileInputs * tile_bytes(a_.q.grid) + input % kTileInputs / inputs_a_line() * kLineBytes;
  }
  int64_t line_count(int64_t inputs) const { return (inputs + inputs_a_line() - 1) / inputs_a_line(); }

  void dot(int64_t group, int64_t groups, int64_t first, int64_t last, int64_t row, int64_t count, Output output) {
    const bool whole_tiles = first % kTileInputs == 0 && (last % kTileInputs == 0 || last == a_.k) &&
                             (groups == 1 || a_.q.group_size % kTileInputs == 0);
    const int largest_q = a_.activations == Activations::kStatic ? 128 : 127;
    const auto block = [&](int64_t from, int64_t m) {
      const int8_t* q = in_.q.get() + from * in_.stride + first;
      const int32_t* q_sum = in_.q_sum.data() + from * groups_ + group;
      return Dot{lines(first),
                 column_bytes_,
                 columns_,
                 line_count(last - first),
                 whole_tiles,
                 levels_,
                 q,
                 largest_q,
                 in_.stride,
                 q_sum,
                 groups_,
                 m,
                 acc_,
                 groups,
                 a_.q.group_size};
    };
    int32_t offset[kWidth];
    if (in_.zero_point) {  // sum of level * (q - zp) = sum of level * q - zp * sum of level
      const float one = 1.0f;
      float ones[kWidth], level_sum[kWidth];
      std::fill_n(ones, kWidth, 1.0f);
      table_.dot(block(in_.rows, 1), {&one, ones, nullptr, nullptr, true, false, width_, level_sum, kWidth, 0});
      // Exact: kMaxInputs * 127 < 2^24.
      for (int c = 0; c < width_; ++c) offset[c] = in_.zero_point * static_cast<int32_t>(level_sum[c]);
      std::fill(offset + width_, offset + kWidth, 0);
      output.offset = offset;
    }
    table_.dot(block(row, count), output);
  }

  void dot_float(int64_t first, int64_t last, int64_t count, const Output& o) {
    const float* x = in_.x.get() + first;
    table_.dot_float(
        {lines(first), column_bytes_, columns_, line_count(last - first), levels_, x, in_.stride, count, sum_});
    for (int64_t r = 0; r < count; ++r) {
      for (int c = 0; c < width_; ++c) {
        float& y = o.y[r * o.y_stride + c];
        y = (o.first ? 0.0f : y) + sum_[r * kWidth + c] * o.s_w[c];
        if (o.bias) y += o.bias[c];
      }
    }
  }

  const Linear& a_;
  const Inputs& in_;
  const KernelTable& table_;
  const int8_t* levels_;
  const int64_t groups_;
  bool stream_ = false;
  int64_t token_ = 0;
  int columns_ = 0, width_ = 0;
  int64_t n0_ = 0, column_bytes_ = 0;
  const uint8_t* tiles_ = nullptr;
  alignas(64) int32_t acc_[kMaxRows * kWidth];
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
  const int64_t columns = (a.n + kTileOutputs - 1) / kTileOutputs;
  const int64_t count = (columns + kMaxColumns - 1) / kMaxColumns;
  // Tokens whose activations stay in the second-level cache while all columns pass by.
  const int64_t rows = a.k <= kLongRow ? kMaxRows : kMaxRows / 2;
  static thread_local Inputs kept;
  Inputs& in = kept;  // in other threads `kept` would be theirs
  for (int64_t token = 0; token < a.m; token += rows) {
    in.prepare(a, *table, token, std::min(rows, a.m - token), parallel);
    const int64_t work = std::max<int64_t>(1, in.rows * in.stride * kTileOutputs * kMaxColumns);
    parallel(count, std::max<int64_t>(1, kMinThreadWork / work), [&](int64_t begin, int64_t end) {
      Blocks blocks(a, in, *table, a.q.grid.bits == 4 ? levels : nullptr,
                    groups);  // 390 KB, mostly untouched: the stack of any thread has them
      for (int64_t i = begin; i < end; ++i) {
        blocks.run(token, i * kMaxColumns, std::min<int64_t>(kMaxColumns, columns - i * kMaxColumns));
      }
    });
  }
  return {};
}

}  // namespace potqat
