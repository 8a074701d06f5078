"""The pages are what the code says: generated ones are up to date, the code on all of them runs.

Blocks of ```python on a page run one after the other in one namespace, in a process of their own
whose working directory is empty. A ```text block right after one is what it prints, `...` standing
for anything. So is one after a ```sh block, if that is a `python -m` command.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib.util
import io
import linecache
import os
import re
import shlex
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from children import ROOT, run

import fastopt
from fastopt import formula
from fastopt.nn._operations import FUNCTIONS, MODULES
from fastopt.nn.utils.clip_grad import FUNCTIONS as CLIPPING
from fastopt.optim._operations import CLASSES

DOCS = ROOT / "docs"
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in DOCS.glob("*.md")))
#: Packages without which a page still runs, but for the blocks that import them.
OPTIONAL = ("transformers", "accelerate", "lightning", "triton")


# -- code on pages ------------------------------------------------------------------------


class Block(NamedTuple):
    """A piece of code on a page.

    Attributes:
        language: "python" or "sh".
        line: where its code begins, from 0.
        code: without the indentation that a list gives it.
        output: what it says to print, None if it says nothing.
    """

    language: str
    line: int
    code: str
    output: str | None

    def packages(self) -> set[str]:
        """The optional packages that it imports, or has from a block before."""
        if self.language != "python":
            return set()
        names = set()
        for node in ast.walk(ast.parse(self.code)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Name):
                names.add(node.id)
        return {o for o in OPTIONAL for name in names if o in name.split(".")}


_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[Block]:
    """The code of a page that is to run."""
    text = (ROOT / page).read_text()
    found = []
    for fence, after in pairwise([*_FENCE.finditer(text), None]):
        _, language, code = fence.groups()
        printed = None
        if after and after[2] == "text" and not text[fence.end() : after.start()].strip():
            printed = textwrap.dedent(after[3])
        if language == "python" or (language == "sh" and code.startswith("python -m") and printed):
            line = text.count("\n", 0, fence.start(3))
            found.append(Block(language, line, textwrap.dedent(code), printed))
    return found


def run_page(page: str, without: list[str], folder: str) -> None:
    """Run a page's code, but for blocks that import one of some packages."""
    script = Path(folder, page).with_suffix(".py")  # where Triton looks for the source, too
    script.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(script.parent)
    lines = [""] * (ROOT / page).read_text().count("\n")
    for block in blocks(page):
        code = block.code.splitlines()
        lines[block.line : block.line + len(code)] = code
    script.write_text("\n".join(lines) + "\n")
    for block in blocks(page):
        if block.packages() & set(without):
            continue
        printed = execute(block, script)
        if block.output is not None:
            where = f"{page}, line {block.line + 1}"
            same = re.fullmatch(pattern(block.output), printed.rstrip() + "\n")
            assert same, f"{where} prints\n{printed}\nwhere the page has\n{block.output}"


def pattern(output: str) -> str:
    """What a page shows as a regular expression; a line `...` stands for lines, or for none."""
    return "".join(
        r"(?:.*\n)*" if line == "..." else ".*".join(map(re.escape, line.split("..."))) + r"\n"
        for line in output.splitlines()
    )


def execute(block: Block, script: Path) -> str:
    """Run a block, in the namespace of the process; what it prints."""
    if block.language == "sh":
        command = [sys.executable, *shlex.split(block.code)[1:]]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = compile("\n" * block.line + block.code, script, "exec")  # lines as on the page
        exec(code, sys.modules["__main__"].__dict__)
    return out.getvalue()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_code_on_a_page_runs(page: str, tmp_path: Path) -> None:
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    # A page that adds kernels of its own must not leave them in the cache.
    env = {"NUMBA_CACHE_DIR": str(tmp_path)} if "adding" in page else {}
    run(run_page, page, missing, str(tmp_path), **env)
    skipped = [str(b.line + 1) for b in blocks(page) if b.packages() & set(missing)]
    if skipped:
        pytest.skip(f"all ran but lines {', '.join(skipped)}: no {' or '.join(missing)} installed")


def headings(text: str) -> set[str]:
    """The names by which links find a page's headings."""
    lines = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = _FENCE.sub("", (ROOT / page).read_text())
    for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        found = (ROOT / page).parent / target if target else ROOT / page
        assert found.exists(), target
        assert not heading or heading in headings(_FENCE.sub("", found.read_text())), heading


# -- examples in docstrings ---------------------------------------------------------------


def documented() -> dict[str, Any]:
    """The public functions and classes that have an example, by name."""
    public: dict[str, Any] = {name: getattr(fastopt, name) for name in fastopt.__all__}
    public |= {f"nn.{name}": kind for name, kind in MODULES.items()}
    public |= {f"nn.functional.{name}": function for name, function in FUNCTIONS.items()}
    public |= {f"nn.utils.{name}": function for name, function in CLIPPING.items()}
    public |= {f"optim.{name}": kind for name, kind in CLASSES.items()}
    return {f"fastopt.{name}": p for name, p in public.items() if ">>>" in (p.__doc__ or "")}


@fastopt.loss
def charbonnier(x, y, *, eps=1e-3):  # type: ignore[no-untyped-def]
    return formula.sqrt((x - y) ** 2 + eps**2)


def names() -> dict[str, Any]:
    """What examples take as given."""
    model = torch.nn.Linear(4, 4)
    x, y, signs = torch.randn(6, 4), torch.rand(6, 4), torch.randint(2, (6, 4)) * 2 - 1
    better, worse, distances, p, n = torch.rand(5, 6, 4).requires_grad_().unbind()
    log_p = torch.log_softmax(torch.randn(6, 4).requires_grad_(), -1)
    return {
        "fastopt": fastopt,
        "torch": torch,
        "model": model,
        "optimizer": fastopt.optim.SGD(model.parameters()),
        "charbonnier": charbonnier,
        "loss": model(x).square().mean(),
        "x": x,
        "y": y,
        "signs": signs,
        "similar": signs[:, 0],
        "better": better,
        "worse": worse,
        "distances": distances[:, 0],
        "boxes": x,
        "mean": better,
        "variance": worse + 0.1,
        "counts": torch.randint(5, (6, 4)).float(),
        "log_p": log_p,
        "q": log_p.detach().exp(),
        "input": x,
        "target": y,
        "images": x,
        "tags": y.round(),
        "a": better,
        "p": p,
        "n": n,
        "scores": x[:1],
        "classes": torch.tensor([[3, 0, -1, 1]]).expand(6, 4),
        "sound": torch.randn(9, 2, 4),
        "text": torch.randint(1, 4, (2, 3)),
        "steps": torch.full((2,), 9),
        "letters": torch.full((2,), 3),
        "hidden": torch.randn(6, 256, requires_grad=True),
        "head": torch.nn.Linear(256, 500),
        "words": torch.randint(50_000, (6,)),
        "labels": torch.randint(4, (6,)),
        "tokens": torch.randn(2, 3, 4),
        "next_tokens": torch.randint(4, (2, 3)),
    }


@pytest.mark.filterwarnings("ignore:`NLLLoss2d` has been deprecated:FutureWarning")
@pytest.mark.parametrize("name", documented())
def test_example_in_a_docstring_runs(name: str) -> None:
    namespace = names()
    if "linear_cross_entropy" in name or "LinearCrossEntropy" in name:  # tokens to predict
        namespace["tokens"] = torch.randint(500, (6,))
    if "CTC" in name:  # of time steps
        namespace["log_p"] = torch.randn(9, 2, 4).log_softmax(-1).requires_grad_()
    namespace["__name__"] = __name__
    for example in doctest.DocTestParser().get_examples(documented()[name].__doc__):
        place = f"<{name}, line {example.lineno}>"  # where a formula is read from
        linecache.cache[place] = len(example.source), None, example.source.splitlines(True), place
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(example.source, place, "exec"), namespace)
        if example.want:
            assert re.fullmatch(pattern(example.want), out.getvalue())


# -- generated pages ----------------------------------------------------------------------


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_contract_page_is_what_the_rules_say() -> None:
    assert (DOCS / "contract.md").read_text() == module("contract").page(), "run `make docs`"
