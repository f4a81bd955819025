"""Benchmark of the protection: our profiles and the attacks on the same people, before and after JPEG 75 and half size.

    python -m pipelines.bench.bench_protection --photos LFW [--people 128] [--profiles standard] [--workers 2]

People with two or more photos are drawn by a seed; the gallery has one other photo of each and one photo of each of
1,000 others. The attacks work on the recognisers that the profile works on (`--surrogates` for others), so that all
know the same, and are scored with it on the others alone.  Resumable: what lies in --folder is not made again; a
larger --people goes on from a smaller one.  Then, of each profile with a closed loop, what it did to the faces.  Writes
build/bench/protection.json and .md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from cluster import ray_session
from pipelines.config.load import PROFILES
from pipelines.evaluate import judges
from pipelines.experiments import loop
from pipelines.experiments.comparison import DISTORTION, UNPROTECTED, compare, lost_faces, protection_table, record
from pipelines.experiments.datasets import DatasetError, read_dataset
from pipelines.experiments.methods import ATTACKS, Method
from pipelines.experiments.protocol import REPORTED_PEOPLE, REPORTED_SEED, choose, lay_out
from pipelines.jobs.progress import Reporter
from pipelines.run.text import to_json
from scol_ops.distortions import NONE

PHOTOS = ("../shared/data/lfw-dev", "shared/data/lfw-dev")


def methods(profiles: list[str], attacks: list[str], surrogates: tuple[str, ...], eps: float) -> list[Method]:
    """The lines; attacks without surrogates of their own get the first profile's."""
    ours = [Method(profile, "ours", profile=profile) for profile in profiles]
    chosen = surrogates or (ours[0].used if ours else judges.available()[:-1])
    return [UNPROTECTED, *(Method(name, "attack", attack=name, eps=eps, surrogates=chosen) for name in attacks), *ours]


def main(argv: list[str] | None = None) -> int:
    """The command; exit status 0, or 2 where there are no photos."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.bench.bench_protection", description=__doc__.split("\n")[0]
    )
    default = next((p for p in PHOTOS if Path(p).is_dir()), PHOTOS[0])
    parser.add_argument("--photos", default=default, help=f"LFW [default: {default}]")
    parser.add_argument("--dataset", default="lfw", help="its layout: lfw, celeba-hq, vggface2-hq [default: lfw]")
    parser.add_argument("--people", type=int, default=REPORTED_PEOPLE, help="[default: 128]")
    parser.add_argument("--distractors", type=int, default=1000, help="[default: 1000]")
    parser.add_argument(
        "--profiles", default="standard", help=f"of {', '.join(PROFILES)}, joined by commas; may be empty"
    )
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="[default: all three]; may be empty")
    parser.add_argument("--surrogates", default="", help="of the attacks [default: what the first profile works on]")
    parser.add_argument("--eps", type=float, default=8.0, help="bound of the attacks, levels of 255 [default: 8]")
    parser.add_argument("--seed", type=int, default=REPORTED_SEED)
    parser.add_argument("--workers", type=int, help="processes [default: as the machine has cores]")
    parser.add_argument("--folder", default="build/protection", help="[default: build/protection]")
    parser.add_argument("--json", default="build/bench/protection.json")
    options = parser.parse_args(argv)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def split(text: str) -> list[str]:
        return [part.strip() for part in text.split(",") if part.strip()]

    begin = time.monotonic()
    try:
        protocol = choose(
            read_dataset(options.dataset, options.photos), options.people, options.distractors, options.seed
        )
    except DatasetError as error:
        say(f"error: {error}")
        return 2
    originals, gallery = lay_out(protocol, options.photos, options.folder)
    lines = []
    chosen = methods(
        split(options.profiles), split(options.attacks), tuple(split(options.surrogates)), options.eps / 255
    )
    with ray_session():
        lines = compare(
            chosen,
            originals.resolve(),
            gallery.resolve(),
            Path(options.folder).resolve(),
            references=options.people + options.distractors,
            workers=options.workers,
            say=say,
            progress=lambda: Reporter(sys.stderr),
        )
    loops = {
        line.method.name: loop.of_run(f"{line.made.tree}.run") for line in lines if line.made.strengthened is not None
    }
    text = protection_table(lines, judges.available(), (NONE, DISTORTION)) + lost_faces(lines)
    for name, figures in loops.items():
        text += f"\n\nThe closed loop of {name}:\n\n{loop.table(figures)}"
    print(text)
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = record(
        lines,
        bench="protection",
        people=options.people,
        distractors=len(protocol.distractors),
        seed=options.seed,
        dataset=options.dataset,
        eps=options.eps,
        loops=loops,
        seconds=round(time.monotonic() - begin, 1),
    )
    path.write_text(to_json(result) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    say(f"written: {path} and {path.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
