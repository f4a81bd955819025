"""A disk that fails: what may pass is tried again, what will not is told at once, and nothing half written stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipelines.archive.output import write_output
from pipelines.archive.paths import OutputError
from pipelines.run.folder import Run


@pytest.fixture
def pauses(monkeypatch):
    found: list[float] = []
    monkeypatch.setattr("cluster.retries.time.sleep", found.append)
    return found


def failing(monkeypatch, code: int, times: int) -> list[int]:
    """`os.replace` fails so many times, as the system call would."""
    seen, replace = [], os.replace

    def fail(a, b):
        if len(seen) < times:
            seen.append(code)
            raise OSError(code, os.strerror(code))
        replace(a, b)

    monkeypatch.setattr(os, "replace", fail)
    return seen


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_permanent_fault_is_told_at_once(tmp_path: Path, monkeypatch, pauses, code: int) -> None:
    run, seen = Run(str(tmp_path / "run")), failing(monkeypatch, code, 99)
    with pytest.raises(OSError) as caught:
        run.write("a.json", b"{}")
    assert caught.value.errno == code and len(seen) == 1 and pauses == []
    assert not run.has("a.json") and list((tmp_path / "run").iterdir()) == []


def test_a_transient_fault_is_survived(tmp_path: Path, monkeypatch, pauses) -> None:
    run, seen = Run(str(tmp_path / "run")), failing(monkeypatch, errno.EIO, 3)
    run.write("a.json", b"{}")
    assert len(seen) == len(pauses) == 3 and run.read_json("a.json") == {} and run.names() == ["a.json"]


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.ENOSPC, "DISK_FULL"), (errno.EACCES, "NOT_WRITABLE"), (errno.EIO, "WRITE_FAILED")]
)
def test_an_output_that_cannot_be_written_has_a_typed_reason(
    tmp_path: Path, monkeypatch, pauses, code: int, reason: str
):
    failing(monkeypatch, code, 99)
    with pytest.raises(OutputError, match=reason):
        write_output(str(tmp_path / "out"), "d/a.jpg", b"data")
    assert list((tmp_path / "out" / "d").iterdir()) == []
