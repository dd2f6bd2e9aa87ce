"""What every release wrote is read by this one, and says the same.

To add a release: set the version in ``zoo/__init__.py``, run ``python tests/golden/make.py``, add the new folder, and
leave those of earlier ones as they are. If a test here fails, files that people have are no longer read as they were.
"""

import inspect
import json
from pathlib import Path

import pytest
import torch
from make import answer, build, planned, tensors, values

import zoo
from zoo.running.checkpoint import read_checkpoint
from zoo.weights import NOT_SAVED, describe

HERE = Path(__file__).parent
RELEASES = {path.parent.name: json.loads(path.read_text()) for path in sorted(HERE.glob("*/index.json"))}
CASES = [(release, name) for release, index in RELEASES.items() for name in index]
FILES = [(path.parent.name, path.name) for path in sorted(HERE.glob("*/*")) if path.suffix in (".ckpt", ".safetensors")]


def test_this_release_has_all_its_architectures():
    assert sorted(RELEASES[zoo.__version__]) == sorted(zoo.ARCHITECTURES)
    assert len(FILES) >= 20
    assert sum((HERE / release / file).stat().st_size for release, file in FILES) < 2e6 * len(RELEASES)


def agree(found: dict, expected: dict) -> None:
    assert found["shapes"] == expected["shapes"]
    for key in ("first", "mean", "size", "turning"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-4 * expected["size"]), key


@pytest.mark.parametrize(("release", "file"), FILES)
def test_a_file_of_a_release_is_read_and_says_what_it_said(release, file):
    model = zoo.load(HERE / release / file)
    name = file.split(".")[0]
    entry = RELEASES[release][name]
    assert type(model) is getattr(zoo, name)
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in describe(model)["arguments"].items()
            if key in entry["arguments"]} == entry["arguments"]  # fmt: skip
    for key, parameter in model.named_parameters():
        expected = torch.from_numpy(values(key, tuple(parameter.shape))).float()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-6)
    if "answer" in entry:
        agree(answer(model), entry["answer"])


@pytest.mark.parametrize(("release", "name"), CASES)
def test_an_architecture_has_the_tensors_that_it_had(release, name):
    entry = RELEASES[release][name]
    assert tensors(planned(name, entry["arguments"])) == entry["tensors"]


@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES))
def test_an_architecture_stores_all_of_its_arguments(name):
    stored = describe(planned(name, RELEASES[zoo.__version__][name]["arguments"]))["arguments"]
    assert stored.keys() == inspect.signature(getattr(zoo, name)).parameters.keys() - set(NOT_SAVED)


@pytest.mark.parametrize(("release", "name"), [case for case in CASES if "answer" in RELEASES[case[0]][case[1]]])
def test_an_architecture_says_what_it_said(release, name):
    entry = RELEASES[release][name]
    said = answer(build(name, entry["arguments"]))
    assert said["size"] > 0
    assert len(set(said["first"])) > 1, "answers that are all alike prove nothing"
    agree(said, entry["answer"])


@pytest.mark.parametrize(("release", "file"), [case for case in FILES if case[1].endswith(".ckpt")])
def test_a_checkpoint_of_a_release_is_plain(release, file):
    content = read_checkpoint(HERE / release / file)
    assert {"state_dict", "zoo", "pytorch-lightning_version"} <= content.keys()
