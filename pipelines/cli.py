"""The command ``scol``. Thin: parses, calls, prints. Heavy packages are imported inside the commands."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import click

from pipelines import cli_evaluate, cli_experiment

_PROFILES = ("quick", "standard", "paper")  # pipelines.config.PROFILES, which costs half a second to import


def _known_errors() -> tuple[type[BaseException], ...]:
    """What is shown as one line instead of a traceback; only packages that are loaded can have raised."""
    wanted = {
        "pipelines.config": ("ConfigError",),
        "pipelines.sources": ("SourceError",),
        "pipelines.protect": ("ProtectError",),
        "pipelines.manifests": ("RunError",),
        "pipelines.photo": ("PhotoError",),
        "cluster.errors": ("ClusterError",),
        "gallery_index.errors": ("GalleryError",),
        "scol_ops.models.weights": ("WeightsError",),
        "pipelines.evaluate.errors": ("EvaluateError",),
        "pipelines.experiments.datasets": ("DatasetError",),
        "pipelines.experiments.tables": ("ExperimentError",),
    }
    found: list[type[BaseException]] = [OSError]
    for module, names in wanted.items():
        if module in sys.modules:
            found += [getattr(sys.modules[module], name) for name in names]
    return tuple(found)


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
            if verbose or not isinstance(error, _known_errors()):
                raise
            for line in getattr(error, "problems", None) or [str(error)]:
                click.echo(f"error: {line}", err=True)
            sys.exit(2)

    return run


def configured(command: Callable) -> Callable:
    """Adds --profile, --config and --set, and hands over ``config``."""

    @click.option("--profile", type=click.Choice(_PROFILES), help="Set of defaults.  [default: standard]")
    @click.option("--config", "config_file", metavar="FILE", help="TOML file with settings; see `scol config`.")
    @click.option(
        "--set", "sets", metavar="KEY=VALUE", multiple=True, help="One setting, e.g. tune.steps=200; repeatable."
    )
    @wraps(command)
    def run(*args, profile: str | None, config_file: str | None, sets: tuple[str, ...], **kwargs):
        from pipelines.config import load_config

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


def _say(text: str) -> None:
    click.echo(text, err=True)


def _print(value: Any) -> None:
    from pipelines.manifests import to_json

    click.echo(to_json(value))


class Ordered(click.Group):
    """Commands in the order in which they are defined."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


@click.group(cls=Ordered, context_settings=_CONTEXT)
@click.version_option(package_name="scol", message="%(version)s")
def main() -> None:
    """Protect the faces in photo archives against face swappers (SCOL).

    Photos look the same to people, but face recognisers and the identity extractors of face swappers see someone else.

    \b
    First steps:
      scol demo                          a small archive of generated people, protected, with its report
      scol protect PHOTOS --out OUT      the job itself
      scol doctor                        is everything in place?

    \b
    Operating (RUN is OUT.run unless --run says otherwise; docs/operate.md):
      scol protect PHOTOS --out OUT --prune    every night: new and changed photos; deleted ones go
      scol status RUN, scol cancel RUN         while it runs, from another terminal or machine
      scol errors RUN, scol retry RUN          what failed, and once more
      scol purge RUN --person ID               everything of a person is removed
    """


# ---- protect ---------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("src")
@click.option(
    "--out", required=True, metavar="OUT", help="Folder or fsspec URL; gets the same tree, names and formats."
)
@click.option("--run", "run_url", metavar="RUN", help="Folder of the run's tables and report.  [default: OUT.run]")
@click.option(
    "--gallery",
    metavar="GALLERY",
    help="Gallery of other people's codes (gallery.url); by default a synthetic one is made in RUN.",
)
@click.option(
    "--on-fail",
    type=click.Choice(["skip", "copy"]),
    help="A photo that fails: leave it out of OUT, or copy it unprotected (publish.on_fail).  [default: skip]",
)
@click.option("--people-from", type=click.Choice(["folder"]), help="Take the name of a photo's folder as its person.")
@click.option("--limit", type=click.IntRange(min=1), help="Only a random sample of so many photos.")
@click.option("--seed", type=int, default=0, help="Of that sample. (The run's own seed is --set seed=N.)")
@click.option(
    "--verify-content",
    is_flag=True,
    help="Tell changed photos by their bytes, all of which are read, instead of size and modification time.",
)
@click.option(
    "--prune",
    is_flag=True,
    help="Remove the outputs of photos that SRC no longer has, if scol wrote them and nobody changed them since.",
)
@click.option("--log-json", metavar="FILE", help="Append structured logs to this local file, one JSON object a line.")
@json_option
@configured
@engine_options
@guarded
def protect(
    src,
    out,
    run_url,
    gallery,
    on_fail,
    people_from,
    limit,
    seed,
    verify_content,
    prune,
    log_json,
    as_json,
    load,
    workers,
    ray_address,
):
    """Protect the photos of SRC into OUT.

    SRC is a folder (all depths), a glob in quotes, a text list (.txt), or a table (.csv, .parquet) with a column `path`
    and optionally `person_id`; paths or fsspec URLs. A second run of the same command does only what is missing or has
    changed, and says what is new, changed and deleted since.

    Exit status: 0 if no photo failed (photos that came out weak are warned of), 1 if one failed, 2 if the run could not
    start or go on, 130 after Ctrl-C or `scol cancel`.
    """
    config = load(
        gallery__url=gallery, publish__on_fail=on_fail, engine__workers=workers, engine__ray_address=ray_address
    )
    from pipelines import protect as job

    result = job.protect(
        src,
        out,
        config,
        run_url=run_url,
        people_from=people_from,
        limit=limit,
        sample_seed=seed,
        verify_content=verify_content,
        prune=prune,
        log_json=log_json,
        say=_say,
        progress_stream=sys.stderr,
    )
    run_url = run_url or job.default_run(out)
    if as_json:
        _print(result)
    else:
        click.echo(job.table_of(result))
        click.echo(f"report: {run_url}/report.html")
    if result["weak"]:
        _say(
            f"warning: {result['weak']} photo(s) came out weak: {result['judge']} may still know a face "
            f"(scol errors {run_url})"
        )
    if result["error"]:
        _say(f"{result['error']} photo(s) failed: scol errors {run_url}")
    sys.exit(job.exit_status(result))


# ---- gallery ---------------------------------------------------------------------------------------------------------


class _CommandsElsewhere(click.Group):
    """Those of ``cli_NAME``, imported when they are wanted, since they take the decorators from here."""

    def _commands(self) -> dict[str, click.Command]:
        return importlib.import_module(f"pipelines.cli_{self.name}").COMMANDS

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._commands())

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return self._commands().get(name)


@main.group(cls=_CommandsElsewhere)
def gallery() -> None:
    """Galleries of style codes: build, add, remove, versions (docs/gallery.md)."""


# ---- about a run -----------------------------------------------------------------------------------------------------


@main.command(short_help="Write a run's report anew.")
@click.argument("run")
@guarded
def report(run):
    """Write RUN/report.html anew from the run's tables."""
    from pipelines.report import write_report

    click.echo(write_report(run))


@main.command(short_help="How far a run is, and how it came out so far.")
@click.argument("run")
@json_option
@guarded
def status(run, as_json):
    """How far RUN is, and how it came out so far. Also while it runs, from another terminal or machine.

    While a driver is at work: for each stage photos done and left, rows by status, photos a minute (over the last five
    minutes) and time left; workers; the last errors; and whether the driver is alive.
    """
    from pipelines import inspect_run

    result = inspect_run.status(run)
    if as_json:
        _print(result)
    else:
        click.echo("\n".join(inspect_run.status_lines(result)))


@main.command(short_help="Stop a run that is going on, from anywhere.")
@click.argument("run")
@click.option("--wait", type=click.FloatRange(min=0), default=60.0, help="Seconds to wait until it has stopped.")
@guarded
def cancel(run, wait):
    """Ask whoever is at work on RUN to stop, also on another machine. What is finished is kept, as after Ctrl-C.

    Exit status: 0 if it has stopped, 1 if nobody is at work on RUN, or somebody still is after the wait.
    """
    from pipelines import presence
    from pipelines.manifests import Run

    place = Run(run)
    if not presence.drivers(place):
        place.require()
    asked = presence.request_cancel(place)
    if not asked:
        _say("nobody is at work on this run")
        sys.exit(1)
    for entry in asked:
        click.echo(f"asked to stop: {presence.words(entry)}")
    left = presence.wait_for_end(place, {entry["id"] for entry in asked}, wait)
    click.echo(f"{len(left)} still at work" if left else "stopped; `scol protect` with the same arguments goes on")
    sys.exit(1 if left else 0)


@main.command(short_help="Have failed photos made again by the next run.")
@click.argument("run")
@click.option(
    "--reason", "reasons", metavar="CODE", multiple=True, help="Only these, e.g. TIMEOUT; repeatable.  [default: all]"
)
@click.option("--stage", metavar="S", help="Only what failed at this stage.  [default: any]")
@json_option
@guarded
def retry(run, reasons, stage, as_json):
    """Have the photos of RUN that failed made again by the next `scol protect` with the same arguments.

    Starts nothing. Rows of other photos are not touched. A run that is going on does not see it; the one after does.
    """
    from pipelines import retry as job
    from pipelines.manifests import Run

    found = job.retry(Run(run), reasons, stage)
    if as_json:
        _print({"photos": dict(found.photos), "at_source": found.at_source})
        return
    for name, count in found.photos.items():
        click.echo(f"{count} photo(s) will be made again from {name} on")
    if found.at_source:
        click.echo(f"{found.at_source} photo(s) could not be used as SRC has them; every run looks again")
    if not found.photos:
        click.echo("nothing to make again")


@main.command(short_help="List the photos that failed or came out weak.")
@click.argument("run")
@click.option("--weak/--no-weak", default=True, help="Also list faces that came out weak.")
@click.option("--reasons", is_flag=True, help="Count by reason and stage instead, with three examples of each.")
@click.option("--parquet", metavar="FILE", help="Also write the rows there, as a table.")
@json_option
@guarded
def errors(run, weak, reasons, parquet, as_json):
    """Every photo of RUN that failed or came out weak, with stage and reason."""
    from pipelines import inspect_run

    rows = inspect_run.errors(run, weak=weak)
    if parquet is not None:
        inspect_run.write_errors(rows, parquet)
    if reasons:
        groups = inspect_run.by_reason(rows)
        if as_json:
            _print(groups)
            return
        for group in groups:
            click.echo(
                f"{group['rows']:>7} {group['status']:6} {group['failed_stage'] or '-':8} {group['code']} "
                f"({group['photos']} photos)"
            )
            for example in group["examples"]:
                click.echo(f"        {example['path']}: {example['reason']}")
        return
    if as_json:
        _print(rows)
        return
    for row in rows:
        click.echo(f"{row['status']:6} {row['failed_stage'] or '-':8} {row['path']}: {row['reason']}")
    click.echo(f"{len(rows)} row(s)", err=True)


@main.command(short_help="Remove everything that a run holds of a photo or a person.")
@click.argument("run")
@click.option(
    "--photo", "photos", metavar="PATH", multiple=True, help="Path as in the manifests, relative to SRC; repeatable."
)
@click.option("--person", "people", metavar="ID", multiple=True, help="All photos of this person; repeatable.")
@json_option
@guarded
def purge(run, photos, people, as_json):
    """Remove photos from RUN: outputs, crops, codes, rows of every stage and version, mentions, report, logs in RUN.

    SRC is not touched: take the photos out of it as well, or the next run makes them again. Refused while somebody is
    at work on RUN. Outputs that were changed since stay, and are named.

    Exit status: 0 if all is gone, 1 if an output stays.
    """
    if not photos and not people:
        raise click.UsageError("give --photo PATH or --person ID")
    from pipelines import purge as job

    done = job.purge(run, photos, people, say=_say)
    if as_json:
        _print(done.to_dict())
    else:
        click.echo("\n".join(job.lines(done)))
    sys.exit(1 if done.kept else 0)


@main.command(short_help="What protecting SRC would take: photos, faces, time, memory.")
@click.argument("src")
@click.option(
    "--run", "run_url", metavar="RUN", help="Take times from this earlier run instead of measuring a face now."
)
@click.option("--sample", default=16, type=click.IntRange(1, 1000), help="Photos in which faces are counted.")
@json_option
@configured
@guarded
def plan(src, run_url, sample, as_json, load):
    """What protecting SRC would take: photos, bytes, faces (by a sample), time, memory. Changes nothing."""
    from pipelines import inspect_run

    result = inspect_run.plan(src, load(), run_url=run_url, sample=sample)
    if as_json:
        _print(result)
        return
    for name, value in result["words"].items():
        click.echo(f"{name:18} {value}")


# ---- about the installation ------------------------------------------------------------------------------------------


@main.group(cls=_CommandsElsewhere, invoke_without_command=True, short_help="Networks: embedded, and those of yours.")
@json_option
@click.pass_context
@guarded
def models(ctx, as_json):
    """Without a command: the embedded networks, what for, source, licence, size, sha256 (checked now).

    The commands: public networks that you bring, in the model store (docs/models.md).
    """
    if ctx.invoked_subcommand is None:
        from pipelines import cli_models

        cli_models.embedded(as_json)


@main.command(short_help="Check the installation.")
@click.option("--out", metavar="OUT", default=".", help="Where space on the disk is checked.")
@json_option
@guarded
def doctor(out, as_json):
    """Check Python, PyTorch, Ray (starts one), FAISS, weights, GPU and disk."""
    from pipelines import inspect_run

    checks = inspect_run.doctor(out)
    if as_json:
        _print(checks)
    else:
        for check in checks:
            click.echo(f"{'ok  ' if check['ok'] else 'FAIL'} {check['name']:14} {check['words']}")
    sys.exit(0 if all(check["ok"] for check in checks) else 1)


@main.command("config", short_help="Print all settings with meanings and ranges.")
@click.option("--markdown", is_flag=True, help="Document every setting (docs/configuration.md) instead.")
@json_option
@configured
@guarded
def show_config(markdown, as_json, load):
    """Print the settings of a profile as a TOML file, each with its meaning and range."""
    from pipelines.config import to_markdown, to_toml

    config = load()
    if markdown:
        click.echo(to_markdown(), nl=False)
    elif as_json:
        _print(config.model_dump(mode="json"))
    else:
        click.echo(to_toml(config), nl=False)


@main.command(short_help="Protect a small archive of generated people.")
@click.option("--folder", default="build/demo", help="Where the archive, its protected copy and the report go.")
@configured
@guarded
def demo(folder, load):
    """Draw a small archive of people who do not exist, protect it, and show the result."""
    from pipelines.demo import run_demo

    sys.exit(run_demo(folder, load()))


cli_evaluate.register(main, guarded, json_option, _say)
cli_experiment.register(main, guarded, _say)


if __name__ == "__main__":
    main()
