"""``zoo explain MODEL METHOD FILE…``: look into a model, with pictures, videos or observations of one's own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import LightningModule
from PIL import Image

import zoo
from zoo.explaining.looking import Progress, find_layer
from zoo.explaining.page import Bars, Sheet, rgb, write_page
from zoo.recipes import RecipeError, suggest
from zoo.running import explained_classifiers, explained_scores
from zoo.running.explained_classifiers import Answer
from zoo.running.picture_files import printable
from zoo.running.pictures import to_png
from zoo.tasks.captioning import CaptioningTask
from zoo.tasks.classification import ClassificationTask
from zoo.tasks.control import ControlTask
from zoo.tasks.detection import DetectionTask
from zoo.tasks.video import VideoTask
from zoo.weights import load

Methods = Mapping[str, Callable[[Any], Answer]]

# What a model is called, and what applies to it.
KINDS: dict[type[LightningModule], tuple[str, Methods, Callable[..., Any]]] = {
    ClassificationTask: ("classifiers of pictures", explained_classifiers.METHODS, explained_classifiers.ask),
    DetectionTask: ("detectors", explained_scores.OF_DETECTORS, explained_scores.ask_detector),
    CaptioningTask: ("captioners", explained_scores.OF_CAPTIONERS, explained_scores.ask_captioner),
    VideoTask: ("classifiers of clips", explained_scores.OF_CLIPS, explained_scores.ask_of_clips),
    ControlTask: ("policies", explained_scores.OF_POLICIES, explained_scores.ask_policy),
}
METHODS = tuple(dict.fromkeys(name for _, methods, _ in KINDS.values() for name in methods))


def explain(
    model: str,
    words: list[str],
    layer: str | None = None,
    target: str | None = None,
    out: Path = Path("explanations"),
    steps: int | None = None,
    seed: int = 0,
    weights: str | None = None,
) -> None:
    """Write ``<method>.png`` and the pictures that were made; without a method ``index.html`` of all that apply.

    Args:
        model: A ``.ckpt`` or ``.safetensors``, or an architecture's name, for its published weights.
        words: A method of :data:`METHODS`, or none, and then pictures and folders; videos for classifiers of clips,
            observations for policies (:func:`zoo.running.explained_scores.read_observations`). For ``style`` the last
            picture is the manner in which the others are painted.
        layer: As ``zoo show`` prints it; None takes one that suits the method.
        target: A class, by name or number, or an action's number; None takes what the model sees. Of a detector an
            object, by its class, the best one, or by its rank, from 1; None takes the three best that are sure. Of a
            captioner a word of its caption, or its place there, from 1; None takes each word.
        out: The folder.
        steps: Of what is optimised; None takes what suits the method.
        seed: Of what is random.
        weights: Of an architecture: the name or the file; None is ``DEFAULT``.

    Raises:
        RecipeError: There is no such method, file, layer, class or model, or the method does not apply to the model.
        ValueError: The method does not apply to the model or the files.
        ImportError: It needs a library that is not installed.
    """
    method, files = _split(words)
    network = _network(model, weights)
    kind, methods, ask = next(found for task, found in KINDS.items() if isinstance(network, task))
    if method is not None and method not in methods:
        raise RecipeError(f"{method} is not for {kind}: to a zoo.{type(network).__name__} apply {', '.join(methods)}")
    if layer is not None:
        find_layer(network, layer)
    with _bar() as progress:
        question = ask(network, files, layer, target, steps, seed, progress)
        out.mkdir(parents=True, exist_ok=True)
        if method is not None:
            _write(method, methods[method](question), out)
            return
        title = f"zoo.{type(network).__name__} looked into, with {', '.join(question.few().names)}"
        _write_all(question, methods, out, title)


def _write_all(question: Any, methods: Methods, out: Path, title: str) -> None:
    sheets: list[tuple[Sheet | Bars, bytes]] = []
    left_out: dict[str, str] = {}
    for method, answer in methods.items():
        try:
            many = method in explained_classifiers.WITH_ALL
            sheet = answer(question if many else question.few()).sheet
            sheets.append((sheet, to_png(sheet.figure())))
            print(f"{method}: {sheet.note}", flush=True)
        except (ValueError, ImportError) as error:
            left_out[method] = str(error)
            print(f"{method} is left out: {error}", flush=True)
    write_page(out / "index.html", title, sheets, left_out)
    print(out / "index.html")


def _write(method: str, answer: Answer, out: Path) -> None:
    files = [out / f"{method}.png"]
    files[0].write_bytes(to_png(answer.sheet.figure()))
    for number, picture in enumerate([] if answer.made is None else answer.made):
        files.append(out / f"{method}_{number}.png")
        Image.fromarray((rgb(picture) * 255).round().byte().permute(1, 2, 0).numpy()).save(files[-1])
    print(f"{answer.sheet.title}\n{answer.sheet.note}\n{', '.join(map(str, files))}")


def _split(words: list[str]) -> tuple[str | None, list[Path]]:
    """The method, if the first word is one, and the files."""
    method = words[0] if words[0] in METHODS else None
    if method is None and not Path(words[0]).exists():
        known = suggest(words[0], METHODS)
        raise RecipeError(f"there is no method and no picture {printable(words[0])!r}{known}")
    files = words[1:] if method else words
    if not files:
        raise RecipeError(f"zoo explain … {method} needs pictures, or folders of them")
    return method, [Path(word) for word in files]


def _network(model: str, weights: str | None) -> LightningModule:
    known = {name.lower(): name for name in zoo.ARCHITECTURES}
    known |= {module.removeprefix("zoo."): name for name, module in zoo.ARCHITECTURES.items()}
    asked = model.removeprefix("zoo.").lower()
    found: LightningModule
    if Path(model).suffix in (".ckpt", ".safetensors"):
        if weights is not None:
            raise RecipeError(f"--weights is for an architecture's name: {model} has its own")
        found = load(model)
    elif asked in known:
        found = getattr(zoo, known[asked])(weights=weights or "DEFAULT").eval()
    else:
        raise RecipeError(f"there is no architecture or checkpoint {model!r}{suggest(asked, sorted(known), alike=0.4)}")
    if not isinstance(found, tuple(KINDS)):
        into = ", ".join(kind for kind, *_ in KINDS.values())
        raise RecipeError(f"{model} is a zoo.{type(found).__name__}; zoo explain looks into {into}")
    return found


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.progress import Progress as Bar

    with Bar(transient=True) as bar:
        task = bar.add_task("steps", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
