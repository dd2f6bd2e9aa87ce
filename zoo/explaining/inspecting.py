"""What a network has learnt to see: filters, maps, what excites them most, and which pictures it finds alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.explaining.looking import layer_outputs, leaving_untouched

BATCH = 32


@dataclass(frozen=True)
class Patch:
    """A part of a picture that excites a channel.

    Attributes:
        image: Number of the picture.
        value: What the channel answers.
        place: Row and column in the channel's map.
        box: Top, left, bottom and right of its receptive field in the picture, in pixels, the last two exclusive.
        pixels: (C, h, w): the receptive field.
    """

    image: int
    value: float
    place: tuple[int, int]
    box: tuple[int, int, int, int]
    pixels: Tensor


def first_filters(model: nn.Module, size: Sequence[int]) -> Tensor:
    """The filters of the first layer that looks at pixels, each scaled to [0, 1] by its own range.

    Args:
        model: A network whose first layer with weights is a convolution over, or linear in, the picture.
        size: (C, H, W) of a picture.

    Returns:
        (K, C, h, w); of a linear layer h and w are the picture's.

    Raises:
        ValueError: The first layer looks at something else.
    """
    filters = _first_weights(model, size).detach().float()
    low, high = filters.amin((1, 2, 3), keepdim=True), filters.amax((1, 2, 3), keepdim=True)
    return (filters - low) / (high - low).clamp_min(1e-12)


def _first_weights(model: nn.Module, size: Sequence[int]) -> Tensor:
    channels, height, width = size
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            # A model for grey pictures may standardise them for each of three channels.
            if channels in (1, module.in_channels) and module.in_channels in (1, 3) and max(module.kernel_size) > 1:
                return module.weight
            raise ValueError(f"the first convolution, {name}, has {module.in_channels} channels and no view of pixels")
        if isinstance(module, nn.Linear):
            if module.in_features == channels * height * width:
                return module.weight.view(-1, *size)
            raise ValueError(f"the first layer, {name}, takes {module.in_features} values and not the pixels")
    raise ValueError("the network has no convolution and no linear layer")


def activations(model: nn.Module, images: Tensor, layer: str, batch_size: int = BATCH) -> Tensor:
    """What a layer gives.

    Args:
        model: The network.
        images: (N, C, H, W) in [0, 1].
        layer: Its name, as ``zoo show`` prints it.
        batch_size: Pictures at a time.

    Returns:
        (N, K, h, w), (N, D) or what else the layer gives.

    Raises:
        ValueError: There is no such layer.
    """
    with leaving_untouched(model), torch.no_grad():
        return torch.cat([layer_outputs(model, part, [layer])[layer] for part in images.split(batch_size)])


def activation_maps(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    """The maps of a layer, each brought to [0, 1] by its own range.

    Args:
        model: The network.
        images: (N, C, H, W) in [0, 1].
        layer: Its name, as ``zoo show`` prints it.

    Returns:
        (N, K, h, w); a map that is the same all over is 0.

    Raises:
        ValueError: There is no such layer, or it has no maps.
    """
    maps = _maps(model, images, layer)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)


def maximally_activating_patches(
    model: nn.Module, images: Tensor, layer: str, channel: int, count: int = 9
) -> list[Patch]:
    """The parts of pictures that excite a channel most: at most one of each picture, as large as the channel sees.

    Args:
        model: The network.
        images: (N, C, H, W) in [0, 1].
        layer: Its name, as ``zoo show`` prints it.
        channel: Of the layer.
        count: At most so many, the strongest first.

    Raises:
        ValueError: There is no such layer or channel, or it has no maps.
    """
    maps = _maps(model, images, layer)
    if not 0 <= channel < maps.shape[1]:
        raise ValueError(f"layer {layer} has the channels 0…{maps.shape[1] - 1}, not {channel}")
    values, places = maps[:, channel].flatten(1).max(1)
    best = values.topk(min(count, len(values))).indices.tolist()
    at = [divmod(int(places[image]), maps.shape[3]) for image in best]
    boxes = receptive_fields(model, layer, images[:1].shape[1:], at)
    return [
        Patch(image, values[image].item(), place, box, images[image, :, box[0] : box[2], box[1] : box[3]])
        for image, place, box in zip(best, at, boxes, strict=True)
    ]


def receptive_fields(
    model: nn.Module, layer: str, size: Sequence[int], places: Sequence[tuple[int, int]]
) -> list[tuple[int, int, int, int]]:
    """The part of a picture that can change a layer's answer at a place, whatever the network is made of.

    Measured, not calculated: what is no number spreads through convolutions, pools, sums and rectifiers alike, so that
    rows of NaN show by bisection where the view of a place begins and ends. Weights that are 0 count as views.

    Args:
        model: The network.
        layer: Its name, as ``zoo show`` prints it.
        size: (C, H, W) of a picture.
        places: Rows and columns in the layer's maps.

    Returns:
        Of each place top, left, bottom and right in pixels, the last two exclusive; cut off at the picture's border.

    Raises:
        ValueError: There is no such layer, it has no maps, or the place does not look at the picture.
    """
    rows = sorted({row for row, _ in places})
    columns = sorted({column for _, column in places})
    with leaving_untouched(model), torch.no_grad():
        down = dict(zip(rows, _extents(model, layer, size, rows, 1), strict=True))
        across = dict(zip(columns, _extents(model, layer, size, columns, 2), strict=True))
    return [(down[y][0], across[x][0], down[y][1], across[x][1]) for y, x in places]


def _extents(model: nn.Module, layer: str, size: Sequence[int], places: list[int], side: int) -> list[tuple[int, int]]:
    """First and, exclusive, last pixel along a side that each row (side 1) or column (side 2) of a map looks at.

    ``first`` is one less than the least n for which the first n pixels reach it, ``last`` the same from the far end.
    """
    length = size[side]
    low, high = torch.ones(2, len(places), dtype=torch.int64), torch.full((2, len(places)), length)
    while (low < high).any():
        middle = (low + high) // 2
        reached = torch.cat(list(_reached(model, layer, size, places, side, middle)), 1)
        high, low = torch.where(reached, middle, high), torch.where(reached, low, middle + 1).minimum(high)
    return [(int(first) - 1, length - int(last) + 1) for first, last in zip(*low, strict=True)]


def _reached(
    model: nn.Module, layer: str, size: Sequence[int], places: list[int], side: int, counts: Tensor
) -> Iterator[Tensor]:
    """Whether NaN in the first, and in the last, so many pixels reaches each place: (2, part of the places)."""
    device = next((parameter.device for parameter in model.parameters()), None)
    for part in torch.arange(len(places)).split(BATCH // 2):
        pictures = torch.zeros(2, len(part), *size, device=device)
        for number, place in enumerate(part.tolist()):
            pictures[0, number].narrow(side, 0, int(counts[0, place])).fill_(torch.nan)
            last = int(counts[1, place])
            pictures[1, number].narrow(side, size[side] - last, last).fill_(torch.nan)
        maps = layer_outputs(model, pictures.flatten(0, 1), [layer])[layer]
        if maps.ndim != 4:
            raise ValueError(f"layer {layer} gives no maps (N, K, h, w): name a convolution or a pool")
        lines = maps.isnan().any(1).any(4 - 1 - side)  # (2P, places along the side)
        chosen = torch.tensor([places[place] for place in part.tolist()], device=lines.device).repeat(2)
        yield lines.gather(1, chosen[:, None])[:, 0].view(2, -1).cpu()


def features(model: nn.Module, images: Tensor, layer: str, batch_size: int = BATCH) -> Tensor:
    """What a layer says of each picture as a vector; of maps the mean over their places.

    Args:
        model: The network.
        images: (N, C, H, W) in [0, 1].
        layer: Its name, as ``zoo show`` prints it; the last before the scores as a rule.
        batch_size: Pictures at a time.

    Returns:
        (N, D).

    Raises:
        ValueError: There is no such layer.
    """
    found = activations(model, images, layer, batch_size)
    return found.flatten(2).mean(2) if found.ndim > 2 else found


def nearest_neighbours(queries: Tensor, among: Tensor, count: int = 5) -> tuple[Tensor, Tensor]:
    """The vectors that are nearest by Euclidean distance, the nearest first.

    Args:
        queries: (Q, D).
        among: (N, D).
        count: At most so many of each.

    Returns:
        Their numbers int64 and distances, both (Q, count).
    """
    # Not by a matrix product, which loses the digits of what is near.
    distances = torch.cdist(queries, among, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.topk(min(count, len(among)), largest=False)
    return nearest.indices, nearest.values


def embed(vectors: Tensor, method: Literal["pca", "tsne"] = "pca", perplexity: float = 30, seed: int = 0) -> Tensor:
    """Vectors in the plane: by their two principal components, or neighbours beside neighbours (t-SNE).

    By scikit-learn. t-SNE: van der Maaten and Hinton, 2008.

    Args:
        vectors: (N, D), three at least.
        method: ``pca`` or ``tsne``.
        perplexity: Of t-SNE; of few vectors a third of them.
        seed: Of t-SNE.

    Returns:
        float32 (N, 2).

    Raises:
        ValueError: There are fewer than three vectors.
    """
    if len(vectors) < 3:
        raise ValueError(f"{len(vectors)} pictures were given: three at least make a plane")
    values = vectors.detach().float().cpu().numpy()
    if method == "pca":
        from sklearn.decomposition import PCA

        plane = PCA(2, svd_solver="full").fit_transform(values)
    else:
        from sklearn.manifold import TSNE

        plane = TSNE(2, perplexity=min(perplexity, (len(values) - 1) / 3), random_state=seed).fit_transform(values)
    return torch.from_numpy(plane).float()


def _maps(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    maps = activations(model, images, layer)
    if maps.ndim != 4:
        raise ValueError(
            f"layer {layer} gives {tuple(maps.shape[1:])}, no maps (K, h, w): name a convolution or a pool"
        )
    return maps
