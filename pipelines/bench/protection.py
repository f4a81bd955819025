"""Benchmark of the protection: our profiles and the attacks on the same people, before and after JPEG 75 and half size.

    python -m pipelines.bench.protection --photos LFW [--people 128] [--profiles standard] [--each] [--workers 2]

People with two or more photos are drawn by a seed; the gallery has one other photo of each and one photo of each of
1,000 others. The attacks work on the recognisers that the profile works on (`--surrogates` for others), so that all
know the same, and are scored with it on the others alone.  Resumable: what lies in --folder is not made again; a
larger --people goes on from a smaller one.  Then, of each profile with a closed loop, what it did to the faces.  Writes
build/bench/protection.json and .md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from cluster import ray_session
from pipelines.bench.harness import parse
from pipelines.bench.harness import record as write
from pipelines.config.load import PROFILES, load_config
from pipelines.evaluate import judges
from pipelines.experiments import loop
from pipelines.experiments.comparison import (
    DISTORTION,
    UNPROTECTED,
    Line,
    compare,
    lost_faces,
    protection_table,
    record,
)  # fmt: skip
from pipelines.experiments.datasets import DatasetError, read_dataset
from pipelines.experiments.methods import ATTACKS, SPLIT, Method, judged_by
from pipelines.experiments.protocol import REPORTED_PEOPLE, REPORTED_SEED, choose, lay_out
from pipelines.jobs.progress import Reporter
from pipelines.run.text_tables import markdown, number
from scol_ops.distortions import NONE

PHOTOS = ("../shared/data/lfw-dev", "shared/data/lfw-dev")


def methods(
    profiles: list[str], attacks: list[str], surrogates: tuple[str, ...], eps: float, each: bool
) -> list[Method]:
    """The lines; attacks without surrogates of their own get the first profile's. `each`: a line of each profile for
    each recogniser, which judges it and is not inside."""
    ours = [
        method for profile in profiles for method in (left_out(profile) if each else [Method(profile, "ours", profile)])
    ]
    chosen = surrogates or (ours[0].used if ours else judges.available()[:-1])
    return [UNPROTECTED, *(Method(name, "attack", attack=name, eps=eps, surrogates=chosen) for name in attacks), *ours]


def left_out(profile: str) -> list[Method]:
    """A profile once for each recogniser, which judges it while another takes its place inside."""
    names, config = judges.available(), load_config(profile)
    return [
        Method(f"{profile}{SPLIT}{judge}", "ours", profile, judged_by(judge, config, names)) for judge in names
    ]


def left_out_table(lines: Sequence[Line]) -> str:
    """Markdown: means of each profile's lines over the judges that were left out; empty where there are none."""
    rows = [["profile", "photos as", "JOD", "JOD, 5 %", "Rank-1-U, %", "other photo accepted at FAR 1e-3, %",
             "very photo accepted, %", "largest change, 95 %", "weak, %", "s a face"]]  # fmt: skip
    for profile in dict.fromkeys(line.method.profile for line in lines if SPLIT in line.method.name):
        some = [line for line in lines if line.method.name.startswith(profile + SPLIT)]
        for variant in (NONE, DISTORTION):
            cells = [line.cell(line.method.name.removeprefix(profile + SPLIT), variant) for line in some]
            spreads = [line.figures["distributions"] for line in some]
            saved = variant == NONE
            rows.append([
                profile, "saved" if saved else variant,
                number(fmean(line.picture("jod")["value"] for line in some), 2) if saved else "-",
                number(min(spread["jod"]["p5"] for spread in spreads), 2) if saved else "-",
                *(number(_mean([(cell.get(name) or {}).get("value") for cell in cells]), 1, 100)
                  for name in ("rank1_u", "verified_mate_1e-3", "accepted_own")),
                number(max(spread["max_change"]["p95"] for spread in spreads), 0) if saved else "-",
                number(_mean([line.made.weak for line in some]), 1, 100) if saved else "-",
                number(_mean([line.made.seconds_per_face for line in some]), 1) if saved else "-",
            ])  # fmt: skip
    words = "\n\nMeans over the recognisers that were left out, each of the run that it judged:\n\n"
    return words + markdown(rows) if rows[1:] else ""


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is not known."""
    return None if None in values else fmean(values)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command; exit status 0, or 2 where there are no photos."""
    options = parse(
        "protection", __doc__, argv,
        photos=(next((p for p in PHOTOS if Path(p).is_dir()), PHOTOS[0]), "LFW"),
        dataset=("lfw", "its layout: lfw, celeba-hq, vggface2-hq"),
        people=(REPORTED_PEOPLE, ""), distractors=(1000, ""),
        profiles=("standard", f"of {', '.join(PROFILES)}, joined by commas; may be empty"),
        attacks=(",".join(ATTACKS), "joined by commas; may be empty"),
        surrogates=("", "of the attacks, instead of what the first profile works on"),
        eps=(8.0, "bound of the attacks, levels of 255"), seed=(REPORTED_SEED, ""),
        each={"action": "store_true", "help": "a run of each profile for each recogniser, which it judges"},
        workers={"type": int, "help": "processes [default: as the machine has cores]"},
        folder=("build/protection", ""),
    )  # fmt: skip
    begin = time.monotonic()
    try:
        dataset = read_dataset(options.dataset, options.photos)
        protocol = choose(dataset, options.people, options.distractors, options.seed)
    except DatasetError as error:
        say(f"error: {error}")
        return 2
    originals, gallery = lay_out(protocol, options.photos, options.folder)
    profiles, attacks, surrogates = ([part.strip() for part in text.split(",") if part.strip()]
             for text in (options.profiles, options.attacks, options.surrogates))  # fmt: skip
    with ray_session():
        lines = compare(
            methods(profiles, attacks, tuple(surrogates), options.eps / 255, options.each),
            originals.resolve(), gallery.resolve(), Path(options.folder).resolve(),
            references=options.people + options.distractors, workers=options.workers, say=say,
            progress=lambda: Reporter(sys.stderr),
        )  # fmt: skip
    loops = {
        line.method.name: loop.of_run(f"{line.made.tree}.run") for line in lines if line.made.strengthened is not None
    }
    text = protection_table(lines, judges.available(), (NONE, DISTORTION)) + left_out_table(lines) + lost_faces(lines)
    text += "".join(f"\n\nThe closed loop of {name}:\n\n{loop.table(figures)}" for name, figures in loops.items())
    print(text)
    about = {k: getattr(options, k) for k in ("people", "seed", "dataset", "eps")} | {"loops": loops}
    about |= {"distractors": len(protocol.distractors), "seconds": round(time.monotonic() - begin, 1)}
    write(options.out, record(lines, bench="protection", **about))
    options.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
