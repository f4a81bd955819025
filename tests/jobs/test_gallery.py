"""Which version of a gallery a run takes, and galleries from a run's manifests. No photo, no network, no Ray."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from gallery_index import CodeBatch, GalleryBusyError, GalleryMismatchError, GalleryNotFoundError, Store, build
from pipelines.archive.paths import photo_id
from pipelines.cli.main import main
from pipelines.config.load import load_config
from pipelines.jobs import gallery as gallery_jobs
from pipelines.jobs import purge
from pipelines.jobs.run_gallery import RunGallery
from pipelines.networks import fingerprints
from pipelines.run.folder import Run
from pipelines.run.schemas import CODE_DIM, CODE_LAYERS, IDENTITY_DIM, PLAN_SCHEMA, SCHEMAS, SOURCE, SOURCE_SCHEMA


def store_at(path: Path, first: int, count: int, key: str) -> str:
    """A version of synthetic people first..first + count - 1; returns its name."""
    codes = np.random.default_rng(first).normal(size=(count, 1, CODE_DIM)).astype(np.float32)
    ids = [f"p{i}" for i in range(first, first + count)]
    weights = {"generator": fingerprints.mapping_fingerprint(), "encoder": None, "recogniser": None}
    return Store(path).build(
        key, lambda b: b.add(CodeBatch(codes, ids)), weights=weights, broadcast_layers=CODE_LAYERS
    )[0]


def test_a_run_stays_on_its_version(tmp_path: Path) -> None:
    url, run = str(tmp_path / "g"), Run(str(tmp_path / "run"))
    first = store_at(tmp_path / "g", 0, 30, "a")

    def taken(*sets: str) -> str | None:
        config = load_config("quick", sets=[f"gallery.url={url}", "fuse.k=3", *sets])
        gallery = RunGallery.open(config, run, print)
        described = gallery.described()
        assert described["store"] == url and described["fingerprint"] == gallery.info.fingerprint
        run.write_json("run.json", {"gallery": described})  # as a run does when it starts
        return described["version"]

    assert taken() == first
    second = store_at(tmp_path / "g", 100, 20, "b")
    assert Store(url).current() == second and taken() == first
    assert taken("gallery.version=current") == second and taken() == second
    assert taken(f"gallery.version={first}") == first
    with RunGallery.open(
        load_config("quick", sets=[f"gallery.url={url}", f"gallery.version={first}", "fuse.k=3"]), run, print
    ).reading():
        assert list(gallery_jobs.prune(url, 0).kept) == [first]
        with pytest.raises(GalleryBusyError), Store(url).folder.folder("locks").lock(first, exclusive=True):
            pass
    assert gallery_jobs.prune(url, 0).versions == [first]
    with pytest.raises(GalleryNotFoundError, match=f"no version {first}.*version=current goes on with {second}"):
        taken()
    assert taken("gallery.version=current") == second
    # another gallery than before: what was recorded says nothing about it
    other = store_at(tmp_path / "h", 0, 9, "a")
    url = str(tmp_path / "h")
    assert taken() == other
    for sets, words in (("gallery.search=compressed", "--compress"), ("fuse.k=9", "needs more")):
        with pytest.raises((GalleryMismatchError, GalleryNotFoundError), match=words):
            taken(sets)


def run_of(url: Path, faces: dict[str, int], people: dict[str, str | None]) -> Run:
    """A run whose `invert` table has one face a path, with the code of this seed."""
    run, config = Run(str(url)), load_config("quick")
    weights = fingerprints.stage_weights(config, "")["invert"]
    paths = list(faces)
    ids = [photo_id(path) for path in paths]
    keys = [f"{i:08x}{seed:024x}" for i, seed in enumerate(faces.values())]
    for key, path, id_ in zip(keys, paths, ids, strict=True):
        row = {"key": key, "photo_id": id_, "path": path, "url": path, "person_id": people.get(path), "status": "ok"}
        run.store.write_part(SOURCE, None, pa.Table.from_pylist([row], SOURCE_SCHEMA))
        rng = np.random.default_rng(faces[path])
        row = {"key": key, "photo_id": id_, "face_id": f"{id_}-00", "status": "ok", "seed": 0, "seconds": 0.0}
        row |= {"weights": weights, "code": rng.normal(size=CODE_LAYERS * CODE_DIM).astype(np.float32)}
        row |= {"identity": rng.normal(size=IDENTITY_DIM).astype(np.float32)}
        run.store.write_part("invert", None, pa.Table.from_pylist([row], SCHEMAS["invert"]))
    stages = [name for name in PLAN_SCHEMA.names if name not in ("photo_id", "path", SOURCE)]
    columns = {"photo_id": ids, "path": paths, SOURCE: keys} | dict.fromkeys(stages, keys)
    run.write_plan(pa.table([columns[name] for name in PLAN_SCHEMA.names], PLAN_SCHEMA))
    return run


def test_nights_from_manifests(tmp_path: Path) -> None:
    """Add from runs: new, changed, unchanged, removed; and what purge says of the gallery."""
    config, out = load_config("quick"), str(tmp_path / "g")
    people = {f"{name}.png": f"person-{name}" for name in "abcdef"}
    first = {f"{name}.png": i for i, name in enumerate("abcd")}
    run = run_of(tmp_path / "one", first, people)
    listed = {row["photo_id"]: row["person_id"] for row in _sources(run)}
    info, counts = gallery_jobs._from_tables(
        run, listed, Store(out), config, "test", False, lambda count: None, 4, print
    )
    assert info.count == counts["faces"] == 4 and info.people == 4 and info.embedding_dim == IDENTITY_DIM
    second = run_of(tmp_path / "two", first | {"b.png": 77, "e.png": 5, "f.png": 6}, people)
    gallery_jobs.remove(out, ["person-d", "person-f"], ["c.png"], [])
    info, counts = gallery_jobs.add_from_run(second.url, out, config)
    assert {n: counts[n] for n in ("added", "replaced", "unchanged", "refused")} == {
        "added": 1, "replaced": 1, "unchanged": 1, "refused": 3,
    }  # fmt: skip
    assert gallery_jobs.add_from_run(second.url, out, config)[0].fingerprint == info.fingerprint
    gallery_jobs.prune(out, 0)
    assert gallery_jobs.verify(out)["codes"] == 3

    count = purge._codes_in_gallery(out, pa.array([photo_id("b.png"), photo_id("c.png")]))
    assert count == 1, "b is there once, c no more"
    build(tmp_path / "plain", [CodeBatch(np.ones((1, 16, 512), np.float32), ["x"])], mode="cosine", weights={})
    with pytest.raises(GalleryNotFoundError, match="without versions"):
        gallery_jobs.add_from_run(second.url, str(tmp_path / "plain"), config)
    store_at(tmp_path / "synthetic", 0, 9, "a")
    with pytest.raises(GalleryMismatchError, match="recogniser|one W"):
        gallery_jobs.add_from_run(second.url, str(tmp_path / "synthetic"), config)


def _sources(run: Run) -> list[dict]:
    return [row for name in run.store.parts(SOURCE) for row in run.store.read_part(SOURCE, name).to_pylist()]


def test_compressed_from_the_command_line(tmp_path: Path) -> None:
    def told(*arguments: str) -> dict:
        result = CliRunner().invoke(main, ["gallery", *arguments, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    out = str(tmp_path / "g")
    assert told("build", "--synthetic", "60", "--out", out, "--compress", "auto")["compression"] == "SQ8"
    assert told("verify", out)["recall_most"] > 0.9
    assert told("estimate", "1000000", "--memory", "8")["plan"]["factory"].startswith("PCA64,IVF")
    for wrong in (["estimate", "1000", "--compress", "nonsense"], ["estimate", "1000000", "--memory", "0.01"]):
        result = CliRunner().invoke(main, ["gallery", *wrong])
        assert result.exit_code == 2 and result.stderr.startswith("error: ")
    config = load_config("quick", sets=[f"gallery.url={out}", "gallery.search=compressed"])
    gallery = RunGallery.open(config, Run(str(tmp_path / "run")), print)
    assert gallery.key_words == f"{gallery.info.fingerprint}+SQ8,"
