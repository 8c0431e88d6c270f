// potqat core: signed powers of two in 4 bits. Read this first: it is the contract of everything in cpp/core.
//
// The core knows neither torch nor Python: raw pointers and sizes in, Status out, threads injected by the caller.
// m, n, k are tokens, outputs (rows of the weight), inputs. Strides count elements.
//
// Grids. A weight is level * scale; levels are integers, a scale is a positive float32. Magnitudes:
//   pot4    0 1 2 4 8 16 32 64        (each a power of two)
//   e2m1    0 1 2 3 4 6 8 12          (at most two shifted terms each; FP4 times 2)
//   int4    0 1 ... 7                 (uniform control)
//   int8    0 1 ... 127
//   pot(k)  0 2^0 ... 2^k, k = 0..30  (the papers' ranges; fake-quantization only, no packed form)
//
// Packed layout, one on disk (docs/format.md) and in every kernel. A tile holds 16 outputs x 64 inputs; tiles run
// along k, then n.
//   4 bits: 512 bytes, 8 lines of 64. Line j, byte 4c + i: low nibble = output c, input 8j + i;
//           high nibble = output c, input 8j + 4 + i (i = 0..3). Nibble = sign << 3 | index of the magnitude.
//   int8:  1024 bytes, 16 lines of 64. Line j, byte 4c + i = output c, input 4j + i, two's complement.
// Padding is code 0. Minus zero (nibble 8, byte -128) is never written and refused on read; check_packed refuses a
// whole file's minus zeros and padding at once.
// Why this order: a line is one vector of "4 inputs x 16 outputs", which is what VNNI, AMX and NEON dot products
// read directly, and a group of inputs is a contiguous run of lines.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#define POTQAT_API __attribute__((visibility("default")))

namespace potqat {

constexpr int64_t kTileOutputs = 16;
constexpr int64_t kTileInputs = 64;
constexpr int64_t kLineBytes = 64;
// int32 sums stay exact: kMaxInputs * 127 * 127 and kMaxInputs * 128 * 127 (a table biased by 64) fit.
constexpr int64_t kMaxInputs = 131071;

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16 };
enum class Rounding : uint8_t { kNearest, kLog, kPaper };
enum class ScaleMethod : uint8_t { kAbsmax, kMse, kOutput };
enum class Activations : uint8_t { kFloat, kInt8, kInt16, kStatic };

struct Grid {
  enum class Kind : uint8_t { kPot, kE2m1, kInt4, kInt8 };
  Kind kind;
  int top_exponent;  // of kPot; pot4 is 6
  bool packable;
  int bits;  // of a packed code
};

// A weight [rows, cols] = [n, k] anywhere in memory.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t rows, cols, row_stride, col_stride;
};

// How weights are cut into groups of inputs that share a scale. Scales are stored [groups, rows].
struct Quantization {
  Grid grid;
  Rounding rounding;
  int64_t group_size;  // 0: all inputs are one group
};

// Runs body(begin, end) over sub-ranges of [0, count), each at least `grain` long; results never depend on the cut.
using Body = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, int64_t grain, const Body& body)>;

// Errors found in the data. `row`, `col` say where (of the weight, the packed tensor's weight, or the ids).
struct Status {
  enum class Code : uint8_t { kOk, kNotFinite, kBadCode, kBadScale, kBadIndex, kBadIsa } code = Code::kOk;
  int64_t row = 0, col = 0;
  bool ok() const { return code == Code::kOk; }
};

POTQAT_API bool parse_grid(std::string_view name, Grid* grid);
POTQAT_API bool parse_rounding(std::string_view name, Rounding* rounding);
POTQAT_API bool parse_scale_method(std::string_view name, ScaleMethod* method);
POTQAT_API bool parse_activations(std::string_view name, Activations* activations);
POTQAT_API int64_t group_count(int64_t k, int64_t group_size);
POTQAT_API int64_t tile_bytes(const Grid& grid);

// scale [groups, rows]: absmax / top level, or the candidate around it with the least squared error (kMse), the
// error of input j weighted by importance[j] (kOutput). per_tensor: one scale for all, written to every entry.
POTQAT_API Status compute_scale(const Matrix& w, const float* importance, const Quantization& q, ScaleMethod method,
                                bool per_tensor, float* scale, const ParallelFor& parallel);

// out [rows, cols] contiguous in w's dtype: level * scale.
POTQAT_API Status fake_quantize(const Matrix& w, const float* scale, const Quantization& q, void* out,
                                const ParallelFor& parallel);

// Straight-through gradients. dw [rows, cols] contiguous in w's dtype: grad where |w / scale| <= top, else 0
// (everywhere grad if not clip). dscale [groups, rows] or null: sum of grad * (level - w / scale) inside the range,
// grad * (+-top) outside (LSQ). grad has w's shape and dtype, any strides.
POTQAT_API Status ste_backward(const Matrix& grad, const Matrix& w, const float* scale, const Quantization& q,
                               bool clip, void* dw, float* dscale, const ParallelFor& parallel);

// packed [ceil(rows/16), ceil(cols/64), tile_bytes]; the grid must be packable.
POTQAT_API Status pack(const Matrix& w, const float* scale, const Quantization& q, uint8_t* packed,
                       const ParallelFor& parallel);
// out float32 [n, k].
POTQAT_API Status unpack(const uint8_t* packed, const float* scale, const Quantization& q, int64_t n, int64_t k,
                         float* out, const ParallelFor& parallel);

// Whether a packed weight [n, k] that somebody else wrote holds only what pack writes. kBadCode is at the first place,
// rows before columns: inside [n, k] a minus zero, outside it (up to whole tiles) padding that is not zero.
POTQAT_API Status check_packed(const uint8_t* packed, const Grid& grid, int64_t n, int64_t k,
                               const ParallelFor& parallel);

// out [m, n] = x [m, k] times the packed weight, in x's dtype; x and out contiguous.
//   kInt8:   per row s_x = absmax / 127 (1 if all zero), q = clamp(round-half-even(x / s_x), +-127)
//   kInt16:  two int8 numbers a value: q of x as for kInt8, and, likewise, q of the rest, x - q * s_x
//   kStatic: q = clamp(round-half-even(x / input_scale) + input_zero_point, -128, 127), s_x = input_scale
//   acc = sum of level * (q - zero point), exact in int32; y = sum over groups, k ascending (and in each over the two
//   numbers of kInt16), of float(acc) * (s_x * s_w), then + bias, all float32 without fused multiply-add, then cast.
//   kFloat:  per output and group acc = sum of x * level in float32, k ascending; y as above with s_x = 1.
// The bits of out depend neither on the instruction set nor on the threads.
struct Linear {
  const void* x;
  DType dtype;
  int64_t m, n, k;
  const uint8_t* packed;
  const float* scale;  // [groups, n]
  const float* bias;   // [n] or null
  Quantization q;      // rounding unused
  Activations activations;
  float input_scale;
  int32_t input_zero_point;
  void* out;
};
POTQAT_API Status linear(const Linear& args, const ParallelFor& parallel);

// out float32 [count, k]: rows `ids` of the packed table [n, k].
POTQAT_API Status embedding(const int64_t* ids, int64_t count, const uint8_t* packed, const float* scale,
                            const Quantization& q, int64_t n, int64_t k, float* out, const ParallelFor& parallel);

// Instruction sets, best first, comma separated: those built in, and those this machine runs. active_isa is empty
// if the environment variable POTQAT_ISA names one that is unknown or absent; set_isa returns false for such a name.
POTQAT_API std::string built_isas();
POTQAT_API std::string available_isas();
POTQAT_API std::string active_isa();
POTQAT_API bool set_isa(std::string_view name);
// Whether PyTorch multiplies bfloat16 numbers faster than float32 here: by AMX, or by an AMD's AVX-512.
POTQAT_API bool has_fast_bfloat16();

// Calibration of benchmarks. peak: `rounds` rounds (a few instructions each) of an instruction set's dot product on
// registers alone; the multiply-adds done, or -1 if that set is not available. read: the exclusive or of a buffer's
// 8-byte words (the last filled up with zero), as fast as the active instruction set streams memory.
POTQAT_API int64_t peak(std::string_view isa, int64_t rounds);
POTQAT_API uint64_t read(const void* data, int64_t bytes);

}  // namespace potqat
