"""The store: versions, the pointer, updates, removed people."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gallery_index import (
    BadCodesError,
    CodeBatch,
    Gallery,
    GalleryCheckError,
    GalleryConflictError,
    GalleryCorruptError,
    GalleryMismatchError,
    GalleryNotFoundError,
    Store,
    batches_of,
    check,
    open_gallery,
)
from gallery_index import builder as builder_module
from gallery_index.store import require_same, store_of
from tests.helpers.gallery_reference import brute_force, random_codes

WEIGHTS = {"generator": "g1", "encoder": "e1"}
LAYERS, DIM = 2, 8


def code_of(seed: int) -> np.ndarray:
    return random_codes(1, LAYERS, DIM, seed=seed)[0]


def batch_of(faces: dict[str, tuple[int, str]]) -> CodeBatch:
    """Faces: id to (seed of the code, person); a face's photo is named after the face."""
    codes = np.stack([code_of(seed) for seed, _ in faces.values()])
    return CodeBatch(codes, [f"photo-{i}" for i in faces], [p for _, p in faces.values()], list(faces))


def build(store: Store, faces: dict[str, tuple[int, str]], key: str = "first", **options):
    return store.build(key, lambda builder: builder.add(batch_of(faces)), weights=WEIGHTS, check=check, **options)


def faces(start: int, stop: int) -> dict[str, tuple[int, str]]:
    return {f"face{i}": (i, f"person{i % 5}") for i in range(start, stop)}


def holds(store: Store) -> dict[str, np.ndarray]:
    gallery = Gallery.load(store.url)
    return dict(zip(gallery.ids.tolist(), gallery.codes(gallery.ids), strict=True))


def bytes_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everywhere(folder: Path, needles: list[bytes]) -> list[Path]:
    """Files below the folder whose name or bytes hold one of the needles."""
    return [
        path
        for path, content in bytes_below(folder).items()
        if any(needle in content or needle in str(path.relative_to(folder)).encode() for needle in needles)
    ]


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    build(store, faces(0, 12))
    return store


def test_versions_and_the_pointer(store):
    first = store.current()
    assert first.startswith("000001-")
    done = store.update("more", [batch_of(faces(12, 15))], check=check)
    assert done.counts() == {"added": 3, "replaced": 0, "removed": 0, "unchanged": 0, "refused": 0}
    assert done.name == store.current() != first and done.info.count == 15
    listed = store.versions()
    assert [v.name for v in listed] == [first, done.name] and [v.current for v in listed] == [False, True]
    assert listed[1].about["added"] == 3 and listed[1].about["check"]["self_retrieved"] == 1.0
    assert listed[0].switched <= listed[1].switched
    store.switch(first)
    assert open_gallery(store.url)[1].count == 12 and len(Gallery.load(store.url)) == 12
    assert len(Gallery.load(store.version(done.name).url)) == 15  # a version is a gallery
    assert store_of(store.version(first).url)[1] == first and store_of(store.url) is None
    for wrong in ("000009-0123456789ab", "../x", "latest"):
        with pytest.raises(GalleryNotFoundError):
            store.switch(wrong)
    with pytest.raises(GalleryNotFoundError, match="nowhere"):
        open_gallery(store.url + "-nowhere")
    with pytest.raises(GalleryNotFoundError, match="build one first"):
        Store(store.url + "-nowhere").update("x", [batch_of(faces(0, 1))])


def test_the_same_again_makes_no_version(store):
    before = bytes_below(Path(store.url))
    done = store.update("again", [batch_of(faces(3, 9))], check=check)
    assert done.unchanged == 6 and done.name == store.current() and bytes_below(Path(store.url)) == before
    assert build(store, faces(0, 12))[0] == store.current() and bytes_below(Path(store.url)) == before


def test_a_changed_face_is_replaced(store):
    changed = {"face3": (100, "person3"), "face4": (4, "somebody else"), "face5": (5, "person0")}
    done = store.update("changed", [batch_of(changed)], check=check)
    assert (done.replaced, done.unchanged, done.info.count) == (2, 1, 12)
    np.testing.assert_array_equal(holds(store)["face3"], code_of(100))
    gallery = Gallery.load(store.url)
    assert gallery.person_ids[list(gallery.ids).index("face4")] == "somebody else"


def test_files_that_stay_are_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(builder_module, "_FILE_BYTES", 10 * LAYERS * DIM * 4)  # ten rows a file
    store = Store(tmp_path / "store")
    old = build(store, faces(0, 40))[1]
    store.removed.add(ids=["face12"])
    new = store.update("remove", check=check).info
    assert len(set(old.codes) & set(new.codes)) == 3 and new.count == 39
    folders = [Path(store.version(v.name).url) for v in store.versions()]
    for name in set(old.codes) & set(new.codes):
        assert os.path.samefile(folders[0] / name, folders[1] / name)
    for i in range(40):  # what is left of files grows small, and is put together
        store.removed.add(ids=[f"face{i}"] if i % 4 else ())
    assert len(store.update("remove", check=check).info.codes) == 1


def test_removed_people_are_in_no_file_and_do_not_come_back(store):
    seeds = [i for i in range(12) if i % 5 == 2] + [7]
    needles = [b"person2", b"photo-face7", b"face2", *(code_of(i).tobytes()[:DIM] for i in seeds)]
    needles += [code_of(i)[1].tobytes() for i in seeds]
    assert len(everywhere(Path(store.url), needles)) == 1
    with pytest.raises(KeyboardInterrupt):  # an unfinished build that holds them as well
        _interrupted(store)
    assert len(everywhere(Path(store.url), needles)) == 2
    store.removed.add(people=["person2"], photos=["photo-face7"])
    done = store.update("remove", check=check)
    assert done.removed == 2 and done.info.count == 10  # face 7 is person2's as well
    assert everywhere(Path(store.version(store.current()).url), needles) == []
    assert len(everywhere(Path(store.url), needles)) == 2  # older versions still hold them
    pruned = store.prune(keep=5)
    assert len(pruned.versions) == 1 and len(pruned.builds) == 1 and not pruned.kept
    assert everywhere(Path(store.url), needles) == []
    # They do not come back with the next manifests, unless they are readmitted.
    again = store.update("nightly", [batch_of(faces(0, 14))], check=check)
    assert again.counts() == {"added": 1, "replaced": 0, "removed": 0, "unchanged": 10, "refused": 3}
    assert everywhere(Path(store.url), needles) == []
    assert store.removed.readmit(people=["person2"], photos=["photo-face7"]) == 2 and len(store.removed) == 0
    assert store.update("nightly", [batch_of(faces(0, 14))], check=check).added == 3


def _interrupted(store):
    def fill(builder):
        builder.add(batch_of(faces(0, 12)))
        builder._write_codes(12)
        raise KeyboardInterrupt

    store.build("interrupted", fill, weights=WEIGHTS)


def test_prune_keeps_current_the_newest_and_what_is_read(store):
    for i in range(4):
        store.update(f"night {i}", [batch_of(faces(12 + i, 13 + i))], check=check)
    names = [v.name for v in store.versions()]
    with store.reading(names[0]):
        pruned = store.prune(keep=1)
        assert pruned.versions == [names[2], names[1]] and list(pruned.kept) == [names[0]]
    assert store.prune(keep=1).versions == [names[0]]
    assert [v.name for v in store.versions()] == names[3:]
    store.switch(names[3])
    store.removed.add(ids=["face0"])
    pruned = store.prune(keep=9)
    assert pruned.versions == [names[4]] and "1 code(s) of removed people" in pruned.kept[names[3]]
    with pytest.raises(GalleryNotFoundError), store.reading(names[0]):
        pass


def test_two_updates_at_once(store):
    """The one that switches second is told, and doing it again adds to what is there then: none is lost."""

    def slow():
        yield batch_of(faces(20, 21))
        store.update("quick", [batch_of(faces(30, 31))], check=check)

    with pytest.raises(GalleryConflictError, match="do the same again"):
        store.update("slow", slow(), check=check)
    assert {"face30"} == set(holds(store)) - set(faces(0, 12))
    store.update("slow", [batch_of(faces(20, 21))], check=check)
    assert {"face20", "face30"} == set(holds(store)) - set(faces(0, 12))


def test_two_builders_of_the_same_version(tmp_path, monkeypatch):
    """In step with each other: both come to the same version."""
    monkeypatch.setattr(builder_module, "_FILE_BYTES", 10 * LAYERS * DIM * 4)
    barrier = threading.Barrier(2, timeout=30)
    original, results = builder_module.GalleryBuilder._write_codes, []

    def together(self, rows):
        barrier.wait()
        original(self, rows)

    monkeypatch.setattr(builder_module.GalleryBuilder, "_write_codes", together)

    def work():
        results.append(build(Store(tmp_path / "store"), faces(0, 60)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and results[0] == results[1]
    store = Store(tmp_path / "store")
    assert [v.name for v in store.versions()] == [results[0][0]] and len(holds(store)) == 60
    names = {p.name for p in Path(store.version(results[0][0]).url).iterdir()}
    assert names == {*results[0][1].files, "index.json"}


def test_readers_during_switches(store):
    """Readers see one version or the other, whole, while somebody switches to and fro and one writes CURRENT late."""
    small = store.current()
    large = store.update("more", [batch_of(faces(12, 40))], check=check).name
    stop, seen, errors = threading.Event(), set(), []

    def read():
        while not stop.is_set():
            try:
                gallery = Gallery.load(store.url)
                seen.add((gallery.url.rsplit("/", 1)[1], len(gallery)))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    stale = (Path(store.url) / "CURRENT").read_bytes()
    for i in range(60):
        store.switch((small, large)[i % 2])
        if i % 7 == 0:
            (Path(store.url) / "late").write_bytes(stale)
            os.replace(Path(store.url) / "late", Path(store.url) / "CURRENT")  # of a writer that slept
            assert store.current() == (small, large)[i % 2]
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors and seen == {(small, 12), (large, 40)}


@pytest.mark.parametrize("moment", ["codes", "adopt", "norms", "commit", "check", "switch", "pointer"])
def test_an_update_killed_at_any_point(tmp_path, moment):
    """After kill -9: readers have the old version or the new one; the same call comes to the same end."""
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = [{os.getcwd()!r}, {os.path.dirname(__file__)!r}]
        import test_gallery_versions as t
        from gallery_index import builder, storage, store
        builder._FILE_BYTES = 640
        s = store.Store(sys.argv[1])
        t.build(s, t.faces(0, 40))
        owner, name, call = {{
            "codes": (builder.GalleryBuilder, "_write_file", 2), "adopt": (storage.Folder, "adopt", 2),
            "norms": (builder, "norms", 5), "commit": (storage.Folder, "commit", 1),
            "check": (storage.Folder, "verify", 1), "switch": (storage.Folder, "create", 3),
            "pointer": (storage.Folder, "replace", 1)}}[{moment!r}]
        original, calls = getattr(owner, name), 0
        def killed(*args, **options):
            global calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)
        s.removed.add(ids=["face3"])
        setattr(owner, name, killed)
        s.update("night", [t.batch_of(t.faces(35, 60))], check=t.check)
    """)
    if moment == "switch":
        script = script.replace('"create", 3', '"create", 2')  # after index.json
    url = tmp_path / "store"
    done = subprocess.run([sys.executable, "-c", script, url], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = Store(url)
    assert len(Gallery.load(url)) == (59 if moment == "pointer" else 40)
    before = {p for p in bytes_below(url / "versions") if p.suffix != ".json" and not p.name.startswith("tmp-")}
    size, builder_module._FILE_BYTES = builder_module._FILE_BYTES, 640
    try:
        store.update("night", [batch_of(faces(35, 60))], check=check)
    finally:
        builder_module._FILE_BYTES = size
    assert set(holds(store)) == {f"face{i}" for i in range(60) if i != 3}
    assert len(store.versions()) == 2 and all(v.info for v in store.versions())
    assert before <= set(bytes_below(url / "versions"))  # what was whole was used
    store.prune(keep=0)
    assert not [p for p in bytes_below(url) if p.name.startswith("tmp-")]


def test_check_finds_what_is_wrong(store):
    folder, info = open_gallery(store.url)
    report = check(folder, info)
    assert report["self_retrieved"] == 1.0 and report["codes"] == 12 and report["recall_most"] is None
    with pytest.raises(GalleryCheckError, match="12 codes reckoned with, not 13"):
        check(folder, info, count=13)
    before = store.current()

    def refuse(folder, info):
        check(folder, info, count=99)

    with pytest.raises(GalleryCheckError):
        store.update("bad", [batch_of(faces(12, 13))], check=refuse)
    assert store.current() == before
    for name in (info.codes[0], info.norms):
        path = Path(folder.path(name))
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(GalleryCheckError, match="sha256"):
            check(folder, info)
        path.write_bytes(content)
    (Path(store.url) / "CURRENT").write_bytes(b"{")
    with pytest.raises(GalleryCorruptError, match="CURRENT"):
        Gallery.load(store.url)


def test_what_does_not_belong_together(store, tmp_path):
    info = store.info(store.current())
    other = Store(tmp_path / "other")
    _, theirs = other.build("x", lambda b: b.add(batch_of(faces(0, 9))), mode="cosine", weights={"generator": "g2"})
    with pytest.raises(GalleryMismatchError) as error:
        require_same(theirs, info, other.url)
    for words in (theirs.fingerprint, info.fingerprint, "'cosine'", "'centred'", "'g2'", "'g1'"):
        assert words in str(error.value)
    before = store.current()
    for codes in (random_codes(3, 3, DIM), random_codes(3, LAYERS, 9), np.full((3, LAYERS, DIM), np.nan, np.float32)):
        with pytest.raises(BadCodesError):
            store.update("bad", [CodeBatch(codes, ["a", "b", "c"])])
    with pytest.raises(BadCodesError, match="twice"):
        store.update("bad", [batch_of(faces(50, 52)), batch_of(faces(51, 53))])
    store.removed.add(people=[f"person{i}" for i in range(5)])
    with pytest.raises(BadCodesError, match="at least one code"):
        store.update("everybody")
    assert store.current() == before


def test_memory_file_system():
    store = Store("memory://gallery-versions/a")
    build(store, faces(0, 6))
    store.removed.add(people=["person1"])
    assert store.update("night", [batch_of(faces(4, 9))], check=check).counts() == {
        "added": 2, "replaced": 0, "removed": 1, "unchanged": 2, "refused": 1,
    }  # fmt: skip
    assert len(store.prune(keep=3).versions) == 1
    assert set(holds(store)) == {"face0", "face2", "face3", "face4", "face5", "face7", "face8"}


class Sequences(RuleBasedStateMachine):
    """Any sequence of add, remove, merge, switch and prune, compared with a dictionary; searches with brute force."""

    def __init__(self):
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.store = Store(f"{self.place.name}/store")
        self.model: dict[str, tuple[int, str]] = {}
        self.banned: set[str] = set()
        self.models: dict[str, dict[str, tuple[int, str]]] = {}
        self.night = 0

    @initialize(seeds=st.lists(st.integers(0, 40), min_size=4, max_size=12, unique=True))
    def first(self, seeds):
        self.model = {f"face{i}": (i, f"person{i % 5}") for i in seeds}
        build(self.store, self.model, mode="cosine")
        self.models[self.store.current()] = dict(self.model)

    def allowed(self, new):
        return {i: f for i, f in new.items() if f[1] not in self.banned}

    def updated(self, batches):
        self.night += 1
        if not self.model:
            with pytest.raises(BadCodesError):
                self.store.update(str(self.night), batches)
            self.model = dict(self.models[self.store.current()])
            return
        self.store.update(str(self.night), batches, check=check)
        self.models[self.store.current()] = dict(self.model)

    @rule(new=st.dictionaries(st.integers(0, 40), st.integers(0, 3), min_size=1, max_size=8), cut=st.integers(0, 8))
    def add(self, new, cut):
        new = {f"face{i}": (i + 100 * change, f"person{i % 5}") for i, change in new.items()}
        self.model |= self.allowed(new)
        self.model = self.allowed(self.model)
        names = list(new)
        parts = [{n: new[n] for n in names[:cut]}, {n: new[n] for n in names[cut:]}]
        self.updated([batch_of(part) for part in parts if part])

    @rule(other=st.lists(st.integers(30, 60), min_size=2, max_size=6, unique=True))
    def merge(self, other):
        faces = {f"face{i}": (i, f"person{i % 5}") for i in other}
        merged = Store(f"{self.place.name}/other{self.night}")
        build(merged, faces, mode="cosine")
        self.model |= self.allowed(faces)
        self.model = self.allowed(self.model)
        self.updated(batches_of(*open_gallery(merged.url)))

    @rule(person=st.integers(0, 4))
    def remove(self, person):
        if len({p for _, p in self.model.values()} - {f"person{person}"}) == 0:
            return
        self.banned.add(f"person{person}")
        self.store.removed.add(people=[f"person{person}"])
        self.model = self.allowed(self.model)
        self.updated([])

    @rule()
    def back(self):
        name = self.store.versions()[0].name
        self.store.switch(name)
        self.model = dict(self.models[name])

    @rule(keep=st.integers(0, 2))
    def prune(self, keep):
        self.store.prune(keep)
        for version in self.store.versions():
            held = self.models[version.name]
            assert version.current or not {p for _, p in held.values()} & self.banned

    @invariant()
    def holds_what_it_should(self):
        if not self.models:
            return
        gallery = Gallery.load(self.store.url)
        assert set(gallery.ids) == set(self.model)
        codes = np.stack([code_of(self.model[id_][0]) for id_ in gallery.ids])
        np.testing.assert_array_equal(gallery.codes(gallery.ids), codes)
        queries, k = random_codes(2, LAYERS, DIM, seed=1), min(3, len(codes))
        most, _, least, _ = brute_force(codes, list(gallery.ids), queries, k, "cosine")
        found = gallery.search(queries, k)
        assert (found.most_ids == most).all() and (found.least_ids == least).all()

    def teardown(self):
        self.place.cleanup()


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=12, stateful_step_count=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
