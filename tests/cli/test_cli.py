"""The command: help without heavy imports, clear errors, exit statuses, JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import click
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from cluster import hash_key
from pipelines.cli.main import main
from pipelines.cli.options import PROFILE_NAMES
from pipelines.config.load import PROFILES, load_config
from pipelines.config.names import STAGES
from pipelines.jobs.status import status_lines
from pipelines.run.folder import Run
from pipelines.run.schemas import face_id
from pipelines.run.text import to_json
from pipelines.stages.rows import to_table


def scol(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_help_is_quick_and_explains_every_command() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom pipelines.cli.main import main\n"
        "result = CliRunner().invoke(main, ['--help'])\nprint(result.output)\n"
        "heavy = {'torch', 'ray', 'numpy', 'pyarrow', 'pydantic', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert result.exit_code == 0\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    context = click.Context(main)
    names = main.list_commands(context)
    assert len(names) == 15 and main.get_command(context, "nonsense") is None
    for name in names:
        command = main.get_command(context, name)
        assert f"  {name} " in done.stdout
        shown = scol(name, "--help")
        assert shown.exit_code == 0 and command.help.split("\n")[0][:30] in " ".join(shown.output.split())
    assert PROFILE_NAMES == tuple(PROFILES)


def test_config_prints_a_file_that_can_be_read_back(tmp_path: Path) -> None:
    shown = scol("config", "--profile", "quick", "--set", "tune.steps=7")
    assert tomllib.loads(shown.output)["tune"]["steps"] == 7
    (tmp_path / "c.toml").write_text(shown.output)
    assert load_config(file=tmp_path / "c.toml") == load_config("quick", sets=["tune.steps=7"])
    assert json.loads(scol("config", "--json").output)["attack"]["eps"] == load_config().attack.eps


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["config", "--set", "tune.stpes=1"], "error: tune.stpes: unknown key, did you mean tune.steps?"),
        (["config", "--config", "/nowhere.toml"], "No such file"),
        (["protect", "{src}", "--out", "{tmp}/out", "--set", "publish.judge=dlib_resnet"], "never judges"),
        (["protect", "{tmp}/nowhere", "--out", "{tmp}/out"], "NOT_FOUND"),
        (["protect", "{src}", "--out", "{src}"], "OUT_IS_SRC"),
        (["protect", "{src}", "--out", "{src}/out"], "OUT_INSIDE_SRC"),
        (["protect", "{src}", "--out", "{tmp}/out", "--run", "{src}/run"], "the run's folder"),
        (["protect", "{src}", "--out", "{tmp}/out", "--run", "{tmp}/out/run"], "nor lie in it"),
        (["protect", "{tmp}/empty", "--out", "{tmp}/out"], "EMPTY: no photo"),
        (["protect", "{src}", "--out", "{tmp}/out", "--gallery", "{tmp}/nowhere"], "nowhere"),
        (["status", "{tmp}"], "no run of scol"),
        (["errors", "{tmp}"], "no run of scol"),
        (["cancel", "{tmp}"], "no run of scol"),
        (["retry", "{tmp}"], "no run of scol"),
        (["purge", "{tmp}", "--person", "x"], "no run of scol"),
        (["report", "{tmp}"], "no run of scol"),
        (["gallery", "info", "{tmp}"], "{tmp}"),
        (["plan", "{tmp}/nowhere"], "NOT_FOUND"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments: list[str], words: str, tmp_path: Path) -> None:
    src = tmp_path / "photos"
    src.mkdir()
    (src / "a.jpg").write_bytes(b"not a photo")
    (tmp_path / "empty").mkdir()
    names = {"src": str(src), "tmp": str(tmp_path)}
    result = scol(*(a.format(**names) for a in arguments))
    assert result.exit_code == 2
    assert words.format(**names) in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1
    assert [p.name for p in src.iterdir()] == ["a.jpg"], "SRC is never written to"


@pytest.mark.parametrize(("url", "words"), [("foo://bar/x", "foo"), ("gs://bucket/x", "gcsfs")])
@pytest.mark.parametrize(
    "arguments",
    [
        "protect {url} --out {tmp}/out",
        "protect {src} --out {url}",
        "protect {src} --out {tmp}/out --run {url}",
        "protect {src} --out {tmp}/out --gallery {url}",
        "plan {url}",
        "plan {src} --run {url}",
        "status {url}",
        "errors {url}",
        "cancel {url}",
        "retry {url}",
        "purge {url} --person x",
        "report {url}",
        "evaluate {url} {src}",
        "evaluate {src} {url}",
        "evaluate {src} {tmp}/other --out {url}",
        "evaluate {src} {tmp}/other --gallery {url}",
        "evaluate {src} {tmp}/other --models {url}",
        "gallery build {src} --out {url}",
        "gallery build {url} --out {tmp}/g",
        "gallery build --synthetic 20 --out {url}",
        "gallery info {url}",
        "gallery list {url}",
        "models list --store {url}",
        "models add irse50 {url}",
    ],
)
def test_a_url_that_cannot_be_opened_is_one_line_and_status_2(
    arguments: str, url: str, words: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where the package is not installed
    for name in ("photos", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"not a photo")
    result = scol(*(a.format(url=url, src=tmp_path / "photos", tmp=tmp_path) for a in arguments.split()))
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and url in told[0] and words in told[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    (tmp_path / "locked").mkdir(mode=0o500)
    result = scol("protect", str(tmp_path / "photos"), "--out", str(tmp_path / "locked" / "out"))
    assert result.exit_code == 2 and "NOT_WRITABLE" in result.stderr


def test_usage_mistakes(tmp_path: Path) -> None:
    assert "give either PHOTOS or --synthetic" in scol("gallery", "build", "--out", str(tmp_path / "g")).output
    assert scol("protect", "x").exit_code == 2 and scol("frobnicate").exit_code == 2


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three photos: done, failed at align, and one on its way (tuning failed for one of two faces)."""
    run = Run(str(tmp_path / "out.run"))
    photos = ["a", "b", "c"]
    import pyarrow as pa

    columns = {"photo_id": photos, "path": [f"{p}.jpg" for p in photos]}
    run.write_plan(pa.table(columns | {stage: [hash_key(p) for p in photos] for stage in ("source", *STAGES)}))

    def row(photo: str, index: int | None, status: str = "ok", **more) -> dict:
        name = None if index is None else face_id(photo, index)
        return {"key": hash_key(photo), "photo_id": photo, "face_id": name, "status": status} | more

    bad = row("b", None, "error", reason="CORRUPT: words", failed_stage="align")
    timeout = row("c", 1, "error", reason="TIMEOUT: 9 s", failed_stage="tune")
    tables = {
        "align": [row("a", 0), bad, row("c", 0), row("c", 1)],
        "tune": [row("a", 0), bad, row("c", 0), timeout],
        "publish": [
            row("a", 0, "weak", reason="WEAK_IDENTITY: words", failed_stage="publish", action="protected"),
            bad,
        ],
    }
    for stage, rows in tables.items():
        run.store.write_part(stage, None, to_table(stage, rows))
    return tmp_path / "out.run"


def test_status(run: Path) -> None:
    found = json.loads(scol("status", str(run), "--json").output)
    assert found["photos"] == 3 and found["faces"] == 3
    assert {s: e["done"] for s, e in found["stages"].items()} == {
        "source": 0,
        "align": 3,
        "invert": 0,
        "fuse": 0,
        "tune": 3,
        "attack": 0,
        "publish": 2,
    }
    assert (found["weak"], found["error"], found["pending"]) == (1, 1, 1)
    assert found["stages"]["tune"]["rows"] == {"ok": 2, "error": 2}
    shown = scol("status", str(run)).output
    assert "tune             3/3 photos" in shown and "pending        1" in shown
    assert (found["jod"], found["jod_p5"]) == (None, None) and "JOD" not in shown  # rows of an older version


def test_status_tells_what_is_seen_of_the_faces() -> None:
    counts = dict.fromkeys(("photos", "faces", "ok", "weak", "no_face", "error", "pending"), 1)
    measures = {"jod": 9.234, "jod_p5": 8.5, "face_psnr": 31.27, "face_ssim": None, "flip": 0.1}
    lines = status_lines(counts | measures | {"drivers": [], "stages": {}})
    line = "faces so far  JOD 9.23, 5 % below 8.50; over the face PSNR 31.27 dB, SSIM -, FLIP 0.100"
    assert line in lines


def test_errors(run: Path) -> None:
    found = json.loads(scol("errors", str(run), "--json").output)
    assert [(r["path"], r["status"], r["failed_stage"]) for r in found] == [
        ("a.jpg", "weak", "publish"),
        ("b.jpg", "error", "align"),
        ("c.jpg", "error", "tune"),
    ]
    assert found[2]["face_id"] == "c-01"
    assert [r["path"] for r in json.loads(scol("errors", str(run), "--no-weak", "--json").output)] == ["b.jpg", "c.jpg"]
    assert "error  align    b.jpg: CORRUPT: words" in scol("errors", str(run)).output


def test_errors_by_reason_and_as_a_table(run: Path, tmp_path: Path) -> None:
    groups = json.loads(scol("errors", str(run), "--reasons", "--json").output)
    assert [(g["code"], g["failed_stage"], g["rows"], g["photos"]) for g in groups] == [
        ("CORRUPT", "align", 1, 1),
        ("TIMEOUT", "tune", 1, 1),
        ("WEAK_IDENTITY", "publish", 1, 1),
    ]
    assert groups[1]["examples"] == [{"path": "c.jpg", "reason": "TIMEOUT: 9 s"}]
    shown = scol("errors", str(run), "--reasons", "--parquet", str(tmp_path / "errors.parquet")).output
    assert "1 error  tune     TIMEOUT (1 photos)" in shown and "c.jpg: TIMEOUT: 9 s" in shown
    table = pq.read_table(tmp_path / "errors.parquet")
    assert table["path"].to_pylist() == ["a.jpg", "b.jpg", "c.jpg"]
    assert table["face_id"].to_pylist() == ["a-00", None, "c-01"] and table["failed_stage"][2].as_py() == "tune"


def test_models_lists_digests_that_hold() -> None:
    from scol_ops.models.files import SHA256

    result = scol("models", "--json")
    cards = {card["name"]: card for card in json.loads(result.output)}
    assert result.exit_code == 0 and all(
        card["found"] and card["licence"] and card["source"] for card in cards.values()
    )
    assert {"mobilestylegan-256", "encoder", "mobilefacenet", "dlib_resnet", "faceres", "mtcnn"} <= set(cards)
    listed = {name: digest for card in cards.values() for name, digest in card["files"].items()}
    assert SHA256.items() <= listed.items(), "an embedded file without a card"
    assert "dlib" in scol("models").output


def test_synthetic_gallery(tmp_path: Path) -> None:
    out = str(tmp_path / "g")
    built = scol("gallery", "build", "--synthetic", "40", "--out", out, "--json")
    assert built.exit_code == 0, built.output
    described = json.loads(scol("gallery", "info", out, "--json").output)
    assert described == json.loads(built.stdout) and described["codes"] == 40 and described["layers"] == 16
    again = scol("gallery", "build", "--synthetic", "40", "--out", out, "--json")
    assert again.exit_code == 0 and json.loads(again.stdout) == described, "the same version, not another"


def test_versions_of_a_gallery(tmp_path: Path) -> None:
    """From outside: build, another build, back, remove, list, verify, prune; each as it is printed."""
    out = str(tmp_path / "g")

    def told(*arguments: str) -> dict:
        result = scol("gallery", *arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    first = told("build", "--synthetic", "30", "--out", out)["version"]
    second = told("build", "--synthetic", "40", "--out", out)["version"]
    assert told("switch", out, first)["codes"] == 30
    other = str(tmp_path / "other")
    told("build", "--synthetic", "20", "--set", "gallery.synthetic_seed=5", "--out", other)
    added = told("add", out, "--gallery", other)
    assert (added["added"], added["unchanged"]) == (20, 0)
    assert told("add", out, "--gallery", other)["version"] == added["version"], "nothing to add, no version"
    removed = told("remove", out, "--person", "synthetic-5-0000003", "--face", "synthetic-0-0000007")
    assert (removed["removed"], removed["codes"]) == (2, 48)
    names = [row["version"] for row in told("list", out)]
    assert names == [first, second, added["version"], removed["version"]]
    lines = scol("gallery", "list", out).output.splitlines()
    assert [line[0] for line in lines] == [" ", " ", " ", "*"] and "removed 2" in lines[3]
    assert told("verify", out)["self_retrieved"] == 1 and told("verify", out, "--version", first)["codes"] == 30
    assert sorted(told("prune", out, "--keep", "9")["versions"]) == names[:3]  # all three held one of the two
    assert told("add", out, "--gallery", other)["refused"] == 1
    assert scol("gallery", "readmit", out, "--person", "synthetic-5-0000003").output == "1 taken off the list\n"
    assert told("add", out, "--gallery", other)["added"] == 1

    for arguments in (("switch", out, first), ("add", out), ("remove", out), ("list", str(tmp_path / "nowhere"))):
        assert scol("gallery", *arguments).exit_code == 2
    damaged = next((tmp_path / "g" / "versions" / told("info", out)["version"]).glob("codes-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    wrong = scol("gallery", "verify", out)
    assert wrong.exit_code == 2 and damaged.name in wrong.stderr and "bytes, expected" in wrong.stderr


def test_numbers_that_json_has_not_become_null() -> None:
    assert json.loads(to_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": "x"})) == {
        "a": None,
        "b": [None, 1.5],
        "c": "x",
    }


def test_sigterm_stops_a_run_as_cleanly_as_ctrl_c(tmp_path: Path) -> None:
    """Batch systems end jobs by SIGTERM: finished parts stay, the summary says so, the same command goes on."""
    (tmp_path / "photos").mkdir()
    for i in range(24):  # no faces: only the stage align works
        Image.new("RGB", (900, 1200), (9 * i, 120, 60)).save(tmp_path / f"photos/{i:02d}.jpg")
    command = [
        sys.executable,
        "-m",
        "pipelines.cli.main",
        "protect",
        str(tmp_path / "photos"),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--set", "gallery.synthetic=50", "--set", "engine.shard_photos=1", "--set", "engine.workers=1"]
    root = Path(__file__).parents[2]
    run = Run(str(tmp_path / "out.run"))
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 180
    while not list((tmp_path / "out.run/manifests/align").glob("*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "interrupted" in output, output
    summary = run.read_json("summary.json")
    assert summary["interrupted"] and 0 < summary["pending"] + summary["no_face"] == 24 and summary["pending"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    summary = run.read_json("summary.json")
    assert summary["no_face"] == 24 and 0 < summary["engine"]["stages"]["align"]["kept"] < 24
