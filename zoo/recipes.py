"""Finding and reading recipes, without importing Lightning."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent.parent / "recipes"  # beside this package, in a checkout and in a wheel
OVERLAYS = "overlays"


def names() -> list[str]:
    """All recipes, ``architecture/data``, sorted."""
    files = (path.relative_to(FOLDER) for path in FOLDER.glob("*/*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in files if path.parts[0] != OVERLAYS)


def find(name: str, folder: str = "") -> Path:
    """The file of a recipe's name, or of a path to any YAML file.

    Args:
        name: ``lenet/mnist``, or a path.
        folder: Only there, for example ``overlays``.

    Raises:
        FileNotFoundError: There is no such recipe; it suggests the nearest ones.
    """
    for path in (Path(name), FOLDER / folder / f"{name}.yaml"):
        if path.is_file():
            return path
    if folder:
        known = sorted(path.stem for path in (FOLDER / folder).glob("*.yaml"))
    else:
        known = names()
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or [n for n in known if name.split("/")[0] in n]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else f"there are {', '.join(known)}"
    raise FileNotFoundError(f"there is no recipe or file {name!r}: {hint}")


def read(path: Path) -> dict[str, Any]:
    """The content of a recipe.

    Raises:
        ValueError: The file is no YAML mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no recipe: expected a mapping with the keys expect, model, data and trainer")
    return content


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
