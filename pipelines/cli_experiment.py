"""`scol experiment`: the paper's tables."""

from __future__ import annotations

import sys
from collections.abc import Callable

import click


def _named(values: tuple[str, ...]) -> dict[str, str]:
    out = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or not name or not folder:
            raise click.BadParameter(f"NAME=FOLDER expected, got {value!r}")
        out[name] = folder
    return out


def register(main: click.Group, guarded: Callable, say: Callable[[str], None]) -> None:
    """Add the group to `scol`."""

    @main.group(short_help="The paper's tables, with its figures beside ours.")
    def experiment() -> None:
        """Named, resumable experiments, laid out like the paper's tables."""

    @experiment.command("list")
    @guarded
    def list_experiments():
        """Names and titles."""
        from pipelines.experiments import tables

        for found in tables.EXPERIMENTS.values():
            click.echo(f"{found.name:8} {found.title} ({found.dataset})")
        click.echo(f"{tables.COST:8} Cost of a face (no photos needed)")

    @experiment.command("run")
    @click.argument("name")
    @click.option("--data", metavar="ROOT", default="", help="Root of the data set; not for table5.")
    @click.option(
        "--dataset", type=click.Choice(["lfw", "celeba-hq", "vggface2-hq"]), help="Its layout.  [default: as the paper]"
    )
    @click.option(
        "--out", metavar="FOLDER", help="Trees, evaluations and the table.  [default: build/experiments/NAME]"
    )
    @click.option(
        "--limit", "people", type=click.IntRange(min=1), default=128, help="People to probe, each with one photo."
    )
    @click.option("--distractors", type=click.IntRange(min=1), default=1000, help="Others in the gallery.")
    @click.option("--seed", type=int, default=0, help="Of the draw of people.")
    @click.option(
        "--profile", type=click.Choice(["quick", "standard", "paper"]), default="paper", help="What is varied."
    )
    @click.option(
        "--set", "sets", metavar="KEY=VALUE", multiple=True, help="A setting of all lines of ours; repeatable."
    )
    @click.option(
        "--other",
        "others",
        metavar="NAME=FOLDER",
        multiple=True,
        help="table1: another defence's outputs for OUT/photos/originals; repeatable.",
    )
    @click.option(
        "--swaps",
        metavar="FOLDER",
        help="table3, table4: a face swapper's outputs: FOLDER/original/... and FOLDER/LINE/... (tau-3, eps-8, ...).",
    )
    @click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: as the machine has cores]")
    @guarded
    def run(name, data, dataset, out, people, distractors, seed, profile, sets, others, swaps, workers):
        """Run NAME (table1 ... table5), or go on with it; a larger --limit goes on from a smaller one.

        Prints the table, and writes it to OUT/NAME.md with all figures in OUT/NAME.json.
        """
        from pipelines.experiments import tables
        from pipelines.protect import Reporter

        options = tables.Options(
            data=data,
            dataset=dataset or (tables.EXPERIMENTS[name].dataset if name in tables.EXPERIMENTS else ""),
            out=out or f"build/experiments/{name}",
            people=people,
            distractors=distractors,
            seed=seed,
            profile=profile,
            sets=sets,
            others=_named(others),
            swaps=swaps,
            workers=workers,
        )
        click.echo(tables.run(name, options, say, lambda: Reporter(sys.stderr)))
