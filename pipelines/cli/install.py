"""Commands about the installation."""

from __future__ import annotations

import sys

import click

from pipelines.cli.options import configured, guarded, json_option, print_json
from pipelines.run.text_tables import aligned


@click.command(short_help="Check the installation.")
@click.option("--out", metavar="OUT", default=".", help="Where space on the disk is checked.")
@json_option
@guarded
def doctor(out, as_json):
    """Check Python, PyTorch, Ray (starts one), FAISS, weights, GPU and disk."""
    from pipelines.jobs import doctor as checks

    checks = checks.doctor(out)
    if as_json:
        print_json(checks)
    else:
        rows = [("ok" if check["ok"] else "FAIL", check["name"], check["words"]) for check in checks]
        click.echo(aligned(rows, "<4", "<14", gap=" "))
    sys.exit(0 if all(check["ok"] for check in checks) else 1)


@click.command("config", short_help="Print all settings with meanings and ranges.")
@click.option("--markdown", is_flag=True, help="Document every setting (docs/configuration.md) instead.")
@json_option
@configured
@guarded
def show_config(markdown, as_json, load):
    """Print the settings of a profile as a TOML file, each with its meaning and range."""
    from pipelines.config.show import to_markdown, to_toml

    config = load()
    if markdown:
        click.echo(to_markdown(), nl=False)
    elif as_json:
        print_json(config.model_dump(mode="json"))
    else:
        click.echo(to_toml(config), nl=False)


@click.command(short_help="Protect a small archive of generated people.")
@click.option("--folder", default="build/demo", help="Where the archive, its protected copy and the report go.")
@configured
@guarded
def demo(folder, load):
    """Draw a small archive of people who do not exist, protect it, and show the result."""
    from pipelines.jobs.demo import run_demo

    sys.exit(run_demo(folder, load()))
