// Rows of any float dtype and stride to float32 and back, and what every loop over rows shares.
#include <bit>
#include <cmath>
#include <cstring>
#include <mutex>

#include "grid.h"
#include "kernels/kernel.h"

namespace potqat {
namespace {

float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::ldexp(float(mantissa), -24)));
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t float_to_half(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and up round to infinity
  if (magnitude < 0x38800000) {                       // below 2^-14: subnormal, in steps of 2^-24, half to even
    return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(std::bit_cast<float>(magnitude), 24)));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

uint16_t float_to_bfloat16(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float read(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[i];
    case DType::kBFloat16:
      return std::bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16);
    case DType::kFloat16:
      return half_to_float(static_cast<const uint16_t*>(data)[i]);
  }
  return 0;
}

}  // namespace

float absmax(const float* w, int64_t count) { return table_or_scalar().absmax(w, count); }

bool bad_scale(float scale) { return !(scale > 0) || std::isinf(scale); }

const float* view_row(const Matrix& w, int64_t row, float* buffer) {
  const int64_t start = row * w.row_stride;
  if (w.dtype == DType::kFloat32 && w.col_stride == 1) return static_cast<const float*>(w.data) + start;
  for (int64_t j = 0; j < w.cols; ++j) buffer[j] = read(w.data, w.dtype, start + j * w.col_stride);
  return buffer;
}

bool all_finite(const float* values, int64_t count, int64_t* at) {
  if (std::isfinite(absmax(values, count))) return true;
  for (*at = 0; std::isfinite(values[*at]); ++*at) {
  }
  return false;
}

void store(const float* values, int64_t count, DType dtype, void* out, int64_t offset) {
  if (dtype == DType::kFloat32) {
    if (count) std::memcpy(static_cast<float*>(out) + offset, values, count * sizeof(float));
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(out) + offset;
  for (int64_t j = 0; j < count; ++j) {
    half[j] = dtype == DType::kBFloat16 ? float_to_bfloat16(values[j]) : float_to_half(values[j]);
  }
}

void FirstError::report(const Status& status) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (status_.ok() || status.row < status_.row) status_ = status;
}

}  // namespace potqat
