"""One matrix product of llama.cpp's ggml, driven through the libraries that llama-cpp-python brings.

ggml keeps 4-bit weights in one of several buffer types and chooses its kernel by that: ``CPU`` holds plain blocks,
``CPU_REPACK`` interleaves eight rows, ``AMX`` holds tiles. llama.cpp takes the best that a machine has for each weight;
all are timed here. Activations are float32 and quantized inside the product, as ours are.

ggml has a process of its own here (``Process``). It sets a thread's AMX tiles up once and expects them to stay, while
others (oneDNN, potqat) set theirs up for each product. And with its threads beside PyTorch's, libgomp counts more of
them than there are cores, and lets all sleep as soon as they wait: what PyTorch, and potqat in it, then do in two
threads takes up to five times as long.

Built by GCC 12, ggml's AMX products of several tokens crash: _tile_loadconfig tells that compiler of 8 of the 64 bytes
that it reads, and the stores to the others are dropped as dead. Building llama-cpp-python with
CXXFLAGS="-fno-tree-dse -fno-dse" keeps them. ``check`` finds out in a process of its own.
"""

import ctypes
import itertools
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache

import numpy as np

F32, Q4_0 = 0, 2  # enum ggml_type
BLOCK, BLOCK_BYTES = 32, 18  # of Q4_0: weights of a block, and its bytes
WEIGHTS = 1  # enum ggml_backend_buffer_usage
NODES = 32  # products in one graph, so that starting a graph is not what is timed
NODES_BYTES = 1 << 25  # but no more results than this


_LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class _Parameters(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_FUNCTIONS = {  # name: (result, arguments), of ggml.h, ggml-cpu.h, ggml-backend.h and ggml-alloc.h
    "ggml_log_set": (None, [_LOG, c_void_p]),
    "ggml_init": (c_void_p, [_Parameters]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_graph_overhead": (c_size_t, []),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_set_usage": (None, [c_void_p, c_int]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
}


class Ggml:
    """The libraries, one CPU backend, and its buffer types by name.

    Raises:
        ImportError: llama-cpp-python is not installed.
    """

    def __init__(self):
        import llama_cpp

        libraries = [ctypes.CDLL(f"libggml-{part}.so.0") for part in ("base", "cpu")]  # llama_cpp has loaded them
        for name, (result, arguments) in _FUNCTIONS.items():
            function = next(getattr(library, name) for library in libraries if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self._log = _LOG(lambda level, text, data: None)  # kept: the library holds its address
        self.log_set(self._log, None)
        self.version = llama_cpp.__version__
        self.backend = self.backend_cpu_init()
        self.device = self.backend_get_device(self.backend)
        self.buffer_types = {"CPU": self.backend_cpu_buffer_type()}
        registry = self.backend_dev_backend_reg(self.device)
        if found := self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts"):
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(found)(self.device)
            for i in range(16):
                if not (extra and extra[i]):
                    break
                self.buffer_types[self.backend_buft_name(extra[i]).decode()] = extra[i]


class Product:
    """``copies`` Q4_0 copies of a weight in one buffer type, and graphs that multiply x by them in turn.

    Args:
        w: float32 [N, K], K a multiple of 32.
        x: float32 [M, K].

    Attributes:
        bytes: of one copy of the weight.

    Raises:
        ValueError: this buffer type has no product for that.
    """

    def __init__(self, ggml: Ggml, buffer_type: str, w: np.ndarray, x: np.ndarray, copies: int, threads: int):
        self._buffers, self._contexts, self._graphs = [], [], []
        self._ggml, self._threads, (n, k), m = ggml, threads, w.shape, x.shape[0]
        place = ggml.buffer_types[buffer_type]
        self.bytes = n * k // BLOCK * BLOCK_BYTES
        codes = np.empty(self.bytes, np.uint8)
        ggml.quantize_chunk(Q4_0, _pointer(w), _pointer(codes), 0, n, k, None)

        nodes = max(1, min(NODES, NODES_BYTES // (4 * m * n)))
        graphs = max(1, -(-copies // nodes))
        tensors = copies + 1 + graphs * nodes
        memory = tensors * ggml.tensor_overhead() + graphs * ggml.graph_overhead() + (1 << 16)
        # The weights have a context of their own: a context is allocated in one buffer type.
        self._contexts = [ggml.init(_Parameters(memory, None, True)) for _ in range(2)]
        weights = [ggml.new_tensor_2d(self._contexts[0], Q4_0, k, n) for _ in range(copies)]
        inputs = ggml.new_tensor_2d(self._contexts[1], F32, k, m)
        self._buffers = [ggml.backend_alloc_ctx_tensors_from_buft(self._contexts[0], place)]
        ggml.backend_buffer_set_usage(self._buffers[0], WEIGHTS)
        self._nodes, self._next = nodes, 0
        for g in range(graphs):
            graph = ggml.new_graph(self._contexts[1])
            for i in range(nodes):
                self._result = ggml.mul_mat(self._contexts[1], weights[(g * nodes + i) % copies], inputs)
                if not ggml.backend_dev_supports_op(ggml.device, self._result):
                    self.free()
                    raise ValueError(f"ggml has no Q4_0 product [{n}, {k}] in {buffer_type} buffers")
                ggml.build_forward_expand(graph, self._result)
            self._graphs.append(graph)
        self._buffers.append(
            ggml.backend_alloc_ctx_tensors_from_buft(self._contexts[1], ggml.backend_cpu_buffer_type())
        )
        for weight in weights:  # here a buffer type puts the blocks in its own order
            ggml.backend_tensor_set(weight, _pointer(codes), 0, codes.nbytes)
        ggml.backend_tensor_set(inputs, _pointer(x), 0, x.nbytes)
        self._shape = (m, n)

    def __call__(self, count: int) -> tuple[int, float]:
        """At least ``count`` products: (how many were done, in how many seconds)."""
        self._ggml.backend_cpu_set_n_threads(self._ggml.backend, self._threads)
        done, begin = 0, time.perf_counter()
        while done < count:
            status = self._ggml.backend_graph_compute(self._ggml.backend, self._graphs[self._next % len(self._graphs)])
            if status:
                raise RuntimeError(f"ggml_backend_graph_compute gave status {status}")
            self._next += 1
            done += self._nodes
        return done, time.perf_counter() - begin

    def result(self) -> np.ndarray:
        """float32 [M, N] of the last product of the last graph."""
        y = np.empty(self._shape, np.float32)
        self._ggml.backend_tensor_get(self._result, _pointer(y), 0, y.nbytes)
        return y

    def free(self) -> None:
        """Give the memory back; done by the garbage collector, too."""
        for buffer in self._buffers:
            self._ggml.backend_buffer_free(buffer)
        for context in self._contexts:
            self._ggml.free(context)
        self._buffers, self._contexts = [], []

    __del__ = free


def _pointer(array: np.ndarray) -> int:
    return array.ctypes.data


# ---- In a process of its own --------------------------------------------------------------------------------

_library = cache(Ggml)
_products: dict[int, Product] = {}


def _buffer_types() -> list[str]:
    return list(_library().buffer_types)


def _start(number: int, *arguments) -> int:
    _products[number] = Product(_library(), *arguments)
    return _products[number].bytes


def _run(number: int, count: int) -> tuple[int, float]:
    return _products[number](count)


def _free(number: int) -> None:
    del _products[number]


class Process:
    """Runs products; ``buffer_types`` are the names that this build has here.

    Raises:
        ImportError: llama-cpp-python is not installed.
    """

    def __init__(self):
        self._pool, self._numbers = ProcessPoolExecutor(1, multiprocessing.get_context("spawn")), itertools.count()
        self.buffer_types: list[str] = self._call(_buffer_types)

    def start(self, buffer_type: str, w: np.ndarray, x: np.ndarray, copies: int, threads: int) -> "Remote":
        """A Product of these arguments, and what it raises."""
        number = next(self._numbers)
        return Remote(self, number, self._call(_start, number, buffer_type, w, x, copies, threads))

    def _call(self, *call):
        return self._pool.submit(*call).result()


class Remote:
    """A Product in the other process; ``bytes`` as there."""

    def __init__(self, process: Process, number: int, size: int):
        self._process, self._number, self.bytes = process, number, size

    def __call__(self, count: int) -> tuple[int, float]:
        return self._process._call(_run, self._number, count)

    def __del__(self):
        self._process._pool.submit(_free, self._number)


def check(buffer_type: str) -> None:
    """Multiply by several tokens in another process.

    Raises:
        ValueError: it crashed, or the result is wrong.
    """
    done = subprocess.run([sys.executable, __file__, buffer_type], capture_output=True, text=True)
    if done.returncode:
        why = f"crashed with signal {-done.returncode}" if done.returncode < 0 else done.stderr.splitlines()[-1]
        raise ValueError(f"ggml's product in {buffer_type} buffers {why}; see benchmarks/ggml.py on GCC 12")


def _check(buffer_type: str) -> None:
    random = np.random.default_rng(0)
    w, x = (random.standard_normal((rows, 256), dtype=np.float32) for rows in (64, 40))
    product = Product(Ggml(), buffer_type, w, x, copies=1, threads=1)
    product(1)
    y = x @ w.T
    error = np.linalg.norm(product.result() - y) / np.linalg.norm(y)
    if not error < 0.15:  # 4-bit blocks of 32 normal weights: about 0.09
        raise ValueError(f"gives a relative error of {error}")


if __name__ == "__main__":
    _check(sys.argv[1])
