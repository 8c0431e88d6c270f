// Grids and roundings as threshold tables, and the level of each weight by them.
#include "grid.h"

#include <cmath>
#include <limits>
#include <map>
#include <mutex>

#include "kernels/kernel.h"

namespace potqat {
namespace {

std::vector<float> make_levels(const Grid& grid) {
  switch (grid.kind) {
    case Grid::Kind::kE2m1:
      return {0, 1, 2, 3, 4, 6, 8, 12};
    case Grid::Kind::kInt4:
    case Grid::Kind::kInt8: {
      std::vector<float> levels(grid.kind == Grid::Kind::kInt4 ? 8 : 128);
      for (size_t i = 0; i < levels.size(); ++i) levels[i] = static_cast<float>(i);
      return levels;
    }
    case Grid::Kind::kPot: {
      std::vector<float> levels = {0};
      for (int e = 0; e <= grid.top_exponent; ++e) levels.push_back(std::ldexp(1.0f, e));
      return levels;
    }
  }
  return {};
}

// Smallest float32 that is at least `value`.
float ceil_to_float(double value) {
  const float f = static_cast<float>(value);
  return f < value ? std::nextafter(f, std::numeric_limits<float>::infinity()) : f;
}

// Nearest in the log domain: the geometric mean, never itself a float for neighbouring levels; 0.5 next to zero.
double log_boundary(float low, float high) { return low == 0 ? 0.5 : std::sqrt(static_cast<double>(low) * high); }

float threshold(float low, float high, Rounding rounding) {
  switch (rounding) {
    case Rounding::kNearest:
      return static_cast<float>((static_cast<double>(low) + high) / 2);  // ties to the larger
    case Rounding::kLog:
      return ceil_to_float(log_boundary(low, high));
    case Rounding::kPaper: {
      // Round half to even first: the smallest v whose integer reaches the boundary is integer - 0.5, which itself
      // goes up only to an even integer. From 2^23 on every float is an integer.
      const double integer = std::ceil(log_boundary(low, high));
      const float tie = ceil_to_float(integer - 0.5);
      const bool is_tie = static_cast<double>(tie) == integer - 0.5;
      const bool even = std::fmod(integer, 2.0) == 0;
      return is_tie && !even ? std::nextafter(tie, std::numeric_limits<float>::infinity()) : tie;
    }
  }
  return 0;
}

Quantizer make_quantizer(const Grid& grid, Rounding rounding) {
  Quantizer q{make_levels(grid), {}, grid.kind == Grid::Kind::kInt4 || grid.kind == Grid::Kind::kInt8, false};
  q.half_steps = q.unit_steps && rounding == Rounding::kNearest;
  for (size_t i = 1; i < q.levels.size(); ++i) {
    q.thresholds.push_back(threshold(q.levels[i - 1], q.levels[i], rounding));
  }
  return q;
}

}  // namespace

bool parse_grid(std::string_view name, Grid* grid) {
  using Kind = Grid::Kind;
  if (name == "pot4") return *grid = {Kind::kPot, 6, true, 4}, true;
  if (name == "e2m1") return *grid = {Kind::kE2m1, 0, true, 4}, true;
  if (name == "int4") return *grid = {Kind::kInt4, 0, true, 4}, true;
  if (name == "int8") return *grid = {Kind::kInt8, 0, true, 8}, true;
  if (!name.starts_with("pot(") || !name.ends_with(")")) return false;
  const std::string_view digits = name.substr(4, name.size() - 5);
  int k = 0;
  if (digits.empty() || digits.size() > 2) return false;
  for (char c : digits) {
    if (c < '0' || c > '9') return false;
    k = 10 * k + (c - '0');
  }
  return k <= 30 && (*grid = {Kind::kPot, k, false, 0}, true);
}

bool parse_rounding(std::string_view name, Rounding* rounding) {
  if (name == "nearest") return *rounding = Rounding::kNearest, true;
  if (name == "log") return *rounding = Rounding::kLog, true;
  if (name == "paper") return *rounding = Rounding::kPaper, true;
  return false;
}

bool parse_scale_method(std::string_view name, ScaleMethod* method) {
  if (name == "absmax") return *method = ScaleMethod::kAbsmax, true;
  if (name == "mse") return *method = ScaleMethod::kMse, true;
  if (name == "output") return *method = ScaleMethod::kOutput, true;
  return false;
}

bool parse_activations(std::string_view name, Activations* activations) {
  if (name == "float") return *activations = Activations::kFloat, true;
  if (name == "int8") return *activations = Activations::kInt8, true;
  if (name == "int16") return *activations = Activations::kInt16, true;
  if (name == "static") return *activations = Activations::kStatic, true;
  return false;
}

int64_t group_count(int64_t k, int64_t group_size) {
  return group_size && k ? (k + group_size - 1) / group_size : 1;  // no inputs are one empty group
}

int64_t tile_bytes(const Grid& grid) { return kTileOutputs * kTileInputs * grid.bits / 8; }

const Quantizer& quantizer(const Grid& grid, Rounding rounding) {
  static std::mutex mutex;
  static std::map<int, Quantizer> made;  // node-based: references stay valid
  const int key = (static_cast<int>(grid.kind) * 32 + grid.top_exponent) * 3 + static_cast<int>(rounding);
  const std::lock_guard lock(mutex);
  auto found = made.find(key);
  if (found == made.end()) found = made.emplace(key, make_quantizer(grid, rounding)).first;
  return found->second;
}

void assign_levels(const Quantizer& q, const float* w, int64_t count, float scale, float factor, float* out) {
  const Levels levels = {q.levels.data(), q.thresholds.data(), static_cast<int>(q.levels.size()), q.unit_steps,
                         q.half_steps};
  table_or_scalar().assign(levels, w, count, scale, factor, out);
}

}  // namespace potqat
