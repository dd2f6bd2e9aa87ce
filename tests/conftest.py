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


@pytest.fixture
def published_detector(tmp_path):
    """Make a detector of torchvision's with random weights and statistics, and the file in which it is published."""

    def build(builder: str, **arguments):
        import torch
        from torchvision.models import detection

        torch.manual_seed(0)
        few = {"box_score_thresh": 0.0, "box_detections_per_img": 4, "box_batch_size_per_image": 32}
        few |= {"rpn_pre_nms_top_n_test": 20, "rpn_post_nms_top_n_test": 20}
        network = getattr(detection, builder)(weights=None, weights_backbone=None, **few, **arguments)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.running_mean, 0, 0.1)
                torch.nn.init.uniform_(module.running_var, 0.5, 2)
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                # What torchvision does to the frozen batch norms of its first weights (overwrite_eps).
                module.eps = 0.0 if builder.endswith("_resnet50_fpn") else module.eps
        for name, parameter in network.named_parameters():
            if name.startswith("roi_heads.") and "predictor" in name:
                torch.nn.init.normal_(parameter, 0, 0.05)  # else all scores are alike, and their order is chance
        torch.save(network.state_dict(), tmp_path / "published.pth")
        return network.eval(), str(tmp_path / "published.pth")

    return build


@pytest.fixture
def same_as_published(published_detector):
    """Check that a detector has the parameters, detections and losses of torchvision's with the same weights."""

    def check(architecture, network: str, builder: str, parameters: int, targets: list[dict]) -> None:
        import torch

        sizes = {"min_size": 64, "max_size": 96}
        theirs, path = published_detector(builder, **sizes)
        few = {"score_threshold": 0.0, "detections": 4, "test_proposals": 20, "sampled_regions": 32}
        ours = architecture(network=network, weights=path, **few, **sizes).eval()
        assert sum(parameter.numel() for parameter in ours.parameters()) == parameters
        generator = torch.Generator().manual_seed(1)
        images = [torch.rand(3, *size, generator=generator).double() for size in ((70, 90), (96, 64))]
        with torch.no_grad():
            expected, found = theirs.double()(images), ours.double()(images)
        # The variances that take up epsilon were rounded to float32.
        close = {"rtol": 1e-4, "atol": 1e-3}
        for one, other in zip(expected, found, strict=True):
            assert len(one["boxes"]) >= 1
            assert one.keys() == other.keys()
            for key, value in one.items():
                torch.testing.assert_close(other[key], value, msg=key, **close)
        frozen = [m for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm2d) and "v2" not in network]
        theirs.train()
        for module in frozen:  # torchvision freezes them where it loads published weights
            module.eval()
        truths = [target | {"boxes": target["boxes"].double()} for target in targets]
        losses = []
        for losses_of in (theirs, ours.train().losses):
            torch.manual_seed(2)  # of the regions that are drawn
            losses.append(losses_of(images, truths))
        assert losses[0].keys() == losses[1].keys()
        for key, value in losses[0].items():
            assert value > 0, key
            torch.testing.assert_close(losses[1][key], value, msg=key, **close)

    return check
