"""Models of three kinds to calibrate, batches for them, and what their layers are shown, found anew."""

import pytest
import torch
from torch import nn

from potqat import PoTConfig
from potqat.models.gpt import GPT, GPTConfig

VOCABULARY, CONTEXT = 65, 24
CFG = PoTConfig(scale="output", rounding="gptq")
START = PoTConfig(scale="learned", scale_init="output", rounding="gptq")
KINDS = ("own", "gpt2", "llama")


def make(kind, layers=2):
    torch.manual_seed(0)
    if kind == "own":
        shape = {"vocab_size": VOCABULARY, "block_size": CONTEXT, "n_layer": layers, "n_head": 2, "n_embd": 32}
        model = GPT(GPTConfig(**shape, dropout=0.3, bias=True))
    else:
        transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        if kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=layers, n_head=2, **ends
            )
        else:
            config = transformers.LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
                tie_word_embeddings=False, **ends,
            )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def batches(count=3, b=2, t=CONTEXT):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (b, t), generator=generator) for _ in range(count)]


def linears(model):
    """name -> module of the layers that calibration is for: all but tables and what is tied to one."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    kinds = (nn.Linear, *([type(model.transformer.h[0].attn.c_attn)] if hasattr(model, "transformer") else []))
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and id(m.weight) not in tables}


@torch.no_grad()
def logits(model, ids):
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


@torch.no_grad()
def moments(model, names, data):
    """Second moments of the inputs of modules, from whole forward passes."""
    found = {name: 0.0 for name in names}
    count = sum(ids.numel() for ids in data)
    for name in names:

        def add(_, args, name=name):
            x = args[0].flatten(0, -2).double()
            found[name] = found[name] + x.t() @ x / count

        model.get_submodule(name).register_forward_pre_hook(add)
    for ids in data:
        logits(model, ids)
    return found


@torch.no_grad()
def cross_moment(other, model, name, data):
    """Mean of x' x^T, x and x' the inputs of a layer in ``model`` and in ``other``."""
    found = []
    for each in (other, model):
        inputs = []
        hook = each.get_submodule(name).register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2).double())
        )
        for ids in data:
            logits(each, ids)
        hook.remove()
        found.append(torch.cat(inputs))
    return found[0].t() @ found[1] / len(found[0])


def assert_untouched(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())
