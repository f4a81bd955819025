"""What ``scol status``, ``errors``, ``plan`` and ``doctor`` find out."""

from __future__ import annotations

import math
import os
import random
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow.compute as pc

from pipelines import presence
from pipelines.config import STAGES, Config
from pipelines.manifests import ERROR, SOURCE, WEAK, Run, RunError, duration, read_stage, stages_of, summary


def status(url: str) -> dict[str, Any]:
    """Photos done at each stage, rows there by status, the photos' states, and who is at work; see docs/operate.md.

    Raises:
        RunError: not a run's folder.
    """
    run = Run(url)
    drivers = presence.drivers(run)
    words = ("ok", "weak", "no_face", "error", "pending", "published", "copied")
    if any(driver["alive"] for driver in drivers) and not run.has("plan.parquet"):  # it lists SRC
        nothing = {word: 0 for word in words}
        return {"run": url, "photos": 0, "faces": 0, "stages": {}, "drivers": drivers, **nothing}
    plan = run.plan()
    stages = {}
    for stage in (SOURCE, *stages_of(plan)):
        rows = read_stage(run, stage, ["key", "status"])
        done = pc.count_distinct(rows["key"]).as_py() if rows.num_rows else 0
        stages[stage] = {"done": done, "rows": dict(Counter(rows["status"].to_pylist()))}
    totals = summary(run)
    faces = read_stage(run, "align", ["face_id"])["face_id"]
    return {
        "run": url,
        "photos": plan.num_rows,
        "faces": len(faces) - faces.null_count,
        "stages": stages,
        "drivers": drivers,
        **{word: totals[word] for word in (*words, "psnr", "ssim", "ism", "judge")},
    }


def status_lines(found: dict[str, Any]) -> list[str]:
    """``status`` for people."""
    living = [driver for driver in found["drivers"] if driver["alive"]]
    lines = [presence.words(driver) for driver in living or found["drivers"][-1:]]
    lines.append(f"{found['photos']} photos, {found['faces']} faces found")
    now: dict[str, Any] = {}
    for driver in living:
        now |= driver.get("stages", {})
    for stage, entry in found["stages"].items():
        line = f"  {stage:10} {entry['done']:>7}/{found['photos']} photos"
        live = now.get(stage)
        if live is not None and stage != SOURCE:
            line += f"  {live['total'] - live['done']:>7} left"
            if live["rate"]:
                line += f"  {60 * live['rate']:>8.1f}/min  {duration(live['seconds_left'])} left"
        counts = ", ".join(f"{n} {word}" for word, n in entry["rows"].items() if n)
        lines.append(f"{line}  {counts}".rstrip())
    for driver in living:
        pools = (f"{pool} {ready}/{wanted}" for pool, (ready, wanted) in driver.get("workers", {}).items())
        text = ", ".join(pools) or "none yet"
        lines.append(f"workers  {text}" + (f"; {driver['restarts']} replaced" if driver.get("restarts") else ""))
    lines += [f"{word:8} {found[word]:>7}" for word in ("ok", "weak", "no_face", "error", "pending")]
    for driver in living:
        for row in driver.get("last_errors", [])[-5:]:
            lines.append(f"last error  {row['failed_stage']}  {row['face_id'] or row['photo_id']}: {row['reason']}")
    return lines


def errors(url: str, weak: bool = True) -> list[dict[str, Any]]:
    """Rows that are not well, by path: the publish stage's, and those of photos that have not come so far.

    Raises:
        RunError: not a run's folder.
    """
    run = Run(url)
    plan = run.plan()
    paths = dict(zip(plan["photo_id"].to_pylist(), plan["path"].to_pylist(), strict=True))
    order = {photo_id: i for i, photo_id in enumerate(paths)}
    wanted = (ERROR, WEAK) if weak else (ERROR,)
    rows: dict[tuple[str, str | None], dict[str, Any]] = {}
    for stage in STAGES:  # a later stage carries the row of an earlier one
        columns = ["photo_id", "face_id", "status", "reason", "failed_stage"]
        for row in read_stage(run, stage, columns).to_pylist():
            if row["status"] in wanted:
                rows[row["photo_id"], row["face_id"]] = row
    found = [{"path": paths[row["photo_id"]]} | row for row in rows.values()]
    return sorted(found, key=lambda row: (order[row["photo_id"]], row["face_id"] or ""))


_ERROR_COLUMNS = ("path", "photo_id", "face_id", "status", "reason", "failed_stage")


def by_reason(rows: list[dict[str, Any]], examples: int = 3) -> list[dict[str, Any]]:
    """Rows of `errors` counted by status, code of the reason and stage, most frequent first, with some of each."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        code = (row["reason"] or "").split(":")[0]
        groups.setdefault((row["status"], code, row["failed_stage"] or ""), []).append(row)
    found = [
        {
            "status": status,
            "code": code,
            "failed_stage": stage,
            "rows": len(members),
            "photos": len({row["photo_id"] for row in members}),
            "examples": [{"path": row["path"], "reason": row["reason"]} for row in members[:examples]],
        }
        for (status, code, stage), members in groups.items()
    ]
    return sorted(found, key=lambda group: (-group["rows"], group["status"], group["code"], group["failed_stage"]))


def write_errors(rows: list[dict[str, Any]], file: str) -> None:
    """Rows of `errors` as a Parquet file (path or fsspec URL), all columns strings."""
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in _ERROR_COLUMNS])
    with fsspec.open(file, "wb") as sink:
        pq.write_table(pa.Table.from_pylist(rows, schema), sink, compression="zstd")


# ---- plan ------------------------------------------------------------------------------------------------------------


def plan(src: str, config: Config, *, run_url: str | None = None, sample: int = 16, seed: int = 0) -> dict[str, Any]:
    """What protecting SRC would take on this machine.

    Faces are counted in a random sample; seconds a face come from an earlier run where one is named, else from
    timing a few steps of every kind here.

    Raises:
        SourceError, ProtectError: SRC cannot be used.  RunError: the earlier run has no finished face.
    """
    from pipelines import models
    from pipelines.photo import Limits, PhotoError, decode
    from pipelines.protect import layout, list_source
    from pipelines.sources import SourceError, read_bytes

    listing = list_source(src)
    good, size = len(listing) - len(listing.failed), 0
    places = set(random.Random(seed).sample(range(good), min(sample, good)))
    chosen = []
    for place, row in enumerate(row for row in listing.rows() if row.error is None):
        size += row.size or 0
        if place in places:
            chosen.append(row)
    device = models.pick_device(config.engine.device)
    detector = models.detector(
        device, config.align.min_face_size, config.align.min_confidence, config.align.max_side, 1
    )
    counts, unreadable = [], 0
    for row in chosen:
        try:
            limits = Limits(config.align.max_pixels, config.align.max_bytes)
            counts.append(len(detector.detect([decode(read_bytes(row.url, limits.max_bytes), limits).pixels])[0]))
        except (PhotoError, SourceError):
            unreadable += 1
    mean = sum(counts) / len(counts) if counts else 0.0
    spread = (sum((c - mean) ** 2 for c in counts) / max(1, len(counts) - 1)) ** 0.5 if counts else 0.0
    readable = good * len(counts) / max(1, len(chosen))
    faces = mean * readable
    error = spread / math.sqrt(len(counts)) * readable if len(chosen) < good and counts else 0.0

    if run_url is not None:
        earlier = Run(run_url).read_json("summary.json")
        if not earlier.get("seconds_per_face"):
            raise RunError(f"{run_url} has no finished face to take times from")
        per_face, basis = earlier["seconds_per_face"], f"{earlier['faces']} faces of {run_url}"
        threads = 1
    else:
        per_face, threads = calibrate(config)
        basis = f"a few steps timed now with {threads} thread(s), times the steps of the configuration"
    pools = layout(config, [_this_machine()])
    workers = pools["generator"].actors
    seconds = faces * per_face / workers
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    words = {
        "photos": f"{len(listing)}" + (f", {len(listing) - good} of them unusable" if good < len(listing) else ""),
        "bytes": f"{size / 1e6:.1f} MB",
        "faces": f"about {faces:.0f} +- {error:.0f} ({mean:.2f} a photo in a sample of {len(chosen)}, "
        f"{unreadable} unreadable)",
        "time a face": f"{per_face:.1f} s ({basis})",
        "workers": f"{workers} here",
        "time": f"about {duration(seconds)}" + _more_words(config, run_url),
        "memory": f"about {peak / 2**30:.1f} GiB a worker (measured now)" if run_url is None else "not measured",
    }
    return {
        "photos": len(listing),
        "unusable": len(listing) - good,
        "bytes": size,
        "skipped": listing.skipped,
        "sampled": len(chosen),
        "sample_unreadable": unreadable,
        "faces": round(faces, 1),
        "faces_standard_error": round(error, 1),
        "seconds_per_face": round(per_face, 2),
        "basis": basis,
        "workers": workers,
        "seconds": round(seconds, 1),
        "peak_bytes": peak if run_url is None else None,
        "words": words,
    }


def _more_words(config: Config, run_url: str | None) -> str:
    """Who goes back to the closed loop is known only then; an earlier run's times have it in them."""
    if not config.strengthen.rounds or run_url is not None:
        return ""
    return f", and more for faces that go back (up to {config.strengthen.rounds} round(s) of {config.strengthen.steps} steps)"


def _this_machine() -> dict[str, float]:
    import torch

    from cluster.session import usable_cpus

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "CPU": usable_cpus(),
        "GPU": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "memory": 0.7 * memory,
    }


def calibrate(config: Config) -> tuple[float, int]:
    """Seconds a face by timing a few steps of every operator on a generated face, and the threads used.

    Detection, search and publishing are left out: they take below a second or two.
    """
    import dataclasses

    import torch

    from pipelines import models
    from pipelines.protect import layout
    from pipelines.stages.tune import settings_of
    from scol_ops.attack import AttackSettings, attack
    from scol_ops.inversion import InvertSettings, invert
    from scol_ops.models.recognisers import ffhq_mean_geometry
    from scol_ops.refinement import RefineSettings, refine
    from scol_ops.tuning import TuneSettings, tune

    device = models.pick_device(config.engine.device)
    threads = layout(config, [_this_machine()])["generator"].resources.threads
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    models.set_up()
    try:
        generator, encoder = (
            models.generator(config.generator, device, config.engine.models),
            models.encoder(device, config.encoder, config.engine.models),
        )
        code = generator.mean_code.expand(1, config.num_codes, -1).contiguous()
        with torch.no_grad():
            face = generator(code).clamp(-1, 1)
        landmarks, box = (t.to(device) for t in ffhq_mean_geometry(1, config.crop_size))
        mask = torch.ones_like(face[:, :1])

        def features(names):
            return [
                models.identity_feature(name, device, landmarks, box, config.encoder, config.engine.models)
                for name in names
            ]

        def steps(call: Callable[[int], Any], wanted: int) -> float:
            """Seconds of `wanted` steps, from 1 and 4 of them; the first call is thrown away."""
            if not wanted:
                return 0.0
            call(1)
            times = []
            for count in (1, 4):
                begin = time.perf_counter()
                call(count)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
            step = max(0.0, (times[1] - times[0]) / 3)
            return times[0] + step * (wanted - 1)

        tuning, refining = settings_of(TuneSettings, config.tune), settings_of(RefineSettings, config.refine)
        total = steps(
            lambda n: tune(
                generator,
                code,
                face,
                mask,
                features(config.tune.identity),
                config.tune.margin_of_each(),
                dataclasses.replace(tuning, steps=n, target_psnr=1000.0),
            ),
            tuning.steps,
        )
        if config.refines:
            total += steps(
                lambda n: refine(
                    face,
                    face,
                    mask,
                    features(config.refine.identity),
                    config.refine.margin_of_each(),
                    None,
                    dataclasses.replace(refining, steps=n),
                ),
                refining.steps,
            )
        inverting = InvertSettings(**config.invert.model_dump())
        total += steps(
            lambda n: invert(encoder, face, generator, dataclasses.replace(inverting, refine_steps=n)),
            inverting.refine_steps,
        )
        if config.attack.enabled:
            attacking = settings_of(AttackSettings, config.attack)
            total += steps(
                lambda n: attack(
                    lambda x: encoder(models.at_encoder_size(x)),
                    face,
                    code,
                    torch.ones_like(code, dtype=torch.bool),
                    mask,
                    dataclasses.replace(attacking, steps=n),
                ),
                attacking.steps,
            )
        return total, threads
    finally:
        torch.set_num_threads(before)


# ---- doctor ----------------------------------------------------------------------------------------------------------


def doctor(out: str = ".") -> list[dict[str, Any]]:
    """Checks of the installation: name, ok, words."""
    checks: list[dict[str, Any]] = []

    def check(name: str, action: Callable[[], str]) -> None:
        try:
            checks.append({"name": name, "ok": True, "words": action()})
        except Exception as error:  # whatever a broken installation raises is the finding
            checks.append({"name": name, "ok": False, "words": f"{type(error).__name__}: {error}"})

    def python() -> str:
        return sys.version.split()[0]  # an older one does not come this far

    def torch_works() -> str:
        import torch

        from cluster.session import usable_cpus

        x = torch.arange(4.0, requires_grad=True)
        (x * x).sum().backward()
        if x.grad.tolist() != [0.0, 2.0, 4.0, 6.0]:
            raise RuntimeError(f"wrong gradient {x.grad.tolist()}")
        return f"{torch.__version__}, {usable_cpus()} usable core(s)"

    def gpu() -> str:
        import torch

        if not torch.cuda.is_available():
            return "none; networks run on the CPU"
        names = []
        for i in range(torch.cuda.device_count()):
            torch.ones(8, device=f"cuda:{i}").sum().item()
            names.append(
                f"{torch.cuda.get_device_name(i)} {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
            )
        return ", ".join(names)

    def ray_starts() -> str:
        import ray

        from cluster import ray_session

        with ray_session(num_cpus=1):
            answer = ray.get(ray.remote(num_cpus=1)(lambda: 6 * 7).remote(), timeout=120)
        if answer != 42:
            raise RuntimeError(f"a task answered {answer}")
        return f"{ray.__version__}, a local one started and ran a task"

    def faiss_works() -> str:
        import faiss
        import numpy as np

        index = faiss.IndexFlatIP(4)
        index.add(np.eye(4, dtype=np.float32))
        if index.search(np.eye(4, dtype=np.float32), 1)[1][:, 0].tolist() != [0, 1, 2, 3]:
            raise RuntimeError("a search gave wrong neighbours")
        return faiss.__version__

    def weights() -> str:
        from pipelines.models import model_cards

        cards = model_cards()
        bad = [f"{card.name}: {card.problem}" for card in cards if not card.found]
        if bad:
            raise RuntimeError("; ".join(bad))
        return f"{len(cards)} networks, {sum(card.size for card in cards) / 1e6:.0f} MB, sha256 as expected"

    def disk() -> str:
        free = shutil.disk_usage(out if os.path.isdir(out) else os.path.dirname(os.path.abspath(out))).free
        if free < 2**30:
            raise RuntimeError(f"{free / 2**20:.0f} MiB free, less than 1 GiB")
        return f"{free / 2**30:.1f} GiB free at {out}"

    def memory() -> str:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if total < 3 * 2**30:
            raise RuntimeError(f"{total / 2**30:.1f} GiB, at least 3 GiB are needed")
        return f"{total / 2**30:.1f} GiB"

    for name, action in (
        ("python", python),
        ("torch", torch_works),
        ("gpu", gpu),
        ("faiss", faiss_works),
        ("weights", weights),
        ("ray", ray_starts),
        ("memory", memory),
        ("disk", disk),
    ):
        check(name, action)
    return checks
