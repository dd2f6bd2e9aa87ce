"""Mask R-CNN: Faster R-CNN with one more head, which draws a mask for each region.

Paper: He et al., 2017, Mask R-CNN, https://arxiv.org/abs/1703.06870; the variant v2 is that of Li et al., 2021,
https://arxiv.org/abs/2111.11429. EECS 498-007, lecture 16. Built from torchvision, so that its weights load by name.
"""

from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim

from zoo.arguments import plain_arguments
from zoo.faster_rcnn import (
    CLASSIFIERS,
    Network,
    PublishedDetector,
    fpn_backbone,
    region_detections,
    region_losses,
    region_options,
    take_pieces,
)
from zoo.running.optimizing import SchedulerCallable
from zoo.running.schedules import Step
from zoo.tasks.detection import Detections, DetectionTask, Target
from zoo.weights import load_trunk, load_weights

BUILDERS = {"resnet50": "maskrcnn_resnet50_fpn", "resnet50_v2": "maskrcnn_resnet50_fpn_v2"}  # in torchvision.models


def mask_options(network: Network, num_classes: int, channels: int, maps: int) -> dict[str, Any]:
    """What torchvision's Mask R-CNN is told besides the boxes' part.

    Args:
        network: The trunk; with v2 the head is that of v2.
        num_classes: Number of classes, without the background.
        channels: Of the pyramid's maps and of the head.
        maps: Number of maps of the pyramid that regions are cut from.
    """
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.ops import MultiScaleRoIAlign

    norm = nn.BatchNorm2d if network == "resnet50_v2" else None
    return {
        "mask_roi_pool": MultiScaleRoIAlign([str(k) for k in range(maps)], output_size=14, sampling_ratio=2),
        "mask_head": MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=norm),
        "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes + 1),
    }


class MaskRCNN(DetectionTask):
    """Mask R-CNN with a feature pyramid: boxes and a mask for each.

    Args:
        num_classes: Number of classes, without the background.
        class_names: Their names, in the order of the labels 1, 2, …; None calls them "1", "2", ….
        network: The trunk: ``resnet50`` (v1) and ``resnet50_v2`` as torchvision publishes them; ``resnet18``,
            ``mobilenet_v3_large`` and ``squeezenet1_0`` for CPUs.
        fpn_channels: Channels of the pyramid's maps and of the masks' head; published weights are for 256.
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
            ``hf://owner/name``. The heads' rows are fresh where the number of classes differs.
        backbone_weights: ``IMAGENET1K_V1`` and the like, or a file of a classifier, for the trunk alone.
        keep_matching_classes: Keep the rows of the heads whose class names match.
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

        super().__init__(num_classes, class_names, optimizer, scheduler, ("boxes", "masks"))
        self.example_input_array = torch.zeros(1, 3, min_size, min_size)
        self.published = PublishedDetector(BUILDERS.get(network))
        sizes, kept = (min_size, max_size), (proposals, test_proposals)
        options = region_options(
            network, num_classes, sizes, anchor_sizes, kept, sampled_regions, detections, score_threshold
        )
        options |= mask_options(network, num_classes, fpn_channels, len(options["box_roi_pool"].featmap_names))
        backbone = fpn_backbone(network, frozen_batch_norm, trainable_layers, fpn_channels)
        take_pieces(self, detection.MaskRCNN(backbone, **options))
        self.to(memory_format=torch.channels_last)
        if backbone_weights is not None:
            load_trunk(cast(nn.Module, self.backbone.body), backbone_weights, CLASSIFIERS[network])
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def detect(self, images: list[Tensor]) -> Detections:
        """Boxes in the images' pixels, labels 1…C, scores, ``masks`` (R, 1, H, W) of probabilities."""
        return region_detections(self, images)

    def losses(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """Those of Faster R-CNN and ``loss_mask``."""
        return region_losses(self, images, targets)
