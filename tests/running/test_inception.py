"""The published Fréchet distance against torch-fidelity's network and a formula in float64."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from lightning import Trainer

import zoo
from zoo.running.inception import InceptionFID

fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def loader(counts=(5, 4, 0)):
    generator = torch.Generator().manual_seed(5)
    batches = [(torch.rand(n, 1, 8, 8, generator=generator), torch.arange(n)) for n in counts]
    return torch.utils.data.DataLoader(batches, batch_size=None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random ones, in the layout of the published file."""
    torch.manual_seed(0)
    network = fidelity.FeatureExtractorInceptionV3.__new__(fidelity.FeatureExtractorInceptionV3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network.__init__("inception", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def by_formula(real, generated):
    """Heusel et al., equation 6, of features (N, D)."""
    means = [features.mean(0) for features in (real, generated)]
    covariances = [np.cov(features, rowvar=False) for features in (real, generated)]
    # The square root by way of the samples' inner products, N by N: a root of the product itself is singular.
    centred = [(features - features.mean(0)) / np.sqrt(len(features) - 1) for features in (real, generated)]
    between = centred[0] @ centred[1].T
    root = np.sqrt(np.clip(scipy.linalg.eigvalsh(between @ between.T), 0, None)).sum()
    return ((means[0] - means[1]) ** 2).sum() + sum(np.trace(c) for c in covariances) - 2 * root


@pytest.mark.slow
def test_it_is_the_distance_of_the_features_of_inception(weights):
    torch.manual_seed(0)
    model = zoo.GAN(image_size=8, code_size=4)
    with pytest.warns(UserWarning, match="is of 9 pictures"):
        numbers = Trainer(**QUIET, callbacks=[InceptionFID(str(weights))]).test(model, loader(), verbose=False)[0]
    assert set(numbers) == {"test/samples", "test/inception_fid"}
    network = fidelity.FeatureExtractorInceptionV3("inception", ["2048"], str(weights)).eval()
    features = []
    for images in (torch.cat([images for images, _ in loader()]), model.decode(model._codes_at(range(9)))):
        pixels = torch.from_numpy(np.rint(images.numpy().astype(np.float64) * 255).astype(np.uint8)).repeat(1, 3, 1, 1)
        with torch.no_grad():
            features.append(network(pixels)[0].numpy().astype(np.float64))
    assert numbers["test/inception_fid"] == pytest.approx(by_formula(*features), rel=2e-3)


def test_of_fewer_than_two_pictures_it_is_no_number(weights):
    model = zoo.GAN(image_size=8, code_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        numbers = Trainer(**QUIET, callbacks=[InceptionFID(str(weights))]).test(model, loader((1,)), verbose=False)[0]
    assert np.isnan(numbers["test/inception_fid"])


@pytest.mark.parametrize("content", [b"", b"no weights", {"conv.weight": torch.zeros(2)}, [1, 2]])
def test_a_file_of_other_weights_is_named(tmp_path, content):
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"other\.pth are not those of torch-fidelity's Inception: \w+"):
        Trainer(**QUIET, callbacks=[InceptionFID(str(path))]).test(zoo.GAN(image_size=8), loader(), verbose=False)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: there is no such file"):
        InceptionFID(str(tmp_path / "nowhere.pth"))


def test_weights_that_cannot_be_downloaded_can_be_named(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", refuse)
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded \(no network\).*name the file as weights"):
        Trainer(**QUIET, callbacks=[InceptionFID()]).test(zoo.GAN(image_size=8), loader(), verbose=False)


def test_a_model_that_generates_nothing_is_refused(weights):
    data = torch.utils.data.DataLoader([(torch.rand(2, 1, 28, 28), torch.tensor([0, 1]))], batch_size=None)
    with pytest.raises(ValueError, match=r"models that generate pictures, not for zoo\.LeNet"):
        Trainer(**QUIET, callbacks=[InceptionFID(str(weights))]).test(zoo.LeNet(), data, verbose=False)
