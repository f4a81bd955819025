"""What each stage of a run contributes to hiding its people, and what it costs: the faces' crops after each stage,
before paste-back and saving, as recognisers and eyes see them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.archive.paths import SourceError
from pipelines.archive.reading import read_bytes
from pipelines.config.names import GENERATORS
from pipelines.evaluate.errors import EvaluateError
from pipelines.evaluate.measure import Eyes, Gallery, Measurer, Settings, Spot, central, column
from pipelines.evaluate.pairs import OK
from pipelines.networks import load as networks
from pipelines.run.folder import Run, stages_of
from pipelines.run.schemas import WEAK
from pipelines.run.tables import read_stage
from pipelines.run.text_tables import markdown, number
from pipelines.stages.crops import as_codes, decode_png, geometry_in_crop, to_tensor
from scol_ops.metrics import flip, psnr, ssim, to_uint8
from scol_ops.paste import face_mask
from scol_ops.visibility import face_jod

ORIGINAL = "original"
# Stage of the method -> the manifests' column of its picture, or of the code that the pristine generator draws.
_DRAWN = {"inverted": "invert.code", "fused": "fuse.fused"}
_PICTURES = {
    ORIGINAL: "align.crop",
    "tuned": "tune.tuned",
    "refined": "tune.refined",
    "attacked": "attack.protected",
    "strengthened": "strengthen.protected",
}
STAGES = (ORIGINAL, *_DRAWN, *list(_PICTURES)[1:])
_COLUMNS = {
    "align": ["width", "height", "box", "landmarks", "quad", "crop"],
    "invert": ["code"],
    "fuse": ["fused", "target"],
    "tune": ["tuned", "refined"],
    "attack": ["protected"],
    "strengthen": ["protected"],
}
_MEASURES = {"psnr": psnr, "ssim": ssim, "flip": flip}  # over the face


@dataclass(frozen=True, eq=False)
class Probe:
    """A photo that a run protected: the face nearest its middle, as the run found it.

    `row`: its rows of align, invert, fuse, tune, attack and strengthen, columns named STAGE.COLUMN.
    """

    photo_id: str
    path: str
    source_url: str
    saved_url: str
    row: dict[str, Any]

    @property
    def spot(self) -> Spot:
        """In pixels of the photo."""
        return Spot(np.array(self.row["align.landmarks"], float).reshape(5, 2), np.array(self.row["align.box"], float))


def read_probes(run: Run) -> list[Probe]:
    """The photos that a run protected, by path, with crops and codes of every stage.

    Raises:
        RunError: not a run. EvaluateError: EMPTY, it has protected nothing.
    """
    published, aligned = _by_photo(run, "publish", ["status", "out_path"]), _by_photo(run, "align", _COLUMNS["align"])
    probes: dict[str, Probe] = {}
    for photo in read_stage(run, "source", ["photo_id", "path", "url"]).to_pylist():
        saved = published.get(photo["photo_id"], {})
        faces = [face for face in aligned.get(photo["photo_id"], {}).values() if face["box"] is not None]
        if faces and saved and all(row["status"] in (OK, WEAK) for row in saved.values()):
            face = faces[central(np.array([f["box"] for f in faces], float), faces[0]["width"], faces[0]["height"])]
            url, row = saved[face["face_id"]]["out_path"], {f"align.{c}": face[c] for c in _COLUMNS["align"]}
            probes[face["face_id"]] = Probe(photo["photo_id"], photo["path"], photo["url"], url, row)
    if not probes:
        raise EvaluateError("EMPTY", f"{run.url}: the run has published no protected photo")
    there = stages_of(run.plan())
    for stage, columns in _COLUMNS.items():
        if stage in there and stage != "align":
            for row in read_stage(run, stage, ["face_id", *columns]).to_pylist():
                if row["face_id"] in probes:
                    probes[row["face_id"]].row.update({f"{stage}.{c}": row[c] for c in columns})
    if "strengthen" in there:  # null where the loop kept what the attack left
        for row in (probe.row for probe in probes.values()):
            row["strengthen.protected"] = row.get("strengthen.protected") or row.get("attack.protected")
    return sorted(probes.values(), key=lambda probe: probe.path)


def _by_photo(run: Run, stage: str, columns: Sequence[str]) -> dict[str, dict[str | None, dict[str, Any]]]:
    """Photo -> face -> its row of a stage."""
    found: dict[str, dict[str | None, dict[str, Any]]] = {}
    for row in read_stage(run, stage, ["photo_id", "face_id", *columns]).to_pylist():
        found.setdefault(row["photo_id"], {})[row["face_id"]] = row
    return found


def stage_pictures(
    probe: Probe, generator: Callable[[Tensor], Tensor], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """A face's crop (1, 3, S, S) after each of `STAGES` that the manifests have it for.

    Args:
        generator: pristine, on the device; draws the inverted and the fused picture from their codes.
    """
    drawn = {name: probe.row[c] for name, c in _DRAWN.items() if probe.row.get(c) is not None}
    stored = {name: probe.row[c] for name, c in _PICTURES.items() if probe.row.get(c) is not None}
    with torch.no_grad():
        found = {name: generator(as_codes(code, device)).clamp(-1, 1) for name, code in drawn.items()}
    found |= {name: decode_png(data, device) for name, data in stored.items()}
    return {name: found[name] for name in STAGES if name in found}


# ---- measuring -------------------------------------------------------------------------------------------------------


def stage_lines(
    run: Run, rows: Iterable[Mapping[str, Any]], settings: Settings, gallery: Gallery, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """What each stage contributes, over the middle faces of the photos that the run protected.

    Args:
        run: that made the protected photos. rows: of `pairs.PAIR_SCHEMA`.
        settings, gallery: of the evaluation. say: takes progress, one line each.

    Returns:
        a line for each of `STAGES` that some face has: `stage`; `faces`, `faces_with_mate`: counts; `jod` (of the
        middle of the crop, at the crop's pixels, not the photo's), `psnr` (dB), `ssim`, `flip` (these over the face):
        means against the original's crop, None for the original; `judges`: by
        recogniser the mean cosines `ism` to the original and `mate` to another photo of the person, the shares
        `accepted_own`, `accepted_mate` of those above the recogniser's own threshold, and `rank1_u`.

    Raises:
        RunError, StoreError: no run that can be read. EvaluateError: EMPTY, BAD_SETTING: its generator is not here.
    """
    config = run.read_json("run.json")["config"]
    if config["generator"] not in GENERATORS:
        raise EvaluateError("BAD_SETTING", f"the run used the generator {config['generator']!r}, which is not here")
    probes = {probe.photo_id: probe for probe in read_probes(run)}
    eyes = Eyes(settings.recognisers, settings.device, None, settings.store)
    measurer = Measurer(settings, eyes, gallery)
    generator = networks.generator(config["generator"], eyes.device, config["engine"].get("models"))
    found: dict[str, list[dict[str, Any]]] = {}
    count = 0
    for row in rows:
        if row["status"] == OK and row["photo_id"] in probes:
            probe = probes[row["photo_id"]]
            pictures = stage_pictures(probe, generator, eyes.device)
            for stage, measures in _measure(measurer, row, probe, pictures).items():
                found.setdefault(stage, []).append(measures)
            count += 1
            if count % 16 == 0:
                say(f"stages: {count} faces")
    return [_line(stage, found[stage], eyes) for stage in STAGES if stage in found]


def _measure(
    measurer: Measurer, row: Mapping[str, Any], probe: Probe, pictures: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """By stage the measures of one face: of the picture, and by recogniser as `column` names them."""
    device, size = measurer.eyes.device, pictures[ORIGINAL].shape[-1]
    landmarks, box = geometry_in_crop(probe.row, size, device, "align.")
    face = face_mask(landmarks.cpu(), size)[0, 0].numpy() > 0.5
    crops = {stage: to_uint8(picture[0]) for stage, picture in pictures.items()}
    original = crops[ORIGINAL]
    found: dict[str, dict[str, float]] = {ORIGINAL: {}} | {
        stage: {
            "jod": face_jod(original, crop, [0, 0, 0, size, size, size, size, 0])["jod"],
            **{name: measure(original, crop, face) for name, measure in _MEASURES.items()},
        }
        for stage, crop in crops.items()
        if stage != ORIGINAL
    }
    try:
        mate = measurer.mate(row, read_bytes(row["url"]))
    except SourceError:
        mate = None
    with torch.no_grad():
        for index, network in enumerate(measurer.eyes.networks):
            seen = {
                ("", stage): network.embed_crops(to_tensor(crop, device), landmarks, box)[0].float().cpu().numpy()
                for stage, crop in crops.items()
            }
            own, other = seen["", ORIGINAL], None if mate is None else mate[index]
            values = measurer.identity(index, network.name, seen, own, row["person_id"], other, 0)
            for stage in crops:
                names = {m: column(m, network.name, stage) for m in ("ism", "mate", "rank")}
                found[stage] |= {column(m, network.name): values[n] for m, n in names.items() if n in values}
    return found


def _line(stage: str, faces: Sequence[Mapping[str, float]], eyes: Eyes) -> dict[str, Any]:
    def mean(name: str, above: float | None = None) -> float | None:
        """Of a measure, or the share of faces in which it is above a limit; None where no face has it."""
        values = np.array([face[name] for face in faces if np.isfinite(face.get(name, np.nan))])
        return None if not len(values) else float((values if above is None else values > above).mean())

    judges = {}
    for network in eyes.networks:
        own, mate, rank = (column(measure, network.name) for measure in ("ism", "mate", "rank"))
        judges[network.name] = {
            "ism": mean(own),
            "accepted_own": mean(own, network.threshold),
            "mate": mean(mate),
            "accepted_mate": mean(mate, network.threshold),
            "rank1_u": mean(rank, 1),
        }
    with_mate = sum(column("mate", eyes.networks[0].name) in face for face in faces)
    pictures = {name: mean(name) for name in ("jod", *_MEASURES)}
    return {"stage": stage, "faces": len(faces), "faces_with_mate": with_mate, **pictures, "judges": judges}


def stage_words(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of `stage_lines`: a table for each recogniser."""
    parts = []
    head = ("after", "faces", "JOD of the crop's middle", "PSNR of the face, dB", "SSIM", "FLIP")
    head += ("cosine to the original", "accepted as it, %")
    head += ("cosine to another photo", "accepted as it, %", "Rank-1-U, %")
    for judge in lines[0]["judges"] if lines else ():
        rows: list[Sequence[object]] = [head]
        for line in lines:
            found = line["judges"][judge]
            rows.append(
                (
                    line["stage"],
                    line["faces"],
                    *(number(line[name]) for name in ("jod", "psnr")),
                    *(number(line[name], 3) for name in ("ssim", "flip")),
                    *(number(found[m], d, s) for m, d, s in (("ism", 3, 1), ("accepted_own", 1, 100))),
                    *(number(found[m], d, s) for m, d, s in (("mate", 3, 1), ("accepted_mate", 1, 100))),
                    number(found["rank1_u"], 1, 100),
                )
            )
        parts.append(f"By stage, judged by {judge} (crops, before paste-back and saving):\n\n{markdown(rows)}")
    return "\n\n".join(parts)
