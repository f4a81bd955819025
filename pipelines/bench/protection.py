"""Benchmark of the protection: our profiles and the attacks on the same people, before and after JPEG 75 and half size.

    python -m pipelines.bench.protection --photos LFW [--people 128] [--profiles standard] [--workers 2]

People with two or more photos are drawn by a seed; the gallery has one other photo of each and one photo of each of
1,000 others. The attacks work on the recognisers that the profile works on (`--surrogates` for others), so that all
know the same, and are scored with it on the others alone.  Resumable: what lies in --folder is not made again; a
larger --people goes on from a smaller one.  Then, of each profile with a closed loop, what it did to the faces.  Writes
build/bench/protection.json and .md.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from cluster import ray_session
from pipelines.bench.harness import parse
from pipelines.bench.harness import record as write
from pipelines.config.load import PROFILES
from pipelines.evaluate import judges
from pipelines.experiments import loop
from pipelines.experiments.comparison import DISTORTION, UNPROTECTED, compare, lost_faces, protection_table, record
from pipelines.experiments.datasets import DatasetError, read_dataset
from pipelines.experiments.methods import ATTACKS, Method
from pipelines.experiments.protocol import REPORTED_PEOPLE, REPORTED_SEED, choose, lay_out
from pipelines.jobs.progress import Reporter
from scol_ops.distortions import NONE

PHOTOS = ("../shared/data/lfw-dev", "shared/data/lfw-dev")


def methods(profiles: list[str], attacks: list[str], surrogates: tuple[str, ...], eps: float) -> list[Method]:
    """The lines; attacks without surrogates of their own get the first profile's."""
    ours = [Method(profile, "ours", profile=profile) for profile in profiles]
    chosen = surrogates or (ours[0].used if ours else judges.available()[:-1])
    return [UNPROTECTED, *(Method(name, "attack", attack=name, eps=eps, surrogates=chosen) for name in attacks), *ours]


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
            methods(profiles, attacks, tuple(surrogates), options.eps / 255),
            originals.resolve(), gallery.resolve(), Path(options.folder).resolve(),
            references=options.people + options.distractors, workers=options.workers, say=say,
            progress=lambda: Reporter(sys.stderr),
        )  # fmt: skip
    loops = {
        line.method.name: loop.of_run(f"{line.made.tree}.run") for line in lines if line.made.strengthened is not None
    }
    text = protection_table(lines, judges.available(), (NONE, DISTORTION)) + lost_faces(lines)
    text += "".join(f"\n\nThe closed loop of {name}:\n\n{loop.table(figures)}" for name, figures in loops.items())
    print(text)
    about = {k: getattr(options, k) for k in ("people", "seed", "dataset", "eps")} | {"loops": loops}
    about |= {"distractors": len(protocol.distractors), "seconds": round(time.monotonic() - begin, 1)}
    write(options.out, record(lines, bench="protection", **about))
    options.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
