"""Where a device has no float64, as Apple's, no recipe needs it there."""

import pytest
import torch
from devices import DEVICE, WithoutFloat64, is_there, strategy
from lightning import Trainer
from small_runs import QUIET, TASKS, build
from torch import nn

import zoo
from zoo.tasks.average_precision import mean_average_precision, nms, precision_recall
from zoo.tasks.generation_scores import FrechetDistance, GenerationScores
from zoo.tasks.mesh_scores import MeshScores
from zoo.tasks.shape_scores import point_scores


@pytest.mark.faults
@pytest.mark.parametrize("task", TASKS)
def test_no_task_needs_float64_on_the_device(task, tmp_path, monkeypatch):
    model, data = build(task)
    data.eval_batch_size = 4
    few = dict.fromkeys(("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"), 2)
    monkeypatch.chdir(tmp_path)  # where a test writes its detections
    with WithoutFloat64():
        run = Trainer(**QUIET, **few, strategy=strategy(), max_epochs=1)
        run.fit(model, data)
        assert all(is_there(parameter) for parameter in model.parameters())
        run.validate(model, data, verbose=False)
        run.test(model, data, verbose=False)
        run.predict(model, data)


@pytest.mark.parametrize(
    "reach",
    [
        lambda there: there.double(),
        lambda there: there.to(torch.float64),
        lambda there: (there * 2).relu().type(torch.float64),
        lambda there: torch.zeros(3, dtype=torch.float64, device=there.device),
        lambda there: torch.zeros(3, dtype=torch.float64).to(there.device),
        lambda there: nn.Linear(3, 3).double().to(there.device),
        lambda there: FrechetDistance(3).to(there.device),
        lambda there: nn.Linear(3, 3).to(there.device)(there).double(),
    ],
)
def test_float64_on_the_device_is_seen(reach):
    with WithoutFloat64():
        there = torch.rand(2, 3).to(DEVICE)
        assert there.cpu().double().sum() > 0
        with pytest.raises(TypeError, match=r"the device has no torch\.float64"):
            reach(there)


def test_scores_need_no_float64_on_the_device():
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5]])
    truth = {"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.8])}
    with WithoutFloat64():
        shapes, points = torch.rand(2, 3, 5, 3).to(DEVICE)
        point_scores(shapes, points)
        meshes = MeshScores().to(DEVICE)
        meshes.update(shapes, points, torch.zeros(3, dtype=torch.int64).to(DEVICE), torch.arange(3).to(DEVICE))
        meshes.compute()
        there = {key: value.to(DEVICE) for key, value in truth.items()}
        assert mean_average_precision([there], [there], num_classes=2)[0] == 1
        precision_recall(there["scores"], there["labels"] == 1, 1)
        nms(there["boxes"], there["scores"], 0.5)
        inception = FrechetDistance(3, nn.Linear(4, 3))
        inception.network.to(DEVICE)
        inception.update(torch.rand(5, 4).to(DEVICE), real=True)
        scores = GenerationScores(zoo.LeNet(image_size=8).double()).to(DEVICE)
        for real in (True, False):
            scores.update(torch.rand(6, 1, 8, 8).to(DEVICE), real, torch.arange(6).to(DEVICE))
        assert not any(is_there(value) for value in scores.compute().values())
