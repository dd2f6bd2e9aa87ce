"""What a classifier says of pictures of one's own: the best classes of each."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.running.picture_files import evaluation_of, printable, read_picture, short_name
from zoo.running.pictures import contact_sheet
from zoo.running.views import Kind, averaging_views
from zoo.tasks.classification import ClassificationTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SHOWN = 32  # pictures on the contact sheet


class ClassifiedFiles:
    """Files with the classes that a model sees on them.

    Args:
        model: A classifier in evaluation mode, on its device.
        top: So many classes of each picture, at most 5.
        test_time_augmentation: Average over the views of :mod:`zoo.running.views`.
    """

    batch_size = 64

    def __init__(self, model: ClassificationTask, top: int = 5, test_time_augmentation: Kind | None = None) -> None:
        self.model = model
        self.top = top
        self.kind = test_time_augmentation
        self._shown: list[Tensor] = []
        self._captions: list[str] = []

    def read(self, path: Path) -> Tensor:
        """One picture (C, H, W) as the evaluation of the training made images; else of the size of the model."""
        channels, _, size = self.model.example_input_array.shape[1:]
        made = evaluation_of(self.model)
        return read_picture(path, channels, made.get("size", size), made.get("short_side"), made.get("resize"))

    def predict(self, paths: list[Path], images: list[Tensor]) -> list[dict[str, Any]]:
        """A row for each picture: ``file`` and ``top``, pairs of a class's name and its probability."""
        predictions = self._predictions(torch.stack(images).to(self.model.device))
        rows = [
            {"file": str(path), "top": prediction["top"][: self.top]}
            for path, prediction in zip(paths, predictions, strict=True)
        ]
        free = SHOWN - len(self._shown)
        self._shown += images[:free]
        self._captions += [_caption(row) for row in rows[:free]]
        return rows

    def sheet(self) -> "Figure":
        """The first pictures with the best class of each."""
        return contact_sheet(torch.stack(self._shown), self._captions, "predictions")

    def table(self, rows: list[dict[str, Any]]) -> "Table":
        """The best classes of each picture."""
        from rich.table import Table
        from rich.text import Text

        numbers = [str(number) for number in range(1, len(rows[0]["top"]) + 1)]
        table = Table("picture", *numbers, box=None, header_style="bold", padding=(0, 1))
        for row in rows:
            best = (Text(f"{name} {probability:.1%}") for name, probability in row["top"])
            table.add_row(Text(printable(row["file"])), *best)
        return table

    def _predictions(self, images: Tensor) -> list[dict[str, Any]]:
        with torch.inference_mode():
            if self.kind is None:
                return self.model.predict_step(images, 0)
            with averaging_views(self.model, self.kind):
                return self.model.predict_step(images, 0)


def _caption(row: dict[str, Any]) -> str:
    name, probability = row["top"][0]
    return f"{short_name(row['file'])}\n{name} {probability:.0%}".replace("$", r"\$")  # no formula
