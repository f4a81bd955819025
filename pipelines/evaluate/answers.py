"""What viewers said of `viewer.html`: their files are read, held against the key, and added up.

Nothing is measured again: the light path changes `viewers` in OUT/evaluation.json and its section in
OUT/evaluation.html.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import BadUrlError
from pipelines.archive.paths import SourceError, absolute, local_path
from pipelines.archive.reading import content_digest, read_bytes
from pipelines.evaluate.errors import EvaluateError
from pipelines.evaluate.statistics import ClusterBootstrap, wilson
from pipelines.evaluate.viewer import BOTH, KEY, LEFT, PAGE, RIGHT, VERSION, Say
from pipelines.report import html
from pipelines.report.charts import number
from pipelines.run.folder import Run, RunError
from pipelines.run.text import to_json, utc
from pipelines.run.text_tables import estimate, markdown

UNSURE = "unsure"
MOST_BYTES = 1_000_000  # of a file of answers; 200 pairs take 30,000
_PREFIX, _SUFFIX = "viewer-answers-", ".json"
_NAME = 60  # characters of a viewer's name that are kept
_MARKS = ("<!--viewers-->", "<!--/viewers-->")  # in page.html; values cannot contain them, as `<` is escaped

Answer = Mapping[str, Any]
Told = Sequence[tuple[Mapping[str, Any], Answer]]  # pairs of the key, each with an answer


@dataclass(frozen=True)
class Answers:
    """A viewer's file. `session`: random, of one sitting; `by_pair`: id -> `original` (left, right, unsure), `score`
    (1 to 5), `publish` (True, False, or None: not answered)."""

    source: str
    viewer: str
    session: str
    by_pair: dict[str, Answer]


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_key(run: Run) -> dict[str, Any]:
    """The content of `viewer-key.json`.

    Raises:
        EvaluateError: NO_VIEWER_PAGE: it is absent, damaged, or of another version of scol.
    """
    try:
        key = run.read_json(KEY)
        pairs = {p["id"]: p for p in key["pairs"]}
        well = key["version"] == VERSION and isinstance(key["page"], str)
        well &= bool(pairs) and all(p["original"] in (LEFT, RIGHT, BOTH) and p["face_id"] for p in pairs.values())
    except RunError as error:
        raise EvaluateError("NO_VIEWER_PAGE", f"{run.path(KEY)} cannot be read; make {PAGE} by --viewer") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise EvaluateError("NO_VIEWER_PAGE", f"{run.path(KEY)} is damaged; make {PAGE} anew by --viewer") from error
    if not well:
        raise EvaluateError("NO_VIEWER_PAGE", f"{run.path(KEY)} is damaged or of another version; run --viewer again")
    return key


def find_answers(places: Sequence[str]) -> list[str]:
    """Files of answers, in order, each once.

    Args:
        places: files, or folders whose `viewer-answers-*.json` are meant.

    Raises:
        EvaluateError: BAD_ANSWERS: a folder has none.
    """
    found: list[str] = []
    for place in map(absolute, places):
        local = local_path(place)
        if not os.path.isdir(local) if local is not None else place.endswith(_SUFFIX):
            found.append(place)
            continue
        try:
            here = [n for n in Run(place).names() if n.startswith(_PREFIX) and n.endswith(_SUFFIX)]
        except (RunError, BadUrlError, OSError) as error:
            raise EvaluateError("BAD_ANSWERS", f"{place} cannot be listed: {_line(error)}") from error
        if not here:
            raise EvaluateError("BAD_ANSWERS", f"{place} has no {_PREFIX}*{_SUFFIX}")
        found += [Run(place).path(name) for name in here]
    return list(dict.fromkeys(found))


def _line(value: object, most: int = 80) -> str:
    """A value of unknown origin as one short line."""
    text = ascii(value) if isinstance(value, str) else ascii(str(value))[1:-1]
    return text if len(text) <= most else text[: most - 3] + "..."


def read_answers(source: str, key: Mapping[str, Any]) -> Answers:
    """A viewer's file, checked against the key of the page.

    Raises:
        EvaluateError: BAD_ANSWERS: unreadable, over 1 MB, not JSON, of another page or version, an unknown pair, an
            answer outside its range, or no answer at all.
    """

    def bad(words: str) -> EvaluateError:
        return EvaluateError("BAD_ANSWERS", f"{source}: {words}")

    try:
        data = read_bytes(source, MOST_BYTES)
    except SourceError as error:
        raise bad(f"cannot be read: {error}") from error
    try:
        told = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise bad("not JSON") from error
    if not isinstance(told, dict) or not isinstance(told.get("answers"), dict) or "page" not in told:
        raise bad(f"no answers of {PAGE}")
    if told.get("version") != VERSION:
        raise bad(f"version {_line(told.get('version'))} of the answers; this scol reads {VERSION}")
    if told["page"] != key["page"]:
        raise bad(f"answers to another page ({_line(told['page'])}), or to an older {PAGE}; this one is {key['page']}")
    session, viewer = told.get("session"), told.get("viewer", "")
    if not isinstance(session, str) or not session or not isinstance(viewer, str):
        raise bad("session and viewer must be texts")
    pairs = {pair["id"] for pair in key["pairs"]}
    for name, answer in told["answers"].items():
        if name not in pairs:
            raise bad(f"unknown pair {_line(name)}")
        words = _wrong(answer)
        if words:
            raise bad(f"pair {name}: {words}")
    if not told["answers"]:
        raise bad("no pair is answered")
    return Answers(source, viewer.strip()[:_NAME] or "anonymous", session, told["answers"])


def _wrong(answer: Any) -> str | None:
    """What is wrong with the answer to a pair."""
    if not isinstance(answer, dict):
        return "no answer"
    original, score, publish = (answer.get(name) for name in ("original", "score", "publish"))
    if not isinstance(original, str) or original not in (LEFT, RIGHT, UNSURE):
        return f"original is {_line(original)}; left, right or unsure are possible"
    if isinstance(score, bool) or not isinstance(score, int) or not 1 <= score <= 5:
        return f"score is {_line(score)}; 1 to 5 are possible"
    if publish is not None and not isinstance(publish, bool):
        return f"publish is {_line(publish)}; true, false or null are possible"
    return None


def _once(sets: Sequence[Answers]) -> None:
    """Raises EvaluateError BAD_ANSWERS where one sitting is in two files, which would count twice."""
    first: dict[str, str] = {}
    for answers in sets:
        if answers.session in first:
            both = f"{answers.source} and {first[answers.session]}"
            raise EvaluateError("BAD_ANSWERS", f"{both} are of one sitting; leave one of them out")
        first[answers.session] = answers.source


# ---- adding up -------------------------------------------------------------------------------------------------------


def _estimates(key: Mapping[str, Any], told: Told) -> dict[str, Any]:
    """Means of score and publish with bootstrap intervals over people, as of all other means."""
    people = ["?" + p["face_id"] if p["person_id"] is None else "=" + p["person_id"] for p, _ in told]
    values = [[a["score"], np.nan if a.get("publish") is None else float(a["publish"])] for _, a in told]
    bootstrap = ClusterBootstrap(["score", "publish"], len(set(people)), seed=key["seed"] % 2**32)
    if told:
        bootstrap.add(people, np.array(values, np.float64))
    return {name: None if found is None else found.to_dict() for name, found in bootstrap.estimates().items()}


def _altered(key: Mapping[str, Any], told: Told) -> dict[str, Any]:
    right = sum(a["original"] == p["original"] for p, a in told)
    unsure = sum(a["original"] == UNSURE for _, a in told)
    return {
        "answers": len(told),
        "right": right,
        "wrong": len(told) - right - unsure,
        "unsure": unsure,
        "picked": wilson(right + unsure / 2, len(told)),
        "picked_of_decided": wilson(right, len(told) - unsure),
        "differ": wilson(len(told) - unsure, len(told)),
        **_estimates(key, told),
    }


def _unaltered(key: Mapping[str, Any], told: Told) -> dict[str, Any]:
    unsure = sum(a["original"] == UNSURE for _, a in told)
    return {
        "answers": len(told),
        "accused": len(told) - unsure,
        "unsure": unsure,
        "differ": wilson(len(told) - unsure, len(told)),
        **_estimates(key, told),
    }


def viewer_figures(key: Mapping[str, Any], sets: Sequence[Answers]) -> dict[str, Any]:
    """What the viewers said.

    Args:
        key: see `read_key`. sets: of each viewer.

    Returns:
        `page`, `read` (time), `viewers` (how many); of `altered` and `unaltered` pairs `pairs` (on the page),
        `answers`, `unsure`, `differ` (share that named an original; of unaltered pairs these are false accusations),
        `score` (BT.500, 1 to 5), `publish`; of altered ones `right`, `wrong`, `picked` (share of right picks, not sure
        counted as half: as if by a coin), `picked_of_decided` (not sure left out); `by_viewer`. Shares are 0 to 1, with
        95 % intervals: Wilson's for what was picked, bootstrap over people for `score` and `publish`.
    """
    pairs = {pair["id"]: pair for pair in key["pairs"]}

    def told(some: Sequence[Answers], both: bool) -> Told:
        given = [(pairs[name], answer) for one in some for name, answer in one.by_pair.items()]
        return [(pair, answer) for pair, answer in given if (pair["original"] == BOTH) == both]

    def add_up(some: Sequence[Answers]) -> dict[str, Any]:
        return {"altered": _altered(key, told(some, False)), "unaltered": _unaltered(key, told(some, True))}

    found = add_up(sets)
    controls = sum(pair["original"] == BOTH for pair in pairs.values())
    found["altered"]["pairs"], found["unaltered"]["pairs"] = len(pairs) - controls, controls
    by_viewer = [{"viewer": one.viewer, **add_up([one])} for one in sets]
    return {"page": key["page"], "read": utc(), "viewers": len(sets), **found, "by_viewer": by_viewer}


# ---- words -----------------------------------------------------------------------------------------------------------


def _percent(found: Mapping[str, Any] | None) -> str:
    return estimate(found, 1, 100, form=number)


def viewer_rows(viewers: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Head and lines: what all said."""
    one, two = viewers["altered"], viewers["unaltered"]
    steps = [estimate(found["score"], 2, form=number) for found in (one, two)]
    return [
        ("what viewers said", "protected", "shown unaltered"),
        ("pairs", str(one["pairs"]), str(two["pairs"])),
        ("answers", str(one["answers"]), str(two["answers"])),
        ("original picked, not sure as half, % (50: nobody can tell)", _percent(one["picked"]), "–"),
        ("original picked, of those who chose, %", _percent(one["picked_of_decided"]), "–"),
        ("saw a difference (chose one), %", _percent(one["differ"]), _percent(two["differ"])),
        ("BT.500: 5 imperceptible, 4 not annoying, 3 slightly, 2 annoying, 1 very", *steps),
        ("would publish, %", _percent(one["publish"]), _percent(two["publish"])),
    ]


def each_viewer_rows(viewers: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Head and lines: what each viewer said."""
    rows = [("viewer", "answers", "original picked, %", "BT.500", "BT.500 of unaltered", "unaltered ones accused")]
    for found in viewers["by_viewer"]:
        one, two = found["altered"], found["unaltered"]
        steps = [number(None if part["score"] is None else part["score"]["value"], 2) for part in (one, two)]
        picked = number(None if one["picked"] is None else 100 * one["picked"]["value"], 1)
        count = one["answers"] + two["answers"]
        rows.append((found["viewer"], str(count), picked, *steps, f"{two['accused']} of {two['answers']}"))
    return rows


def viewer_words(viewers: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    return f"{viewers['viewers']} viewers\n\n" + markdown(viewer_rows(viewers))


def section(viewers: Mapping[str, Any] | None) -> str:
    """The section of `evaluation.html` about viewers, without its marks. None: nobody was asked."""
    return html.render("evaluate/viewers.html", **section_values(viewers))


def section_values(viewers: Mapping[str, Any] | None) -> dict[str, Any]:
    """What its template writes."""
    rows, each = ([], []) if viewers is None else (viewer_rows(viewers), each_viewer_rows(viewers))
    return {"viewers": viewers, "rows": rows, "each": each}


# ---- the light path --------------------------------------------------------------------------------------------------


def record_answers(out: str, places: Sequence[str], say: Say = lambda text: None) -> dict[str, Any]:
    """Read viewers' files into an evaluation that is there; what was read before is replaced.

    Args:
        out: the evaluation's folder. places: see `find_answers`. say: takes one line.

    Returns:
        see `viewer_figures`; also written as `viewers` into OUT/evaluation.json, and into OUT/evaluation.html.

    Raises:
        EvaluateError: NO_VIEWER_PAGE, BAD_ANSWERS. RunError: no evaluation is there.
    """
    run = Run(absolute(out))
    key = read_key(run)
    sets = [read_answers(source, key) for source in find_answers(places)]
    _once(sets)
    viewers = viewer_figures(key, sets)
    evaluation, page = run.read_json("evaluation.json"), run.read("evaluation.html").decode()
    run.write("evaluation.json", (to_json(evaluation | {"viewers": viewers}) + "\n").encode())
    first, second = _MARKS
    if page.count(first) == page.count(second) == 1:
        before, rest = page.split(first)
        page = before + first + section(viewers) + second + rest.split(second)[1]
        run.write("evaluation.html", page.encode())
    else:
        say("evaluation.html is of an older scol: evaluate again, and it tells what the viewers said")
    return viewers


def carried(run: Run, say: Say = lambda text: None) -> dict[str, Any] | None:
    """What viewers said, from an evaluation that is about to be written anew; None where it does not hold any more.

    It holds as long as the page's protected photos are the same files.
    """
    try:
        viewers = run.read_json("evaluation.json")["viewers"]
        key = read_key(run)
        if viewers["page"] != key["page"]:
            return None
        same = all(_unchanged(pair["protected_url"], pair["protected_digest"]) for pair in key["pairs"])
    except (RunError, EvaluateError, KeyError, TypeError):
        return None
    if not same:
        say(f"what viewers said is left out: photos that they saw have changed; make {PAGE} anew by --viewer")
    return viewers if same else None


def _unchanged(url: str, digest: str) -> bool:
    try:
        return content_digest(url) == digest
    except SourceError:
        return False
