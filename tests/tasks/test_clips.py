"""The task of classifying clips against scikit-learn and formulas in float64, with a network that takes no time."""

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, top_k_accuracy_score
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from zoo.running.clip_pictures import clips_figure, clips_gif, still_frames
from zoo.running.pictures import to_png
from zoo.tasks.video import VideoTask

NAMES = ["down", "left", "right", "spin", "still", "up"]


class Brightness(VideoTask):
    """Logits from the mean of each colour in each of four frames of eight pixels."""

    def __init__(self, num_classes=6, class_names=None):
        super().__init__(num_classes, class_names, lambda params: optim.SGD(params, lr=0.1), None)
        self.backbone = nn.Flatten(1, 2)
        self.head = nn.Linear(12, num_classes)
        self.example_input_array = torch.zeros(1, 3, 4, 8, 8)

    def forward(self, clips):
        return self.head(10 * self.backbone(clips).mean((2, 3)))


def trainer(folder=None, **options):
    logger = CSVLogger(folder) if folder else False
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(logger=logger, accelerator="cpu", **quiet, **options)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Brightness(class_names=NAMES)


def data(samples=23, views=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = (samples, 3, 4, 8, 8) if views is None else (samples, views, 3, 4, 8, 8)
    shades = torch.rand(*size[:-2], 1, 1, generator=generator)
    return shades * torch.rand(size, generator=generator), torch.randint(6, (samples,), generator=generator)


@pytest.mark.parametrize("batch_size", [1, 5, 23])
@pytest.mark.parametrize("views", [None, 1, 5])
def test_metrics_are_those_of_all_videos_and_views_whatever_the_batch(model, batch_size, views):
    clips, labels = data(views=views)
    loader = DataLoader(TensorDataset(clips, labels), batch_size)
    found = trainer().test(model, loader, verbose=False)[0]
    model = model.double()
    one_by_one = [model(each[None] if views is None else each).softmax(1).mean(0) for each in clips.double()]
    mean = torch.stack(one_by_one).detach()  # of the probabilities, not of the logits
    assert found["test/accuracy"] == pytest.approx(accuracy_score(labels, mean.argmax(1)))
    assert found["test/accuracy_top5"] == pytest.approx(top_k_accuracy_score(labels, mean, k=5, labels=range(6)))
    assert found["test/loss"] == pytest.approx(-mean[torch.arange(23), labels].log().mean().item(), abs=1e-6)
    assert found["test/samples"] == 23


def test_the_confusion_matrix_is_sklearns(model):
    clips, labels = data(views=3)
    seen = []
    compute = model.test_confusion.compute
    model.test_confusion.compute = lambda: seen.append(compute()) or seen[-1]
    trainer().test(model, DataLoader(TensorDataset(clips, labels), 8), verbose=False)
    predicted = torch.stack([model(each).softmax(1).mean(0).argmax() for each in clips])
    assert seen[0].tolist() == confusion_matrix(labels, predicted, labels=range(6)).tolist()


def test_empty_batches_of_an_evaluation_count_nothing(model):
    clips, labels = data(6)
    loader = DataLoader([(clips[:4], labels[:4]), (clips[:0], labels[:0]), (clips[4:], labels[4:])], batch_size=None)
    found = trainer().test(model, loader, verbose=False)[0]
    whole = trainer().test(model, DataLoader([(clips, labels)], batch_size=None), verbose=False)[0]
    assert found == pytest.approx(whole)
    assert found["test/samples"] == 6
    assert trainer().validate(model, loader, verbose=False)[0]["val/loss"] == pytest.approx(whole["test/loss"])


def test_the_training_loss_is_the_cross_entropy_of_the_batch(model):
    clips, labels = data(9)
    logits = model.double()(clips.double())
    expected = -(logits - logits.exp().sum(1, keepdim=True).log())[torch.arange(9), labels].mean()
    loss, given = model.training_loss(clips.double(), labels)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(given, logits)
    assert model.chance_loss == pytest.approx(1.791759)


def test_a_test_leaves_pictures_and_a_gif_that_plays(model, tmp_path):
    clips, labels = data(12, views=3)
    trainer(tmp_path).test(model, DataLoader(TensorDataset(clips, labels), 5), verbose=False)
    folder = next(tmp_path.rglob("pictures"))
    names = {"test_confusion_matrix.png", "test_worst_mistakes.png", "test_clips.png", "test_clips.gif"}
    assert {path.name for path in folder.iterdir()} == names
    with Image.open(folder / "test_clips.gif") as animation:
        assert animation.n_frames == 4


@pytest.mark.parametrize("classes", [6, 10])
def test_clips_of_every_class_are_shown_though_they_come_class_by_class(classes, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("zoo.tasks.video.clips_gif", lambda clips, captions: shown.extend(captions) or b"")
    model = Brightness(classes)
    clips, labels = data(40)[0], torch.arange(40) * classes // 40
    trainer(tmp_path).test(model, DataLoader(TensorDataset(clips, labels), 16), verbose=False)
    counts = [sum(caption.endswith(f"is {name}") for caption in shown) for name in model.class_names]
    assert counts == ([1] * 6 if classes == 6 else [1] * 8 + [0] * 2)


def test_the_worst_mistakes_are_kept_with_a_few_frames_each(model):
    clips, labels = data(40)
    found, losses = model._count((clips, labels), model.test_scores)
    predicted = found.argmax(1)
    for part in (slice(0, 15), slice(15, 40)):
        predictions = model.predict_step(clips[part], 0)
        model._keep_worst(clips[part], losses[part], predictions, [NAMES[k] for k in labels[part]])
    expected = losses[predicted != labels].sort(descending=True).values[:8]
    assert [each["loss"] for each in model._mistakes] == pytest.approx(expected.tolist())
    assert model._mistakes[0]["caption"].count("\n") == 3, "three classes and the true one"


def test_predictions_are_names_with_the_mean_probability_of_the_views(model):
    clips, labels = data(4, views=3)
    predictions = model.eval().predict_step((clips, labels), 0)
    mean = torch.stack([model(each).softmax(1).mean(0) for each in clips])
    for prediction, row in zip(predictions, mean, strict=True):
        assert prediction["class_name"] == NAMES[row.argmax()]
        assert prediction["probability"] == pytest.approx(row.max().item(), abs=1e-6)
        assert [name for name, _ in prediction["top"]] == [NAMES[k] for k in row.argsort(descending=True)[:5]]
    figure = model.draw_predictions((clips, labels), predictions)
    said = [axes.texts[0].get_text().rpartition("\nis ")[2] for axes in figure.axes]
    assert said == [NAMES[label] for label in labels]
    assert len(to_png(figure)) > 10_000


def test_as_many_names_as_classes_are_wanted():
    with pytest.raises(ValueError, match="6 class_names were given for num_classes=4"):
        Brightness(4, NAMES)


def test_still_frames_go_from_the_first_to_the_last():
    clip = torch.arange(20.0).view(1, 20, 1, 1).expand(3, 20, 2, 2)
    assert still_frames(clip, 6)[:, 0, 0, 0].tolist() == [0, 4, 8, 11, 15, 19]
    assert still_frames(clip[:, :2], 6)[:, 0, 0, 0].tolist() == [0, 1]


def test_a_gif_shows_each_clip_at_its_place_in_time():
    import io

    clips = [torch.zeros(3, 3, 5, 5), torch.zeros(3, 3, 5, 5)]
    clips[1][:, 2] = 1.0  # the second clip is white in its last frame
    with Image.open(io.BytesIO(clips_gif(clips, ["a", "b\nc"]))) as animation:
        shades = []
        for k in range(animation.n_frames):
            animation.seek(k)
            frame = animation.convert("L")
            shades.append([frame.getpixel((60, 60)), frame.getpixel((60 + 134, 60))])
    assert shades[0] == shades[-2] == [0, 0]
    assert shades[-1] == [0, 255]


def test_a_sheet_without_clips_says_so():
    assert len(to_png(clips_figure([], [], "worst mistakes"))) > 1_000
