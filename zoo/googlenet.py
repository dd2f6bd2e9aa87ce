"""GoogLeNet (Inception v1): parallel branches of several kernel sizes, and two auxiliary classifiers in training.

Paper: Szegedy et al., 2014, Going deeper with convolutions, https://arxiv.org/abs/1409.4842 (section 5, table 1).
Lecture: EECS 498-007, lecture 8, "GoogLeNet".
Built from torchvision, so that its weights load by name. Differs from the paper, as torchvision does: batch norm behind
every convolution, the "5x5" branch with 3x3 kernels, and dropout 0.2 in place of 0.4 before the classifier.
"""

from typing import Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim
from torch.nn import functional as F

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.running.schedules import Step
from zoo.standardization import channel_statistics, standardized
from zoo.tasks.classification import ClassificationTask
from zoo.weights import Published, load_weights

HALF = (0.5, 0.5, 0.5)  # mean and deviation that the paper's weights, which torchvision ported, were trained with


def googlenet_network(stem: Literal["imagenet", "small"], dropout: float, channels: int = 3) -> nn.Module:
    """Torchvision's network without its classifiers: pictures (N, C, H, W) to features (N, 1024).

    In training it returns a named tuple: features as ``logits``, and what the auxiliary classifiers look at, the maps
    (N, 512, H / 16, W / 16) as ``aux_logits1`` and (N, 528, H / 16, W / 16) as ``aux_logits2``. The mode of the network
    itself decides that and nothing else: batch norms and dropout are layers with modes of their own.

    Args:
        stem: ``imagenet``: the paper's, an eighth of the side before the first inception block; ``small``, for
            pictures of 32 pixels or so: 3x3 of stride 1 and no pools before it.
        dropout: Share of features that are dropped at the end.
        channels: Channels C of the pictures.
    """
    from torchvision.models import googlenet
    from torchvision.models.googlenet import BasicConv2d

    network = googlenet(weights=None, aux_logits=True, init_weights=True, dropout=dropout)
    # In place of the classifiers, which are the head's: what they look at.
    network.fc, network.aux1, network.aux2 = nn.Identity(), nn.Identity(), nn.Identity()
    if stem == "small":
        network.conv1 = BasicConv2d(channels, 64, kernel_size=3, padding=1)
        network.maxpool1, network.maxpool2 = nn.Identity(), nn.Identity()
    elif channels != 3:
        network.conv1 = BasicConv2d(channels, 64, kernel_size=7, stride=2, padding=3)
        nn.init.trunc_normal_(network.conv1.conv.weight, std=0.01)
    return network


class GoogLeNetHead(nn.Module):
    """The classifier, and the two auxiliary ones of the training, which ``forward`` does not use.

    Args:
        num_classes: Number of classes.
        dropout_aux: Share of features dropped in the auxiliary classifiers.
    """

    def __init__(self, num_classes: int, dropout_aux: float) -> None:
        super().__init__()
        from torchvision.models.googlenet import InceptionAux

        self.fc = nn.Linear(1024, num_classes)
        self.aux1 = InceptionAux(512, num_classes, dropout=dropout_aux)
        self.aux2 = InceptionAux(528, num_classes, dropout=dropout_aux)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (N, 1024) to logits (N, num_classes)."""
        return cast(Tensor, self.fc(features))


class GoogLeNet(ClassificationTask):
    """GoogLeNet image classifier.

    Its training loss adds those of the two auxiliary classifiers (section 5), which evaluation leaves out. They are
    trained on a frozen backbone too: released, it would else get the gradients of classifiers that never learnt.

    Args:
        num_classes: Number of classes.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        stem: ``imagenet``: the paper's; ``small``, for pictures of 32 pixels or so: it does not make them smaller.
        aux_weight: Weight of each auxiliary loss; 0 trains without them.
        dropout: Share of features dropped before the classifier.
        dropout_aux: Share of features dropped in the auxiliary classifiers.
        image_size: Side of the pictures that the model is made for, in pixels; any from 15 on will run.
        in_channels: Channels of the pictures: 1 for grey, 3 for RGB, 4 with transparency, more for other bands. Weights
            for another number are adapted as :func:`zoo.channels.adapt` says.
        mean: Mean of each channel, which the first layer subtracts; three are repeated for further channels, and a grey
            picture is standardised by each of three. Replaced by that of the weights it starts from.
        std: Standard deviation of each channel, which the first layer divides by; repeated and replaced likewise.
        label_smoothing: Share of the target mass that is spread over all classes, in [0, 1].
        weights: torchvision's name (``DEFAULT``, ``IMAGENET1K_V1``), a file (``.safetensors``, ``.ckpt``, ``.pth``) or
            ``hf://owner/name``. The head is fresh where the number of classes differs.
        keep_matching_classes: Keep the rows of the head whose class names match.
        optimizer: Makes the optimizer from the parameters. Default: momentum 0.9 as in the paper, which does not tell
            its rate; 0.01 for 256 pictures a step.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: a tenth of the rate
            three times; the paper's falls by 4 % every 8 epochs.

    Raises:
        ValueError: There are not as many means and deviations as ``in_channels``, three, or one.
    """

    @plain_arguments
    def __init__(
        self,
        num_classes: int = 1000,
        class_names: list[str] | None = None,
        stem: Literal["imagenet", "small"] = "imagenet",
        aux_weight: float = 0.3,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
        image_size: int = 224,
        in_channels: int = 3,
        mean: tuple[float, ...] = HALF,
        std: tuple[float, ...] = HALF,
        label_smoothing: float = 0.0,
        weights: str | None = None,
        keep_matching_classes: bool = False,
        optimizer: OptimizerCallable = lambda params: optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=2e-4),
        scheduler: SchedulerCallable | None = Step,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, scheduler, label_smoothing)
        self.example_input_array = torch.zeros(1, in_channels, image_size, image_size)
        heads = {"fc.": "head.fc.", "aux1.": "head.aux1.", "aux2.": "head.aux2."}
        self.published = Published("googlenet", heads, HALF, HALF)
        self.aux_weight = aux_weight
        mean, std = channel_statistics(in_channels, mean, std)
        network = googlenet_network(stem, dropout, len(mean))
        self.backbone = standardized(network, mean, std, channels=in_channels)
        self.head = GoogLeNetHead(num_classes, dropout_aux)
        if not aux_weight:
            for auxiliary in (self.head.aux1, self.head.aux2):
                auxiliary.requires_grad_(False)  # several processes would wait for their gradients
        self.to(memory_format=torch.channels_last)
        if weights is not None:
            load_weights(self, weights, keep_matching_classes)

    @property
    def chance_loss(self) -> float:
        """That of one classifier, and of the auxiliary ones at their weight."""
        return (1 + 2 * self.aux_weight) * super().chance_loss

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of three cross-entropies, and the classifier's logits; of one outside of training."""
        network = self.backbone.get_submodule("network")
        mode = network.training
        network.training = mode or self.training  # for the maps, which a frozen network would keep to itself
        outputs = self.backbone(images)
        network.training = mode
        features = outputs if isinstance(outputs, Tensor) else outputs.logits
        logits = self.head(features)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if self.aux_weight and not isinstance(outputs, Tensor):
            head = cast(GoogLeNetHead, self.head)
            for scores in (head.aux1(outputs.aux_logits1), head.aux2(outputs.aux_logits2)):
                loss = loss + self.aux_weight * F.cross_entropy(scores, labels, label_smoothing=self.label_smoothing)
        return loss, logits

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, num_classes)."""
        outputs = self.backbone(images)
        return cast(Tensor, self.head(outputs if isinstance(outputs, Tensor) else outputs.logits))
