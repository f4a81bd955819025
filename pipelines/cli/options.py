"""Options and behaviour that several commands share."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import click

_OUR_PACKAGES = ("pipelines", "scol_ops", "gallery_index", "cluster")
# pipelines.config.load.PROFILES, which costs half a second to import
PROFILE_NAMES = ("quick", "standard", "faint", "strong", "paper")


def _is_known(error: Exception) -> bool:
    """Whether an error is shown as one line: the system's own, and every type that our packages define."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _OUR_PACKAGES


@contextmanager
def _on_sigterm(handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # the caller deals with signals
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def guarded(command: Callable) -> Callable:
    """Adds --verbose; typed errors become one line on stderr and status 2 (Ctrl-C: 130, SIGTERM: 143)."""

    @click.option("--verbose", is_flag=True, help="Show tracebacks and the packages' own messages.")
    @wraps(command)
    def run(*args, verbose: bool, **kwargs):
        if verbose:
            import logging

            logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        told: list[int] = []

        def end(number: int, frame: Any) -> None:  # batch systems end a job so: it stops as cleanly as by Ctrl-C
            told.append(number)
            raise KeyboardInterrupt

        try:
            with _on_sigterm(end):
                return command(*args, **kwargs)
        except KeyboardInterrupt:
            if verbose:
                raise
            click.echo("interrupted; what is finished is kept, the same command goes on from there", err=True)
            sys.exit(128 + (told[0] if told else signal.SIGINT))
        except Exception as error:
            if verbose or not _is_known(error):
                raise
            for line in getattr(error, "problems", None) or [str(error)]:
                click.echo(f"error: {line}", err=True)
            sys.exit(2)

    return run


def configured(command: Callable) -> Callable:
    """Adds --profile, --config and --set, and hands over ``config``."""

    @click.option("--profile", type=click.Choice(PROFILE_NAMES), help="Set of defaults.  [default: standard]")
    @click.option("--config", "config_file", metavar="FILE", help="TOML file with settings; see `scol config`.")
    @click.option(
        "--set", "sets", metavar="KEY=VALUE", multiple=True, help="One setting, e.g. tune.steps=200; repeatable."
    )
    @wraps(command)
    def run(*args, profile: str | None, config_file: str | None, sets: tuple[str, ...], **kwargs):
        from pipelines.config.load import load_config

        def load(**overrides: Any):
            return load_config(profile, config_file, sets, **overrides)

        return command(*args, load=load, **kwargs)

    return run


def engine_options(command: Callable) -> Callable:
    """Adds the options of the engine that are used most."""
    command = click.option("--workers", type=int, help="Actors that hold a generator (engine.workers).")(command)
    return click.option(
        "--ray-address",
        metavar="HOST:PORT",
        help="Join this Ray cluster (engine.ray_address); by default a local one is started.",
    )(command)


def json_option(command: Callable) -> Callable:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")(command)


def tell(text: str) -> None:
    click.echo(text, err=True)


def print_json(value: Any) -> None:
    from pipelines.run.text import to_json

    click.echo(to_json(value))
