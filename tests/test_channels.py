"""Models for pictures of 1, 4 and 13 channels, from weights for three: against torchvision's and by formula."""

import pytest
import torch
from lightning import Trainer
from torch import nn
from torchvision import models

import zoo
from zoo import VGG, AlexNet, DeepConvNet, GoogLeNet, LeNet, PreActResNet, ResNet, SqueezeNet
from zoo.channels import adapt
from zoo.cli import main
from zoo.export import export
from zoo.weights import load_weights

IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)
HALF = torch.full((2, 3), 0.5, dtype=torch.float64)


def narrow(network, places):
    """Torchvision's network with 64 hidden units, which would be most of its weights."""
    for place in places:
        old = network.classifier[place]
        inputs, outputs = (old.in_features if place == places[0] else 64), (1000 if place == places[-1] else 64)
        network.classifier[place] = nn.Linear(inputs, outputs)
    return network


NETWORKS = {
    "AlexNet": (AlexNet, {"hidden": 64}, lambda: narrow(models.alexnet(), (1, 4, 6)), "features.0", 64, IMAGENET),
    "GoogLeNet": (GoogLeNet, {}, lambda: models.googlenet(init_weights=False), "conv1.conv", 48, HALF),
    "ResNet": (ResNet, {}, models.resnet18, "conv1", 48, IMAGENET),
    "SqueezeNet": (SqueezeNet, {}, models.squeezenet1_0, "features.0", 48, IMAGENET),
    "VGG": (VGG, {"depth": 11, "hidden": 64}, lambda: narrow(models.vgg11(), (0, 3, 6)), "features.0", 32, IMAGENET),
}


@pytest.fixture(params=NETWORKS)
def published(request, tmp_path):
    """An architecture, its arguments, torchvision's network in float64, its file, and its first convolution's name."""
    architecture, arguments, build, first, size, statistics = NETWORKS[request.param]
    with torch.device("meta"):
        theirs = build()
    theirs = theirs.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in theirs.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
        if isinstance(layer, nn.BatchNorm2d):  # running statistics that are not those of a fresh network
            layer.running_mean.uniform_(-0.1, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    torch.save(theirs.state_dict(), tmp_path / "published.pth")
    arguments = {**arguments, "image_size": size, "weights": str(tmp_path / "published.pth")}
    return architecture, arguments, theirs.eval().double(), first, statistics


def close(found, expected):
    assert expected.std() > 0, "outputs that are all alike prove nothing"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.std()))


def test_a_grey_picture_gives_what_torchvision_gives_for_it_repeated(published):
    architecture, arguments, theirs, _, (mean, std) = published
    ours = architecture(**arguments, in_channels=1).eval().double()
    grey = torch.rand(2, 1, arguments["image_size"], arguments["image_size"], dtype=torch.float64)
    assert ours.example_input_array.shape[1:] == grey.shape[1:]
    with torch.no_grad():
        close(ours(grey), theirs((grey.repeat(1, 3, 1, 1) - mean[:, None, None]) / std[:, None, None]))


@pytest.mark.parametrize("channels", [4, 13])
def test_more_channels_have_the_kernels_of_red_green_and_blue_in_turn(channels, published):
    """Against torchvision's network with a first convolution that is made by the formula."""
    architecture, arguments, theirs, first, (mean, std) = published
    ours = architecture(**arguments, in_channels=channels).eval().double()
    old = theirs.get_submodule(first)
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)
    new.double().load_state_dict(
        old.state_dict() | {"weight": torch.stack([old.weight[:, c % 3] * 3 / channels for c in range(channels)], 1)}
    )
    parent, _, name = first.rpartition(".")
    setattr(theirs.get_submodule(parent), name, new)
    images = torch.rand(2, channels, arguments["image_size"], arguments["image_size"], dtype=torch.float64)
    standardized = torch.stack([(images[:, c] - mean[c % 3]) / std[c % 3] for c in range(channels)], 1)
    with torch.no_grad():
        close(ours(images), theirs(standardized))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        (ResNet, {}), (ResNet, {"stem": "small"}), (ResNet, {"depth": 20}), (ResNet, {"depth": 9}),
        (VGG, {"depth": 11}), (VGG, {"depth": 11, "batch_norm": True, "stem": "small"}), (AlexNet, {}),
        (AlexNet, {"stem": "small"}), (GoogLeNet, {}), (GoogLeNet, {"stem": "small"}), (SqueezeNet, {}),
        (SqueezeNet, {"stem": "small"}), (DeepConvNet, {}), (PreActResNet, {}),
    ],
)  # fmt: skip
def test_other_channels_change_the_first_kernels_and_nothing_else(architecture, arguments, channels):
    with torch.device("meta"):
        usual, model = architecture(**arguments), architecture(**arguments, in_channels=channels)
    before, after = usual.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    changed = [key for key in before if before[key].shape != after[key].shape]
    seen = 3 if channels == 1 else channels  # grey is standardised for each of three channels
    kernels = next(key for key in before if key.startswith("backbone.network.") and before[key].ndim == 4)
    assert after[kernels].shape[1] == seen
    statistics = ["backbone.standardize.mean", "backbone.standardize.std"]
    assert changed == ([] if seen == 3 else [*statistics, kernels])
    assert model.example_input_array.shape[1] == channels
    size = model.example_input_array.shape[2:]
    assert model(torch.zeros(2, channels, *size, device="meta")).shape == (2, model.hparams["num_classes"])


@pytest.mark.parametrize(
    ("build", "variance"),
    [
        (lambda n: ResNet(18, 10, in_channels=n, image_size=32), lambda n: 2 / (64 * 49)),  # He et al., of fan out
        (lambda n: VGG(11, num_classes=10, in_channels=n, hidden=8, image_size=32), lambda n: 2 / (64 * 9)),
        (lambda n: AlexNet(10, in_channels=n, hidden=8, image_size=64), lambda n: 1 / (3 * n * 121)),  # torch's own
        (lambda n: SqueezeNet(10, in_channels=n, image_size=32), lambda n: 2 / (n * 49)),
        (lambda n: GoogLeNet(10, in_channels=n, image_size=32), lambda n: 0.0001),
    ],
)
def test_fresh_kernels_for_13_channels_are_initialized_as_those_for_three(build, variance):
    torch.manual_seed(0)
    for channels in (3, 13):
        kernels = next(layer for layer in build(channels).modules() if isinstance(layer, nn.Conv2d)).weight
        assert kernels.shape[1] == channels
        assert float(kernels.detach().var()) == pytest.approx(variance(channels), rel=0.1)


def test_one_mean_makes_one_channel_of_the_kernels_sum():
    """Exactly, also at borders, where the three means were alike; the deviations may differ."""
    torch.manual_seed(0)
    rgb = DeepConvNet(image_size=32, mean=(0.4, 0.4, 0.4), std=(0.2, 0.3, 0.5)).double().eval()
    zoo.save(rgb, "rgb.safetensors")
    grey = DeepConvNet(image_size=32, mean=(0.0,), std=(1.0,)).double().eval()
    assert str(load_weights(grey, "rgb.safetensors")).endswith("; first convolution: 3 channels summed to 1")
    assert grey.backbone.network[0].weight.shape == (8, 1, 3, 3)
    images = torch.rand(3, 1, 32, 32, dtype=torch.float64)
    close(grey(images), rgb(images.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "pth"])
@pytest.mark.parametrize("to", [1, 2, 4, 13])
@pytest.mark.parametrize("of", [1, 3])
def test_a_model_without_standardization_follows_the_same_rules(of, to, suffix):
    torch.manual_seed(0)
    before = LeNet(3, in_channels=of, image_size=8).eval()
    file = f"lenet.{suffix}"
    if suffix == "safetensors":
        zoo.save(before, file)
    elif suffix == "ckpt":
        trainer = Trainer(max_steps=0, logger=False, enable_checkpointing=False, enable_model_summary=False)
        trainer.strategy.connect(before)
        trainer.save_checkpoint(file)
    else:
        torch.save(before.state_dict(), file)
    if (of, to) == (3, 2):
        with pytest.raises(ValueError, match=rf"lenet\.{suffix} does not fit LeNet: its first convolution takes 3"):
            LeNet(3, in_channels=to, image_size=8, weights=file)
        return
    after = LeNet(3, in_channels=to, image_size=8, weights=file).eval()
    if (of, to) == (1, 4):
        said = load_weights(LeNet(3, in_channels=to, image_size=8), file).channels
        assert said == "1 channel repeated to 4, times 1/4"
    kernels = before.backbone.conv1.weight
    channels = [kernels.sum(1)] if to == 1 else [kernels[:, c % of] * of / to for c in range(to)]
    torch.testing.assert_close(after.backbone.conv1.weight, torch.stack(channels, 1))
    grey = torch.rand(2, 1, 8, 8)
    if of == 1 or to == 1:
        found = after(grey.repeat(1, to, 1, 1))
        torch.testing.assert_close(found, before(grey.repeat(1, of, 1, 1)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "mean", "adapted", "said"),
    [
        (1, (0.4, 0.5, 0.6), 0, "; first convolution: 3 channels kept, each sees the grey one: their sum"),
        (1, (0.5,), 3, "; first convolution: 3 channels summed to 1"),
        (3, (0.4, 0.5, 0.6), 0, ""),
        (4, (0.4, 0.5, 0.6), 3, "; first convolution: 3 channels repeated to 4, times 3/4"),
        (13, (0.4, 0.5, 0.6), 3, "; first convolution: 3 channels repeated to 13, times 3/13"),
    ],
)
def test_what_became_of_the_channels_is_reported(channels, mean, adapted, said):
    zoo.save(ResNet(20, 3, image_size=8), "rgb.safetensors")
    model = ResNet(20, 3, image_size=8, in_channels=channels, mean=mean, std=(0.2,) * len(mean))
    transfer = load_weights(model, "rgb.safetensors")
    assert str(transfer) == f"{len(model.state_dict()) - adapted} tensors loaded{said}"


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_a_file_of_such_a_model_is_loaded_as_it_is(channels):
    torch.manual_seed(0)
    model = ResNet(20, 3, image_size=8, in_channels=channels).eval()
    zoo.save(model, "own.safetensors")
    images = torch.rand(2, channels, 8, 8)
    assert torch.equal(zoo.load("own.safetensors")(images), model(images))
    again = ResNet(20, 3, image_size=8, in_channels=channels).eval()
    assert str(load_weights(again, "own.safetensors")) == f"{len(model.state_dict())} tensors loaded"
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(("of", "to"), [(2, 5), (4, 3), (13, 1)])
def test_other_combinations_are_refused_with_the_numbers(of, to):
    zoo.save(LeNet(3, in_channels=of, image_size=8), "w.safetensors")
    with pytest.raises(
        ValueError, match=rf"w\.safetensors does not fit LeNet: .* takes {of} channels, that of the model {to}: "
    ):
        LeNet(3, in_channels=to, image_size=8, weights="w.safetensors")


def test_kernels_of_another_size_are_not_adapted():
    zoo.save(ResNet(18, 3, stem="small", image_size=32), "small.safetensors")
    with pytest.raises(ValueError, match=r"conv1\.weight has shape \(64, 3, 3, 3\), expected \(64, 4, 7, 7\)"):
        ResNet(18, 3, image_size=32, in_channels=4, weights="small.safetensors")


def test_damaged_statistics_are_named():
    state = ResNet(20, 3).state_dict()
    state["backbone.standardize.std"] = torch.tensor(1.0)
    torch.save(state, "w.pth")
    with pytest.raises(ValueError, match=r"standardize\.std has shape \(\), expected \(13, 1, 1\)"):
        ResNet(20, 3, in_channels=13, weights="w.pth")


def test_half_precision_is_summed_in_full():
    model = LeNet(3, image_size=8)
    kernels = torch.rand(20, 3, 5, 5).half()
    adapted, _ = adapt(model, {"backbone.conv1.weight": kernels}, {})
    assert torch.equal(adapted["backbone.conv1.weight"], kernels.float().sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"in_channels": 0}, "in_channels=0 must be at least 1"),
        ({"in_channels": 4, "mean": (0.1, 0.2)}, r"mean=\[0.1, 0.2\] must be 1 value, 3, or one for each of in_ch.*=4"),
        ({"in_channels": 1, "std": (1.0,)}, "equally many"),
        ({"in_channels": 2, "std": (0.2, 0.0, 0.2)}, "above 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        ResNet(20, **arguments)


@pytest.mark.parametrize(("channels", "given"), [(1, 3), (3, 4), (4, 3), (13, 1)])
@pytest.mark.parametrize("build", [lambda n: LeNet(3, in_channels=n), lambda n: ResNet(20, 3, in_channels=n)])
def test_images_of_other_channels_are_refused_with_both_numbers(build, channels, given):
    with pytest.raises(ValueError, match=rf"the images have {given} channels? and the model takes {channels}: .*in_ch"):
        build(channels)(torch.rand(2, given, 28, 28))


def test_three_channels_take_a_grey_picture_as_before():
    model, grey = ResNet(20, 3).eval(), torch.rand(2, 1, 16, 16)
    assert torch.equal(model(grey), model(grey.repeat(1, 3, 1, 1)))


def test_a_foreign_loader_of_13_bands_trains():
    images, labels = torch.rand(8, 13, 16, 16), torch.randint(3, (8,))
    model = ResNet(20, 3, in_channels=13, image_size=16)
    before = model.backbone.network.conv1.weight.detach().clone()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_steps=2, **quiet)
    trainer.fit(model, torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), batch_size=4))
    assert not torch.equal(model.backbone.network.conv1.weight, before)


GREY = ["--model.init_args.in_channels", "1"]


def test_a_recipe_trains_on_grey_pictures_and_its_checkpoint_goes_on(tmp_path, caplog):
    zoo.save(ResNet(20, 10, image_size=16), "rgb.safetensors")
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--data.init_args.channels", "1"]
    command = ["fit", "resnet/embedded", *short, *GREY]
    assert main([*command, "--model.init_args.weights", "rgb.safetensors"]) == 0
    checkpoint = tmp_path / "runs/resnet/embedded/version_0/checkpoints/last.ckpt"
    model = zoo.load(checkpoint)
    assert (model.hparams["in_channels"], model.example_input_array.shape) == (1, (1, 1, 16, 16))
    assert main(["test", "resnet/embedded", *short, "--ckpt_path", str(checkpoint)]) == 0  # its arguments win
    assert "in_channels: 1 from" in caplog.text
    found = zoo.load(export(checkpoint, "safetensors", tmp_path / "grey.safetensors"))
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(found(images), model(images))


@pytest.mark.parametrize("recipe", ["resnet/embedded", "lenet/embedded"])
def test_data_of_other_channels_are_one_line(recipe, capsys):
    assert main(["fit", recipe, *GREY, "--data.init_args.channels", "3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "zoo: error: the images have 3 channels and the model takes 1" in lines[-1]
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("channels", [1, 13])
def test_it_exports(channels, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = PreActResNet(blocks_per_stage=1, num_classes=3, in_channels=channels, image_size=8).eval()
    zoo.save(model, tmp_path / "w.safetensors")
    images = torch.rand(5, channels, 8, 8)
    path = export(tmp_path / "w.safetensors", "onnx", tmp_path / "model.onnx")
    (found,) = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-4, atol=1e-5)
    program = torch.export.load(export(tmp_path / "w.safetensors", "pt2", tmp_path / "model.pt2"))
    torch.testing.assert_close(program.module()(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", [AlexNet, GoogLeNet, PreActResNet, ResNet, SqueezeNet, VGG])
def test_show_takes_the_channels_from_the_input(architecture, capsys):
    assert main(["show", architecture.__name__, "--input", "13x64x64"]) == 0
    first = next(line for line in capsys.readouterr().out.splitlines() if "Conv2d" in line).split()
    with torch.device("meta"):
        model = architecture(in_channels=13)
    convolution = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    assert convolution.in_channels == 13
    assert f"{sum(p.numel() for p in convolution.parameters()):,}" in first


def test_filters_of_a_model_for_grey_pictures_can_be_looked_at():
    from zoo.explaining.inspecting import first_filters

    assert first_filters(ResNet(20, 3, in_channels=1).backbone, (1, 16, 16)).shape == (16, 3, 3, 3)
