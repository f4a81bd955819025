"""Galleries and their versions: synthetic ones from the mapping network, others by inverting the faces of photos."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from cluster import Progress
from gallery_index import (
    CodeBatch,
    Expectation,
    GalleryBuilder,
    GalleryError,
    GalleryInfo,
    GalleryMismatchError,
    GalleryNotFoundError,
    Plan,
    Pruned,
    Store,
    Update,
    batches_of,
    check,
    open_gallery,
    tuning,
)
from gallery_index.store import require_same, store_of
from pipelines.archive.listing import ProtectError, list_source
from pipelines.archive.paths import absolute, photo_id
from pipelines.config.sections import Config
from pipelines.jobs.chain import execute
from pipelines.jobs.run_gallery import expected_weights, synthetic_batches, synthetic_name
from pipelines.networks import fingerprints
from pipelines.networks import resolve as resolving
from pipelines.run.folder import Run, RunError
from pipelines.run.observe import Observer
from pipelines.run.presence import Presence
from pipelines.run.schemas import CODE_DIM, CODE_LAYERS, OK, SOURCE, SOURCE_SCHEMA
from pipelines.run.tables import scan_stage


def build_synthetic_version(out: str, config: Config, plan: Plan | None = None) -> tuple[str, GalleryInfo]:
    """The same as a version of a store, current when it is done; if the store has it already, it is switched to.

    Args:
        plan: of compressed indexes; None for none.

    Returns:
        the version's name and description.

    Raises:
        GalleryExistsError: ``out`` holds a gallery without versions.
    """
    config = resolving.resolve(config)
    batches, options = synthetic_batches(config)

    def fill(builder: GalleryBuilder) -> None:
        for batch in batches:
            builder.add(batch)

    return Store(out).build(
        f"{synthetic_name(config)} {plan}",
        fill,
        check=check,
        about=lambda: {"added": config.gallery.synthetic},
        compression=plan,
        **options,
    )


def build_from_photos(
    src: str,
    out: str,
    config: Config,
    *,
    people_from: str | None = None,
    run_url: str | None = None,
    add: bool = False,
    compress: Callable[[int], Plan | None] = lambda count: None,
    progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[GalleryInfo, dict[str, Any]]:
    """A version of a gallery with the faces of photos: align and invert on the engine, then one code a face.

    Args:
        src: as for ``protect``.
        out: folder or URL of the store.
        people_from: see ``archive.source.list_photos``.
        run_url: folder of the intermediate tables, kept so that a second build goes on, and a later ``add`` inverts
            new and changed photos only; by default ``out`` + ``.run``.
        add: add to the current version instead of building one from these photos alone.
        compress: gives the plan of compressed indexes for a number of codes (``add`` keeps the gallery's own).

    Returns:
        the version's description, and counts: photos, faces, failed; for ``add`` also those of ``Update.counts``.

    Raises:
        ProtectError: no photo at ``src``, or no face in them.
        BusyError: somebody else is at work on the run's folder.
        GalleryNotFoundError: ``add`` to a store without a version.
        GalleryMismatchError: ``add`` to a gallery of other weights, mode or layers.
        GalleryExistsError: ``out`` holds a gallery without versions.
        GalleryConflictError, GalleryCheckError: see ``Store``.
    """

    config = resolving.resolve(config, say)
    out = absolute(out)
    run = Run(absolute(run_url or out.rstrip("/") + ".run"))
    store = Store(out)
    if add:  # asked first: hours of work may lie in between
        _fits(store, config)
    about = {"source": absolute(src), "evidence": "stat"}
    observer = Observer(run)

    def heard(message: Progress) -> None:
        observer(message)
        if progress is not None:
            progress(message)

    with Presence(run, "gallery build", observer.tell, observer.work) as presence:
        listing = list_source(src, people_from=people_from, stop=presence.stopped)
        execute(run, listing, config, about=about, until="invert", progress=heard, stop=presence.stopped)
    people = {row.photo_id: row.person_id for row in listing.rows()}
    return _from_tables(run, people, store, config, f"faces of {src}", add, compress, len(listing), say)


def add_from_run(
    run_url: str, out: str, config: Config, *, say: Callable[[str], None] = lambda text: None
) -> tuple[GalleryInfo, dict[str, Any]]:
    """Add the faces of a run of ``protect`` to a store, from the codes in its manifests; returns and errors as above.

    Raises:
        RunError: that is no run's folder, or its codes are of other weights.
    """

    config = resolving.resolve(config, say)
    run, store = Run(absolute(run_url)), Store(absolute(out))
    _fits(store, config)
    plan = run.plan()
    columns = ["photo_id", "person_id"]
    table = run.store.read_rows(SOURCE, plan[SOURCE].to_pylist(), columns, schema=SOURCE_SCHEMA)
    people = dict(zip(*(table[column].to_pylist() for column in columns), strict=True))
    return _from_tables(run, people, store, config, f"faces of {run.url}", True, lambda count: None, plan.num_rows, say)


def _fits(store: Store, config: Config) -> GalleryInfo:
    """The current version, if codes that this installation makes can be added to it."""
    folder, info = open_gallery(store.url)
    if store.current() is None:
        raise GalleryNotFoundError(f"{store.url} holds a gallery without versions; build a store first")
    Expectation(layers=config.num_codes, dim=CODE_DIM, weights=expected_weights(config)).check(info, folder.url)
    if info.broadcast:
        raise GalleryMismatchError(f"{folder.url} holds one W a person for all layers, photos give one for each layer")
    return info


def _from_tables(
    run: Run,
    people: dict[str, str | None],
    store: Store,
    config: Config,
    source: str,
    add: bool,
    compress: Callable[[int], Plan | None],
    photos: int,
    say: Callable[[str], None],
) -> tuple[GalleryInfo, dict[str, Any]]:
    """A version from the rows of ``invert`` that the run's plan names."""
    made_by = fingerprints.stage_weights(config, "")["invert"]
    counts = {"photos": photos, "faces": 0, "failed": 0}
    batches = _batches(run, people, config, made_by, counts)
    keys = hashlib.sha256("".join(key or "" for key in run.plan()["invert"].to_pylist()).encode())
    keys.update(repr(sorted(people.items())).encode())
    key = f"{keys.hexdigest()} {made_by} {config.gallery.similarity}"
    if add:
        done = store.update(key, batches, check=check)
        info, name = done.info, done.name
        counts |= done.counts()
    else:

        def fill(builder: GalleryBuilder) -> None:
            for batch in batches:
                builder.add(batch)
            if not builder.count:
                raise ProtectError("NO_FACES", f"no face was found in the {photos} photos: {source}")

        # The number of faces decides on the plan, and is known from the rows' status alone.
        plan = compress(sum(table["status"].to_pylist().count(OK) for table in scan_stage(run, "invert", ["status"])))
        name, info = store.build(
            f"{key} {plan}",
            fill,
            compression=plan,
            check=check,
            about=lambda: {"added": counts["faces"]},
            mode=config.gallery.similarity,
            source=source,
            weights=expected_weights(config),
        )
        if not counts["faces"]:  # the version was there
            counts["faces"] = info.count
    say(f"{counts['faces']} faces of {photos} photos; {counts['failed']} rows failed; version {name}")
    return info, counts


def _batches(
    run: Run, people: dict[str, str | None], config: Config, made_by: str, counts: dict[str, int]
) -> Iterator[CodeBatch]:
    """Codes of the run's faces; counts faces and failed rows as it goes."""
    for table in scan_stage(run, "invert", ["photo_id", "face_id", "status", "code", "identity", "weights"]):
        good = [i for i, status in enumerate(table["status"].to_pylist()) if status == OK]
        counts["failed"] += sum(status == "error" for status in table["status"].to_pylist())
        if not good:
            continue
        table = table.take(good)
        other = set(table["weights"].to_pylist()) - {made_by}
        if other:
            raise RunError(f"{run.url}: codes were made by {other.pop()}, here they are made by {made_by}")
        counts["faces"] += len(good)
        codes, identities = (_vectors(table, column) for column in ("code", "identity"))
        photo_ids = table["photo_id"].to_pylist()
        yield CodeBatch(
            codes.reshape(-1, config.num_codes, CODE_DIM),
            photo_ids,
            [people.get(photo) for photo in photo_ids],
            table["face_id"].to_pylist(),
            identities,
        )


def add_from_gallery(other: str, out: str) -> Update:
    """Add all codes of another gallery to a store.

    Raises:
        GalleryMismatchError: the two differ in mode, shape or weights.
        GalleryNotFoundError, GalleryConflictError, GalleryCheckError: see ``Store.update``.
    """
    store = Store(out)
    folder, theirs = open_gallery(other)
    require_same(theirs, _current(store), folder.url)
    return store.update(f"gallery {theirs.fingerprint}", batches_of(folder, theirs), check=check)


def remove(out: str, people: list[str], photos: list[str], faces: list[str]) -> Update:
    """Take people, photos (paths as in the manifests) and faces out: noted first, then a version without them.

    Raises:
        GalleryNotFoundError, GalleryConflictError, GalleryCheckError, BadCodesError: see ``Store.update``; what is
            noted stays.
    """
    store = Store(out)
    _current(store)
    store.removed.add(people, [photo_id(path) for path in photos], faces)
    return store.update("remove", check=check)


def readmit(out: str, people: list[str], photos: list[str], faces: list[str]) -> int:
    """Take them off the list of removed people, so that they may be added again. Returns how many were on it."""
    return Store(out).removed.readmit(people, [photo_id(path) for path in photos], faces)


def verify(url: str, version: str | None = None) -> dict[str, Any]:
    """Read all of a version (by default the current one) and check it.

    Raises:
        GalleryCheckError: what is wrong.
    """
    folder, info = open_gallery(url if version is None else Store(url).version(version).url)
    return {"url": folder.url, "fingerprint": info.fingerprint} | dict(check(folder, info))


def versions(url: str) -> list[dict[str, Any]]:
    """Versions of a store as plain values, the oldest first."""
    store = Store(url)
    _current(store)
    return [
        {
            "version": version.name,
            "current": version.current,
            "finished": version.info is not None,
            "codes": version.info.count if version.info else None,
            "people": version.info.people if version.info else None,
            "bytes": version.bytes,
            "switched": version.switched,
            "fingerprint": version.info.fingerprint if version.info else None,
            "about": dict(version.about),
        }
        for version in store.versions()
    ]


def switch(url: str, version: str) -> GalleryInfo:
    """Make a version the current one. Raises GalleryNotFoundError."""
    store = Store(url)
    store.switch(version)
    return store.info(version)


def prune(url: str, keep: int) -> Pruned:
    """See ``Store.prune``. Raises GalleryNotFoundError."""
    store = Store(url)
    _current(store)
    return store.prune(keep)


def _current(store: Store) -> GalleryInfo:
    name = store.current()
    if name is None:
        open_gallery(store.url)  # says so where there is nothing at all
        raise GalleryNotFoundError(f"{store.url} holds a gallery without versions; build a store first")
    return store.info(name)


def _vectors(table: pa.Table, column: str) -> np.ndarray:
    """A column of lists of equal length as (rows, length) float32."""
    return np.stack([scalar.values.to_numpy() for chunk in table[column].chunks for scalar in chunk]).astype(np.float32)


def estimate(
    count: int,
    *,
    broadcast: bool,
    memory: float | None,
    recall: float,
    factory: str | None = None,
    layers: int = CODE_LAYERS,
) -> tuning.Estimate:
    """What a gallery of so many codes takes on this machine, before anything is built.

    Args:
        count: codes, one a face.
        broadcast: one W a person for all layers, as synthetic galleries have.
        memory: bytes that the search may take; None: no limit, so it is exact.
        recall: wanted at both ends where it is compressed.
        layers: L.
        factory: this FAISS index rather than the tuner's choice (the rest of the plan is the tuner's).

    Raises:
        GalleryError: nothing fits, or FAISS knows no such index.
    """
    try:
        plan = None
        if factory is not None:
            plan = tuning.choose(count, CODE_DIM, recall=recall)
            if factory != "auto":
                plan = replace(plan, factory=factory, search=plan.search if "IVF" in factory else "")
                faiss.index_factory(CODE_DIM, factory, faiss.METRIC_INNER_PRODUCT)
        stored = 1 if broadcast else layers
        return tuning.estimate(
            count, layers, CODE_DIM, memory=memory and int(memory), recall=recall, stored_layers=stored, plan=plan
        )
    except (ValueError, RuntimeError) as error:
        raise GalleryError(str(error).splitlines()[0]) from error


def describe(url: str) -> dict[str, Any]:
    """``scol gallery info`` as plain values."""
    folder, info = open_gallery(url)
    found = store_of(folder.url)
    return {
        "url": url,
        "version": found[1] if found else None,
        "codes": info.count,
        "layers": info.layers,
        "dim": info.dim,
        "similarity": info.mode,
        "one_w_for_all_layers": info.broadcast,
        "photos": info.photos,
        "people": info.people,
        "embeddings": info.embedding_dim,
        "compression": None if info.compression is None else info.compression["factory"],
        "source": info.source,
        "weights": dict(info.weights),
        "bytes": sum(entry.size for entry in info.files.values()),
        "fingerprint": info.fingerprint,
    }
