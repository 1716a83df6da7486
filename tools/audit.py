"""Known weaknesses of the locked versions, by pip-audit: a line a finding, or one line that says why it does not know.

    python tools/audit.py [OPTION OF PIP-AUDIT ...]

Ends with 0 where every version was looked up and none is weak, 1 with findings, 2 where the answer is not known.
pip-audit alone ends with 0 where its service knows none of the packages (a mirror of the index often has no such
service), and in a traceback where the service does not answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"


def answer(lock: Path, options: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """What pip-audit says of each package, and its last line of talk."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--require-hashes",
               "--disable-pip", "-r", str(lock), *options]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    talk = (done.stderr.strip().splitlines() or [f"no output, status {done.returncode}"])[-1]
    try:
        return json.loads(done.stdout)["dependencies"], talk
    except (ValueError, KeyError):
        return [], talk


def judged(packages: Sequence[dict[str, Any]], talk: str) -> tuple[list[str], int]:
    """Lines to print and the exit status."""
    if not packages:
        return [f"audit: not done, pip-audit gave no answer: {talk[:200]}"], 2
    lines = []
    for one in packages:
        for weak in one.get("vulns", []):
            mended = ", ".join(weak["fix_versions"]) or "no version"
            lines.append(f"{one['name']} {one['version']}: {weak['id']}, mended in {mended}")
    unknown = [one["name"] for one in packages if "skip_reason" in one]
    known = len(packages) - len(unknown)
    if unknown:
        few = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        last = f"the service knows nothing of {len(unknown)} of {len(packages)} packages ({few})"
    else:
        last = f"all {known} packages looked up"
    lines.append(f"audit: {last}; {len(lines)} known weaknesses" + ("" if known else ", for nothing was looked up"))
    return lines, 1 if len(lines) > 1 else 2 if unknown else 0


def main(options: Sequence[str]) -> int:
    """Prints the lines, returns the status."""
    lines, status = judged(*answer(LOCK, options))
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
