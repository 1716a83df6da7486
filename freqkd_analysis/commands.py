"""What both command lines share: an application with `--version`, options in panels, `--json`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from freqkd_analysis import __version__

OUTPUT = "Run and output"
"""The panel of options that say where a run goes; the one of an option that names none."""

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def application(name: str, help_: str) -> typer.Typer:
    """An empty command line that knows its version.

    Example:
        >>> application("freqkd-analyze", "Where do they differ?").info.name
        'freqkd-analyze'
    """
    app = typer.Typer(name=name, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=help_)
    app.callback()(_top)
    return app


def option(*names: str, panel: str = OUTPUT, **more: Any) -> Any:
    """A typer option under its panel of the help."""
    return typer.Option(*names, rich_help_panel=panel, **more)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"freqkd {__version__}")
        raise typer.Exit


def _top(
    # By a callback of its own: a command line without a command is refused before the body of this function runs.
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass
