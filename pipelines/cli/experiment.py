"""`scol experiment`: the paper's tables, and the ablation."""

from __future__ import annotations

import sys

import click

from pipelines.cli.options import PROFILE_NAMES, guarded, tell
from pipelines.run.text_tables import aligned


def _named(values: tuple[str, ...], form: str = "NAME=FOLDER") -> dict[str, str]:
    out = {}
    for value in values:
        name, equals, told = value.partition("=")
        if not equals or not name or not told:
            raise click.BadParameter(f"{form} expected, got {value!r}")
        out[name] = told
    return out


@click.group(short_help="The paper's tables, with its figures beside ours.")
def experiment() -> None:
    """Named, resumable experiments, laid out like the paper's tables."""

@experiment.command("list")
@guarded
def list_experiments():
    """Names and titles, and the ablation's variants by group."""
    from pipelines.experiments import named, variants

    rows = [(found.name, f"{found.title} ({found.dataset or 'no photos needed'})") for found in named.experiments()]
    click.echo(aligned(rows, "<20", gap=" "))
    click.echo("\nVariants of the ablation, by --group:")
    rows = [(group, f"{about}: {' '.join(v.name for v in some)}") for group, (about, some) in variants.GROUPS.items()]
    click.echo(aligned([*rows, ("(unless asked)", " ".join(variants.DEFAULT))], "<20", gap=" "))

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
    "--limit",
    "people",
    type=click.IntRange(min=1),
    help="People to probe, each with one photo.  [default: 128; ablation: 16]",
)
@click.option("--distractors", type=click.IntRange(min=1), default=1000, help="Others in the gallery.")
@click.option("--seed", type=int, default=0, help="Of the draw of people.")
@click.option(
    "--profile",
    type=click.Choice(PROFILE_NAMES),
    help="What is varied.  [default: paper; ablation: standard]",
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
    "--other-inside",
    metavar="NAME=RECOGNISER,...",
    multiple=True,
    help="table1: recognisers that --other NAME was made through, which do not score it; repeatable.",
)
@click.option(
    "--swaps",
    metavar="FOLDER",
    help="table3, table4: a face swapper's outputs: FOLDER/original/... and FOLDER/LINE/... (tau-3, eps-8, ...).  "
    "[default: the embedded swap oracle's]",
)
@click.option("--variants", metavar="NAME,...", default="", help="ablation: these, see `scol experiment list`.")
@click.option("--group", "groups", metavar="GROUP", multiple=True, help="ablation: all variants of it; repeatable.")
@click.option(
    "--variants-file", metavar="FILE", help="ablation: your own, a TOML file with a section of settings for each."
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: as the machine has cores]")
@guarded
def run(
    name,
    data,
    dataset,
    out,
    people,
    distractors,
    seed,
    profile,
    sets,
    others,
    other_inside,
    swaps,
    variants,
    groups,
    variants_file,
    workers,
):
    """Run NAME (see `scol experiment list`), or go on with it; a larger --limit goes on from a smaller one.

    Prints the table, and writes it to OUT/NAME.md with all figures in OUT/NAME.json.
    """
    from pipelines.experiments import ablation, named, tables
    from pipelines.experiments.variants import select
    from pipelines.jobs.progress import Reporter

    found = named.find(name)
    chosen = []
    if name == ablation.NAME:
        chosen = select([n for n in variants.split(",") if n], groups, variants_file)
    elif variants or groups or variants_file:
        raise click.UsageError(f"--variants, --group and --variants-file are of the ablation, not of {name}")
    options = tables.Options(
        data=data,
        dataset=dataset or found.dataset,
        out=out or f"build/experiments/{name}",
        people=people or found.people,
        distractors=distractors,
        seed=seed,
        profile=profile or found.profile,
        sets=sets,
        others=_named(others),
        inside={
            name: tuple(n for n in names.split(",") if n)
            for name, names in _named(other_inside, "NAME=RECOGNISER,...").items()
        },
        swaps=swaps,
        workers=workers,
    )
    click.echo(named.run(name, options, chosen, tell, lambda: Reporter(sys.stderr)))
