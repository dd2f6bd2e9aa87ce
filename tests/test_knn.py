"""k-nearest neighbours against scikit-learn, a tie counted by hand, and what a memory in a checkpoint must stand."""

import inspect

import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from sklearn.model_selection import KFold
from sklearn.neighbors import KNeighborsClassifier
from torch.utils.data import DataLoader, TensorDataset

import zoo
from datamodules import DigitsDataModule
from zoo import KNearestNeighbors
from zoo.cli import main
from zoo.knn import Neighbours, Votes, cross_validation, cross_validation_figure
from zoo.layer_table import layer_table

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def pictures(samples, seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (samples, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return images, torch.randint(classes, (samples,), generator=generator)


def model_of(images, labels, **options):
    model = KNearestNeighbors(num_classes=4, image_size=4, **options).eval()
    model.backbone.remember(images, labels)
    return model


def loader(images, labels, batch_size=8):
    return DataLoader(TensorDataset(images.float() / 255, labels), batch_size)


def without_a_tie(votes):
    """Rows where one class has more votes than any other."""
    first, second = votes.topk(2).values.T
    return first > second


@pytest.mark.parametrize(("distance", "metric"), [("l2", "euclidean"), ("l1", "manhattan")])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_predictions_are_scikit_learns(distance, metric, k, monkeypatch):
    monkeypatch.setattr("zoo.knn.BLOCK", 48 * 64)  # 300 images in five blocks
    known, labels = pictures(300)
    queries = torch.rand(200, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    model = model_of(known, labels, k=k, distance=distance)
    theirs = KNeighborsClassifier(k, algorithm="brute", metric=metric)
    theirs.fit(known.flatten(1).double() / 255, labels)
    share = torch.from_numpy(theirs.predict_proba(queries.flatten(1).double()))
    logits = model(queries)
    clear = without_a_tie(share)
    assert clear.sum() > 50
    assert logits.argmax(1)[clear].tolist() == theirs.predict(queries.flatten(1).double())[clear].tolist()
    torch.testing.assert_close(logits.softmax(1).double(), (share * k + 0.01) / (k + 0.04), rtol=0, atol=1e-5)
    nearest = theirs.kneighbors(queries.flatten(1).double(), return_distance=False)
    assert model.backbone.nearest(queries, k).tolist() == nearest.tolist()


def test_a_tie_goes_to_the_smallest_label():
    """On a line at 0, 10, 20, 30: from 14 two votes for class 3 (10, 0), two for class 1 (20, 30)."""
    known = torch.tensor([0, 10, 20, 30], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 4, 4)
    query = torch.full((1, 3, 4, 4), 14 / 255)
    model = model_of(known, torch.tensor([3, 3, 1, 1]), k=4)
    assert model(query).argmax(1).tolist() == [1]
    assert model.predict_step(query, 0)[0]["class_name"] == "1"
    assert model_of(known, torch.tensor([3, 3, 1, 1]), k=1)(query).argmax(1).tolist() == [3]
    assert model_of(known, torch.tensor([3, 3, 1, 1]), k=3)(query).argmax(1).tolist() == [3]


def test_ties_of_all_classes_stay_in_order():
    logits = Votes(50)(torch.arange(50).flip(0)[None])
    assert logits.argsort(descending=True).tolist() == [list(range(50))]


def test_the_nearest_of_a_remembered_image_is_itself():
    known, labels = pictures(50)
    assert model_of(known, labels).backbone.nearest(known.float() / 255, 1)[:, 0].tolist() == list(range(50))


def test_without_a_memory_all_classes_are_as_likely():
    logits = KNearestNeighbors(num_classes=4, image_size=4)(torch.rand(2, 3, 4, 4))
    torch.testing.assert_close(logits.softmax(1), torch.full((2, 4), 0.25), rtol=0, atol=1e-5)


def test_with_fewer_images_than_k_all_of_them_vote():
    known, labels = pictures(3)
    logits = model_of(known, labels, k=10)(torch.rand(2, 3, 4, 4))
    expected = (torch.bincount(labels, minlength=4) + 0.01) / 3.04
    torch.testing.assert_close(logits.softmax(1), expected.expand(2, 4), rtol=0, atol=1e-5)


def test_bf16_autocast_changes_nothing():
    known, labels = pictures(300)
    model, queries = model_of(known, labels), torch.rand(50, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(queries)
    assert torch.equal(found, model(queries))


@pytest.mark.parametrize("batch_size", [300, 50])
def test_training_remembers_every_image_once_however_many_epochs(batch_size):
    images, labels = pictures(300)
    model = KNearestNeighbors(num_classes=4, image_size=4)
    run = Trainer(**QUIET, max_epochs=2)
    run.fit(model, loader(images, labels, batch_size))
    assert torch.equal(model.backbone.images, images)
    assert torch.equal(model.backbone.labels, labels)
    assert run.global_step == 2 * 300 / batch_size


def test_images_that_fill_no_batch_are_named():
    data = DigitsDataModule(image_size=8, batch_size=500, val_size=0)
    model = KNearestNeighbors(in_channels=1, image_size=8)
    with pytest.warns(UserWarning, match="1000 of 1437 training images are remembered"):
        Trainer(**QUIET, max_epochs=1).fit(model, data)


def test_several_processes_remember_what_one_remembers():
    states = []
    for strategy, devices in (("auto", 1), ("ddp_fork", 2)):
        seed_everything(0, verbose=False)
        data = DigitsDataModule(image_size=8, batch_size=128, val_size=157)
        model = KNearestNeighbors(in_channels=1, image_size=8, cross_validate=[1, 5])
        run = Trainer(**QUIET, max_epochs=1, accelerator="cpu", strategy=strategy, devices=devices)
        run.fit(model, data)
        metrics = {name: float(value) for name, value in run.callback_metrics.items()}
        states.append((metrics, run.lightning_module.backbone.state_dict()))
    (one, memory), (two, shared) = states
    assert one == pytest.approx(two, abs=1e-6)
    assert {"cross_validation/k", "val/accuracy"} <= one.keys()
    assert len(memory["labels"]) == 1280
    assert all(torch.equal(memory[name], shared[name]) for name in memory)


def test_cross_validation_is_scikit_learns():
    known, labels = pictures(203)
    labels = (known.float().mean((1, 2, 3)) > 127).long() + 2 * (labels % 2)  # something can be learnt
    memory = Neighbours(1, "l2", 3, 4)
    memory.remember(known, labels)
    found = cross_validation(memory, Votes(4), [1, 3, 5], 5)
    pixels = known.flatten(1).double().numpy()
    for k in (1, 3, 5):
        expected = [
            KNeighborsClassifier(k).fit(pixels[rest], labels[rest]).score(pixels[part], labels[part])
            for rest, part in KFold(5).split(pixels)
        ]
        assert found[k] == pytest.approx(expected, abs=1e-6)


def test_the_chosen_k_is_kept_in_the_checkpoint(tmp_path):
    """Each picture has one near copy and nothing else like it: k = 1 is right."""
    base, labels = pictures(40)
    images = torch.cat([base, base.clamp_max(254) + 1])
    labels = torch.cat([labels, labels])
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    model = KNearestNeighbors(k=10, num_classes=4, image_size=4, cross_validate=[10, 1, 20])
    run = Trainer(**QUIET | {"enable_checkpointing": True}, max_epochs=1, default_root_dir=tmp_path)
    run.fit(model, loader(images[order], labels[order]))
    assert model.backbone.k == 1
    assert run.callback_metrics["cross_validation/k"] == 1
    assert run.callback_metrics["cross_validation/accuracy"] > 0.7
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert zoo.load(tmp_path / "a.ckpt").backbone.k == 1


def test_the_memory_travels_with_every_file(tmp_path):
    known, labels = pictures(20)
    model, queries = model_of(known, labels, k=3), torch.rand(5, 3, 4, 4)
    zoo.save(model, tmp_path / "w.safetensors")
    started = KNearestNeighbors(k=3, num_classes=4, image_size=4, weights=str(tmp_path / "w.safetensors"))
    bare = KNearestNeighbors(k=3, num_classes=4, image_size=4)
    bare.load_state_dict(model.state_dict())
    for other in (zoo.load(tmp_path / "w.safetensors"), started, bare):
        assert other.backbone.images.dtype == torch.uint8
        assert torch.equal(other(queries), model(queries))
    with pytest.raises(ValueError, match="remembers labels up to 3, this model has 2"):
        KNearestNeighbors(num_classes=2, image_size=4, weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match=r"backbone\.images has shape"):
        KNearestNeighbors(num_classes=4, image_size=5, weights=str(tmp_path / "w.safetensors"))


def test_what_cannot_be_is_refused():
    for wrong in ({"k": 0}, {"cross_validate": [1, 0]}, {"folds": 1}):
        with pytest.raises(ValueError, match="are needed"):
            KNearestNeighbors(**wrong)
    images, labels = pictures(8)
    with pytest.raises(ValueError, match="images are 3x4x4, expected 1x28x28"):
        Trainer(**QUIET, max_epochs=1).fit(KNearestNeighbors(in_channels=1, image_size=28), loader(images, labels))
    shares = torch.nn.functional.one_hot(labels, 4).float()
    with pytest.raises(ValueError, match="mixup and cutmix off"):
        Trainer(**QUIET, max_epochs=1).fit(KNearestNeighbors(image_size=4), loader(images, shares))
    with pytest.raises(ValueError, match="8 training images are too few for 9 folds"):
        cross_validation(model_of(images, labels).backbone, Votes(4), [1], 9)


@pytest.mark.parametrize("samples", [0, 30])
def test_the_neighbours_are_drawn(tmp_path, monkeypatch, samples):
    drawn = []
    sheet = zoo.knn.contact_sheet
    monkeypatch.setattr("zoo.knn.contact_sheet", lambda *a: drawn.append(a) or sheet(*a))
    known, labels = pictures(samples)
    model, (images, truth) = model_of(known, labels), pictures(12, seed=1)
    run = Trainer(**QUIET | {"logger": CSVLogger(tmp_path)})
    run.test(model, loader(images, truth), verbose=False)
    shown, captions, _, wrong = drawn[0]
    assert len(shown) == len(captions) == len(wrong) == 8 * (1 + min(7, samples))
    assert torch.equal(shown[0], images[0].float() / 255)
    if samples:
        nearest = model.backbone.nearest(images[:1].float() / 255, 1)[0, 0]
        assert torch.equal(shown[1], known[nearest].float() / 255)
        assert captions[:2] == [f"test: {truth[0]}", f"{labels[nearest]}"]
        assert wrong[1] == bool(labels[nearest] != truth[0])
    with Image.open(f"{run.log_dir}/pictures/test_neighbours.png") as picture:
        assert min(picture.size) > 100


def test_the_cross_validation_is_drawn():
    figure = cross_validation_figure({10: [0.5, 0.7], 1: [0.2, 0.4]}, 10)
    bars = figure.axes[0].containers[0]
    assert bars.lines[0].get_xdata().tolist() == [1, 10]
    assert bars.lines[0].get_ydata().tolist() == pytest.approx([0.3, 0.6])


def test_it_is_an_architecture_of_the_zoo():
    """What the conformance suite asks of constructors, but for the optimizer that it has no use for."""
    parameters = inspect.signature(KNearestNeighbors).parameters
    assert KNearestNeighbors.__mro__.index(LightningModule) == 2
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    assert not [p for p in parameters if f"{p}:" not in inspect.getdoc(KNearestNeighbors)]
    assert "weights" in parameters


def test_the_embedded_recipe_is_run_and_tested_by_its_checkpoints(tmp_path):
    assert main(["fit", "knn/embedded"]) == 0
    for name in ("best", "last"):
        assert main(["test", "knn/embedded", "--ckpt_path", name]) == 0
    checkpoint = tmp_path / "runs/knn/embedded/version_0/checkpoints/last.ckpt"
    assert main(["export", str(checkpoint), "--format", "safetensors"]) == 0
    assert len(zoo.load(checkpoint.with_suffix(".safetensors")).backbone.labels) == 1280


def test_the_table_of_its_layers_is_made_without_values():
    with torch.device("meta"):
        model = KNearestNeighbors()
    rows = layer_table(model, torch.zeros(1, 3, 32, 32, device="meta"))
    assert sum(row.parameters for row in rows) == 1  # the votes' smoothing
