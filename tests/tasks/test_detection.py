"""The detection task around a detector whose answers are known."""

import json

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from pycocotools import mask as coco
from torch import nn, optim

from zoo.tasks.detection import DetectionTask

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
BOXES = torch.tensor([[4.0, 6.0, 24.0, 30.0], [30.0, 8.0, 60.0, 40.0], [10.0, 36.0, 28.0, 60.0]])
LABELS = torch.tensor([1, 2, 2])
SCORES = torch.tensor([0.9, 0.8, 0.3])


class Oracle(DetectionTask):
    """Knows the truths above; what it is told to miss or to add, it does."""

    def __init__(self, num_classes=2, class_names=None, optimizer=lambda p: optim.SGD(p, lr=0.1), scheduler=None):
        super().__init__(num_classes, class_names, optimizer, scheduler, ("boxes", "masks"))
        self.example_input_array = torch.zeros(1, 3, 64, 64)
        self.backbone, self.head = nn.Linear(1, 1), nn.Linear(1, 1)
        self.rows = [0, 1, 2]

    def detect(self, images):
        found = {"boxes": BOXES[self.rows], "labels": LABELS[self.rows], "scores": SCORES[self.rows]}
        return [found | {"masks": masks(found["boxes"])[:, None].float()} for _ in images]

    def losses(self, images, targets):
        value = self.head(self.backbone(images[0].mean().view(1, 1))).square().sum()
        return {"loss_one": value, "loss_two": 2 * value}


def masks(boxes):
    return torch.stack([_filled(box) for box in boxes]) if len(boxes) else torch.zeros(0, 64, 64, dtype=torch.uint8)


def _filled(box):
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    x1, y1, x2, y2 = box.long().tolist()
    mask[y1:y2, x1:x2] = 1
    return mask


def batch(ids):
    images = [torch.full((3, 64, 64), 0.1 * (k + 1)) for k in range(len(ids))]
    targets = [{"boxes": BOXES, "labels": LABELS, "masks": masks(BOXES), "image_id": torch.tensor(i)} for i in ids]
    return images, targets


class Pictures(LightningDataModule):
    num_classes, class_names, category_ids = 2, ["cat", "dog"], [17, 18]

    def train_dataloader(self):
        return torch.utils.data.DataLoader([batch([1, 2])] * 2, batch_size=None)

    def val_dataloader(self):
        return torch.utils.data.DataLoader([batch([3, 4]), batch([5])], batch_size=None)

    test_dataloader = predict_dataloader = val_dataloader


@pytest.fixture
def trainer(tmp_path):
    return Trainer(**QUIET, accelerator="cpu", max_epochs=1, log_every_n_steps=1, logger=CSVLogger(tmp_path, "", "run"))


def test_truths_found_score_one_and_missed_ones_less(trainer):
    model = Oracle(2, ["cat", "dog"])
    (numbers,) = trainer.test(model, Pictures(), verbose=False)
    assert numbers["test/samples"] == 3
    assert numbers["test/map"] == numbers["test/mask_map"] == 1
    model.rows = [0, 1]  # the second dog is missed: half of the dogs are found, at precision 1 up to recall 0.5
    (numbers,) = trainer.test(model, Pictures(), verbose=False)
    half = 51 / 101  # of COCO's recall thresholds 0, 0.01, … 1
    assert numbers["test/map"] == pytest.approx((1 + half) / 2, abs=1e-6)
    assert numbers["test/mask_map_50"] == pytest.approx((1 + half) / 2, abs=1e-6)
    assert numbers["test/samples"] == 3, "what the first test counted is forgotten"


def test_results_have_the_datas_own_ids(trainer, tmp_path):
    trainer.test(Oracle(2, ["cat", "dog"]), Pictures(), verbose=False)
    rows = json.loads((tmp_path / "run" / "results_bbox.json").read_text())
    assert len(rows) == 9
    assert {row["category_id"] for row in rows} == {17, 18}
    assert sorted({row["image_id"] for row in rows}) == [3, 4, 5]
    first = next(row for row in rows if row["category_id"] == 17)
    assert first["bbox"] == [4, 6, 20, 24]
    rows = json.loads((tmp_path / "run" / "results_segm.json").read_text())
    assert coco.area(rows[0]["segmentation"]) in {20 * 24, 30 * 32, 18 * 24}
    pictures = {path.name for path in (tmp_path / "run" / "pictures").iterdir()}
    assert pictures == {"test_detections.png", "test_precision_recall.png", "test_mask_precision_recall.png"}


def test_validation_logs_the_number_that_is_monitored(trainer):
    model = Oracle(2, ["cat", "dog"])
    trainer.fit(model, Pictures())
    assert model.monitor == "val/mask_map"
    metrics = trainer.callback_metrics
    assert metrics["val/mask_map"] == metrics["val/map_50"] == 1
    assert metrics["train/loss"] == pytest.approx(3 * float(metrics["train/loss_one"]), rel=1e-6)
    assert metrics["train/loss_two"] == pytest.approx(2 * float(metrics["train/loss_one"]), rel=1e-6)


def test_predictions_are_for_people(tmp_path):
    model = Oracle(2, ["cat", "dog"]).eval()
    images, targets = batch([1])
    (row,) = model.predict_step((images, targets), 0)
    json.dumps(row)
    cat, dog, _ = row["objects"]
    assert (cat["class_name"], cat["score"], cat["box"]) == ("cat", pytest.approx(0.9), [4, 6, 24, 30])
    assert np.array_equal(coco.decode(dog["mask"]), masks(BOXES)[1].numpy())
    figure = model.draw_predictions((images, targets), [row])
    assert len([axes for axes in figure.axes if axes.images]) == 2, "what was found, and beside it what is true"


def test_class_names_are_as_many_as_classes():
    with pytest.raises(ValueError, match="1 class_names were given for num_classes=2"):
        Oracle(2, ["cat"])
