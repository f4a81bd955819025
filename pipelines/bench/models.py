"""Benchmark of the networks: seconds forward and forward + backward, parameters, FLOPs, peak memory.

    python -m pipelines.bench.models [--only NAME] [--repeat 3] [--threads 1] [--device auto]

One picture at a time, each network in a process of its own.  Public networks get random weights: what they cost does
not depend on the numbers.  FLOPs are PyTorch's own count (torch.utils.flop_counter: a multiplication and an addition
are two, element-wise work is not counted); backward is to all parameters for generators, to the picture for the others,
as the stages use them.  Peak memory is the process's largest resident size less that before the network was made (on a
GPU: what PyTorch allocated).  The last rows put together what one face costs in a profile.  Prints a table and writes
build/bench/models.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cluster.worker import peak_memory
from pipelines.bench.harness import apart, parse, record, take_turns
from pipelines.config.load import load_config
from pipelines.config.names import EMBEDDED, ENCODER
from pipelines.run.environment import machine_line
from pipelines.run.text_tables import markdown, number
from scol_ops import runtime
from scol_ops.models import checkpoints
from scol_ops.models.catalogue import CARDS
from scol_ops.models.embedded import load_encoder, load_mobilestylegan, load_recogniser
from scol_ops.models.recognisers import Recogniser

# What the paper's table 5 says of an image: GFLOPs, millions of parameters, seconds (an RTX 3090).
PAPER = {
    "CLIP2Protect": (18756, 423, 70), "DiffAM": (1120, 227, 12), "DF-RAP": (332, 201, 4), "SCOL": (15229, 297, 47),
}  # fmt: skip


def side(name: str) -> int:
    """Pixels, by a network's name."""
    return int(name.split("-")[1])


_FACTS = {
    "stylegan2": lambda name: {"size": side(name), "multiplier": 2, "mapping_layers": 8, "layout": "rosinality"},
    "e4e": lambda name: {"size": side(name)},
    "facenet": lambda name: {"classes": CARDS[name].facts["classes"]},
    "irse50": lambda name: {"positions": 49, "affine": True},
    "ir152": lambda name: {"positions": 49},
}
NAMES = (
    "mobilestylegan-256", "mobilestylegan-1024", "stylegan2-256", "stylegan2-1024", EMBEDDED, "e4e-256", "e4e-1024",
    "mobilefacenet", "dlib_resnet", "faceres", "facenet", "irse50", "ir152", "mobilefacenet-512", "lpips-alex",
    "lpips-vgg",
)  # fmt: skip


def build(name: str) -> nn.Module:
    """A network by its name, in eval mode; a public one with random weights."""
    if name in CARDS:
        family = CARDS[name].family
        return checkpoints.FAMILIES[family].build(_FACTS.get(family, lambda _: {})(name)).eval()
    if name == EMBEDDED:
        return load_encoder()
    return load_mobilestylegan(side(name)) if name.startswith("mobilestylegan") else load_recogniser(name)


def call(network: nn.Module, size: int, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """A run of the network on one picture (or code) as the stages use it, and the picture's side.

    Args:
        size: side of LPIPS's picture, which takes any.
    """
    if hasattr(network, "mapping"):
        moving = set(network.tunable("all"))
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in moving)
        codes = torch.randn(1, network.num_codes, 512, device=device)
        return lambda: network(codes), network.resolution
    network.requires_grad_(False)
    side = network.input_size if isinstance(network, Recogniser) else size
    picture = (torch.rand(1, 3, side, side, device=device) * 2 - 1).requires_grad_(True)
    if isinstance(network, Recogniser):
        return lambda: network.embed_aligned(picture), side
    if hasattr(network, "to_reference"):
        with torch.no_grad():
            reference = network.reference(picture.detach().flip(3))
        return lambda: network.to_reference(reference, picture), side
    return lambda: network(picture), side


def measure(name: str, repeat: int, threads: int, kind: str) -> dict[str, Any]:
    """Numbers of one network, in this process; `kind` of device: cpu, cuda."""
    runtime.set_up(threads)
    device, before = torch.device(kind), peak_memory()
    network = build(name).to(device)
    if kind == "cuda":
        runtime.channels_last(network)
        torch.cuda.reset_peak_memory_stats()
    run, side = call(network, 256, device)

    @torch.no_grad()
    def forward() -> Tensor:
        return run()

    def both() -> None:
        run().square().sum().backward()

    def timed(work: Callable[[], object]) -> None:
        work()
        if kind == "cuda":
            torch.cuda.synchronize()

    flops = []
    for work in (run, both):  # the counter does not work without gradients
        with FlopCounterMode(display=False) as counter:
            work()
        flops.append(counter.get_total_flops())
    once, twice = (min(take_turns({"": partial(timed, work)}, repeat)[""]) for work in (forward, both))
    grown = peak_memory() - before
    return {
        "name": name,
        "side": side,
        "parameters": sum(p.numel() for p in network.parameters()),
        "flops_forward": flops[0],
        "flops_both": flops[1],
        "seconds_forward": once,
        "seconds_both": twice,
        "peak_bytes": torch.cuda.max_memory_allocated() if kind == "cuda" else grown,
    }


def of_profile(profile: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """What one face costs by the networks' own numbers: steps of each stage times theirs; None where a row is missing.

    The encoder's first look, LPIPS (where the profile takes it; AlexNet's), and what features are locked are counted;
    the judge, alignment and losses without networks are not.
    """
    config = load_config(profile)
    own = {ENCODER: config.encoder}
    lpips = ["lpips-alex"] if config.tune.perceptual != "ssim" else []
    tune = [config.generator, *(own.get(n, n) for n in config.tune.identity), *lpips]
    refine = [own.get(n, n) for n in config.refine.identity] if config.refines else []
    steps = [(name, config.tune.steps) for name in tune] + [(name, config.refine.steps) for name in refine]
    if config.attack.enabled:
        steps.append((config.encoder, config.attack.steps))
    needed = {name for name, _ in steps} | {config.encoder}
    if not needed <= set(rows):
        return None
    scale = {n: (config.crop_size / 256) ** 2 if n.startswith("lpips") else 1.0 for n in needed}  # LPIPS sees the crop
    return {
        "profile": profile,
        "networks": sorted(needed),
        "parameters": sum(rows[name]["parameters"] for name in needed),
        **{
            what: rows[config.encoder][f"{what}_forward"]
            + sum(n * scale[k] * rows[k][f"{what}_both"] for k, n in steps)
            for what in ("flops", "seconds")
        },
    }


def table(networks: list[dict[str, Any]], profiles: list[dict[str, Any]]) -> str:
    """The numbers as Markdown tables (docs/models.md)."""
    columns = (("parameters", 1, 1e-6), ("flops_forward", 1, 1e-9), ("flops_both", 1, 1e-9),
               ("seconds_forward", 3, 1), ("seconds_both", 3, 1), ("peak_bytes", 0, 2**-20))  # fmt: skip
    rows = [(r["name"], r["side"], *(number(r[key], *form) for key, *form in columns)) for r in networks]
    columns = (("parameters", 0, 1e-6), ("flops", 0, 1e-9), ("seconds", 0, 1))
    faces = [
        (f"profile `{r['profile']}`: {', '.join(r['networks'])}", *(number(r[key], *form) for key, *form in columns))
        for r in profiles
    ]
    faces += [(f"{name} (the paper's table 5, RTX 3090)", m, g, s) for name, (g, m, s) in PAPER.items()]
    head = ("network", "input px", "parameters, M", "GFLOPs forward", "GFLOPs both", "s forward", "s both", "peak, MiB")
    return markdown([head, *rows]) + "\n\n" + markdown([("one face", "parameters, M", "GFLOPs", "s"), *faces])


def main() -> int:
    options = parse(
        "models", __doc__,
        only={"action": "append", "choices": NAMES, "help": "only this network; repeatable"},
        repeat=(3, "timed runs of each, of which the fastest counts"), threads=(1, "PyTorch threads"),
        device={"choices": ("auto", "cpu", "cuda"), "default": "auto"},
    )  # fmt: skip
    cuda = options.device != "cpu" and torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        print("error: this process sees no GPU", file=sys.stderr)
        return 2
    device = "cuda" if cuda else "cpu"
    rows = []
    for name in options.only or NAMES:
        rows.append(apart(measure, name, options.repeat, options.threads, device))
        print(f"{name}: {rows[-1]['seconds_both']:.3f} s", file=sys.stderr)
    named = {row["name"]: row for row in rows}
    profiles = [found for name in ("quick", "standard", "paper") if (found := of_profile(name, named)) is not None]
    print(f"{machine_line()}; on {device}, {options.threads} thread(s); the fastest of {options.repeat}")
    print(table(rows, profiles))
    about = {"torch": torch.__version__, "device": device, "threads": options.threads, "repeat": options.repeat}
    record(options.out, {**about, "networks": rows, "profiles": profiles})
    return 0


if __name__ == "__main__":
    sys.exit(main())
