"""SqueezeNet against torchvision's, and the real ImageNet weights."""

import torch
from torchvision.models import squeezenet1_0

from zoo import SqueezeNet


def test_torchvisions_checkpoint_gives_the_same_outputs(published_outputs):
    published_outputs(squeezenet1_0(weights=None), SqueezeNet, {}, 96)


def test_parameters_are_torchvisions():
    with torch.device("meta"):
        assert sum(p.numel() for p in SqueezeNet().parameters()) == 1_248_424


def test_the_published_half_precision_weights_load_and_know_imagenets_classes(zoo_data):
    path = zoo_data / "weights" / "squeezenet1_0_deepcompression_fp16.pth"
    theirs = squeezenet1_0(weights=None).eval()
    theirs.load_state_dict({key: value.float() for key, value in torch.load(path, weights_only=True).items()})
    ours = SqueezeNet(weights=str(path)).eval()
    torch.manual_seed(0)
    images = torch.rand(2, 3, 128, 128)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    torch.testing.assert_close(ours(images), theirs((images - mean) / std), rtol=1e-4, atol=1e-4)
    assert ours.class_names[0] == "tench"
    assert len(ours.class_names) == 1000


def test_the_small_stem_takes_small_pictures():
    assert SqueezeNet(5, stem="small").eval()(torch.rand(2, 3, 32, 32)).shape == (2, 5)
