"""A GPT of potqat.models as a Q4_0 GGUF file, run by llama.cpp's own loop (llama-cpp-python's low-level calls)."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch

from potqat.models.gpt import GPT

NAMES = {  # of llama.cpp's gpt2 architecture
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(model: GPT, path: Path) -> None:
    """Write the model with its matrices and the tied token table in Q4_0, all else float32; there is no vocabulary."""
    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if module == "lm_head":  # the token table
            module = "transformer.wte"
        layer = ""
        if module.startswith("transformer.h."):
            _, _, index, module = module.split(".", 3)
            layer = f"blk.{index}."
        data, dtype = parameter.detach().float().numpy(), None
        if data.ndim == 2 and module != "transformer.wpe":
            dtype = gguf.GGMLQuantizationType.Q4_0
            data = gguf.quants.quantize(data, dtype)
        writer.add_tensor(f"{layer}{NAMES[module]}.{kind}", data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_bytes(path: Path) -> int:
    """Bytes of weights that a token reads: all but the table of positions."""
    tensors = gguf.GGUFReader(path).tensors
    return sum(int(tensor.n_bytes) for tensor in tensors if not tensor.name.startswith("position_embd"))


class Llama:
    """A model and a context for one text.

    Args:
        extra_buffers: whether weights may go into the buffer types with kernels of their own (AMX, CPU_REPACK).
    """

    def __init__(self, path: Path, context: int, threads: int, extra_buffers: bool):
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_extra_bufts = extra_buffers
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {path}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self._batch, self._room = llama_cpp.llama_batch_init(context, 0, 1), context

    def read(self, tokens: list[int], start: int) -> float:
        """Reads tokens from position ``start`` on, whatever came there before, with the logits of each; returns the
        seconds taken."""
        llama_cpp.llama_memory_seq_rm(self.memory, 0, start, -1)
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
            batch.seq_id[i][0] = 0
        begin = time.perf_counter()
        status = llama_cpp.llama_decode(self.context, batch)
        seconds = time.perf_counter() - begin
        if status:
            raise RuntimeError(f"llama_decode gave status {status} for {len(tokens)} tokens at {start}")
        return seconds

    def read_each(self, tokens: list[int], start: int) -> float:
        """The same, one by one."""
        return sum(self.read([token], start + i) for i, token in enumerate(tokens))

    def last_logits(self) -> torch.Tensor:
        """float32 [V] of the last token read."""
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (self.vocabulary,)).copy())


# ---- In a process of its own --------------------------------------------------------------------------------

_loaded: list[Llama] = []


def _load(*arguments) -> None:
    _loaded.append(Llama(*arguments))


def _do(method: str, *arguments):
    return getattr(_loaded[0], method)(*arguments)


class Process:
    """A Llama of these arguments in a process of its own (why: ggml.py), with its methods."""

    def __init__(self, *arguments):
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._pool.submit(_load, *arguments).result()

    def read(self, tokens: list[int], start: int) -> float:
        return self._pool.submit(_do, "read", tokens, start).result()

    def read_each(self, tokens: list[int], start: int) -> float:
        return self._pool.submit(_do, "read_each", tokens, start).result()

    def last_logits(self) -> torch.Tensor:
        return self._pool.submit(_do, "last_logits").result()
