"""``zoo explain``: every method writes what it says, a page has all that apply, and a wrong word is answered."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo import DQN, CaptioningLSTM, FrameFusion, LeNet, SingleStageDetector
from zoo.cli import main
from zoo.running.explained_scores import ask_captioner, ask_detector, ask_policy, read_observations
from zoo.running.picture_files import read_whole_picture

NAMES = ["cat", "dog", "[bold]", "$x$", "e", "f", "g", "h", "i", "j"]


@pytest.fixture
def weights():
    torch.manual_seed(0)
    zoo.save(LeNet(class_names=NAMES, in_channels=3, image_size=32), "w.safetensors")
    return "w.safetensors"


@pytest.fixture
def pictures():
    Path("mine").mkdir()
    for number in range(5):
        values = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(values).resize((60, 50)).save(f"mine/{number}.png")
    return "mine"


def test_the_help_names_every_method(capsys):
    from zoo.running import explained_scores
    from zoo.running.explained_files import METHODS

    assert main(["explain", "--help"]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"The methods: {', '.join(METHODS)}." in said
    for kind in (explained_scores.OF_DETECTORS, explained_scores.OF_CLIPS):
        assert ", ".join(kind) in said


@pytest.mark.parametrize("method", ["filters", "activations", "patches", "neighbours", "pca"])
def test_what_needs_nothing_else(weights, pictures, method, capsys):
    assert main(["explain", weights, method, pictures, "--out", "out"]) == 0
    assert len(set(Image.open(f"out/{method}.png").convert("L").tobytes())) > 20, "something is drawn"
    assert f"out/{method}.png" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["saliency", "guided", "grad_cam", "occlusion", "segmentation"])
def test_what_a_class_depends_on(weights, pictures, method, capsys):
    pytest.importorskip("captum")
    if method == "segmentation":
        pytest.importorskip("cv2")
    assert main(["explain", weights, method, "mine/0.png", "mine/1.png", "--target", "dog", "--out", "out"]) == 0
    assert len(set(Image.open(f"out/{method}.png").convert("L").tobytes())) > 20, "something is drawn"


@pytest.mark.parametrize("method", ["adversarial", "class", "inversion", "dream", "texture", "style"])
def test_pictures_that_are_made_are_files_and_the_same_again(weights, pictures, method, capsys):
    for out in ("one", "two"):
        arguments = [method, "mine/0.png", "mine/1.png", "--steps", "3", "--seed", "5", "--out", out]
        assert main(["explain", weights, *arguments]) == 0
    made = sorted(path.name for path in Path("one").glob(f"{method}_*.png"))
    assert made
    for name in made:
        first, second = (np.asarray(Image.open(Path(out, name))) for out in ("one", "two"))
        assert first.shape == (32, 32, 3)
        assert (first == second).all()


def test_options_may_stand_between_the_words(weights, pictures, capsys):
    arguments = ["--seed", "5", weights, "dream", "--steps", "1", "mine/0.png", "--layer=backbone.conv1", "mine/1.png"]
    assert main(["explain", *arguments, "--out", "out"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["dream.png", "dream_0.png", "dream_1.png"]
    assert "layer backbone.conv1, 4 octaves of 1.4, 1 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_method_a_page_has_all_that_apply(weights, pictures, capsys):
    pytest.importorskip("captum")
    assert main(["explain", weights, "mine/0.png", "--steps", "2"]) == 0
    page = Path("explanations/index.html").read_text()
    said = capsys.readouterr().out
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert {"saliency", "Grad-CAM", "DeepDream", "class visualisation", "Left out"} <= set(headings)
    assert page.count("data:image/png;base64,") == len(headings) - 1
    assert "style transfer needs two pictures" in page
    assert "tsne is left out" in said


@pytest.fixture
def captioner(pictures):
    torch.manual_seed(0)
    words = ["<NULL>", "<START>", "<END>", "<UNK>", "a", "dog", "cat"]
    model = CaptioningLSTM(words, network="small", image_size=32, wordvec_dim=8, hidden_dim=16, max_length=3)
    model.head.scores.bias.data[[4, 5]] = torch.tensor([20.0, 19.0])  # it says a and dog
    zoo.save(model, "caption.safetensors")
    return model


def asked(model, target, ask, files):
    return ask(model, files, None, target, None, 0, lambda done, total: None)


def test_words_of_a_caption_are_looked_into(captioner, capsys):
    pytest.importorskip("captum")
    for method in ("saliency", "attention"):
        assert main(["explain", "caption.safetensors", method, "mine/0.png", "--out", "out"]) == 0
        assert Image.open(f"out/{method}.png").size[0] > 500
    found = asked(captioner.eval(), None, ask_captioner, [Path("mine/0.png")])
    assert [score.name for score in found.scores[0]] == found.said[0].split()
    second = asked(captioner, "2", ask_captioner, [Path("mine/0.png")]).scores[0]
    assert [score.model.beginning for score in second] == [found.scores[0][1].model.beginning]
    capsys.readouterr()
    assert main(["explain", "caption.safetensors", "saliency", "mine/0.png", "--target", "horse"]) == 2
    assert "finds no word 'horse' in 0.png: there " in capsys.readouterr().err


def test_objects_are_looked_into(pictures, capsys):
    pytest.importorskip("captum")
    torch.manual_seed(0)
    model = SingleStageDetector(2, class_names=["cat", "dog"], image_size=64, score_threshold=0.0).eval()
    found = model.detect([read_whole_picture(Path("mine/0.png"))])[0]
    best, other = found["labels"].tolist()[0], found["labels"].tolist()[2]
    named = model.class_names[other - 1], found["labels"].tolist().index(other)
    for target, rank in ((None, 0), (model.class_names[best - 1], 0), ("3", 2), named):
        scores = asked(model, target, ask_detector, [Path("mine/0.png")]).scores[0]
        assert torch.equal(scores[0].box, found["boxes"][rank : rank + 1])
        torch.testing.assert_close(scores[0].model(scores[0].given)[0, 0], found["scores"][rank])
    with pytest.raises(ValueError, match="did you mean cat"):
        asked(model, "ct", ask_detector, [Path("mine/0.png")])
    with pytest.raises(ValueError, match=r"no object 5000 in 0\.png nor in 1 more"):
        asked(model, "5000", ask_detector, [Path("mine/0.png"), Path("mine/1.png")])
    zoo.save(model, "d.safetensors")
    assert main(["explain", "d.safetensors", "grad_cam", "mine/0.png", "--target", "1", "--out", "out"]) == 0
    assert Image.open("out/grad_cam.png").size[0] > 400
    capsys.readouterr()
    assert main(["explain", "d.safetensors", "dream", "mine/0.png"]) == 2
    assert "dream is not for detectors: to a zoo.SingleStageDetector apply filters, act" in capsys.readouterr().err


def test_observations_are_looked_into(pictures, capsys):
    pytest.importorskip("captum")
    torch.manual_seed(0)
    policy = DQN([4], 3, hidden=[8]).eval()
    zoo.save(policy, "p.safetensors")
    np.save("obs.npy", np.random.default_rng(0).normal(size=(2, 4)))
    assert main(["explain", "p.safetensors", "obs.npy", "--out", "out"]) == 0
    assert Path("out/index.html").read_text().count("data:image/png;base64,") == 1
    scores = asked(policy, "2", ask_policy, [Path("obs.npy")]).scores
    assert [score.target for (score,) in scores] == [2, 2]
    assert main(["explain", "p.safetensors", "saliency", "obs.npy", "--target", "3"]) == 2
    assert "no action '3': the policy has 0…2" in capsys.readouterr().err
    np.save("obs.npy", np.zeros((2, 5)))
    assert main(["explain", "p.safetensors", "saliency", "obs.npy"]) == 2
    assert "obs.npy cannot be read: an array of (2, 5), expected (4,)" in capsys.readouterr().err


def test_frames_are_the_last_of_an_animation_in_grey(pictures):
    frames = [Image.new("RGB", (8, 6), (level, level, level)) for level in (0, 100, 200)]
    frames[0].save("film.gif", save_all=True, append_images=frames[1:])
    assert read_observations(Path("film.gif"), [2, 4, 4])[0, :, 0, 0].mul(255).round().tolist() == [100, 200]
    assert read_observations(Path("film.gif"), [4, 4, 4])[0, :, 0, 0].mul(255).round().tolist() == [0, 0, 100, 200]
    assert read_observations(Path("mine/0.png"), [2, 4, 5]).shape == (1, 2, 4, 5)
    np.save("frames.npy", np.full((3, 2, 4, 4), 51, dtype=np.uint8))
    assert read_observations(Path("frames.npy"), [2, 4, 4]).unique().tolist() == pytest.approx([0.2])


def test_each_frame_of_a_clip_is_looked_into(capsys):
    av = pytest.importorskip("av")
    pytest.importorskip("captum")
    torch.manual_seed(0)
    zoo.save(FrameFusion(num_classes=2, class_names=["left", "right"], frames=4, image_size=32), "v.safetensors")
    with av.open("film.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        for values in np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        container.mux(stream.encode(None))
    assert main(["explain", "v.safetensors", "saliency", "film.mp4", "--target", "right", "--out", "out"]) == 0
    width, height = Image.open("out/saliency.png").size
    assert width > height > 300, "four frames, and below their maps"
    assert "share" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["w.safetensors", "saliancy", "mine/0.png"], "did you mean saliency"),
        (["w.safetensors", "saliency"], "needs pictures"),
        (["w.safetensors", "saliency", "mine/9.png"], "there is no picture or folder"),
        (["w.safetensors", "grad_cam", "mine/0.png", "--layer", "hed"], "did you mean head"),
        (["w.safetensors", "saliency", "mine/0.png", "--target", "dgo"], "did you mean dog"),
        (["w.safetensors", "saliency", "mine/0.png", "--weights", "DEFAULT"], "has its own"),
        (["lenett", "saliency", "mine/0.png"], "did you mean lenet"),
        (["missing.ckpt", "saliency", "mine/0.png"], "no weights file"),
        (["w.safetensors", "dream", "mine/0.png", "--layr", "x"], "did you mean --layer"),
        (["w.safetensors", "--target", "dgo", "saliency", "--seed", "1", "mine/0.png"], "did you mean dog"),
        (["yolov3", "--weights", "w.safetensors", "saliency", "mine/0.png"], "zoo.LeNet|yolov3|YOLOv3"),
    ],
)
def test_a_wrong_word_is_one_line(weights, pictures, arguments, said, capsys):
    assert main(["explain", *arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert re.search(said, errors[0])
    assert not Path("explanations").exists()
