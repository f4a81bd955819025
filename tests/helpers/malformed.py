"""A seeded fuzzer of photo archives: good photos, and files and folders made bad from them.

    python tests/helpers/malformed.py check FOLDER    # with archive and list.txt as `make_archive` writes them

sends all of FOLDER/list.txt through listing, reading, decoding, detection and the making of align's rows in this one
process, without Ray, and prints as JSON what came of each input, the memory used and the slowest photo. An exception
anywhere ends it with a traceback.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

MAX_PIXELS = 4_000_000  # of the check: small limits make a breach of them visible in the memory used
MAX_BYTES = 8_000_000
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif", "BMP": ".bmp"}
WRITERS = [
    ("JPEG", {"quality": 90}),
    ("JPEG", {"quality": 75, "progressive": True, "subsampling": 0}),
    ("PNG", {}),
    ("WEBP", {"quality": 80}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ("BMP", {}),
]
SURVIVES = None  # among the reasons expected: the file may still be a photo


@dataclass(frozen=True)
class Input:
    """One entry of the archive: path, how it was made, and the codes it may end with (None: a photo like others)."""

    path: str
    kind: str
    expected: tuple[str | None, ...]


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3): smooth colours and some noise, nobody's face."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [120 + 90 * np.sin(x / rng.uniform(9, 40) + y / rng.uniform(9, 40)) for _ in range(3)]
    return np.clip(np.stack(waves, -1) + rng.normal(0, 4, (height, width, 3)), 0, 255).astype(np.uint8)


def save(pixels: np.ndarray | Image.Image, fmt: str, mode: str | None = None, **options) -> bytes:
    im = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    out = io.BytesIO()
    (im.convert(mode) if mode else im).save(out, fmt, **options)
    return out.getvalue()


def chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def png(width: int, height: int, rows: bytes, *more: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of these compressed rows; `more`: chunks before the pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class Fuzzer:
    """Makes inputs of every kind in turn.

    Args:
        seed: the same archive for the same seed.
        pictures: uint8 (H, W, 3) photos to start from.
    """

    def __init__(self, seed: int, pictures: Sequence[np.ndarray]):
        self.random = random.Random(seed)
        self.good = [(fmt, save(p, fmt, **options)) for p in pictures for fmt, options in WRITERS]
        zeros = zlib.compressobj(9)
        self.zeros = zeros.compress(bytes(64_000_000)) + zeros.flush()  # 64 MB in 62 kB
        self.kinds: dict[str, Callable[[], tuple[str, bytes, tuple[str | None, ...]]]] = {
            "truncated": self.truncated,
            "flipped": self.flipped,
            "flipped_header": self.flipped_header,
            "spliced": self.spliced,
            "zero_tail": self.zero_tail,
            "wrong_suffix": self.wrong_suffix,
            "no_picture": self.no_picture,
            "bomb": self.bomb,
            "huge_header": self.huge_header,
            "lying_header": self.lying_header,
            "odd_mode": self.odd_mode,
            "odd_size": self.odd_size,
            "long_metadata": self.long_metadata,
            "empty": lambda: (self.random.choice(list(SUFFIXES.values())), b"", ("EMPTY",)),
        }

    def one(self) -> tuple[str, bytes]:
        return self.random.choice(self.good)

    # Damage at random: what it leaves is a photo, or one of these.
    DAMAGED = (SURVIVES, "TRUNCATED", "CORRUPT", "NOT_AN_IMAGE", "UNSUPPORTED_FORMAT", "UNSUPPORTED_MODE", "ANIMATED",
               "TOO_LARGE")  # fmt: skip

    def truncated(self):
        fmt, data = self.one()
        cut = data[: self.random.randrange(1, len(data) - len(data) // 50)]
        # Of few bytes nobody can tell a format; a TIFF's pixels may all lie before the cut, not so its directory.
        return SUFFIXES[fmt], cut, ("TRUNCATED", "CORRUPT", "NOT_AN_IMAGE")

    def flipped(self, first: int | None = None):
        fmt, data = self.one()
        out = bytearray(data)
        for _ in range(self.random.randrange(1, 24)):
            out[self.random.randrange(min(first or len(out), len(out)))] ^= 1 << self.random.randrange(8)
        return SUFFIXES[fmt], bytes(out), self.DAMAGED

    def flipped_header(self):
        return self.flipped(first=200)

    def spliced(self):
        fmt, data = self.one()
        a, b = sorted(self.random.randrange(len(data)) for _ in range(2))
        piece = self.one()[1][: self.random.randrange(1, 4000)] if self.random.random() < 0.5 else b""
        return SUFFIXES[fmt], data[:a] + piece + data[b:], self.DAMAGED

    def zero_tail(self):
        fmt, data = self.one()
        keep = self.random.randrange(len(data))
        return SUFFIXES[fmt], data[:keep] + bytes(len(data) - keep), self.DAMAGED

    def wrong_suffix(self):
        fmt, data = self.one()
        return self.random.choice([s for f, s in SUFFIXES.items() if f != fmt]), data, (SURVIVES,)

    def no_picture(self):
        noise = b"\1" + self.random.randbytes(self.random.randrange(1, 5000))  # \1 begins no picture
        page = b"<html><body>404</body></html>"
        data = self.random.choice([page, b"%PDF-1.7\n", b"PK\3\4" + noise, noise, bytes(999)])
        return self.random.choice([".jpg", ".png", ".heic", ".tif"]), data, ("NOT_AN_IMAGE",)

    def bomb(self):
        """Small files that really unpack to 64 MB or more: pixels, a text chunk, a profile, pixels beyond the size."""
        rows = zlib.compress(b"\0" + bytes(24))
        text = chunk(b"zTXt", b"Comment\0\0" + self.zeros)
        profile = chunk(b"iCCP", b"ICC\0\0" + self.zeros)
        return self.random.choice(
            [
                (".png", png(8000, 8000, self.zeros, colour=0), ("TOO_LARGE",)),
                (".png", png(8, 1, rows, text), (SURVIVES, "CORRUPT", "TOO_LARGE")),
                (".png", png(8, 1, rows, profile), (SURVIVES, "CORRUPT", "TOO_LARGE")),
                (".png", png(8, 8, self.zeros), (SURVIVES, "CORRUPT", "TOO_LARGE")),
                (".tif", self.tiff_bomb(), (SURVIVES, "CORRUPT", "TRUNCATED", "TOO_LARGE")),
                (".bmp", bytes(MAX_BYTES + 1), ("TOO_LARGE",)),
            ]
        )

    def tiff_bomb(self) -> bytes:
        """8 x 8 pixels whose one strip unpacks to 64 MB."""
        tags = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(self.zeros)}
        at = 8 + len(self.zeros) + len(self.zeros) % 2
        body = b"II*\0" + struct.pack("<I", at) + self.zeros.ljust(at - 8, b"\0")
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
        return body + struct.pack("<H", len(tags)) + entries + bytes(4)

    def sized(self, width: int, height: int) -> tuple[str, bytes]:
        """A small file whose header promises this size."""
        small = picture(self.random.randrange(99), 16, 16)
        fmt = self.random.choice(["JPEG", "PNG", "BMP", "WEBP", "TIFF"])
        data = bytearray(save(small, fmt, **({"lossless": True} if fmt == "WEBP" else {})))
        if fmt == "JPEG":
            at = data.index(b"\xff\xc0")
            data[at + 5 : at + 9] = struct.pack(">HH", min(height, 65535), min(width, 65535))
        elif fmt == "PNG":
            data = bytearray(png(width, height, zlib.compress(bytes(1000))))
        elif fmt == "BMP":
            data[18:26] = struct.pack("<ii", width, height)
        elif fmt == "WEBP":
            size = (min(width, 16384) - 1) | (min(height, 16384) - 1) << 14
            data[21:25] = struct.pack("<I", size | int.from_bytes(data[21:25], "little") & 0xF0000000)
        else:
            (at,) = struct.unpack_from("<I", data, 4)
            for entry in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], 12):
                tag = struct.unpack_from("<H", data, entry)[0]
                if tag in (256, 257):
                    data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, width if tag == 256 else height)
        return SUFFIXES[fmt], bytes(data)

    def huge_header(self):
        side = self.random.choice([16_000, 30_000, 65_000])
        return *self.sized(side, side), ("TOO_LARGE",)

    def lying_header(self):
        """Allowed sizes, of which the file has a few rows."""
        width, height = self.random.randrange(17, 2000), self.random.randrange(300, 2000)
        # libtiff and libjpeg fill up what is missing in some cases, as other viewers do.
        return *self.sized(width, height), (SURVIVES, "CORRUPT", "TRUNCATED")

    def odd_mode(self):
        small = picture(self.random.randrange(99), 24, 32)
        deep = np.arange(768, dtype=np.uint16).reshape(24, 32) * 80
        frames = {"save_all": True, "append_images": [Image.fromarray(255 - small)]}
        mode, fmt = ("UNSUPPORTED_MODE",), ("UNSUPPORTED_FORMAT",)
        suffix, kind, pixels, as_mode, options, expected = self.random.choice(
            [
                (".jpg", "JPEG", small, "CMYK", {}, mode),
                (".tif", "TIFF", small, "CMYK", {}, mode),
                (".tif", "TIFF", small, "LAB", {}, mode),
                (".tif", "TIFF", small, "YCbCr", {}, mode),
                (".tif", "TIFF", small, "F", {}, mode),
                (".tif", "TIFF", small, "1", {}, mode),
                (".tif", "TIFF", deep, None, {}, mode),
                (".tif", "TIFF", small, None, {"compression": "jpeg"}, mode),
                (".png", "PNG", deep, None, {}, mode),
                (".png", "PNG", small, "1", {}, mode),
                (".bmp", "BMP", small, "1", {}, mode),
                (".png", "PNG", small, None, frames, ("ANIMATED",)),
                (".webp", "WEBP", small, None, frames, ("ANIMATED",)),
                (".tif", "TIFF", small, None, frames, ("ANIMATED",)),
                (".gif", "GIF", small, "P", {}, fmt),
                (".avif", "AVIF", small, None, {}, fmt),
                (".jp2", "JPEG2000", small, None, {}, fmt),
                (".jpg", "PPM", small, None, {}, fmt),
                (".png", "PNG", small, "P", {}, (SURVIVES,)),
                (".png", "PNG", small, "LA", {}, (SURVIVES,)),
                (".webp", "WEBP", small, "RGBA", {}, (SURVIVES,)),
                (".jpg", "JPEG", small, "L", {}, (SURVIVES,)),
            ]
        )
        return suffix, save(pixels, kind, as_mode, **options), expected

    def odd_size(self):
        """Good photos that are a line, a column, or a pixel."""
        height, width = self.random.choice([(1, 1), (1, 9000), (9000, 1), (2, 5000), (3, 3), (12, 11), (4000, 13)])
        fmt = self.random.choice(list(SUFFIXES))
        return SUFFIXES[fmt], save(picture(1, height, width), fmt), (SURVIVES,)

    def long_metadata(self):
        """Metadata that is slow to walk where each start is walked to the end: embedded JPEG streams without an end,
        a chain of empty directories, bytes that are no segments."""
        small = picture(3, 16, 16)
        info = PngImagePlugin.PngInfo()
        chain = b"\xff\xe0\0\4\xff\xd8" * 150_000
        info.add(b"eXIf", b"II*\0\x08\0\0\0" + bytes(6) + chain)
        pages = b"".join(struct.pack("<HI", 0, at + 6) for at in range(8, 8 + 6 * 50_000, 6))
        return self.random.choice(
            [
                (".png", save(small, "PNG", pnginfo=info), (SURVIVES,)),
                (".tif", b"II*\0\x08\0\0\0" + pages, ("CORRUPT", "TRUNCATED", "ANIMATED")),
                (".jpg", b"\xff\xd8\xff\xe0\0\2" + bytes(MAX_BYTES - 100), ("TRUNCATED",)),
                (".jpg", b"\xff\xd8" + b"\xff" * (MAX_BYTES - 100), ("TRUNCATED",)),
            ]
        )


def make_archive(folder: Path, seed: int, inputs: int, bad: int, faces: Sequence[np.ndarray] = ()) -> list[Input]:
    """Writes FOLDER/archive and FOLDER/list.txt: `inputs` entries in random order, `bad` of them malformed.

    `faces`: photos with people, which are among those that others are made from. Returns what was written.
    """
    archive = folder / "archive"
    archive.mkdir(parents=True)
    fuzzer = Fuzzer(seed, [picture(seed, 120, 160), picture(seed + 1, 97, 61), *faces])
    rng = random.Random(seed + 1)
    special = ["folder", "full_folder", "pipe", "broken_link", "link_loop"]
    kinds = [*fuzzer.kinds, *special]
    todo = [kinds[i % len(kinds)] for i in range(bad)] + ["good"] * (inputs - bad)
    rng.shuffle(todo)
    out = []
    for i, kind in enumerate(todo):
        name = f"{i // 100:02d}/{i:05d}"
        place = archive / name
        place.parent.mkdir(exist_ok=True)
        if kind in fuzzer.kinds or kind == "good":
            suffix, data, expected = fuzzer.kinds[kind]() if kind != "good" else (*fuzzer.one(), (SURVIVES,))
            suffix = SUFFIXES.get(suffix, suffix)
            place.with_suffix(suffix).write_bytes(data)
        else:
            suffix, at = ".jpg", place.with_suffix(".jpg")
            if kind in ("folder", "full_folder"):
                at.mkdir()
                expected = ("NOT_A_FILE",)
                if kind == "full_folder":
                    (at / "inside.txt").write_text("not a photo")
            elif kind == "pipe":
                os.mkfifo(at)
                expected = ("NOT_A_FILE",)
            else:
                at.symlink_to(at.name if kind == "link_loop" else "nowhere.jpg")
                expected = ("LINK_LOOP", "READ_FAILED") if kind == "link_loop" else ("NOT_FOUND", "BROKEN_LINK")
        out.append(Input(name + suffix, kind, tuple(expected)))
    (folder / "list.txt").write_text("".join(f"archive/{entry.path}\n" for entry in out))
    return out


def check(folder: Path) -> dict:
    """Sends FOLDER/list.txt through; see the module's text. Memory in bytes, time in seconds."""
    from pipelines.archive.listing import list_source, source_table
    from pipelines.config.load import load_config
    from pipelines.stages.declaration import load

    config = load_config("quick", None, (f"align.max_pixels={MAX_PIXELS}", f"align.max_bytes={MAX_BYTES}"))
    align = load("align", config, "weights")
    rows = source_table(list_source(str(folder / "list.txt")).photos)
    align(source_table(list_source(str(folder / "archive"), limit=1).photos))  # so that what stays is there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    source = dict(zip(rows["photo_id"].to_pylist(), rows["path"].to_pylist(), strict=True))
    answers, slowest = [], (0.0, "")
    for first in range(0, rows.num_rows, 8):
        batch = rows.slice(first, 8)
        begin = time.monotonic()
        table = align(batch)
        slowest = max(slowest, (time.monotonic() - begin, ", ".join(batch["path"].to_pylist())))
        answers += table.select(["photo_id", "face_id", "status", "reason", "failed_stage"]).to_pylist()
    return {
        "listed": sorted(source.values()),
        "in_folder": sorted(p.path for p in list_source(str(folder / "archive")).photos),
        "rows": [answer | {"path": source[answer["photo_id"]]} for answer in answers],
        "memory_grown": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "slowest": slowest,
    }


if __name__ == "__main__":
    json.dump(check(Path(sys.argv[2])), sys.stdout)
