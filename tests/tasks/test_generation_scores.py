"""Quality of generated pictures: against scipy, brute force and hand-computed cases."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

import zoo
from zoo.tasks.generation_scores import (
    FrechetDistance,
    GenerationScores,
    PrecisionRecall,
    SeenClasses,
    as_saved,
    load_classifier,
)


def features(n, d, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


def frechet(real, generated):
    metric = FrechetDistance(real.shape[1])
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return float(metric.compute())


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 5), (60, 80, 20)])
def test_frechet_distance_is_the_formula_with_scipys_matrix_root(n, m, d):
    real, generated = features(n, d, 0), features(m, d, 1, shift=0.5)
    (a, b), (s, t) = zip(
        *((x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)) for x in (real, generated)), strict=True
    )
    expected = ((a - b) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet(real, generated) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_gaussians_in_one_dimension_is_known():
    """(mean - mean)² + (deviation - deviation)²."""
    x = torch.randn(1000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (x - x.mean()) / x.std()
    assert frechet(x * 2 + 1, x * 5 + 4) == pytest.approx(3**2 + 3**2)


def test_frechet_distance_of_a_set_to_itself_is_0_also_with_more_features_than_samples():
    for x in (features(300, 30, 0), features(20, 50, 0)):
        assert frechet(x, x) == pytest.approx(0, abs=1e-4 * float(x.var(0).sum()))


def test_of_a_single_sample_there_is_no_distance():
    assert np.isnan(frechet(features(1, 3, 0), features(9, 3, 1)))


def in_reach(samples, others, k):
    """Kynkäänniemi's equation 1, pair by pair."""
    reach = [sorted(np.linalg.norm(o - p) for j, p in enumerate(others) if j != i)[k - 1] for i, o in enumerate(others)]
    return np.mean([any(np.linalg.norm(s - o) <= r for o, r in zip(others, reach, strict=True)) for s in samples])


@pytest.mark.parametrize("k", [2, 3])
def test_precision_and_recall_are_those_of_all_pairs(k):
    real, generated = features(40, 2, 0), features(50, 2, 0, shift=1.0)
    metric = PrecisionRecall(k)
    for part in real.split(7):
        metric.update(part, real=True)
    for part in generated.split(11):
        metric.update(part, real=False)
    precision, recall = (float(value) for value in metric.compute())
    assert precision == pytest.approx(in_reach(generated.numpy(), real.numpy(), k))
    assert recall == pytest.approx(in_reach(real.numpy(), generated.numpy(), k))
    assert 0 < recall < 1
    assert 0 < precision < 1


def test_a_generator_of_one_picture_is_precise_and_recalls_nothing():
    real = torch.arange(20, dtype=torch.float64)[:, None]
    metric = PrecisionRecall()
    metric.update(real, real=True)
    metric.update(torch.full((10, 1), 5.2, dtype=torch.float64), real=False)
    assert [float(value) for value in metric.compute()] == [1, 0]


def test_of_as_few_samples_as_neighbours_nothing_is_said():
    metric = PrecisionRecall(3)
    metric.update(torch.rand(3, 2), real=True)
    metric.update(torch.rand(9, 2), real=False)
    assert all(value.isnan() for value in metric.compute())


def test_what_a_classifier_sees():
    metric = SeenClasses(3)
    metric.update(torch.tensor([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1]]), torch.tensor([0, 0]))
    metric.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    metric.update(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0]))
    counts, confidence, accuracy = metric.compute()
    assert counts.tolist() == [2, 1, 0]
    assert float(confidence) == pytest.approx(0.8)
    assert float(accuracy) == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return zoo.LeNet(image_size=8).double().eval()


def test_numbers_do_not_depend_on_the_batches(judge):
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.rand(2, 30, 1, 8, 8, generator=generator)
    labels = torch.arange(30) % 10
    numbers = []
    for size in (30, 7):
        scores = GenerationScores(judge)
        for images, part, asked in zip(real.split(size), generated.split(size), labels.split(size), strict=True):
            scores.update(images, real=True)
            scores.update(part, real=False, asked=asked)
        numbers.append({name: float(value) for name, value in scores.compute().items()})
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-7)
    assert set(numbers[0]) == {
        "classifier_fid", "sample_confidence", "sample_classes", "sample_accuracy", "sample_precision", "sample_recall"
    }  # fmt: skip


def test_a_class_with_hardly_any_pictures_is_named(judge):
    scores = GenerationScores(judge, neighbourhoods=False)
    scores.seen.update(torch.eye(10, dtype=torch.float64)[[0] * 70 + [1] * 29 + [2]], None)
    assert scores.compute()["sample_classes"] == 3
    assert scores.missing() == ["3", "4", "5", "6", "7", "8", "9"]


def test_pictures_are_compared_as_files_have_them():
    assert as_saved(torch.tensor([-0.1, 0.5, 0.2501, 1.2])).mul(255).tolist() == pytest.approx([0, 128, 64, 255])


def test_the_judge_is_no_part_of_the_scores(judge):
    scores = GenerationScores(judge)
    assert not list(scores.parameters())
    assert not scores.state_dict()


def test_a_classifier_is_found_as_a_file_beside_the_recipes_or_by_a_recipes_run(tmp_path):
    zoo.save(zoo.LeNet(image_size=8), tmp_path / "own.safetensors")
    for name in (str(tmp_path / "own.safetensors"), "classifiers/digits.safetensors"):
        classifier = load_classifier(name)
        assert not classifier.training
        assert classifier.head.weight.dtype == torch.float64
    with pytest.raises(FileNotFoundError, match=r"no\.safetensors: there is no such weights file"):
        load_classifier("no.safetensors")
    with pytest.raises(FileNotFoundError, match="run `zoo fit lenet/mnist` first"):
        load_classifier("lenet/mnist")
    zoo.save(zoo.GAN(image_size=8), tmp_path / "gan.safetensors")
    with pytest.raises(ValueError, match=r"holds a zoo\.GAN, expected a classifier"):
        load_classifier(str(tmp_path / "gan.safetensors"))


@pytest.mark.parametrize(("name", "module", "least"), [("digits", "DigitsDataModule", 0.99)])
def test_the_classifier_that_comes_with_the_recipes_knows_its_data(name, module, least):
    import datamodules

    classifier = load_classifier(f"classifiers/{name}.safetensors")
    data = getattr(datamodules, module)()
    data.setup("test")
    images, labels = data.test_set
    with torch.no_grad():
        assert (classifier(images.double() / 255).argmax(1) == labels).double().mean() >= least
