"""The command ``scol``. Thin: parses, calls, prints.

Each command lies in a module that is imported when it is wanted, and imports heavy packages inside its function, so
that ``scol --help`` answers at once.
"""

from __future__ import annotations

import importlib

import click

# By name: the module below pipelines.cli that holds the command, and its name there. `--help` lists them in this order.
_COMMANDS = {
    "protect": ("protect", "protect"),
    "gallery": ("gallery", "gallery"),
    "report": ("runs", "report"),
    "status": ("runs", "status"),
    "cancel": ("runs", "cancel"),
    "retry": ("runs", "retry"),
    "errors": ("runs", "errors"),
    "purge": ("runs", "purge"),
    "plan": ("protect", "plan"),
    "models": ("models", "models"),
    "doctor": ("install", "doctor"),
    "config": ("install", "show_config"),
    "demo": ("install", "demo"),
    "evaluate": ("evaluate", "evaluate"),
    "experiment": ("experiment", "experiment"),
}


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, command = _COMMANDS[name]
        return getattr(importlib.import_module(f"pipelines.cli.{module}"), command)


_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


@click.group(cls=_LazyGroup, context_settings=_CONTEXT)
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


if __name__ == "__main__":
    main()
