// What a core can do at most, as the denominators of benchmarks: `peak` runs the unit's dot-product instruction on
// registers alone, `read` streams memory through registers. Included by each ISA unit (amx.cpp: after its tile
// configuration), which compiles them with its own flags.

namespace potqat {
namespace {

#if defined(__AMX_INT8__)

// Four sums of 16 x 16, two operands of each side, as in the kernel: 16 * 16 * 64 multiply-adds each.
int64_t peak(int64_t rounds) {
  const TileConfig config;
  load_config(config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbssd(0, 4, 6);  // volatile: neither moved out of the loop nor dropped
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return rounds * 4 * 16 * 16 * 64;
}

#else

#if defined(__AVX512VNNI__)
using Sum = __m512i;
constexpr int kDots = 64;  // multiply-adds an instruction
Sum dot_step(Sum sum, Sum u8, Sum s8) { return _mm512_dpbusd_epi32(sum, u8, s8); }
#define IN_REGISTER "+v"
#elif defined(__AVXVNNI__)
using Sum = __m256i;
constexpr int kDots = 32;
Sum dot_step(Sum sum, Sum u8, Sum s8) { return _mm256_dpbusd_avx_epi32(sum, u8, s8); }
#define IN_REGISTER "+x"
#elif defined(__AVX2__)
using Sum = __m256i;
constexpr int kDots = 32;
Sum dot_step(Sum sum, Sum u8, Sum s8) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u8, s8), _mm256_set1_epi16(1)));
}
#define IN_REGISTER "+x"
#elif defined(__ARM_FEATURE_MATMUL_INT8)
using Sum = int32x4_t;
constexpr int kDots = 32;
Sum dot_step(Sum sum, Sum a, Sum b) { return vmmlaq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)); }
#define IN_REGISTER "+w"
#elif defined(__ARM_FEATURE_DOTPROD)
using Sum = int32x4_t;
constexpr int kDots = 16;
Sum dot_step(Sum sum, Sum a, Sum b) { return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)); }
#define IN_REGISTER "+w"
#else
using Sum = int32_t;
constexpr int kDots = 1;
Sum dot_step(Sum sum, Sum a, Sum b) { return sum + a * b; }
#define IN_REGISTER "+r"
#endif

// Independent sums, enough for the instruction's latency; the operands change, for all that the compiler knows.
int64_t peak(int64_t rounds) {
  constexpr int kSums = sizeof(Sum) > 4 ? 12 : 4;
  Sum sum[kSums] = {}, a = {}, b = {};
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) {
      asm volatile("" : IN_REGISTER(a), IN_REGISTER(b));
      sum[i] = dot_step(sum[i], a, b);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) asm volatile("" : IN_REGISTER(sum[i]));
  return rounds * kSums * kDots;
}
#undef IN_REGISTER

#endif

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Exclusive or of all 8-byte words (the last filled up with zero). Lines of kStreams places are read in turn, as
// prefetching by the hardware ends with a page.
uint64_t read(const uint8_t* data, int64_t bytes) {
  typedef uint64_t Vector __attribute__((vector_size(kVectorBytes), may_alias));
  typedef Vector AnyAddress __attribute__((aligned(1)));
  constexpr int64_t kStreams = 4, kLine = 64;
  const int64_t stream = bytes / (kStreams * kLine) * kLine;
  Vector sum[kStreams] = {};
  for (int64_t at = 0; at < stream; at += kLine) {
#pragma GCC unroll 4
    for (int64_t s = 0; s < kStreams; ++s) {
#pragma GCC unroll 4
      for (int64_t part = 0; part < kLine; part += kVectorBytes) {
        sum[s] ^= *reinterpret_cast<const AnyAddress*>(data + s * stream + at + part);
      }
    }
  }
  uint64_t all = 0;
  for (const Vector& s : sum) {
    for (int word = 0; word < kVectorBytes / 8; ++word) all ^= s[word];
  }
  for (int64_t at = kStreams * stream; at < bytes; at += 8) {
    uint64_t word = 0;
    memcpy(&word, data + at, bytes - at < 8 ? bytes - at : 8);
    all ^= word;
  }
  return all;
}

}  // namespace
}  // namespace potqat
