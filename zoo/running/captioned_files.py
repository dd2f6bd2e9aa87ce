"""What a captioner says of pictures of one's own."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.running.caption_pictures import attention_figure, captions_figure
from zoo.running.picture_files import evaluation_of, printable, read_pixels, resized
from zoo.tasks.captioning import LOOKED_AT, SHOWN, CaptioningTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


class CaptionedFiles:
    """Files with the captions that a model gives them.

    Args:
        model: A captioner in evaluation mode, on its device.
    """

    batch_size = 64

    def __init__(self, model: CaptioningTask) -> None:
        self.model = model
        self._images: list[Tensor] = []
        self._captions: list[str] = []
        self._looks: list[Tensor] = []

    def read(self, path: Path) -> Tensor:
        """One picture (3, H, W) as in training: a square, whatever its shape was; else of the size of the model."""
        size = evaluation_of(self.model).get("size", self.model.example_input_array.shape[-1])
        return resized(read_pixels(path), size, size).float().div_(255)

    def predict(self, paths: list[Path], images: list[Tensor]) -> list[dict[str, Any]]:
        """A row for each picture: ``file``, ``caption``, ``log_probability``."""
        with torch.inference_mode():
            captions = self.model.caption(torch.stack(images).to(self.model.device))
        texts = self.model.sentences(captions.tokens)
        left = SHOWN - len(self._images)
        self._images += images[: max(0, left)]
        self._captions += texts[: max(0, left)]
        if captions.attention is not None:
            self._looks += list(captions.attention[: max(0, left)].cpu())
        return [
            {"file": str(path), "caption": text, "log_probability": value}
            for path, text, value in zip(paths, texts, captions.log_probabilities.tolist(), strict=True)
        ]

    def sheet(self) -> "Figure":
        """The first pictures with their captions; word by word where there is attention."""
        if not self._looks:
            return captions_figure(self._images, self._captions, None)
        words = [text.split() for text in self._captions[:LOOKED_AT]]
        return attention_figure(self._images[:LOOKED_AT], words, self._looks[:LOOKED_AT])

    def table(self, rows: list[dict[str, Any]]) -> "Table":
        """Each picture and its caption."""
        from rich.table import Table
        from rich.text import Text

        table = Table("picture", "caption", box=None, header_style="bold", padding=(0, 1))
        for row in rows:
            table.add_row(Text(printable(row["file"])), Text(row["caption"]))
        return table
