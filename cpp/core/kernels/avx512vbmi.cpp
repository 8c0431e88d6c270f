// AVX-512 VNNI and VBMI: levels are looked up by vpermb. Of an index it reads six bits, so with the table four times
// over, the two bits of the neighbour nibble that are left in it do not matter. The kernels are in avx512.inl.
#include <immintrin.h>
#include <string.h>

#include "kernel.h"

namespace potqat {
namespace {

struct Nibbles {
  static constexpr int kParts = 2, kBias = 64;
  __m512i table;
  explicit Nibbles(const int8_t levels[16]) {
    const __m128i level = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
    table = _mm512_broadcast_i32x4(_mm_add_epi8(level, _mm_set1_epi8(kBias)));
  }
  void decode(__m512i bytes, __m512i part[kParts]) const {
    part[0] = _mm512_permutexvar_epi8(bytes, table);
    part[1] = _mm512_permutexvar_epi8(_mm512_srli_epi16(bytes, 4), table);
  }
};

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

}  // namespace
}  // namespace potqat

#include "avx512_elementwise.inl"
#include "avx512.inl"
#include "assign.inl"
#include "calibrate.inl"
#include "avx512_float.inl"

namespace potqat {
const KernelTable kAvx512VbmiTable = {"avx512vbmi", supported, dot,           dot_float, absmax, quantize,
                                      assign,       ste,       squared_error, peak,      read,   kAvx512FewRows};
}  // namespace potqat
