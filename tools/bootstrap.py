"""Make `.venv` and install freqkd into it, with nothing but a Python and its standard library.

    python3 tools/bootstrap.py run     # what `make analyze` and `make install` need
    python3 tools/bootstrap.py test    # the same with the test extra

Once done, a call returns at once until pyproject.toml changes; a set-up that was interrupted starts over. Debian
splits ensurepip from python3, so pip may have to come from the package index. Talk goes to stderr.
This file must also be readable by a Python that is too old, to say so: no new syntax.
"""

from __future__ import annotations

import fcntl
import hashlib
import html
import importlib.util
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import venv
from collections.abc import Iterator
from configparser import ConfigParser, Error
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "freqkd-setup.json"
UNFINISHED = VENV / "freqkd-setup.unfinished"
EXTRAS = {"run": "", "test": "[test]"}
OLDEST, NEWEST = (3, 11), (3, 13)
CANDIDATES = ("python3.12", "python3.13", "python3.11")
ROOM = 8 << 30  # bytes; torch with its CUDA libraries unpacks to about 6 GB


def say(text: str) -> None:
    print("freqkd: " + text, file=sys.stderr, flush=True)


def main(arguments: list) -> int:
    if len(arguments) != 1 or arguments[0] not in EXTRAS:
        say("expected one of {}, got {}".format(", ".join(EXTRAS), " ".join(arguments) or "nothing"))
        return 2
    mode = arguments[0]
    with only_one() as lock:
        if ready(mode):
            return 0
        if not OLDEST <= sys.version_info[:2] <= NEWEST:
            return run_with_another_python(arguments)
        try:
            set_up(mode, lock)
        except KeyboardInterrupt:
            say("set-up interrupted; the next call starts it over")
            return 130
        except subprocess.CalledProcessError as error:
            say(f"set-up failed: pip ended with status {error.returncode} (message above); the next call starts over")
            return 1
        except (OSError, ValueError) as error:
            say(f"set-up failed: {error}; the next call starts over")
            return 1
    return 0


@contextmanager
def only_one() -> Iterator[int]:
    """Of two set-ups at once, the second waits for the first and then finds the work done."""
    lock = os.open(str(ROOT), os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is at work here; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def wanted() -> dict:
    """What a finished set-up must have seen: this place (scripts hold its path) and this pyproject.toml."""
    return {"root": str(ROOT), "pyproject": hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()}


def stamp() -> dict:
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def ready(mode: str) -> bool:
    """Is `.venv` complete for `mode`? The test mode holds all that the run mode needs."""
    found = stamp()
    if not PYTHON.exists() or UNFINISHED.exists() or found.pop("mode", None) not in (mode, "test"):
        return False
    return found == wanted()


def run_with_another_python(arguments: list) -> int:
    """Hand over to the first suitable Python on PATH; one line when there is none."""
    have = ".".join(map(str, sys.version_info[:3]))
    limits = "{}.{} to {}.{}".format(*OLDEST, *NEWEST)
    for name in CANDIDATES:
        path = shutil.which(name)
        # A name on PATH may be a shim that runs nothing; only one that answers counts.
        if path and subprocess.run([path, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0:
            say(f"Python {have} is outside {limits}; using {path}")
            os.execv(path, [path, str(Path(__file__).resolve()), *arguments])
    say(
        f"expected Python {limits}, got {have} and none of {', '.join(CANDIDATES)} on PATH; "
        "install one, or say make PYTHON=/path/to/python"
    )
    return 2


def set_up(mode: str, lock: int) -> None:
    started = time.monotonic()
    if UNFINISHED.exists() or (VENV.exists() and (not PYTHON.exists() or stamp().get("root", str(ROOT)) != str(ROOT))):
        shutil.rmtree(VENV)
    fresh = not PYTHON.exists()
    VENV.mkdir(exist_ok=True)
    if fresh:
        UNFINISHED.touch()
        version = ".".join(map(str, sys.version_info[:3]))
        say(f"setting up .venv with Python {version}: about 3 GB to download and 6 GB on disk, some minutes, once")
        if shutil.disk_usage(str(ROOT)).free < ROOM:
            say("less than 8 GB are free here; the installation may not fit")
        with_pip = importlib.util.find_spec("ensurepip") is not None
        venv.EnvBuilder(with_pip=with_pip, symlinks=True).create(str(VENV))
    else:
        say(f"bringing .venv up to date for `{mode}`")
        UNFINISHED.touch()
    if not has_pip():
        install_pip()
    target = f"{ROOT}{EXTRAS[mode]}"
    pip(lock, "install", "-qq", "--disable-pip-version-check", "--no-input", "--editable", target)
    # An update for `run` leaves the test extra of an earlier set-up in place, but perhaps not at its new bounds.
    STAMP.write_text(json.dumps({**wanted(), "mode": mode}), encoding="utf-8")
    UNFINISHED.unlink()
    say(f"set-up done in {time.monotonic() - started:.0f} s")


def has_pip() -> bool:
    return subprocess.run([str(PYTHON), "-c", "import pip"], stderr=subprocess.DEVNULL).returncode == 0


def pip(lock: int, *arguments: str) -> None:
    """Run pip; a counter on a terminal, or a line a minute in a log, shows that it still works."""
    # pip holds the lock too: should this process be killed, no other set-up starts beside the pip it leaves behind.
    process = subprocess.Popen([str(PYTHON), "-m", "pip", *arguments], pass_fds=(lock,))
    terminal, seconds = sys.stderr.isatty(), 0
    try:
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
                break
            seconds += 1
            if terminal:
                print(f"\rfreqkd: installing, {seconds} s ", end="", file=sys.stderr, flush=True)
            elif seconds % 60 == 0:
                say(f"installing, {seconds} s")
    except KeyboardInterrupt:
        process.wait()  # pip had the same signal and tidies up after itself
        raise
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, "pip")


def install_pip() -> None:
    """Fetch pip's wheel from the index that pip itself would use, check it, and let it install itself."""
    index = setting("index-url", "https://pypi.org/simple").rstrip("/") + "/pip/"
    say("this Python comes without pip; fetching it from the package index")
    page, kind, base = fetch(index, accept="application/vnd.pypi.simple.v1+json, text/html;q=0.5")
    url, digest = newest_wheel(page.decode(), kind, base)
    wheel, _, _ = fetch(url)
    got = hashlib.sha256(wheel).hexdigest()
    if got != digest:
        raise ValueError(f"pip's wheel does not match the index: expected sha256 {digest}, got {got}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / urllib.parse.unquote(url.rsplit("/", 1)[1])
        path.write_bytes(wheel)
        subprocess.run([str(PYTHON), f"{path}/pip", "install", "-qq", "--no-index", str(path)], check=True)


def newest_wheel(page: str, kind: str, base: str) -> tuple:
    """(url, sha256) of the newest final pip wheel in a simple-index page, JSON or HTML."""
    if "json" in kind:
        files = [
            (f["url"], f["hashes"].get("sha256", ""), f.get("requires-python") or "", f.get("yanked"))
            for f in json.loads(page)["files"]
        ]
    else:
        files = []
        for tag in re.findall(r"<a\s[^>]*>", page):
            attributes = {k: html.unescape(v) for k, v in re.findall(r'([\w-]+)\s*=\s*"([^"]*)"', tag)}
            url, _, fragment = attributes.get("href", "").partition("#")
            digest = fragment[len("sha256=") :] if fragment.startswith("sha256=") else ""
            files.append((url, digest, attributes.get("data-requires-python", ""), "data-yanked" in attributes))
    found = []
    for url, digest, requires, yanked in files:
        name = re.search(r"/?pip-(\d+(?:\.\d+)*)-py3-none-any\.whl$", url)
        least = re.search(r">=\s*3\.(\d+)", requires)
        if name and digest and not yanked and (least is None or int(least.group(1)) <= sys.version_info[1]):
            found.append((tuple(map(int, name.group(1).split("."))), urllib.parse.urljoin(base, url), digest))
    if not found:
        raise ValueError(f"no wheel of pip for this Python at {base}; set PIP_INDEX_URL, or install python3-venv")
    return max(found)[1:]


def fetch(url: str, accept: str = "*/*") -> tuple:
    """(body, content type, final url)."""
    certificates = setting("cert", "") or None
    context = ssl.create_default_context(cafile=certificates)
    request = urllib.request.Request(url, headers={"Accept": accept, "User-Agent": "freqkd-bootstrap"})
    try:
        with urllib.request.urlopen(request, timeout=60, context=context) as answer:
            return answer.read(), answer.headers.get("Content-Type", ""), answer.geturl()
    except urllib.error.URLError as error:
        hint = "; on Debian, install ca-certificates" if isinstance(error.reason, ssl.SSLError) else ""
        raise ValueError(f"no answer from the package index at {url} ({error.reason}){hint}") from error


def setting(name: str, default: str) -> str:
    """A pip setting as pip would find it: environment first, then the user's file, then the system's."""
    value = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if value:
        return value
    home = Path("~").expanduser()
    configured = os.environ.get("PIP_CONFIG_FILE", "")
    for path in (configured, home / ".config/pip/pip.conf", home / ".pip/pip.conf", "/etc/pip.conf"):
        parser = ConfigParser(interpolation=None)
        try:
            parser.read(path)
        except Error:
            continue
        for section in ("install", "global"):
            if parser.has_option(section, name):
                return parser.get(section, name)
    return default


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
