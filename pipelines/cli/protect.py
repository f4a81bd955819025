"""``scol protect`` and ``scol plan``."""

from __future__ import annotations

import sys

import click

from pipelines.cli.options import configured, engine_options, guarded, json_option, print_json, tell
from pipelines.run.text_tables import aligned


@click.command()
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
    from pipelines.jobs import protect as protect_job
    from pipelines.run import folder as run_folder

    result = protect_job.protect(
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
        say=tell,
        progress_stream=sys.stderr,
    )
    run_url = run_url or run_folder.default_run(out)
    if as_json:
        print_json(result)
    else:
        click.echo(protect_job.table_of(result))
        click.echo(f"report: {run_url}/report.html")
    if result["weak"]:
        tell(
            f"warning: {result['weak']} photo(s) came out weak: {result['judge']} may still know a face "
            f"(scol errors {run_url})"
        )
    if result["error"]:
        tell(f"{result['error']} photo(s) failed: scol errors {run_url}")
    sys.exit(protect_job.exit_status(result))


@click.command(short_help="What protecting SRC would take: photos, faces, time, memory.")
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
    from pipelines.jobs import estimate as estimating

    result = estimating.plan(src, load(), run_url=run_url, sample=sample)
    if as_json:
        print_json(result)
        return
    click.echo(aligned(result["words"].items(), "<18", gap=" "))
