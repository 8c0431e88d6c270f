"""A text as tokens: characters, split by position into train, validation and test, or a tokenizer's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

SPLITS = {"train": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}


@dataclass(frozen=True)
class Text:
    """Token ids are positions in ``characters``, the sorted set of characters in the whole text.

    ``sha256`` is of the text in UTF-8; ``splits`` maps train, val and test to int64 [tokens].
    """

    name: str
    sha256: str
    characters: str
    splits: dict[str, torch.Tensor]

    def decode(self, ids: torch.Tensor) -> str:
        """The characters of int64 [T]."""
        return "".join(self.characters[i] for i in ids.tolist())

    def windows(self, split: str, context: int, at_most: int) -> torch.Tensor:
        """int64 [W, context + 1]: evenly spaced windows whose inputs do not overlap; all that fit, or ``at_most``."""
        tokens = self.splits[split]
        last = len(tokens) - context - 1
        count = min(at_most, last // context + 1)
        starts = torch.linspace(0, last // context, count, dtype=torch.float64).long() * context
        return self.at(split, starts, context)

    def at(self, split: str, starts: torch.Tensor, context: int) -> torch.Tensor:
        """int64 [W, context + 1]: the windows that begin at ``starts`` [W]."""
        return self.splits[split][starts[:, None] + torch.arange(context + 1)]


def load_text(path: str | Path | None, context: int) -> Text:
    """The text of content_of, split.

    Raises:
        as content_of; ValueError: a split does not hold one window of ``context`` + 1 characters.
    """
    return split_text(*content_of(path), context)


def content_of(path: str | Path | None) -> tuple[str, str]:
    """(name, content) of a UTF-8 text file, or for None of the text that is everywhere: the language help that comes
    with Python (``pydoc_data.topics``; its wording changes a little from version to version).

    Raises:
        as read_text.
    """
    if path is not None:
        return Path(path).name, read_text(path)
    from pydoc_data.topics import topics

    return "pydoc_data.topics", "".join(topics[key] for key in sorted(topics))


def split_text(name: str, content: str, context: int) -> Text:
    """Tokenize ``content`` and split it; errors as in load_text."""
    points = np.frombuffer(content.encode("utf-32-le"), dtype=np.uint32)
    characters, ids = np.unique(points, return_inverse=True)
    tokens = torch.from_numpy(ids.astype(np.int64))
    n = len(tokens)
    splits = {split: tokens[round(begin * n) : round(end * n)] for split, (begin, end) in SPLITS.items()}
    shortest = min(splits, key=lambda split: len(splits[split]))
    if len(splits[shortest]) < context + 1:
        raise ValueError(
            f"{name}: the text is too short: its {shortest} split holds {len(splits[shortest])} characters of {n}, and "
            f"one window of context {context} needs {context + 1}; give a longer text or a smaller context"
        )
    return Text(name, sha256(content), "".join(map(chr, characters)), splits)


def sha256(content: str) -> str:
    """Of a text in UTF-8, in hex."""
    return hashlib.sha256(content.encode()).hexdigest()


def tokenize(path: str | Path, tokenizer: Any, vocabulary: int | None = None) -> tuple[str, list[int]]:
    """(the content, its token ids) of a UTF-8 text file, tokenized whole, without special tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        vocabulary: tokens that the model knows; None: not checked.

    Raises:
        as read_text; ValueError: the tokenizer cannot read it, or gives tokens that the model does not know.
    """
    name, text = Path(path).name, read_text(path)
    try:
        # verbose=False: a text is longer than the model's context by design; the tokenizer would warn about it
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # what a tokenizer raises for a character that it does not know is of no type of its own
        raise ValueError(f"{name}: the tokenizer cannot read it: {error}; give a text that it was made for") from error
    if vocabulary is not None and ids and max(ids) >= vocabulary:
        raise ValueError(f"{name}: has token {max(ids)}, and the model knows {vocabulary}; give its own tokenizer")
    return text, ids


def read_text(path: str | Path) -> str:
    """The content of a UTF-8 text file, line ends as they are.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the file cannot be read.
        ValueError: the file is empty or not UTF-8.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise type(error)(f"{path}: cannot read the text: {error.strerror}; check the path") from None
    if not content:
        raise ValueError(f"{path}: the file is empty; give a text file in UTF-8")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}); convert it to UTF-8 first"
        ) from None
