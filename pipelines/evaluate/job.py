"""`scol evaluate`: lists, embeds the gallery, measures, adds up, writes. Resumable: the engine's parts lie in
OUT/work."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from pipelines.config.names import CEILING, EMBEDDED, ENCODER, trunk_of
from pipelines.evaluate import judges as recogniser_list
from pipelines.evaluate import measure
from pipelines.evaluate.errors import EvaluateError
from pipelines.evaluate.measure import Gallery, Settings, face_schema, reference_schema, reference_source_schema
from pipelines.evaluate.page import Examples, choose_examples, write_page
from pipelines.evaluate.pairs import OK, Pairing
from pipelines.evaluate.summary import FARS, Collector, Judge, Summary, clusters, thresholds
from pipelines.run.environment import machine, versions
from pipelines.run.folder import Run, RunError, default_run
from pipelines.run.text import to_json, utc
from scol_ops import detection
from scol_ops.distortions import NONE, STANDARD, Distortion

SCHEMA_VERSION = 1
REFERENCES = 1000
_WINDOW = 20_000  # photos whose rows are in memory at a time
_WORKER_BYTES = 1500 * 2**20
_PHOTO_SECONDS = 900.0


@dataclass(frozen=True)
class Result:
    """What an evaluation came to. `figures`: the content of OUT/evaluation.json."""

    out: str
    figures: dict[str, Any]


def default_out(protected: str) -> str:
    """Beside the protected tree."""
    return protected.rstrip("/") + ".eval"


def recognisers_inside(protected: str) -> tuple[str, ...] | None:
    """Recognisers that `scol protect` used to make this tree: they cannot judge it. None where no run that can be read
    lies beside it."""
    try:
        return inside_of(Run(default_run(protected)).read_json("run.json")["config"])
    except (RunError, KeyError, OSError):
        return None


def inside_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Recognisers that a configuration of `scol protect` works through, its encoder's trunk among them."""
    used = list(config["tune"]["identity"]) if config["tune"]["steps"] else []
    used += config["refine"]["identity"] if config["refine"]["steps"] else []
    used += [ENCODER] if config["attack"]["enabled"] else []
    used += [CEILING] if config["fuse"].get("identity_ceiling") is not None else []
    return tuple(sorted({trunk_of(config.get("encoder", EMBEDDED)) if name == ENCODER else name for name in used}))


def check_settings(recognisers: Sequence[str], distortions: Sequence[str], store: str | None = None) -> None:
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


def evaluate(
    originals: str,
    protected: str,
    *,
    out: str | None = None,
    gallery: str | None = None,
    people_from: str | None = None,
    recognisers: Sequence[str] | None = None,
    distortions: Sequence[str] = STANDARD,
    inside: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    references: int = REFERENCES,
    drop: str = "",
    photo: bool = True,
    workers: int | None = None,
    ray_address: str | None = None,
    device: str = "auto",
    work: str | None = None,
    store: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Result:
    """Measure a protected tree; see docs/evaluate.md.

    Args:
        originals, protected: trees as for `scol protect`: folders, globs, lists, tables; paths or fsspec URLs.
        out: folder for the results; by default beside PROTECTED.
        gallery, people_from, limit, seed, references, drop: see `pairs.Pairing`.
        recognisers: names; None: all that are here. distortions, photo: see `measure.Settings`.
        inside: recognisers that the method used; None: found out where `scol protect` made the tree, else not known,
            which the page says.
        workers: processes; None: as the machine has.
        work: folder of what is finished, which several evaluations may share; by default OUT/work.
        store: URL of the model store, whose recognisers and LPIPS take part; None for the default one.
        say: takes messages, one line each. progress, stop: see `cluster.Engine`.

    Returns:
        the result, written to OUT: `faces.parquet`, `evaluation.json`, `evaluation.html`.

    Raises:
        EvaluateError, SourceError, OutputError: trees, people or settings that cannot be used.
        WeightsError, ClusterError, RunInterrupted: see `cluster` and `scol_ops.models.weights`.
    """
    begin = time.monotonic()
    recognisers = recogniser_list.available(store) if recognisers is None else recognisers
    check_settings(recognisers, distortions, store)
    out = absolute(out or default_out(protected))
    for tree in (originals, protected, *(() if gallery is None else (gallery,))):
        check_out(tree, out)
    for tree in (originals, *(() if gallery is None else (gallery,))):
        if lies_inside(protected, tree):  # its photos would be taken for unprotected ones
            raise EvaluateError("BAD_SETTING", f"{protected} lies inside {tree}; move it out")
    inside_from = "option"
    if inside is None:
        found = recognisers_inside(protected)
        inside, inside_from = ((), "unknown") if found is None else (found, "run")
    else:
        check_settings([*recognisers, *(name for name in inside if name not in recognisers)], (), store)
    settings = Settings(
        tuple(recognisers),
        tuple(distortions),
        photo,
        recogniser_list.lpips_name(store),
        seed,
        None if store is None else absolute(store),
        device,
    )
    run, parts = Run(out), Run(absolute(work) if work is not None else f"{out.rstrip('/')}/work")
    with tempfile.TemporaryDirectory(prefix="scol-evaluate-") as folder:
        say("listing")
        pairing = Pairing(
            absolute(originals),
            absolute(protected),
            gallery=None if gallery is None else absolute(gallery),
            people_from=people_from,
            folder=Path(folder),
            limit=limit,
            seed=seed,
            references=references,
            drop=drop,
            stop=stop or (lambda: False),
        )
        c = pairing.counts
        say(f"{c.photos} photos of {c.people} people to measure; gallery of {len(pairing.references)} people")
        engine = partial(_engine, workers=workers, address=ray_address, progress=progress, stop=stop)
        where, people = embed_gallery(parts, pairing, settings, engine)
        say(
            f"gallery: {len(people.people)} people embedded, "
            f"{len(pairing.references) - len(people.people)} have no usable photo"
        )
        rule = measure_rule(settings, where)
        schema = face_schema(settings)
        measured = PartStore(parts.path("faces"), schema_version=SCHEMA_VERSION)
        stage = Stage(
            name="measure",
            version=measure.MEASURE_VERSION,
            schema=schema,
            factory=partial(measure.measure_operator, settings, schema, where),
            error_rows=partial(measure.error_rows, schema),
            row_id="face_id",
            pool="eyes",
            resources=Resources(num_gpus=0.2, threads=1, memory=_WORKER_BYTES),
            item_seconds=_PHOTO_SECONDS,
        )
        engine(measured, [stage], c.photos).run(pairing.tables(), {"measure": rule})
        return _collect(
            run,
            measured,
            pairing,
            rule,
            settings,
            people,
            {
                "version": SCHEMA_VERSION,
                "written": utc(),
                "originals": absolute(originals),
                "protected": absolute(protected),
                "gallery": gallery,
                "gallery_embedded": where,
                "people_from": people_from,
                "limit": limit,
                "seed": seed,
                "references": references,
                "settings": settings.to_dict(),
                "inside": list(inside),
                "inside_from": inside_from,
                "versions": versions(),
                "machine": machine(),
            },
            begin,
        )


def _engine(
    store: PartStore,
    stages: Sequence[Stage],
    items: int,
    *,
    workers: int | None,
    address: str | None,
    progress: Callable[[Progress], None] | None,
    stop: Callable[[], bool] | None,
) -> Engine:
    pools = {} if workers is None else {stages[0].pool: Pool(actors=workers)}
    # What is in hand is lost when a run is stopped, so parts of small trees are small; those of large ones are not
    # many.
    return Engine(
        store,
        stages,
        pools=pools,
        shard_items=max(1, min(128, items // 100)),
        address=address,
        progress=progress,
        stop=stop,
    )


def embed_gallery(
    parts: Run, pairing: Pairing, settings: Settings, engine: Callable[..., Engine]
) -> tuple[str, Gallery]:
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
        error_rows=partial(_no_reference, schema),
        pool="eyes",
        resources=Resources(num_gpus=0.2, threads=1, memory=_WORKER_BYTES),
        batch_items=1,
        item_seconds=_PHOTO_SECONDS,
    )
    if rows:
        engine(store, [stage], len(rows)).run(source, {"embed": keys})
    found = store.read_rows("embed", keys, schema=schema) if rows else schema.empty_table()
    found = found.filter(pc.equal(found["status"], OK))
    name = f"gallery-{hash_key(weights, *found['key'].to_pylist())[:16]}.parquet"
    parts.write_table(name, found)
    return parts.path(name), Gallery.read(parts.path(name), settings.recognisers)


def _no_reference(schema: pa.Schema, table: pa.Table, reason: str) -> pa.Table:
    rows = [
        {"key": r["key"], "person_id": r["person_id"], "status": "error", "reason": reason} for r in table.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema)


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


def scan_faces(
    store: PartStore, pairing: Pairing, rule: KeyRule, schema: pa.Schema, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The faces' rows in the source's order; those of a person never come in two tables."""
    index = store.key_index("measure")
    for source in pairing.tables():
        keys = rule(source["key"].to_pylist())
        codes = index.find(pack(keys))
        pieces = []
        for first in range(0, len(keys), _WINDOW):
            names = {index.names[code] for code in codes[first : first + _WINDOW].tolist() if code >= 0}
            pieces.append(store.read_rows("measure", keys[first : first + _WINDOW], columns, names, schema))
        yield pa.concat_tables(pieces)


def _people(store: PartStore, pairing: Pairing, rule: KeyRule, schema: pa.Schema) -> int:
    total = 0
    for table in scan_faces(store, pairing, rule, schema, ["person_id", "face_id", "status"]):
        total += len(set(clusters(table.filter(pc.equal(table["status"], OK)))))
    return total


def _collect(
    run: Run,
    store: PartStore,
    pairing: Pairing,
    rule: KeyRule,
    settings: Settings,
    people: Gallery,
    about: dict[str, Any],
    begin: float,
) -> Result:
    schema = face_schema(settings)
    judges = []
    for number, name in enumerate(settings.recognisers):
        network = recogniser_list.load(name, store=settings.store)
        found, pairs = thresholds(people.embeddings[number])
        judges.append(Judge(name, network.fingerprint, network.threshold, found, pairs, name in about["inside"]))
    collector = Collector(settings, judges, _people(store, pairing, rule, schema), len(people.people))
    chooser = Examples(judges)

    def tables() -> Iterator[pa.Table]:
        for table in scan_faces(store, pairing, rule, schema):
            collector.add(table)
            chooser.add(table)
            yield table

    run.write_tables("faces.parquet", schema, tables())
    summary = collector.summary()
    c = pairing.counts
    counts = {
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
        "gallery_people": len(people.people),
        "gallery_people_without_face": len(pairing.references) - len(people.people),
    }
    figures = about | {
        "counts": counts,
        "protected_without_original_examples": c.extra_examples,
        "recognisers": [_judge_words(j) for j in judges],
        **figures_of(summary),
        "seconds": round(time.monotonic() - begin, 1),
    }
    run.write("evaluation.json", (to_json(figures) + "\n").encode())
    write_page(run, figures, summary, judges, choose_examples(chooser, run.path("faces.parquet")))
    return Result(run.url, figures)


def _judge_words(judge: Judge) -> dict[str, Any]:
    return {
        "name": judge.name,
        "fingerprint": judge.fingerprint,
        "inside": judge.inside,
        "card_threshold": judge.card_threshold,
        "impostor_pairs": judge.pairs,
        "thresholds": {f"{far:.0e}".replace("e-0", "e-"): judge.thresholds[far] for far in FARS},
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
