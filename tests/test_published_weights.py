"""Weights that torchvision published: by name, from its cache, from a server, and what can go wrong."""

import contextlib
import hashlib
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torchvision.models import SqueezeNet1_0_Weights, squeezenet1_0

from zoo import LeNet, SqueezeNet
from zoo.running import downloading


@pytest.fixture
def cache(tmp_path):
    """An empty torch hub."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


@pytest.fixture
def published(tmp_path):
    """A network of torchvision's, in a file as it publishes them: named by the first digits of its hash."""
    torch.manual_seed(0)
    network = squeezenet1_0(weights=None)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    return network, (tmp_path / "w.pth").rename(tmp_path / f"squeezenet1_0-{digest[:8]}.pth")


class Asked(list):
    """Paths that were asked for."""

    def __init__(self):
        super().__init__()
        self.faults = []  # what goes wrong with the next ones


@pytest.fixture
def server(published, monkeypatch):
    """Serves that file in place of torchvision's."""

    asked = Asked()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            fault = asked.faults.pop(0) if asked.faults else ""
            if fault.isdecimal():
                self.send_error(int(fault))
            elif fault:
                content = path.read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                getattr(self, fault)(content)
            else:
                super().do_GET()

        def short(self, content):
            self.wfile.write(content[:-1])

        def wrong(self, content):
            self.wfile.write(content[:-1] + b"?")

        def stall(self, content):
            self.wfile.write(content[:1000])
            time.sleep(1)

        def trickle(self, content):
            with contextlib.suppress(OSError):  # the client has given up
                for byte in content[:100]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.03)

        def log_message(self, *arguments):
            pass

    _, path = published
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=path.parent))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{http.server_port}/{path.name}"
    monkeypatch.setattr(SqueezeNet1_0_Weights.IMAGENET1K_V1.value, "url", url)
    monkeypatch.setattr(downloading, "PAUSE", 0.0)
    monkeypatch.setattr(downloading, "SILENCE", 0.4)
    yield asked
    http.shutdown()
    http.server_close()


@pytest.mark.parametrize("name", ["DEFAULT", "IMAGENET1K_V1"])
def test_a_name_is_downloaded_once_and_then_read_from_the_cache(name, cache, server, published):
    network, path = published
    for _ in range(2):
        model = SqueezeNet(weights=name)
        assert torch.equal(model.head.weight, network.classifier[1].weight)
    assert len(server) == 1
    assert (cache / path.name).is_file()
    assert model.class_names[:2] == ["tench", "goldfish"]
    assert model.hparams.class_names == model.class_names, "a checkpoint must carry them"


@pytest.mark.parametrize("fault", ["503", "short", "wrong", "stall", "trickle"])
def test_a_fault_that_passes_is_tried_again(fault, cache, server, published):
    network, path = published
    server.faults.append(fault)
    model = SqueezeNet(weights="DEFAULT")
    assert torch.equal(model.head.weight, network.classifier[1].weight)
    assert len(server) == 2
    assert sorted(file.name for file in cache.iterdir() if file.suffix != ".lock") == [path.name]


@pytest.mark.parametrize(
    ("fault", "reason", "times"),
    [
        ("404", "404", 1),
        ("503", "503", 2),
        ("short", "invalid hash value", 2),
        ("wrong", "invalid hash value", 2),
        ("stall", "timed out", 2),
        ("trickle", "too slow", 2),
    ],
)
def test_a_fault_that_stays_is_named_and_leaves_nothing(fault, reason, times, cache, server):
    server.faults.extend([fault] * times)
    with pytest.raises(FileNotFoundError, match=f"could not be downloaded from http.*{reason}.*Bring squeezenet1_0-"):
        SqueezeNet(weights="DEFAULT")
    assert len(server) == times
    assert [file.name for file in cache.iterdir() if file.suffix != ".lock"] == []


def test_what_a_killed_download_left_is_removed_by_the_next_of_that_file(cache, server, published):
    for name in (published[1].name, "other.pth"):
        (cache / f".download-{name}-x").mkdir(parents=True)
    SqueezeNet(weights="DEFAULT")
    left = sorted(file.name for file in cache.iterdir() if file.suffix != ".lock")
    assert left == [".download-other.pth-x", published[1].name]


def test_an_official_file_in_the_cache_needs_no_network(cache, published):
    network, path = published
    cache.mkdir(parents=True)
    path.rename(cache / "squeezenet1_0-b66bff10.pth")
    model = SqueezeNet(num_classes=5, weights="DEFAULT")
    assert torch.equal(model.backbone.network.features[0].weight, network.features[0].weight)
    assert model.class_names == ["0", "1", "2", "3", "4"]


def test_without_a_network_the_error_says_which_file_to_bring_and_where_to(cache, monkeypatch):
    monkeypatch.setattr(downloading, "PAUSE", 0.0)
    monkeypatch.setattr(
        SqueezeNet1_0_Weights.IMAGENET1K_V1.value, "url", "http://127.0.0.1:9/squeezenet1_0-b66bff10.pth"
    )
    with pytest.raises(
        FileNotFoundError, match=r"Bring squeezenet1_0-b66bff10\.pth by hand and put it into .*checkpoints"
    ):
        SqueezeNet(weights="DEFAULT")
    assert not list(cache.glob("*.pth"))


def test_a_model_of_other_channels_takes_weights_by_name(cache, published):
    network, path = published
    cache.mkdir(parents=True)
    path.rename(cache / "squeezenet1_0-b66bff10.pth")
    kernels = SqueezeNet(in_channels=4, weights="IMAGENET1K_V1").backbone.network.features[0].weight
    torch.testing.assert_close(kernels, network.features[0].weight[:, [0, 1, 2, 0]] * 3 / 4)


def test_a_damaged_download_is_refused_and_removed(cache, server, published):
    _, path = published
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FileNotFoundError, match="invalid hash value"):
        SqueezeNet(weights="DEFAULT")
    assert not list(cache.glob("*.pth"))


def test_names_that_there_are_not():
    with pytest.raises(ValueError, match="no weights IMAGENET1K_V7: there are IMAGENET1K_V1, DEFAULT"):
        SqueezeNet(weights="IMAGENET1K_V7")
    with pytest.raises(ValueError, match="torchvision publishes no weights for this architecture: give a file"):
        LeNet(weights="DEFAULT")


def test_rows_of_classes_with_the_same_name_are_kept(published):
    network, path = published
    model = SqueezeNet(3, ["my dog", "tench", "goldfish"], weights=str(path), keep_matching_classes=True)
    assert torch.equal(model.head.weight[1:], network.classifier[1].weight[:2])
    assert torch.equal(model.head.bias[1:], network.classifier[1].bias[:2])


def test_values_that_are_no_numbers_are_refused(published):
    network, path = published
    with torch.no_grad():
        network.features[0].weight[0] = torch.nan
    torch.save(network.state_dict(), path)
    with pytest.raises(ValueError, match=r"no numbers in features\.0\.weight"):
        SqueezeNet(weights=str(path))
