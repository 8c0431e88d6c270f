// What the blocks of a linear layer read: the activations of some tokens, quantized and padded.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "kernels/kernel.h"
#include "potqat.h"

namespace potqat {

// Numbers that start at a cache line (a tile load that straddles two takes twice the time), in memory that is kept.
template <class T>
class Kept {
 public:
  T* get() const { return data_.get(); }
  void need(int64_t count) {
    if (count <= count_) return;
    count_ = 0;
    data_.reset();
    data_.reset(static_cast<T*>(::operator new[](count * sizeof(T), kCacheLine)));
    count_ = count;
  }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  struct Free {
    void operator()(T* data) const { ::operator delete[](data, kCacheLine); }
  };
  std::unique_ptr<T[], Free> data_;
  int64_t count_ = 0;
};

// Padded with zeros to whole tiles of inputs, and by rows (kRowPadding). One is used again for the next tokens and the
// next layer: fresh memory is a page fault for every 4 KiB, a fifth of the time of 512 tokens through 768 outputs.
struct Inputs {
  int64_t rows = 0;
  int64_t stride = 0;          // inputs, padded
  Kept<int8_t> q;              // [rows, stride]; where a zero point needs sums of levels, row `rows` is ones
  std::vector<int32_t> q_sum;  // [rows, groups]
  Kept<float> x;               // [rows, stride], float activations
  std::vector<float> scale;    // [rows] s_x; NaN for a row that holds NaN or infinity
  int32_t zero_point = 0;
  int64_t parts = 1;      // 2: row part_rows + r has what row r leaves
  int64_t part_rows = 0;  // padded, so that what is read beyond the last row is there

  // Tokens first to first + count of the layer's.
  void prepare(const Linear& a, const KernelTable& table, int64_t first, int64_t count, const ParallelFor& parallel);
};

}  // namespace potqat
