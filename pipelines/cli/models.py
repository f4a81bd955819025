"""``scol models``: the embedded networks, and those that users bring."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import click

from pipelines.cli.options import guarded, json_option, print_json, tell
from pipelines.run.text_tables import aligned

store_option = click.option(
    "--store",
    metavar="URL",
    help="Model store: a folder or fsspec URL.  [default: $SCOL_MODELS, else the cache folder]",
)


@click.group(invoke_without_command=True, short_help="Networks: embedded, and those of yours.")
@json_option
@click.pass_context
@guarded
def models(ctx, as_json):
    """Without a command: the embedded networks, what for, source, licence, size, sha256 (checked now).

    The commands: public networks that you bring, in the model store (docs/models.md).
    """
    if ctx.invoked_subcommand is None:
        _embedded(as_json)


def _embedded(as_json: bool) -> None:
    """The embedded networks, their digests checked now. Ends with status 1 where one is missing or altered."""
    from pipelines.networks.cards import model_cards

    cards = model_cards()
    if as_json:
        print_json([asdict(card) for card in cards])
    else:
        for card in cards:
            click.echo(f"{card.name}  ({card.role}; {card.size / 1e6:.1f} MB; {card.licence})")
            click.echo(f"  source   {card.source}\n  used in  {card.used_in}")
            if card.card:
                click.echo(f"  card     {card.card}")
            for file, digest in card.files.items():
                click.echo(f"  sha256   {digest}  {file}")
            if card.problem:
                click.echo(f"  PROBLEM  {card.problem}")
    sys.exit(0 if all(card.found for card in cards) else 1)


@models.command("add", short_help="Check a public model's file and take it into the store.")
@click.argument("name")
@click.argument("file")
@store_option
@json_option
@guarded
def add(name, file, store, as_json):
    """Read FILE (a path or fsspec URL) as its owner publishes it, check it, convert it, try it, and keep it as NAME.

    Nothing in the file is run: code that it carries is skipped and named. `scol models list` has the names.
    """
    from pipelines.networks.store import ModelStore

    place = ModelStore(store)
    record, _ = place.add(name, file)
    _show(record, place.url, as_json)


@models.command("list", short_help="All models that can be named, and which are there.")
@store_option
@json_option
@guarded
def list_models(store, as_json):
    """The public models that can be added, and which are in the store. (`scol models` alone: the embedded ones.)"""
    from pipelines.networks.store import ModelStore
    from scol_ops.models.catalogue import CARDS

    place = ModelStore(store)
    there = set(place.names())
    rows = []
    for card in CARDS.values():
        record = place.record(card.name) if card.name in there else None
        rows.append({
            "name": card.name, "role": card.role, "there": record is not None, "file": card.file,
            "fingerprint": None if record is None else record.fingerprint,
            "source": None if record is None else record.source,
        })  # fmt: skip
    if as_json:
        print_json({"store": place.url, "models": rows})
        return
    click.echo(f"store {place.url}")
    states = [
        f"{row['fingerprint']}  from {row['source']}" if row["there"] else f"not there (usual file: {row['file']})"
        for row in rows
    ]
    lines = [(row["name"], row["role"], state) for row, state in zip(rows, states, strict=True)]
    click.echo(aligned(lines, "<18", "<16", gap=" "))


@models.command("info", short_help="A model's card: source, licence, use, what is in the store.")
@click.argument("name")
@store_option
@json_option
@guarded
def info(name, store, as_json):
    """NAME's card: where its owner publishes it, licence, usual file, use, substitute; and what the store has of it."""
    from pipelines.networks.store import ModelStore, ModelStoreError
    from scol_ops.models.catalogue import card_of

    try:
        card = card_of(name)
    except KeyError as error:
        raise ModelStoreError(error.args[0]) from None
    place = ModelStore(store)
    record = place.record(name) if place.has(name) else None
    if as_json:
        print_json({"card": asdict(card), "record": None if record is None else asdict(record)})
        return
    rows = [
        ("model", card.what),
        ("published", card.published),
        ("licence", card.licence),
        ("file", f"{card.file} ({card.megabytes:g} MB)"),
        ("used in", card.used_in),
        ("instead", card.instead),
    ]
    if record is None:
        rows.append(("store", f"not in {place.url}: scol models add {name} FILE"))
    click.echo(aligned(rows, "<10", gap=" "))
    if record is not None:
        _show(record, place.url, False)


@models.command("verify", short_help="Check models in the store: digest, entries, and a run of the network.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@store_option
@json_option
@guarded
def verify(names, store, as_json):
    """Read models of the store (all, unless some are named), check their digests and entries, and run them once.

    Exit status: 0 if all are well, 1 if one is not.
    """
    from pipelines.networks.store import ModelStore
    from scol_ops.models.files import WeightsError

    place, found = ModelStore(store), []
    for name in names or place.names():
        try:
            found.append({"name": name, "ok": True, "check": place.verify(name)})
        except WeightsError as error:
            found.append({"name": name, "ok": False, "problem": str(error)})
    if as_json:
        print_json(found)
    else:
        rows = [
            ("ok" if row["ok"] else "FAIL", row["name"], _check_words(row["check"]) if row["ok"] else row["problem"])
            for row in found
        ]
        if rows:
            click.echo(aligned(rows, "<4", "<18", gap=" "))
        else:
            tell(f"no models in {place.url}")
    sys.exit(0 if all(row["ok"] for row in found) else 1)


@models.command("remove", short_help="Take a model out of the store.")
@click.argument("name")
@store_option
@guarded
def remove(name, store):
    """Take NAME out of the store. Runs that named it keep their results; they cannot go on without it."""
    from pipelines.networks.store import ModelStore

    place = ModelStore(store)
    place.remove(name)
    click.echo(f"{name} is gone from {place.url}")


def _show(record: Any, url: str, as_json: bool) -> None:
    from scol_ops.models.catalogue import card_of

    if as_json:
        print_json(asdict(record))
        return
    facts = ", ".join(f"{k} {v}" for k, v in record.facts.items())
    digest = "the published digest" if record.digest == "published" else "no published digest is known"
    size = f"{record.source_bytes / 1e6:.1f} MB"
    rows = [
        ("in store", f"{record.name} in {url}, fingerprint {record.fingerprint}, added {record.added}"),
        ("network", f"{record.family}: {facts or 'one form'}; {record.parameters / 1e6:.1f} M parameters"),
        ("from", f"{record.source} ({size}), sha256 {record.source_sha256} ({digest})"),
    ]
    if record.codes:
        space = "" if record.w_fingerprint is None else f", W space {record.w_fingerprint}"
        rows.append(("codes", f"{record.codes} x 512{space}"))
    if record.skipped:
        names = ", ".join(f"{name} ({count})" for name, count in list(record.skipped.items())[:8])
        more = f" and {len(record.skipped) - 8} more" if len(record.skipped) > 8 else ""
        rows.append(("skipped", f"code in the file that was not run: {names}{more}"))
    rows += [("note", note) for note in record.notes]
    rows.append(("check", _check_words(record.check)))
    if card_of(record.name).role == "generator":
        rows.append(("samples", f"{url.rstrip('/')}/{record.name}.png"))
    rows.append(("licence", card_of(record.name).licence))
    click.echo(aligned(rows, "<10", gap=" "))


def _check_words(check: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in check.items())


