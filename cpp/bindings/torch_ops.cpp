// The torch ops of namespace potqat, on the LibTorch stable ABI: schemas, checks, threads; the core does the maths.
// Fake kernels, autograd and other devices are in potqat/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "potqat.h"

// A str argument. torch's own conversion to std::string (seen in torch 2.13) copies out of a heap string that it never
// frees; at a few calls a layer a training run then loses gigabytes to the holes between those crumbs.
struct Name : std::string {};

template <>
struct torch::stable::detail::ToImpl<Name> {
  static Name call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    Name name;
    name.assign(data, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};

namespace {

using potqat::Matrix;
using potqat::Quantization;
using potqat::Status;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void fail(const char* op, const std::string& what) {
  throw std::runtime_error(std::string("potqat.") + op + ": " + what);
}

std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

void check_status(const Status& status, const char* op) {
  if (status.code == Status::Code::kOk) return;  // before strings are made
  const std::string row = std::to_string(status.row), col = std::to_string(status.col);
  switch (status.code) {
    case Status::Code::kOk:
      break;
    case Status::Code::kNotFinite:
      fail(op, "the weight holds NaN or infinity at [" + row + ", " + col +
                   "]; find where it diverged and repair it before quantizing");
    case Status::Code::kBadCode:
      fail(op,
           "packed weight [" + row + ", " + col + "] is minus zero, a code that no packer writes: the data is damaged");
    case Status::Code::kBadScale:
      fail(op, "the scale of output " + row + ", group " + col + " is not a positive finite number");
    case Status::Code::kBadIndex:
      fail(op, "id " + col + " at position " + row + " is outside the table");
    case Status::Code::kBadIsa:
      fail(op, "POTQAT_ISA names an instruction set that is not one of " + potqat::available_isas());
  }
}

potqat::DType dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return potqat::DType::kFloat32;
    case ScalarType::BFloat16:
      return potqat::DType::kBFloat16;
    case ScalarType::Half:
      return potqat::DType::kFloat16;
    default:
      fail(op, "expected a float32, bfloat16 or float16 tensor");
  }
}

Matrix matrix(const Tensor& w, const char* op) {
  if (w.dim() != 2) fail(op, "w must be [out_features, in_features], got " + shape(w));
  if (w.size(1) > potqat::kMaxInputs) fail(op, "at most " + std::to_string(potqat::kMaxInputs) + " inputs");
  return {w.data_ptr(), dtype_of(w, op), w.size(0), w.size(1), w.stride(0), w.stride(1)};
}

Quantization quantization(const std::string& grid, const std::string& rounding, int64_t group_size, const char* op) {
  Quantization q{};
  if (!potqat::parse_grid(grid, &q.grid)) fail(op, "unknown grid '" + grid + "'");
  if (!potqat::parse_rounding(rounding, &q.rounding)) fail(op, "unknown rounding '" + rounding + "'");
  if (group_size < 0 || group_size % 32 != 0) {
    fail(op, "group_size must be 0 or a multiple of 32, got " + std::to_string(group_size));
  }
  q.group_size = group_size;
  return q;
}

void check_packable(const Quantization& q, const std::string& grid, const char* op) {
  if (!q.grid.packable) fail(op, grid + " is for fake-quantization only; it has no packed form");
}

const float* scale_data(const Tensor& scale, const Quantization& q, int64_t n, int64_t k, const char* op) {
  const int64_t groups = potqat::group_count(k, q.group_size);
  if (scale.dim() != 2 || scale.size(0) != groups || scale.size(1) != n || !scale.is_contiguous() ||
      scale.scalar_type() != ScalarType::Float) {
    fail(op, "scale must be contiguous float32 [" + std::to_string(groups) + ", " + std::to_string(n) + "], got " +
                 shape(scale));
  }
  return static_cast<const float*>(scale.data_ptr());
}

const uint8_t* packed_data(const Tensor& packed, const Quantization& q, int64_t n, int64_t k, const char* op) {
  const int64_t rows = (n + potqat::kTileOutputs - 1) / potqat::kTileOutputs;
  const int64_t cols = (k + potqat::kTileInputs - 1) / potqat::kTileInputs;
  if (packed.dim() != 3 || packed.size(0) != rows || packed.size(1) != cols ||
      packed.size(2) != potqat::tile_bytes(q.grid) || !packed.is_contiguous() ||
      packed.scalar_type() != ScalarType::Byte) {
    fail(op, "packed must be contiguous uint8 [" + std::to_string(rows) + ", " + std::to_string(cols) + ", " +
                 std::to_string(potqat::tile_bytes(q.grid)) + "], got " + shape(packed));
  }
  return static_cast<const uint8_t*>(packed.data_ptr());
}

// torch's own threads: they obey torch.set_num_threads, and there is no second pool.
void run_parallel(int64_t count, int64_t grain, const potqat::Body& body) {
  if (count <= grain) {
    if (count > 0) body(0, count);
    return;
  }
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end); });
}

// Uninitialized, for results. torch::stable::new_empty goes through the dispatcher by name, which takes longer than a
// small layer.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  const int32_t torch_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), torch_dtype, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor compute_scale(const Tensor& w, const std::optional<Tensor>& importance, const Name& grid, const Name& rounding,
                     const Name& method, int64_t group_size, bool per_tensor) {
  const char* op = "compute_scale";
  const Matrix m = matrix(w, op);
  const Quantization q = quantization(grid, rounding, group_size, op);
  potqat::ScaleMethod parsed{};
  if (!potqat::parse_scale_method(method, &parsed)) fail(op, "unknown method '" + method + "'");
  if (per_tensor && group_size != 0) fail(op, "one scale per tensor has no groups");
  const float* weights = nullptr;
  if (importance) {
    if (importance->dim() != 1 || importance->size(0) != m.cols || !importance->is_contiguous() ||
        importance->scalar_type() != ScalarType::Float) {
      fail(op, "importance must be contiguous float32 [" + std::to_string(m.cols) + "], got " + shape(*importance));
    }
    weights = static_cast<const float*>(importance->data_ptr());
  }
  if ((weights != nullptr) != (parsed == potqat::ScaleMethod::kOutput)) {
    fail(op, "importance goes with method 'output'");
  }
  Tensor scale = empty({potqat::group_count(m.cols, group_size), m.rows}, ScalarType::Float);
  check_status(potqat::compute_scale(m, weights, q, parsed, per_tensor, static_cast<float*>(scale.mutable_data_ptr()),
                                     run_parallel),
               op);
  return scale;
}

Tensor fake_quant(const Tensor& w, const Tensor& scale_, const Name& grid, const Name& rounding, int64_t group_size,
                  bool /*clip: of the backward*/) {
  const char* op = "fake_quant";
  const Matrix m = matrix(w, op);
  const Quantization q = quantization(grid, rounding, group_size, op);
  const Tensor scale = as_contiguous(scale_);
  Tensor out = empty({m.rows, m.cols}, w.scalar_type());
  check_status(
      potqat::fake_quantize(m, scale_data(scale, q, m.rows, m.cols, op), q, out.mutable_data_ptr(), run_parallel), op);
  return out;
}

std::tuple<Tensor, Tensor> fake_quant_backward(const Tensor& grad, const Tensor& w, const Tensor& scale_,
                                               const Name& grid, const Name& rounding, int64_t group_size, bool clip,
                                               bool scale_grad) {
  const char* op = "fake_quant_backward";
  const Matrix m = matrix(w, op), g = matrix(grad, op);
  const Quantization q = quantization(grid, rounding, group_size, op);
  if (g.rows != m.rows || g.cols != m.cols || g.dtype != m.dtype) {
    fail(op, "grad must have the weight's shape and dtype, got " + shape(grad) + " for " + shape(w));
  }
  const Tensor scale = as_contiguous(scale_);
  const float* s = scale_data(scale, q, m.rows, m.cols, op);
  Tensor dw = empty({m.rows, m.cols}, w.scalar_type());
  Tensor dscale = empty({scale_grad ? scale.size(0) : 0, scale.size(1)}, scale.scalar_type());
  float* dscale_data = scale_grad ? static_cast<float*>(dscale.mutable_data_ptr()) : nullptr;
  check_status(potqat::ste_backward(g, m, s, q, clip, dw.mutable_data_ptr(), dscale_data, run_parallel), op);
  return {dw, dscale};
}

Tensor pack(const Tensor& w, const Tensor& scale_, const Name& grid, const Name& rounding, int64_t group_size) {
  const char* op = "pack";
  const Matrix m = matrix(w, op);
  const Quantization q = quantization(grid, rounding, group_size, op);
  check_packable(q, grid, op);
  const Tensor scale = as_contiguous(scale_);
  const float* s = scale_data(scale, q, m.rows, m.cols, op);
  const int64_t rows = (m.rows + potqat::kTileOutputs - 1) / potqat::kTileOutputs;
  const int64_t cols = (m.cols + potqat::kTileInputs - 1) / potqat::kTileInputs;
  Tensor packed = empty({rows, cols, potqat::tile_bytes(q.grid)}, ScalarType::Byte);
  check_status(potqat::pack(m, s, q, static_cast<uint8_t*>(packed.mutable_data_ptr()), run_parallel), op);
  return packed;
}

Tensor unpack(const Tensor& packed_, const Tensor& scale_, const Name& grid, int64_t n, int64_t k, int64_t group_size) {
  const char* op = "unpack";
  const Quantization q = quantization(grid, "nearest", group_size, op);
  check_packable(q, grid, op);
  const Tensor packed = as_contiguous(packed_), scale = as_contiguous(scale_);
  const uint8_t* codes = packed_data(packed, q, n, k, op);
  const float* s = scale_data(scale, q, n, k, op);
  Tensor out = empty({n, k}, ScalarType::Float);
  check_status(potqat::unpack(codes, s, q, n, k, static_cast<float*>(out.mutable_data_ptr()), run_parallel), op);
  return out;
}

Tensor linear(const Tensor& x_, const Tensor& packed_, const Tensor& scale_, const std::optional<Tensor>& bias_,
              const Name& grid, int64_t n, int64_t group_size, const Name& activations, double input_scale,
              int64_t input_zero_point) {
  const char* op = "linear";
  if (x_.dim() < 1) fail(op, "x must have at least one dimension");
  const Tensor x = as_contiguous(x_), packed = as_contiguous(packed_), scale = as_contiguous(scale_);
  potqat::Linear args{};
  args.q = quantization(grid, "nearest", group_size, op);
  check_packable(args.q, grid, op);
  if (!potqat::parse_activations(activations, &args.activations)) {
    fail(op, "unknown activations '" + activations + "'");
  }
  args.dtype = dtype_of(x, op);
  args.n = n;
  args.k = x.size(x.dim() - 1);
  const bool is_static = args.activations == potqat::Activations::kStatic;
  // |q - zero point| reaches 255: with int8 weights the int32 sums then hold half as many inputs.
  const int64_t limit = is_static && args.q.grid.bits == 8 ? potqat::kMaxInputs / 2 : potqat::kMaxInputs;
  if (args.k > limit) {
    fail(op, "at most " + std::to_string(limit) + " inputs keep int32 sums exact, got " + std::to_string(args.k));
  }
  if (is_static && !(input_scale > 0 && input_zero_point >= -128 && input_zero_point <= 127)) {
    fail(op, "input_scale must be positive and input_zero_point in -128..127");
  }
  args.m = 1;
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    args.m *= x.size(i);
    sizes.push_back(x.size(i));
  }
  sizes.push_back(n);
  args.packed = packed_data(packed, args.q, n, args.k, op);
  args.scale = scale_data(scale, args.q, n, args.k, op);
  std::optional<Tensor> bias;
  if (bias_) {
    if (bias_->dim() != 1 || bias_->size(0) != n) {
      fail(op, "bias must be [" + std::to_string(n) + "], got " + shape(*bias_));
    }
    bias = as_contiguous(bias_->scalar_type() == ScalarType::Float ? *bias_
                                                                   : torch::stable::to(*bias_, ScalarType::Float));
    args.bias = static_cast<const float*>(bias->data_ptr());
  }
  Tensor out = empty(sizes, x.scalar_type());
  args.x = x.data_ptr();
  args.input_scale = static_cast<float>(input_scale);
  args.input_zero_point = static_cast<int32_t>(input_zero_point);
  args.out = out.mutable_data_ptr();
  check_status(potqat::linear(args, run_parallel), op);
  return out;
}

Tensor embedding(const Tensor& ids_, const Tensor& packed_, const Tensor& scale_, const Name& grid, int64_t n,
                 int64_t k, int64_t group_size) {
  const char* op = "embedding";
  const Quantization q = quantization(grid, "nearest", group_size, op);
  check_packable(q, grid, op);
  const Tensor ids = as_contiguous(torch::stable::to(ids_, ScalarType::Long));
  const Tensor packed = as_contiguous(packed_), scale = as_contiguous(scale_);
  const uint8_t* codes = packed_data(packed, q, n, k, op);
  const float* s = scale_data(scale, q, n, k, op);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < ids.dim(); ++i) sizes.push_back(ids.size(i));
  sizes.push_back(k);
  Tensor out = empty(sizes, ScalarType::Float);
  check_status(potqat::embedding(static_cast<const int64_t*>(ids.data_ptr()), ids.numel(), codes, s, q, n, k,
                                 static_cast<float*>(out.mutable_data_ptr()), run_parallel),
               op);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(potqat, m) {
  m.def(
      "compute_scale(Tensor w, Tensor? importance, str grid, str rounding, str method, int group_size, "
      "bool per_tensor) -> Tensor");
  m.def("fake_quant(Tensor w, Tensor scale, str grid, str rounding, int group_size, bool clip) -> Tensor");
  m.def(
      "fake_quant_backward(Tensor grad, Tensor w, Tensor scale, str grid, str rounding, int group_size, bool clip, "
      "bool scale_grad) -> (Tensor, Tensor)");
  m.def("pack(Tensor w, Tensor scale, str grid, str rounding, int group_size) -> Tensor");
  m.def(
      "unpack(Tensor packed, Tensor scale, str grid, int out_features, int in_features, int group_size) "
      "-> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, str grid, int out_features, int group_size, "
      "str activations, float input_scale, int input_zero_point) -> Tensor");
  m.def(
      "embedding(Tensor ids, Tensor packed, Tensor scale, str grid, int num_embeddings, int embedding_dim, "
      "int group_size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(potqat, CPU, m) {
  m.impl("compute_scale", TORCH_BOX(&compute_scale));
  m.impl("fake_quant", TORCH_BOX(&fake_quant));
  m.impl("fake_quant_backward", TORCH_BOX(&fake_quant_backward));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("embedding", TORCH_BOX(&embedding));
}
