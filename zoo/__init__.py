"""A model zoo for PyTorch Lightning: every architecture of a computer-vision course, with data and recipes.

``import zoo`` is cheap: an architecture, and Lightning with it, is imported when it is first asked for. The public
path of a class (``zoo.LeNet``) is written into checkpoints and never changes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.alexnet import AlexNet
    from zoo.deep_conv_net import DeepConvNet
    from zoo.fully_connected import FullyConnectedNet
    from zoo.googlenet import GoogLeNet
    from zoo.knn import KNearestNeighbors
    from zoo.lenet import LeNet
    from zoo.linear_classifier import LinearClassifier
    from zoo.preact_resnet import PreActResNet
    from zoo.resnet import ResNet
    from zoo.squeezenet import SqueezeNet
    from zoo.vgg import VGG
    from zoo.weights import load, save

__version__ = "0.1.0"

ARCHITECTURES = {
    "AlexNet": "zoo.alexnet",
    "DeepConvNet": "zoo.deep_conv_net",
    "FullyConnectedNet": "zoo.fully_connected",
    "GoogLeNet": "zoo.googlenet",
    "KNearestNeighbors": "zoo.knn",
    "LeNet": "zoo.lenet",
    "LinearClassifier": "zoo.linear_classifier",
    "PreActResNet": "zoo.preact_resnet",
    "ResNet": "zoo.resnet",
    "SqueezeNet": "zoo.squeezenet",
    "VGG": "zoo.vgg",
}
_FUNCTIONS = {"load": "zoo.weights", "save": "zoo.weights"}

__all__ = [
    "AlexNet",
    "DeepConvNet",
    "FullyConnectedNet",
    "GoogLeNet",
    "KNearestNeighbors",
    "LeNet",
    "LinearClassifier",
    "PreActResNet",
    "ResNet",
    "SqueezeNet",
    "VGG",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    module = ARCHITECTURES.get(name) or _FUNCTIONS.get(name)
    if module is None:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return __all__
