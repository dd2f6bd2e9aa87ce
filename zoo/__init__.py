"""A model zoo for PyTorch Lightning: every architecture of a computer-vision course, with data and recipes.

``import zoo`` is cheap: an architecture, and Lightning with it, is imported when it is first asked for. The public
path of a class (``zoo.LeNet``) is written into checkpoints and never changes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.actor_critic import ActorCritic
    from zoo.alexnet import AlexNet
    from zoo.c3d import C3D
    from zoo.captioning_lstm import CaptioningLSTM
    from zoo.cnn_lstm import CNNLSTM
    from zoo.dcgan import DCGAN
    from zoo.deep_conv_net import DeepConvNet
    from zoo.dqn import DQN
    from zoo.faster_rcnn import FasterRCNN
    from zoo.frame_fusion import FrameFusion
    from zoo.fully_connected import FullyConnectedNet
    from zoo.gan import GAN
    from zoo.googlenet import GoogLeNet
    from zoo.i3d import I3D
    from zoo.keypoint_rcnn import KeypointRCNN
    from zoo.knn import KNearestNeighbors
    from zoo.lenet import LeNet
    from zoo.linear_classifier import LinearClassifier
    from zoo.mask_rcnn import MaskRCNN
    from zoo.pix2mesh import Pix2Mesh
    from zoo.preact_resnet import PreActResNet
    from zoo.reinforce import REINFORCE
    from zoo.resnet import ResNet
    from zoo.single_stage import SingleStageDetector
    from zoo.slowfast import SlowFast
    from zoo.squeezenet import SqueezeNet
    from zoo.two_stage import TwoStageDetector
    from zoo.vae import VAE
    from zoo.vgg import VGG
    from zoo.weights import load, save
    from zoo.yolov3 import YOLOv3

__version__ = "0.1.0"

ARCHITECTURES = {
    "ActorCritic": "zoo.actor_critic",
    "AlexNet": "zoo.alexnet",
    "C3D": "zoo.c3d",
    "CaptioningLSTM": "zoo.captioning_lstm",
    "CNNLSTM": "zoo.cnn_lstm",
    "DCGAN": "zoo.dcgan",
    "DQN": "zoo.dqn",
    "DeepConvNet": "zoo.deep_conv_net",
    "FasterRCNN": "zoo.faster_rcnn",
    "FrameFusion": "zoo.frame_fusion",
    "FullyConnectedNet": "zoo.fully_connected",
    "GAN": "zoo.gan",
    "GoogLeNet": "zoo.googlenet",
    "I3D": "zoo.i3d",
    "KNearestNeighbors": "zoo.knn",
    "KeypointRCNN": "zoo.keypoint_rcnn",
    "LeNet": "zoo.lenet",
    "LinearClassifier": "zoo.linear_classifier",
    "MaskRCNN": "zoo.mask_rcnn",
    "Pix2Mesh": "zoo.pix2mesh",
    "PreActResNet": "zoo.preact_resnet",
    "REINFORCE": "zoo.reinforce",
    "ResNet": "zoo.resnet",
    "SingleStageDetector": "zoo.single_stage",
    "SlowFast": "zoo.slowfast",
    "SqueezeNet": "zoo.squeezenet",
    "TwoStageDetector": "zoo.two_stage",
    "VAE": "zoo.vae",
    "VGG": "zoo.vgg",
    "YOLOv3": "zoo.yolov3",
}
_FUNCTIONS = {"load": "zoo.weights", "save": "zoo.weights"}

__all__ = [
    "ActorCritic",
    "AlexNet",
    "C3D",
    "CaptioningLSTM",
    "CNNLSTM",
    "DCGAN",
    "DQN",
    "DeepConvNet",
    "FasterRCNN",
    "FrameFusion",
    "FullyConnectedNet",
    "GAN",
    "GoogLeNet",
    "I3D",
    "KNearestNeighbors",
    "KeypointRCNN",
    "LeNet",
    "LinearClassifier",
    "MaskRCNN",
    "Pix2Mesh",
    "PreActResNet",
    "REINFORCE",
    "ResNet",
    "SingleStageDetector",
    "SlowFast",
    "SqueezeNet",
    "TwoStageDetector",
    "VAE",
    "VGG",
    "YOLOv3",
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
