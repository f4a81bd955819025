"""``scol gallery ...``: what the commands print and with which status they end. The work is in
``pipelines.jobs.gallery``."""

from __future__ import annotations

import sys
from typing import Any

import click

from pipelines.cli.options import configured, engine_options, guarded, json_option, print_json, tell
from pipelines.run.text_tables import aligned

_STORE = "Folder or fsspec URL of the gallery."


@click.group()
def gallery() -> None:
    """Galleries of style codes: build, add, remove, versions (docs/gallery.md)."""


def whom(function):
    """Options that name people, photos and faces."""
    for name, parameter, metavar, words in (
        ("--face", "faces", "ID", "One face, by its id; repeatable."),
        ("--photo", "photos", "PATH", "Path as in the manifests, relative to SRC; repeatable."),
        ("--person", "people", "ID", "All codes of this person; repeatable."),
    ):
        function = click.option(name, parameter, metavar=metavar, multiple=True, help=words)(function)
    return function


def sized(function):
    """Options that say how a gallery is to be searched."""
    function = click.option(
        "--recall", type=click.FloatRange(0, 1, min_open=True), default=0.95, help="Wanted of a compressed index."
    )(function)
    return click.option(
        "--memory", type=float, metavar="GB", help="The search may take so much; compressed where exact does not fit."
    )(function)


@gallery.command("build", short_help="A new version from the faces of photos, or of people who do not exist.")
@click.argument("photos", required=False)
@click.option(
    "--synthetic",
    type=click.IntRange(min=2),
    metavar="N",
    help="N codes of people who do not exist, instead of PHOTOS.",
)
@click.option("--out", required=True, metavar="GALLERY", help=_STORE)
@click.option("--people-from", type=click.Choice(["folder"]), help="Take the name of a photo's folder as its person.")
@click.option(
    "--compress", metavar="INDEX", help="Compressed indexes besides: auto, or a FAISS factory string, e.g. IVF4096,SQ8."
)
@sized
@json_option
@configured
@engine_options
@guarded
def build(photos, synthetic, out, people_from, compress, memory, recall, as_json, load, workers, ray_address):
    """Build a version of GALLERY from the faces of PHOTOS (as for protect), or a synthetic one, and switch to it.

    Nothing of earlier versions goes into it; they stay until they are pruned. Interrupted or killed, the same command
    goes on. If GALLERY has this version already, it is switched to.
    """
    if (photos is None) == (synthetic is None):
        raise click.UsageError("give either PHOTOS or --synthetic N")
    config = load(gallery__synthetic=synthetic, engine__workers=workers, engine__ray_address=ray_address)
    from gallery_index import tuning
    from pipelines.jobs import gallery as gallery_jobs
    from pipelines.jobs import progress as run_progress

    def plan(count: int):
        """Says what it will take before the gallery is built; gives the plan of its indexes, if it is to have some."""
        found = gallery_jobs.estimate(
            count, broadcast=synthetic is not None, memory=memory and memory * 1e9, recall=recall, factory=compress
        )
        tell(aligned(tuning.words(found).items(), "<20", gap=" "))
        return found.plan

    if synthetic is not None:
        gallery_jobs.build_synthetic_version(out, config, plan(synthetic))
    else:
        reporter = run_progress.Reporter(sys.stderr)
        gallery_jobs.build_from_photos(
            photos, out, config, people_from=people_from, compress=plan, progress=reporter, say=tell
        )
        reporter.close()
    _show(gallery_jobs.describe(out), as_json)


@gallery.command("add", short_help="A new version with further faces: of photos, of a run, of another gallery.")
@click.argument("gallery_url", metavar="GALLERY")
@click.argument("photos", required=False)
@click.option("--run", "run_url", metavar="RUN", help="Take the codes from this run's manifests, instead of PHOTOS.")
@click.option("--gallery", "other", metavar="OTHER", help="Take all codes of this gallery, instead of PHOTOS.")
@click.option("--people-from", type=click.Choice(["folder"]), help="Take the name of a photo's folder as its person.")
@json_option
@configured
@engine_options
@guarded
def add(gallery_url, photos, run_url, other, people_from, as_json, load, workers, ray_address):
    """Add faces to GALLERY: a new version, made of the current one and of these, minus removed people.

    Faces that are there already are left, changed ones are replaced. Where nothing changes, no version is made. The new
    version is checked before it becomes current. Interrupted or killed, the same command goes on.
    """
    if sum(given is not None for given in (photos, run_url, other)) != 1:
        raise click.UsageError("give one of PHOTOS, --run RUN and --gallery OTHER")
    config = load(engine__workers=workers, engine__ray_address=ray_address)
    from pipelines.jobs import gallery as gallery_jobs
    from pipelines.jobs import progress as run_progress

    if other is not None:
        counts: dict[str, Any] = gallery_jobs.add_from_gallery(other, gallery_url).counts()
    elif run_url is not None:
        counts = gallery_jobs.add_from_run(run_url, gallery_url, config, say=tell)[1]
    else:
        reporter = run_progress.Reporter(sys.stderr)
        counts = gallery_jobs.build_from_photos(
            photos, gallery_url, config, people_from=people_from, add=True, progress=reporter, say=tell
        )[1]
        reporter.close()
    _show(counts | {"version": gallery_jobs.describe(gallery_url)["version"]}, as_json)


@gallery.command("remove", short_help="A new version without some people, who will not come back.")
@click.argument("gallery_url", metavar="GALLERY")
@whom
@json_option
@guarded
def remove(gallery_url, people, photos, faces, as_json):
    """Take people, photos or faces out of GALLERY: a new version without them, which becomes current.

    They are noted (as keyed hashes), so that no later build or add brings them back. Older versions hold them until
    `scol gallery prune` deletes these.
    """
    if not (people or photos or faces):
        raise click.UsageError("give --person ID, --photo PATH or --face ID")
    from pipelines.jobs import gallery as gallery_jobs

    done = gallery_jobs.remove(gallery_url, list(people), list(photos), list(faces))
    _show({"removed": done.removed, "codes": done.info.count, "version": done.name}, as_json)
    tell("older versions may still hold them: scol gallery prune " + gallery_url)


@gallery.command("readmit", short_help="Let removed people be added again.")
@click.argument("gallery_url", metavar="GALLERY")
@whom
@guarded
def readmit(gallery_url, people, photos, faces):
    """Take people, photos or faces off GALLERY's list of who was removed. Adds nothing by itself."""
    if not (people or photos or faces):
        raise click.UsageError("give --person ID, --photo PATH or --face ID")
    from pipelines.jobs import gallery as gallery_jobs

    click.echo(f"{gallery_jobs.readmit(gallery_url, list(people), list(photos), list(faces))} taken off the list")


@gallery.command("info", short_help="Describe a gallery: size, similarity, weights, fingerprint.")
@click.argument("gallery_url", metavar="GALLERY")
@json_option
@guarded
def info(gallery_url, as_json):
    """Describe GALLERY, or one of its versions by the version's folder."""
    from pipelines.jobs import gallery as gallery_jobs

    _show(gallery_jobs.describe(gallery_url), as_json)


@gallery.command("verify", short_help="Read all of a version and check it.")
@click.argument("gallery_url", metavar="GALLERY")
@click.option("--version", metavar="NAME", help="Of this version.  [default: the current one]")
@json_option
@guarded
def verify(gallery_url, version, as_json):
    """Check files (sha256), counts, ids, norms, that codes find themselves, and a compressed index's recall.

    Exit status: 0 if all is well, 2 if not; each problem is one line.
    """
    from pipelines.jobs import gallery as gallery_jobs

    _show(gallery_jobs.verify(gallery_url, version), as_json)


@gallery.command("list", short_help="The versions of a gallery.")
@click.argument("gallery_url", metavar="GALLERY")
@json_option
@guarded
def list_(gallery_url, as_json):
    """List the versions of GALLERY, the oldest first; the current one has a star."""
    import datetime

    from pipelines.jobs import gallery as gallery_jobs

    rows = gallery_jobs.versions(gallery_url)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        when = row["switched"] and datetime.datetime.fromtimestamp(row["switched"], datetime.UTC)
        told = ", ".join(f"{k} {v}" for k, v in row["about"].items() if isinstance(v, int) and v)
        words = f"{row['codes']:>9} codes {row['bytes'] / 1e6:>10.1f} MB" if row["finished"] else "not finished"
        click.echo(
            f"{'*' if row['current'] else ' '} {row['version']} {words}  "
            f"{when.isoformat(timespec='seconds') if when else 'never current'}  {told}".rstrip()
        )


@gallery.command("switch", short_help="Make a version the current one.")
@click.argument("gallery_url", metavar="GALLERY")
@click.argument("version")
@json_option
@guarded
def switch(gallery_url, version, as_json):
    """Make VERSION of GALLERY the current one, for example to go back. Runs that are going on are not concerned."""
    from pipelines.jobs import gallery as gallery_jobs

    gallery_jobs.switch(gallery_url, version)
    _show(gallery_jobs.describe(gallery_url), as_json)


@gallery.command("prune", short_help="Delete old versions, and all that hold removed people.")
@click.argument("gallery_url", metavar="GALLERY")
@click.option("--keep", type=click.IntRange(min=0), default=2, help="Versions to keep besides the current one.")
@json_option
@guarded
def prune(gallery_url, keep, as_json):
    """Delete versions of GALLERY: all but the current one and the newest KEEP others, and all that hold removed people.

    Also builds that nobody is at work on. A version that a run reads stays.

    Exit status: 0, or 1 if codes of removed people are left somewhere, or a version that is read.
    """
    from dataclasses import asdict

    from pipelines.jobs import gallery as gallery_jobs

    done = gallery_jobs.prune(gallery_url, keep)
    if as_json:
        print_json(asdict(done))
    else:
        for name in (*done.versions, *done.builds):
            click.echo(f"deleted {name}")
        for name, why in done.kept.items():
            click.echo(f"STAYS   {name}: {why}")
        if not (done.versions or done.builds or done.kept):
            click.echo("nothing to delete")
    sys.exit(1 if done.kept else 0)


@gallery.command("estimate", short_help="What a gallery of N codes takes: disk, memory, time.")
@click.argument("count", metavar="N", type=click.IntRange(min=1))
@click.option("--layers", type=click.IntRange(min=1), default=16, help="L: layers of a code.")
@click.option("--one-w", is_flag=True, help="One W a person for all layers, as synthetic galleries have.")
@click.option("--compress", metavar="INDEX", help="This kind of index: auto, or a FAISS factory string.")
@sized
@json_option
@guarded
def estimate(count, layers, one_w, compress, memory, recall, as_json):
    """What a gallery of N codes takes on this machine, and which search suits it. Builds nothing.

    Rates are measured now, in a second or two; a machine that others use too gives larger times.
    """
    from gallery_index import tuning
    from pipelines.jobs import gallery as gallery_jobs

    found = gallery_jobs.estimate(
        count, broadcast=one_w, memory=memory and memory * 1e9, recall=recall, factory=compress, layers=layers
    )
    _show(found.as_json() if as_json else tuning.words(found), as_json)


def _show(described: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(described)
        return
    rows = []
    for name, value in described.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v or 'not involved'}" for k, v in value.items())
        rows.append((name.replace("_", " "), value))
    click.echo(aligned(rows, "<22", gap=" "))
