"""`scol doctor`: an installation that is whole, and one that is not."""

from __future__ import annotations

import json

from click.testing import CliRunner

from pipelines.cli.main import main
from pipelines.jobs import doctor
from scol_ops.models import files

CHECKS = ["python", "torch", "gpu", "faiss", "weights", "ray", "memory", "disk"]


def test_a_whole_installation(tmp_path):
    shown = CliRunner().invoke(main, ["doctor", "--json", "--out", str(tmp_path)])
    found = {check["name"]: check for check in json.loads(shown.stdout)}
    assert list(found) == CHECKS
    assert [name for name, check in found.items() if not check["ok"]] == [], shown.stdout
    assert shown.exit_code == 0
    assert "sha256 as expected" in found["weights"]["words"] and "ran a task" in found["ray"]["words"]


def test_damaged_weights_and_a_ray_that_does_not_start_are_told(tmp_path, monkeypatch):
    for path in files.DATA.iterdir():
        (tmp_path / path.name).symlink_to(path)
    damaged = bytearray((files.DATA / "swapper.safetensors").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "swapper.safetensors").unlink()
    (tmp_path / "swapper.safetensors").write_bytes(damaged)
    (tmp_path / "encoder.safetensors").unlink()
    monkeypatch.setattr(files, "DATA", tmp_path)

    def broken(**settings):
        raise RuntimeError("no port is free")

    monkeypatch.setattr(doctor, "ray_session", broken)
    shown = CliRunner().invoke(main, ["doctor", "--out", str(tmp_path)])
    assert shown.exit_code == 1
    lines = {line[5:].split()[0]: line for line in shown.stdout.splitlines()}
    assert list(lines) == CHECKS
    assert [name for name, line in lines.items() if line.startswith("FAIL")] == ["weights", "ray"]
    assert "swapper.safetensors has sha256" in lines["weights"] and "refused" in lines["weights"]
    assert "cannot read weights" in lines["weights"] and "encoder.safetensors" in lines["weights"]
    assert "RuntimeError: no port is free" in lines["ray"]
