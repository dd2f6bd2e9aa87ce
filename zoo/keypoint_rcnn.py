"""Keypoint R-CNN: Mask R-CNN whose masks are single points, such as a person's joints.

Paper: He et al., 2017, Mask R-CNN, https://arxiv.org/abs/1703.06870 (section 5). EECS 498-007, lecture 16.
Built from torchvision, so that its weights load by name.
"""

from typing import Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor

from zoo.arguments import plain_arguments
from zoo.faster_rcnn import (
    CLASSIFIERS,
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

BUILDERS = {"resnet50": "keypointrcnn_resnet50_fpn"}  # in torchvision.models


class Predictor(KeypointRCNNPredictor):
    """Torchvision's last layer of the keypoints' head, its maps in the memory layout that torchvision's loss needs."""

    def forward(self, x: Tensor) -> Tensor:
        """Map features (R, C, 14, 14) to a map of each keypoint (R, K, 56, 56)."""
        return cast(Tensor, super().forward(x)).contiguous()  # its loss calls .view(), which channels_last refuses


class KeypointRCNN(DetectionTask):
    """Keypoint R-CNN with a feature pyramid: boxes and the keypoints of each.

    Args:
        num_classes: Number of classes, without the background; published weights know people alone.
        class_names: Their names, in the order of the labels 1, 2, …; None calls them "1", "2", ….
        num_keypoints: Number K of keypoints of an object; COCO's people have 17.
        network: The trunk: ``resnet50`` as torchvision publishes it; ``resnet18``, ``mobilenet_v3_large`` and
            ``squeezenet1_0`` for CPUs.
        fpn_channels: Channels of the pyramid's maps; the keypoints' head has twice as many. Published weights are for
            256.
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
            ``hf://owner/name``. The heads' rows are fresh where the number of classes or keypoints differs.
        backbone_weights: ``IMAGENET1K_V1`` and the like, or a file of a classifier, for the trunk alone.
        keep_matching_classes: Keep the rows of the box head whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: torchvision's reference, for 16 images a step.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: a tenth of the rate
            after 36 and 43 of 46 epochs.
    """

    @plain_arguments
    def __init__(
        self,
        num_classes: int = 1,
        class_names: list[str] | None = None,
        num_keypoints: int = 17,
        network: Literal["resnet50", "resnet18", "mobilenet_v3_large", "squeezenet1_0"] = "resnet50",
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
        scheduler: SchedulerCallable | None = lambda optimizer, steps: Step(optimizer, steps, [36 / 46, 43 / 46]),
    ) -> None:
        from torchvision.models import detection
        from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads
        from torchvision.ops import MultiScaleRoIAlign

        super().__init__(num_classes, class_names, optimizer, scheduler, ("boxes", "keypoints"))
        self.example_input_array = torch.zeros(1, 3, min_size, min_size)
        self.published = PublishedDetector(BUILDERS.get(network))
        sizes, kept = (min_size, max_size), (proposals, test_proposals)
        options = region_options(
            network, num_classes, sizes, anchor_sizes, kept, sampled_regions, detections, score_threshold
        )
        maps = options["box_roi_pool"].featmap_names
        options["keypoint_roi_pool"] = MultiScaleRoIAlign(maps, output_size=14, sampling_ratio=2)
        options["keypoint_head"] = KeypointRCNNHeads(fpn_channels, [2 * fpn_channels] * 8)
        options["keypoint_predictor"] = Predictor(2 * fpn_channels, num_keypoints)
        backbone = fpn_backbone(network, frozen_batch_norm, trainable_layers, fpn_channels)
        take_pieces(self, detection.KeypointRCNN(backbone, **options))
        self.to(memory_format=torch.channels_last)
        if backbone_weights is not None:
            load_trunk(cast(nn.Module, self.backbone.body), backbone_weights, CLASSIFIERS[network])
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    def detect(self, images: list[Tensor]) -> Detections:
        """Boxes in the images' pixels, labels 1…C, scores, ``keypoints`` (R, K, 3), ``keypoints_scores`` (R, K)."""
        return region_detections(self, images)

    def losses(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """Those of Faster R-CNN and ``loss_keypoint``."""
        return region_losses(self, images, targets)
