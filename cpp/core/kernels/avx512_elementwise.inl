// What surrounds the integer dot products (see elementwise.inl, whose bits these are), 16 numbers at a time.

// Loops over registers must be gone before GCC decides what lives in memory.
#define UNROLL _Pragma("GCC unroll 8")
// And what holds registers must not be handed over in memory.
#define ALWAYS_INLINE __attribute__((always_inline))

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
struct Quantize {
  static constexpr int kLargerMagnitude = 0b1011;  // of vrangeps
  __m512 least, most, divisor, factor, near_half = _mm512_set1_ps(0.5f - 0x1p-13f);
  __m512i zero, total = _mm512_setzero_si512();
  bool divide;

  ALWAYS_INLINE Quantize(float scale, float low, float high, int32_t zero_point)
      : least(_mm512_set1_ps(low)),
        most(_mm512_set1_ps(high)),
        divisor(_mm512_set1_ps(scale)),
        factor(_mm512_set1_ps(1.0f / scale)),
        zero(_mm512_set1_epi32(zero_point)),
        divide(scale < 0x1p-126f || 1.0f / scale < 0x1p-126f) {}

  __m512 clamp(__m512 v) const { return symmetric ? v : _mm512_min_ps(_mm512_max_ps(v, least), most); }

  ALWAYS_INLINE __m512i codes(const __m512 x[4]) const {
    __m512 off[4];
    __m512i code[4];
    UNROLL for (int i = 0; i < 4; ++i) {
      const __m512 v = clamp(_mm512_mul_ps(x[i], factor));
      code[i] = _mm512_cvt_roundps_epi32(v, kRound);
      off[i] = _mm512_reduce_ps(v, kRound);
    }
    const __m512 farthest = _mm512_range_ps(_mm512_range_ps(off[0], off[1], kLargerMagnitude),
                                            _mm512_range_ps(off[2], off[3], kLargerMagnitude), kLargerMagnitude);
    if (divide || _mm512_cmp_ps_mask(farthest, near_half, _CMP_GT_OQ)) {
      UNROLL for (int i = 0; i < 4; ++i) {
        code[i] = _mm512_cvt_roundps_epi32(clamp(_mm512_div_ps(x[i], divisor)), kRound);
      }
    }
    UNROLL for (int i = 0; i < 4; ++i) code[i] = symmetric ? code[i] : _mm512_add_epi32(code[i], zero);
    return to_bytes(code);
  }

  ALWAYS_INLINE int32_t operator()(const float* x, int64_t count, int8_t* q) {
    __m512 value[4];
    int64_t j = 0;
    for (; j + 64 <= count; j += 64) {
      UNROLL for (int i = 0; i < 4; ++i) {
        // What follows is most often the next row.
        _mm_prefetch(x + count + j + 16 * i, _MM_HINT_T0);
        value[i] = _mm512_loadu_ps(x + j + 16 * i);
      }
      const __m512i bytes = codes(value);
      total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), bytes);
      _mm512_storeu_si512(q + j, bytes);
    }
    if (j < count) {
      const __mmask64 used = (1ull << (count - j)) - 1;
      UNROLL for (int i = 0; i < 4; ++i) value[i] = _mm512_maskz_loadu_ps(used >> 16 * i, x + j + 16 * i);
      const __m512i bytes = _mm512_maskz_mov_epi8(used, codes(value));
      total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), bytes);
      _mm512_mask_storeu_epi8(q + j, used, bytes);
    }
    return _mm512_reduce_add_epi32(total);
  }
};

int32_t quantize(const float* x, int64_t count, float scale, float low, float high, int32_t zero_point, int8_t* q) {
  // With these bounds x is within 127 scales, and a unit or two in the last place: it rounds to 127 at most.
  const bool symmetric = low == -127 && high == 127 && zero_point == 0;
  return symmetric ? Quantize<true>(scale, low, high, zero_point)(x, count, q)
                   : Quantize<false>(scale, low, high, zero_point)(x, count, q);
}

// Rows of sums to y, in COLUMNS columns of tiles from `column` on, added to `from` if they are not the FIRST. Adding
// zero turns a bias of minus zero into zero; the sum with it is then (0 + product) + bias, as the other units have it.
template <int COLUMNS, bool FIRST, bool STREAM>
struct Scale {
  float* y;
  const float* from;
  int64_t y_stride, from_stride;
  const float* s_x;
  __mmask16 used[COLUMNS];
  __m512 s_w[COLUMNS], bias[COLUMNS];
  __m512i offset[COLUMNS];

  ALWAYS_INLINE Scale(const Output& o, int column)
      : y(o.y + 16 * column), from(y), y_stride(o.y_stride), from_stride(o.y_stride), s_x(o.s_x) {
    UNROLL for (int c = 0; c < COLUMNS; ++c) {
      const int at = 16 * (column + c);
      used[c] = first_lanes(o.width - at);
      s_w[c] = _mm512_maskz_loadu_ps(used[c], o.s_w + at);
      bias[c] = _mm512_setzero_ps();
      if (o.bias) bias[c] = _mm512_add_ps(_mm512_maskz_loadu_ps(used[c], o.bias + at), bias[c]);
      offset[c] = o.offset ? _mm512_loadu_si512(o.offset + at) : _mm512_setzero_si512();
    }
  }
  ALWAYS_INLINE void row(const int32_t* acc, int64_t r) const {
    const __m512 token = _mm512_set1_ps(s_x[r]);
    float* to = y + r * y_stride;
    UNROLL for (int c = 0; c < COLUMNS; ++c) {
      const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(acc + 16 * c), offset[c]);
      __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(token, s_w[c]));
      if (!FIRST) product = _mm512_add_ps(_mm512_maskz_loadu_ps(used[c], from + r * from_stride + 16 * c), product);
      const __m512 out = _mm512_add_ps(product, bias[c]);
      if (STREAM && used[c]) {
        _mm512_stream_ps(to + 16 * c, out);
      } else {
        _mm512_mask_storeu_ps(to + 16 * c, used[c], out);
      }
    }
  }
};

template <int COLUMNS, class Body>
void with_scale(const Output& o, int column, const Body& body) {
  if (o.stream) {
    o.first ? body(Scale<COLUMNS, true, true>(o, column)) : body(Scale<COLUMNS, false, true>(o, column));
  } else {
    o.first ? body(Scale<COLUMNS, true, false>(o, column)) : body(Scale<COLUMNS, false, false>(o, column));
  }
}

// What was written around the cache is there for other threads.
void finish(const Output& o) {
  if (o.stream) _mm_sfence();
}

}  // namespace
}  // namespace potqat
