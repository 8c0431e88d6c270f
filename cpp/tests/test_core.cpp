// The core alone, without torch or Python, for sanitizers: every grid, shape tail, granularity and instruction set on
// buffers of exactly the promised size, so that a read or write past the end is seen. `make sanitize` builds and runs
// it with AddressSanitizer and UBSan. What the values must be is tested from Python; here all tables must agree.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "potqat.h"

namespace {

int failures = 0;

void expect(bool good, const std::string& what) {
  if (good) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

// Two uneven halves, as two threads would take them.
void halves(int64_t count, int64_t, const potqat::Body& body) {
  if (count > 1) body(0, count / 3 + 1);
  if (count > 1) body(count / 3 + 1, count);
  if (count == 1) body(0, 1);
}

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> names;
  std::stringstream stream(list);
  for (std::string name; std::getline(stream, name, ',');) names.push_back(name);
  return names;
}

struct Case {
  std::string grid;
  int64_t m, n, k, group_size;
  std::string name() const {
    return grid + " m=" + std::to_string(m) + " n=" + std::to_string(n) + " k=" + std::to_string(k) +
           " group=" + std::to_string(group_size);
  }
};

void run(const Case& c, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const auto sample = [&](int64_t count) {
    std::vector<float> values(count);
    for (float& v : values) v = normal(random);
    return values;
  };
  potqat::Quantization q{};
  expect(potqat::parse_grid(c.grid, &q.grid), "grid " + c.grid);
  q.group_size = c.group_size;
  const int64_t groups = potqat::group_count(c.k, c.group_size);
  const std::vector<float> w = sample(c.n * c.k), x = sample(c.m * c.k), bias = sample(c.n), grad = sample(c.n * c.k);
  const potqat::Matrix matrix = {w.data(), potqat::DType::kFloat32, c.n, c.k, c.k, 1};
  const potqat::Matrix gradient = {grad.data(), potqat::DType::kFloat32, c.n, c.k, c.k, 1};

  std::vector<float> scale(groups * c.n), fake(c.n * c.k), unpacked(c.n * c.k), dw(c.n * c.k), dscale(groups * c.n);
  using potqat::ScaleMethod;
  for (const ScaleMethod method : {ScaleMethod::kMse, ScaleMethod::kAbsmax}) {
    expect(potqat::compute_scale(matrix, nullptr, q, method, false, scale.data(), halves).ok(), c.name());
  }
  expect(potqat::fake_quantize(matrix, scale.data(), q, fake.data(), halves).ok(), c.name());
  expect(potqat::ste_backward(gradient, matrix, scale.data(), q, true, dw.data(), dscale.data(), halves).ok(),
         c.name());
  const int64_t tiles = (c.n + 15) / 16 * ((c.k + 63) / 64);
  std::vector<uint8_t> packed(tiles * potqat::tile_bytes(q.grid));
  expect(potqat::pack(matrix, scale.data(), q, packed.data(), halves).ok(), c.name());
  expect(potqat::unpack(packed.data(), scale.data(), q, c.n, c.k, unpacked.data(), halves).ok(), c.name());
  expect(unpacked == fake, c.name() + ": unpacked differs from fake-quantized");
  expect(potqat::check_packed(packed.data(), q.grid, c.n, c.k, halves).ok(), c.name() + ": refused as packed");

  const std::vector<int64_t> ids = {0, c.n - 1};
  std::vector<float> rows(ids.size() * c.k);
  expect(potqat::embedding(ids.data(), 2, packed.data(), scale.data(), q, c.n, c.k, rows.data(), halves).ok(),
         c.name());

  using potqat::Activations;
  for (const Activations activations : {Activations::kInt8, Activations::kStatic, Activations::kFloat}) {
    std::vector<float> first;
    for (const std::string& isa : split(potqat::available_isas())) {
      expect(potqat::set_isa(isa), isa);
      std::vector<float> out(c.m * c.n);
      const potqat::Linear args = {x.data(),
                                   potqat::DType::kFloat32,
                                   c.m,
                                   c.n,
                                   c.k,
                                   packed.data(),
                                   scale.data(),
                                   bias.data(),
                                   q,
                                   activations,
                                   0.02f,
                                   -9,
                                   out.data()};
      expect(potqat::linear(args, halves).ok(), c.name());
      if (first.empty()) first = out;
      expect(out == first, c.name() + ": " + isa + " differs");
    }
  }
}

// Every code of a packed weight of ones set to minus zero in turn: the place that check_packed names, in order of
// rows then columns, is where the layout in potqat.h puts it.
void damage_every_code(const std::string& name, int64_t n, int64_t k) {
  potqat::Quantization q{};
  expect(potqat::parse_grid(name, &q.grid), "grid " + name);
  const std::vector<float> w(n * k, 1.0f), scale(n, 1.0f);
  const int64_t tile_columns = (k + 63) / 64, lines = q.grid.bits * 2, inputs_a_line = 64 / lines;
  std::vector<uint8_t> packed((n + 15) / 16 * tile_columns * potqat::tile_bytes(q.grid));
  expect(potqat::pack({w.data(), potqat::DType::kFloat32, n, k, k, 1}, scale.data(), q, packed.data(), halves).ok(),
         name);
  for (size_t i = 0; i < packed.size(); ++i) {
    for (int shift = 0; shift < 8; shift += q.grid.bits) {
      const uint8_t before = packed[i], mask = q.grid.bits == 8 ? 0xff : 0x0f << shift;
      packed[i] = (before & ~mask) | (0x80 >> (8 - q.grid.bits - shift));
      const int64_t tile = i / potqat::tile_bytes(q.grid), line = i / 64 % lines, byte = i % 64;
      const int64_t row = tile / tile_columns * 16 + byte / 4;
      const int64_t col = tile % tile_columns * 64 + line * inputs_a_line + shift + byte % 4;
      const potqat::Status status = potqat::check_packed(packed.data(), q.grid, n, k, halves);
      expect(status.code == potqat::Status::Code::kBadCode && status.row == row && status.col == col,
             name + ": minus zero at [" + std::to_string(row) + ", " + std::to_string(col) + "] was not found there");
      packed[i] = before;
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  int cases = 0;
  for (const char* grid : {"pot4", "e2m1", "int4", "int8"}) {
    for (const int64_t group_size : {0, 32, 64, 96}) {
      for (const int64_t m : {1, 2, 7, 13, 65}) {
        for (const int64_t n : {1, 16, 33}) {
          for (const int64_t k : {0, 1, 63, 64, 65, 200}) {
            run({grid, m, n, k, group_size}, random);
            ++cases;
          }
        }
      }
    }
  }
  for (const char* grid : {"pot4", "e2m1", "int4", "int8"}) {
    damage_every_code(grid, 16, 64);
    damage_every_code(grid, 18, 130);
    damage_every_code(grid, 32, 1);
  }
  std::printf("%d cases on %s: %d failures\n", cases, potqat::available_isas().c_str(), failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
