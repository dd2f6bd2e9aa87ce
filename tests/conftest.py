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


@pytest.fixture
def published_outputs(tmp_path):
    """Check that a network of torchvision's with random weights, saved as it publishes them, gives the same outputs."""

    def check(theirs, architecture, arguments: dict, size: int) -> None:
        import torch

        torch.manual_seed(0)
        for module in theirs.modules():  # running statistics that are not those of a fresh network
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        torch.save(theirs.state_dict(), tmp_path / "published.pth")
        ours = architecture(**arguments, weights=str(tmp_path / "published.pth")).eval().double()
        images = torch.rand(2, 3, size, size, dtype=torch.float64)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
        expected = theirs.eval().double()((images - mean) / std)
        assert expected.std() > 0, "outputs that are all alike prove nothing"
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-6)
        assert ours.class_names[1] == "goldfish"

    return check
