"""No test reaches the network, and none leaves a file in the checkout."""

import os
import socket
from pathlib import Path

import pytest

# Before torch is imported: several processes on few cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def _closed_network(monkeypatch):
    """Let connections through to this machine only."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Run in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def zoo_data() -> Path:
    """The folder of real data, or a skip that says what is missing."""
    if not os.environ.get("ZOO_DATA"):
        pytest.skip("ZOO_DATA is not set: it names the folder with real data")
    return Path(os.environ["ZOO_DATA"])
