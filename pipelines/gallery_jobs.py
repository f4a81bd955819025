"""Galleries and their versions: synthetic ones from the mapping network, others by inverting the faces of photos."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import faiss
import numpy as np
import pyarrow as pa
import torch

from cluster import Progress
from cluster.retries import is_transient, with_retries
from gallery_index import (
    CodeBatch,
    Expectation,
    Gallery,
    GalleryBuilder,
    GalleryError,
    GalleryExistsError,
    GalleryInfo,
    GalleryMismatchError,
    GalleryNotFoundError,
    Plan,
    Pruned,
    Store,
    Update,
    batches_of,
    build,
    check,
    open_gallery,
    read_info,
    synthetic_codes,
    tuning,
)
from gallery_index.storage import INDEX
from gallery_index.store import require_same, store_of
from pipelines import models, public_models
from pipelines.config import Config
from pipelines.manifests import (
    CODE_DIM,
    CODE_LAYERS,
    IDENTITY_DIM,
    OK,
    SOURCE,
    SOURCE_SCHEMA,
    Run,
    RunError,
    scan_stage,
)
from pipelines.observe import Observer
from pipelines.presence import Presence
from pipelines.sources import photo_id
from scol_ops.models.weights import load_mobilestylegan

T = TypeVar("T")


def expectation(config: Config) -> Expectation:
    """What a run needs a gallery to be.  Generators of one W space can share it, so that space's fingerprint counts."""
    weights = _weights(config)
    if config.fuse.identity_ceiling is None:
        del weights["recogniser"]
    return Expectation(
        mode=config.gallery.similarity,
        layers=config.num_codes,
        dim=CODE_DIM,
        weights=weights,
    )


def _synthetic(config: Config) -> tuple[Iterator[CodeBatch], dict[str, Any]]:
    """Codes of people who do not exist, and options of the builder."""
    models.set_up()
    settings, store = config.gallery, config.engine.models
    if config.generator in public_models.GENERATORS:
        generator = models.generator(config.generator, torch.device("cpu"), store)
    else:
        generator = load_mobilestylegan(256, head=None)  # the two embedded ones share their mapping network
    batches = synthetic_codes(
        settings.synthetic,
        settings.synthetic_seed,
        generator.mapping,
        psi=settings.truncation,
        mean=generator.mean_code,
    )
    source = f"{settings.synthetic} synthetic codes, seed {settings.synthetic_seed}, truncation {settings.truncation:g}"
    return batches, dict(
        mode=settings.similarity,
        weights={"generator": models.mapping_fingerprint(config.generator, store), "encoder": None, "recogniser": None},
        broadcast_layers=config.num_codes,
        source=source,
    )


def build_synthetic(out: str, config: Config, stop: Callable[[], bool] = lambda: False) -> GalleryInfo:
    """A gallery without versions of people who do not exist: one W a person, which stands for all layers.

    Args:
        stop: asked before each batch of codes; where it says true, the work ends as by Ctrl-C.

    Raises:
        GalleryExistsError: ``out`` holds a gallery already.
        KeyboardInterrupt: `stop`; nothing is left of the gallery.
    """
    batches, options = _synthetic(config)

    def until_stopped() -> Iterator[CodeBatch]:
        for batch in batches:
            if stop():
                raise KeyboardInterrupt
            yield batch

    return build(out, until_stopped(), **options)


def build_synthetic_version(out: str, config: Config, plan: Plan | None = None) -> tuple[str, GalleryInfo]:
    """The same as a version of a store, current when it is done; if the store has it already, it is switched to.

    Args:
        plan: of compressed indexes; None for none.

    Returns:
        the version's name and description.

    Raises:
        GalleryExistsError: ``out`` holds a gallery without versions.
    """
    config = models.resolve(config)
    batches, options = _synthetic(config)

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


def synthetic_name(config: Config) -> str:
    """Folder name of a synthetic gallery: equal settings and W space, equal name."""
    settings = config.gallery
    text = json.dumps(
        [
            settings.synthetic,
            settings.synthetic_seed,
            settings.truncation,
            settings.similarity,
            models.mapping_fingerprint(config.generator, config.engine.models),
        ]
    )
    return f"synthetic-{settings.synthetic}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


def _version_for(config: Config, run: Run) -> str:
    """URL of the gallery, or of the version of it, that a run is to use (``gallery.version``)."""
    from pipelines.protect import absolute

    url = absolute(config.gallery.url)
    store, wanted = Store(url), config.gallery.version
    if store.folder.exists(INDEX):  # a gallery without versions, or a version's own folder
        return url
    current = store.current()
    if current is None:
        raise GalleryNotFoundError(f"no finished gallery at {url}")
    if wanted == "kept":
        before = run.read_json("run.json").get("gallery", {}) if run.has("run.json") else {}
        wanted = before["version"] if before.get("version") and before.get("store") == url else "current"
        if wanted != "current" and not store.version(wanted).exists(INDEX):
            raise GalleryNotFoundError(
                f"{url} has no version {wanted} any more, with which {run.url} began; "
                f"--set gallery.version=current goes on with {current}, and fuses all faces anew"
            )
    return store.version(current if wanted == "current" else wanted).url


def patiently(action: Callable[[], T]) -> T:
    """What `action` does with a gallery, begun again where the store below it failed in a way that may pass."""
    return with_retries(action, transient=lambda e: not isinstance(e, GalleryError) and is_transient(e))


def reading(url: str) -> AbstractContextManager[None]:
    """While the block lasts, a version of a store is not pruned (on local disks)."""
    found = store_of(url)
    return found[0].reading(found[1]) if found else nullcontext()


def described_for_run(url: str, info: GalleryInfo) -> dict[str, Any]:
    """What a run records of its gallery."""
    found = store_of(url)
    return {
        "url": url,
        "store": found[0].url if found else None,
        "version": found[1] if found else None,
        "fingerprint": info.fingerprint,
        "codes": info.count,
        "similarity": info.mode,
        "source": info.source,
    }


def ensure_gallery(
    config: Config, run: Run, say: Callable[[str], None], stop: Callable[[], bool] = lambda: False
) -> tuple[str, GalleryInfo]:
    """The gallery of a run: the one of the configuration, checked; or a synthetic one in the run's folder, made once.

    Args:
        stop: see ``build_synthetic``.

    Returns:
        its URL and description.

    Raises:
        GalleryNotFoundError, GalleryMismatchError, GalleryCorruptError: the configured one does not serve.
    """
    if config.fuse.identity_ceiling is not None and config.gallery.url is None:
        raise GalleryMismatchError("fuse.identity_ceiling needs gallery.url: people who do not exist have no identity")
    if config.gallery.url is not None:
        url = _version_for(config, run)
        info = read_info(url)
        expectation(config).check(info, url)
        if config.fuse.identity_ceiling is not None and info.embedding_dim != IDENTITY_DIM:
            raise GalleryMismatchError(f"{url} holds no identity embeddings for fuse.identity_ceiling")
        if config.gallery.search == "compressed" and info.compression is None:
            raise GalleryMismatchError(f"{url} has no compressed indexes for gallery.search; build it with --compress")
        if config.fuse.k >= info.count:
            raise GalleryNotFoundError(f"{url} holds {info.count} codes, fuse.k = {config.fuse.k} needs more")
        return url, info
    if config.gallery.search == "compressed":
        raise GalleryMismatchError("gallery.search=compressed needs gallery.url, of a gallery built with --compress")
    url = run.path(f"gallery/{synthetic_name(config)}")
    try:
        return url, read_info(url)
    except GalleryNotFoundError:
        say(f"making a gallery of {config.gallery.synthetic} synthetic people")
        try:
            return url, build_synthetic(url, config, stop)
        except GalleryExistsError:  # another driver was quicker, or the answer to our own commit was lost
            return url, read_info(url)


def gallery_std(run: Run, url: str, info: GalleryInfo, layers: int = CODE_LAYERS) -> np.ndarray:
    """Standard deviation of each component over the gallery, (L, 512) float32; kept in the run's folder."""
    name = f"gallery/std-{info.fingerprint}{'' if layers == info.layers else f'-{layers}'}.npy"
    try:
        return np.load(io.BytesIO(run.read(name)), allow_pickle=False)
    except ValueError:
        std = np.ascontiguousarray(patiently(lambda: Gallery.load(url, layers=layers)).component_std())
        buffer = io.BytesIO()
        np.save(buffer, std)
        run.write(name, buffer.getvalue())
        return std


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
        people_from: see ``sources.list_photos``.
        run_url: folder of the intermediate tables, kept so that a second build goes on, and a later ``add`` inverts
            new and changed photos only; by default ``out`` + ``.run``.
        add: add to the current version instead of building one from these photos alone.
        compress: gives the plan of compressed indexes for a number of codes (``add`` keeps the gallery's own).

    Returns:
        the version's description, and counts: photos, faces, failed; for ``add`` also those of ``Update.counts``.

    Raises:
        ProtectError: no photo at ``src``, or no face in them.
        GalleryNotFoundError: ``add`` to a store without a version.
        GalleryMismatchError: ``add`` to a gallery of other weights, mode or layers.
        GalleryExistsError: ``out`` holds a gallery without versions.
        GalleryConflictError, GalleryCheckError: see ``Store``.
    """
    from pipelines.protect import absolute, execute, list_source

    config = models.resolve(config, say)
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
    from pipelines.protect import absolute

    config = models.resolve(config, say)
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
    Expectation(layers=config.num_codes, dim=CODE_DIM, weights=_weights(config)).check(info, folder.url)
    if info.broadcast:
        raise GalleryMismatchError(f"{folder.url} holds one W a person for all layers, photos give one for each layer")
    return info


def _weights(config: Config) -> dict[str, str]:
    store = config.engine.models
    return {
        "generator": models.mapping_fingerprint(config.generator, store),
        "encoder": models.encoder_fingerprint(config.encoder, store),
        "recogniser": models.recogniser_fingerprint(models.INVERSION_RECOGNISER),
    }


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
    from pipelines.protect import ProtectError

    made_by = models.stage_weights(config, "")["invert"]
    counts = {"photos": photos, "faces": 0, "failed": 0}

    def batches() -> Iterator[CodeBatch]:
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

    keys = hashlib.sha256("".join(key or "" for key in run.plan()["invert"].to_pylist()).encode())
    keys.update(repr(sorted(people.items())).encode())
    key = f"{keys.hexdigest()} {made_by} {config.gallery.similarity}"
    if add:
        done = store.update(key, batches(), check=check)
        info, name = done.info, done.name
        counts |= done.counts()
    else:

        def fill(builder: GalleryBuilder) -> None:
            for batch in batches():
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
            weights=_weights(config),
        )
        if not counts["faces"]:  # the version was there
            counts["faces"] = info.count
    say(f"{counts['faces']} faces of {photos} photos; {counts['failed']} rows failed; version {name}")
    return info, counts


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


def compressed_info(info: GalleryInfo) -> str:
    """What enters the keys of ``fuse`` where compressed indexes answer, since they may answer otherwise."""
    return "" if info.compression is None else f"+{info.compression['factory']},{info.compression['search']}"


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
