// AMX int8 for eight rows and more, AVX-512 VBMI below. A tile register takes 16 rows of 64 bytes, and a 512-byte tile
// of 4-bit codes, looked up, is one: line j becomes rows 2j and 2j + 1, four inputs of 16 outputs each. int8 tiles are
// read as they are. Two columns of tiles are looked up once into a panel in the first-level cache and used for all
// rows; tdpbssd takes signed operands, so there is no bias.
#include <cpuid.h>
#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernel.h"

#include "assign.inl"
#include "avx512_elementwise.inl"
#include "avx512_float.inl"

namespace potqat {
namespace {

constexpr int kLeastRows = 8;    // fewer are faster without tiles, which take the time of 16 rows whatever is in them
constexpr int kPair = 2;         // columns of tiles, and tiles of rows, under way at once: 4 sums
constexpr int kPanelTiles = 16;  // 1024 inputs: 32 KiB
constexpr int kTileBytes = 1024;

// Registers: 0..3 sums [row tile][column], 4..5 activations, 6..7 weights; all 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC 12's _tile_loadconfig tells the compiler of 8 of the 64 bytes that it reads.
void load_config(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }

// The tile intrinsics do not tell which memory they read and write.
void settle() { asm volatile("" : : : "memory"); }

void look_up(__m512i table, const uint8_t* lines, uint8_t* tile) {
  for (int j = 0; j < 8; ++j) {
    const __m512i bytes = _mm512_loadu_si512(lines + 64 * j);
    _mm512_store_si512(tile + 128 * j, _mm512_permutexvar_epi8(bytes, table));
    _mm512_store_si512(tile + 128 * j + 64, _mm512_permutexvar_epi8(_mm512_srli_epi16(bytes, 4), table));
  }
}

// Up to 32 rows times two columns over `tiles` tiles of 64 inputs: acc = or += .
template <int ROW_TILES>
void pair_of_columns(const uint8_t* const weights[kPair], int64_t tiles, const int8_t* q, int64_t q_stride, bool first,
                     int32_t* acc) {
  constexpr int64_t kAccBytes = kWidth * sizeof(int32_t), kLower = 16 * kWidth;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if (ROW_TILES > 1) _tile_zero(2);
    if (ROW_TILES > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, acc, kAccBytes);
    _tile_loadd(1, acc + 16, kAccBytes);
    if (ROW_TILES > 1) _tile_loadd(2, acc + kLower, kAccBytes);
    if (ROW_TILES > 1) _tile_loadd(3, acc + kLower + 16, kAccBytes);
  }
  for (int64_t t = 0; t < tiles; ++t) {
    _tile_loadd(4, q + 64 * t, q_stride);
    _tile_loadd(6, weights[0] + kTileBytes * t, 64);
    _tile_loadd(7, weights[1] + kTileBytes * t, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if (ROW_TILES > 1) {
      _tile_loadd(5, q + 16 * q_stride + 64 * t, q_stride);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, acc, kAccBytes);
  _tile_stored(1, acc + 16, kAccBytes);
  if (ROW_TILES > 1) _tile_stored(2, acc + kLower, kAccBytes);
  if (ROW_TILES > 1) _tile_stored(3, acc + kLower + 16, kAccBytes);
}

void dot(const Dot& d, const Output& output) {
  if (d.m < kLeastRows || !d.whole_tiles) return kAvx512VbmiTable.dot(d, output);
  const TileConfig config;
  load_config(config);
  __m512i table = _mm512_setzero_si512();
  if (d.levels) table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(d.levels)));
  alignas(64) uint8_t panel[kPair][kPanelTiles * kTileBytes];
  const int lines_a_tile = d.levels ? 8 : 16;
  const int64_t all = (d.line_count + lines_a_tile - 1) / lines_a_tile;
  for (int column = 0; column < d.columns; column += kPair) {
    for (int64_t t0 = 0; t0 == 0 || t0 < all; t0 += kPanelTiles) {
      const int64_t tiles = all - t0 < kPanelTiles ? all - t0 : kPanelTiles;
      const uint8_t* weights[kPair];
      for (int c = 0; c < kPair; ++c) {
        const int from = column + c < d.columns ? column + c : column;  // acc has room for a column that is not there
        weights[c] = d.lines + from * d.column_bytes + t0 * lines_a_tile * 64;
        if (!d.levels) continue;
        for (int64_t t = 0; t < tiles; ++t) look_up(table, weights[c] + t * 512, panel[c] + t * kTileBytes);
        weights[c] = panel[c];
      }
      settle();
      for (int64_t r = 0; r < d.m; r += 32) {
        const int8_t* q = d.q + r * d.q_stride + t0 * 64;
        int32_t* acc = d.acc + r * kWidth + 16 * column;
        if (d.m - r > 16) {
          pair_of_columns<2>(weights, tiles, q, d.q_stride, t0 == 0, acc);
        } else {
          pair_of_columns<1>(weights, tiles, q, d.q_stride, t0 == 0, acc);
        }
      }
      settle();
    }
  }
  _tile_release();
  scale(d.acc, 0, d.m, output);
}

// The kernel gives a process the use of tile data on request.
bool supported() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  if (!kAvx512VbmiTable.supported()) return false;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool tiles = edx >> 24 & 1, int8 = edx >> 25 & 1;
  return tiles && int8 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace
}  // namespace potqat

#include "calibrate.inl"

namespace potqat {
const KernelTable kAmxTable = {"amx", supported, dot, dot_float, absmax, quantize, assign, ste, peak, read};
}  // namespace potqat
