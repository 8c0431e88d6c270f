"""The command line as a test calls it, and the models that it is given."""

import contextlib
import io

import pytest
import safetensors
import torch

from potqat.cli import main

transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")

VOCABULARY, CONTEXT = 300, 64
WORDS = "".join(f"The number {i} times {i} is {i * i}, and so it goes on from {i % 7}.\n" for i in range(60))
KINDS = ("gpt2", "llama", "nanogpt")
LAYERS = {"gpt2": 11, "llama": 16, "nanogpt": 11}


def run(*arguments, stdout=None):
    """(status, stdout, stderr) of a command."""
    out, err = stdout or io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def good(*arguments):
    """(stdout, stderr) of a command that works."""
    status, out, err = run(*arguments)
    assert status == 0, err
    return out, err


def failure(status, *arguments):
    """The lines on stderr of a command that fails; the last one is the reason."""
    got, out, err = run(*arguments)
    assert (got, out) == (status, ""), err
    lines = err.splitlines()
    assert lines[-1].startswith("potqat: ")
    assert not lines[-1].startswith("potqat: potqat")
    return lines


def save_hf(config, folder, tokenizer=None, dtype=torch.float32):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def gpt2_config(**changes):
    fields = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 2}
    return transformers.GPT2Config(**fields | changes, bos_token_id=0, eos_token_id=0, initializer_range=0.2)


def named_tokenizer(kind, at):
    return ["--tokenizer", at.text] if kind == "nanogpt" else []


def tensors_of(folder):
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
