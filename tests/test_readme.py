"""README as a reader uses it: commands and Python blocks run in order, in one folder; its map is complete."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from potqat.cli import main
from potqat.flows import bench

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the README names and a reader has or downloads: ``gpt2``, here a small GPT-2 with random
    weights and a tokenizer of bytes (a folder of that name goes before the hub), and ``text.txt``. What ``bench`` times
    is small, too."""
    transformers = pytest.importorskip("transformers", reason="needs potqat[hf]")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = len(alphabet) - 1
    config = transformers.GPT2Config(
        vocab_size=len(alphabet), n_positions=512, n_embd=64, n_layer=2, n_head=2, bos_token_id=end, eos_token_id=end
    )
    monkeypatch.chdir(tmp_path)
    transformers.GPT2LMHeadModel(config).save_pretrained("gpt2")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[-1])
    fast.save_pretrained("gpt2")
    Path("text.txt").write_text(README, encoding="utf-8")
    monkeypatch.setattr(bench, "SHORT", bench.Plan(shapes=((64, 96),), rows=(1,), threads=(), rounds=1))
    monkeypatch.setattr(bench, "rotation_bytes", lambda peers: 100_000)
    return tmp_path


def test_commands_and_python_blocks_run_in_order(workplace, capsys, one_thread):
    torch.set_num_threads(1)
    namespace, printed, by_python = {}, {}, ""
    for language, block in BLOCKS:
        if language == "python":
            exec(block, namespace)
        for line in block.splitlines() if language == "sh" else ():
            verb, *arguments = shlex.split(line, comments=True)
            assert verb in ("potqat", "make", "pip")  # .ci/run runs the other two
            if verb == "potqat":
                by_python += capsys.readouterr().out
                assert main(arguments) == 0, line
                printed[arguments[0]] = capsys.readouterr().out
    assert list(printed) == ["quantize", "generate", "eval", "inspect", "bench", "doctor", "train"]
    assert "11 layers quantized, 0 left float." in printed["quantize"]
    assert printed["generate"].startswith("The water cycle")
    assert re.match(r"perplexity \d+\.\d+ .* on text\.txt: first 4,096 of [\d,]+ tokens, context 512", printed["eval"])
    assert "tied to transformer.wte" in printed["inspect"]
    assert re.search(r"potqat pot4 +\d", printed["bench"])
    assert "equal bit for bit" in printed["doctor"]
    assert "11 quantized, 0 skipped" in by_python + capsys.readouterr().out
    assert {path.name for path in workplace.iterdir()} == {
        "gpt2", "gpt2-e2m1", "gpt2-qat", "gpt2-trained", "packed", "text.txt",
    }  # fmt: skip


def test_the_map_is_complete():
    blocks = README.split("## Map")[1].split("```")[1]
    lines = re.findall(r"^(\w[\w./]*)  +(.*(?:\n  +.*)*)", blocks, re.MULTILINE)
    assert not [place for place, _ in lines if not (ROOT / place).exists()]
    named = {place: set(re.findall(r"\w+", words)) for place, words in lines}
    for folder in ("potqat/", "potqat/pt2e/", "potqat/models/", "potqat/flows/"):
        files = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__", "__main__", "reference"}
        assert not files - named[folder], folder
    assert not {path.stem for path in (ROOT / "cpp" / "core").glob("*.cpp")} - named["cpp/core/"]
    assert not {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - named["notebooks/"]
    assert not {path.stem for path in (ROOT / "docs").glob("*.md")} - named["docs/"]


def test_the_results_are_those_of_the_committed_runs():
    code = (ROOT / "benchmarks" / "readme.py").read_text(encoding="utf-8")
    namespace = {"__file__": str(ROOT / "benchmarks" / "readme.py"), "__name__": "readme"}
    exec(compile(code, "readme.py", "exec"), namespace)
    assert namespace["with_results"](README) == README
