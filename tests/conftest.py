"""One set of conditions for every test: one thread, no network, no weights of the user's, no colour, seeded.

Real pairs and weights come from the folder that FREQKD_TEST_DATA names (data/pairs, data/benchmarks, weights);
without it the tests that need them are skipped by name.
"""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports a numerical library: they read these once.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("freqkd", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("freqkd")

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # for child processes too, which the socket guard below does not reach
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "Agg",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "COLUMNS": "120",
}
_COLOUR = ("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "GITHUB_ACTIONS")


def pytest_configure(config: pytest.Config) -> None:
    """Runs once a process, so that doctests in the packages are under the same conditions as the tests."""
    os.environ.update(_ENVIRONMENT)
    # An empty cache: a run of the suite must not depend on what its user has downloaded before.
    os.environ["HF_HOME"] = str(config.rootpath / ".pytest_cache" / "no-hub")
    for name in _COLOUR:
        os.environ.pop(name, None)
    _guard_sockets()


_ASKED: list[str] = []
"""Hosts that were asked for since the test began, whatever became of the error."""


def _guard_sockets() -> None:
    """Let a socket reach this machine alone; everything else fails at once and says so.

    The interpreter itself reports every connection and question for a name, whichever library makes it and whatever
    reference to `socket` it holds; a hook, once added, stays.
    """
    of_this_machine = {"localhost", "::1", "", "None", socket.gethostname()}

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            connection, address = arguments
            if address is None or connection.family == socket.AF_UNIX:  # None: where it is connected to
                return
            host = address[0]
        elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
            host = arguments[0]
        elif event == "socket.getnameinfo":
            host = arguments[0][0]
        else:
            return
        name = host.decode() if isinstance(host, bytes) else str(host)
        if name not in of_this_machine and not name.startswith("127."):
            _ASKED.append(name)
            raise OSError(f"the tests run without a network, but something asked for {name}")

    sys.addaudithook(watch)


@pytest.fixture
def network_asked() -> Iterator[list[str]]:
    """The hosts that this test has asked for. Who takes it does so on purpose; any other test fails for it."""
    yield _ASKED
    _ASKED.clear()


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    """Fails a test that asked for a host, even where the code under test took the error for an answer."""
    _ASKED.clear()
    yield
    if _ASKED:
        pytest.fail(f"asked the network for {', '.join(sorted(set(_ASKED)))}; tests run without one", pytrace=False)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Every test starts from the same global random state and one thread, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (third parties may draw from it; ours use generators)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder FREQKD_TEST_DATA. Skips without the variable; fails when it names no folder."""
    named = os.environ.get("FREQKD_TEST_DATA")
    if not named:
        pytest.skip("real data: FREQKD_TEST_DATA is not set")
    folder = Path(named).resolve()
    if not folder.is_dir():
        pytest.fail(f"FREQKD_TEST_DATA is {named}, which is not a folder")
    return folder


def _part(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.fail(f"FREQKD_TEST_DATA holds no {folder.name} at {folder}")
    return folder


@pytest.fixture(scope="session")
def kit(real_data: Path) -> Path:
    """Real pairs: visible/, infrared/ and manifest.csv, the root of `kit:ROOT`."""
    return _part(real_data / "data" / "pairs")


@pytest.fixture(scope="session")
def benchmarks(real_data: Path) -> Path:
    """Real samples in the layouts of public data sets."""
    return _part(real_data / "data" / "benchmarks")


@pytest.fixture(scope="session")
def weights(real_data: Path) -> Path:
    """Real trained weights: *.safetensors with manifest.json."""
    return _part(real_data / "weights")
