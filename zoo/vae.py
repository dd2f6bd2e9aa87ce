"""The variational autoencoder, fully connected, and the conditional one.

Papers: Kingma and Welling, 2014, https://arxiv.org/abs/1312.6114; Sohn, Lee and Yan, 2015 (conditional). Lecture:
EECS 498-007, lecture 19, and assignment 6, whose layers these are. What is maximized is the lecture's lower bound of
log p(x), in two terms: E_q[log p(x|z)] - KL(q(z|x) || p(z)); the loss is its negative, in nats of an image. A pixel is
taken for the probability of white, so that for grey pictures the first term does not reach 0.
"""

from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection

from zoo.arguments import plain_arguments
from zoo.running.generated_pictures import tiles_figure
from zoo.running.optimizing import SchedulerCallable, configure_optimizers
from zoo.running.pictures import log_picture
from zoo.tasks.generation import STEPS, GenerationTask
from zoo.weights import load_weights

SHOWN = 16  # reconstructions
TERMS = ("loss", "reconstruction", "kl")


class Encoder(nn.Module):
    """Images (N, C, S, S) in [0, 1], and classes (N,) if it knows any, to q(z|x): means and log variances (N, Z).

    Args:
        pixels: Values C * S * S of an image.
        code_size: Length Z of a code.
        hidden: Units of each of the three hidden layers.
        num_classes: None for an encoder without classes.
    """

    def __init__(self, pixels: int, code_size: int, hidden: int = 400, num_classes: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = _three_layers(pixels + (num_classes or 0), hidden)
        self.mean = nn.Linear(hidden, code_size)
        self.log_variance = nn.Linear(hidden, code_size)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map images (N, C, S, S), and labels (N,) where there are classes, to means and log variances (N, Z)."""
        x = self.layers(_with_class(images.flatten(1), labels, self.num_classes))
        return self.mean(x), self.log_variance(x)


class Decoder(nn.Module):
    """Codes (N, Z), and classes (N,) if it knows any, to p(x|z): logits (N, C, S, S) of white pixels.

    Args:
        shape: (C, S, S) of an image.
        code_size: Length Z of a code.
        hidden: Units of each of the three hidden layers.
        num_classes: None for a decoder without classes.
    """

    def __init__(
        self, shape: tuple[int, int, int], code_size: int, hidden: int = 400, num_classes: int | None = None
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = _three_layers(code_size + (num_classes or 0), hidden)
        self.pixels = nn.Sequential(nn.Linear(hidden, shape[0] * shape[1] * shape[2]), nn.Unflatten(1, shape))

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map codes (N, Z), and labels (N,) where there are classes, to logits (N, C, S, S)."""
        return cast(Tensor, self.pixels(self.layers(_with_class(codes, labels, self.num_classes))))


def _three_layers(inputs: int, hidden: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (inputs, hidden, hidden):
        layers += [nn.Linear(before, hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _with_class(x: Tensor, labels: Tensor | None, num_classes: int | None) -> Tensor:
    """Vectors (N, D) followed by the class as 0s and a 1 (N, D + num_classes)."""
    if num_classes is None:
        return x
    assert labels is not None
    return torch.cat([x, F.one_hot(labels, num_classes).to(x)], 1)


def lower_bound(logits: Tensor, images: Tensor, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of the bound, negated: what reconstruction costs and KL(q(z|x) || p(z)), in nats.

    Args:
        logits: (N, C, H, W) of p(x|z), of a code z drawn from q(z|x).
        images: x, (N, C, H, W) in [0, 1].
        mean: Of q(z|x), (N, Z).
        log_variance: Of q(z|x), (N, Z).

    Returns:
        Each (N,); the loss is their sum.
    """
    reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="none").flatten(1).sum(1)
    return reconstruction, 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


class VAE(GenerationTask):
    """Variational autoencoder, conditional if asked.

    Logs ``loss``, ``reconstruction`` and ``kl`` of the stages ``train``, ``val`` and ``test``, in nats of an image.

    Args:
        conditional: Encode and generate pictures of a class that is given.
        num_classes: Number of classes, for a conditional model.
        class_names: Their names, in the order of the labels; None calls them "0", "1", ….
        code_size: Length of a code; its prior is the standard normal distribution.
        hidden: Units of each hidden layer.
        in_channels: Channels of the images: 1 for grey, 3 for RGB.
        image_size: Side of the square images in pixels.
        classifier: Judges the samples: a ``.safetensors`` or ``.ckpt`` file of a classifier of the zoo that was trained
            on the same data, ``classifiers/digits.safetensors`` and the like, which come with the recipes, or a recipe
            such as ``lenet/mnist``, whose newest run's ``best.ckpt`` is taken. None leaves its numbers out.
        weights: File to start from (``.safetensors``, ``.ckpt``, ``.pth``) or ``hf://owner/name``.
        optimizer: Makes the optimizer from the parameters. Default: the assignment's Adam at 1e-3.
        scheduler: Makes the schedule from the optimizer and the run's number of steps; stepped once per step.
    """

    @plain_arguments
    def __init__(
        self,
        conditional: bool = False,
        num_classes: int = 10,
        class_names: list[str] | None = None,
        code_size: int = 15,
        hidden: int = 400,
        in_channels: int = 1,
        image_size: int = 28,
        classifier: str | None = None,
        weights: str | None = None,
        optimizer: OptimizerCallable = lambda params: optim.Adam(params, lr=1e-3, fused=True),
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        classes = num_classes if conditional else None
        super().__init__(code_size, classes, class_names, "gan", classifier, optimizer, scheduler)
        shape = (in_channels, image_size, image_size)
        self.monitor = "val/loss"
        self.encoder = Encoder(in_channels * image_size**2, code_size, hidden, classes)
        self.decoder = Decoder(shape, code_size, hidden, classes)
        self.val_terms = MetricCollection({name: MeanMetric() for name in TERMS}, prefix="val/")
        self.test_terms = MetricCollection({name: MeanMetric() for name in TERMS}, prefix="test/")
        self._images: Tensor | None = None  # to be shown beside their reconstructions
        self._labels: Tensor | None = None
        if weights is not None:
            load_weights(self, weights)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map codes (N, Z), of a conditional model with labels (N,), to images (N, C, S, S): p(x|z)'s mean."""
        return cast(Tensor, self.decoder(codes, labels)).sigmoid()

    def run_layers(self, codes: Tensor) -> None:
        """Run the decoder and then the encoder on codes (1, Z), also without values: for the table of their layers."""
        labels = torch.zeros_like(codes[:, 0], dtype=torch.int64) if self.classes is not None else None
        self.encoder(self(codes, labels), labels)

    def losses(self, images: Tensor, labels: Tensor | None, noise: Tensor) -> dict[str, Tensor]:
        """The negative bound and its two terms, each (N,), at z = mean + deviation * noise.

        Args:
            images: (N, C, S, S) in [0, 1].
            labels: Of a conditional model (N,).
            noise: (N, Z) of the standard normal distribution.
        """
        mean, log_variance = self.encoder(images, labels)
        codes = mean + (0.5 * log_variance).exp() * noise
        reconstruction, kl = lower_bound(self.decoder(codes, labels), images, mean, log_variance)
        return {"loss": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimizer over all trainable parameters, its schedule in steps."""
        return configure_optimizers(self, self.optimizer, self.scheduler)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a batch; logged only at the steps that reach a logger."""
        images, labels = batch
        losses = self.losses(images, self._classes_of(labels), self.draw_codes(len(images)))
        self.loss_terms = {name: losses[name].detach() for name in TERMS[1:]}  # for zoo.running.nonfinite
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            self.log_dict({f"train/{name}": value.mean() for name, value in losses.items()}, prog_bar=True)
        return losses["loss"].mean()

    def measure(self, stage: str, images: Tensor, labels: Tensor | None, codes: Tensor) -> None:
        """Count the bound of a batch; the codes of its samples are the noise."""
        terms = self.val_terms if stage == "val" else self.test_terms
        if len(images):
            for name, value in self.losses(images, labels, codes).items():
                terms[name].update(value)
        if stage == "test":
            self._keep(images, labels)

    def on_validation_epoch_end(self) -> None:
        """Log the bound beside the numbers of the samples."""
        self.log_dict(self.val_terms)
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        """Log the bound beside the numbers of the samples."""
        self.log_dict(self.test_terms)
        super().on_test_epoch_end()

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> list[dict[str, Any]]:
        """As the task has it; of the first images the reconstructions are shown."""
        images, labels = (batch, None) if isinstance(batch, Tensor) else batch
        self._keep(images, self._asked(len(images), None) if labels is None else self._classes_of(labels))
        return super().predict_step(batch, batch_idx)

    def _keep(self, images: Tensor, labels: Tensor | None) -> None:
        if self._images is None and len(images):
            self._images = images[:SHOWN]
            self._labels = labels[:SHOWN] if labels is not None else None

    def _show_codes(self, stage: str) -> None:
        """Also reconstructions, and a walk over the plane of the two numbers of a code that say most."""
        super()._show_codes(stage)
        images, self._images = self._images, None
        if images is None:
            return
        with torch.no_grad():
            mean, log_variance = self.encoder(images, self._labels)
        pairs = torch.cat([images, self.decode(mean, self._labels)])
        rows = ["image", "reconstruction"]
        log_picture(self, f"{stage}/reconstructions", tiles_figure(pairs, len(images), "reconstructions", rows))
        used = (mean.square() + log_variance.exp() - 1 - log_variance).mean(0)
        log_picture(self, f"{stage}/walk", tiles_figure(self._walk(used), STEPS, "two numbers of the code"))

    def _walk(self, used: Tensor) -> Tensor:
        """12 by 12 pictures at quantiles of the prior, in the two numbers that are used most; all others are 0."""
        along = torch.special.ndtri(torch.linspace(0.02, 0.98, STEPS, device=self.device))
        two = used.topk(min(2, self.code_size)).indices
        codes = torch.zeros(STEPS, STEPS, self.code_size, device=self.device)
        codes[..., two[0]] = along[:, None]
        codes[..., two[-1]] = along
        flat = codes.flatten(0, 1)
        return self.decode(flat, torch.zeros_like(flat[:, 0], dtype=torch.int64) if self.classes else None)
