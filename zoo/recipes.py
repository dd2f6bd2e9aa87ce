"""Finding and reading recipes, without importing Lightning."""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent.parent / "recipes"  # beside this package, in a checkout and in a wheel
OVERLAYS = "overlays"
LISTS = "lists"  # recipes that are reproduced together
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # eight times as fast where PyYAML was built with it
CLAIM = ("metric", "at_least", "at_most", "tolerance", "source", "measured", "cost")  # keys of an entry of `expect`


class RecipeError(ValueError):
    """A wrong command: a name, key, value or file that cannot be meant. Nothing was started."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turn what code of the zoo, of Lightning and of a user refuses into a :class:`RecipeError`."""
    try:
        yield
    except (ValueError, ImportError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise RecipeError(str(error)) from error
    except Exception as error:
        if type(error).__name__ != "MisconfigurationException":  # by name: importing Lightning costs seconds
            raise
        raise RecipeError(str(error)) from error


def suggest(word: str, known: Iterable[str], alike: float = 0.6) -> str:
    """``": did you mean …?"``; where nothing is like ``word`` all that there is, unless that is much."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=2, cutoff=alike) or [k for k in known if k.startswith(word)][:2]
    if not near:  # `max_epochs` and `optimiser.lr` are like the ends of trainer.max_epochs, model.init_args.optimizer
        ends = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [ends[end] for end in difflib.get_close_matches(word.split(".")[0], ends, n=1)]
    if near:
        return f": did you mean {' or '.join(near)}?"
    return f": there are {', '.join(known)}" if 0 < len(known) < 25 else ""


def names() -> list[str]:
    """All recipes, ``architecture/data``, sorted."""
    files = (path.relative_to(FOLDER) for path in FOLDER.glob("*/*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in files if path.parts[0] not in (OVERLAYS, LISTS))


def lists() -> list[str]:
    """The names of the lists of recipes, sorted."""
    return sorted(path.stem for path in (FOLDER / LISTS).glob("*.yaml"))


def expand(name: str) -> list[str]:
    """The recipes of a list, by its name or a path to a YAML file with the key ``recipes``; else the name alone.

    Raises:
        RecipeError: There is no such list, recipe or file, or the list is none.
    """
    if name in lists():
        path = FOLDER / LISTS / f"{name}.yaml"
    elif name in names():
        return [name]
    else:
        path = Path(name)
        if not path.is_file():
            raise RecipeError(f"there is no recipe, list or file {name!r}{suggest(name, [*names(), *lists()], 0.4)}")
    content = read(path)
    if "recipes" not in content:
        return [name]
    members = content["recipes"]
    if not isinstance(members, list) or not members or not all(isinstance(member, str) for member in members):
        raise RecipeError(f"{place([path], 'recipes')}: recipes must be a list of names such as {names()[0]}")
    return members


def find(name: str, folder: str = "") -> Path:
    """The file of a recipe's name, or of a path to any YAML file.

    Args:
        name: ``lenet/mnist``, or a path.
        folder: Only there, for example ``overlays``.

    Raises:
        RecipeError: There is no such recipe; it suggests the nearest ones.
    """
    for path in (Path(name), FOLDER / folder / f"{name}.yaml"):
        if path.is_file():
            return path
    if name in lists() and not folder:
        raise RecipeError(f"{name} is a list of recipes: run it with zoo reproduce {name}")
    known = sorted(path.stem for path in (FOLDER / folder).glob("*.yaml")) if folder else names()
    what = "overlay" if folder else "recipe"
    raise RecipeError(f"there is no {what} or file {name!r}{suggest(name, known, alike=0.4) if name else ''}")


def read(path: Path) -> dict[str, Any]:
    """The content of a recipe.

    Raises:
        RecipeError: The file is no YAML mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), LOADER)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{line}: this is no YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise RecipeError(f"{path} holds {kind}, expected a mapping with keys such as model, data and trainer")
    return content


def wrong_claim(claim: dict[str, Any]) -> str | None:
    """What is wrong with an entry of ``expect``; None where nothing is."""
    for key in claim:
        if key not in CLAIM:
            return f"has no key {key!r}{suggest(key, CLAIM)}"
    if len({"at_least", "at_most"} & claim.keys()) != 1 or not {"metric", "source"} <= claim.keys():
        return f"needs metric, source, and either at_least or at_most: it has {', '.join(claim)}"
    for key in ("at_least", "at_most", "tolerance"):
        if not isinstance(claim.get(key, 0), int | float):
            return f"must have a number as {key}, not {claim[key]!r}"
    for key in ("metric", "source", "measured", "cost"):
        if not isinstance(claim.get(key, ""), str):
            return f"must have a text as {key}, not {claim[key]!r}"
    return None


def place(files: list[Path], key: str) -> str:
    """``FILE, line N`` of the file that sets a dotted key or comes nearest to it; the later of two."""
    parts = [part for part in key.split(".") if part != "init_args"]
    found = [(path, _lines(yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader), parts)) for path in files]
    path, lines = max(reversed(found), key=lambda pair: len(pair[1]))
    return f"{path}, line {lines[-1]}" if lines else str(path)


def sets(path: Path, key: str) -> bool:
    """Whether a YAML file sets a dotted key, given without ``init_args``."""
    node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    return len(_lines(node, key.split("."))) == key.count(".") + 1


def _lines(node: yaml.Node | None, parts: list[str]) -> list[int]:
    """The lines of ``parts``, each below the one before, as far as they are there; looks into lists and init_args."""
    if isinstance(node, yaml.SequenceNode):
        return max((_lines(child, parts) for child in node.value), key=len, default=[])
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    children = {key.value.removesuffix("+"): (key, value) for key, value in pairs}  # `callbacks+` adds to a list
    if parts and parts[0] in children:
        key, value = children[parts[0]]
        return [key.start_mark.line + 1, *_lines(value, parts[1:])]
    return _lines(children["init_args"][1], parts) if "init_args" in children else []


def table() -> list[dict[str, Any]]:
    """One row for each claim of each recipe: what ``zoo list`` prints."""
    rows = []
    for name in names():
        recipe = read(find(name))
        architecture = recipe["model"]["class_path"].removeprefix("zoo.")
        for claim in recipe["expect"]:
            bound = "at_least" if "at_least" in claim else "at_most"
            rows.append(
                {
                    "name": name,
                    "architecture": architecture,
                    "task": _task(architecture),
                    "data": recipe["data"]["class_path"].removeprefix("datamodules.").removesuffix("DataModule"),
                    "source": claim["source"],
                    "metric": claim["metric"],
                    "claimed": f"{'≥' if bound == 'at_least' else '≤'} {claim[bound]}",
                    "measured": str(claim.get("measured", "not measured")),
                    "cost": str(claim.get("cost", "")),
                }
            )
    return rows


def _task(architecture: str) -> str:
    """The task that an architecture's class is derived from, read from its source: importing it costs seconds."""
    from zoo import ARCHITECTURES

    source = Path(__file__).parent / f"{ARCHITECTURES[architecture].removeprefix('zoo.')}.py"
    match = re.search(rf"^class {architecture}\((\w+)Task\)", source.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1].lower() if match else ""
