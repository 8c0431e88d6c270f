// Inside the core: from float weights to levels. One place decides every rounding.
#pragma once

#include <cstdint>
#include <vector>

#include "potqat.h"

namespace potqat {

// Level i is chosen when thresholds[i - 1] <= v < thresholds[i]; thresholds are float32, exact for each rounding.
struct Quantizer {
  std::vector<float> levels;      // ascending, levels[0] = 0
  std::vector<float> thresholds;  // one fewer
  bool unit_steps;                // levels are 0, 1, 2, ...: the index is found by truncation
  bool half_steps;                // and the thresholds 0.5, 1.5, 2.5, ...
  float top() const { return levels.back(); }
};

const Quantizer& quantizer(const Grid& grid, Rounding rounding);

// out[i] = factor * signed level of w[i] for a group with this scale.
void assign_levels(const Quantizer& quantizer, const float* w, int64_t count, float scale, float factor, float* out);

// Largest magnitude; NaN or infinity if there is one.
float absmax(const float* w, int64_t count);

bool bad_scale(float scale);  // not a positive finite number

// Row `row` of w as float32, in place if it is that already, else in `buffer` [cols].
const float* view_row(const Matrix& w, int64_t row, float* buffer);
// Whether all are numbers; else *at is the first NaN or infinity.
bool all_finite(const float* values, int64_t count, int64_t* at);
void store(const float* values, int64_t count, DType dtype, void* out, int64_t offset);

// Calls body(group, begin, end) for each group of a row of k inputs, ascending.
template <class F>
void for_each_group(int64_t k, int64_t group_size, const F& body) {
  const int64_t size = group_size ? group_size : k;
  for (int64_t group = 0, begin = 0; group == 0 || begin < k; ++group, begin += size) {
    body(group, begin, begin + size < k ? begin + size : k);
  }
}

// Collects the first error (in row order) of a parallel loop.
class FirstError {
 public:
  void report(const Status& status);
  Status status() const { return status_; }

 private:
  Status status_;
};

}  // namespace potqat
