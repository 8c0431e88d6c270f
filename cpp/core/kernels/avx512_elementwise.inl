// What surrounds the integer dot products (see elementwise.inl, whose bits these are), 16 numbers at a time.

// Loops over registers must be gone before GCC decides what lives in memory.
#define UNROLL _Pragma("GCC unroll 8")

namespace potqat {
namespace {

__mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0; }

float absmax(const float* x, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most[4] = {};  // magnitudes are ordered as integers
  for (int64_t j = 0; j < count; j += 64) {
    UNROLL for (int i = 0; i < 4; ++i) {
      const __m512i bits = _mm512_maskz_loadu_epi32(first_lanes(count - j - 16 * i), x + j + 16 * i);
      most[i] = _mm512_max_epi32(most[i], _mm512_and_si512(bits, magnitude));
    }
  }
  const __m512i all = _mm512_max_epi32(_mm512_max_epi32(most[0], most[1]), _mm512_max_epi32(most[2], most[3]));
  const int32_t bits = _mm512_reduce_max_epi32(all);
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// 64 int32 in the range of int8 to bytes: the packs work within 128 bits, so dwords are put in order afterwards.
__m512i to_bytes(const __m512i v[4]) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_packs_epi32(v[0], v[1]), high = _mm512_packs_epi32(v[2], v[3]);
  return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
}

constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// A division takes as long as 16 multiplications. The product with the reciprocal errs by less than 2 units in the last
// place, 2^-14 where |quotient| is at most 512: it rounds otherwise only near a half. 64 numbers that hold such a
// quotient (1 in 60) are divided after all. Reciprocals that are not normal numbers err more.
// `symmetric`: no quotient is beyond the bounds, and there is no zero point.
template <bool symmetric>
int32_t quantize_as(const float* x, int64_t count, float scale, float low, float high, int32_t zero_point, int8_t* q) {
  constexpr int kLargerMagnitude = 0b1011;  // of vrangeps
  const __m512 least = _mm512_set1_ps(low), most = _mm512_set1_ps(high), divisor = _mm512_set1_ps(scale);
  const __m512 factor = _mm512_set1_ps(1.0f / scale), near_half = _mm512_set1_ps(0.5f - 0x1p-13f);
  const __m512i zero = _mm512_set1_epi32(zero_point);
  const bool divide = scale < 0x1p-126f || 1.0f / scale < 0x1p-126f;
  const auto clamp = [=](__m512 v) { return symmetric ? v : _mm512_min_ps(_mm512_max_ps(v, least), most); };
  __m512i total = _mm512_setzero_si512();
  for (int64_t j = 0; j < count; j += 64) {
    const int64_t left = count - j;
    const __mmask64 used = left >= 64 ? ~0ull : (1ull << left) - 1;
    __m512 value[4], farthest = _mm512_setzero_ps();
    __m512i code[4];
    UNROLL for (int i = 0; i < 4; ++i) {
      value[i] = _mm512_maskz_loadu_ps(used >> 16 * i, x + j + 16 * i);
      const __m512 v = clamp(_mm512_mul_ps(value[i], factor));
      code[i] = _mm512_cvt_roundps_epi32(v, kRound);
      farthest = _mm512_range_ps(farthest, _mm512_sub_ps(v, _mm512_cvtepi32_ps(code[i])), kLargerMagnitude);
    }
    if (divide || _mm512_cmp_ps_mask(farthest, near_half, _CMP_GT_OQ)) {
      UNROLL for (int i = 0; i < 4; ++i) {
        code[i] = _mm512_cvt_roundps_epi32(clamp(_mm512_div_ps(value[i], divisor)), kRound);
      }
    }
    UNROLL for (int i = 0; i < 4; ++i) code[i] = symmetric ? code[i] : _mm512_add_epi32(code[i], zero);
    const __m512i bytes = _mm512_maskz_mov_epi8(used, to_bytes(code));
    total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), bytes);
    _mm512_mask_storeu_epi8(q + j, used, bytes);
  }
  return _mm512_reduce_add_epi32(total);
}

int32_t quantize(const float* x, int64_t count, float scale, float low, float high, int32_t zero_point, int8_t* q) {
  // With these bounds x is within 127 scales, and a unit or two in the last place: it rounds to 127 at most.
  const bool symmetric = low == -127 && high == 127 && zero_point == 0;
  return (symmetric ? quantize_as<true> : quantize_as<false>)(x, count, scale, low, high, zero_point, q);
}

// Rows row .. row + rows of acc to y. Where there is no bias zero is added, which changes no bit: the sum before it
// started from zero, and so is never minus zero.
template <bool FIRST, bool STREAM>
void scale_as(const int32_t* acc, int64_t row, int64_t rows, const Output& o) {
  __mmask16 used[kMaxColumns];
  __m512 s_w[kMaxColumns], bias[kMaxColumns];
  __m512i offset[kMaxColumns];
  for (int c = 0; c < kMaxColumns; ++c) {
    used[c] = first_lanes(o.width - 16 * c);
    s_w[c] = _mm512_loadu_ps(o.s_w + 16 * c);
    bias[c] = o.bias ? _mm512_loadu_ps(o.bias + 16 * c) : _mm512_setzero_ps();
    offset[c] = o.offset ? _mm512_loadu_si512(o.offset + 16 * c) : _mm512_setzero_si512();
  }
  for (int64_t r = row; r < row + rows; ++r) {
    const __m512 s_x = _mm512_set1_ps(o.s_x[r]);
    float* y = o.y + r * o.y_stride;
    UNROLL for (int c = 0; c < kMaxColumns; ++c) {
      const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(acc + r * kWidth + 16 * c), offset[c]);
      const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(s_x, s_w[c]));
      const __m512 start = FIRST ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(used[c], y + 16 * c);
      const __m512 out = _mm512_add_ps(_mm512_add_ps(start, product), bias[c]);
      if (STREAM && used[c]) {
        _mm512_stream_ps(y + 16 * c, out);
      } else {
        _mm512_mask_storeu_ps(y + 16 * c, used[c], out);
      }
    }
  }
  if (STREAM) _mm_sfence();
}

void scale(const int32_t* acc, int64_t row, int64_t rows, const Output& o) {
  if (o.stream) {
    o.first ? scale_as<true, true>(acc, row, rows, o) : scale_as<false, true>(acc, row, rows, o);
  } else {
    o.first ? scale_as<true, false>(acc, row, rows, o) : scale_as<false, false>(acc, row, rows, o);
  }
}

}  // namespace
}  // namespace potqat
