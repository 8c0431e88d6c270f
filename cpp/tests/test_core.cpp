// The core alone, without torch or Python: every grid, shape tail, granularity, rounding and instruction set on buffers
// of exactly the promised size. All instruction sets must give the scalar one's bits, and those must be the same on
// every machine: a fingerprint of all results is written down below. What the values must be is tested from Python.
//
// `make sanitize` runs it under AddressSanitizer and UBSan, so that a read or write past the end is seen; `make
// test-arm` for aarch64, in an emulator.
//
// usage: test_core [ISAS]    ISAS: the instruction sets that must be available, best first, comma separated
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "potqat.h"

namespace {

using potqat::Activations;
using potqat::DType;
using potqat::ScaleMethod;

// Of the bits of every result. It changes when a case or the arithmetic is changed, on every machine alike.
constexpr uint64_t kFingerprint = 0x4a58a9d3aa9c1cf5;

int failures = 0;
uint64_t fingerprint = 0xcbf29ce484222325;  // FNV-1a

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

// Scalar first: it is the truth.
std::vector<std::string> isas() {
  std::vector<std::string> names = split(potqat::available_isas());
  return {names.rbegin(), names.rend()};
}

// What arithmetic can be sensitive to: plain numbers; quarters, so that a quotient is half way between two levels or
// integers; numbers whose scales and products are subnormal; numbers whose products overflow; the largest sums.
enum class Data { kPlain, kQuarters, kTiny, kHuge, kLargest };

float draw(Data data, std::mt19937& random) {
  const uint32_t bits = random();
  const float v = std::ldexp(static_cast<float>(static_cast<int32_t>(bits) >> 8), -23 - static_cast<int>(bits & 3));
  switch (data) {
    case Data::kPlain:
      return v;
    case Data::kQuarters:
      return std::nearbyint(v * 508) / 4;
    case Data::kTiny:
      return std::ldexp(v, -124);
    case Data::kHuge:
      return std::ldexp(v, 126);
    case Data::kLargest:
      return -4;
  }
  return 0;
}

std::vector<float> sample(int64_t count, Data data, std::mt19937& random) {
  std::vector<float> values(count);
  for (float& v : values) v = draw(data, random);
  return values;
}

// Finite bfloat16 or float16 of any size, as they are in memory: the highest bit of the exponent stays 0.
std::vector<uint16_t> sample_half(int64_t count, std::mt19937& random) {
  std::vector<uint16_t> values(count);
  for (uint16_t& v : values) v = random() & 0xbfff;
  return values;
}

// Results of one instruction set, by name. Of NaNs, only that they are one.
struct Results {
  std::vector<std::pair<std::string, std::vector<uint32_t>>> parts;
  void add(const std::string& what, const std::vector<float>& values) {
    std::vector<uint32_t> bits;
    for (const float v : values) bits.push_back(std::isnan(v) ? 0x7fc00000 : std::bit_cast<uint32_t>(v));
    parts.emplace_back(what, std::move(bits));
  }
  void add(const std::string& what, const std::vector<uint8_t>& values) {
    parts.emplace_back(what, std::vector<uint32_t>(values.begin(), values.end()));
  }
  void add(const std::string& what, const std::vector<uint16_t>& values) {
    parts.emplace_back(what, std::vector<uint32_t>(values.begin(), values.end()));
  }
};

// compute() under every instruction set: the same bits, which go into the fingerprint.
template <class Compute>
void same_everywhere(const std::string& name, const Compute& compute) {
  Results truth;
  for (const std::string& isa : isas()) {
    expect(potqat::set_isa(isa), isa);
    const Results results = compute();
    if (truth.parts.empty()) truth = results;
    for (size_t i = 0; i < results.parts.size(); ++i) {
      expect(results.parts[i] == truth.parts[i], name + " " + results.parts[i].first + ": " + isa + " differs");
    }
  }
  for (const auto& [what, bits] : truth.parts) {
    for (const uint32_t word : bits) fingerprint = (fingerprint ^ word) * 0x100000001b3;
  }
}

struct Case {
  std::string grid;
  int64_t m, n, k, group_size;
  Data data = Data::kPlain;
  std::string name() const {
    return grid + " m=" + std::to_string(m) + " n=" + std::to_string(n) + " k=" + std::to_string(k) +
           " group=" + std::to_string(group_size) + " data=" + std::to_string(static_cast<int>(data));
  }
};

// From float weights to the packed layer's output.
void run(const Case& c, std::mt19937& random) {
  potqat::Quantization q{};
  expect(potqat::parse_grid(c.grid, &q.grid), "grid " + c.grid);
  q.group_size = c.group_size;
  const int64_t groups = potqat::group_count(c.k, c.group_size);
  const std::vector<float> w = sample(c.n * c.k, c.data == Data::kTiny ? Data::kPlain : c.data, random);
  const std::vector<float> bias = sample(c.n, c.data, random);
  std::vector<float> x = sample(c.m * c.k, c.data, random);
  // The last three rows: a NaN, an infinity, zeros of both signs.
  if (c.data != Data::kPlain && c.data != Data::kLargest) {
    x[(c.m - 3) * c.k] = std::nanf("");
    x[(c.m - 1) * c.k - 1] = -INFINITY;
    for (int64_t j = 0; j < c.k; ++j) x[(c.m - 1) * c.k + j] = j % 2 ? 0.0f : -0.0f;
  }
  const potqat::Matrix matrix = {w.data(), DType::kFloat32, c.n, c.k, c.k, 1};
  const int64_t tiles = (c.n + 15) / 16 * ((c.k + 63) / 64);

  same_everywhere(c.name(), [&] {
    Results results;
    std::vector<float> scale(groups * c.n), fake(c.n * c.k), unpacked(c.n * c.k);
    expect(potqat::compute_scale(matrix, nullptr, q, ScaleMethod::kAbsmax, false, scale.data(), halves).ok(), c.name());
    results.add("scale", scale);
    std::vector<uint8_t> packed(tiles * potqat::tile_bytes(q.grid));
    expect(potqat::pack(matrix, scale.data(), q, packed.data(), halves).ok(), c.name());
    results.add("pack", packed);
    expect(potqat::fake_quantize(matrix, scale.data(), q, fake.data(), halves).ok(), c.name());
    expect(potqat::unpack(packed.data(), scale.data(), q, c.n, c.k, unpacked.data(), halves).ok(), c.name());
    expect(unpacked == fake, c.name() + ": unpacked differs from fake-quantized");
    expect(potqat::check_packed(packed.data(), q.grid, c.n, c.k, halves).ok(), c.name() + ": refused as packed");

    const std::vector<int64_t> ids = {0, c.n - 1};
    std::vector<float> rows(ids.size() * c.k);
    expect(potqat::embedding(ids.data(), 2, packed.data(), scale.data(), q, c.n, c.k, rows.data(), halves).ok(),
           c.name());
    results.add("embedding", rows);

    for (const Activations activations :
         {Activations::kInt8, Activations::kInt16, Activations::kStatic, Activations::kFloat}) {
      std::vector<float> out(c.m * c.n);
      const float input_scale = c.data == Data::kQuarters ? 0.5f : 0.02f;
      const potqat::Linear args = {x.data(),     DType::kFloat32, c.m, c.n,         c.k,         packed.data(),
                                   scale.data(), bias.data(),     q,   activations, input_scale, -9,
                                   out.data()};
      expect(potqat::linear(args, halves).ok(), c.name());
      results.add("linear, activations " + std::to_string(static_cast<int>(activations)), out);
    }
    return results;
  });
}

// Half-precision activations, weights and results, which pass through float32.
void run_half(const std::string& grid, DType dtype, int64_t n, int64_t k, std::mt19937& random) {
  const std::string name = grid + " dtype=" + std::to_string(static_cast<int>(dtype)) + " k=" + std::to_string(k);
  potqat::Quantization q{};
  expect(potqat::parse_grid(grid, &q.grid), "grid " + grid);
  const int64_t m = 3;
  const std::vector<uint16_t> w = sample_half(n * k, random), x = sample_half(m * k, random);
  const potqat::Matrix matrix = {w.data(), dtype, n, k, k, 1};
  same_everywhere(name, [&] {
    Results results;
    std::vector<float> scale(n);
    std::vector<uint16_t> fake(n * k), out(m * n);
    std::vector<uint8_t> packed((n + 15) / 16 * ((k + 63) / 64) * potqat::tile_bytes(q.grid));
    expect(potqat::compute_scale(matrix, nullptr, q, ScaleMethod::kAbsmax, false, scale.data(), halves).ok(), name);
    expect(potqat::fake_quantize(matrix, scale.data(), q, fake.data(), halves).ok(), name);
    expect(potqat::pack(matrix, scale.data(), q, packed.data(), halves).ok(), name);
    results.add("fake_quantize", fake);
    for (const Activations activations : {Activations::kInt8, Activations::kInt16, Activations::kFloat}) {
      const potqat::Linear args = {x.data(), dtype, m,           n, k, packed.data(), scale.data(),
                                   nullptr,  q,     activations, 0, 0, out.data()};
      expect(potqat::linear(args, halves).ok(), name);
      results.add("linear", out);
    }
    return results;
  });
}

// Scales, fake quantization and its gradients: also of grids that do not pack.
void run_fake(const Case& c, const std::string& rounding, std::mt19937& random) {
  const std::string name = c.name() + " " + rounding;
  potqat::Quantization q{};
  expect(potqat::parse_grid(c.grid, &q.grid), "grid " + c.grid);
  expect(potqat::parse_rounding(rounding, &q.rounding), "rounding " + rounding);
  q.group_size = c.group_size;
  const int64_t groups = potqat::group_count(c.k, c.group_size);
  const std::vector<float> w = sample(c.n * c.k, c.data, random), grad = sample(c.n * c.k, c.data, random);
  const std::vector<float> importance = sample(c.k, Data::kPlain, random);
  const potqat::Matrix matrix = {w.data(), DType::kFloat32, c.n, c.k, c.k, 1};
  const potqat::Matrix gradient = {grad.data(), DType::kFloat32, c.n, c.k, c.k, 1};
  same_everywhere(name, [&] {
    Results results;
    std::vector<float> scale(groups * c.n), fake(c.n * c.k), dw(c.n * c.k), dscale(groups * c.n);
    for (const ScaleMethod method : {ScaleMethod::kAbsmax, ScaleMethod::kMse, ScaleMethod::kOutput}) {
      const float* weighted = method == ScaleMethod::kOutput ? importance.data() : nullptr;
      expect(potqat::compute_scale(matrix, weighted, q, method, false, scale.data(), halves).ok(), name);
      results.add("scale", scale);
      expect(potqat::fake_quantize(matrix, scale.data(), q, fake.data(), halves).ok(), name);
      results.add("fake_quantize", fake);
    }
    for (float& s : scale) s *= 0.75f;  // some weights are beyond the top level
    for (const bool clip : {false, true}) {
      expect(potqat::ste_backward(gradient, matrix, scale.data(), q, clip, dw.data(), dscale.data(), halves).ok(),
             name);
      results.add("gradient", dw);
      results.add("gradient of the scale", dscale);
      expect(potqat::ste_backward(gradient, matrix, scale.data(), q, clip, dw.data(), nullptr, halves).ok(), name);
      results.add("gradient alone", dw);
    }
    return results;
  });
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

// Benchmarks' calibration: multiply-adds are counted, and every byte is read once.
void calibrate() {
  std::mt19937 random(0);
  for (const std::string& isa : isas()) {
    expect(potqat::set_isa(isa) && potqat::peak(isa, 3) == 3 * potqat::peak(isa, 1) && potqat::peak(isa, 1) > 0, isa);
    for (const int64_t bytes : {0, 1, 8, 255, 256, 1000, 4096 + 13}) {
      std::vector<uint8_t> data(bytes);
      for (uint8_t& byte : data) byte = random() & 255;
      uint64_t all = 0;
      for (int64_t i = 0; i < bytes; ++i) all ^= static_cast<uint64_t>(data[i]) << (i % 8 * 8);
      expect(potqat::read(data.data(), bytes) == all, isa + " read " + std::to_string(bytes) + " bytes");
    }
  }
}

// The best instruction set is chosen, those that this machine lacks are refused.
void check_dispatch(const std::string& expected) {
  const std::string available = potqat::available_isas();
  expect(expected.empty() || available == expected, "available are " + available + " instead of " + expected);
  expect(std::getenv("POTQAT_ISA") || potqat::active_isa() == split(available)[0], "the first is not chosen");
  std::string lacking;
  for (const std::string& isa : split(potqat::built_isas())) {
    if (("," + available + ",").find("," + isa + ",") != std::string::npos) continue;
    expect(!potqat::set_isa(isa), isa + " is not available and was taken");
    lacking += (lacking.empty() ? "" : ",") + isa;
  }
  std::printf("run here: %s; not on this machine: %s\n", available.c_str(), lacking.empty() ? "-" : lacking.c_str());
}

}  // namespace

int main(int count, char** arguments) {
  check_dispatch(count > 1 ? arguments[1] : "");
  calibrate();
  std::mt19937 random(0);
  const std::vector<std::string> packable = {"pot4", "e2m1", "int4", "int8"};
  const std::vector<Data> all_data = {Data::kPlain, Data::kQuarters, Data::kTiny, Data::kHuge};
  for (const std::string& grid : packable) {
    for (const int64_t group_size : {0, 32, 64, 96}) {
      for (const int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 65}) run({grid, m, 70, 200, group_size}, random);
      for (int64_t n = 1; n <= 17; ++n) run({grid, 1 + n % 3 * 2, n, 70, group_size}, random);
      for (const int64_t n : {33, 64, 80}) run({grid, 1, n, 65, group_size}, random);
      for (int64_t k = 0; k <= 67; ++k) run({grid, 1 + k % 3, 18, k, group_size}, random);
      for (const int64_t k : {127, 128, 129, 1030}) run({grid, 6, 18, k, group_size}, random);
      for (const int64_t m : {2, 11, 14}) run({grid, m, 70, 8230, group_size}, random);  // groups in several calls
      for (const Data data : all_data) run({grid, 9, 35, 131, group_size, data}, random);
    }
    run({grid, 513, 70, 65, 0}, random);   // more than one block of rows
    run({grid, 5, 17, 2111, 0}, random);   // more than one panel of AVX-512
    run({grid, 35, 17, 4161, 0}, random);  // and of AMX
    run({grid, 35, 17, 4161, 64}, random);
    run({grid, 40, 70, 1030, 256}, random);
    run({grid, 257, 3, 2113, 0}, random);  // more than one block of long rows
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) run_half(grid, dtype, 19, 133, random);
  }
  for (const std::string& grid : {"pot4", "e2m1", "int4", "int8", "pot(0)", "pot(7)", "pot(30)"}) {
    for (const std::string& rounding : {"nearest", "log", "paper"}) {
      for (const Data data : all_data) run_fake({grid, 0, 3, 131, 32, data}, rounding, random);
      for (const int64_t k : {1, 15, 17, 64}) run_fake({grid, 0, 2, k, 0}, rounding, random);
    }
  }
  for (const std::string& grid : {"pot4", "int8"}) run({grid, 5, 1, potqat::kMaxInputs, 0, Data::kLargest}, random);
  for (const std::string& grid : packable) {
    damage_every_code(grid, 16, 64);
    damage_every_code(grid, 18, 130);
    damage_every_code(grid, 32, 1);
  }
  std::printf("fingerprint %016llx, %d failures\n", static_cast<unsigned long long>(fingerprint), failures);
  expect(fingerprint == kFingerprint, "these are not the bits that every machine gives");
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
