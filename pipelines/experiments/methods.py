"""Ways to protect a tree of photos, each giving a tree: ours, the attacks it is compared with, or a folder that
somebody made.

All write files of the same format, tables and quality as the originals', so that a codec favours none of them.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from cluster import Engine, Operator, PartStore, Pool, Progress, Resources, Stage, hash_keys
from pipelines.archive.listing import list_source, source_table
from pipelines.archive.output import write_output
from pipelines.archive.paths import SourceError
from pipelines.archive.reading import read_bytes
from pipelines.config.load import load_config
from pipelines.config.sections import Config
from pipelines.evaluate import judges
from pipelines.evaluate.judges import inside_of
from pipelines.evaluate.measure import Eyes, Window
from pipelines.evaluate.pairs import text_fields
from pipelines.jobs.protect import protect
from pipelines.photos.codec import decode, encode
from pipelines.photos.photo import PhotoError
from pipelines.run.schemas import row_seed
from pipelines.stages.crops import to_tensor
from pipelines.stages.rows import reason_of
from scol_ops.attacks import MIFGSMSettings, TIDIMSettings, TIPIMSettings, mi_fgsm, ti_dim, tip_im
from scol_ops.metrics import to_uint8
from scol_ops.models.embedded import load_mobilestylegan
from scol_ops.models.recognisers import Recogniser, ffhq_mean_geometry

ATTACKS = {"mi-fgsm": MIFGSMSettings, "ti-dim": TIDIMSettings, "tip-im": TIPIMSettings}
VERSION = "1"
SPLIT = "-judged-by-"  # in the name of a line that one recogniser judges: between the method's and the recogniser's
TARGETS = 10  # of TIP-IM, as in its paper: people who do not exist
_AROUND = 1.3  # side of what may change, in sides of the face's box

Say = Callable[[str], None]


@dataclass(frozen=True)
class Method:
    """One line of a table.

    Attributes:
        name: of its folder and its line.
        kind: `ours`, `attack` or `folder`.
        profile, sets: of `scol protect`.
        attack, eps: one of `ATTACKS`, and its bound in [0, 1] units.
        surrogates: recognisers that the attack works on.
        folder: where the protected photos are.
        inside: recognisers that cannot judge it, for `folder`.
    """

    name: str
    kind: str
    profile: str = "standard"
    sets: tuple[str, ...] = ()
    attack: str | None = None
    eps: float = 8 / 255
    surrogates: tuple[str, ...] = ()
    folder: str | None = None
    inside: tuple[str, ...] = ()

    @property
    def used(self) -> tuple[str, ...]:
        """Recognisers that the method works through: they do not judge it."""
        if self.kind == "ours":
            return inside_of(load_config(self.profile, sets=self.sets).model_dump(mode="json"))
        return self.surrogates if self.kind == "attack" else self.inside


def without(judge: str, config: Config, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Section -> its identity features without a judge: the first recogniser that is in no section takes its place.

    Args:
        judge: what must not be inside. config: of the line that is varied. names: recognisers that can be had.
    """
    own = {section: getattr(config, section).identity for section in ("tune", "refine")}
    everywhere = tuple(dict.fromkeys(feature for features in own.values() for feature in features))
    spare = tuple(name for name in names if name not in everywhere)[:1]
    return {
        section: tuple(n for n in features if n != judge) + (spare if judge in features else ())
        for section, features in own.items()
    }


def identity_sets(config: Config, features: Mapping[str, Sequence[str]]) -> list[str]:
    """Features by section as settings; margins stay with their features, and a new feature has its default one."""
    sets = []
    for section, names in features.items():
        own = getattr(config, section)
        sets.append(f"{section}.identity={','.join(names)}")
        if own.margins:
            given = dict(zip(own.identity, own.margins, strict=True))
            margins = (given.get(name, own.default_margins[name]) for name in names)
            sets.append(f"{section}.margins={','.join(map(str, margins))}")
    return sets


def judged_by(judge: str, config: Config, names: Sequence[str]) -> tuple[str, ...]:
    """Settings by which a recogniser judges, and is not inside; see `without`."""
    return (*identity_sets(config, without(judge, config, names)), f"publish.judge={judge}")


@dataclass
class Made:
    """A tree that a method made: where it is, seconds of one core a face (None where nobody knows), photos that
    failed; of ours the share of faces that its own judge calls weak, and how many went back in the closed loop."""

    tree: str
    seconds_per_face: float | None
    failed: dict[str, str] = field(default_factory=dict)
    weak: float | None = None
    strengthened: int | None = None


def make(
    method: Method,
    originals: Path,
    folder: Path,
    *,
    workers: int | None,
    say: Say,
    progress: Callable[[Progress], None] | None = None,
    run_url: str | None = None,
) -> Made:
    """Protect `originals` by a method into `FOLDER/NAME`; what is done already is not done again.

    Args:
        run_url: the run's folder of methods of ours, which share what their settings have in common; None: beside each
            tree.

    Raises:
        what `protect` raises, and SourceError.
    """
    out = folder / method.name
    if method.kind == "folder":
        return Made(str(method.folder), None)
    if method.kind == "ours":
        config = load_config(method.profile, sets=method.sets, engine__workers=workers)
        result = protect(str(originals), str(out), config, run_url=run_url, say=say)
        failed = {code: str(n) for code, n in result["reasons"].items()}
        again = result["strengthened"] and result["strengthened"]["faces"]
        return Made(str(out), result["seconds_per_face"], failed, result["weak_share"], again)
    return _attack(method, originals, out, workers, progress)


# ---- attacks as a stage ----------------------------------------------------------------------------------------------

_SCHEMA = pa.schema(
    [
        *text_fields("key path status reason?"),
        pa.field("faces", pa.int32()),
        *(pa.field(name, pa.float32()) for name in ("seconds", "loss_before", "loss_after")),
    ]
)


def _attack(
    method: Method, originals: Path, out: Path, workers: int | None, progress: Callable[[Progress], None] | None
) -> Made:
    source = source_table(list_source(str(originals)).photos)
    weights = [judges.fingerprint(name) for name in method.surrogates]
    text = json.dumps({"method": asdict(method), "version": VERSION, "weights": weights}, sort_keys=True)
    rule = partial(hash_keys, ("attack", text, str(out)))
    keys = rule(source["key"].to_pylist())
    record = Path(f"{out}.json")
    if not record.exists() or record.read_text(encoding="utf-8") != text:  # other settings wrote to the same names
        _forget(out)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(text, encoding="utf-8")
    stage = Stage(
        name="attack",
        version=VERSION,
        schema=_SCHEMA,
        factory=partial(_operator, method, str(out)),
        error_rows=_error_rows,
        columns=["path", "url", "status", "reason"],
        pool="attack",
        resources=Resources(num_gpus=0.2, threads=1, memory=2 * 2**30),
        item_seconds=1800.0,
    )
    pools = {} if workers is None else {"attack": Pool(actors=workers)}

    def made() -> pa.Table:
        store = PartStore(f"{out}.run", schema_version=1)
        Engine(store, [stage], pools=pools, shard_items=4, progress=progress).run(source, {"attack": rule})
        return store.read_rows("attack", keys, schema=_SCHEMA)

    rows = made()
    if any(row["status"] == "ok" and not (out / row["path"]).exists() for row in rows.to_pylist()):
        _forget(out)  # somebody took files away: rows are final, so all are made anew
        rows = made()
    failed = {r["path"]: r["reason"] for r in rows.to_pylist() if r["status"] == "error"}
    faces = pc.sum(rows["faces"]).as_py() or 0
    return Made(str(out), (pc.sum(rows["seconds"]).as_py() or 0.0) / faces if faces else None, failed)


def _forget(out: Path) -> None:
    for folder in (out, Path(f"{out}.run")):
        shutil.rmtree(folder, ignore_errors=True)


def _error_rows(table: pa.Table, reason: str) -> pa.Table:
    rows = [{"key": r["key"], "path": r["path"], "status": "error", "reason": reason} for r in table.to_pylist()]
    return pa.Table.from_pylist(rows, _SCHEMA)


def _operator(method: Method, out: str) -> Operator:
    """Loads surrogates and targets; the result takes rows of the source table."""
    eyes = Eyes(method.surrogates, "auto")
    targets = target_features(method.surrogates, eyes.device.type) if method.attack == "tip-im" else []

    def run(table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([_photo(row, method, eyes, targets, out) for row in table.to_pylist()], _SCHEMA)

    return run


def _photo(row: Mapping[str, Any], method: Method, eyes: Eyes, targets: Sequence[Tensor], out: str) -> dict[str, Any]:
    answer = {"key": row["key"], "path": row["path"], "faces": 0, "seconds": 0.0}
    if row["status"] != "ok":
        return answer | {"status": "error", "reason": row["reason"]}
    try:
        photo = decode(read_bytes(row["url"]))
        pixels = photo.pixels.copy()
        begin = time.monotonic()
        losses = []
        for index, spot in enumerate(eyes.faces(pixels)):
            window = Window.about(pixels, spot)
            left, top = (int(round(v)) for v in spot.box[:2] - window.spot.box[:2])
            seed = row_seed(0, f"{row['photo_id'] if 'photo_id' in row else row['path']}/{index}")
            result = _attack_window(method, window, eyes, targets, seed)
            height, width = window.pixels.shape[:2]
            pixels[top : top + height, left : left + width] = to_uint8(result.picture[0])
            losses.append((float(result.loss_before), float(result.loss_after)))
        seconds = time.monotonic() - begin
        write_output(out, row["path"], encode(photo, pixels))
    except (PhotoError, SourceError) as error:
        return answer | {"status": "error", "reason": reason_of(error)}
    answer |= {"status": "ok", "faces": len(losses), "seconds": seconds}
    before, after = np.mean(losses, 0).tolist() if losses else (None, None)
    return answer | {"loss_before": before, "loss_after": after}


def _attack_window(method: Method, window: Window, eyes: Eyes, targets: Sequence[Tensor], seed: int):
    """One face, in the picture about it; see `scol_ops.attacks`."""
    picture = to_tensor(window.pixels, eyes.device)
    spot = window.spot
    landmarks, box = (torch.from_numpy(v)[None].float().to(eyes.device) for v in (spot.landmarks, spot.box))
    identity = [partial(_look, network, landmarks, box) for network in eyes.networks]
    mask, settings = box_mask(box, *picture.shape[-2:]), ATTACKS[method.attack](eps=method.eps)
    if method.attack == "mi-fgsm":
        return mi_fgsm(picture, identity, settings, mask)
    if method.attack == "ti-dim":
        return ti_dim(picture, identity, settings, mask, seed)
    return tip_im(picture, identity, targets, settings, mask, seed)


def _look(network: Recogniser, landmarks: Tensor, box: Tensor, picture: Tensor) -> Tensor:
    return network.embed_photo(picture, landmarks, box)


def box_mask(box: Tensor, height: int, width: int) -> Tensor:
    """(1, 1, H, W): 1 in a face's box made a little larger, where the attacks may change pixels, 0 elsewhere."""
    centre, side = (box[0, :2] + box[0, 2:]) / 2, (box[0, 2:] - box[0, :2]).max() * _AROUND / 2
    y, x = (torch.arange(n, device=box.device) for n in (height, width))
    inside = ((y - centre[1]).abs() <= side)[:, None] & ((x - centre[0]).abs() <= side)
    return inside[None, None].float()


@lru_cache(2)
def target_features(surrogates: tuple[str, ...], device: str) -> list[Tensor]:
    """Per surrogate (TARGETS, D) features of generated people."""
    generator = load_mobilestylegan(256)
    z = torch.randn(TARGETS, 512, generator=torch.Generator().manual_seed(77))
    landmarks, box = ffhq_mean_geometry(1, 256)
    with torch.no_grad():
        codes = generator.truncate(generator.mapping(z), 0.7)
        faces = [generator(c.expand(1, 16, -1)).clamp(-1, 1) for c in codes]
        networks = [judges.load(name) for name in surrogates]
        return [torch.cat([n.embed_crops(f, landmarks, box) for f in faces]).to(device) for n in networks]
