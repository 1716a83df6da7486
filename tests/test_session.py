"""The conditions that conftest.py promises really hold, in this process and in its children."""

from __future__ import annotations

import _socket
import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest


def test_nothing_outside_this_machine_is_reached(network_asked: list[str]) -> None:
    with pytest.raises(OSError, match="without a network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(OSError, match="without a network"):
        socket.getaddrinfo("example.org", 80)
    with pytest.raises(OSError, match="without a network"):
        urllib.request.urlopen("http://example.org", timeout=1)
    with socket.socket() as plain, pytest.raises(OSError, match="without a network"):
        plain.connect_ex(("192.0.2.1", 80))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        for ask in (lambda: plain.sendto(b"x", ("192.0.2.1", 53)), lambda: plain.sendto(b"x", 0, ("192.0.2.1", 53)),
                    lambda: plain.sendmsg([b"x"], [], 0, ("192.0.2.1", 53))):  # fmt: skip
            with pytest.raises(OSError, match="without a network"):
                ask()
    for ask in (socket.gethostbyname, socket.gethostbyname_ex, socket.gethostbyaddr):
        with pytest.raises(OSError, match="without a network"):
            ask("example.org")
    with pytest.raises(OSError, match="without a network"):
        socket.getnameinfo(("192.0.2.1", 80), 0)
    with contextlib.closing(_socket.socket()) as below, pytest.raises(OSError, match="without a network"):
        below.connect(("192.0.2.1", 80))
    assert set(network_asked) == {"192.0.2.1", "example.org"}


def test_an_event_loop_reaches_nothing_either(network_asked: list[str]) -> None:
    with pytest.raises(OSError, match="without a network"):
        asyncio.run(asyncio.open_connection("192.0.2.1", 80))
    assert network_asked == ["192.0.2.1"]


def test_an_error_that_was_swallowed_fails_the_test(tmp_path: Path, root: Path) -> None:
    """Code that takes "no network" for an answer would otherwise hide that it asked."""
    (tmp_path / "conftest.py").write_text((root / "tests" / "conftest.py").read_text())
    (tmp_path / "test_asks.py").write_text("import urllib.request\n\ndef test_asks():\n    try:\n"
                                           "        urllib.request.urlopen('http://example.org')\n"
                                           "    except OSError:\n        pass\n\n"
                                           "def test_asks_nothing(): pass\n")  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "asked the network for example.org" in done.stdout
    assert "2 passed, 1 error" in done.stdout


def test_this_machine_is_reached() -> None:
    """Processes of one run talk over the loopback."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5) as client,
    ):
        assert client.getpeername() == server.getsockname()
    with pytest.raises(FileNotFoundError), socket.socket(socket.AF_UNIX) as local:
        local.connect("/nowhere")


def test_one_thread_and_no_hub_here_and_in_children() -> None:
    import torch

    assert torch.get_num_threads() == 1
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['HF_HUB_OFFLINE'], os.environ['MPLBACKEND'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1", "Agg"]
    assert not os.path.exists(os.path.join(os.environ["HF_HOME"], "hub"))  # noqa: PTH110, PTH118 (as the hub does)


@pytest.mark.parametrize("which", [1, 2])
def test_each_test_starts_from_the_same_state(which: int) -> None:
    import torch

    assert np.random.randint(1 << 30) == np.random.RandomState(0).randint(1 << 30)  # noqa: NPY002
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(0)).item()


def test_a_warning_is_an_error() -> None:
    with pytest.raises(DeprecationWarning):
        warnings.warn("old", DeprecationWarning, stacklevel=1)
