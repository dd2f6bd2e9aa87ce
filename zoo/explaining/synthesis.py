"""Pictures that a network would like to see, found by gradient ascent on their pixels.

Class visualisation, feature inversion, DeepDream, texture synthesis and style transfer, as in EECS 498-007, lecture 14
and assignment 4. Pixels lie in [0, 1] at every step, and what is random comes from a generator of its own seed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.explaining.looking import Progress, chosen_classes, layer_outputs, leaving_untouched

# Of learnt frequencies: how their share falls, their first spread, and the colours that photographs mix: brightness,
# orange against blue, green against purple, each as long as it varies in ImageNet; rows are red, green and blue.
FALL = 1.2
SPREAD = 0.005
COLOURS = [[0.56, 0.19, 0.04], [0.58, 0.0, -0.11], [0.58, -0.19, 0.06]]


@dataclass(frozen=True)
class Synthesis:
    """Pictures and how they came about.

    Attributes:
        images: (N, C, H, W) in [0, 1].
        losses: For each step what was made small, or for DeepDream and class visualisation large, summed over pictures.
    """

    images: Tensor
    losses: list[float]

    @property
    def share(self) -> float:
        """The last of ``losses`` as a share of the first."""
        return self.losses[-1] / self.losses[0]


def gram_matrix(features: Tensor, normalize: bool = True) -> Tensor:
    """How often the channels of maps answer together: F Fᵀ over the places.

    Args:
        features: (N, C, H, W).
        normalize: Divide by C · H · W, as the assignment does.

    Returns:
        (N, C, C), in single precision at least: in half precision sums overflow.
    """
    channels, height, width = features.shape[1:]
    flat = features.float().flatten(2) if features.dtype in (torch.float16, torch.bfloat16) else features.flatten(2)
    product = flat @ flat.transpose(1, 2)
    return product / (channels * height * width) if normalize else product


def total_variation(images: Tensor) -> Tensor:
    """The sum of the squared differences of neighbouring pixels, down and across, over all channels.

    Args:
        images: (N, C, H, W).

    Returns:
        (N,).
    """
    down, across = images.diff(dim=2), images.diff(dim=3)
    return down.square().sum((1, 2, 3)) + across.square().sum((1, 2, 3))


def content_loss(features: Tensor, wanted: Tensor) -> Tensor:
    """Sum of (F - P)² over channels and places: (N, C, H, W) twice to (N,)."""
    return (features - wanted).square().sum((1, 2, 3))


def style_loss(features: Tensor, wanted: Tensor) -> Tensor:
    """Sum of (G - A)² over pairs of channels: maps (N, C, H, W) against Gram matrices (N, C, C), to (N,)."""
    return (gram_matrix(features) - wanted).square().sum((1, 2))


def class_visualization(
    model: nn.Module,
    targets: Sequence[int],
    size: Sequence[int] = (3, 224, 224),
    steps: int = 120,
    rate: float = 0.03,
    penalty: float = 0.0,
    smoothness: float = 0.02,
    jitter: int = 16,
    rotation: float = 15,
    zoom: tuple[float, float] = (0.75, 1.1),
    seed: int = 0,
    progress: Progress | None = None,
) -> Synthesis:
    """Pictures that have the largest score for a class: argmax s(I) - penalty · ‖I - ½‖² - smoothness · TV(I).

    Simonyan et al., 2014, https://arxiv.org/abs/1312.6034, section 2, from noise, shifted at random before each step,
    as in the assignment. So that a person can guess the class, as Olah et al., 2017 (Feature visualization,
    https://distill.pub/2017/feature-visualization), the picture is also turned and scaled at random, and what is
    learnt are not its pixels but its frequencies, weighted as in photographs, in colours that photographs mix.

    Args:
        model: Maps images to scores (N, K).
        targets: N classes, of each of which a picture is made.
        size: (C, H, W).
        steps: So many.
        rate: Adam's, of frequencies whose share of the picture falls as f^-1.2.
        penalty: Of pixels that are far from grey. The assignment's, of standardised ones, is about a twentieth for the
            same.
        smoothness: Of the total variation.
        jitter: Largest shift in pixels.
        rotation: Largest turn in degrees.
        zoom: Smallest and largest scale.
        seed: Of the first noise, shifts, turns and scales.
        progress: Is told the steps that are done, and all.

    Raises:
        ValueError: There is no such class.
    """
    generator = torch.Generator().manual_seed(seed)
    start = _first_spectrum((len(targets), *size), generator, _device(model))

    def loss(spectrum: Tensor) -> Tensor:
        images = _painted(spectrum, size)
        scores = model(_moved(images, jitter, rotation, zoom, generator))
        chosen = chosen_classes(scores, list(targets))
        prior = penalty * (images - 0.5).square().sum() + smoothness * total_variation(images).sum()
        return prior - scores.gather(1, chosen[:, None]).sum()

    with leaving_untouched(model):
        spectrum, losses = _descend(start, loss, steps, rate, progress, bounded=False)
    return Synthesis(_painted(spectrum, size), [-value for value in losses])


def feature_inversion(
    model: nn.Module,
    images: Tensor,
    layer: str,
    steps: int = 200,
    rate: float = 0.05,
    smoothness: float = 1e-4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Synthesis:
    """What a layer remembers of pictures: from noise, the pictures to which it gives the same answer.

    argmin ‖Φ(x) - Φ₀‖² / ‖Φ₀‖² + smoothness · TV(x); Mahendran and Vedaldi, 2015, https://arxiv.org/abs/1412.0035.
    What is learnt are frequencies, as by :func:`class_visualization`: on pixels the deeper layers gave noise.

    Args:
        model: The network.
        images: (N, C, H, W) in [0, 1].
        layer: Its name, as ``zoo show`` prints it.
        steps: So many.
        rate: Adam's, of frequencies whose share of the picture falls as f^-1.2.
        smoothness: Of the total variation.
        seed: Of the noise.
        progress: Is told the steps that are done, and all.

    Raises:
        ValueError: There is no such layer.
    """
    start = _first_spectrum(images.shape, torch.Generator().manual_seed(seed), images.device)
    with leaving_untouched(model):
        wanted = layer_outputs(model, images, [layer])[layer].detach()
        size = _sizes(wanted)

        def loss(spectrum: Tensor) -> Tensor:
            candidates = _painted(spectrum, images.shape[1:])
            found = layer_outputs(model, candidates, [layer])[layer]
            terms = (found - wanted).flatten(1).square().sum(1) / size + smoothness * total_variation(candidates)
            return terms.sum()

        spectrum, losses = _descend(start, loss, steps, rate, progress, bounded=False)
    return Synthesis(_painted(spectrum, images.shape[1:]), losses)


def deep_dream(
    model: nn.Module,
    images: Tensor,
    layer: str,
    octaves: int = 4,
    octave_scale: float = 1.4,
    steps: int = 10,
    rate: float = 1.5 / 255,
    jitter: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> Synthesis:
    """Pictures with more of what a layer sees in them: argmax ½ Σ f².

    Mordvintsev et al., 2015 (DeepDream). The gradient at the layer is its own output; a step is as long as its mean
    absolute value says. From the coarsest octave to the finest, what was added to one is brought to the next.

    Args:
        model: The network.
        images: (N, C, H, W) in [0, 1].
        layer: Its name, as ``zoo show`` prints it.
        octaves: Sizes of the picture, with its own.
        octave_scale: From one to the next.
        steps: At each size.
        rate: Mean change of a pixel value in a step, in pixel values of [0, 1].
        jitter: Largest shift in pixels.
        seed: Of the shifts.
        progress: Is told the steps that are done, and all.

    Raises:
        ValueError: There is no such layer.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = images.shape[2:]
    scales = [octave_scale**-octave for octave in range(octaves)]
    sizes = [(max(1, round(height * scale)), max(1, round(width * scale))) for scale in reversed(scales)]
    losses: list[float] = []
    added = torch.zeros_like(images)
    with leaving_untouched(model):
        for size in sizes:
            base = _resized(images, size)
            dreamt = (base + _resized(added, size)).clamp(0, 1)
            for _ in range(steps):
                given = dreamt.detach().requires_grad_()
                found = layer_outputs(model, _shifted(given, jitter, generator), [layer])[layer]
                value = found.square().sum() / 2
                (gradient,) = torch.autograd.grad(value, given)
                length = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-12)
                dreamt = (dreamt + rate * gradient / length).clamp(0, 1)
                losses.append(float(value.detach()) / found.numel())  # a mean: octaves differ in size
                if progress is not None:
                    progress(len(losses), octaves * steps)
            added = dreamt - base
    return Synthesis(dreamt.detach(), losses)


def texture(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str],
    weights: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    steps: int = 200,
    rate: float = 0.03,
    smoothness: float = 0.0,
    jitter: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Synthesis:
    """From noise, a picture with the same texture: its layers have the same Gram matrices.

    Gatys et al., 2015, https://arxiv.org/abs/1505.07376. Each layer's loss is divided by its wanted matrix' square.
    Frequencies are learnt, as by :func:`class_visualization`, of a picture that goes on beyond its border: it can be
    laid side by side. Without shifts the grid of the network's strides would show.

    Args:
        model: The network.
        images: (N, C, H, W) in [0, 1], to take the texture from.
        layers: Their names, as ``zoo show`` prints them.
        weights: One for each layer; None is 1 each.
        size: (H, W) of what is made; None is that of the pictures.
        steps: So many.
        rate: Adam's, of frequencies.
        smoothness: Of the total variation.
        jitter: Largest shift in pixels.
        seed: Of the noise and the shifts.
        progress: Is told the steps that are done, and all.

    Raises:
        ValueError: There is no such layer, or there are not as many weights.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (images.shape[1], *(size or images.shape[2:]))
    start = _first_spectrum((len(images), *shape), generator, images.device)
    with leaving_untouched(model):
        style = _style(model, images, layers, weights or [1.0] * len(layers), relative=True)

        def loss(spectrum: Tensor) -> Tensor:
            candidates = _shifted(_painted(spectrum, shape), jitter, generator)
            found = layer_outputs(model, candidates, layers)
            return (style(found) + smoothness * total_variation(candidates)).sum()

        spectrum, losses = _descend(start, loss, steps, rate, progress, bounded=False)
    return Synthesis(_painted(spectrum, shape), losses)


def style_transfer(
    model: nn.Module,
    content: Tensor,
    style: Tensor,
    content_layer: str,
    style_layers: Sequence[str],
    content_weight: float = 1.0,
    style_weights: Sequence[float] | None = None,
    smoothness: float = 1e-5,
    relative: bool = True,
    steps: int = 200,
    rate: float = 0.03,
    progress: Progress | None = None,
) -> Synthesis:
    """One picture in the manner of another: content, style and total-variation loss, from the content on.

    Gatys et al., 2016 (Image style transfer using convolutional neural networks, CVPR), with the assignment's formulas:
    content_weight · Σ(F - P)² + Σₗ wₗ Σ(Gˡ - Aˡ)² + smoothness · TV. Adam, a tenth of its rate in the last tenth.

    Args:
        model: The network.
        content: (N, C, H, W) in [0, 1].
        style: (N or 1, C, h, w) in [0, 1]; may have another size.
        content_layer: Its name, as ``zoo show`` prints it.
        style_layers: Their names.
        content_weight: Of the content.
        style_weights: One for each layer; None is 1 each.
        smoothness: Of the total variation, of pixels in [0, 1]; the assignment's, of standardised ones, is about a
            twentieth for the same.
        relative: Divide each term by the square of what it aims at, so that weights suit any network; False takes the
            plain sums, for weights as the assignment has them.
        steps: So many.
        rate: Adam's, in pixel values of [0, 1].
        progress: Is told the steps that are done, and all.

    Raises:
        ValueError: There is no such layer, or there are not as many weights.
    """
    layers = list(dict.fromkeys([content_layer, *style_layers]))
    with leaving_untouched(model):
        wanted = layer_outputs(model, content, [content_layer])[content_layer].detach()
        by_style = _style(model, style, style_layers, style_weights or [1.0] * len(style_layers), relative)
        scale = content_weight / _sizes(wanted) if relative else content_weight

        def loss(candidates: Tensor) -> Tensor:
            found = layer_outputs(model, candidates, layers)
            terms = scale * content_loss(found[content_layer], wanted) + by_style(found)
            return (terms + smoothness * total_variation(candidates)).sum()

        return Synthesis(*_descend(content, loss, steps, rate, progress))


def _style(
    model: nn.Module, images: Tensor, layers: Sequence[str], weights: Sequence[float], relative: bool
) -> Callable[[dict[str, Tensor]], Tensor]:
    """What maps of the layers to the weighted sum of their style losses (N,)."""
    if len(weights) != len(layers):
        raise ValueError(f"{len(weights)} weights were given for {len(layers)} layers of style")
    wanted = {name: gram_matrix(maps).detach() for name, maps in layer_outputs(model, images, layers).items()}
    scales = {name: _sizes(matrix) if relative else 1.0 for name, matrix in wanted.items()}

    def loss(found: dict[str, Tensor]) -> Tensor:
        terms = [w * style_loss(found[k], wanted[k]) / scales[k] for k, w in zip(layers, weights, strict=True)]
        return torch.stack(terms).sum(0)

    return loss


def _descend(
    start: Tensor,
    loss: Callable[[Tensor], Tensor],
    steps: int,
    rate: float,
    progress: Progress | None,
    bounded: bool = True,
) -> tuple[Tensor, list[float]]:
    """Adam, slower in the last tenth, on pixels that stay in [0, 1] if ``bounded``; the loss before each step."""
    images = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=rate)
    losses: list[float] = []
    for step in range(steps):
        if step == steps - steps // 10:
            optimizer.param_groups[0]["lr"] = rate / 10
        optimizer.zero_grad()
        value = loss(images)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
        if bounded:
            images.data.clamp_(0, 1)
        if progress is not None:
            progress(step + 1, steps)
    return images.detach(), losses


def _painted(spectrum: Tensor, size: Sequence[int]) -> Tensor:
    """Frequencies (N, C, H, W // 2 + 1, 2) as pictures (N, C, H, W) in [0, 1].

    Of photographs the amplitude falls about as 1 / f; with weights to match, Adam moves what is coarse and what is
    fine alike, where on pixels it would begin with what is finest.
    """
    _, height, width = size
    down = torch.fft.fftfreq(height, device=spectrum.device)[:, None]
    across = torch.fft.rfftfreq(width, device=spectrum.device)[None]
    frequency = (down.square() + across.square()).sqrt().clamp_min(1 / max(height, width))
    weighted = torch.view_as_complex(spectrum.contiguous()) * (height * width) ** 0.5 / frequency**FALL
    values = torch.fft.irfft2(weighted, s=(height, width)) / 4
    if size[0] == 3:
        values = torch.einsum("nchw,dc->ndhw", values, torch.tensor(COLOURS, device=values.device))
    return values.sigmoid()


def _moved(
    images: Tensor, jitter: int, rotation: float, zoom: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """All turned, scaled and shifted alike, at random; what comes in from outside is their mirror image."""
    angle, scale, down, across = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    turn = math.radians(rotation * (2 * angle - 1))
    size = zoom[0] * (zoom[1] / zoom[0]) ** scale
    cosine, sine = math.cos(turn) / size, math.sin(turn) / size
    height, width = images.shape[2:]
    shift = [2 * jitter * (2 * across - 1) / width, 2 * jitter * (2 * down - 1) / height]
    matrix = [[cosine, -sine * height / width, shift[0]], [sine * width / height, cosine, shift[1]]]
    grid = F.affine_grid(images.new_tensor(matrix).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _first_spectrum(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Of almost grey pictures (N, C, H, W): (N, C, H, W // 2 + 1, 2)."""
    return SPREAD * torch.randn(*shape[:3], shape[3] // 2 + 1, 2, generator=generator).to(device)


def _shifted(images: Tensor, jitter: int, generator: torch.Generator) -> Tensor:
    down, across = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
    return images.roll((down, across), (2, 3))


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _sizes(wanted: Tensor) -> Tensor:
    """The square of each sample (N,), to divide by."""
    return wanted.flatten(1).square().sum(1).clamp_min(1e-12)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
