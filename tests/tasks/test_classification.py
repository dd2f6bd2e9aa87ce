"""The classification task against scikit-learn and a formula in float64."""

import pytest
import torch
from lightning import Trainer
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix
from torch.utils.data import DataLoader, TensorDataset

from zoo import LeNet

CSV = "lightning.pytorch.loggers.CSVLogger"


def data(samples=37, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(samples, 1, 8, 8, generator=generator)
    return images, torch.randint(classes, (samples,), generator=generator)


def trainer(folder=None, **options):
    from lightning.pytorch.loggers import CSVLogger

    return Trainer(
        logger=CSVLogger(folder) if folder else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LeNet(num_classes=4, class_names=["a", "b", "c", "d"], image_size=8)


@pytest.mark.parametrize("batch_size", [1, 5, 37])
def test_metrics_are_those_of_the_whole_set_whatever_the_batch(model, tmp_path, batch_size):
    images, labels = data()
    loader = DataLoader(TensorDataset(images, labels), batch_size)
    found = trainer(tmp_path).test(model, loader, verbose=False)[0]
    logits = model.double()(images.double())
    predicted = logits.argmax(1)
    nll = -(logits - logits.exp().sum(1, keepdim=True).log())[torch.arange(37), labels]
    assert found["test/accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["test/loss"] == pytest.approx(nll.mean().item(), abs=1e-6)
    assert found["test/samples"] == 37


def test_the_confusion_matrix_is_sklearns(model, tmp_path):
    images, labels = data()
    seen = []
    compute = model.test_confusion.compute
    model.test_confusion.compute = lambda: seen.append(compute()) or seen[-1]
    trainer(tmp_path).test(model, DataLoader(TensorDataset(images, labels), 8), verbose=False)
    expected = confusion_matrix(labels, model.eval()(images).argmax(1), labels=range(4))
    assert seen[0].tolist() == expected.tolist()


def test_pictures_of_the_test_are_written(model, tmp_path):
    images, labels = data()
    run = trainer(tmp_path)
    run.test(model, DataLoader(TensorDataset(images, labels), 8), verbose=False)
    for name in ("test_confusion_matrix", "test_worst_mistakes"):
        with Image.open(f"{run.log_dir}/pictures/{name}.png") as picture:
            assert min(picture.size) > 100
            assert len(set(picture.convert("L").tobytes())) > 10


def test_a_test_without_a_mistake_draws_an_empty_sheet(model, tmp_path):
    images, _ = data()
    labels = model.eval()(images).argmax(1)
    run = trainer(tmp_path)
    assert run.test(model, DataLoader(TensorDataset(images, labels), 8), verbose=False)[0]["test/accuracy"] == 1
    assert (tmp_path / "lightning_logs" / "version_0" / "pictures" / "test_worst_mistakes.png").is_file()


def test_the_worst_mistakes_are_those_with_the_largest_loss(model, tmp_path, monkeypatch):
    images, labels = data(300)
    sheets = []
    monkeypatch.setattr("zoo.tasks.classification.contact_sheet", lambda *a: sheets.append(a) or _figure())
    trainer(tmp_path).test(model, DataLoader(TensorDataset(images, labels), 7), verbose=False)
    logits = model.eval()(images)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    wrong = (logits.argmax(1) != labels).nonzero()[:, 0]
    expected = images[wrong[losses[wrong].argsort(descending=True)[:24]]]
    assert torch.equal(sheets[0][0], expected)


def _figure():
    from matplotlib.figure import Figure

    return Figure()


def test_predictions_are_names_and_probabilities(model):
    images, _ = data()
    for batch in (images, (images, torch.zeros(37))):
        rows = model.eval().predict_step(batch, 0)
        scores = model(images).softmax(1)
        assert [row["class_name"] for row in rows] == [model.class_names[k] for k in scores.argmax(1)]
        assert [row["probability"] for row in rows] == pytest.approx(scores.max(1).values.tolist())
        assert [name for name, _ in rows[0]["top"]] == [
            model.class_names[k] for k in scores[0].argsort(descending=True)
        ]


def test_label_smoothing_is_in_the_training_loss_only(model, tmp_path):
    images, labels = data()
    smooth = LeNet(num_classes=4, image_size=8, label_smoothing=0.3)
    smooth.load_state_dict(model.state_dict())
    loader = DataLoader(TensorDataset(images, labels), 37)
    assert trainer(tmp_path).test(smooth, loader, verbose=False) == trainer(tmp_path).test(model, loader, verbose=False)
    run = trainer(tmp_path, max_steps=1, log_every_n_steps=1)
    smooth.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    run.fit(smooth, loader)
    log_p = model.double()(images.double()).log_softmax(1)
    expected = -(0.7 * log_p[torch.arange(37), labels] + 0.3 * log_p.mean(1)).mean()
    assert run.callback_metrics["train/loss"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_training_log_has_loss_and_accuracy_at_the_logged_steps(model, tmp_path):
    images, labels = data(64)
    run = trainer(tmp_path, max_steps=8, log_every_n_steps=4)
    run.fit(model, DataLoader(TensorDataset(images, labels), 8))
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert rows[0].split(",") == ["epoch", "step", "train/accuracy", "train/loss"]
    assert [row.split(",")[1] for row in rows[1:]] == ["3", "7"]
