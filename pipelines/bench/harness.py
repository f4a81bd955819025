"""What all benches share: options, turns by the clock, a process apart, people to work on, and the record.

A bench says what it measures and how its table looks, nothing else:

    options = parse("stages", __doc__, faces=(4, "photos of the larger run"))
    ...
    print(machine_line(), aligned(rows, "<", ">"), sep="\\n")
    record(options.out, {"faces": options.faces, ...})
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cluster import Stage
from pipelines.bench.memory import MemoryWatch
from pipelines.jobs import chain
from pipelines.run.environment import machine
from pipelines.run.text import to_json
from scol_ops.metrics import to_uint8
from scol_ops.models.embedded import load_mobilestylegan
from scol_ops.models.mobilestylegan import CODE_DIM, NUM_CODES, MobileStyleGAN

ROOT = Path(__file__).parents[2]
TRUNCATION = 0.7


def parse(name: str, doc: str, argv: Sequence[str] | None = None, **options: Any) -> argparse.Namespace:
    """The options of a bench; `--out` (or `--json`), build/bench/NAME.json by default, is among them.

    Args:
        name: of its module and of its record.
        doc: its help; the first paragraph stands for all.
        argv: the words; None for those of the process.
        options: name -> (default, help), of the default's type, where a list takes one word or more; or name -> the
            arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines.bench.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, about in options.items():
        if isinstance(about, tuple):
            default, words = about
            several = isinstance(default, list)
            about = {"default": default, "type": type(default[0] if several else default)}
            about |= {"help": f"{words} [default: %(default)s]" if default else words}
            about |= {"nargs": "+"} if several else {}
        parser.add_argument(f"--{option.replace('_', '-')}", **about)
    parser.add_argument("--out", "--json", type=Path, default=Path(f"build/bench/{name}.json"))
    return parser.parse_args(argv)


def record(out: Path, result: Mapping[str, Any]) -> None:
    """Write a bench's result, and the machine that it was measured on, as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(to_json({**result, "machine": machine()}) + "\n", encoding="utf-8")
    print(f"written: {out}", flush=True)


def recorded(out: Path) -> dict[str, Any]:
    """What an earlier call wrote there; nothing where there is none."""
    return json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}


def take_turns(
    contenders: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each contender, turn by turn, so that a busy machine slows all; one round before them warms up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            begin = clock()
            run()
            if turn:
                times[name].append(clock() - begin)
    return times


def apart(function: Callable[..., Any], *given: Any) -> Any:
    """What a function answers in a process of its own; what it is given and what it answers are JSON.

    Raises:
        subprocess.CalledProcessError: it failed; what it said stands on stderr.
    """
    done = subprocess.run(command_apart(function, *given), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def command_apart(function: Callable[..., Any], *given: Any) -> list[str]:
    """The command of such a process; its last line is the answer."""
    # not as __main__, whose functions Ray's workers could not import
    module = sys.modules[function.__module__].__spec__.name
    code = f"import json, sys; from {module} import {function.__name__} as call; given = json.loads(sys.argv[1]); "
    code += "print(json.dumps(call(*given)))"
    return [sys.executable, "-W", "ignore", "-c", code, json.dumps(given, default=str)]


def watched(command: Sequence[object]) -> tuple[Any, int]:
    """Run a job whose last line is JSON. Returns that, and the largest sum of its processes' resident sizes in bytes.

    Raises:
        RuntimeError: the job failed.
    """
    with tempfile.TemporaryFile("w+") as output:
        job = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        with MemoryWatch(job.pid) as watch:
            status = job.wait()
        output.seek(0)
        text = output.read()
    if status:
        raise RuntimeError(f"{' '.join(map(str, command))} failed with status {status}:\n{text[-3000:]}")
    return json.loads(text.splitlines()[-1]), watch.peak


def draw_people(count: int, seed: int, generator: MobileStyleGAN) -> tuple[Tensor, Tensor]:
    """People who do not exist: plain codes (N, 16, 512), and their pictures (N, 3, R, R) in [-1, 1]."""
    z = torch.randn(count, CODE_DIM, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        codes = generator.truncate(generator.mapping(z), TRUNCATION)[:, None].repeat(1, NUM_CODES, 1)
        return codes, torch.cat([generator(part).clamp(-1, 1) for part in codes.split(8)])


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    """Pixels (H, W, 3) uint8 as a square, bicubic."""
    return np.array(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def make_photos(folder: Path, count: int) -> None:
    """Photos of 512 px with one generated face each, as JPEG files in a new folder."""
    folder.mkdir(parents=True)
    for i, picture in enumerate(draw_people(count, 21, load_mobilestylegan(256))[1]):
        stream = io.BytesIO()
        Image.fromarray(resized(to_uint8(picture), 512)).save(stream, "JPEG", quality=92)
        (folder / f"{i:03d}.jpg").write_bytes(stream.getvalue())


@contextmanager
def stages_changed(change: Callable[[Sequence[Stage]], Sequence[Stage]]) -> Iterator[None]:
    """Runs of `scol protect` in this process have these stages instead of theirs.

    Args:
        change: is given a run's stages.
    """
    made = chain.make_stages
    with patch.object(chain, "make_stages", lambda *args, **settings: change(made(*args, **settings))):
        yield
