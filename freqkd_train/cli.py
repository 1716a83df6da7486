"""`freqkd-train`: holds the name until distillation arrives, and says so."""

from __future__ import annotations

import argparse

from freqkd_analysis import __version__

NOT_YET = f"freqkd-train: distillation is not in freqkd {__version__} yet; for the analysis: freqkd-analyze --help"


def main(arguments: list[str] | None = None) -> None:
    """Answer --help and --version; anything else ends with one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="freqkd-train", description=NOT_YET, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"freqkd {__version__}")
    parser.parse_known_args(arguments)
    parser.exit(2, NOT_YET + "\n")
