"""The mesh task around a model whose meshes are known."""

import json

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from scipy.spatial.distance import cdist
from torch import nn, optim

from zoo.running import mesh_pictures
from zoo.running.pictures import to_png
from zoo.running.predictions import WritePredictions
from zoo.tasks.mesh import Meshes, MeshTask
from zoo.tasks.mesh_losses import Pix2MeshLoss

trimesh = pytest.importorskip("trimesh")
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
NAMES = ["chair", "lamp", "unseen"]
SHOWN = 3
OCTAHEDRON = torch.tensor([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]]).float()
FACES = torch.tensor([[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]])
EDGES = torch.tensor([[0, 2], [0, 3], [0, 4], [0, 5], [1, 2], [1, 3], [1, 4], [1, 5], [2, 4], [2, 5], [3, 4], [3, 5]])


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    """Pictures of few pixels, and few of them: test_mesh_pictures.py looks at what they show."""
    for name, value in (("SIDE", 24), ("FRAME_SIDE", 24), ("FRAMES", 5)):
        monkeypatch.setattr(mesh_pictures, name, value)
    monkeypatch.setattr("zoo.tasks.mesh.SHOWN", SHOWN)


class Oracle(MeshTask):
    """Makes an octahedron as large as an image is bright, in one stage; its camera moves it aside by what it is off."""

    def __init__(self, class_names=None, optimizer=lambda p: optim.SGD(p, lr=0.001), scheduler=None):
        super().__init__(class_names, optimizer, scheduler)
        self.example_input_array = torch.zeros(1, 3, 8, 8)
        self.size = nn.Parameter(torch.tensor(1.0))
        self.loss = Pix2MeshLoss()

    edges = property(lambda self: [EDGES])
    faces = property(lambda self: FACES)

    def meshes(self, images, intrinsics):
        bright = images.mean((1, 2, 3))[:, None, None] * self.size
        before = 0.1 * OCTAHEDRON.expand(len(images), -1, -1) - torch.tensor([0, 0, 0.8])
        aside = torch.stack([intrinsics[..., 0, 2], intrinsics[..., 1, 2], intrinsics[..., 1, 2]], -1).view(-1, 1, 3)
        return Meshes([before + bright * OCTAHEDRON + 0 * aside], [before])

    def camera(self, height, width):
        return torch.eye(3)


def batch(numbers):
    rng = torch.Generator().manual_seed(sum(numbers))
    views = [torch.Generator().manual_seed(number) for number in numbers]
    points = [0.1 * torch.randn(20, 3, generator=each) - torch.tensor([0, 0, 0.8]) for each in views]
    normals = nn.functional.normalize(torch.randn(len(numbers), 20, 3, generator=rng), dim=-1)
    return {
        "image": torch.stack([torch.full((3, 8, 8), 0.01 * n) for n in numbers])
        if numbers
        else torch.zeros(0, 3, 8, 8),
        "points": torch.stack(points) if numbers else torch.zeros(0, 20, 3),
        "normals": normals,
        "intrinsics": torch.eye(3).repeat(len(numbers), 1, 1),
        "category": torch.tensor([number % 2 for number in numbers], dtype=torch.int64),
    }


class Views(LightningDataModule):
    def __init__(self, batches):
        super().__init__()
        self.batches = [batch(numbers) for numbers in batches]

    def loader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


def by_hand(number):
    """Chamfer distance times 1000 and F-scores of a view, from all distances in float64."""
    mesh = Oracle()(batch([number])["image"])[0].detach().double().numpy()
    squares = cdist(batch([number])["points"][0].double().numpy(), mesh, "sqeuclidean")
    there, back = squares.min(0), squares.min(1)
    scores = [1000 * (there.mean() + back.mean())]
    for tau in (1e-4, 2e-4):
        precision, recall = (there <= tau).mean(), (back <= tau).mean()
        scores.append(2 * precision * recall / max(precision + recall, 1e-300))
    return np.array(scores)


@pytest.mark.parametrize("split", [[[0, 1, 2], [3, 4], [6]], [[0, 1, 2, 3, 4, 6]], [[], [0, 1], [2, 3, 4, 6], []]])
def test_scores_are_means_over_categories_however_batches_fall(split):
    trainer = Trainer(**QUIET, logger=False)
    (measured,) = trainer.test(Oracle(NAMES), Views(split), verbose=False)
    each = {number: by_hand(number) for number in (0, 1, 2, 3, 4, 6)}
    chair = np.mean([each[number] for number in (0, 2, 4, 6)], axis=0)
    lamp = np.mean([each[number] for number in (1, 3)], axis=0)
    for k, name in enumerate(("chamfer", "f_score", "f_score_2tau")):
        assert measured[f"test/{name}"] == pytest.approx((chair[k] + lamp[k]) / 2, rel=1e-4, abs=1e-6)
        assert measured[f"test/{name}_chair"] == pytest.approx(chair[k], rel=1e-4, abs=1e-6)
        assert measured[f"test/{name}_lamp"] == pytest.approx(lamp[k], rel=1e-4, abs=1e-6)
    assert measured["test/samples"] == 6
    assert not [name for name in measured if "unseen" in name], "a category without a view has no score"


def test_what_each_deformation_but_the_last_gives_is_scored_as_a_test_of_it_alone():
    class InThree(Oracle):
        """Comes to the octahedron in three stages."""

        edges = property(lambda self: [EDGES] * 3)

        def meshes(self, images, intrinsics):
            (after,), (before,) = super().meshes(images, intrinsics)
            return Meshes([2.5 * after, 1.5 * after, after], [before] * 3)

    class Shifted(Oracle):
        factor = 1.0

        def meshes(self, images, intrinsics):
            (after,), before = super().meshes(images, intrinsics)
            return Meshes([self.factor * after], before)

    def tested(model):
        return Trainer(**QUIET, logger=False).test(model, Views([[], [0, 1, 2], [3, 4]]), verbose=False)[0]

    model = InThree(NAMES)
    found = tested(model)
    for number, Shifted.factor in ((1, 2.5), (2, 1.5)):
        alone = tested(Shifted(NAMES))
        for name in ("chamfer", "f_score", "f_score_2tau"):
            assert found[f"test/{name}_block_{number}"] == pytest.approx(alone[f"test/{name}"], rel=1e-6)
    assert found["test/chamfer"] == pytest.approx(tested(Oracle(NAMES))["test/chamfer"], rel=1e-6)
    assert found["test/chamfer_block_1"] > found["test/chamfer_block_2"] > found["test/chamfer"]
    assert found == tested(model), "a second test begins anew"
    assert "test/chamfer_block_3" not in found


def test_without_names_all_views_are_one_category():
    (measured,) = Trainer(**QUIET, logger=False).test(Oracle(), Views([[0, 1, 2]]), verbose=False)
    assert measured["test/chamfer"] == pytest.approx(np.mean([by_hand(k)[0] for k in range(3)]), rel=1e-4)
    assert set(measured) == {"test/chamfer", "test/f_score", "test/f_score_2tau", "test/samples"}


def test_validation_logs_what_a_checkpoint_follows_and_the_loss_of_all_views():
    (measured,) = Trainer(**QUIET, logger=False).validate(Oracle(NAMES), Views([[0, 1, 2], [4], []]), verbose=False)
    assert Oracle.monitor in measured
    model = Oracle(NAMES)
    losses = []
    for numbers in ([0, 1, 2], [4]):
        given = batch(numbers)
        terms = model.loss(
            *model.meshes(given["image"], given["intrinsics"]), [EDGES], given["points"], given["normals"]
        )
        losses += [3000 * sum(terms.values()).item()] * len(numbers)
    assert measured["val/loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_training_logs_the_loss_as_the_sum_of_its_terms(tmp_path):
    trainer = Trainer(**QUIET, max_epochs=1, log_every_n_steps=1, logger=CSVLogger(tmp_path, name="", version=""))
    model = Oracle(NAMES)
    trainer.fit(model, Views([[1, 2], [3, 4]]))
    logged = {name: float(value) for name, value in trainer.logged_metrics.items() if name.startswith("train/")}
    terms = [value for name, value in logged.items() if name != "train/loss"]
    assert len(terms) == 5
    assert logged["train/loss"] == pytest.approx(sum(terms), rel=1e-5)
    assert float(model.size) != 1


def test_a_camera_is_taken_from_the_batch_or_else_the_models_own():
    seen = []

    class Looking(Oracle):
        def meshes(self, images, intrinsics):
            seen.append(intrinsics.shape)
            return super().meshes(images, intrinsics)

    model = Looking()
    model(batch([1, 2])["image"])
    model.predict_step(batch([1, 2]), 0)
    model.predict_step(batch([1, 2])["image"], 0)
    assert seen == [(3, 3), (2, 3, 3), (3, 3)]


def test_a_test_draws_a_sheet_a_turning_picture_and_a_page(tmp_path):
    pytest.importorskip("embreex")
    for number in range(2):  # and draws the same views again
        trainer = Trainer(**QUIET, logger=CSVLogger(tmp_path / str(number), name="", version=""))
        trainer.test(Oracle(NAMES), Views([[0, 1, 2], [3, 4], [6, 7, 8, 9]]), verbose=False)
    written = sorted((tmp_path / "0" / "pictures").iterdir())
    assert [path.name for path in written] == ["test_meshes.gif", "test_meshes.html", "test_meshes.png"]
    with Image.open(written[0]) as animation:
        assert animation.n_frames == 5
    with Image.open(written[2]) as sheet:
        assert len(set(sheet.convert("L").tobytes())) > 20
    assert written[1].read_bytes() == (tmp_path / "1" / "pictures" / "test_meshes.html").read_bytes()
    content = json.loads(written[1].read_text().split("const content = ")[1].split(";\n")[0])
    assert len(content["pairs"]) == SHOWN
    captions = {pair["caption"] for pair in content["pairs"]}
    scores = [by_hand(k) for k in (0, 1, 2, 3, 4, 6, 7, 8, 9)]
    assert captions <= {f"{name}\nChamfer {s[0]:.2f}, F {s[1]:.1%}" for s in scores for name in NAMES}


def test_the_truth_is_shown_as_the_data_modules_mesh_where_it_has_one(tmp_path, monkeypatch):
    asked, shown = [], []

    class WithMeshes(Views):
        def mesh(self, split, index):
            asked.append((split, index))
            if index % 2:
                raise ValueError("points only")
            return OCTAHEDRON * index, FACES

    monkeypatch.setattr("zoo.tasks.mesh.SHOWN", 6)
    monkeypatch.setattr("zoo.tasks.mesh.log_meshes", lambda module, name, pairs: shown.extend(pairs))
    Trainer(**QUIET, logger=CSVLogger(tmp_path)).test(Oracle(), WithMeshes([[0, 1], [2, 3]]), verbose=False)
    assert sorted(asked) == [("test", index) for index in range(4)]
    for (_, index), pair in zip(asked, shown, strict=True):
        assert torch.equal(pair.image, batch([index])["image"][0])
        if index % 2:
            torch.testing.assert_close(pair.true.points, batch([index])["points"][0])
            assert pair.true.faces is None
        else:
            assert torch.equal(pair.true.points, OCTAHEDRON * index)


def test_the_shown_views_are_drawn_from_all_evenly(monkeypatch):
    """Of 15 views each must be among the 3 in about a fifth of 200 draws."""
    model, counts = Oracle(), np.zeros(15)
    places = torch.arange(15).split(4)
    batches = [batch([0] * len(place)) | {"place": place} for place in places]
    monkeypatch.setattr(model, "_pair", lambda *_: None)
    monkeypatch.setattr(model, "_count", lambda meshes, given, *scores: given["place"])
    for seed in range(200):
        model._draw.manual_seed(seed)
        model._drawn = []
        for given in batches:
            model.test_step(given, 0)
        assert len(model._drawn) == SHOWN
        counts[[place for _, place, _ in model._drawn]] += 1
    # Binomial with p = 0.2: mean 40, deviation 5.7.
    assert abs(counts - 40).max() < 5 * 5.7


def test_predict_writes_meshes_that_trimesh_opens(tmp_path):
    pytest.importorskip("embreex")
    trainer = Trainer(**QUIET, logger=CSVLogger(tmp_path, name="", version=""), callbacks=[WritePredictions()])
    trainer.predict(Oracle(NAMES), Views([[4, 9], [], [7]]), return_predictions=False)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["mesh"] for row in rows] == [f"meshes/{number:05d}.glb" for number in range(3)]
    for row, number in zip(rows, (4, 9, 7), strict=True):
        opened = trimesh.load(tmp_path / row["mesh"], force="mesh", process=False)
        expected = Oracle()(batch([number])["image"])[0].detach()
        torch.testing.assert_close(torch.tensor(np.array(opened.vertices)).float(), expected)
        assert np.array_equal(opened.faces, FACES)
        assert opened.is_watertight
        assert opened.volume > 0
        assert row["extents"] == pytest.approx((expected.amax(0) - expected.amin(0)).tolist(), abs=1e-4)
    with Image.open(tmp_path / "predictions.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 20


@pytest.mark.parametrize("alone", [False, True])
def test_predictions_are_drawn_with_and_without_the_truth(alone):
    pytest.importorskip("embreex")
    given = batch([1, 2])["image"] if alone else batch([1, 2])
    model = Oracle()
    predictions = model.predict_step(given, 0)
    assert torch.equal(predictions[0]["vertices"], model(batch([1])["image"])[0])
    assert to_png(model.draw_predictions(given, predictions)).startswith(b"\x89PNG")


def test_a_mesh_that_is_no_number_is_scored_as_none_and_drawn_all_the_same(tmp_path):
    pytest.importorskip("embreex")
    model = Oracle()
    nn.init.constant_(model.size, torch.nan)
    trainer = Trainer(**QUIET, logger=CSVLogger(tmp_path, name="", version=""))
    (measured,) = trainer.test(model, Views([[1, 2]]), verbose=False)
    assert np.isnan(measured["test/chamfer"])
    assert (tmp_path / "pictures" / "test_meshes.png").is_file()
