"""Linear classifier: one score for each class, a weighted sum of the pixels, under the SVM or the softmax loss.

Lecture: EECS 498-007, lecture 3, "Linear classifiers"; assignment 2. The weights of a class, seen as a picture, are its
template. As in the assignment the input is pixels minus the mean of each colour, the weights start from N(0, 1e-4^2),
and both losses are means over the batch. The assignment's ``reg * sum(W^2)`` is the optimizer's ``weight_decay`` of
2 * reg, on the bias as well: there the bias is a column of W.
"""

from typing import Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim
from torch.nn import functional as F

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.running.pictures import filters_figure, log_picture
from zoo.standardization import CIFAR10_MEAN, standardized
from zoo.tasks.classification import ClassificationTask
from zoo.weights import load_weights


def svm_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """The multiclass SVM loss of each sample: the sum over the other classes j of ``max(0, s_j - s_y + 1)``.

    Weston and Watkins, 1999; lecture 3. torch has the same divided by the number of classes.

    Args:
        scores: (N, C).
        labels: int64 (N,).

    Returns:
        (N,), in the scores' type, float32 at least.

    Raises:
        ValueError: The labels are shares of the classes, as mixed images have them: there is no such y then.
    """
    if labels.is_floating_point():
        raise ValueError(
            "the SVM loss needs one label for each image: switch mixup and cutmix off, or take loss: softmax"
        )
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return F.multi_margin_loss(scores, labels, reduction="none") * scores.shape[1]


class LinearClassifier(ClassificationTask):
    """Linear image classifier: ``W x + b`` on the flattened picture.

    Args:
        loss: ``softmax``: cross-entropy; ``svm``: the sum of the margins' violations.
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        image_size: Side of the square images in pixels.
        mean: Mean of each channel, which the first layer subtracts. A grey image is repeated for three means.
        std: What the first layer divides each channel by; the assignment leaves that out.
        init_std: Standard deviation of the initial weights.
        weights: File to start from (``.safetensors``, ``.ckpt``, ``.pth``) or ``hf://owner/name``. The head is fresh
            where the number of classes differs.
        keep_matching_classes: Keep the rows of such a head whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: plain SGD, as the assignment writes it.
        scheduler: Makes the schedule from the optimizer and the run's number of steps.
    """

    @plain_arguments
    def __init__(
        self,
        loss: Literal["softmax", "svm"] = "softmax",
        num_classes: int = 10,
        class_names: list[str] | None = None,
        image_size: int = 32,
        mean: tuple[float, ...] = CIFAR10_MEAN,
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        init_std: float = 1e-4,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.01),
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler)
        self.loss = loss
        self.example_input_array = torch.zeros(1, len(mean), image_size, image_size)
        self.backbone = standardized(nn.Flatten(), mean, std)
        self.head: nn.Linear = nn.Linear(len(mean) * image_size**2, num_classes)
        nn.init.normal_(self.head.weight, std=init_std)
        nn.init.zeros_(self.head.bias)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    @property
    def chance_loss(self) -> float:
        """Of scores that are all equal: log C for softmax, and C - 1 for the SVM, every margin being violated by 1."""
        return float(self.hparams["num_classes"] - 1) if self.loss == "svm" else super().chance_loss

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, S, S) in [0, 1] to scores (N, num_classes)."""
        return cast(Tensor, self.head(self.backbone(images)))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each sample (N,)."""
        return svm_losses(logits, labels) if self.loss == "svm" else super().losses(logits, labels)

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch and its scores (N, num_classes)."""
        scores = self(images)
        return self.losses(scores, labels).mean(), scores

    def on_test_epoch_end(self) -> None:
        """Also show the template of each class."""
        super().on_test_epoch_end()
        templates = self.head.weight.unflatten(1, self.example_input_array.shape[1:])
        log_picture(self, "test/templates", filters_figure(templates, "template of each class", self.class_names))
