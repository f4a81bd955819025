"""All experiments by name: the paper's tables, its figures, and the ablation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster import Progress
from pipelines.experiments import ablation, figures, tables
from pipelines.experiments.tables import ExperimentError, Options
from pipelines.experiments.variants import Variant


@dataclass(frozen=True)
class Named:
    """`dataset`, `profile`, `people`: where the user does not say; an empty data set: no photos are needed."""

    name: str
    title: str
    dataset: str
    profile: str
    people: int


def experiments() -> Iterator[Named]:
    """In the order in which they are listed."""
    for found in tables.EXPERIMENTS.values():
        yield Named(found.name, found.title, found.dataset, "paper", 128)
    yield Named(tables.COST, "Cost of a face", "", "paper", 128)
    for name, title in figures.TITLES.items():
        yield Named(name, title, "lfw", "standard", figures.PEOPLE)
    yield Named(ablation.NAME, ablation.TITLE, "lfw", "standard", ablation.PEOPLE)


def find(name: str) -> Named:
    """Raises ExperimentError: an unknown name."""
    known = {e.name: e for e in experiments()}
    if name not in known:
        raise ExperimentError(f"no experiment {name!r}; there are {', '.join(known)}")
    return known[name]


def run(
    name: str,
    options: Options,
    variants: Sequence[Variant] = (),
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[], Callable[[Progress], None] | None] = lambda: None,
) -> str:
    """Run an experiment, or go on with it; returns its table (Markdown).

    Args:
        variants: of the ablation.

    Raises:
        ExperimentError: an unknown name. Others as the experiment.
    """
    find(name)
    if name == ablation.NAME:
        return ablation.run(options, variants, say, progress)
    if name in figures.TITLES:
        return figures.run(name, options, say, progress)
    return tables.run(name, options, say, progress)
