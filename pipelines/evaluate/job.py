"""`scol evaluate`: lists, embeds the gallery, measures, adds up, writes. Resumable: the engine's parts lie in
OUT/work."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster import Engine, KeyRule, PartStore, Pool, Progress, Resources, Stage, hash_key, hash_keys
from cluster.keys import pack
from pipelines.archive.output import check_out
from pipelines.archive.paths import absolute
from pipelines.archive.source import lies_inside
from pipelines.evaluate import judges as recogniser_list
from pipelines.evaluate import measure
from pipelines.evaluate.answers import carried
from pipelines.evaluate.errors import EvaluateError
from pipelines.evaluate.measure import Gallery, Settings, face_schema, reference_schema, reference_source_schema
from pipelines.evaluate.page import Examples, choose_examples, write_page
from pipelines.evaluate.pairs import OK, Pairing
from pipelines.evaluate.stages import stage_lines
from pipelines.evaluate.summary import FARS, Collector, Judge, Summary, clusters, far_word, thresholds
from pipelines.evaluate.viewer import Draw, write_viewer
from pipelines.run.environment import machine, versions
from pipelines.run.folder import Run, default_run
from pipelines.run.text import to_json, utc
from scol_ops import detection
from scol_ops.distortions import NONE, STANDARD, Distortion

SCHEMA_VERSION = 1
REFERENCES = 1000
_WINDOW = 20_000  # photos whose rows are in memory at a time
_PHOTO_SECONDS = 900.0
_EYES = {"pool": "eyes", "resources": Resources(num_gpus=0.2, threads=1, memory=1500 * 2**20)}

Say = Callable[[str], None]
Engines = Callable[[PartStore, Sequence[Stage], int], Engine]  # of a store, stages, and how many items there are


@dataclass(frozen=True)
class Options:
    """What `scol evaluate` is given; see docs/evaluate.md.

    Attributes:
        originals, protected: trees as for `scol protect`: folders, globs, lists, tables; paths or fsspec URLs.
        out: folder for the results; by default beside PROTECTED.
        gallery, people_from, limit, seed, references, drop: see `pairs.Pairing`.
        recognisers: names; None: all that are here.
        distortions, photo, device: see `measure.Settings`.
        inside: recognisers that the method used; None: found out where `scol protect` made the tree, else not known,
            which the page says.
        stages: folder of the run that made PROTECTED: only its photos are measured, and what each of its stages
            contributes is told as well; None: not told.
        workers: processes; None: as the machine has. ray_address: of the Ray cluster to join.
        work: folder of what is finished, which several evaluations may share; by default OUT/work.
        store: URL of the model store, whose recognisers and LPIPS take part; None for the default one.
        viewer: the page of pairs for viewers (`evaluate.viewer`); None: none is made.
    """

    originals: str
    protected: str
    out: str | None = None
    gallery: str | None = None
    people_from: str | None = None
    recognisers: Sequence[str] | None = None
    distortions: Sequence[str] = STANDARD
    inside: Sequence[str] | None = None
    stages: str | None = None
    limit: int | None = None
    seed: int = 0
    references: int = REFERENCES
    drop: str = ""
    photo: bool = True
    workers: int | None = None
    ray_address: str | None = None
    device: str = "auto"
    work: str | None = None
    store: str | None = None
    viewer: Draw | None = None

    @property
    def folder(self) -> str:
        """Of the results."""
        return absolute(self.out or default_out(self.protected))


@dataclass(frozen=True)
class Result:
    """What an evaluation came to. `figures`: the content of OUT/evaluation.json."""

    out: str
    figures: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """The rows of all faces: where they lie, how they are keyed, and what they were measured against."""

    store: PartStore
    rule: KeyRule
    settings: Settings
    pairing: Pairing
    gallery: Gallery
    gallery_url: str


def default_out(protected: str) -> str:
    """Beside the protected tree."""
    return protected.rstrip("/") + ".eval"


def evaluate(
    options: Options,
    say: Say = lambda text: None,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Result:
    """Measure a protected tree.

    Args:
        say: takes messages, one line each. progress, stop: see `cluster.Engine`.

    Returns:
        the result, written to OUT: `faces.parquet`, `evaluation.json`, `evaluation.html`, and where it is asked for
        `viewer.html` with its key.

    Raises:
        EvaluateError, SourceError, OutputError: trees, people or settings that cannot be used. RunError: no run.
        WeightsError, ClusterError, RunInterrupted: see `cluster` and `scol_ops.models.weights`.
    """
    begin = time.monotonic()
    settings = check(options)
    inside, inside_from = _inside(options)
    source = None if options.stages is None else Run(options.stages)
    only = None if source is None else set(source.plan()["path"].to_pylist())
    run = Run(options.folder)
    parts = Run(f"{options.folder.rstrip('/')}/work" if options.work is None else absolute(options.work))
    engine = partial(
        _engine, workers=options.workers, address=options.ray_address, progress=progress, stop=stop
    )
    with tempfile.TemporaryDirectory(prefix="scol-evaluate-") as folder:
        say("listing")
        pairing = _pair(options, Path(folder), only, stop)
        c = pairing.counts
        say(f"{c.photos} photos of {c.people} people to measure; gallery of {len(pairing.references)} people")
        url, gallery = embed_gallery(parts, pairing, settings, engine)
        without = len(pairing.references) - len(gallery.people)
        say(f"gallery: {len(gallery.people)} people embedded, {without} have no usable photo")
        measured = measure_photos(parts, pairing, settings, gallery, url, engine)
        judges = _judges(measured, inside)
        summary, examples = collect(run, measured, judges)
        lines = [] if source is None else stage_lines(source, pairing.rows(), settings, gallery, say)
        viewers = carried(run, say)
        figures = _about(options, settings, inside, inside_from, url) | {
            "counts": _counts(measured, summary),
            "protected_without_original_examples": c.extra_examples,
            "recognisers": [_judge_words(j) for j in judges],
            **figures_of(summary),
            **({"stages": lines} if lines else {}),
            **({"viewers": viewers} if viewers else {}),
            "seconds": round(time.monotonic() - begin, 1),
        }
    run.write("evaluation.json", (to_json(figures) + "\n").encode())
    write_page(run, figures, summary, judges, choose_examples(examples, run.path("faces.parquet")))
    if options.viewer is not None:
        write_viewer(run, options.viewer, options.seed, say)
    return Result(run.url, figures)


# ---- checking and listing --------------------------------------------------------------------------------------------


def check(options: Options) -> Settings:
    """The settings of the measures.

    Raises:
        EvaluateError: BAD_SETTING. OutputError: OUT lies in a tree.
    """
    store = options.store
    recognisers = recogniser_list.available(store) if options.recognisers is None else options.recognisers
    check_settings(recognisers, options.distortions, store)
    check_settings(dict.fromkeys([*recognisers, *(options.inside or ())]), (), store)
    unprotected = (options.originals, *(() if options.gallery is None else (options.gallery,)))
    for tree in (*unprotected, options.protected):
        check_out(tree, options.folder)
    for tree in unprotected:
        if lies_inside(options.protected, tree):  # its photos would be taken for unprotected ones
            raise EvaluateError("BAD_SETTING", f"{options.protected} lies inside {tree}; move it out")
    return Settings(
        tuple(recognisers),
        tuple(options.distortions),
        options.photo,
        recogniser_list.lpips_name(store),
        options.seed,
        None if store is None else absolute(store),
        options.device,
    )


def check_settings(recognisers: Collection[str], distortions: Sequence[str], store: str | None = None) -> None:
    """Raises EvaluateError BAD_SETTING."""
    known = recogniser_list.available(store)
    unknown = [name for name in recognisers if name not in known]
    if unknown:
        raise EvaluateError("BAD_SETTING", f"unknown recogniser {unknown[0]!r}; there are {', '.join(known)}")
    if not recognisers:
        raise EvaluateError("BAD_SETTING", "no recogniser")
    if len(set(distortions)) < len(distortions) or len(set(recognisers)) < len(recognisers):
        raise EvaluateError("BAD_SETTING", "a recogniser or distortion is named twice")
    for name in distortions:
        try:
            Distortion(name)
        except ValueError as error:
            raise EvaluateError("BAD_SETTING", str(error)) from error
    if NONE in distortions:
        raise EvaluateError("BAD_SETTING", "the undistorted photos are always measured; leave out 'none'")


def _inside(options: Options) -> tuple[tuple[str, ...], str]:
    """Recognisers that the method used, and who says so: `option`, `run`, or nobody (`unknown`)."""
    if options.inside is not None:
        return tuple(options.inside), "option"
    found = recogniser_list.inside_of_run(options.stages or default_run(options.protected))
    return ((), "unknown") if found is None else (found, "run")


def _pair(
    options: Options, folder: Path, only: Collection[str] | None, stop: Callable[[], bool] | None
) -> Pairing:
    given = {name: getattr(options, name) for name in ("people_from", "limit", "seed", "references", "drop")}
    return Pairing(
        absolute(options.originals),
        absolute(options.protected),
        gallery=None if options.gallery is None else absolute(options.gallery),
        folder=folder,
        only=only,
        stop=stop or (lambda: False),
        **given,
    )


# ---- the two chains --------------------------------------------------------------------------------------------------


def _engine(store: PartStore, stages: Sequence[Stage], items: int, workers: int | None, **options: Any) -> Engine:
    pools = {} if workers is None else {stages[0].pool: Pool(actors=workers)}
    # What is in hand is lost when a run is stopped, so parts of small trees are small; those of large ones are few.
    return Engine(store, stages, pools=pools, shard_items=max(1, min(128, items // 100)), **options)


def embed_gallery(parts: Run, pairing: Pairing, settings: Settings, engine: Engines) -> tuple[str, Gallery]:
    """Embed the people of the gallery; returns where the result is, and the result."""
    dims = {name: recogniser_list.load(name, store=settings.store).dim for name in settings.recognisers}
    schema = reference_schema(settings.recognisers, dims)
    rows = [
        {
            "key": hash_key("reference", r.person, *(f for photo in r.photos for f in photo)),
            "person_id": r.person,
            "photos": [url for url, _ in r.photos],
            "status": OK,
            "reason": None,
        }
        for r in pairing.references
    ]
    source = pa.Table.from_pylist(rows, reference_source_schema())
    weights = _fingerprints(settings)
    keys = hash_keys(("embed", measure.EMBED_VERSION, weights), source["key"].to_pylist())
    store = PartStore(parts.path("gallery"), schema_version=SCHEMA_VERSION)
    stage = Stage(
        name="embed",
        version=measure.EMBED_VERSION,
        schema=schema,
        factory=partial(measure.embed_operator, settings, schema),
        error_rows=partial(measure.no_reference, schema),
        batch_items=1,
        item_seconds=_PHOTO_SECONDS,
        **_EYES,
    )
    if rows:
        engine(store, [stage], len(rows)).run(source, {"embed": keys})
    found = store.read_rows("embed", keys, schema=schema) if rows else schema.empty_table()
    found = found.filter(pc.equal(found["status"], OK))
    name = f"gallery-{hash_key(weights, *found['key'].to_pylist())[:16]}.parquet"
    parts.write_table(name, found)
    return parts.path(name), Gallery.read(parts.path(name), settings.recognisers)


def measure_photos(
    parts: Run, pairing: Pairing, settings: Settings, gallery: Gallery, gallery_url: str, engine: Engines
) -> Measured:
    """Measure the pairs against the gallery that lies at an URL, as far as it is not done."""
    schema = face_schema(settings)
    measured = Measured(
        PartStore(parts.path("faces"), schema_version=SCHEMA_VERSION),
        measure_rule(settings, gallery_url),
        settings,
        pairing,
        gallery,
        gallery_url,
    )
    stage = Stage(
        name="measure",
        version=measure.MEASURE_VERSION,
        schema=schema,
        factory=partial(measure.measure_operator, settings, schema, gallery_url),
        error_rows=partial(measure.error_rows, schema),
        row_id="face_id",
        item_seconds=_PHOTO_SECONDS,
        **_EYES,
    )
    engine(measured.store, [stage], pairing.counts.photos).run(pairing.tables(), {"measure": measured.rule})
    return measured


def _fingerprints(settings: Settings, lpips: bool = False) -> str:
    eyes = [f"mtcnn:{detection.weights_fingerprint()}:{sorted(measure.DETECTOR.items())}"]
    eyes += [f"{name}:{recogniser_list.fingerprint(name, settings.store)}" for name in settings.recognisers]
    if lpips and settings.lpips is not None:
        eyes.append(f"{settings.lpips}:{recogniser_list.lpips_fingerprint(settings.lpips, settings.store)}")
    return ",".join(eyes)


def measure_rule(settings: Settings, gallery_url: str) -> KeyRule:
    """Keys of the measured photos: what the result depends on besides the pair."""
    own = json.dumps(settings.to_dict(), sort_keys=True)
    gallery = gallery_url.rsplit("/", 1)[-1]  # named by its content
    return partial(hash_keys, ("measure", measure.MEASURE_VERSION, own, _fingerprints(settings, lpips=True), gallery))


# ---- adding up -------------------------------------------------------------------------------------------------------


def scan_faces(measured: Measured, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The faces' rows in the source's order; those of a person never come in two tables."""
    store, schema = measured.store, face_schema(measured.settings)
    index = store.key_index("measure")
    for source in measured.pairing.tables():
        keys = measured.rule(source["key"].to_pylist())
        codes = index.find(pack(keys))
        pieces = []
        for first in range(0, len(keys), _WINDOW):
            names = {index.names[code] for code in codes[first : first + _WINDOW].tolist() if code >= 0}
            pieces.append(store.read_rows("measure", keys[first : first + _WINDOW], columns, names, schema))
        yield pa.concat_tables(pieces)


def collect(run: Run, measured: Measured, judges: Sequence[Judge]) -> tuple[Summary, Examples]:
    """Add up all faces, and write them to `faces.parquet`."""
    people = 0
    for table in scan_faces(measured, ["person_id", "face_id", "status"]):
        people += len(set(clusters(table.filter(pc.equal(table["status"], OK)))))
    collector = Collector(measured.settings, judges, people, len(measured.gallery.people))
    examples = Examples(judges)

    def tables() -> Iterator[pa.Table]:
        for table in scan_faces(measured):
            collector.add(table)
            examples.add(table)
            yield table

    run.write_tables("faces.parquet", face_schema(measured.settings), tables())
    return collector.summary(), examples


def _judges(measured: Measured, inside: Collection[str]) -> list[Judge]:
    judges = []
    for name, embeddings in zip(measured.settings.recognisers, measured.gallery.embeddings, strict=True):
        network = recogniser_list.load(name, store=measured.settings.store)
        judges.append(Judge(name, network.fingerprint, network.threshold, *thresholds(embeddings), name in inside))
    return judges


def _judge_words(judge: Judge) -> dict[str, Any]:
    return {
        "name": judge.name,
        "fingerprint": judge.fingerprint,
        "inside": judge.inside,
        "card_threshold": judge.card_threshold,
        "impostor_pairs": judge.pairs,
        "thresholds": {far_word(far): judge.thresholds[far] for far in FARS},
    }


def _about(
    options: Options, settings: Settings, inside: Sequence[str], inside_from: str, gallery_url: str
) -> dict[str, Any]:
    """What was measured, with what, and where."""
    return {
        "version": SCHEMA_VERSION,
        "written": utc(),
        "originals": absolute(options.originals),
        "protected": absolute(options.protected),
        "gallery": options.gallery,
        "gallery_embedded": gallery_url,
        "people_from": options.people_from,
        "limit": options.limit,
        "seed": options.seed,
        "references": options.references,
        "settings": settings.to_dict(),
        "inside": list(inside),
        "inside_from": inside_from,
        "versions": versions(),
        "machine": machine(),
    }


def _counts(measured: Measured, summary: Summary) -> dict[str, Any]:
    """Photos and faces by what became of them."""
    c, people = measured.pairing.counts, len(measured.gallery.people)
    return {
        "originals": c.originals,
        "protected": c.protected,
        "photos": c.photos,
        "people": c.people,
        **summary.counts,
        "protected_without_original": c.extra,
        "photos_without_person": c.unnamed,
        "people_rows_without_photo": c.people_rows_unused,
        "gallery_photos": c.gallery_photos,
        "gallery_photos_unusable": c.gallery_unusable,
        "other_files": c.skipped,
        "gallery_people": people,
        "gallery_people_without_face": len(measured.pairing.references) - people,
    }


def figures_of(summary: Summary) -> dict[str, Any]:
    """`identity`, `picture` and `distributions` as plain dicts and numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return None if value is None else value.to_dict()

    return {
        "identity": plain(summary.identity),
        "picture": plain(summary.picture),
        "distributions": {k: v.to_dict() for k, v in summary.distributions.items()},
    }
