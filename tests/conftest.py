import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import potqat
from potqat.models.gpt import GPT, GPTConfig

# Modules beside the tests that hold asserts: they, too, show values when they fail.
pytest.register_assert_rewrite("calibration_models", "command", "container_files")

settings.register_profile("potqat", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("potqat")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=potqat.cpu_info()["built"])
def isa(request):
    """Each instruction set this binary holds; the ones this machine lacks show as skipped."""
    before = potqat.cpu_info()["isa"]
    if request.param not in potqat.cpu_info()["available"]:
        pytest.skip(f"this machine has no {request.param}")
    potqat.set_isa(request.param)
    assert potqat.cpu_info()["isa"] == request.param
    yield request.param
    potqat.set_isa(before)


@pytest.fixture
def one_thread():
    """Restores torch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_gpt():
    """Makes a GPT in float64 whose float32 rounding is far below what is compared, with logits of a few units."""

    def make(seed, vocabulary):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocabulary, block_size=128, n_layer=1, n_head=2, n_embd=16)).double().eval()
        # Not tied: no mere echo.
        model.lm_head.weight = torch.nn.Parameter(torch.randn(vocabulary, 16, dtype=torch.float64))
        return model

    return make


@pytest.fixture(scope="module")
def command_settings():
    """One thread, and transformers as it was: the command line silences it."""
    transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def bpe_tokenizer():
    """Makes a tokenizer of ``vocabulary`` symbols, of a text."""
    transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")
    from tokenizers import ByteLevelBPETokenizer

    def make(text, vocabulary):
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator([text], vocab_size=vocabulary, special_tokens=["<s>"], show_progress=False)
        return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="<s>")

    return make


@pytest.fixture(scope="session")
def small_llama(bpe_tokenizer):
    """Writes a Llama of two layers, whose head is not tied, and a tokenizer of a text to a folder."""
    transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip

    def write(folder, text):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        bpe_tokenizer(text, config.vocab_size).save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def data():
    """The folder of public texts that the slow tests read; they are not ours to ship."""
    if "POTQAT_DATA" not in os.environ:
        pytest.skip(
            "set POTQAT_DATA to a folder with wikitext2-test.txt (WikiText-2's test split) and gpt2-merges.txt (the "
            "merges.txt of GPT-2)"
        )
    return Path(os.environ["POTQAT_DATA"])


@pytest.fixture(scope="session")
def gpt2_tokenizer(data, tmp_path_factory):
    """GPT-2's own tokenizer. Its ids: the 256 bytes, printable ones first, then the merges, then <|endoftext|>."""
    transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = (data / "gpt2-merges.txt").read_text(encoding="utf-8")
    pairs = [line for line in merges.splitlines() if not line.startswith("#version")]
    symbols = [*bytes_to_unicode().values(), *(pair.replace(" ", "") for pair in pairs), "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("gpt2-tokenizer")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}), encoding="utf-8")
    return transformers.GPT2TokenizerFast.from_pretrained(folder)
