// The table that each instruction set fills in. Included by the ISA units, so: no std containers, no inline functions.
#pragma once

#include <stdint.h>

namespace potqat {

constexpr int kMaxTableRows = 64;  // rows of activations a caller passes at most

// The dot functions work on one column of tiles (16 outputs) and a run of lines; see potqat.h for the layout.
// `levels` is the signed value of each nibble. acc is [m][16].
struct KernelTable {
  const char* name;
  bool (*supported)();
  // acc[r][c] = sum over the lines' inputs of level * q[r * q_stride + input], exact.
  // q_sum[r * q_sum_stride] is the sum of those q: kernels that bias their unsigned operand take it off again.
  void (*dot4)(const uint8_t* lines, int64_t line_count, const int8_t levels[16], const int8_t* q, int64_t q_stride,
               const int32_t* q_sum, int64_t q_sum_stride, int64_t m, int32_t* acc);
  void (*dot8)(const uint8_t* lines, int64_t line_count, const int8_t* q, int64_t q_stride, const int32_t* q_sum,
               int64_t q_sum_stride, int64_t m, int32_t* acc);
  // acc[r][c] = sum of x * level in float32, k ascending, every product rounded before it is added.
  void (*dot4_float)(const uint8_t* lines, int64_t line_count, const int8_t levels[16], const float* x,
                     int64_t x_stride, int64_t m, float* acc);
  void (*dot8_float)(const uint8_t* lines, int64_t line_count, const float* x, int64_t x_stride, int64_t m, float* acc);
  // q = clamp(round-half-even(x / scale), low, high) + zero_point, for finite x.
  void (*quantize)(const float* x, int64_t count, float scale, float low, float high, int32_t zero_point, int8_t* q);
  // y[r][c] += float(acc[r][c]) * (s_x[r] * s_w[c]), every operation rounded.
  void (*add_scaled)(const int32_t* acc, int64_t m, const float* s_x, const float s_w[16], float* y);
};

extern const KernelTable kScalarTable;
#ifdef POTQAT_X86
extern const KernelTable kAvx2Table;
extern const KernelTable kAvx512VnniTable;
#endif

// The active table, or null if POTQAT_ISA is wrong (dispatch.cpp).
const KernelTable* active_table();

}  // namespace potqat
