"""The paper's tables as named experiments, with its figures beside ours: `scol experiment run NAME`.

Each is a list of methods on one protocol (`comparison.compare`), so each is resumable, and a larger `--people` goes
on from a smaller one.  The paper's figures are those of ../shared/METHOD.md; what cannot be had here (other
recognisers, other defences' networks, face swappers) enters by folders of its outputs, and stays a dash without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import Progress, ray_session
from pipelines.config.load import load_config
from pipelines.config.names import NO_LOOP
from pipelines.evaluate import judges
from pipelines.evaluate.summary import AVERAGE
from pipelines.experiments import costs
from pipelines.experiments.comparison import (
    DISTORTION,
    JOD_HEAD,
    PICTURES,
    PICTURES_HEAD,
    UNPROTECTED,
    Line,
    compare,
    lost_faces,
    record,
)
from pipelines.experiments.datasets import read_dataset
from pipelines.experiments.methods import ATTACKS, SPLIT, Method, judged_by
from pipelines.experiments.oracle import Oracle, make_swaps
from pipelines.experiments.protocol import choose, lay_out
from pipelines.experiments.swaps import SwapFigures, measure_swaps
from pipelines.run.text import to_json
from pipelines.run.text_tables import estimate, markdown, number
from scol_ops.distortions import NONE
from scol_ops.models.files import WeightsError
from scol_ops.models.swapper import EMBEDDER

ORACLE = "embedded oracle"
Say = Callable[[str], None]


class ExperimentError(ValueError):
    """An experiment that cannot be run as asked."""


@dataclass(frozen=True)
class Options:
    """What `scol experiment run` is given.

    Attributes:
        data: root of the data set. dataset: its layout.
        out: folder of everything.
        people, distractors, seed: of the protocol.
        profile: of `scol protect`, which the experiment varies.
        sets: further settings, for all lines of ours.
        others: name -> folder with another defence's outputs for the protocol's originals (table1).
        inside: by name of these, the recognisers that it was made through, which do not score it.
        swaps: folder with a face swapper's outputs, see docs/experiments.md (table3, table4); None: the
            embedded oracle's.
        workers: processes.
    """

    data: str
    dataset: str
    out: str
    people: int = 128
    distractors: int = 1000
    seed: int = 0
    profile: str = "paper"
    sets: tuple[str, ...] = ()
    others: Mapping[str, str] | None = None
    inside: Mapping[str, Sequence[str]] | None = None
    swaps: str | None = None
    workers: int | None = None


@dataclass(frozen=True)
class Experiment:
    """`methods`: of the options; `table`: Markdown from their lines and, by line, what was measured of swaps; `swaps`:
    whether it needs them."""

    name: str
    title: str
    dataset: str
    methods: Callable[[Options], list[Method]]
    table: Callable[[Sequence[Line], Mapping[str, SwapFigures]], str]
    swaps: bool = False


# ---- table 1 ---------------------------------------------------------------------------------------------------------

_COLUMNS = ("IRSE50", "IR152", "FaceNet", "MobileFace", "average")
PAPER_1 = {
    "mi-fgsm": (70.2, 58.4, 59.2, 68.0, 63.9),
    "ti-dim": (79.0, 67.4, 74.4, 79.2, 75.0),
    "tip-im": (81.4, 71.8, 76.0, 82.2, 77.8),
    "clip2protect": (86.6, 73.4, 83.8, 85.0, 82.2),
    "scol": (93.8, 85.6, 91.4, 90.7, 90.4),
}
_SCOL = "scol"


def leave_one_out(options: Options) -> list[Method]:
    """Unprotected; the attacks and ours; folders of other defences.

    Attacks and ours work on the profile's recognisers (on the first two, where it uses the encoder alone).  For a
    recogniser among these there is a line of its own, in which another takes its place, so that it can judge.  The
    closed loop is off unless ``sets`` turn it on: its judge would score what it has chosen itself.
    """
    sets = (*NO_LOOP, *options.sets)
    names = judges.available()
    config = load_config(options.profile, sets=sets)
    sections = ("tune", "refine") if config.refines else ("tune",)
    own = tuple(dict.fromkeys(n for part in sections for n in getattr(config, part).identity if n in names))
    base = own or names[:2]
    lines = [UNPROTECTED]
    for attack in ATTACKS:
        lines.append(Method(attack, "attack", attack=attack, surrogates=base))
        for judge, features in replaced(base, names).items():
            lines.append(Method(f"{attack}{SPLIT}{judge}", "attack", attack=attack, surrogates=features))

    def ours(name: str, *more: str, attacked: bool = False) -> Method:
        attack = f"attack.enabled={str(attacked).lower()}"
        return Method(name, "ours", profile=options.profile, sets=(*sets, *more, attack))

    lines.append(ours(_SCOL))
    for judge in own:
        lines.append(ours(f"{_SCOL}{SPLIT}{judge}", *judged_by(judge, config, names)))
    lines.append(ours(f"{_SCOL}-attacked", attacked=True))
    for name, folder in (options.others or {}).items():
        inside = tuple((options.inside or {}).get(name, ()))
        lines.append(Method(name, "folder", folder=str(Path(folder).resolve()), inside=inside))
    return lines


def replaced(inside: Sequence[str], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Judge -> the features without it: the first recogniser that is not among them takes its place, where there is
    one."""
    spare = [name for name in names if name not in inside][:1]
    return {judge: tuple(n for n in inside if n != judge) + tuple(spare) for judge in inside}


def table1(lines: Sequence[Line], swaps: Mapping[str, SwapFigures]) -> str:
    names = judges.available()
    head = ("method", *(f"{n}, Rank-1-U %" for n in names), "average", *(f"paper: {n}" for n in _COLUMNS))
    rows = [(*head, *JOD_HEAD, *PICTURES_HEAD, "average after " + DISTORTION)]
    groups: dict[str, dict[str, Line]] = {}
    for line in lines:
        method, _, judge = line.method.name.partition(SPLIT)
        groups.setdefault(method, {})[judge] = line
    for method, found in groups.items():
        own = [found.get(n) or found[""] for n in names]
        ranks, later = (
            [cell and cell["rank1_u"] for cell in (line.cell(n, v) for line, n in zip(own, names, strict=True))]
            for v in (NONE, DISTORTION)
        )
        paper = PAPER_1.get(method, (None,) * len(_COLUMNS))
        each = {id(line): line for line in own}.values()
        average, after = (number(_mean(found), 1, 100) for found in (ranks, later))
        quality = [number(_mean([line.picture(m) for line in each]), d) for m, d in (("jod", 2), *PICTURES)]
        # The worst of a method's lines: quantiles of different pictures of the same faces have no mean.
        lowest = [p5 for p5 in (line.figures["distributions"]["jod"].get("p5") for line in each) if p5 is not None]
        quality.insert(1, number(min(lowest, default=None)))
        cells = (estimate(rank, 1, 100) for rank in ranks)
        rows.append((method, *cells, average, *(number(p, 1) for p in paper), *quality, after))
    return markdown(rows)


def _mean(estimates: Sequence[Mapping[str, Any] | None]) -> float | None:
    values = [e["value"] for e in estimates if e is not None]
    return sum(values) / len(values) if values else None


# ---- tables 2 to 4 ---------------------------------------------------------------------------------------------------

PAPER_2 = {0.5: (0.509, None), 1.0: (0.158, 32.01)}  # ISM, PSNR
PAPER_3 = {
    1: (63.5, 26.54),
    2: (81.5, 21.89),
    3: (95.5, 20.68),
    4: (94.0, 20.94),
    5: (91.5, 21.35),
}  # DSR, deepfake PSNR
PAPER_4 = {4: (33.35, 21.96), 8: (32.01, 20.68), 16: (29.89, 20.60)}  # source PSNR, deepfake PSNR


_TUNED = ("tune.steps=30", "refine.steps=0")


def sweep(name: str, key: str, values: Sequence[float], *fixed: str) -> Callable[[Options], list[Method]]:
    """One line of ours for each value of a setting, without the closed loop unless the options turn it on. With the
    attack's bound goes its step, a quarter of it as in METHOD (2 of 255 for 8), unless the options say another. The
    lock of the tuning needs one: of a profile without, the tuned face itself is judged, as the paper's is."""

    def settings(value: float, profile: str, sets: Sequence[str]) -> tuple[str, ...]:
        if key == "tune.id_lock" and not load_config(profile, sets=(*NO_LOOP, *sets)).tune.steps:
            sets = (*sets, *_TUNED)
        if key != "attack.eps":
            return (*NO_LOOP, *sets, *fixed, f"{key}={value}")
        return (*NO_LOOP, f"attack.step_size={value / 4 / 255}", *sets, *fixed, f"{key}={value / 255}")

    def methods(options: Options) -> list[Method]:
        named = ((f"{name}-{value:g}", settings(value, options.profile, options.sets)) for value in values)
        return [UNPROTECTED, *(Method(name, "ours", profile=options.profile, sets=sets) for name, sets in named)]

    return methods


def _value(line: Line) -> float | None:
    return float(line.method.name.rsplit("-", 1)[1]) if line.method.kind == "ours" else None


def _head_and_identity(line: Line) -> tuple[str, ...]:
    """The varied value (or the line's name), ISM, Rank-1-U, JOD, PSNR (of the crop, as the paper's)."""
    value, cell = _value(line), line.cell(AVERAGE) or {}
    identity = estimate(cell.get("ism")), estimate(cell.get("rank1_u"), 1, 100)
    psnr = estimate(line.picture("psnr"), 2, interval=False)
    return (line.method.name if value is None else f"{value:g}", *identity, line.jod()[0], psnr)


def table2(lines: Sequence[Line], swaps: Mapping[str, SwapFigures]) -> str:
    head = ("lambda", "ISM", "Rank-1-U, %", "JOD", "PSNR, dB", "SSIM of the face", "FLIP of the face")
    rows = [(*head, "paper: ISM", "paper: PSNR, dB")]
    for line in lines:
        pictures = (estimate(line.picture(m), interval=False) for m in ("face_ssim", "face_flip"))
        ism, psnr = PAPER_2.get(_value(line), (None, None))
        rows.append((*_head_and_identity(line), *pictures, number(ism, 3), number(psnr, 2)))
    return markdown(rows)


def _swap_cells(found: SwapFigures | None) -> tuple[str, ...]:
    if found is None:
        return "-", "-", "-", "-"
    shares = (list(by_judge.values()) for by_judge in (found.dsr, found.without, found.of_recognised))
    return (*(number(sum(s) / len(s) if s else None, 1, 100) for s in shares), number(found.deepfake_psnr))


def _swap_table(head: str, paper: Mapping[float, tuple[float, float]], names: tuple[str, str]):
    def table(lines: Sequence[Line], swaps: Mapping[str, SwapFigures]) -> str:
        by = f" ({ORACLE})" if any(found.swapper == ORACLE for found in swaps.values()) else ""
        columns = (f"DSR{by}, %", "of unprotected, %", "of recognised swaps, %", f"deepfake PSNR{by}, dB")
        rows = [(head, "ISM", "Rank-1-U, %", "JOD", "PSNR, dB", *columns, *(f"paper: {n}" for n in names))]
        for line in lines:
            theirs = (number(value) for value in paper.get(_value(line), (None, None)))
            rows.append((*_head_and_identity(line), *_swap_cells(swaps.get(line.method.name)), *theirs))
        return markdown(rows)

    return table


# ---- table 5 ---------------------------------------------------------------------------------------------------------

PAPER_5 = {
    "CLIP2Protect": (18756, 423, 70),
    "DiffAM": (1120, 227, 12),
    "DF-RAP": (332, 201, 4),
    "SCOL": (15229, 297, 47),
}


def table5(options: Options, say: Say = lambda text: None) -> tuple[str, dict[str, Any]]:
    """Cost of a face: Markdown, and the figures."""
    rows = [("method", "GFLOPs", "million parameters", "seconds an image", "on")]
    figures = {}
    for profile in ("quick", "standard", "paper"):
        say(f"{profile}: counting")
        try:
            found = figures[profile] = costs.measure(profile, options.sets)
        except WeightsError as error:
            say(f"{profile}: {error}")
            rows.append((f"ours, {profile} (models missing)", "-", "-", "-", "-"))
            continue
        counted = number(found.gflops, 0), number(found.mparams, 1), number(found.seconds, 1)
        rows.append((f"ours, {profile}", *counted, found.device))
    rows += [(f"{name} (paper)", *map(str, paper), "RTX 3090") for name, paper in PAPER_5.items()]
    return markdown(rows), {name: asdict(found) for name, found in figures.items()}


# ---- running ---------------------------------------------------------------------------------------------------------

_LOCKS = sweep("lambda", "tune.id_lock", (0, 0.1, 0.5, 1, 5), "attack.enabled=false")
_TAUS = sweep("tau", "inspect.tau", (1, 2, 3, 4, 5), "attack.enabled=true")
_BOUNDS = sweep("eps", "attack.eps", (4, 8, 16), "attack.enabled=true")
_TABLE_3 = _swap_table("tau", PAPER_3, ("DSR, %", "deepfake PSNR, dB"))
_TABLE_4 = _swap_table("eps, of 255", PAPER_4, ("source PSNR, dB", "deepfake PSNR, dB"))
_TITLE_1 = "Dodging: Rank-1-U of attacks and ours, each judged by a recogniser that it did not use"
_ALL = (
    Experiment("table1", _TITLE_1, "lfw", leave_one_out, table1),
    Experiment("table2", "Weight of the id-lock, without the attack", "vggface2-hq", _LOCKS, table2),
    Experiment("table3", "Threshold of the component inspection", "vggface2-hq", _TAUS, _TABLE_3, swaps=True),
    Experiment("table4", "Bound of the attack", "vggface2-hq", _BOUNDS, _TABLE_4, swaps=True),
)
EXPERIMENTS = {experiment.name: experiment for experiment in _ALL}
COST = "table5"
NAMES = (*EXPERIMENTS, COST)


def run(
    name: str,
    options: Options,
    say: Say = lambda text: None,
    progress: Callable[[], Callable[[Progress], None] | None] = lambda: None,
) -> str:
    """Run an experiment, or go on with it; returns its table (Markdown), which OUT/NAME.md holds, with OUT/NAME.json.

    Raises:
        ExperimentError: an unknown name, or `inside` of a defence that `others` lacks. DatasetError: the data set is
            not there. Others as `comparison.compare`.
    """
    if name not in NAMES:
        raise ExperimentError(f"no experiment {name!r}; there are {', '.join(NAMES)}")
    strange = set(options.inside or ()) - set(options.others or ())
    if strange:
        raise ExperimentError(f"--other-inside names {sorted(strange)[0]!r}, which no --other gives")
    out = Path(options.out).resolve()
    about: dict[str, Any] = {"experiment": name, "options": asdict(options)}
    if name == COST:
        text, about["costs"] = table5(options, say)
        return write(out, name, text, about | {"machine": record([])["machine"]})
    experiment = EXPERIMENTS[name]
    photos = read_dataset(options.dataset or experiment.dataset, options.data)
    protocol = choose(photos, options.people, options.distractors, options.seed)
    originals, gallery = lay_out(protocol, options.data, out / "photos")
    with ray_session():
        lines = compare(
            experiment.methods(options),
            originals,
            gallery,
            out,
            references=options.people + options.distractors,
            workers=options.workers,
            say=say,
            progress=progress,
            run_url=str(out / "run"),  # tables 3 and 4 vary the attack alone: what comes before is made once
        )
    swaps = {}
    if options.swaps is not None:
        swaps = swaps_of(lines, originals, Path(options.swaps), say)
    elif experiment.swaps:
        swaps = swaps_by_oracle(lines, originals, out / "swaps", options.seed, say)
    about_swaps = "" if not swaps else " " + _about_swaps(swaps)
    people = _people(options, lines, len(protocol.distractors))
    text = f"{experiment.title}. {people}{about_swaps}\n\n" + experiment.table(lines, swaps) + lost_faces(lines)
    return write(out, name, text, record(lines, **about, swaps={k: asdict(v) for k, v in swaps.items()}))


def swaps_of(
    lines: Sequence[Line], originals: Path, folder: Path, say: Say, swapper: str = "folder", blind: Sequence[str] = ()
) -> dict[str, SwapFigures]:
    """Of each line of ours whose name has a folder in `folder`, beside `original`. `blind`: they do not judge."""
    found = {}
    for line in lines:
        place = folder / line.method.name
        names = [n for n in judges.available() if n not in (*line.method.used, *blind)]
        if line.method.kind == "ours" and place.is_dir() and names:
            say(f"{line.method.name}: swaps")
            try:
                found[line.method.name] = measure_swaps(originals, folder / "original", place, names, swapper)
            except ValueError as error:  # no swap there: the line has dashes
                say(f"{line.method.name}: {error}")
    return found


def swaps_by_oracle(
    lines: Sequence[Line], originals: Path, folder: Path, seed: int, say: Say
) -> dict[str, SwapFigures]:
    """As `swaps_of`, of swaps that the embedded oracle makes into `folder`; those that are there are not made again."""
    oracle = Oracle(seed)
    ours = [(line.method.name, line.made.tree) for line in lines if line.method.kind == "ours"]
    for name, tree in (("original", originals), *ours):
        made = make_swaps(oracle, tree, folder / name)
        say(f"{name}: {made.swaps} swaps, {made.made} made now, {len(made.failed)} sources cannot be swapped")
    return swaps_of(lines, originals, folder, say, ORACLE, (EMBEDDER,))


def _about_swaps(swaps: Mapping[str, SwapFigures]) -> str:
    judged = sorted({name for found in swaps.values() for name in found.dsr})
    text = (
        "DSR: swaps of protected sources at or below the threshold (false accepts 1 % over LFW's pairs) of "
        f"{', '.join(judged)}; beside it the same share of the originals' swaps, and DSR of the sources whose "
        "original's swap is recognised."
    )
    if any(found.swapper == ORACLE for found in swaps.values()):
        text += f" The swapper is the embedded oracle, which looks at sources through {EMBEDDER}."
    return text


def _people(options: Options, lines: Sequence[Line], distractors: int) -> str:
    faces = lines[0].figures["counts"].get("faces_with_mate", 0) if lines else 0
    return (
        f"{faces} faces of {options.people} people ({options.dataset}, seed {options.seed}), gallery: another photo of "
        f"each, and {distractors} others; profile {options.profile}. Brackets: 95 % over people; a dash: not "
        "measured, or used inside."
    )


def write(out: Path, name: str, text: str, figures: Mapping[str, Any]) -> str:
    """OUT/NAME.md and OUT/NAME.json; returns the text."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    (out / f"{name}.json").write_text(to_json(dict(figures)) + "\n", encoding="utf-8")
    return text
