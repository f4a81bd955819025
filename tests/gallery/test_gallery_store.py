import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import uuid

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gallery_index import (
    MODES,
    BadCodesError,
    CodeBatch,
    Expectation,
    Gallery,
    GalleryBuilder,
    GalleryCorruptError,
    GalleryError,
    GalleryExistsError,
    GalleryMismatchError,
    GalleryNotFoundError,
    batches_of,
    build,
    check,
    open_gallery,
    synthetic_codes,
)
from gallery_index import builder as builder_module
from gallery_index.info import GalleryInfo
from tests.helpers.gallery_reference import random_codes

WEIGHTS = {"generator": "g1", "encoder": "e1"}


def batches(codes, sizes, people=True):
    start = 0
    for size in sizes:
        ids = [f"face{i}" for i in range(start, start + size)]
        photos = [f"photo{i // 2}" for i in range(start, start + size)]
        persons = [None if i % 5 == 0 else f"person{i % 7}" for i in range(start, start + size)] if people else None
        yield CodeBatch(codes[start : start + size], photos, persons, ids)
        start += size


def listing(path):
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize("mode", MODES)
def test_round_trip(tmp_path, mode):
    codes = random_codes(101, 3, 16)
    info = build(tmp_path / "g", batches(codes, [40, 0, 60, 1]), mode=mode, weights=WEIGHTS, source="a test")
    assert (info.count, info.layers, info.dim, info.photos, info.people) == (101, 3, 16, 51, 7)
    gallery = Gallery.load(tmp_path / "g")
    assert gallery.info == info and gallery.fingerprint == info.fingerprint and len(info.fingerprint) == 32
    assert list(gallery.ids) == [f"face{i}" for i in range(101)]
    assert gallery.photo_ids[7] == "photo3" and gallery.person_ids[5] is None and gallery.person_ids[6] == "person6"
    np.testing.assert_array_equal(gallery.codes(gallery.ids), codes)
    np.testing.assert_array_equal(gallery.codes(["face9", "face2"]), codes[[9, 2]])
    np.testing.assert_allclose(gallery.mean, codes.astype(np.float64).mean(axis=0), rtol=1e-12, atol=1e-12)
    assert (gallery.info.weights, gallery.info.source, gallery.mode) == (WEIGHTS, "a test", mode)
    with pytest.raises(KeyError):
        gallery.codes(["face101"])


def test_files_are_open_formats(tmp_path):
    """Parquet and FAISS files that other tools read, with the vectors the mode asks for."""
    codes = random_codes(30, 2, 8)
    info = build(tmp_path / "g", batches(codes, [30]), mode="centred", weights=WEIGHTS)
    table = pq.ParquetFile(tmp_path / "g" / info.codes[0]).read(use_threads=False)
    assert table.column_names == ["id", "photo_id", "person_id", "digest", "layer_00", "layer_01"]
    np.testing.assert_array_equal(np.array(table["layer_01"].to_pylist(), dtype=np.float32), codes[:, 1])
    index = Gallery.load(tmp_path / "g").faiss_index(1)
    centred = codes[:, 1] - codes[:, 1].astype(np.float64).mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(index.reconstruct_n(0, 30), unit, rtol=1e-6, atol=1e-7)
    index = json.loads((tmp_path / "g" / "index.json").read_text())
    assert index["mode"] == "centred" and index["count"] == 30 and index["fingerprint"] == info.fingerprint


def test_batches_do_not_matter(tmp_path, monkeypatch):
    """Same codes, same files and fingerprint, however they came; another code, another fingerprint."""
    monkeypatch.setattr(builder_module, "_FILE_BYTES", 33 * 2 * 16 * 4)  # 33 rows a file
    codes = random_codes(100, 2, 16)
    infos = [
        build(tmp_path / str(i), batches(codes, sizes), weights=WEIGHTS)
        for i, sizes in enumerate(([100], [1] * 100, [34, 65, 1]))
    ]
    assert len(infos[0].codes) == 4
    assert infos[0] == infos[1] == infos[2] and len({i.fingerprint for i in infos}) == 1
    assert listing(tmp_path / "0") == listing(tmp_path / "1") == sorted([*infos[0].files, "index.json"])
    np.testing.assert_array_equal(Gallery.load(tmp_path / "1").codes([f"face{i}" for i in range(100)]), codes)
    codes[50, 1, 3] += 1e-3
    assert build(tmp_path / "x", batches(codes, [100]), weights=WEIGHTS).fingerprint != infos[0].fingerprint
    other = build(tmp_path / "y", batches(codes, [100]), weights=WEIGHTS | {"encoder": "e2"})
    assert other.fingerprint != infos[0].fingerprint


def test_a_caller_may_reuse_the_array(tmp_path):
    codes, buffer = random_codes(20, 1, 8), np.empty((5, 1, 8), np.float32)
    with GalleryBuilder(tmp_path / "g", weights=WEIGHTS) as builder:
        for i in range(0, 20, 5):
            buffer[:] = codes[i : i + 5]
            builder.add(CodeBatch(buffer, [f"p{j}" for j in range(i, i + 5)]))
    np.testing.assert_array_equal(Gallery.load(tmp_path / "g").codes([f"p{j}" for j in range(20)]), codes)


def test_on_another_file_system():
    url = f"memory://galleries/{uuid.uuid4().hex}"
    codes = random_codes(40, 2, 8)
    info = build(url, batches(codes, [40]), weights=WEIGHTS)
    fs = fsspec.filesystem("memory")
    names = sorted(os.path.basename(p) for p in fs.ls(url.removeprefix("memory:/"), detail=False))
    assert names == sorted([*info.files, "index.json"])
    np.testing.assert_array_equal(Gallery.load(url).codes(["face3"]), codes[3:4])
    with pytest.raises(GalleryExistsError):
        build(url, batches(codes, [40]), weights=WEIGHTS)
    fs.pipe_file(f"{url.removeprefix('memory:/')}/{info.codes[0]}", b"short")
    with pytest.raises(GalleryCorruptError, match="5 bytes"):
        Gallery.load(url)


@pytest.fixture
def stored(tmp_path):
    info = build(tmp_path / "g", batches(random_codes(60, 2, 8), [60]), weights=WEIGHTS)
    return tmp_path / "g", info


@pytest.mark.parametrize("kind", ["codes", "mean", "norms"])
@pytest.mark.parametrize("harm", ["truncated", "altered", "missing", "longer"])
def test_harmed_files_are_refused(stored, kind, harm):
    folder, info = stored
    name = getattr(info, kind) if kind in ("mean", "norms") else getattr(info, kind)[-1]
    path = folder / name
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        flipped = bytes([content[len(content) // 2] ^ 1])
        path.write_bytes(
            {
                "truncated": content[:-1],
                "longer": content + b"\0",
                "altered": content[: len(content) // 2] + flipped + content[len(content) // 2 + 1 :],
            }[harm]
        )
    with pytest.raises(GalleryCorruptError, match=name):
        Gallery.load(folder)


def test_harmed_index_is_refused(stored):
    folder, info = stored
    path = folder / "index.json"
    content = path.read_bytes()
    altered = content.replace(b'"centred"', b'"cosine"'), content.replace(b"g1", b"g2")
    for harmed in (content[:-10], b"", b"[]", *altered):
        assert harmed != content
        path.write_bytes(harmed)
        with pytest.raises(GalleryError) as error:
            Gallery.load(folder)
        assert isinstance(error.value, GalleryCorruptError)
    # Even with a fingerprint that fits, it may not lead out of the folder or contradict its files.
    body = json.loads(content)
    body["mean"] = "../" + info.mean
    body["files"]["../" + info.mean] = body["files"].pop(info.mean)
    path.write_bytes(_sign(body))
    with pytest.raises(GalleryCorruptError, match="not a file name"):
        Gallery.load(folder)
    body = json.loads(content)
    body["count"] = 61
    path.write_bytes(_sign(body))
    with pytest.raises(GalleryCorruptError, match="60 codes, index.json counts 61"):
        Gallery.load(folder)
    body = json.loads(content)
    body["version"] = 3
    path.write_bytes(_sign(body))
    with pytest.raises(GalleryMismatchError, match="version 3, this program reads"):
        Gallery.load(folder)


def test_galleries_of_version_1_are_read(stored):
    """They had an exact FAISS index a layer, and no digests of rows."""
    folder, info = stored
    expected = Gallery.load(folder).search(random_codes(2, 2, 8, seed=1), 3)
    body = json.loads((folder / "index.json").read_bytes())
    table = pq.read_table(folder / info.codes[0]).drop_columns(["digest"])
    pq.write_table(table, folder / info.codes[0], compression="none", use_dictionary=False)
    for name in ("layer-00-0.faiss", "layer-01-0.faiss"):
        (folder / name).write_bytes(b"an index")
        body["indexes"].append(name)
    for name in (info.codes[0], *body["indexes"]):
        content = (folder / name).read_bytes()
        body["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del body["compression"], body["exact"]
    body["version"] = 1
    (folder / "index.json").write_bytes(_sign(body))
    found = Gallery.load(folder).search(random_codes(2, 2, 8, seed=1), 3)
    assert np.array_equal(found.most_ids, expected.most_ids)
    assert np.array_equal(found.least_scores, expected.least_scores)
    assert check(*open_gallery(folder))["codes"] == 60
    (batch,) = batches_of(*open_gallery(folder))
    assert build(folder / "again", [batch], weights=WEIGHTS).count == 60


def _sign(body):
    from gallery_index.info import _digest

    body = {k: v for k, v in body.items() if k != "fingerprint"}
    return json.dumps(body | {"fingerprint": _digest(body)}).encode()


def test_expectations(stored):
    folder, _ = stored
    Gallery.load(folder, expect=Expectation())
    Gallery.load(folder, expect=Expectation(mode="centred", layers=2, dim=8, weights=WEIGHTS))
    for expect, both in (
        (Expectation(mode="cosine"), ("'centred'", "'cosine'")),
        (Expectation(layers=18), ("is 2", "18")),
        (Expectation(dim=512), ("is 8", "512")),
        (Expectation(weights={"encoder": "e2"}), ("'e1'", "'e2'")),
        (Expectation(weights={"generator": "g1", "recogniser": "r1"}), ("not recorded", "'r1'")),
    ):
        with pytest.raises(GalleryMismatchError) as error:
            Gallery.load(folder, expect=expect)
        assert all(part in str(error.value) for part in both)


def test_a_role_that_was_not_involved_fits_any(tmp_path):
    build(tmp_path / "g", batches(random_codes(9, 1, 8), [9]), weights={"generator": "g1", "encoder": None})
    Gallery.load(tmp_path / "g", expect=Expectation(weights={"generator": "g1", "encoder": "anything"}))
    with pytest.raises(GalleryMismatchError):
        Gallery.load(tmp_path / "g", expect=Expectation(weights={"generator": "g2", "encoder": "anything"}))


def test_codes_that_are_no_codes_are_refused_by_id(tmp_path):
    codes = random_codes(10, 3, 8)
    codes[2, 1, 4] = np.nan
    codes[5, 0, 0] = -np.inf
    codes[7, 2] = 0
    codes[8, 0, 1] = 1e20
    with pytest.raises(BadCodesError) as error:
        build(tmp_path / "g", batches(codes, [10]), weights=WEIGHTS)
    assert error.value.reasons == {
        "face2": "layer 1 is NaN",
        "face5": "layer 0 is infinite or above 1e12",
        "face7": "layer 2 is zero",
        "face8": "layer 0 is infinite or above 1e12",
    }
    assert all(id_ in str(error.value) for id_ in error.value.reasons)
    with pytest.raises(GalleryNotFoundError):
        Gallery.load(tmp_path / "g")


def test_a_code_equal_to_the_mean_has_no_direction(tmp_path):
    codes = random_codes(10, 2, 8)
    codes[4, 1] = (codes[:4, 1].sum(axis=0, dtype=np.float64) + codes[5:, 1].sum(axis=0, dtype=np.float64)) / 9
    with pytest.raises(BadCodesError) as error:
        build(tmp_path / "g", batches(codes, [10]), weights=WEIGHTS)
    assert error.value.reasons == {"face4": "layer 1 equals the mean of the gallery"}
    assert listing(tmp_path / "g") == []
    build(tmp_path / "g", batches(codes, [10]), mode="cosine", weights=WEIGHTS)


def test_one_person_and_nobody(tmp_path):
    codes = random_codes(1, 2, 8)
    with pytest.raises(BadCodesError, match="equals the mean"):
        build(tmp_path / "one", batches(codes, [1]), weights=WEIGHTS)
    build(tmp_path / "one", batches(codes, [1]), mode="cosine", weights=WEIGHTS)
    result = Gallery.load(tmp_path / "one").search(random_codes(2, 2, 8, seed=1), 1)
    assert (result.most_ids == "face0").all() and (result.least_ids == "face0").all()
    for empty in ([], batches(codes, [0])):
        with pytest.raises(BadCodesError, match="at least one code"):
            build(tmp_path / "none", empty, weights=WEIGHTS)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (CodeBatch(np.ones((2, 8), np.float32), ["a", "b"]), "float32"),
        (CodeBatch(np.ones((2, 1, 8)), ["a", "b"]), "float64"),
        (CodeBatch(np.ones((2, 1, 8), np.float32), ["a"]), "2 codes came with 1 ids"),
        (CodeBatch(np.ones((2, 1, 8), np.float32), ["a", "b"], ["x"]), "1 person ids"),
        (CodeBatch(np.ones((2, 1, 8), np.float32), ["a", "a"]), "'a' \\(the id is there twice"),
        (CodeBatch(np.ones((2, 1, 8), np.float32), ["a", ""]), "not a non-empty string"),
        (CodeBatch(np.ones((2, 1, 8), np.float32), ["a", 3]), "not a non-empty string"),
        (CodeBatch(np.ones((2, 1, 8), np.float32), ["a", "first"]), "'first' \\(the id is there twice"),
        (CodeBatch(np.ones((2, 1, 9), np.float32), ["a", "b"]), "was \\(1, 8, None\\) and is \\(1, 9, None\\)"),
        (CodeBatch(np.ones((2, 1, 8), np.float32), ["a", "b"], embeddings=np.ones((2, 4))), "was"),
        (CodeBatch(np.ones((2, 1, 8), np.float32), ["a", "b"], embeddings=np.ones((1, 4))), "embeddings must be"),
    ],
)
def test_malformed_batches(tmp_path, batch, message):
    with pytest.raises(BadCodesError, match=message), GalleryBuilder(tmp_path / "g", weights=WEIGHTS) as builder:
        builder.add(CodeBatch(np.ones((1, 1, 8), np.float32), ["first"]))
        builder.add(batch)
    assert not (tmp_path / "g").exists() or listing(tmp_path / "g") == []


def test_malformed_options(tmp_path):
    with pytest.raises(ValueError, match="mode"):
        GalleryBuilder(tmp_path / "g", mode="euclidean", weights=WEIGHTS)
    with pytest.raises(ValueError, match="weights"):
        GalleryBuilder(tmp_path / "g", weights={"generator": 3})
    with pytest.raises(ValueError, match="broadcast_layers"):
        GalleryBuilder(tmp_path / "g", weights=WEIGHTS, broadcast_layers=0)
    with pytest.raises(BadCodesError, match="broadcasts"):
        build(tmp_path / "g", batches(random_codes(3, 2, 8), [3]), weights=WEIGHTS, broadcast_layers=2)
    with pytest.raises(GalleryNotFoundError):
        Gallery.load(tmp_path / "nothing")


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(builder_module, "_FILE_BYTES", 1024)

    def source():
        yield from batches(random_codes(100, 1, 8), [100])
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        build(tmp_path / "g", source(), weights=WEIGHTS)
    assert listing(tmp_path / "g") == []
    builder = GalleryBuilder(tmp_path / "g", weights=WEIGHTS)
    builder.abort()
    with pytest.raises(GalleryError, match="finished or was aborted"):
        builder.add(next(batches(random_codes(3, 1, 8), [3])))


@pytest.mark.parametrize("where", ["write_codes", "link", "lengths", "mean", "commit", "sweep"])
def test_a_killed_build_is_not_readable_and_can_be_repeated(tmp_path, where):
    """Killed at a step, then repeated: the same gallery, nothing left over, and files that were whole are used."""
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = [{os.getcwd()!r}, {os.path.dirname(__file__)!r}]
        import test_gallery_store as t
        from gallery_index import builder, storage
        calls = 0
        def killed(owner, name, call):
            original = getattr(owner, name)
            def replacement(*args, **options):
                global calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **options)
            setattr(owner, name, replacement)
        builder._FILE_BYTES = 1024
        owner, name, call = {{
            "write_codes": (builder.GalleryBuilder, "_write_codes", 3), "link": (storage.os, "link", 3),
            "lengths": (builder, "norms", 2), "mean": (builder.np, "save", 2),
            "commit": (storage.Folder, "create", 1), "sweep": (storage.Folder, "names", 1)}}[{where!r}]
        killed(owner, name, call)
        t.build(sys.argv[1], t.batches(t.random_codes(100, 2, 8), [50, 50]), weights=t.WEIGHTS)
    """)
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "g"], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = {p.name: p.stat().st_ino for p in (tmp_path / "g").iterdir() if not p.name.startswith("tmp-")}
    assert whole
    if where != "sweep":  # killed after the commit, that is
        with pytest.raises(GalleryNotFoundError):
            Gallery.load(tmp_path / "g")
    codes = random_codes(100, 2, 8)
    builder_module_bytes, builder_module._FILE_BYTES = builder_module._FILE_BYTES, 1024
    try:
        if where != "sweep":
            build(tmp_path / "g", batches(codes, [50, 50]), weights=WEIGHTS)
        info = build(tmp_path / "h", batches(codes, [50, 50]), weights=WEIGHTS)
    finally:
        builder_module._FILE_BYTES = builder_module_bytes
    assert GalleryInfo.from_bytes((tmp_path / "g" / "index.json").read_bytes(), "g") == info
    assert listing(tmp_path / "g") == sorted([*info.files, "index.json"])
    assert {name: (tmp_path / "g" / name).stat().st_ino for name in whole} == whole
    np.testing.assert_array_equal(Gallery.load(tmp_path / "g").codes([f"face{i}" for i in range(100)]), codes)


def test_two_builders_at_once(tmp_path):
    """The first to commit wins, equal or not; the loser is told and leaves none of its own files."""
    codes = random_codes(30, 1, 8)
    for name, second in (("equal", codes), ("different", codes + 1)):
        a = GalleryBuilder(tmp_path / name, weights=WEIGHTS)
        b = GalleryBuilder(tmp_path / name, weights=WEIGHTS)
        a.add(next(batches(codes, [30])))
        b.add(next(batches(second, [30])))
        info = a.finish()
        with pytest.raises(GalleryExistsError):
            b.finish()
        assert listing(tmp_path / name) == sorted([*info.files, "index.json"])
        np.testing.assert_array_equal(Gallery.load(tmp_path / name).codes(["face3"]), codes[3:4])
    with pytest.raises(GalleryExistsError):
        GalleryBuilder(tmp_path / "equal", weights=WEIGHTS)


def test_info_round_trip(stored):
    _, info = stored
    again = GalleryInfo.from_bytes(info.to_bytes(), "here")
    assert again == info and again.fingerprint == info.fingerprint


def mapping(z):
    return torch.tanh(z[:, :32]) * 3 + 1


def test_synthetic_codes(tmp_path):
    first = list(synthetic_codes(1500, 3, mapping, dim=64))
    codes = np.concatenate([b.codes for b in first])
    assert codes.shape == (1500, 1, 32) and codes.dtype == np.float32
    again = np.concatenate([b.codes for b in synthetic_codes(1030, 3, mapping, dim=64)])
    np.testing.assert_array_equal(codes[:1030], again)
    other = np.concatenate([b.codes for b in synthetic_codes(1030, 4, mapping, dim=64)])
    assert not np.isclose(other, again).all(axis=2).any()
    assert len(np.unique(codes.reshape(1500, -1), axis=0)) == 1500
    info = build(tmp_path / "g", first, weights={"generator": "g1", "encoder": None}, broadcast_layers=16)
    assert (info.count, info.people, info.photos, info.layers, info.broadcast) == (1500, 1500, 1500, 16, True)
    gallery = Gallery.load(tmp_path / "g")
    assert gallery.ids[0] == "synthetic-3-0000000" and gallery.person_ids[1499] == "synthetic-3-0001499"
    assert gallery.codes(gallery.ids[:2]).shape == (2, 16, 32)
    assert gallery.search(gallery.codes(gallery.ids[5:7]), 3).most_ids[1, 15, 0] == gallery.ids[6]


def test_synthetic_truncation():
    mean = torch.full((32,), 1.0)
    (full,) = synthetic_codes(5, 0, mapping, dim=64)
    (half,) = synthetic_codes(5, 0, mapping, psi=0.5, mean=mean, dim=64)
    np.testing.assert_allclose(half.codes - 1, (full.codes - 1) * 0.5, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="mean"):
        next(synthetic_codes(5, 0, mapping, psi=0.5, dim=64))
    with pytest.raises(ValueError, match="n must be"):
        next(synthetic_codes(0, 0, mapping, dim=64))
