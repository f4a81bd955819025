"""After a purge no byte of any file in RUN and OUT speaks of the photo; all else is as it was."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from cluster import PartStore
from pipelines.archive.paths import photo_id
from pipelines.cli.main import main
from pipelines.config.names import STAGES
from pipelines.jobs import changes as night_changes
from pipelines.jobs.purge import purge
from pipelines.report.run_page import write_report
from pipelines.run import attempts
from pipelines.run.folder import Run, RunError
from pipelines.run.presence import BusyError, Presence
from pipelines.run.schemas import PLAN_SCHEMA, SOURCE, SOURCE_SCHEMA
from pipelines.run.summary import summary
from pipelines.run.tables import read_photos, read_stage
from pipelines.stages.rows import to_table

PEOPLE = {"Annegret/one.png": "Annegret", "Annegret/zwei ü.png": "Annegret", "Bob/bob.png": "Bob", "Cat/cat.png": None}
SIZE = 48


def picture(path: str, version: int) -> bytes:
    rng = np.random.default_rng(list(f"{path}{version}".encode()))
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def code(path: str, version: int) -> list[float]:
    return np.random.default_rng(list(f"{path}{version}".encode())).random(8192).astype(np.float32).tolist()


class Archive:
    """A run of four photos, two versions each, in parts that hold several photos; files in OUT, a log, a report."""

    def __init__(self, folder: Path) -> None:
        self.out, self.run = folder / "out", Run(str(folder / "out.run"))
        paths, plan = list(PEOPLE), []
        for version in (0, 1):
            for stage in (SOURCE, *STAGES):
                rows = [self.row(stage, path, version) for path in paths]
                groups = [rows[:1], rows[1:]] if stage in ("tune", "attack", "strengthen") else [rows]
                for group in groups:
                    table = pa.Table.from_pylist(group, SOURCE_SCHEMA) if stage == SOURCE else to_table(stage, group)
                    self.run.store.write_part(stage, None, table)
        for path in paths:
            keys = {stage: self.key(stage, path, 1) for stage in (SOURCE, *STAGES)}
            plan.append({"photo_id": photo_id(path), "path": path, **keys})
            (self.out / path).parent.mkdir(parents=True, exist_ok=True)
            (self.out / path).write_bytes(picture(path, 11))
        self.run.write_plan(pa.Table.from_pylist(plan, PLAN_SCHEMA), {"source": "/src", "evidence": "stat"})
        old = [{"photo_id": photo_id(path), "path": path, "source": "/src"} for path in paths[:1]]
        self.run.write_table(night_changes.DELETED, pa.Table.from_pylist(old, night_changes.DELETED_SCHEMA))
        opened = [{"stage": "tune", "key": self.key("tune", path, 0)} for path in paths]
        self.run.write_table(f"{attempts.FOLDER}/{'0' * 32}.parquet", pa.Table.from_pylist(opened, attempts.SCHEMA))
        self.run.write_json("run.json", {"source": "/src", "out": str(self.out), "config": {"seed": 0}})
        changes = {"deleted_paths": paths[:2], "pruned": {"removed_paths": paths[:2], "kept": {paths[0]: "words"}}}
        self.run.write_json("summary.json", summary(self.run) | {"changes": changes, "seconds": 7})
        log = [{"event": "row", "photo_id": photo_id(path), "path": path} for path in paths] + [{"event": "end"}]
        log += [{"event": "message", "message": f"item {self.key('fuse', paths[0], 0)}: odd"}]
        self.run.write("log.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in log))
        write_report(self.run.url)
        # Left by processes that were killed.
        for place in (f"manifests/align/.{'a' * 32}.{'b' * 32}.tmp", f"plan.parquet.{'c' * 32}.tmp"):
            (Path(self.run.url) / place).write_bytes(picture(paths[0], 1) + photo_id(paths[0]).encode())
        (self.out / "Annegret" / f".scol-{'d' * 32}.part").write_bytes(picture(paths[0], 11))

    @staticmethod
    def key(stage: str, path: str, version: int) -> str:
        return hashlib.md5(f"{stage}{path}{version}".encode()).hexdigest()

    def row(self, stage: str, path: str, version: int) -> dict:
        photo = photo_id(path)
        row = {"key": self.key(stage, path, version), "photo_id": photo, "status": "ok"}
        if stage == SOURCE:
            return row | {"path": path, "url": f"/src/{path}", "person_id": PEOPLE[path]}
        others = [f"{photo_id(other)}-00" for other in PEOPLE if other != path]
        own = {
            "align": {"crop": picture(path, version)},
            "invert": {"code": code(path, version), "identity": code(path, version)[:192]},
            "fuse": {"fused": code(path, version), "target": code(path, version), "most_ids": ["synthetic-5", *others]},
            "tune": {"tuned": picture(path, version + 2), "refined": picture(path, version + 4)},
            "attack": {"protected": picture(path, version + 6)},
            "strengthen": {"protected": picture(path, version + 8)},
            "publish": {
                "path": path,
                "action": "protected",
                "out_path": str(self.out / path),
                "sha256": hashlib.sha256(picture(path, 10 + version)).hexdigest(),
                "psnr": 30.0,
                "ism": 0.1,
                "max_ism": 0.5,
                "judge": "faceres",
            },
        }
        return row | {"face_id": f"{photo}-00", "seconds": 1.0, "weights": "w", "seed": 1} | own[stage]

    def files(self) -> dict[str, bytes]:
        """Every file of RUN and OUT by name, as it stands; tables also as uncompressed columns."""
        found = {}
        for root in (Path(self.run.url), self.out):
            for file in sorted(root.rglob("*")):
                if file.is_file():
                    data = file.read_bytes()
                    if file.suffix == ".parquet":
                        sink = pa.BufferOutputStream()
                        table = pq.ParquetFile(file).read()
                        with pa.ipc.new_stream(sink, table.schema) as writer:
                            writer.write_table(table)
                        data += sink.getvalue().to_pybytes() + str(pq.read_metadata(file).metadata).encode()
                    found[str(file.relative_to(root.parent))] = data
        return found

    def mentions(self, paths: list[str]) -> dict[str, set[str]]:
        """What is found of some photos: kind of trace -> files."""
        needles: dict[str, list[bytes]] = {"id": [], "path": [], "key": [], "picture": [], "code": [], "name": []}
        for path in paths:
            needles["id"].append(photo_id(path).encode())
            needles["path"] += [path.encode(), json.dumps(path)[1:-1].encode()]
            needles["picture"] += [picture(path, version) for version in range(12)]
            needles["code"] += [np.array(code(path, version)[:192], np.float32).tobytes() for version in (0, 1)]
            needles["key"] += [self.key(stage, path, v).encode() for stage in (SOURCE, *STAGES) for v in (0, 1)]
        needles["name"] = [PEOPLE[path].encode() for path in paths if PEOPLE[path]]
        found = {}
        files = {name: name.encode() + data for name, data in self.files().items()}
        for kind, words in needles.items():
            found[kind] = {name for name, data in files.items() if any(word in data for word in words)}
        return found


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path)


def test_no_byte_is_left_of_a_person(archive: Archive) -> None:
    ann, others = ["Annegret/one.png", "Annegret/zwei ü.png"], ["Bob/bob.png", "Cat/cat.png"]
    before = archive.mentions(ann)
    assert all(before.values()), "the scan finds every kind of trace"
    assert any("report" in name for name in before["path"]) and any("log" in name for name in before["id"])
    kept = {stage: read_stage(archive.run, stage).slice(2) for stage in STAGES}
    assert archive.mentions(["Bob/bob.png"])["id"]

    done = purge(archive.run.url, people=["Annegret"])
    assert archive.mentions(ann) == {kind: set() for kind in before}
    assert done.photos == sorted(ann) and sorted(done.outputs) == [str(archive.out / path) for path in ann]
    assert dict(done.rows) == {stage: 4 for stage in (SOURCE, *STAGES)} and (done.crops, done.codes) == (4, 4)
    assert done.mentions == 4 and done.temporary == 3 and done.log_lines == 3 and done.kept == {}
    assert not (archive.out / "Annegret").exists()

    # The others: same rows, same files, and the run can be read and reported as before.
    for stage in STAGES:
        rows = read_stage(archive.run, stage)
        if stage == "fuse":
            assert rows["most_ids"].to_pylist()[0] == ["synthetic-5", "purged", "purged", f"{photo_id(others[1])}-00"]
            rows, kept[stage] = rows.drop(["most_ids"]), kept[stage].drop(["most_ids"])
        assert rows == kept[stage], stage
    assert read_photos(archive.run)["path"].to_pylist() == others
    found = archive.run.read_json("summary.json")
    assert found["photos"] == 2 and found["seconds"] == 7 and found["changes"]["deleted_paths"] == []
    assert "Bob" in archive.run.read("report.html").decode()
    assert all((archive.out / path).read_bytes() == picture(path, 11) for path in others)
    with pytest.raises(RunError, match="does not know person Annegret; nothing was removed"):
        purge(archive.run.url, people=["Annegret"])


def test_one_photo_of_a_person(archive: Archive) -> None:
    purge(archive.run.url, photos=["Annegret/zwei ü.png"])
    found = archive.mentions(["Annegret/zwei ü.png"])
    assert not any(found[kind] for kind in ("id", "path", "picture", "code", "key"))
    assert archive.mentions(["Annegret/one.png"])["picture"]
    assert read_photos(archive.run)["path"].to_pylist() == ["Annegret/one.png", "Bob/bob.png", "Cat/cat.png"]


def test_all_photos(archive: Archive) -> None:
    purge(archive.run.url, photos=list(PEOPLE))
    assert not any(archive.mentions(list(PEOPLE)).values()) and read_photos(archive.run).num_rows == 0
    assert all(not archive.run.store.parts(stage) for stage in (SOURCE, *STAGES))


@pytest.mark.parametrize("writes", range(0, 14, 3))
def test_a_purge_that_dies_goes_on_where_it_was(archive: Archive, writes: int, monkeypatch) -> None:
    """Killed after so many parts, between the new part's commit and the old one's deletion."""
    real, count = PartStore._commit, []

    def commit(store, *arguments):
        answer = real(store, *arguments)
        count.append(1)
        if len(count) > writes:
            raise SystemError("killed")
        return answer

    kept = read_stage(archive.run, "attack").slice(2)
    with monkeypatch.context() as patch:
        patch.setattr(PartStore, "_commit", commit)
        with pytest.raises(SystemError):
            purge(archive.run.url, people=["Annegret"])
    keys = [archive.key("attack", path, 1) for path in ("Bob/bob.png", "Cat/cat.png")]
    assert archive.run.store.read_rows("attack", keys) == kept, "nothing of the others is lost meanwhile"
    purge(archive.run.url, people=["Annegret"])
    assert not any(archive.mentions(["Annegret/one.png", "Annegret/zwei ü.png"]).values())
    assert read_stage(archive.run, "attack") == kept


def test_nothing_happens_while_a_run_goes_on_or_to_strangers(archive: Archive) -> None:
    before = archive.files()
    with Presence(archive.run, "protect"), pytest.raises(BusyError, match="at work"):
        purge(archive.run.url, people=["Annegret"])
    with pytest.raises(RunError, match="does not know Annegret/two.png, person Dan; nothing was removed"):
        purge(archive.run.url, ["Annegret/two.png", "Annegret/one.png"], ["Dan"])
    after = {name: data for name, data in archive.files().items() if "/drivers/" not in name}
    assert after == before


def test_outputs_that_somebody_changed_stay_and_are_named(archive: Archive) -> None:
    (archive.out / "Bob/bob.png").write_bytes(b"edited")
    shown = CliRunner().invoke(main, ["purge", archive.run.url, "--person", "Bob"])
    assert shown.exit_code == 1, shown.output
    assert f"STAYS    {archive.out}/Bob/bob.png: it has changed" in shown.output and "2 of invert" in shown.output
    assert (archive.out / "Bob/bob.png").read_bytes() == b"edited"
    record = archive.run.read_json("run.json")
    archive.run.write_json("run.json", record | {"out": "/another/out"})
    done = purge(archive.run.url, ["Annegret/one.png"])
    assert done.outputs == [] and "another OUT" in done.kept[str(archive.out / "Annegret/one.png")]
    assert (archive.out / "Annegret/one.png").exists()
    archive.run.write_json("run.json", record)
    again = CliRunner().invoke(main, ["purge", archive.run.url, "--photo", "Cat/cat.png", "--json"])
    assert again.exit_code == 0 and json.loads(again.stdout)["rows"]["align"] == 2
    assert CliRunner().invoke(main, ["purge", archive.run.url]).exit_code == 2
    assert CliRunner().invoke(main, ["purge", str(archive.out), "--person", "x"]).exit_code == 2
