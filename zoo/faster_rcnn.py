"""Faster R-CNN on a feature pyramid: a network that proposes regions, and one that looks at each of them.

Papers: Ren et al., 2015, Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks,
https://arxiv.org/abs/1506.01497; Lin et al., 2017, Feature Pyramid Networks, https://arxiv.org/abs/1612.03144; the
variant v2 is that of Li et al., 2021, https://arxiv.org/abs/2111.11429. EECS 498-007, lectures 15 and 16.
Built from torchvision, so that its weights load by name; what they cannot say (sizes, anchors) are arguments.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.running.schedules import Step
from zoo.tasks.detection import Detections, DetectionTask, Target
from zoo.weights import load_trunk, load_weights

Network = Literal["resnet50", "resnet50_v2", "resnet18", "mobilenet_v3_large", "squeezenet1_0"]

BUILDERS = {  # in torchvision.models
    "resnet50": "fasterrcnn_resnet50_fpn",
    "resnet50_v2": "fasterrcnn_resnet50_fpn_v2",
    "mobilenet_v3_large": "fasterrcnn_mobilenet_v3_large_fpn",
}
CLASSIFIERS: dict[str, str] = {  # whose trunks they have
    "resnet50": "resnet50",
    "resnet50_v2": "resnet50",
    "resnet18": "resnet18",
    "mobilenet_v3_large": "mobilenet_v3_large",
    "squeezenet1_0": "squeezenet1_0",
}
# The maps that a trunk gives to the pyramid: its layers' names and channels.
MAPS: dict[str, dict[str, int]] = {
    "resnet50": {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048},
    "resnet50_v2": {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048},
    "resnet18": {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512},
    "mobilenet_v3_large": {"13": 160, "16": 960},
    "squeezenet1_0": {"5": 256, "10": 512, "12": 512},
}
RESNET_STAGES = [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]
STAGES: dict[str, list[list[str]]] = {  # what is frozen together, from the first layers on
    "resnet50": RESNET_STAGES,
    "resnet50_v2": RESNET_STAGES,
    "resnet18": RESNET_STAGES,
    "mobilenet_v3_large": [
        [str(layer) for layer in range(*ends)] for ends in ((0, 2), (2, 4), (4, 7), (7, 13), (13, 16), (16, 17))
    ],
    "squeezenet1_0": [[str(layer) for layer in range(*ends)] for ends in ((0, 3), (3, 6), (6, 12), (12, 13))],
}
# Of files before torchvision 0.14, which the first published weights are.
OLD_KEYS: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$": r"\1.0.\2",
    r"^rpn\.head\.conv\.(weight|bias)$": r"rpn.head.conv.0.0.\1",
    r"^roi_heads\.mask_head\.mask_fcn(\d)\.": lambda found: f"roi_heads.mask_head.{int(found[1]) - 1}.0.",
}
COCO_ROWS = 91  # of the heads that torchvision publishes: COCO's ids with their gaps, and the background
EPS = 1e-5  # of the frozen batch norms here; those of the published v1 weights were trained without
ANCHORS: dict[str, list[list[int]]] = {  # sides in pixels, one list per level of the pyramid
    "resnet50": [[32], [64], [128], [256], [512]],
    "resnet50_v2": [[32], [64], [128], [256], [512]],
    "resnet18": [[32], [64], [128], [256], [512]],
    "mobilenet_v3_large": [[32, 64, 128, 256, 512]] * 3,
    "squeezenet1_0": [[32], [64], [128], [256]],
}


@dataclass(frozen=True)
class PublishedDetector:
    """How torchvision's files for a detector differ from ours: what we call ``head``, they call ``roi_heads``.

    A file for a v1 ResNet-50 is taken for one that torchvision published, whose batch norms add no epsilon; it cannot
    say so itself.

    Attributes:
        builder: The function of ``torchvision.models`` whose weights they are; None if torchvision has none.
    """

    builder: str | None

    def recognises(self, state: dict[str, Tensor]) -> bool:
        """Whether a file has torchvision's keys."""
        return any(key.startswith("roi_heads.") for key in state)

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published tensors, of old files or new ones, under our keys."""
        for old, new in OLD_KEYS.items():
            state = {re.sub(old, new, key): value for key, value in state.items()}
        renamed = {
            f"head.{k.removeprefix('roi_heads.')}" if k.startswith("roi_heads.") else k: v for k, v in state.items()
        }
        if self.builder and self.builder.endswith("_resnet50_fpn"):
            # Trained with batch norms that add no epsilon: the variances take up what ours add.
            for key, value in renamed.items():
                if key.startswith("backbone.body.") and key.endswith("running_var"):
                    renamed[key] = value - EPS
        return renamed

    def class_names(self, state: dict[str, Tensor]) -> list[str]:
        """COCO's names by their ids 1…90, "N/A" where there is none; none for other heads."""
        from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

        if len(state["head.box_predictor.cls_score.weight"]) != COCO_ROWS:
            return []
        return list(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])[1:]


def fpn_backbone(
    network: Network, frozen_batch_norm: bool, trainable_layers: int | None, channels: int = 256
) -> nn.Module:
    """A trunk with a feature pyramid: images (N, 3, H, W) to maps (N, channels, H / s, W / s) and a pooled one.

    MobileNet's maps have strides of 16 and 32; SqueezeNet's 4, 8 and 16, ResNet's 4, 8, 16 and 32.

    Args:
        network: The trunk; that of v2 has batch norms in the pyramid too, which are trained as its own are.
        frozen_batch_norm: Batch norms that stand still, for batches of a few images.
        trainable_layers: So many of the trunk's stages, from the last on, are trained; None trains all.
        channels: Of the pyramid's maps.

    Raises:
        ValueError: ``trainable_layers`` are more stages than the trunk has.
    """
    from torchvision import models
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops import FrozenBatchNorm2d
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    stages = STAGES[network]
    trained = len(stages) if trainable_layers is None else trainable_layers
    if not 0 <= trained <= len(stages):
        raise ValueError(f"trainable_layers={trained} must be between 0 and {len(stages)}, the stages of {network}")
    frozen = frozen_batch_norm and network != "resnet50_v2"
    options: dict[str, Any] = {"norm_layer": partial(FrozenBatchNorm2d, eps=EPS) if frozen else nn.BatchNorm2d}
    if network == "squeezenet1_0":
        options = {}  # it has none
    built = getattr(models, CLASSIFIERS[network])(weights=None, **options)
    trunk = built.features if hasattr(built, "features") else built
    for name in [name for stage in stages[: len(stages) - trained] for name in stage]:
        trunk.get_submodule(name).requires_grad_(False)
    levels = {layer: str(level) for level, layer in enumerate(MAPS[network])}
    # SqueezeNet normalises nothing: without a norm its large values would drown the head's first steps.
    norms: dict[str, Any] = {"resnet50_v2": nn.BatchNorm2d, "squeezenet1_0": partial(nn.GroupNorm, 32)}
    widths = list(MAPS[network].values())
    return BackboneWithFPN(trunk, levels, widths, channels, LastLevelMaxPool(), norms.get(network))


def region_options(
    network: Network,
    num_classes: int,
    image_size: tuple[int, int],
    anchor_sizes: list[list[int]] | None,
    proposals: tuple[int, int],
    sampled_regions: int,
    detections: int,
    score_threshold: float,
) -> dict[str, Any]:
    """What torchvision's Faster, Mask and Keypoint R-CNN are told alike.

    Args:
        network: The trunk; with v2 the heads are those of v2.
        num_classes: Number of classes, without the background.
        image_size: Shorter side that images are brought to, and what the longer one may be at most, in pixels.
        anchor_sizes: Sides of the anchors in pixels, one list for each map of the pyramid; None takes the published.
        proposals: Regions that are kept in training and in evaluation.
        sampled_regions: Regions of an image that the head is trained on.
        detections: Detections of an image, at most.
        score_threshold: Least score of a detection.

    Raises:
        ValueError: ``anchor_sizes`` are not one list for each map.
    """
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
    from torchvision.models.detection.rpn import RPNHead
    from torchvision.ops import MultiScaleRoIAlign

    sizes = ANCHORS[network] if anchor_sizes is None else anchor_sizes
    if len(sizes) != len(ANCHORS[network]):
        raise ValueError(f"anchor_sizes need a list for each of the {len(ANCHORS[network])} maps of {network}: {sizes}")
    anchors = AnchorGenerator(tuple(map(tuple, sizes)), ((0.5, 1.0, 2.0),) * len(sizes))
    options: dict[str, Any] = {
        "box_predictor": FastRCNNPredictor(1024, num_classes + 1),
        "min_size": image_size[0],
        "max_size": image_size[1],
        "rpn_anchor_generator": anchors,
        "rpn_pre_nms_top_n_train": proposals[0],
        "rpn_post_nms_top_n_train": proposals[0],
        "rpn_pre_nms_top_n_test": proposals[1],
        "rpn_post_nms_top_n_test": proposals[1],
        "box_batch_size_per_image": sampled_regions,
        "box_detections_per_img": detections,
        "box_score_thresh": score_threshold,
        # Its default names the four maps of ResNet.
        "box_roi_pool": MultiScaleRoIAlign([str(k) for k in range(len(sizes) - 1)], output_size=7, sampling_ratio=2),
    }
    if network == "resnet50_v2":
        options["rpn_head"] = RPNHead(256, anchors.num_anchors_per_location()[0], conv_depth=2)
        options["box_head"] = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=nn.BatchNorm2d)
    return options


def take_pieces(module: LightningModule, built: nn.Module) -> None:
    """Give a module the parts of torchvision's network: ``backbone``, ``rpn``, ``head`` (the regions'), ``resize``."""
    module.backbone = built.backbone
    module.rpn = built.rpn
    module.head = built.roi_heads
    module.resize = built.transform


def assembled(module: LightningModule) -> Any:
    """Torchvision's network around the pieces of a module, in the module's mode."""
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

    network = GeneralizedRCNN(module.backbone, module.rpn, module.head, module.resize)
    network.training = module.training  # its own alone: the pieces may be frozen
    return network


def region_detections(module: LightningModule, images: list[Tensor]) -> Detections:
    """What the module finds on images, by torchvision's names; nothing on none, a process's share of a last batch."""
    return cast(Detections, assembled(module)(images)) if images else []


def region_losses(module: LightningModule, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
    """The losses of the proposals and of the head by torchvision's names.

    Raises:
        ValueError: A box has no area, which torchvision cannot train on.
    """
    try:
        return cast(dict[str, Tensor], assembled(module)(images, targets))
    except AssertionError as error:
        ids = [int(target["image_id"]) for target in targets if "image_id" in target]
        raise ValueError(f"targets of images {ids}: {error}") from error


class FasterRCNN(DetectionTask):
    """Faster R-CNN with a feature pyramid.

    Args:
        num_classes: Number of classes, without the background.
        class_names: Their names, in the order of the labels 1, 2, …; None calls them "1", "2", ….
        network: The trunk: ``resnet50`` (v1), ``resnet50_v2`` and ``mobilenet_v3_large`` as torchvision publishes them,
            ``resnet18`` and ``squeezenet1_0`` for CPUs.
        fpn_channels: Channels of the pyramid's maps; published weights are for 256.
        min_size: Shorter side that images are brought to, in pixels.
        max_size: What the longer side may be at most.
        frozen_batch_norm: Batch norms of the trunk stand still, as they must with a few images a step.
        trainable_layers: So many of the trunk's stages, from the last on, are trained; None trains all.
        anchor_sizes: Sides of the anchors in pixels, one list for each map of the pyramid; None takes the published.
        proposals: Regions that are kept in training.
        test_proposals: Regions that are kept in evaluation.
        sampled_regions: Regions of an image that the head is trained on.
        detections: Detections of an image, at most.
        score_threshold: Least score of a detection; for average precision it should be small.
        weights: torchvision's name (``DEFAULT``, ``COCO_V1``), a file (``.safetensors``, ``.ckpt``, ``.pth``) or
            ``hf://owner/name``. The head's rows are fresh where the number of classes differs.
        backbone_weights: ``IMAGENET1K_V1`` and the like, or a file of a classifier, for the trunk alone.
        keep_matching_classes: Keep the rows of the head whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: torchvision's reference, for 16 images a step.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: a tenth of the rate
            after 16 and 22 of 26 epochs.
    """

    @plain_arguments
    def __init__(
        self,
        num_classes: int = 90,
        class_names: list[str] | None = None,
        network: Network = "resnet50",
        fpn_channels: int = 256,
        min_size: int = 800,
        max_size: int = 1333,
        frozen_batch_norm: bool = True,
        trainable_layers: int | None = None,
        anchor_sizes: list[list[int]] | None = None,
        proposals: int = 2000,
        test_proposals: int = 1000,
        sampled_regions: int = 512,
        detections: int = 100,
        score_threshold: float = 0.05,
        weights: str | None = None,
        backbone_weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4),
        scheduler: SchedulerCallable | None = lambda optimizer, steps: Step(optimizer, steps, [16 / 26, 22 / 26]),
    ) -> None:
        from torchvision.models import detection

        super().__init__(num_classes, class_names, optimizer, scheduler)
        self.example_input_array = torch.zeros(1, 3, min_size, min_size)
        self.published = PublishedDetector(BUILDERS.get(network))
        sizes, kept = (min_size, max_size), (proposals, test_proposals)
        options = region_options(
            network, num_classes, sizes, anchor_sizes, kept, sampled_regions, detections, score_threshold
        )
        backbone = fpn_backbone(network, frozen_batch_norm, trainable_layers, fpn_channels)
        take_pieces(self, detection.FasterRCNN(backbone, **options))
        self.to(memory_format=torch.channels_last)
        if backbone_weights is not None:
            load_trunk(cast(nn.Module, self.backbone.body), backbone_weights, CLASSIFIERS[network])
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def detect(self, images: list[Tensor]) -> Detections:
        """Boxes in the images' pixels, labels 1…C, scores."""
        return region_detections(self, images)

    def losses(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """``loss_objectness``, ``loss_rpn_box_reg``, ``loss_classifier``, ``loss_box_reg``."""
        return region_losses(self, images, targets)
