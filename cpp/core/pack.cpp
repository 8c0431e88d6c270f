// Codes to bytes and back, the check of foreign bytes, and the embedding lookup. The layout is specified in potqat.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "grid.h"

namespace potqat {
namespace {

// Where input j of output c sits in a column of tiles: a byte, and for 4 bits the shift of its nibble.
struct Place {
  int64_t byte;
  int shift;
};

Place place(const Grid& grid, int64_t c, int64_t j) {
  if (grid.bits == 8) return {(j / 4) * kLineBytes + 4 * c + j % 4, 0};
  return {(j / 8) * kLineBytes + 4 * c + j % 4, static_cast<int>(j / 4 % 2) * 4};
}

// The code of input j of output c.
int code_at(const Grid& grid, const uint8_t* tiles, int64_t c, int64_t j) {
  const Place at = place(grid, c, j);
  return tiles[at.byte] >> at.shift & ((1 << grid.bits) - 1);
}

int minus_zero(const Grid& grid) { return 1 << (grid.bits - 1); }

int64_t tile_column_bytes(const Grid& grid, int64_t k) {
  return (k + kTileInputs - 1) / kTileInputs * tile_bytes(grid);
}

// Codes of the magnitudes of a 4-bit grid, indexed by magnitude (at most 64).
void code_table(const Quantizer& quantizer, uint8_t codes[65]) {
  for (size_t i = 0; i < quantizer.levels.size(); ++i) codes[static_cast<int>(quantizer.levels[i])] = i;
}

// Whether any code of these bytes, whole words at any address, is minus zero: the sign with nothing below it. In each
// code of a word, (rest + all ones) carries into the sign's bit unless rest is 0, and never beyond it.
template <class Word>
bool has_minus_zero(const uint8_t* bytes, int64_t count, const Grid& grid) {
  const Word sign = static_cast<Word>(grid.bits == 8 ? 0x8080808080808080u : 0x8888888888888888u);
  Word good = sign;
  for (int64_t i = 0; i < count; i += sizeof(Word)) {
    Word word;
    std::memcpy(&word, bytes + i, sizeof word);
    good &= ((word & ~sign) + ~sign) | ~word;
  }
  return good != sign;
}

// One output's four bytes of a line: 8 inputs of 4 bits, `values` of each code, or 4 of int8, times s.
void decode_line(const Grid& grid, const uint8_t bytes[4], const float values[16], float s, float* out) {
  for (int i = 0; i < 4; ++i) {
    if (grid.bits == 8) {
      out[i] = static_cast<float>(static_cast<int8_t>(bytes[i])) * s;
    } else {
      out[i] = values[bytes[i] & 15];
      out[4 + i] = values[bytes[i] >> 4];
    }
  }
}

// Row `row` of a packed weight as level * scale, line by line, at which groups begin.
Status decode_row(const uint8_t* packed, const float* scale, const Quantization& q, const Quantizer& quantizer,
                  int64_t n, int64_t k, int64_t row, float* out) {
  const int64_t c = row % kTileOutputs, inputs = q.grid.bits == 8 ? 4 : 8;  // of a line
  const uint8_t* tiles = packed + row / kTileOutputs * tile_column_bytes(q.grid, k);
  Status status;
  for_each_group(k, q.group_size, [&](int64_t group, int64_t first, int64_t last) {
    const float s = scale[group * n + row];
    if (bad_scale(s) && status.ok()) status = {Status::Code::kBadScale, row, group};
    float values[16] = {};
    for (int i = 0; q.grid.bits == 4 && i < 8; ++i) {
      values[i] = quantizer.levels[i] * s;
      values[8 + i] = -quantizer.levels[i] * s;
    }
    for (int64_t j = first; j < last; j += inputs) {
      const uint8_t* bytes = tiles + j / inputs * kLineBytes + 4 * c;
      const int64_t used = last - j < inputs ? last - j : inputs;
      float end[8];
      decode_line(q.grid, bytes, values, s, used == inputs ? out + j : end);
      if (used < inputs) std::copy_n(end, used, out + j);
      if (!has_minus_zero<uint32_t>(bytes, 4, q.grid)) continue;
      for (int64_t i = j; i < j + used && status.ok(); ++i) {
        if (code_at(q.grid, tiles, c, i) == minus_zero(q.grid)) status = {Status::Code::kBadCode, row, i};
      }
    }
  });
  return status;
}

// Where in inputs [first, last) of a column of tiles, whose first `rows` outputs are the weight's, a code is minus
// zero or padding is not zero.
Status find_bad_code(const uint8_t* tiles, const Grid& grid, int64_t rows, int64_t k, int64_t first, int64_t last) {
  for (int64_t c = 0; c < kTileOutputs; ++c) {
    for (int64_t j = first; j < last; ++j) {
      const int code = code_at(grid, tiles, c, j);
      if (c < rows && j < k ? code == minus_zero(grid) : code != 0) return {Status::Code::kBadCode, c, j};
    }
  }
  return {};
}

}  // namespace

Status pack(const Matrix& w, const float* scale, const Quantization& q, uint8_t* packed, const ParallelFor& parallel) {
  const Quantizer& quantizer = potqat::quantizer(q.grid, q.rounding);
  const int64_t column_bytes = tile_column_bytes(q.grid, w.cols);
  uint8_t codes[65] = {};
  if (q.grid.bits == 4) code_table(quantizer, codes);
  FirstError error;
  parallel((w.rows + kTileOutputs - 1) / kTileOutputs, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(w.cols), level(w.cols);
    for (int64_t r = begin * kTileOutputs; r < end * kTileOutputs; ++r) {
      uint8_t* tiles = packed + r / kTileOutputs * column_bytes;
      if (r % kTileOutputs == 0 && column_bytes) std::memset(tiles, 0, column_bytes);
      if (r >= w.rows) continue;
      int64_t col;
      const float* weights = view_row(w, r, row.data());
      if (!all_finite(weights, w.cols, &col)) return error.report({Status::Code::kNotFinite, r, col});
      for_each_group(w.cols, q.group_size, [&](int64_t group, int64_t first, int64_t last) {
        const float s = scale[group * w.rows + r];
        if (bad_scale(s)) return error.report({Status::Code::kBadScale, r, group});
        assign_levels(quantizer, weights + first, last - first, s, 1.0f, level.data() + first);
      });
      for (int64_t j = 0; j < w.cols; ++j) {
        const Place at = place(q.grid, r % kTileOutputs, j);
        const int value = static_cast<int>(level[j]);
        const int code = q.grid.bits == 8 ? value & 255 : codes[std::abs(value)] | (value < 0 ? 8 : 0);
        tiles[at.byte] |= static_cast<uint8_t>(code << at.shift);
      }
    }
  });
  return error.status();
}

Status unpack(const uint8_t* packed, const float* scale, const Quantization& q, int64_t n, int64_t k, float* out,
              const ParallelFor& parallel) {
  const Quantizer& quantizer = potqat::quantizer(q.grid, Rounding::kNearest);
  FirstError error;
  parallel(n, kTileOutputs, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Status status = decode_row(packed, scale, q, quantizer, n, k, r, out + r * k);
      if (!status.ok()) return error.report(status);
    }
  });
  return error.status();
}

Status check_packed(const uint8_t* packed, const Grid& grid, int64_t n, int64_t k, const ParallelFor& parallel) {
  const int64_t column_bytes = tile_column_bytes(grid, k), padded = column_bytes / tile_bytes(grid) * kTileInputs;
  if (k == 0) return {};
  FirstError error;
  parallel((n + kTileOutputs - 1) / kTileOutputs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* tiles = packed + i * column_bytes;
      const int64_t rows = n - i * kTileOutputs;
      const int64_t whole = rows < kTileOutputs ? 0 : k / kTileInputs;  // tiles without padding
      if (!has_minus_zero<uint64_t>(tiles, whole * tile_bytes(grid), grid) &&
          find_bad_code(tiles, grid, rows, k, whole * kTileInputs, padded).ok()) {
        continue;
      }
      Status status = find_bad_code(tiles, grid, rows, k, 0, padded);
      status.row += i * kTileOutputs;
      return error.report(status);
    }
  });
  return error.status();
}

Status embedding(const int64_t* ids, int64_t count, const uint8_t* packed, const float* scale, const Quantization& q,
                 int64_t n, int64_t k, float* out, const ParallelFor& parallel) {
  const Quantizer& quantizer = potqat::quantizer(q.grid, Rounding::kNearest);
  FirstError error;
  parallel(count, kTileOutputs, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (ids[i] < 0 || ids[i] >= n) return error.report({Status::Code::kBadIndex, i, ids[i]});
      const Status status = decode_row(packed, scale, q, quantizer, n, k, ids[i], out + i * k);
      if (!status.ok()) return error.report(status);
    }
  });
  return error.status();
}

}  // namespace potqat
