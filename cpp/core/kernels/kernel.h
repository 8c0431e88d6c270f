// The table that each instruction set fills in. Included by the ISA units, so: no std containers, no inline functions.
#pragma once

#include <stdint.h>

namespace potqat {

constexpr int kMaxRows = 512;             // rows of activations in one call at most
constexpr int kMaxColumns = 4;            // columns of tiles (16 outputs each) in one call at most
constexpr int kWidth = 16 * kMaxColumns;  // elements from one row of acc or y to the next
constexpr int kAvx512FewRows = 12;        // up to here its sums stay in registers, in two passes
constexpr int kManyRows = 8;              // from here on units with tiles use them
constexpr int kGroupedInputs = 4096;      // in one call with several groups at most
constexpr int kRowPadding = 16;           // of many rows q has room for whole multiples, of fewer for pairs

// A block of the integer product: a run of lines (see potqat.h) of neighbouring columns of tiles, and rows of q.
//   acc[r * kWidth + 16 * column + c] = sum over the run's inputs of level * q[r * q_stride + input], exact.
// acc is room to work in; what counts is what becomes of it, see Output.
struct Dot {
  const uint8_t* lines;  // the run's first line in the first column
  int64_t column_bytes;  // from one column of tiles to the next
  int columns;           // 1 .. kMaxColumns
  int64_t line_count;    // of 8 inputs, or 4 for int8
  bool whole_tiles;      // the run and its groups start at tiles, and what follows in its last tile is zero
  const int8_t* levels;  // signed value of each nibble; null: the codes are int8 levels themselves
  const int8_t* q;       // first input of the run
  int largest_q;         // |q| at most
  int64_t q_stride;
  const int32_t* q_sum;  // sum of q over the run: kernels that bias an unsigned operand take it off again
  int64_t q_sum_stride;
  int64_t m;  // 1 .. kMaxRows
  int32_t* acc;
  int64_t groups;        // in the run; more than one only where the table takes groups together
  int64_t group_inputs;  // the last group may have fewer
};

// y[r][c] = (first ? 0 : y[r][c]) + float(acc[r][c] - offset[c]) * (s_x[r] * s_w[c]), and + bias[c]; every operation
// rounded. A kernel does it for a few rows at a time, while their sums are in the cache.
struct Output {
  const float* s_x;       // [m]
  const float* s_w;       // [kWidth]; of several groups [groups, width], s_w_stride apart
  const float* bias;      // [kWidth] or null; [width] with several groups
  const int32_t* offset;  // [kWidth] or null
  bool first;
  bool stream;  // y is more than a cache holds: write around it; lines are whole and aligned then
  int width;    // outputs, 1 .. 16 * columns
  float* y;
  int64_t y_stride;
  int64_t s_w_stride;
};

// The integer product with float activations: products are rounded, then added, inputs ascending.
struct DotFloat {
  const uint8_t* lines;
  int64_t column_bytes;
  int columns;
  int64_t line_count;
  const int8_t* levels;
  const float* x;
  int64_t x_stride;
  int64_t m;
  float* acc;
};

// A grid with a rounding: level i for thresholds[i - 1] <= v < thresholds[i]. `unit_steps`: levels are 0, 1, 2, ...;
// `half_steps`: and threshold i is i + 0.5.
struct Levels {
  const float* levels;      // ascending, levels[0] = 0
  const float* thresholds;  // one fewer
  int count;
  bool unit_steps, half_steps;
};

struct KernelTable {
  const char* name;
  bool (*supported)();
  void (*dot)(const Dot& block, const Output& output);
  void (*dot_float)(const DotFloat& block);
  // Largest magnitude (its bits ordered as integers: infinity above all numbers, NaN above infinity).
  float (*absmax)(const float* x, int64_t count);
  // q = clamp(round-half-even(x / scale), low, high) + zero_point, for finite x. Returns the sum of q. Where low
  // and high are -127 and 127, |x| is at most 127 scales, give or take the rounding of the scale.
  int32_t (*quantize)(const float* x, int64_t count, float scale, float low, float high, int32_t zero_point, int8_t* q);
  // out = factor * signed level of w / scale.
  void (*assign)(const Levels& levels, const float* w, int64_t count, float scale, float factor, float* out);
  // Straight-through gradient, see potqat.h: dw = g, or 0 beyond the top level if clip. Returns d/dscale, summed in 16
  // interleaved lanes (the same sum everywhere), or 0 if level is null; level: the signed levels of w / scale.
  float (*ste)(const float* g, const float* w, const float* level, int64_t count, float scale, float top, bool clip,
               float* dw);
  // Sum of importance * (w - level * scale)^2 in float64, in 8 interleaved lanes; without importance, all of it is 1.
  double (*squared_error)(const float* w, const float* level, const float* importance, int64_t count, float scale);
  // Calibration: `rounds` rounds of the unit's dot-product instruction on registers. Returns the multiply-adds done.
  int64_t (*peak)(int64_t rounds);
  // Calibration: exclusive or of the 8-byte words of a buffer, as fast as memory gives them.
  uint64_t (*read)(const uint8_t* data, int64_t bytes);
  // dot takes several groups at once, without an offset: y is the sum over them, in order. Up to so many rows, and from
  // kManyRows rows on where groups are whole tiles.
  int64_t few_rows_grouped = 0;
  bool many_rows_grouped = false;
};

extern const KernelTable kScalarTable;
#ifdef POTQAT_X86
extern const KernelTable kAvx2Table;
extern const KernelTable kAvxVnniTable;
extern const KernelTable kAvx512VnniTable;
extern const KernelTable kAvx512VbmiTable;
extern const KernelTable kAmxTable;
#endif
#ifdef POTQAT_AARCH64
extern const KernelTable kNeonDotTable;
extern const KernelTable kNeonI8mmTable;
#endif

// The active table, or null if POTQAT_ISA is wrong (dispatch.cpp).
const KernelTable* active_table();
// The same, or the scalar table: for what runs before anybody can be told.
const KernelTable& table_or_scalar();

}  // namespace potqat
