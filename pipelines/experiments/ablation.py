"""`scol experiment run ablation`: which settings hide identity from recognisers that were not inside.

Each variant (`variants`) protects the same development people, who are apart from those whose results are reported
(`protocol.develop`), once for each recogniser that is to judge: where it is among the variant's features, another
takes its place, as in `table1`.  So every recogniser judges, and none judges what it was used for.  All variants and
splits share one run folder: what their settings have in common, such as the faces and their codes, is made once.

Faces are compared with the base's as well: they are the same, so differences have narrower intervals than means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import Progress, ray_session
from pipelines.config.load import ConfigError, load_config
from pipelines.config.names import ALL_RECOGNISERS
from pipelines.config.sections import Config
from pipelines.evaluate import judges
from pipelines.evaluate.judges import inside_of
from pipelines.evaluate.measure import column
from pipelines.experiments.comparison import JOD_HEAD, PICTURES, PICTURES_HEAD, compare
from pipelines.experiments.datasets import read_dataset
from pipelines.experiments.faces import SEEN, Faces, estimates, jod_cells, less, mean, read_faces
from pipelines.experiments.methods import SPLIT, Method, judged_by, without
from pipelines.experiments.protocol import develop, lay_out, reported
from pipelines.experiments.tables import Options, write
from pipelines.experiments.variants import COMMON, Variant, VariantError
from pipelines.run.environment import machine
from pipelines.run.text_tables import estimate, markdown, number
from scol_ops.distortions import NONE

NAME = "ablation"
TITLE = "Variants of our method, each judged by recognisers that it did not use"
PEOPLE = 16  # by default

Say = Callable[[str], None]


# ---- splits ----------------------------------------------------------------------------------------------------------


def splits(variant: Variant, options: Options) -> dict[str, Method]:
    """Judge -> the method that it judges; judges that are not inside share one.

    A recogniser that cannot be left out (the encoder's trunk, where a variant works through the encoder) judges
    nothing.

    Raises:
        VariantError: settings that are unknown or do not go together, or leave nobody to judge.
    """
    names = judges.available()
    sets = (*COMMON, *options.sets, *variant.sets)
    config, spared = _configuration(variant, options, sets, names)
    found = {}
    for judge in names:
        name, more = variant.name, spared
        if judge in _inside(config):
            name, more = f"{variant.name}{SPLIT}{judge}", judged_by(judge, config, names)
            if judge in _inside(config, without(judge, config, names)):
                continue
        found[judge] = Method(name, "ours", profile=options.profile, sets=(*sets, *more))
        _load(variant, options, found[judge].sets)
    if not found:
        raise VariantError([f"{variant.name}: every recogniser is inside, nobody is left to judge"])
    return found


def _load(variant: Variant, options: Options, sets: Sequence[str]) -> Config:
    try:
        return load_config(options.profile, sets=sets)
    except ConfigError as error:
        raise VariantError([f"{variant.name}: {problem}" for problem in error.problems]) from error


def _configuration(
    variant: Variant, options: Options, sets: Sequence[str], names: Sequence[str]
) -> tuple[Config, tuple[str, ...]]:
    """The variant's configuration, and what had to be set for it: a judge of its verdicts that is not inside."""
    for name in (*names, *ALL_RECOGNISERS):
        spared = (f"publish.judge={name}",)
        try:
            return load_config(options.profile, sets=(*sets, *spared)), spared
        except ConfigError:
            continue
    return _load(variant, options, sets), ()  # no judge is to blame: this says what is wrong


def _inside(config: Config, features: Mapping[str, Sequence[str]] | None = None) -> tuple[str, ...]:
    tree = config.model_dump(mode="json")
    for section, names in (features or {}).items():
        tree[section]["identity"] = list(names)
    return inside_of(tree)


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A variant and its faces: those in the middle of the photos, one a person.

    Attributes:
        methods, faces, seconds: by judge: what it judges, the faces' measures, seconds of one core a face.
    """

    variant: Variant
    methods: dict[str, Method]
    faces: dict[str, Faces]
    seconds: dict[str, float | None]

    def mean(self, chosen: Sequence[str]) -> Faces:
        """Each face's means over some judges."""
        return mean([self.faces[judge] for judge in chosen])


def common_judges(found: Sequence[Measured]) -> list[str]:
    """Judges of all variants, over whom means can be compared."""
    return [judge for judge in found[0].faces if all(judge in one.faces for one in found)]


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(found: Sequence[Measured], people: int) -> str:
    """Markdown: for each variant the mean over judges and each judge's line, as saved and after the distortion.

    Args:
        found: the base first.
        people: how many were protected.
    """
    chosen = common_judges(found)
    lines: list[tuple[str, str, Faces, Faces | None, float | None]] = []  # name, judge, faces, the base's, seconds
    for one in found:
        first = one is found[0]
        if chosen:
            known = [one.seconds[judge] for judge in chosen if one.seconds[judge] is not None]
            base = None if first else found[0].mean(chosen)
            seconds = sum(known) / len(known) if known else None
            lines.append((one.variant.name, f"mean of {len(chosen)}", one.mean(chosen), base, seconds))
        for judge, faces in one.faces.items():
            base = None if first else found[0].faces.get(judge, {})
            lines.append((one.variant.name, judge, faces, base, one.seconds[judge]))
    parts = []
    for seen in SEEN:
        look = JOD_HEAD if seen == NONE else ()  # JOD is of the file as saved
        head = ("variant", "judged by", "faces", "Rank-1-U, %", "ISM", "ISM less the base's", *look, *PICTURES_HEAD)
        rows = [(*head, "s a face")]
        for name, judge, faces, base, seconds in lines:
            own, change = estimates(faces), {} if base is None else estimates(less(faces, base))
            cells = [estimate(own[column(m, "", seen)], d) for m, d in PICTURES]
            cells = [*(jod_cells(faces) if look else ()), *cells]
            identity = estimate(own[column("rank1_u", "", seen)], 1, 100), estimate(own[column("ism", "", seen)])
            moved = estimate(change.get(column("ism", "", seen)))
            rows.append((name, judge, f"{len(faces)} of {people}", *identity, moved, *cells, number(seconds, 1)))
        parts.append(f"{'As saved' if seen == NONE else f'After {seen}'}:\n\n{markdown(rows)}")
    means = f"Means are over {', '.join(chosen)}." if chosen else "No recogniser judges all variants: no means."
    return "\n\n".join([*parts, means])


def record(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """For the JSON file."""
    chosen = common_judges(found)

    def figures(faces: Faces, base: Faces) -> dict[str, Any]:
        return {"faces": len(faces), **estimates(faces), "less_base": estimates(less(faces, base))}

    return [
        {
            **asdict(one.variant),
            "mean": figures(one.mean(chosen), found[0].mean(chosen)) if chosen else None,
            "mean_of": chosen,
            "judges": {
                judge: {
                    "method": one.methods[judge].name,
                    "inside": one.methods[judge].used,
                    "settings": one.methods[judge].sets,
                    "seconds_per_face": one.seconds[judge],
                    **figures(faces, found[0].faces.get(judge, {})),
                }
                for judge, faces in one.faces.items()
            },
        }
        for one in found
    ]


# ---- running ---------------------------------------------------------------------------------------------------------


def run(
    options: Options,
    variants: Sequence[Variant],
    say: Say = lambda text: None,
    progress: Callable[[], Callable[[Progress], None] | None] = lambda: None,
) -> str:
    """Run the variants, or go on with them; returns the table (Markdown).

    OUT/ablation.md and OUT/ablation.json hold it, written anew after each variant.

    Args:
        options: `others` and `swaps` are not used.
        variants: of `variants.select`, the base first.

    Raises:
        VariantError: all variants' mistakes, before anything is made.
        DatasetError: the data set is not there, or has too few people besides the reported ones.
        Others as `comparison.compare`.
    """
    planned = plan(variants, options)
    photos = list(read_dataset(options.dataset, options.data))
    protocol = develop(photos, options.people, options.distractors, options.seed)
    kept = len(reported(photos))
    out = Path(options.out).resolve()
    originals, gallery = lay_out(protocol, options.data, out / "photos")
    found, text = [], ""
    with ray_session():
        for variant, methods in planned:
            lines = {
                line.method.name: line
                for line in compare(
                    list({m.name: m for m in methods.values()}.values()),
                    originals,
                    gallery,
                    out,
                    references=options.people + options.distractors,
                    workers=options.workers,
                    seed=options.seed,
                    say=say,
                    progress=progress,
                    run_url=str(out / "run"),
                )
            }
            faces = {
                judge: read_faces(out / "evaluations" / method.name / "faces.parquet", judge)
                for judge, method in methods.items()
            }
            seconds = {judge: lines[method.name].made.seconds_per_face for judge, method in methods.items()}
            found.append(Measured(variant, methods, faces, seconds))
            text = (
                f"{TITLE}. {options.people} people to develop on ({options.dataset}, seed {options.seed}), apart from "
                f"the {kept} whose results are reported; gallery: another photo of each, and "
                f"{len(protocol.distractors)} others; profile {options.profile}. Brackets: 95 % over people.\n\n"
                + table(found, options.people)
            )
            about = {"experiment": NAME, "options": asdict(options), "left_out": kept, "machine": machine()}
            write(out, NAME, text, about | {"variants": record(found)})
    return text


def plan(variants: Sequence[Variant], options: Options) -> list[tuple[Variant, dict[str, Method]]]:
    """Each variant's splits.

    Raises:
        VariantError: all variants' mistakes.
    """
    planned, problems = [], []
    for variant in variants:
        try:
            planned.append((variant, splits(variant, options)))
        except VariantError as error:
            problems += error.problems
    if problems:
        raise VariantError(problems)
    return planned
