"""Predictions as files: all of them as JSON lines, the first batch as a picture."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from zoo.running.pictures import write_png


class WritePredictions(Callback):
    """Writes ``predictions.jsonl`` and ``predictions.png`` to the run's folder after a prediction.

    Works with modules whose ``predict_step`` returns a list of plain dicts, one for each sample; the picture is drawn
    by the module's ``draw_predictions(batch, predictions)``. What is no line of text a module writes to a file of its
    own: its ``write_prediction(folder, number, prediction)`` returns the plain dict.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._folder: Path | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._rows = []
        folder = trainer.log_dir  # asked by every process: they agree on it together
        self._folder = Path(folder) if folder and not trainer.fast_dev_run else None  # type: ignore[attr-defined]

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows; draw the first batch."""
        if not isinstance(outputs, list) or self._folder is None:
            return
        draw: Any = getattr(pl_module, "draw_predictions", None)
        if batch_idx == 0 and trainer.is_global_zero and draw is not None:
            write_png(draw(batch, outputs), self._folder / "predictions.png")
        write: Any = getattr(pl_module, "write_prediction", None)
        for prediction in outputs:
            number = len(self._rows) * trainer.world_size + trainer.global_rank
            self._rows.append(prediction if write is None else write(self._folder, number, prediction))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the rows of all processes into the order of the data and write them."""
        shares: list[Any] = [self._rows]
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, self._rows)
        if self._folder is None or not trainer.is_global_zero:
            return
        # Process r had samples r, r + k, r + 2k, … (datamodules.sampling.EvaluationBatches).
        rows = [share[i] for i in range(max(map(len, shares))) for share in shares if i < len(share)]
        if rows:
            path = self._folder / "predictions.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            rank_zero_info(f"{len(rows)} predictions in {path}, the first ones as a picture beside it")
