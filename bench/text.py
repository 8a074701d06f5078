"""Text to train on: the Python standard library's own sources, as numbered tokens."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

VOCABULARY = 32_000

# A word or identifier, a number, a line's end with the next line's indent, or any other
# visible character by itself.
_TOKEN = re.compile(r"[^\W\d]\w*|\d[\w.]*|\n[ \t]*|[^\w\s]")
_UNKNOWN = 0
# Other people's packages differ from machine to machine; tests hold odd text on purpose.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class Corpus(NamedTuple):
    """Tokenised text.

    Attributes:
        ids: the number of every token in order, int64; 0 is the unknown token.
        files: number of files read.
        distinct: number of different tokens before the rare ones became unknown.
    """

    ids: Tensor
    files: int
    distinct: int

    def __str__(self) -> str:
        known = (self.ids != _UNKNOWN).double().mean().item()
        return (
            f"{self.files} files of Python's standard library, {len(self.ids):,} tokens, "
            f"{self.distinct:,} different; the {VOCABULARY - 1:,} most frequent make up {known:.1%}"
        )


def read_corpus() -> Corpus:
    """Read and tokenise the sources of this Python's standard library."""
    texts = [_TOKEN.findall(path.read_text("utf-8", "replace")) for path in _sources()]
    counts: Counter[str] = Counter()
    for tokens in texts:
        counts.update(tokens)
    frequent = counts.most_common(VOCABULARY - 1)
    numbers = {token: number for number, (token, _) in enumerate(frequent, _UNKNOWN + 1)}
    ids = [numbers.get(token, _UNKNOWN) for tokens in texts for token in tokens]
    return Corpus(torch.tensor(ids, dtype=torch.int64), len(texts), len(counts))


def _sources() -> list[Path]:
    """The source files, in an order that is the same everywhere."""
    root = Path(sysconfig.get_paths()["stdlib"])
    inside = (path.relative_to(root) for path in root.rglob("*.py"))
    wanted = (path for path in inside if _SKIPPED_FOLDERS.isdisjoint(path.parts))
    return [root / path for path in sorted(wanted, key=Path.as_posix)]


def batches(ids: Tensor, size: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random excerpts: tokens (size, context), and the next ones (size * context,)."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(ids) - context, (size, 1), generator=generator)
        excerpts = ids[starts + window]
        yield excerpts[:, :-1], excerpts[:, 1:].flatten()
