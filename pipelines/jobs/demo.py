"""The demo: an archive of photos of people who do not exist, protected as any other archive is.

`make_archive` draws it: faces from the embedded generator at 1024 px, set into photo-like pictures with the variety
that a real archive has (see `ARCHIVE`).  `run_demo` protects it and shows what came out.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from pipelines.config.sections import Config
from pipelines.jobs import protect as protect_job
from pipelines.report.pictures import AMPLIFICATION
from pipelines.report.run_faces import read_pictures
from pipelines.run import folder as run_folder
from pipelines.run.errors import errors
from pipelines.run.folder import Run
from pipelines.run.schemas import OK, WEAK
from pipelines.run.tables import read_stage
from scol_ops.models.embedded import load_mobilestylegan

TRUNCATION = 0.7
# Seeds of the mapping network's input, chosen among the first 24 for adults of many looks; one a person of the demo.
_PEOPLE = {
    "ada": 15, "ben": 10, "chloe": 13, "dan": 2, "eve": 21, "finn": 22, "gwen": 1, "hugo": 23, "ines": 5, "jack": 14,
}

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class DemoPhoto:
    """One file of the archive.

    Attributes:
        path: relative, POSIX.
        faces: people on it, left to right; empty for none.
        size: width and height as a viewer shows it, in pixels.
        what: what makes it special, in words.
        failure: code of the reason with which it must fail, or None.
    """

    path: str
    faces: tuple[str, ...]
    size: tuple[int, int]
    what: str = ""
    failure: str | None = None


ARCHIVE: tuple[DemoPhoto, ...] = (
    DemoPhoto("team/ada.jpg", ("ada",), (1365, 1024)),
    DemoPhoto("team/ben.jpg", ("ben",), (819, 1024), "portrait format, 4:2:2"),
    DemoPhoto("team/Chloé.jpg", ("chloe",), (1024, 1024), "a name beyond ASCII"),
    DemoPhoto("team/dan.jpg", ("dan",), (1365, 1024), "progressive, 4:4:4"),
    DemoPhoto("holidays/2023/ada at the lake.jpg", ("ada",), (1365, 1024), "ada again: mirrored, other light"),
    DemoPhoto("holidays/2023/ben, evening.jpg", ("ben",), (1365, 1024), "ben again: mirrored, other light"),
    DemoPhoto("holidays/2023/two of us.jpg", ("eve", "finn"), (1600, 1067), "two faces"),
    DemoPhoto("holidays/2024/sideways.jpg", ("gwen",), (819, 1024), "stored sideways, upright by EXIF orientation 6"),
    DemoPhoto("holidays/2024/mountains.jpg", (), (1600, 1067), "no face"),
    DemoPhoto("scans/passport.png", ("hugo",), (640, 800), "PNG"),
    DemoPhoto("office/wall.jpg", ("ines",), (4000, 3000), "12 megapixels, a small face"),
    DemoPhoto("scans/broken.jpg", ("jack",), (1365, 1024), "cut off in the middle, on purpose", failure="TRUNCATED"),
)


# ---- people ----------------------------------------------------------------------------------------------------------


def _noise(seed: int) -> Tensor:
    return torch.randn(1, 512, generator=torch.Generator().manual_seed(seed))


@functools.lru_cache(maxsize=32)
@torch.no_grad()
def draw_person(person: int, variant: int = 0, resolution: int = 1024) -> Pixels:
    """A generated person as a (resolution, resolution, 3) picture framed as FFHQ's.

    Args:
        person: seed of the mapping network's input; the code is truncated (0.7) towards the mean.
        variant: 0, or the seed of another photo of the same person: the pose layers (0 to 1) go a third of the way,
            the colour layers (8 to 15) half of the way to another code, and the rest stays.
        resolution: 1024, or 256 by the distilled head.
    """
    generator = load_mobilestylegan(resolution)

    def code(seed: int) -> Tensor:
        return generator.truncate(generator.mapping(_noise(seed)), TRUNCATION)[:, None].repeat(1, 16, 1)

    codes = code(person)
    if variant:
        other = code(1_000_000 + variant)
        share = torch.zeros(16, 1)
        share[:2], share[8:] = 1 / 3, 1 / 2
        codes = codes + share * (other - codes)
    picture = ((generator(codes)[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture.flags.writeable = False
    return picture


# ---- pictures --------------------------------------------------------------------------------------------------------


def _spread(picture: NDArray[np.float32], known: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fill the unknown part of a picture smoothly from its known part (pull-push over a pyramid)."""
    colour, weight = torch.from_numpy(picture).permute(2, 0, 1)[None], torch.from_numpy(known)[None, None]
    levels = [(colour * weight, weight)]
    while max(levels[-1][1].shape[-2:]) > 1:
        levels.append(tuple(F.avg_pool2d(t, 2, ceil_mode=True, count_include_pad=False) for t in levels[-1]))
    filled = levels[-1][0] / levels[-1][1].clamp_min(1e-9)
    for summed, weight in reversed(levels[:-1]):
        filled = F.interpolate(filled, size=weight.shape[-2:], mode="bilinear", align_corners=False)
        here = (4 * weight).clamp(max=1)  # a level that knows a quarter of a pixel speaks for it
        filled = here * summed / weight.clamp_min(1e-9) + (1 - here) * filled
    return filled[0].permute(1, 2, 0).numpy()


def _feather(height: int, width: int, left: int, right: int, top: int) -> NDArray[np.float32]:
    """1 inside, falling smoothly to 0 over that many pixels at three edges (0: none)."""
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)

    def ramp(distance: NDArray, over: int) -> NDArray:
        t = np.clip(distance / over, 0, 1) if over else np.ones_like(distance)
        return t * t * (3 - 2 * t)

    return ramp(y, top)[:, None] * ramp(x, left) * ramp(width - 1 - x, right)


def _compose(size: tuple[int, int], people: Iterable[tuple[Pixels, int, int]], rng: np.random.Generator) -> Pixels:
    """People set into one picture, the background spread out of their own.

    Args:
        size: width, height.
        people: picture, its side in the result, left edge; all stand on the lower edge.
    """
    width, height = size
    canvas, known = np.zeros((height, width, 3), np.float32), np.zeros((height, width), np.float32)
    cover = np.zeros_like(known)
    for picture, side, left in people:
        small = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), np.float32)
        top = max(0, height - side)
        x0, x1 = max(0, left), min(width, left + side)
        part = small[: height - top, x0 - left : x1 - left]
        edge = side // 8
        soft = _feather(*part.shape[:2], edge * (x0 > 0), edge * (x1 < width), edge * (top > 0))
        area = (slice(top, height), slice(x0, x1))
        total = cover[area] + soft
        share = np.where(total > 0, soft / np.maximum(total, 1e-6), 0)[..., None]
        canvas[area] += share * (part - canvas[area])
        cover[area] = np.maximum(cover[area], soft)
        known[area] = np.maximum(known[area], (soft > 0.5).astype(np.float32))
    background = _spread(canvas, known)
    mixed = background + cover[..., None] * (canvas - background)
    return _to_bytes(mixed + rng.normal(0, 1.2, mixed.shape).astype(np.float32))


def _to_bytes(picture: NDArray) -> Pixels:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _relight(picture: Pixels, warmth: float, gain: float, slope: float) -> Pixels:
    """Other light: colour temperature, exposure, and a fall-off from left to right (each 0 for none)."""
    linear = (picture.astype(np.float32) / 255) ** 2.2
    x = np.linspace(-1, 1, picture.shape[1], dtype=np.float32)[None, :, None]
    balance = np.array([1 + warmth, 1, 1 - warmth], np.float32)
    return _to_bytes(255 * np.clip(linear * balance * 2**gain * (1 + slope * x), 0, 1) ** (1 / 2.2))


def _fractal(height: int, width: int, rng: np.random.Generator, coarsest: int, octaves: int) -> NDArray[np.float32]:
    """Fractal noise about 0: each octave half as coarse and half as strong."""
    out = np.zeros((height, width), np.float32)
    for i in range(octaves):
        cell = max(2, coarsest >> i)
        grid = rng.normal(0, 0.5**i, (height // cell + 3, width // cell + 3)).astype(np.float32)
        fine = F.interpolate(torch.from_numpy(grid)[None, None], scale_factor=cell, mode="bicubic")[0, 0].numpy()
        out += fine[:height, :width]
    return out


def draw_mountains(width: int, height: int, rng: np.random.Generator) -> Pixels:
    """A landscape without anybody: sky, ridges in the haze, a lake."""
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    picture = np.array([96, 140, 196], np.float32) * (1 - y) + np.array([240, 224, 205], np.float32) * y
    picture = picture + np.zeros((height, width, 3), np.float32)
    clouds = np.clip(_fractal(height, width, rng, max(8, width // 5), 6) - 0.4, 0, 1.2)[..., None]
    picture += clouds * 60 * (1 - y)
    rows = np.arange(height, dtype=np.float32)[:, None]
    for i in range(4):
        base = height * (0.42 + 0.1 * i)
        ridge = base + height * 0.12 / (1 + 0.4 * i) * _fractal(1, width, rng, max(8, width // 4), 8)[0]
        haze = np.array([60, 74, 92], np.float32) * (i / 3) + np.array([168, 176, 196], np.float32) * (1 - i / 3)
        rock = haze * (1 + 0.06 * _fractal(height, width, rng, max(8, width // 24), 5)[..., None])
        inside = np.clip(rows - ridge[None], 0, 1)[..., None]
        picture += inside * (rock - picture)
    shore = int(height * 0.8)
    mirror = picture[2 * shore - height : shore][::-1]
    wave = (3 * np.sin(np.arange(height - shore) ** 1.3 / 9)).astype(int)
    water = np.stack([np.roll(row, shift, axis=0) for row, shift in zip(mirror, wave, strict=True)])
    picture[shore:] = 0.7 * water + np.array([8, 18, 26], np.float32)
    return _to_bytes(picture + rng.normal(0, 2, picture.shape).astype(np.float32))


def _draw_wall(person: Pixels, rng: np.random.Generator) -> Pixels:
    """A 4000 x 3000 photo of an office wall on which a framed portrait hangs; the face is some 200 px wide."""
    width, height = 4000, 3000
    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)
    light = 1.02 - 0.22 * ((x[None] + 0.3) ** 2 + (y[:, None] + 0.2) ** 2) / 2
    plaster = 1 + 0.008 * _fractal(height // 2, width // 2, rng, 32, 5).repeat(2, axis=0).repeat(2, axis=1)
    wall = Image.fromarray(_to_bytes(np.array([205, 203, 190], np.float32) * (light * plaster)[..., None]))
    draw = ImageDraw.Draw(wall)
    floor = 2560
    for i, top in enumerate(range(floor, height, 74)):
        for left in range(-(i * 331 % 700), width, 700):
            tone = int(rng.integers(-9, 9))
            draw.rectangle((left, top, left + 697, top + 72), (136 + tone, 98 + tone, 66 + tone))
    draw.rectangle((0, floor - 110, width, floor), (236, 234, 228))
    draw.line((0, floor, width, floor), (90, 70, 52), 5)
    shadow = Image.new("L", (width // 4, height // 4))
    mountains = Image.fromarray(draw_mountains(900, 620, rng))
    portrait = Image.fromarray(person).resize((400, 400), Image.Resampling.LANCZOS)
    hung = [(portrait, (2460, 900), 60, (48, 38, 30)), (mountains, (760, 860), 90, (150, 118, 70))]
    for picture, (left, top), mat, _ in hung:
        box = (left - mat - 14, top - mat - 6, left + picture.width + mat + 44, top + picture.height + mat + 54)
        ImageDraw.Draw(shadow).rectangle([v / 4 for v in box], 130)
    soft = shadow.filter(ImageFilter.GaussianBlur(5)).resize(wall.size, Image.Resampling.BILINEAR)
    wall.paste((70, 66, 60), mask=soft)
    for picture, (left, top), mat, frame in hung:
        right, bottom = left + picture.width, top + picture.height
        draw.rectangle((left - mat - 24, top - mat - 24, right + mat + 24, bottom + mat + 24), frame)
        draw.rectangle((left - mat, top - mat, right + mat, bottom + mat), (244, 242, 234))
        wall.paste(picture, (left, top))
    grain = np.rint(rng.standard_normal((height, width, 1), np.float32) * 1.5).astype(np.int16)
    return np.clip(np.asarray(wall) + grain, 0, 255).astype(np.uint8)


# ---- files -----------------------------------------------------------------------------------------------------------


@functools.cache
def _srgb_profile() -> bytes:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = b"\x07\xe8\x00\x01\x00\x01\x00\x00\x00\x00\x00\x00"  # the time of making it: made repeatable
    return bytes(profile)


def _exif(orientation: int, number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010E], exif[0x010F], exif[0x0110] = "A generated person: nobody's photo", "scol", "demo"
    exif[0x0112], exif[0x0131] = orientation, "scol demo"
    exif[0x0132] = f"2024:06:{1 + number:02d} 12:00:00"
    exif.get_ifd(0x8769)[0x9003] = f"2024:06:{1 + number:02d} 12:00:00"
    return exif


def _jpeg(pixels: Pixels, number: int, *, orientation: int = 1, **options) -> bytes:
    image = Image.fromarray(pixels)
    if orientation == 6:  # a viewer turns it clockwise
        image = image.transpose(Image.Transpose.ROTATE_90)
    out = io.BytesIO()
    settings = {"quality": 92, "subsampling": "4:2:0", "dpi": (72, 72)} | options
    image.save(out, "JPEG", exif=_exif(orientation, number), icc_profile=_srgb_profile(), **settings)
    return out.getvalue()


def _png(pixels: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", icc_profile=_srgb_profile(), dpi=(300, 300))
    return out.getvalue()


def _files(seed: int) -> dict[str, Callable[[], bytes]]:
    """How each file of `ARCHIVE` is made, in its order."""
    number = {photo.path: i for i, photo in enumerate(ARCHIVE)}

    def rng(path: str) -> np.random.Generator:
        return np.random.default_rng([seed, number[path]])

    def face(name: str, variant: int = 0) -> Pixels:
        return draw_person(_PEOPLE[name] + 1000 * seed, variant)

    def wide(path: str, picture: Pixels) -> Pixels:
        return _compose((1365, 1024), [(picture, 1024, 170)], rng(path))

    def jpeg(path: str, picture: Callable[[str], Pixels], **options) -> Callable[[], bytes]:
        return lambda: _jpeg(picture(path), number[path], **options)

    def broken(path: str) -> bytes:
        data = _jpeg(wide(path, face("jack")), number[path])
        return data[: len(data) * 2 // 5]

    lake = lambda p: wide(p, _relight(face("ada", 1)[:, ::-1], -0.06, 0.15, 0.25))  # noqa: E731
    evening = lambda p: wide(p, _relight(face("ben", 2)[:, ::-1], 0.14, -0.35, -0.3))  # noqa: E731
    two = lambda p: _compose((1600, 1067), [(face("eve"), 860, -20), (face("finn"), 880, 725)], rng(p))  # noqa: E731
    passport = lambda: np.asarray(  # noqa: E731
        Image.fromarray(face("hugo")).crop((102, 0, 922, 1024)).resize((640, 800), Image.Resampling.LANCZOS)
    )
    made = {
        "team/ada.jpg": lambda p: jpeg(p, lambda q: wide(q, face("ada"))),
        "team/ben.jpg": lambda p: jpeg(p, lambda q: face("ben")[:, 102:921], quality=88, subsampling="4:2:2"),
        "team/Chloé.jpg": lambda p: jpeg(p, lambda q: face("chloe"), quality=85),
        "team/dan.jpg": lambda p: jpeg(p, lambda q: wide(q, face("dan")), quality=95, subsampling="4:4:4",
                                       progressive=True),
        "holidays/2023/ada at the lake.jpg": lambda p: jpeg(p, lake),
        "holidays/2023/ben, evening.jpg": lambda p: jpeg(p, evening, quality=80),
        "holidays/2023/two of us.jpg": lambda p: jpeg(p, two),
        "holidays/2024/sideways.jpg": lambda p: jpeg(p, lambda q: face("gwen")[:, 90:909], orientation=6),
        "holidays/2024/mountains.jpg": lambda p: jpeg(p, lambda q: draw_mountains(1600, 1067, rng(q)), quality=90),
        "scans/passport.png": lambda p: lambda: _png(passport()),
        "office/wall.jpg": lambda p: jpeg(p, lambda q: _draw_wall(face("ines"), rng(q)), quality=90),
        "scans/broken.jpg": lambda p: lambda: broken(p),
    }
    return {photo.path: made[photo.path](photo.path) for photo in ARCHIVE}


def make_archive(folder: str | os.PathLike[str], seed: int = 0) -> list[Path]:
    """Draw the demo's dozen photos (see `ARCHIVE`) below a folder.

    The same seed gives the same bytes on one machine with one set of versions.  Files that are there already are
    left as they are where they have the same content, so that their times, and with them a run's keys, stay.

    Args:
        folder: made if missing.
        seed: 0 draws chosen adults; another seed draws whoever comes.

    Returns:
        The files, in the order of `ARCHIVE`.

    Raises:
        WeightsError: the generator's weights are missing or not the tested ones.
        OSError: the folder cannot be written.
    """
    paths = []
    for name, make in _files(seed).items():
        path, data = Path(folder, *name.split("/")), make()
        if not (path.is_file() and path.read_bytes() == data):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        paths.append(path)
    return paths


# ---- the demo --------------------------------------------------------------------------------------------------------


def contact_sheet(run: Run | str, path: str | os.PathLike[str], faces: int = 6, side: int = 224) -> int:
    """A PNG of protected faces, one a column: the original, the saved one, the amplified difference.

    Args:
        run: a run or its folder's URL.
        path: the PNG; its folder is made if missing.
        faces: most columns; whole crops first (what lies beyond a photo's edge is mirrored), one a photo first, then
            in the order of paths.
        side: of a picture, px.

    Returns:
        number of faces shown; with 0 no file is written.

    Raises:
        RunError, StoreError: see `run.tables.read_stage`; OSError where the file cannot be written.
    """
    rows = read_stage(run, "publish", ["path", "face_id", "status", "psnr"]).to_pylist()
    good = [r for r in rows if r["status"] in (OK, WEAK) and r["psnr"] is not None and r["face_id"]]
    whole = {}
    for row in read_stage(run, "align", ["face_id", "quad", "width", "height"]).to_pylist():
        if row["quad"] is not None:
            corners, size = np.reshape(row["quad"], (4, 2)), np.array([row["width"], row["height"]])
            margin = 0.03 * np.linalg.norm(corners[1] - corners[0])
            whole[row["face_id"]] = bool((corners > -margin).all() and (corners < size + margin).all())
    good.sort(key=lambda r: (not whole.get(r["face_id"], False), int(r["face_id"].rsplit("-", 1)[1]), r["path"]))
    pictures = read_pictures(run, [r["face_id"] for r in good[:faces]])
    columns = [p for p in pictures.values() if p.protected is not None]
    if not columns:
        return 0
    gap, margin, size = 6, 104, 17
    sheet = Image.new("RGB", (margin + len(columns) * (side + gap), 3 * (side + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size)
    for row, words in enumerate(("before", "after", f"difference\nx {AMPLIFICATION}")):
        top = gap + row * (side + gap)
        draw.multiline_text((margin / 2, top + side / 2), words, "black", font, anchor="mm", align="center")
        for column, face in enumerate(columns):
            pixels = (face.original, face.protected, face.difference())[row]
            if pixels is not None:
                picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
                sheet.paste(picture, (margin + column * (side + gap), top))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    return len(columns)


def check_outcome(run: Run | str) -> list[str]:
    """What did not go as `ARCHIVE` says, one line each: files that failed, or did not fail, against expectation."""
    run = run if isinstance(run, Run) else Run(str(run))
    expected = {photo.path: photo.failure for photo in ARCHIVE if photo.failure}
    failed = {row["path"]: row["reason"] or "" for row in errors(run.url, weak=False)}
    lines = [f"{path}: failed: {reason}" for path, reason in sorted(failed.items()) if path not in expected]
    for path, code in expected.items():
        if path not in failed:
            lines.append(f"{path}: did not fail, though it must ({code})")
        elif failed[path].split(":", 1)[0] != code:
            lines.append(f"{path}: failed with another reason than {code}: {failed[path]}")
    done = set(read_stage(run, "publish", ["path"])["path"].to_pylist())
    return lines + [f"{photo.path}: not done" for photo in ARCHIVE if photo.path not in done]


def run_demo(
    folder: str | os.PathLike[str] = "build/demo", config: Config | None = None, *, seed: int = 0,
    say: Callable[[str], None] = functools.partial(print, flush=True),
) -> int:
    """Make the archive, protect it, show what came out.

    Args:
        folder: gets `photos/`, `protected/`, `protected.run/` (tables and report) and `faces.png`.
        config: of the run; by default the defaults.
        seed: of the archive.
        say: takes lines for people.

    Returns:
        exit status: 0 when exactly the file failed that is broken on purpose, else 1.

    Raises:
        what `make_archive` and `protect.protect` raise.
    """

    folder = Path(folder)
    photos, protected = folder / "photos", folder / "protected"
    begin = time.monotonic()
    say(f"drawing {len(ARCHIVE)} photos of people who do not exist (the embedded generator, 1024 px) ...")
    make_archive(photos, seed)
    for photo in ARCHIVE:
        width, height = photo.size
        people = {0: "nobody", 1: "1 face"}.get(len(photo.faces), f"{len(photo.faces)} faces")
        say(f"  {photo.path:36} {width:>4} x {height:<4}  {people:8} {photo.what}".rstrip())
    say(f"drawn in {time.monotonic() - begin:.0f} s; now: scol protect {photos} --out {protected}")
    result = protect_job.protect(str(photos), str(protected), config or Config(), say=say, progress_stream=sys.stderr)
    run = Run(run_folder.default_run(str(protected)))
    say("")
    say(protect_job.table_of(result))
    say("")
    problems = check_outcome(run)
    if not problems:
        for photo in ARCHIVE:
            if photo.failure:
                say(f"{photo.path} failed with {photo.failure}, as it must: it is {photo.what}")
    for line in problems:
        say(f"not as expected: {line}")
    if result["weak"]:
        say(f"{result['weak']} photo(s) came out weak: {result['judge']} may still know a face in them")
    if contact_sheet(run, folder / "faces.png"):
        say(f"before and after: {folder / 'faces.png'}")
    say(f"protected photos: {protected}")
    say(f"report: {run.path('report.html')}")
    return 1 if problems else 0
