"""What ``zoo explain`` shows of a classifier of pictures: a sheet for each method."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning import LightningModule
from torch import Tensor

from zoo.explaining.attributions import grad_cam, guided_backpropagation, occlusion, saliency
from zoo.explaining.fooling import fool
from zoo.explaining.inspecting import (
    activation_maps,
    activations,
    embed,
    features,
    first_filters,
    maximally_activating_patches,
    nearest_neighbours,
)
from zoo.explaining.looking import Progress, class_number, stages
from zoo.explaining.page import Bars, Sheet, coloured, over, rgb, scattered, signed
from zoo.explaining.segmenting import segment
from zoo.explaining.synthesis import class_visualization, deep_dream, feature_inversion, style_transfer, texture
from zoo.recipes import RecipeError
from zoo.running.classified_files import ClassifiedFiles
from zoo.running.picture_files import find_pictures, printable, short_name
from zoo.tasks.classification import ClassificationTask

SHOWN = 32  # filters, and maps of a picture
FAR = 10  # an adversarial picture wants to be seen as the class of this rank, where none is named
MANY = 8  # pictures that are looked at one by one


@dataclass
class Question:
    """What is looked at.

    Attributes:
        model: A classifier; a detector or a captioner for what needs no class.
        images: (N, C, H, W) in [0, 1].
        names: Of the N files.
        layer: Its name; None leaves it to the method.
        target: A class; None leaves it to the method.
        steps: Of what is optimised; None leaves it to the method.
        seed: Of what is random.
        progress: A bar.
    """

    model: LightningModule
    images: Tensor
    names: list[str]
    layer: str | None
    target: int | None
    steps: int | None
    seed: int
    progress: Progress

    def stage(self, wanted: int) -> str:
        """The layer that was asked for, else one of the network's stages, from 0 on or from -1 backwards."""
        return self.layer or self.stages()[max(-len(self.stages()), min(wanted, len(self.stages()) - 1))]

    def stages(self) -> list[str]:
        """The layer that was asked for alone, else the last at each size of the maps.

        Raises:
            ValueError: There are no maps.
        """
        if self.layer:
            return [self.layer]
        found = stages(self.model, self.images)
        if not found:
            raise ValueError(f"zoo.{type(self.model).__name__} has no layer with maps")
        return found

    def scores(self) -> Tensor:
        """(N, K)."""
        with torch.no_grad():
            scores: Tensor = self.model(self.images)
        return scores

    def seen(self) -> list[int]:
        """The class that was asked for, else the best of each picture."""
        return self.scores().argmax(1).tolist() if self.target is None else [self.target] * len(self.images)

    def few(self) -> "Question":
        """With the first pictures only."""
        return Question(**{**vars(self), "images": self.images[:MANY], "names": self.names[:MANY]})


@dataclass(frozen=True)
class Answer:
    """A sheet, and pictures that were made and are worth a file of their own (M, C, H, W)."""

    sheet: Sheet | Bars
    made: Tensor | None = None


def ask(
    model: ClassificationTask,
    files: list[Path],
    layer: str | None,
    target: str | None,
    steps: int | None,
    seed: int,
    progress: Progress,
) -> Question:
    """Read the pictures and find the class.

    Raises:
        RecipeError: There is no such picture, or the model takes none.
        ValueError: There is no such class.
    """
    channels = model.example_input_array.shape[1]
    if channels not in (1, 3):
        raise RecipeError(f"the model takes images of {channels} channels, pictures have 1 or 3")
    files = find_pictures(files)
    images = torch.stack(read_each(files, ClassifiedFiles(model).read))
    number = None if target is None else class_number(target, model.class_names)
    return Question(model, images, [short_name(file) for file in files], layer, number, steps, seed, progress)


def read_each(files: list[Path], read: Callable[[Path], Tensor]) -> list[Tensor]:
    """All files.

    Raises:
        RecipeError: One cannot be read.
    """
    images = []
    for file in files:
        try:
            images.append(read(file))
        except Exception as error:
            raise RecipeError(f"{printable(file)} cannot be read: {error}") from error
    return images


def _filters(question: Question) -> Answer:
    filters = first_filters(question.model, question.images.shape[1:])
    note = f"{len(filters)} filters of {filters.shape[2]}x{filters.shape[3]}, each scaled by its own range"
    return Answer(Sheet("filters of the first layer", note, list(filters[:SHOWN]), [""] * len(filters[:SHOWN]), 8))


def _activations(question: Question) -> Answer:
    layer = question.stage(0)
    maps = activation_maps(question.model, question.images[:1], layer)[0]
    shown = [rgb(question.images[0]), *(coloured(each) for each in maps[: SHOWN - 1])]
    note = f"layer {layer}, {question.names[0]}: {len(shown) - 1} of {len(maps)} maps, each scaled by its own range"
    return Answer(Sheet("activation maps", note, shown, [question.names[0], *map(str, range(len(shown) - 1))], 8))


def _patches(question: Question) -> Answer:
    layer = question.stage(-2)
    maps = activations(question.model, question.images, layer)
    if maps.ndim != 4:
        raise ValueError(f"layer {layer} has no maps")
    channels = maps.amax((0, 2, 3)).topk(min(4, maps.shape[1])).indices.tolist()
    shown, captions = [], []
    for channel in channels:
        for patch in maximally_activating_patches(question.model, question.images, layer, channel, MANY):
            shown.append(patch.pixels)
            captions.append(f"channel {channel}: {patch.value:.1f}")
    note = f"layer {layer}: of the channels that answer most, the parts of pictures that excite them most"
    columns = len(shown) // len(channels) if len(question.images) > 1 else len(shown)
    return Answer(Sheet("maximally activating patches", note, shown, captions, columns))


def _features(question: Question) -> tuple[str, Tensor]:
    layer = question.layer or "backbone"
    return layer, features(question.model, question.images, layer)


def _neighbours(question: Question) -> Answer:
    if len(question.images) < 2:
        raise ValueError("neighbours need two pictures at least")
    layer, vectors = _features(question)
    indices, distances = nearest_neighbours(vectors[:MANY], vectors, min(6, len(vectors)))
    shown = [question.images[k] for row in indices.tolist() for k in row]
    captions = [
        f"{question.names[k]}\n{far:.1f}"
        for row, line in zip(indices.tolist(), distances.tolist(), strict=True)
        for k, far in zip(row, line, strict=True)
    ]
    note = f"features of {layer}; the picture itself, then the nearest with their Euclidean distances"
    return Answer(Sheet("nearest neighbours", note, shown, captions, indices.shape[1]))


def _pca(question: Question) -> Answer:
    layer, vectors = _features(question)
    plane = scattered(question.images, embed(vectors))
    return Answer(Sheet("principal components", f"features of {layer}", [plane], [""], 1), plane[None])


def _tsne(question: Question) -> Answer:
    layer, vectors = _features(question)
    plane = scattered(question.images, embed(vectors, "tsne", seed=question.seed))
    return Answer(Sheet("t-SNE", f"features of {layer}, seed {question.seed}", [plane], [""], 1), plane[None])


def _beside(question: Question, title: str, note: str, views: list[Tensor]) -> Answer:
    """Pictures in the first row, what was found in them below."""
    classes = question.seen()
    captions = [f"{name}\n{_name(question, k)}" for name, k in zip(question.names, classes, strict=True)]
    images = [*map(rgb, question.images), *views]
    return Answer(Sheet(title, note, images, captions + [""] * len(views), len(captions)))


def _name(question: Question, k: int) -> str:
    names: list[str] = question.model.class_names  # type: ignore[assignment]
    return names[k]


def _saliency(question: Question) -> Answer:
    maps = saliency(question.model, question.images, question.target)
    return _beside(question, "saliency", "largest |ds/dx| of a pixel's channels", [coloured(each) for each in maps])


def _guided(question: Question) -> Answer:
    maps = guided_backpropagation(question.model, question.images, question.target)
    note = "the gradient where it and the rectifier's input are above 0"
    return _beside(question, "guided backpropagation", note, [signed(each) for each in maps])


def _grad_cam(question: Question) -> Answer:
    layer = question.stage(-1)
    maps = grad_cam(question.model, question.images, layer, question.target)
    return _beside(
        question, "Grad-CAM", f"layer {layer}", [over(*both) for both in zip(question.images, maps, strict=True)]
    )


def _occlusion(question: Question) -> Answer:
    falls = occlusion(question.model, question.images, question.target).clamp_min(0)
    note = "how far the class's probability falls where a patch of mean colour, a fifth of the side, lies"
    return _beside(question, "occlusion", note, [over(*both) for both in zip(question.images, falls, strict=True)])


def _segmentation(question: Question) -> Answer:
    maps = saliency(question.model, question.images, question.target)
    views = [rgb(image) * segment(image, each) for image, each in zip(question.images, maps, strict=True)]
    return _beside(question, "segmentation by saliency", "GrabCut that starts from saliency", views)


def _adversarial(question: Question) -> Answer:
    order = question.scores().argsort(1, descending=True)
    rank = min(FAR, order.shape[1]) - 1
    wanted = order[:, rank] if question.target is None else torch.full((len(order),), question.target)
    found = fool(
        question.model, question.images, wanted, question.steps or 100, as_file=True, progress=question.progress
    )
    with torch.no_grad():
        now = question.model(found.images).argmax(1).tolist()
    before = [f"{name}\n{_name(question, k)}" for name, k in zip(question.names, order[:, 0].tolist(), strict=True)]
    after = [
        f"{_name(question, k)} after {steps} steps\nnorm {far:.2f}, at most {most * 255:.1f}/255"
        for k, steps, far, most in zip(
            now, found.steps.tolist(), found.l2.tolist(), found.largest.tolist(), strict=True
        )
    ]
    shown = [*map(rgb, question.images), *map(rgb, found.images)]
    shown += [signed(rgb(new) - rgb(old)) for new, old in zip(found.images, question.images, strict=True)]
    fooled = f"{int(found.fooled.sum())} of {len(before)} are seen as the wanted class"
    note = f"{fooled}; steps of length 0.1, at most {question.steps or 100}; Euclidean norms of pixels in [0, 1]"
    captions = [*before, *after, *["the change, enlarged"] * len(before)]
    return Answer(Sheet("adversarial pictures", note, shown, captions, len(before)), found.images)


def _class(question: Question) -> Answer:
    classes = list(dict.fromkeys(question.seen()))
    size = question.images.shape[1:]
    steps = question.steps or 120
    found = class_visualization(question.model, classes, size, steps, seed=question.seed, progress=question.progress)
    note = f"{steps} steps from noise; scores less total variation {found.losses[0]:.1f} → {found.losses[-1]:.1f}"
    names = [_name(question, k) for k in classes]
    return Answer(Sheet("class visualisation", note, list(found.images), names, len(names)), found.images)


def _inversion(question: Question) -> Answer:
    steps = question.steps or 150
    shown, notes, captions = list(question.images[:1]), [], [question.names[0]]
    for layer in question.stages():
        found = feature_inversion(
            question.model, question.images[:1], layer, steps, seed=question.seed, progress=question.progress
        )
        shown.append(found.images[0])
        captions.append(layer.removeprefix("backbone.network."))
        notes.append(f"{layer} {found.share:.2%}")
    note = f"{steps} steps from noise; the loss fell to {', '.join(notes)}"
    return Answer(Sheet("feature inversion", note, shown, captions, len(shown)), torch.stack(shown[1:]))


def _dream(question: Question) -> Answer:
    layer = question.stage(-2)
    octaves = 4
    steps = question.steps or 10
    found = deep_dream(
        question.model, question.images, layer, octaves, steps=steps, seed=question.seed, progress=question.progress
    )
    note = f"layer {layer}, {octaves} octaves of 1.4, {steps} steps of 1.5/255 at each, shifts of up to 32 pixels"
    shown = [*question.images, *found.images]
    return Answer(Sheet("DeepDream", note, shown, question.names + [""] * len(question.names), len(question.names)),
                  found.images)  # fmt: skip


def _style_layers(question: Question) -> list[str]:
    found = question.stages()
    return found[:-1] if len(found) > 1 else found  # the coarsest says what is there, not how it is painted


def _texture(question: Question) -> Answer:
    layers, steps = _style_layers(question), question.steps or 120
    found = texture(
        question.model, question.images, layers, steps=steps, seed=question.seed, progress=question.progress
    )
    note = f"layers {', '.join(layers)}, {steps} steps from noise; the loss fell to {found.share:.2%}"
    shown = [*question.images, *found.images]
    return Answer(Sheet("texture", note, shown, question.names + [""] * len(question.names), len(question.names)),
                  found.images)  # fmt: skip


def _style(question: Question) -> Answer:
    if len(question.images) < 2:
        raise ValueError(
            "style transfer needs two pictures: the last one is the manner in which the others are painted"
        )
    layers, steps = _style_layers(question), question.steps or 200
    content, style = question.images[:-1], question.images[-1:]
    found = style_transfer(
        question.model, content, style, question.stage(1), layers, steps=steps, progress=question.progress
    )
    note = (
        f"content {question.stage(1)}, style {', '.join(layers)} of {question.names[-1]}, {steps} steps; "
        f"the loss fell to {found.share:.1%}"
    )
    shown = [*content, *found.images, *style]
    captions = [*question.names[:-1], *[""] * len(content), f"style: {question.names[-1]}"]
    return Answer(Sheet("style transfer", note, shown, captions, max(2, len(content))), found.images)


METHODS: dict[str, Callable[[Question], Answer]] = {
    "filters": _filters,
    "activations": _activations,
    "patches": _patches,
    "neighbours": _neighbours,
    "pca": _pca,
    "tsne": _tsne,
    "saliency": _saliency,
    "guided": _guided,
    "grad_cam": _grad_cam,
    "occlusion": _occlusion,
    "segmentation": _segmentation,
    "adversarial": _adversarial,
    "class": _class,
    "inversion": _inversion,
    "dream": _dream,
    "texture": _texture,
    "style": _style,
}
WITH_ALL = ("patches", "neighbours", "pca", "tsne")  # the more pictures the better
