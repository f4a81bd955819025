"""`scol evaluate`."""

from __future__ import annotations

import sys

import click

from pipelines.cli.options import guarded, json_option, tell


@click.command(short_help="Measure how well a protected tree hides its people, and what it cost.")
@click.argument("originals")
@click.argument("protected")
@click.option("--out", metavar="OUT", help="Folder of the results.  [default: PROTECTED.eval]")
@click.option(
    "--gallery",
    metavar="PHOTOS",
    help="Unprotected photos of the same and of other people, a folder for each "
    "person (or a table with person_id).  [default: ORIGINALS]",
)
@click.option(
    "--people-from",
    metavar="folder|TABLE",
    help="Whose photo it is: the name of its folder, or a CSV or Parquet table with columns path and person_id.",
)
@click.option(
    "--recogniser",
    "recognisers",
    metavar="NAME",
    multiple=True,
    help="Repeatable.  [default: all; see scol models]",
)
@click.option(
    "--distortion",
    "distortions",
    metavar="NAME",
    multiple=True,
    help="jpegQ, webpQ, half, resizeP, blurS, "
    "screenshot, and chains like jpeg75+half; repeatable.  [default: nine of them]",
)
@click.option("--no-distortions", is_flag=True, help="Only the photos as they are.")
@click.option(
    "--inside",
    metavar="NAME",
    multiple=True,
    help="A recogniser that the method used, which then counts in no "
    "average; repeatable; none: it used none of them.  [default: as PROTECTED.run says]",
)
@click.option(
    "--stages",
    metavar="RUN",
    help="Run that made PROTECTED: measure its photos alone, and tell what each of its stages contributes.",
)
@click.option(
    "--strip",
    "drop",
    metavar="TEXT",
    default="",
    help="End of the protected names that the originals' lack, e.g. _cloaked.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only a random sample of so many photos.")
@click.option("--seed", type=int, default=0, help="Of that sample, and of the gallery's.")
@click.option("--references", type=click.IntRange(min=2), default=1000, help="Most people in the gallery.")
@click.option(
    "--no-photo", is_flag=True, help="Leave out the measures over whole photos, which are slow on large ones."
)
@click.option(
    "--models", "store", metavar="STORE", help="Model store whose recognisers and LPIPS take part (scol models)."
)
@click.option(
    "--viewer",
    is_flag=True,
    help="Also write viewer.html: pairs of faces for people who do not know which is the original.",
)
@click.option("--viewer-pairs", type=click.IntRange(1, 200), default=40, help="Most pairs on that page.")
@click.option(
    "--viewer-unaltered",
    type=click.FloatRange(0, 0.9),
    default=0.25,
    help="Share of them that shows the original twice.",
)
@click.option(
    "--viewer-answers",
    metavar="FILE|FOLDER",
    multiple=True,
    help="What a viewer said, or a folder of viewer-answers-*.json, is added up and stored in OUT; nothing is "
    "measured; "
    "repeatable.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: as the machine has cores]")
@click.option("--ray-address", metavar="HOST:PORT", help="Join this Ray cluster.")
@json_option
@guarded
def evaluate(
    originals,
    protected,
    out,
    gallery,
    people_from,
    recognisers,
    distortions,
    no_distortions,
    inside,
    stages,
    drop,
    limit,
    seed,
    references,
    no_photo,
    store,
    viewer,
    viewer_pairs,
    viewer_unaltered,
    viewer_answers,
    workers,
    ray_address,
    as_json,
):
    """Compare the photos of PROTECTED, ours or another tool's, with those of ORIGINALS, as face recognisers and
    eyes do.

    Photos go together by relative path without suffix. OUT gets evaluation.html, evaluation.json and faces.parquet;
    the same command again goes on where it was stopped, and does only what is new or changed. docs/evaluate.md
    tells how to read the figures.

    Exit status: 0 if every photo could be compared, 1 if some could not, 2 if the evaluation could not start.
    """
    from pipelines.evaluate import answers, job, page
    from pipelines.evaluate.stages import stage_words
    from pipelines.evaluate.summary import LOST
    from pipelines.evaluate.viewer import Draw
    from pipelines.jobs.progress import Reporter
    from pipelines.run.text import to_json
    from scol_ops.distortions import STANDARD

    if no_distortions and distortions:
        raise click.UsageError("--distortion and --no-distortions exclude each other")
    if viewer and viewer_answers:
        raise click.UsageError("--viewer and --viewer-answers exclude each other: first the page, then what was said")
    options = job.Options(
        originals,
        protected,
        out=out,
        gallery=gallery,
        people_from=people_from,
        recognisers=recognisers or None,
        distortions=() if no_distortions else distortions or STANDARD,
        inside=() if inside == ("none",) else inside or None,
        stages=stages,
        limit=limit,
        seed=seed,
        references=references,
        drop=drop,
        photo=not no_photo,
        store=store,
        viewer=Draw(viewer_pairs, viewer_unaltered) if viewer else None,
        workers=workers,
        ray_address=ray_address,
    )
    if viewer_answers:
        said = answers.record_answers(options.folder, viewer_answers, tell)
        click.echo(to_json(said) if as_json else answers.viewer_words(said))
        return
    reporter = Reporter(sys.stderr)
    try:
        result = job.evaluate(options, tell, reporter)
    finally:
        reporter.close()
    if as_json:
        click.echo(to_json(result.figures))
    else:
        click.echo(page.table_words(result.figures))
        if stages is not None:
            click.echo("\n" + stage_words(result.figures.get("stages", [])) + "\n")
        if "viewers" in result.figures:
            click.echo("\n" + answers.viewer_words(result.figures["viewers"]) + "\n")
        click.echo(f"page: {result.out}/evaluation.html")
        if viewer:
            click.echo(f"for viewers: {result.out}/viewer.html (keep viewer-key.json)")
    counts = result.figures["counts"]
    lost = sum(counts.get(name, 0) for name in LOST)
    if lost:
        tell(
            f"{lost} of {counts['photos']} photos could not be compared: status and reason are in "
            f"{result.out}/faces.parquet"
        )
    sys.exit(1 if lost or counts.get("faces_error") else 0)
