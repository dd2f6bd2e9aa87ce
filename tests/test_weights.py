"""Weights files, head replacement, the hub, and files that do not fit."""

import json
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors import safe_open

import zoo
from zoo import LeNet
from zoo.weights import describe, load_weights, locate, read_weights


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LeNet(num_classes=3, class_names=["cat", "dog", "owl"], image_size=8).eval()


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "model.safetensors"
    zoo.save(model, path, recipe="lenet/test", metrics={"test/accuracy": 0.5}, licence="CC0-1.0")
    return path


def test_a_weights_file_rebuilds_the_model_bit_for_bit(model, saved):
    again = zoo.load(saved)
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(again(images), model(images))
    assert again.class_names == ["cat", "dog", "owl"]
    assert not again.training


def test_the_header_says_what_the_file_is(saved):
    with safe_open(saved, framework="pt") as file:
        header = file.metadata()
    assert header["class_path"] == "zoo.LeNet"
    assert json.loads(header["arguments"])["image_size"] == 8
    assert json.loads(header["class_names"]) == ["cat", "dog", "owl"]
    assert json.loads(header["metrics"]) == {"test/accuracy": 0.5}
    assert (header["recipe"], header["licence"]) == ("lenet/test", "CC0-1.0")


def rewrite_header(path, **changes):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] |= changes
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])


@pytest.mark.parametrize("class_path", ["os.system", "zoo.load", "zoo.weights.save", "", "zoo.__builtins__"])
def test_a_header_cannot_choose_what_is_called(saved, class_path):
    rewrite_header(saved, class_path=class_path)
    with pytest.raises(ValueError, match=r"model\.safetensors names .* as its class, expected one of zoo\."):
        zoo.load(saved)


def test_arguments_that_do_not_fit_are_an_error(saved):
    rewrite_header(saved, arguments='{"depth": 5}')
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit zoo\.LeNet.*depth"):
        zoo.load(saved)


def rewrite_arguments(model, path, change):
    """The model's file, a checkpoint or a weights file, with other arguments."""
    described = describe(model)
    change(described["arguments"])
    if path.suffix == ".ckpt":
        torch.save({"state_dict": model.state_dict(), "zoo": described}, path)
    else:
        zoo.save(model, path)
        rewrite_header(path, arguments=json.dumps(described["arguments"]))


@pytest.mark.parametrize("file", ["w.ckpt", "w.safetensors"])
def test_an_argument_that_nobody_knows_is_named_with_the_nearest(model, tmp_path, file):
    rewrite_arguments(model, tmp_path / file, lambda arguments: arguments.update(image_sizes=8))
    with pytest.raises(ValueError, match=r"argument 'image_sizes'.*did you mean image_size\?$") as caught:
        zoo.load(tmp_path / file)
    assert str(caught.value).startswith(f"{tmp_path / file} does not fit zoo.LeNet: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["w.ckpt", "w.safetensors"])
def test_an_argument_that_is_missing_is_named_with_what_is_taken(model, tmp_path, file):
    rewrite_arguments(model, tmp_path / file, lambda arguments: arguments.pop("in_channels"))
    with pytest.warns(UserWarning, match=rf"{file} lacks arguments of LeNet, for which are taken: in_channels=1$"):
        assert zoo.load(tmp_path / file).hparams["in_channels"] == 1


def test_a_whole_file_is_read_without_a_warning(model, saved, recwarn):
    zoo.load(saved)
    assert not [warning for warning in recwarn if "lacks" in str(warning.message)]


def test_every_damaged_weights_file_is_an_error_that_names_it(saved, tmp_path):
    whole = saved.read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    for cut in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"damaged\.safetensors"):
            zoo.load(damaged)
    damaged.write_bytes(struct.pack("<Q", 2**60) + whole[8:])
    with pytest.raises(ValueError, match=r"damaged\.safetensors"):
        zoo.load(damaged)


def test_a_failed_save_leaves_the_old_file(model, saved, monkeypatch):
    before = saved.read_bytes()

    def fails(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        zoo.save(model, saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_another_number_of_classes_gets_a_fresh_head_and_only_that(model, saved):
    torch.manual_seed(7)
    plain = LeNet(num_classes=5, image_size=8)
    torch.manual_seed(7)
    started = LeNet(num_classes=5, image_size=8, weights=str(saved))
    for name, value in started.state_dict().items():
        if name.startswith("head."):
            assert torch.equal(value, plain.state_dict()[name])
        else:
            assert torch.equal(value, model.state_dict()[name])
    assert "weights" not in started.hparams


def test_rows_of_classes_with_the_same_name_are_kept_when_asked(model, saved):
    names = ["owl", "ape", "cat", "eel"]
    torch.manual_seed(7)
    fresh = LeNet(num_classes=4, class_names=names, image_size=8)
    kept = LeNet(num_classes=4, class_names=names, image_size=8)
    kept.load_state_dict(fresh.state_dict())
    transfer = load_weights(kept, str(saved), keep_matching_classes=True)
    for key in ("weight", "bias"):
        ours, old, new = (dict(m.head.named_parameters())[key] for m in (kept, model, fresh))
        assert torch.equal(ours[0], old[2])
        assert torch.equal(ours[2], old[0])
        assert torch.equal(ours[1], new[1])
        assert torch.equal(ours[3], new[3])
    assert transfer.resized["head.weight"].startswith("2 of 4 rows")
    assert transfer.fresh == []


def test_the_transfer_is_reported(model, saved):
    transfer = load_weights(LeNet(num_classes=5, image_size=8), str(saved))
    assert transfer.fresh == ["head.weight", "head.bias"]
    assert transfer.loaded == [name for name in model.state_dict() if not name.startswith("head.")]
    assert str(transfer) == "6 tensors loaded; head.weight: fresh; head.bias: fresh"


def test_tensors_outside_the_head_that_do_not_fit_are_named(saved):
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit LeNet: backbone\.hidden\.weight has shape"):
        LeNet(num_classes=3, image_size=28, weights=str(saved))


def test_missing_and_unknown_tensors_are_named(model, tmp_path):
    state = model.state_dict()
    state["backbone.extra"] = state.pop("backbone.conv1.bias")
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd\.pth .*conv1\.bias is missing; backbone\.extra is unknown"):
        LeNet(num_classes=3, image_size=8, weights=str(tmp_path / "odd.pth"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    ],
)
def test_the_usual_layouts_of_state_dicts_are_read(model, tmp_path, wrap):
    torch.save(wrap(model.state_dict()), tmp_path / "weights.pth")
    started = LeNet(num_classes=3, image_size=8, weights=str(tmp_path / "weights.pth"))
    assert all(
        torch.equal(a, b) for a, b in zip(started.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"empty\.pth holds no tensors"):
        read_weights(tmp_path / "empty.pth")


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        LeNet(weights="nowhere.pth")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs."""

    content = b""

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        self.answer(self.content)

    def answer(self, body):
        found = self.path.endswith("/owner/net/resolve/main/model.safetensors")
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(self.content) if found else 0))
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        self.wfile.write(body if found else b"")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path, saved):
    Hub.content = saved.read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = pytest.importorskip("huggingface_hub.constants")
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def test_weights_come_from_the_hub_and_then_from_its_cache(hub, model):
    started = LeNet(num_classes=3, image_size=8, weights="hf://owner/net")
    assert torch.equal(started.head.weight, model.head.weight)
    hub.shutdown()
    assert torch.equal(LeNet(num_classes=3, image_size=8, weights="hf://owner/net").head.weight, model.head.weight)


def test_what_the_hub_does_not_have_is_named(hub):
    with pytest.raises(FileNotFoundError, match=r"hf://owner/other could not be fetched.*Bring model\.safetensors"):
        locate("hf://owner/other")


def test_a_name_that_is_none_is_refused():
    with pytest.raises(ValueError, match="hf://owner/name"):
        locate("hf://net")
