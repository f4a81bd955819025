"""The house stays as `docs/design.md` draws it: imports run one way, late ones say why, functions stay short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipelines", "scol_ops", "gallery_index", "cluster")
LONGEST = 60  # lines of a function without its docstring

# Tables and parsers, whose lines are all alike.
LONG = {
    "pipelines/cli/evaluate.py:evaluate",
    "scol_ops/models/pickle_reader.py:run",
    "pipelines/photos/jpeg.py:read_jpeg",
    "pipelines/photos/png.py:read_png",
}


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """Path, text and syntax tree of every module."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            yield path.relative_to(ROOT).as_posix(), text, ast.parse(text)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_imports_run_one_way(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout)


def test_late_imports_say_why() -> None:
    """An import inside a function saves a slow load, and a comment beside it says so; the commands' modules say it
    once."""
    silent = []
    for path, text, tree in modules():
        if path.startswith("pipelines/cli/"):
            continue
        lines = text.splitlines()
        for function in functions(tree):
            late = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
            said = any("#" in lines[n.lineno - 1] or lines[n.lineno - 2].lstrip().startswith("#") for n in late)
            if late and not said:
                silent.append(f"{path}:{late[0].lineno} {function.name}")
    assert not silent, "imports inside functions without a reason:\n" + "\n".join(silent)


def test_functions_are_short() -> None:
    long = set()
    for path, _, tree in modules():
        for function in functions(tree):
            lines = function.end_lineno - function.lineno + 1
            if ast.get_docstring(function) is not None:
                lines -= function.body[0].end_lineno - function.body[0].lineno + 1
            if lines > LONGEST:
                long.add(f"{path}:{function.name}")
    assert long == LONG


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_about(package: str) -> None:
    silent = [
        path
        for path, text, tree in modules()
        if path.startswith(package) and text.strip() and not ast.get_docstring(tree)
    ]
    assert not silent
