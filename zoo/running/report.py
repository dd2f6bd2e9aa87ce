"""The report of a reproduced recipe: one HTML page that needs nothing beside it."""

import base64
import csv
import html
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo.recipes import wrong_claim
from zoo.running.checkpoint import replacing
from zoo.running.pictures import to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Result:
    """One claim of a recipe and what was measured.

    ``measured`` is None where the run did not log the metric: that is a miss. ``doubt`` is why it is not to be relied
    upon, where it is not.
    """

    recipe: str
    metric: str
    bound: str  # at_least or at_most
    claimed: float
    tolerance: float
    source: str
    measured: float | None
    doubt: str = ""

    @property
    def met(self) -> bool:
        """Whether the measured value is on the right side of the claim, give or take the stated tolerance."""
        if self.measured is None:
            return False
        if self.bound == "at_least":
            return self.measured >= self.claimed - self.tolerance
        return self.measured <= self.claimed + self.tolerance

    @property
    def claim(self) -> str:
        """The claim as people write it."""
        give = f" ± {self.tolerance:g}" if self.tolerance else ""
        return f"{'≥' if self.bound == 'at_least' else '≤'} {self.claimed:g}{give}"


@dataclass
class Run:
    """What a report tells of one reproduced recipe."""

    recipe: str
    architecture: str
    command: str
    results: list[Result]
    folder: Path  # metrics.csv, config.yaml, pictures/ and predictions.png
    training_seconds: float
    parameters: int
    writes: bool = True  # whether this process is the one that writes the report
    data_note: str = ""  # what the data module says of its files, where they are not the official ones
    error: str = ""  # what ended the run before it was measured

    @property
    def met(self) -> bool:
        """Whether the run came to its end and every claim was met."""
        return not self.error and all(result.met for result in self.results)

    @property
    def training(self) -> str:
        """The time of training as people read it; nothing where there was none."""
        seconds = self.training_seconds
        return "" if not seconds else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"

    def state_of(self, result: Result) -> str:
        """``met``, ``missed`` or ``failed``."""
        return "failed" if self.error else "met" if result.met else "missed"

    def measured(self, result: Result) -> str:
        """A measured value as people read it, with what is to be said of it and of the data."""
        if result.measured is None:
            return "" if self.error else "not logged"
        notes = "; ".join(note for note in (result.doubt, self.data_note) if note)
        return f"{result.measured:.4f}" + (f" ({notes})" if notes else "")


def hold_against(recipe: str, expect: list[dict[str, Any]], metrics: dict[str, float]) -> list[Result]:
    """Compare a recipe's claims with measured metrics.

    Raises:
        ValueError: A claim is incomplete, as :func:`zoo.recipes.wrong_claim` says.
    """
    results = []
    for claim in expect:
        if problem := wrong_claim(claim):
            raise ValueError(f"{recipe}: a claim {problem}")
        name, bound = claim["metric"], "at_least" if "at_least" in claim else "at_most"
        measured = metrics.get(name)
        tolerance = float(claim.get("tolerance", 0))
        results.append(Result(recipe, name, bound, float(claim[bound]), tolerance, claim["source"], measured))
    return results


def write_report(path: Path, runs: list[Run], title: str = "", to_come: Sequence[str] = ()) -> None:
    """Write the page of one or several runs, and ``results.json`` beside it, each complete or not at all.

    Args:
        path: The page.
        runs: What it tells of.
        title: Its heading; by default the recipes.
        to_come: Recipes that belong to it and have not been run yet.
    """
    title = title or ", ".join(run.recipe for run in runs)
    page = PAGE.format(
        title=html.escape(title),
        verdict=_verdict(runs, to_come),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        contents=_contents(runs) if len(runs) > 1 else "",
        results=_results_table(runs),
        to_come=f"<p>Not run yet: {html.escape(', '.join(to_come))}.</p>" if to_come else "",
        sections="\n".join(_section(run) for run in runs),
        environment=_definitions(environment()),
    )
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
    with replacing(path.with_name("results.json")) as partial:
        partial.write_text(json.dumps([_plain(run) for run in runs], indent=2, ensure_ascii=False), encoding="utf-8")


def read_results(path: Path) -> list[Run]:
    """The runs that a ``results.json`` tells of.

    Raises:
        json.JSONDecodeError: The file is no JSON.
        KeyError, TypeError: It is not one that :func:`write_report` wrote.
    """
    runs = []
    for content in json.loads(path.read_text(encoding="utf-8")):
        results = [Result(**{k: v for k, v in result.items() if k != "met"}) for result in content.pop("results")]
        runs.append(Run(**content | {"results": results, "folder": Path(content["folder"])}))
    return runs


def _plain(run: Run) -> dict[str, Any]:
    """A run as JSON has it; a measured value that is no number is null."""
    results = [asdict(result) | {"met": not run.error and result.met} for result in run.results]
    for result in results:
        if result["measured"] is not None and not math.isfinite(result["measured"]):
            result["measured"] = None
    content = asdict(run) | {"folder": str(run.folder), "results": results}
    del content["writes"]
    return content


def _verdict(runs: list[Run], to_come: Sequence[str]) -> str:
    claims = [run.state_of(result) for run in runs for result in run.results]
    if len(runs) + len(to_come) == 1:
        return {"met": "every claim was met", "missed": "a claim was missed", "failed": "it failed"}[
            max(claims, key=["met", "missed", "failed"].index, default="met")
        ]
    parts = [f"{claims.count('met')} of {len(claims)} claims met"]
    if failed := sum(bool(run.error) for run in runs):
        parts.append(f"{failed} recipe{'s' if failed > 1 else ''} failed")
    if to_come:
        parts.append(f"{len(to_come)} not run yet")
    return ", ".join(parts)


def environment() -> dict[str, str]:
    """Versions and devices that a result depends on."""
    import lightning
    import torchmetrics

    import zoo

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "zoo": zoo.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "torchmetrics": torchmetrics.__version__,
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "GPU": ", ".join(gpus) or "none",
        "system": f"{platform.system()} {platform.release()}",
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The series of a CSVLogger's ``metrics.csv``: name to (step, value), without epoch and step themselves."""
    series: dict[str, list[tuple[int, float]]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name not in ("epoch", "step") and value:
                    series.setdefault(name, []).append((int(row["step"]), float(value)))
    return series


def curves_figure(series: dict[str, list[tuple[int, float]]]) -> "Figure | None":
    """Training and validation curves, one panel per metric; None where there are none."""
    from matplotlib.figure import Figure

    curves = {name: points for name, points in series.items() if name.split("/")[0] in ("train", "val")}
    panels = sorted({name.split("/", 1)[1] for name in curves})
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for stage, color in (("train", "tab:blue"), ("val", "tab:orange")):
            points = curves.get(f"{stage}/{panel}", [])
            if points:
                steps, values = zip(*points, strict=True)
                few = len(points) <= 30
                axes.plot(steps, values, label=stage, color=color, marker="o" if few else None, markersize=3,
                          alpha=1.0 if few or stage == "val" else 0.6, linewidth=1.2)  # fmt: skip
        axes.set_xlabel("step")
        axes.set_title(panel)
        axes.grid(alpha=0.3)
        axes.legend()
        low, high = axes.dataLim.intervaly
        if "loss" in panel and 0 < 5 * low < high:  # else the scale has no whole powers of ten to show
            axes.set_yscale("log")
    return figure


def _section(run: Run) -> str:
    curves = run.folder / "metrics.csv"
    figure = curves_figure(read_curves(curves)) if curves.is_file() else None
    pictures = [_picture(to_png(figure), "learning curves")] if figure else []
    found = sorted(file for suffix in ("png", "gif") for file in (run.folder / "pictures").glob(f"*.{suffix}"))
    files = [file for file in (run.folder / "predictions.png", *found) if file.is_file()]
    pictures += [_picture(file.read_bytes(), file.stem.replace("_", " "), file.suffix[1:]) for file in files]
    pictures += [_embedded(file) for file in sorted((run.folder / "pictures").glob("*.html"))]
    config = run.folder / "config.yaml"
    facts = {
        "failed": run.error,
        "architecture": f"{run.architecture}, {run.parameters:,} parameter{'s' * (run.parameters != 1)}",
        "data": run.data_note,
        "training": run.training,
        "command": run.command,
        "files": str(run.folder),
    }
    settings = ""
    if config.is_file():
        text = html.escape(config.read_text(encoding="utf-8"))
        settings = f"<details><summary>every setting of the run</summary><pre>{text}</pre></details>"
    return (
        f'<h2 id="{_anchor(run)}">{html.escape(run.recipe)}</h2>\n'
        f"{_definitions({name: fact for name, fact in facts.items() if fact})}\n{''.join(pictures)}\n{settings}"
    )


def _anchor(run: Run) -> str:
    return html.escape(run.recipe.replace(" ", "-"))


def _contents(runs: list[Run]) -> str:
    links = (f'<li><a href="#{_anchor(run)}">{html.escape(run.recipe)}</a></li>' for run in runs)
    return f"<nav><ol>{''.join(links)}</ol></nav>"


def _results_table(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        for result in run.results:
            state = run.state_of(result)
            measured = run.measured(result)
            cells = (run.recipe, result.metric, result.claim, measured, state, run.training, result.source)
            rows.append(f'<tr class="{state}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(
        f"<th>{name}</th>" for name in ("recipe", "metric", "claimed", "measured", "", "training", "who says so")
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _definitions(facts: dict[str, str]) -> str:
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    return f'<table class="facts">{rows}</table>'


def _picture(content: bytes, caption: str, kind: str = "png") -> str:
    data = base64.b64encode(content).decode()
    name = html.escape(caption)
    return f'<figure><figcaption>{name}</figcaption><img alt="{name}" src="data:image/{kind};base64,{data}"></figure>'


def _embedded(page: Path) -> str:
    """A page that needs nothing beside it, within this one."""
    name = html.escape(page.stem.replace("_", " "))
    content = html.escape(page.read_text(encoding="utf-8"))
    return f'<figure><figcaption>{name}</figcaption><iframe title="{name}" srcdoc="{content}"></iframe></figure>'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: {verdict}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.5rem; }} h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #ddd; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
td, th {{ padding: .3rem .8rem; text-align: left; border-bottom: 1px solid #e5e5e5; vertical-align: top; }}
.facts th {{ font-weight: 600; white-space: nowrap; }} .facts td {{ overflow-wrap: anywhere; }}
tr.met td:nth-child(5) {{ color: #167a2f; font-weight: 600; }}
tr.missed td:nth-child(5), tr.failed td:nth-child(5) {{ color: #b3151d; font-weight: 600; }}
figure {{ margin: 1.5rem 0; }} figcaption {{ font-weight: 600; }} img {{ max-width: 100%; height: auto; }}
iframe {{ width: 100%; height: 36rem; border: 1px solid #e5e5e5; border-radius: 6px; }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: 1rem; }}
nav ol {{ columns: 16rem 3; }} a {{ color: #0b57a4; }}
</style>
</head>
<body>
<h1>{title}: {verdict}</h1>
<p>{date}</p>
{results}
{to_come}
{contents}
{sections}
<h2>Environment</h2>
{environment}
</body>
</html>
"""
