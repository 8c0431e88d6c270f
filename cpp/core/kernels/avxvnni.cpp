// AVX-VNNI: vpdpbusd on 256-bit registers, of processors without AVX-512. The kernels are in avx2.inl.
#include <cpuid.h>
#include <immintrin.h>
#include <string.h>

#include "kernel.h"

#include "assign.inl"
#include "calibrate.inl"
#include "elementwise.inl"
#include "float_lines.inl"
#include "avx2.inl"

namespace potqat {
namespace {

struct Bytes {
  static constexpr int kParts = 1, kBias = 128;
  void decode(__m256i bytes, __m256i part[kParts]) const {
    part[0] = _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(128)));
  }
};

void dot(const Dot& d, const Output& output) {
  d.levels ? dot_with<0>(Nibbles(d.levels), d, output) : dot_with<0>(Bytes(), d, output);
}

// avx2 stands for the operating system's part: that it keeps the 256-bit registers.
bool supported() {
  if (!__builtin_cpu_supports("avx2")) return false;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}

}  // namespace

const KernelTable kAvxVnniTable = {"avxvnni", supported, dot,           dot_float, absmax, quantize,
                                   assign,    ste,       squared_error, peak,      read,   kFewRowsTwice};

}  // namespace potqat
