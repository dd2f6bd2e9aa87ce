"""Data modules: one file tells one data set's whole story (find it, check it, read it, batch it)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.captions import COCOCaptionsDataModule
    from datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
    from datamodules.coco import COCODataModule
    from datamodules.embedded.captioned_scenes import CaptionedScenesDataModule
    from datamodules.embedded.digits import DigitsDataModule
    from datamodules.embedded.moving_shapes import MovingShapesDataModule
    from datamodules.embedded.scenes import ScenesDataModule
    from datamodules.embedded.shapes import ShapesDataModule
    from datamodules.gym import GymDataModule
    from datamodules.image_folder import ImageFolderDataModule
    from datamodules.mnist import FashionMNISTDataModule, MNISTDataModule
    from datamodules.rollouts import RolloutsDataModule
    from datamodules.shapenet import ShapeNetDataModule
    from datamodules.video import VideoFolderDataModule
    from datamodules.voc import VOCDataModule

# Importing Lightning costs seconds, so a class is imported when it is first asked for.
_MODULES = {
    "CIFAR10DataModule": "datamodules.cifar",
    "CIFAR100DataModule": "datamodules.cifar",
    "COCOCaptionsDataModule": "datamodules.captions",
    "COCODataModule": "datamodules.coco",
    "CaptionedScenesDataModule": "datamodules.embedded.captioned_scenes",
    "DigitsDataModule": "datamodules.embedded.digits",
    "FashionMNISTDataModule": "datamodules.mnist",
    "GymDataModule": "datamodules.gym",
    "ImageFolderDataModule": "datamodules.image_folder",
    "MNISTDataModule": "datamodules.mnist",
    "MovingShapesDataModule": "datamodules.embedded.moving_shapes",
    "RolloutsDataModule": "datamodules.rollouts",
    "ScenesDataModule": "datamodules.embedded.scenes",
    "ShapeNetDataModule": "datamodules.shapenet",
    "ShapesDataModule": "datamodules.embedded.shapes",
    "VOCDataModule": "datamodules.voc",
    "VideoFolderDataModule": "datamodules.video",
}

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "COCOCaptionsDataModule",
    "COCODataModule",
    "CaptionedScenesDataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "GymDataModule",
    "ImageFolderDataModule",
    "MNISTDataModule",
    "MovingShapesDataModule",
    "RolloutsDataModule",
    "ScenesDataModule",
    "ShapeNetDataModule",
    "ShapesDataModule",
    "VOCDataModule",
    "VideoFolderDataModule",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'datamodules' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
