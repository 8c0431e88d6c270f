// potqat._C: NumPy codec and packing, and the choice of instruction set. Includes no torch header and needs no torch,
// so tools can read packed files without it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "potqat.h"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

void serial(int64_t count, int64_t, const potqat::Body& body) {
  if (count > 0) body(0, count);
}

potqat::Quantization quantization(const std::string& grid, const std::string& rounding, int64_t group_size,
                                  bool packed) {
  potqat::Quantization q{};
  if (!potqat::parse_grid(grid, &q.grid)) throw py::value_error("unknown grid '" + grid + "'");
  if (!potqat::parse_rounding(rounding, &q.rounding)) throw py::value_error("unknown rounding '" + rounding + "'");
  if (group_size < 0 || group_size % 32) throw py::value_error("group_size must be 0 or a multiple of 32");
  if (packed && !q.grid.packable) throw py::value_error(grid + " is for fake-quantization only");
  q.group_size = group_size;
  return q;
}

void check_status(const potqat::Status& status) {
  if (!status.ok()) {
    throw py::value_error("NaN, infinity, a bad scale or a bad code at [" + std::to_string(status.row) + ", " +
                          std::to_string(status.col) + "]");
  }
}

potqat::Matrix matrix(const Floats& w) {
  if (w.ndim() != 2) throw py::value_error("w must be two-dimensional");
  if (w.shape(1) > potqat::kMaxInputs) throw py::value_error("too many inputs");
  return {w.data(), potqat::DType::kFloat32, w.shape(0), w.shape(1), w.shape(1), 1};
}

void check_scale(const Floats& scale, const potqat::Quantization& q, int64_t n, int64_t k) {
  if (scale.ndim() != 2 || scale.shape(0) != potqat::group_count(k, q.group_size) || scale.shape(1) != n) {
    throw py::value_error("scale must be [groups, out_features]");
  }
}

py::array_t<float> fake_quantize(const Floats& w, const Floats& scale, const std::string& grid,
                                 const std::string& rounding, int64_t group_size) {
  const potqat::Matrix m = matrix(w);
  const potqat::Quantization q = quantization(grid, rounding, group_size, false);
  check_scale(scale, q, m.rows, m.cols);
  py::array_t<float> out({m.rows, m.cols});
  check_status(potqat::fake_quantize(m, scale.data(), q, out.mutable_data(), serial));
  return out;
}

std::vector<int64_t> packed_shape(const potqat::Quantization& q, int64_t n, int64_t k) {
  return {n / potqat::kTileOutputs + (n % potqat::kTileOutputs != 0),  // no sum that could overflow
          k / potqat::kTileInputs + (k % potqat::kTileInputs != 0), potqat::tile_bytes(q.grid)};
}

Bytes pack(const Floats& w, const Floats& scale, const std::string& grid, const std::string& rounding,
           int64_t group_size) {
  const potqat::Matrix m = matrix(w);
  const potqat::Quantization q = quantization(grid, rounding, group_size, true);
  check_scale(scale, q, m.rows, m.cols);
  Bytes packed(packed_shape(q, m.rows, m.cols));
  check_status(potqat::pack(m, scale.data(), q, packed.mutable_data(), serial));
  return packed;
}

py::array_t<float> unpack(const Bytes& packed, const Floats& scale, const std::string& grid, int64_t n, int64_t k,
                          int64_t group_size) {
  const potqat::Quantization q = quantization(grid, "nearest", group_size, true);
  check_scale(scale, q, n, k);
  const std::vector<int64_t> expected = packed_shape(q, n, k);
  if (packed.ndim() != 3 || !std::equal(expected.begin(), expected.end(), packed.shape())) {
    throw py::value_error("packed does not have the shape of an [n, k] weight");
  }
  py::array_t<float> out({n, k});
  check_status(potqat::unpack(packed.data(), scale.data(), q, n, k, out.mutable_data(), serial));
  return out;
}

// Takes any array, not Bytes, which would copy one that is strided.
void check_packed(const py::array& packed, const std::string& grid, int64_t n, int64_t k) {
  const potqat::Quantization q = quantization(grid, "nearest", 0, true);
  const std::string weight = "weight [" + std::to_string(n) + ", " + std::to_string(k) + "]";
  if (n < 0 || k < 0 || k > potqat::kMaxInputs) {
    throw py::value_error(weight + ": out_features must be at least 0, in_features 0 to " +
                          std::to_string(potqat::kMaxInputs));
  }
  const std::vector<int64_t> expected = packed_shape(q, n, k);
  if (!py::isinstance<Bytes>(packed) || packed.ndim() != 3 ||
      !std::equal(expected.begin(), expected.end(), packed.shape())) {
    throw py::value_error("packed must be C-contiguous uint8 [" + std::to_string(expected[0]) + ", " +
                          std::to_string(expected[1]) + ", " + std::to_string(expected[2]) + "] for a " + grid + " " +
                          weight);
  }
  potqat::Status status;
  {
    const py::gil_scoped_release release;
    status = potqat::check_packed(static_cast<const uint8_t*>(packed.data()), q.grid, n, k, serial);
  }
  if (status.ok()) return;
  const bool inside = status.row < n && status.col < k;
  throw py::value_error(std::string(inside ? "code of" : "padding at") + " output " + std::to_string(status.row) +
                        ", input " + std::to_string(status.col) + (inside ? " is minus zero" : " is not zero"));
}

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> names;
  for (size_t at = 0; at <= list.size() && !list.empty();) {
    const size_t comma = std::min(list.find(',', at), list.size());
    names.push_back(list.substr(at, comma - at));
    at = comma + 1;
  }
  return names;
}

py::dict cpu_info() {
  py::dict info;
  info["isa"] = potqat::active_isa();
  info["available"] = split(potqat::available_isas());
  info["built"] = split(potqat::built_isas());
  info["bfloat16"] = potqat::has_fast_bfloat16();
  info["cpus"] = std::thread::hardware_concurrency();
  return info;
}

void set_isa(const std::string& name) {
  if (!potqat::set_isa(name)) {
    throw py::value_error("potqat.set_isa: '" + name +
                          "' is not available here; available: " + potqat::available_isas());
  }
}

int64_t peak_of(const std::string& isa, int64_t rounds) {
  int64_t done;
  {
    const py::gil_scoped_release release;
    done = potqat::peak(isa, rounds);
  }
  if (done < 0) {
    throw py::value_error("potqat._C.peak: '" + isa +
                          "' is not available here; available: " + potqat::available_isas());
  }
  return done;
}

uint64_t read_array(const py::array& array, int64_t passes) {
  if (!(array.flags() & py::array::c_style)) throw py::value_error("potqat._C.read: the array must be C-contiguous");
  const void* data = array.data();
  const int64_t bytes = array.nbytes();  // counts a reference to the dtype
  const py::gil_scoped_release release;
  uint64_t words = 0;
  for (int64_t pass = 0; pass < passes; ++pass) words = potqat::read(data, bytes);
  return words;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  if (potqat::active_isa().empty()) {
    throw py::import_error("potqat: POTQAT_ISA names an instruction set that is not available here; available: " +
                           potqat::available_isas());
  }
  m.attr("__version__") = POTQAT_VERSION;
  m.attr("MAX_IN_FEATURES") = potqat::kMaxInputs;
  m.def("cpu_info", &cpu_info,
        "dict: isa (the kernels in use), available (on this machine, best first), built (into this binary), bfloat16 "
        "(whether PyTorch multiplies such numbers faster than float32), cpus.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Use the kernels of one instruction set; ValueError if it is unknown or absent. All give the same bits.");
  m.def("peak", &peak_of, py::arg("isa"), py::arg("rounds"),
        "Calibration: so many rounds of an instruction set's dot product on registers, without the GIL; returns the "
        "multiply-adds done. ValueError if the set is not available.");
  m.def("read", &read_array, py::arg("array"), py::arg("passes") = 1,
        "Calibration: reads a C-contiguous array so many times, without the GIL, as fast as the instruction set in use "
        "can; returns the exclusive or of its 8-byte words, the last filled up with zero.");
  m.def("fake_quantize", &fake_quantize, py::arg("w"), py::arg("scale"), py::arg("grid"), py::arg("rounding"),
        py::arg("group_size") = 0, "NumPy form of potqat.fake_quantize: w [N, K], scale [G, N] -> float32 [N, K].");
  m.def("pack", &pack, py::arg("w"), py::arg("scale"), py::arg("grid"), py::arg("rounding"), py::arg("group_size") = 0,
        "NumPy form of potqat.pack: w [N, K], scale [G, N] -> uint8 tiles.");
  m.def("unpack", &unpack, py::arg("packed"), py::arg("scale"), py::arg("grid"), py::arg("out_features"),
        py::arg("in_features"), py::arg("group_size") = 0, "NumPy form of potqat.unpack -> float32 [N, K].");
  m.def("check_packed", &check_packed, py::arg("packed"), py::arg("grid"), py::arg("out_features"),
        py::arg("in_features"),
        "ValueError with the first place where a packed weight [N, K] holds what pack never writes: minus zero, or "
        "padding that is not zero. packed is read in place, without the GIL.");
}
