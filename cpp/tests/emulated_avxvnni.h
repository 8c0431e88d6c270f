// AVX-VNNI where there is none: included before everything else in kernels/avxvnni.cpp, for its test alone. Processors
// with the instruction are rare where tests run; the kernels around it can be checked on all that have AVX2.
#pragma once

#include <cpuid.h>
#include <immintrin.h>

#define __AVXVNNI__ 1
// The one question that the unit asks: leaf 7.1, bit 4 of eax.
#define __get_cpuid_count(leaf, subleaf, eax, ebx, ecx, edx) (*(eax) = 16, *(ebx) = *(ecx) = *(edx) = 0, 1)

namespace {

__m256i emulated_dpbusd(__m256i sum, __m256i u8, __m256i s8) {
  unsigned sums[8];
  unsigned char a[32];
  signed char b[32];
  __builtin_memcpy(sums, &sum, 32);
  __builtin_memcpy(a, &u8, 32);
  __builtin_memcpy(b, &s8, 32);
  for (int i = 0; i < 32; ++i) sums[i / 4] += static_cast<unsigned>(a[i] * b[i]);
  __builtin_memcpy(&sum, sums, 32);
  return sum;
}

}  // namespace

#define _mm256_dpbusd_avx_epi32 emulated_dpbusd
