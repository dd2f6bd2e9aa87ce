"""What ``zoo explain`` shows of detectors, captioners, classifiers of clips and policies: a score at a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.explaining.attributions import grad_cam, guided_backpropagation, occlusion, saliency
from zoo.explaining.looking import Progress, class_number, stages
from zoo.explaining.page import Bars, Sheet, coloured, framed, over, rgb, signed
from zoo.explaining.scores import BoxScore, ObservationScores, WordScores
from zoo.recipes import suggest
from zoo.running import explained_classifiers
from zoo.running.captioned_files import CaptionedFiles
from zoo.running.clip_pictures import still_frames
from zoo.running.detected_files import SIDE, SURE, DetectedFiles, as_evaluated
from zoo.running.explained_classifiers import MANY, Answer, Question, read_each
from zoo.running.picture_files import SUFFIXES, evaluation_of, find_pictures, printable, short_name
from zoo.running.watched_files import SUFFIXES as VIDEOS
from zoo.running.watched_files import WatchedFiles
from zoo.tasks.captioning import END, START, CaptioningTask
from zoo.tasks.control import ControlTask
from zoo.tasks.detection import DetectionTask
from zoo.tasks.video import VideoTask

OBJECTS = 3  # of a picture that are looked at, where none is named
WORDS = 12  # of a caption
Task = DetectionTask | CaptioningTask | VideoTask | ControlTask


@dataclass(frozen=True)
class Score:
    """One number that a model says of a file.

    Attributes:
        model: Maps ``given`` to scores (1, K).
        given: A picture (1, 3, H, W), a clip (1, 3, T, H, W), frames (1, 1, C, H, W) or numbers (1, 1, D).
        target: Which of the K.
        name: The object, word, class or action that it is of.
        within: What the model calls the network, in front of the names of its layers.
        box: (1, 4) of an object.
    """

    model: nn.Module
    given: Tensor
    target: int
    name: str
    within: str = ""
    box: Tensor | None = None


@dataclass(frozen=True)
class Inquiry:
    """What is looked at.

    Attributes:
        network: The model.
        names: Of the N files.
        scores: Of each file.
        layer: Its name; None leaves it to the method.
        progress: A bar.
        said: What the model says of each file.
    """

    network: Task
    names: list[str]
    scores: list[list[Score]]
    layer: str | None
    progress: Progress
    said: list[str]

    def few(self) -> "Inquiry":
        """With the first files only."""
        return replace(self, names=self.names[:MANY], scores=self.scores[:MANY], said=self.said[:MANY])

    def maps(self, method: Callable[[Score], Tensor]) -> list[list[Tensor]]:
        """What a method says of each score of each file, without its first dimension."""
        total, done = sum(map(len, self.scores)), 0
        found: list[list[Tensor]] = []
        for scores in self.scores:
            found.append([])
            for score in scores:
                found[-1].append(method(score)[0])
                done += 1
                self.progress(done, total)
        return found


def ask_detector(
    network: DetectionTask,
    files: list[Path],
    layer: str | None,
    target: str | None,
    steps: int | None,
    seed: int,
    progress: Progress,
) -> Inquiry:
    """Find the objects; pictures of more than 640 pixels a side are looked at at that size.

    Raises:
        RecipeError: There is no such picture.
        ValueError: There is no such class, or on no picture such an object.
    """
    rank = int(target) if target is not None and target.isdecimal() and target not in network.class_names else None
    label = None if target is None or rank is not None else 1 + class_number(target, network.class_names)
    files = find_pictures(files)
    whole, size = read_each(files, DetectedFiles(network).read), evaluation_of(network).get("size")
    images = [_at_most(as_evaluated(image, size), SIDE) for image in whole]
    asked = [_objects(network, image, rank, label) for image in images]
    wanted = "objects" if target is None else f"object {target}"
    return _inquiry(network, files, asked, layer, progress, [""] * len(files), wanted)


def _at_most(image: Tensor, side: int) -> Tensor:
    factor = side / max(image.shape[1:])
    if factor >= 1:
        return image
    size = [max(1, round(length * factor)) for length in image.shape[1:]]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _objects(network: DetectionTask, image: Tensor, rank: int | None, label: int | None) -> list[Score]:
    with torch.no_grad():
        found = network.detect([image])[0]
    order = found["scores"].argsort(descending=True, stable=True).tolist()
    if label is not None:
        chosen = [k for k in order if found["labels"][k] == label][:1]
    elif rank is not None:
        chosen = order[rank - 1 : rank] if rank else []
    else:
        chosen = [k for k in order if found["scores"][k] >= SURE][:OBJECTS] or order[:1]
    scores = []
    for k in chosen:
        label, box = int(found["labels"][k]), found["boxes"][k]
        name = f"{network.class_names[label - 1]} {float(found['scores'][k]):.0%}"
        scores.append(Score(BoxScore(network, box, label).eval(), image[None], 0, name, "detector.", box[None]))
    return scores


def ask_captioner(
    network: CaptioningTask,
    files: list[Path],
    layer: str | None,
    target: str | None,
    steps: int | None,
    seed: int,
    progress: Progress,
) -> Inquiry:
    """Find the captions.

    Raises:
        RecipeError: There is no such picture.
        ValueError: No caption has such a word.
    """
    files = find_pictures(files)
    images = torch.stack(read_each(files, CaptionedFiles(network).read))
    tokens = network.caption(images).tokens
    texts = network.sentences(tokens)
    asked = [
        _words(network, image[None], row[: row.index(END)] if END in row else row, target)
        for image, row in zip(images, tokens.tolist(), strict=True)
    ]
    wanted = "words" if target is None else f"word {target!r}"
    near = "" if target is None or target.isdecimal() else suggest(target, dict.fromkeys(" ".join(texts).split()))
    return _inquiry(network, files, asked, layer, progress, texts, wanted, near)


def _words(network: CaptioningTask, image: Tensor, caption: list[int], target: str | None) -> list[Score]:
    words = [network.words[token] for token in caption]
    chosen = list(range(min(len(words), WORDS)))
    if target in words:
        chosen = [words.index(target)]
    elif target is not None:
        place = int(target) - 1 if target.isdecimal() else -1
        chosen = [place] if 0 <= place < len(words) else []
    return [
        Score(WordScores(network, [START, *caption[:k]]).eval(), image, caption[k], words[k], "captioner.")
        for k in chosen
    ]


def ask_of_clips(
    network: VideoTask,
    files: list[Path],
    layer: str | None,
    target: str | None,
    steps: int | None,
    seed: int,
    progress: Progress,
) -> Inquiry:
    """Take the clip in the middle of each video.

    Raises:
        RecipeError: There is no such video.
        ValueError: There is no such class.
    """
    number = None if target is None else class_number(target, network.class_names)
    files = find_pictures(files, VIDEOS, "video")
    views = read_each(files, WatchedFiles(network, Path()).read)
    asked = []
    for each in views:
        clip = each[len(each) // 2][None]
        with torch.no_grad():
            shares = network(clip).softmax(1)[0]
        best = int(shares.argmax()) if number is None else number
        asked.append([Score(network, clip, best, f"{network.class_names[best]} {float(shares[best]):.0%}")])
    return _inquiry(network, files, asked, layer, progress, [""] * len(files), "class")


def ask_policy(
    network: ControlTask,
    files: list[Path],
    layer: str | None,
    target: str | None,
    steps: int | None,
    seed: int,
    progress: Progress,
) -> Inquiry:
    """Take observations, the first eight of each file.

    Raises:
        RecipeError: There is no such file.
        ValueError: There is no such action.
    """
    number = None if target is None else _action(target, network.num_actions)
    suffixes = (".npy",) if len(network.observation_shape) == 1 else (".npy", *SUFFIXES)
    files = find_pictures(files, suffixes, "observation")
    read = partial(read_observations, shape=network.observation_shape)
    found = [each[:MANY] for each in read_each(files, read)]
    names = [
        short_name(file) + (f" [{k}]" if len(each) > 1 else "")
        for file, each in zip(files, found, strict=True)
        for k in range(len(each))
    ]
    asked = []
    for obs in torch.cat(found).split(1):
        with torch.no_grad():
            values = network(obs)[0]
        best = int(values.argmax()) if number is None else number
        name = f"action {best}: {float(values[best]):.2f}"
        asked.append([Score(ObservationScores(network).eval(), obs[:, None], best, name, "policy.")])
    return Inquiry(network, names, asked, layer, progress, [""] * len(names))


def _action(target: str, actions: int) -> int:
    if not target.isdecimal() or int(target) >= actions:
        raise ValueError(f"there is no action {target!r}: the policy has 0…{actions - 1}")
    return int(target)


def read_observations(path: Path, shape: list[int]) -> Tensor:
    """Observations of a file: ``.npy``, or of frames a picture or an animation.

    Of an animation the last C frames are taken, in grey and at the observation's size, as environments stack them; of
    a shorter one the first is repeated. Values of 8 bits become numbers in [0, 1] where observations are frames.

    Args:
        path: The file.
        shape: Of an observation: (D,) or (C, H, W).

    Returns:
        float32 (M, …).

    Raises:
        ValueError: An array is of another shape.
        Exception: The file cannot be read.
    """
    if path.suffix.lower() != ".npy":
        return _last_frames(path, *shape)
    values = np.load(path, allow_pickle=False)
    if list(values.shape[-len(shape) :]) != list(shape) or values.ndim - len(shape) not in (0, 1):
        raise ValueError(f"an array of {values.shape}, expected {tuple(shape)}, or several (M, …)")
    numbers = torch.from_numpy(np.ascontiguousarray(values)).float().view(-1, *shape)
    return numbers / 255 if values.dtype == np.uint8 and len(shape) == 3 else numbers


def _last_frames(path: Path, count: int, height: int, width: int) -> Tensor:
    with Image.open(path) as file:
        frames = [each.convert("L").resize((width, height)) for each in ImageSequence.Iterator(file)][-count:]
    frames = frames[:1] * (count - len(frames)) + frames
    return torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).float()[None] / 255


def _inquiry(
    network: Task,
    files: list[Path],
    scores: list[list[Score]],
    layer: str | None,
    progress: Progress,
    said: list[str],
    wanted: str,
    near: str = "",
) -> Inquiry:
    """Of those files that have what is wanted.

    Raises:
        ValueError: None has it.
    """
    left = [k for k, each in enumerate(scores) if each]
    if not left:
        many = "" if len(files) == 1 else f" nor in {len(files) - 1} more"
        raise ValueError(f"the model finds no {wanted} in {printable(files[0].name)}{many}{near}")
    names = [short_name(files[k]) for k in left]
    return Inquiry(network, names, [scores[k] for k in left], layer, progress, [said[k] for k in left])


def _rows(
    inquiry: Inquiry, title: str, note: str, views: list[list[Tensor]], shares: list[Tensor] | None = None
) -> Answer:
    """Of each file a row: the picture and a view for each score; of clips frames, and below a view of each."""
    if inquiry.scores[0][0].given.ndim == 5:
        return _of_frames(inquiry, title, note, views, shares)
    columns = 1 + max(map(len, views))
    images: list[Tensor] = []
    captions: list[str] = []
    for name, scores, said, of_scores in zip(inquiry.names, inquiry.scores, inquiry.said, views, strict=True):
        picture = rgb(scores[0].given[0])
        for score in scores:
            picture = framed(picture, score.box)
        images += [picture, *(framed(view, score.box) for view, score in zip(of_scores, scores, strict=True))]
        captions += [f"{name}\n{_wrapped(said)}" if said else name, *(score.name for score in scores)]
        missing = -len(images) % columns
        images += [torch.ones(3, 8, 8)] * missing
        captions += [""] * missing
    return Answer(Sheet(title, note, images, captions, columns))


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 30)


def _of_frames(
    inquiry: Inquiry, title: str, note: str, views: list[list[Tensor]], shares: list[Tensor] | None
) -> Answer:
    """Views (C, T, H, W) below their clips, with what is said of each frame (T,)."""
    images: list[Tensor] = []
    captions: list[str] = []
    columns = 0
    for k, (name, (score,), (view,)) in enumerate(zip(inquiry.names, inquiry.scores, views, strict=True)):
        frames = still_frames(score.given[0])
        columns = len(frames)
        images += [*map(rgb, frames), *map(rgb, still_frames(view))]
        captions += [f"{name}\n{score.name}", *[""] * (columns - 1)]
        captions += [""] * columns if shares is None else [f"{each:.0%}" for each in _still(shares[k])]
    return Answer(Sheet(title, note, images, captions, columns))


def _still(values: Tensor) -> list[float]:
    """Of the frames that are shown."""
    shown: list[float] = still_frames(values[None, :, None, None]).flatten().tolist()
    return shown


def _shown(values: Tensor, given: Tensor) -> Tensor:
    """A map (H, W) over its picture; (T, H, W) of a clip in colours (3, T, H, W), all by one scale."""
    if values.ndim == 2:
        return over(given[0], values)
    return coloured(values.flatten(0, 1)).unflatten(1, values.shape[:2])


def _views(inquiry: Inquiry, maps: list[list[Tensor]]) -> list[list[Tensor]]:
    return [
        [_shown(each, score.given) for each, score in zip(of_file, scores, strict=True)]
        for of_file, scores in zip(maps, inquiry.scores, strict=True)
    ]


def _saliency(inquiry: Inquiry) -> Answer:
    maps = inquiry.maps(lambda score: saliency(score.model, score.given, score.target))
    note = "largest |ds/dx| of a pixel's channels"
    if inquiry.scores[0][0].given.ndim == 3:
        rows = [f"{name}\n{score.name}" for name, (score,) in zip(inquiry.names, inquiry.scores, strict=True)]
        note = f"|ds/dx| of each number of an observation; s is {inquiry.network.what_scores_are}"
        return Answer(Bars("saliency", note, torch.stack([each for (each,) in maps]), rows))
    shares = None
    if inquiry.scores[0][0].given.ndim == 5:
        shares = [each.flatten(1).sum(1) / each.sum().clamp_min(1e-12) for (each,) in maps]
        note += "; above each frame its share of all"
    return _rows(inquiry, "saliency", note, _views(inquiry, maps), shares)


def _guided(inquiry: Inquiry) -> Answer:
    maps = inquiry.maps(lambda score: guided_backpropagation(score.model, score.given, score.target))
    views = [[signed(each) for each in of_file] for of_file in maps]
    return _rows(
        inquiry, "guided backpropagation", "the gradient where it and the rectifier's input are above 0", views
    )


def _grad_cam(inquiry: Inquiry) -> Answer:
    used: list[str] = []

    def look(score: Score) -> Tensor:
        layer, values = _speaking(inquiry, score)
        used.append(layer)
        return values

    maps = inquiry.maps(look)
    return _rows(inquiry, "Grad-CAM", f"layer {', '.join(dict.fromkeys(used))}", _views(inquiry, maps))


def _speaking(inquiry: Inquiry, score: Score) -> tuple[str, Tensor]:
    """The layer that was asked for, else the coarsest of the backbone whose maps speak for the score; and its map."""
    given = score.given
    if inquiry.layer:
        return inquiry.layer, grad_cam(score.model, given, score.within + inquiry.layer, score.target)
    found: tuple[str, Tensor] | None = None
    for layer in reversed([name for name in stages(inquiry.network, given) if name.startswith("backbone.")]):
        try:
            found = layer, grad_cam(score.model, given, score.within + layer, score.target)
        except ValueError:
            continue  # a layer for objects of another size
        if found[1].max() > 0:
            return found
    if found is None:
        raise ValueError("no layer of the backbone has maps that the score depends on: name one by --layer")
    return found


def _occlusion(inquiry: Inquiry) -> Answer:
    maps = inquiry.maps(lambda score: occlusion(score.model, score.given, score.target, of="score").clamp_min(0))
    what = "the log probability of the word" if isinstance(inquiry.network, CaptioningTask) else "the object's score"
    note = f"how far {what} falls where a patch of mean colour, a fifth of the side, lies"
    return _rows(inquiry, "occlusion", note, _views(inquiry, maps))


def _attention(inquiry: Inquiry) -> Answer:
    assert isinstance(inquiry.network, CaptioningTask)
    views = []
    for scores in inquiry.scores:
        given = scores[0].given
        attention = inquiry.network.caption(given).attention
        if attention is None:
            raise ValueError("this captioner has no attention: only the cell `attention` looks at places")
        looks = F.interpolate(attention, given.shape[2:], mode="bicubic")[0].clamp_min(0)
        views.append([over(given[0], looks[_place(score)]) for score in scores])
    return _rows(inquiry, "attention", "where the network looked for each word", views)


def _place(score: Score) -> int:
    assert isinstance(score.model, WordScores)
    return len(score.model.beginning) - 1


def _of_network(method: str, inquiry: Inquiry) -> Answer:
    """What needs no score, of the first picture."""
    given, names = inquiry.scores[0][0].given, inquiry.names[:1]
    question = Question(inquiry.network, given, names, inquiry.layer, None, None, 0, inquiry.progress)
    return explained_classifiers.METHODS[method](question)


Methods = dict[str, Callable[[Inquiry], Answer]]
OF_POLICIES: Methods = {"saliency": _saliency}
OF_CLIPS: Methods = {"saliency": _saliency, "guided": _guided, "grad_cam": _grad_cam}
OF_DETECTORS: Methods = {
    "filters": partial(_of_network, "filters"),
    "activations": partial(_of_network, "activations"),
    **OF_CLIPS,
    "occlusion": _occlusion,
}
OF_CAPTIONERS: Methods = {**OF_DETECTORS, "attention": _attention}
