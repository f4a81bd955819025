"""Commands about a run's folder."""

from __future__ import annotations

import sys

import click

from pipelines.cli.options import guarded, json_option, print_json, tell


@click.command(short_help="Write a run's report anew.")
@click.argument("run")
@guarded
def report(run):
    """Write RUN/report.html anew from the run's tables."""
    from pipelines.report.run_page import write_report

    click.echo(write_report(run))


@click.command(short_help="How far a run is, and how it came out so far.")
@click.argument("run")
@json_option
@guarded
def status(run, as_json):
    """How far RUN is, and how it came out so far. Also while it runs, from another terminal or machine.

    While a driver is at work: for each stage photos done and left, rows by status, photos a minute (over the last five
    minutes) and time left; workers; the last errors; and whether the driver is alive.
    """
    from pipelines.jobs import status as run_status

    result = run_status.status(run)
    if as_json:
        print_json(result)
    else:
        click.echo("\n".join(run_status.status_lines(result)))


@click.command(short_help="Stop a run that is going on, from anywhere.")
@click.argument("run")
@click.option("--wait", type=click.FloatRange(min=0), default=60.0, help="Seconds to wait until it has stopped.")
@guarded
def cancel(run, wait):
    """Ask whoever is at work on RUN to stop, also on another machine. What is finished is kept, as after Ctrl-C.

    Exit status: 0 if it has stopped, 1 if nobody is at work on RUN, or somebody still is after the wait.
    """
    from pipelines.run import presence
    from pipelines.run.folder import Run

    place = Run(run)
    if not presence.drivers(place):
        place.require()
    asked = presence.request_cancel(place)
    if not asked:
        tell("nobody is at work on this run")
        sys.exit(1)
    for entry in asked:
        click.echo(f"asked to stop: {presence.words(entry)}")
    left = presence.wait_for_end(place, {entry["id"] for entry in asked}, wait)
    click.echo(f"{len(left)} still at work" if left else "stopped; `scol protect` with the same arguments goes on")
    sys.exit(1 if left else 0)


@click.command(short_help="Have failed photos made again by the next run.")
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
    from pipelines.jobs import retry as retry_job
    from pipelines.run.folder import Run

    found = retry_job.retry(Run(run), reasons, stage)
    if as_json:
        print_json({"photos": dict(found.photos), "at_source": found.at_source})
        return
    for name, count in found.photos.items():
        click.echo(f"{count} photo(s) will be made again from {name} on")
    if found.at_source:
        click.echo(f"{found.at_source} photo(s) could not be used as SRC has them; every run looks again")
    if not found.photos:
        click.echo("nothing to make again")


@click.command(short_help="List the photos that failed or came out weak.")
@click.argument("run")
@click.option("--weak/--no-weak", default=True, help="Also list faces that came out weak.")
@click.option("--reasons", is_flag=True, help="Count by reason and stage instead, with three examples of each.")
@click.option("--parquet", metavar="FILE", help="Also write the rows there, as a table.")
@json_option
@guarded
def errors(run, weak, reasons, parquet, as_json):
    """Every photo of RUN that failed or came out weak, with stage and reason."""
    from pipelines.run import errors as run_errors

    rows = run_errors.errors(run, weak=weak)
    if parquet is not None:
        run_errors.write_errors(rows, parquet)
    if reasons:
        groups = run_errors.by_reason(rows)
        if as_json:
            print_json(groups)
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
        print_json(rows)
        return
    for row in rows:
        click.echo(f"{row['status']:6} {row['failed_stage'] or '-':8} {row['path']}: {row['reason']}")
    click.echo(f"{len(rows)} row(s)", err=True)


@click.command(short_help="Remove everything that a run holds of a photo or a person.")
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
    from pipelines.jobs import purge as purge_job

    done = purge_job.purge(run, photos, people, say=tell)
    if as_json:
        print_json(done.to_dict())
    else:
        click.echo("\n".join(purge_job.lines(done)))
    sys.exit(1 if done.kept else 0)
