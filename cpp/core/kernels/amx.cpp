// AMX int8 for eight rows and more, AVX-512 VBMI below. A tile register takes 16 rows of 64 bytes, and a 512-byte tile
// of 4-bit codes, looked up, is one: line j becomes rows 2j and 2j + 1, four inputs of 16 outputs each. int8 tiles are
// read as they are. Two columns of tiles are looked up once into a panel and used for all rows; tdpbssd takes signed
// operands, so there is no bias.
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

constexpr int kPair = 2;         // columns of tiles, and tiles of rows, under way at once: 4 sums
constexpr int kPanelTiles = 64;  // 4096 inputs, 128 KiB: in the second-level cache, but sums stay in registers
constexpr int kTileBytes = 1024;
constexpr int kBlockRows = 16 * kPair;
static_assert(kGroupedInputs <= 64 * kPanelTiles);

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

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void look_up(__m512i table, const uint8_t* lines, uint8_t* tile) {
  for (int j = 0; j < 8; ++j) {
    const __m512i bytes = _mm512_loadu_si512(lines + 64 * j);
    _mm512_store_si512(tile + 128 * j, _mm512_permutexvar_epi8(bytes, table));
    _mm512_store_si512(tile + 128 * j + 64, _mm512_permutexvar_epi8(_mm512_srli_epi16(bytes, 4), table));
  }
}

// Sums of a block that wait to be scaled: a few rows at every step of the next block's products, while the tile unit
// works. Of one group:
template <class Scale>
struct OneGroup {
  const Scale scales[kMaxColumns / kPair];
  const Scale* scale = nullptr;
  const int32_t* sums = nullptr;
  int64_t row = 0, end = 0;

  void next(const int32_t* acc, int column, int64_t r, int64_t rows, int64_t) {
    scale = scales + column / kPair;
    sums = acc;
    row = r;
    end = r + rows;
  }
  void some(int64_t rows) {
    for (const int64_t stop = least(row + rows, end); row < stop; ++row, sums += kWidth) scale->row(sums, row);
  }
};

// Of several groups: before the last one, y is `partial`.
struct Groups {
  const Output& output;
  const int64_t groups;
  int column = 0;
  Output block = {};  // rows from row 0 on
  const int32_t* sums = nullptr;
  const float* from = nullptr;
  int64_t from_stride = 0, row = 0, end = 0;
  alignas(64) float partial[kBlockRows * kWidth];

  Groups(const Output& o, int64_t count) : output(o), groups(count) {}
  void next(const int32_t* acc, int at, int64_t r, int64_t rows, int64_t group) {
    column = at;
    block = output;
    block.s_x += r;
    block.s_w += group * block.s_w_stride;
    block.y += r * block.y_stride;
    block.first = block.first && group == 0;
    from = group ? partial + 16 * column : block.y + 16 * column;
    from_stride = group ? kWidth : block.y_stride;
    if (group + 1 < groups) {
      block.y = partial;
      block.y_stride = kWidth;
      block.bias = nullptr;
      block.stream = false;
    }
    sums = acc;
    row = 0;
    end = rows;
  }
  void some(int64_t rows) {
    if (row == end) return;
    with_scale<kPair>(block, column, [&](auto scale) {
      scale.from = from;
      scale.from_stride = from_stride;
      for (const int64_t stop = least(row + rows, end); row < stop; ++row) scale.row(sums + row * kWidth, row);
    });
  }
};

// Tiles of two columns: tile t of the first at first + t * step, of the second `second` bytes further on.
struct Weights {
  const uint8_t* first;
  int64_t step, second;
};

// Up to 32 rows times two columns over `tiles` tiles of 64 inputs: acc = or += . At every step a few rows of the block
// before are scaled, while the tile unit works.
template <int ROW_TILES, class Waiting>
void pair_of_columns(Weights w, int64_t tiles, const int8_t* q, int64_t q_stride, bool first, int32_t* acc,
                     Waiting& before) {
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
  const int64_t share = tiles ? (before.end - before.row + tiles - 1) / tiles : 0;
  const int8_t* const lower = q + 16 * q_stride;
  for (int64_t at = 0; at < 64 * tiles; at += 64, w.first += w.step) {
    _tile_loadd(4, q + at, q_stride);
    _tile_loadd(6, w.first, 64);
    _tile_loadd(7, w.first + w.second, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if (ROW_TILES > 1) {
      _tile_loadd(5, lower + at, q_stride);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    before.some(share);
  }
  before.some(before.end - before.row);
  settle();
  _tile_stored(0, acc, kAccBytes);
  _tile_stored(1, acc + 16, kAccBytes);
  if (ROW_TILES > 1) _tile_stored(2, acc + kLower, kAccBytes);
  if (ROW_TILES > 1) _tile_stored(3, acc + kLower + 16, kAccBytes);
  settle();
}

// Two columns of tiles from `column` on, all rows.
template <class Waiting>
void two_columns(const Dot& d, __m512i table, int column, Waiting& before) {
  alignas(64) uint8_t panel[kPair * kPanelTiles * kTileBytes];
  const int64_t tile_bytes = d.levels ? 512 : 1024, all = (d.line_count * 64 + tile_bytes - 1) / tile_bytes;
  const int64_t second = column + 1 < d.columns ? d.column_bytes : 0;  // acc has room for a column that is not there
  const bool one_panel = all <= kPanelTiles;
  for (int64_t t0 = 0; t0 == 0 || t0 < all; t0 += kPanelTiles) {
    const int64_t tiles = least(kPanelTiles, all - t0);
    const uint8_t* const codes = d.lines + column * d.column_bytes + t0 * tile_bytes;
    Weights weights = {codes, tile_bytes, second};
    if (d.levels) {
      for (int64_t t = 0; t < tiles; ++t) {
        look_up(table, codes + t * tile_bytes, panel + t * kPair * kTileBytes);
        look_up(table, codes + t * tile_bytes + second, panel + t * kPair * kTileBytes + kTileBytes);
      }
      weights = {panel, kPair * kTileBytes, kTileBytes};
    }
    settle();
    for (int64_t r = 0; r < d.m; r += kBlockRows) {
      const int64_t rows = least(kBlockRows, d.m - r);
      for (int64_t group = 0; group < d.groups; ++group) {
        const int64_t group_tiles = d.group_inputs / 64, first = group * group_tiles;
        const int64_t count = d.groups > 1 ? least(group_tiles, all - first) : tiles;
        const int8_t* q = d.q + r * d.q_stride + (t0 + first) * 64;
        const Weights part = {weights.first + first * weights.step, weights.step, weights.second};
        // Sums of one panel only pass through: those before are out of the way when a block is done.
        int32_t* acc = d.acc + (one_panel ? 0 : r * kWidth);
        if (rows > 16) {
          pair_of_columns<2>(part, count, q, d.q_stride, t0 == 0, acc, before);
        } else {
          pair_of_columns<1>(part, count, q, d.q_stride, t0 == 0, acc, before);
        }
        if (t0 + tiles >= all) before.next(acc, column, r, rows, group);
      }
    }
  }
}

template <class Waiting>
void all_columns(const Dot& d, __m512i table, Waiting waiting) {
  for (int column = 0; column < d.columns; column += kPair) two_columns(d, table, column, waiting);
  waiting.some(waiting.end - waiting.row);
}

void dot(const Dot& d, const Output& output) {
  if (d.m < kManyRows || !d.whole_tiles) return kAvx512VbmiTable.dot(d, output);
  const TileConfig config;
  load_config(config);
  __m512i table = _mm512_setzero_si512();
  if (d.levels) table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(d.levels)));
  if (d.groups > 1) {
    all_columns(d, table, Groups(output, d.groups));
  } else {
    with_scale<kPair>(output, 0, [&]<class Scale>(const Scale& first) {
      all_columns(d, table, OneGroup<Scale>{{first, Scale(output, kPair)}});
    });
  }
  _tile_release();
  finish(output);
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
const KernelTable kAmxTable = {"amx", supported,     dot,  dot_float, absmax,         quantize, assign,
                               ste,   squared_error, peak, read,      kAvx512FewRows, true};
}  // namespace potqat
