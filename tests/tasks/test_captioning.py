"""The captioning task around a captioner whose captions are known."""

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from torch import nn, optim
from torch.nn import functional as F

from zoo.running.caption_pictures import attention_figure, captions_figure
from zoo.running.pictures import to_png
from zoo.tasks.captioning import END, NULL, SHOWN, SPECIAL, START, UNKNOWN, CaptioningTask, Captions, captioning_loss

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
WORDS = [*SPECIAL, "a", "dog", "cat", "on", "the", "grass", "runs"]
SENTENCES = ["a dog on the grass", "a cat runs", "the cat on a dog", "", "a a a a a a a", "the dog runs on grass"]
REFERENCES = [
    ["A dog on the grass.", "the dog runs"],
    ["the cat runs", "a cat on the grass!", "a cat"],
    ["a dog on a cat"],
    ["the grass"],
    ["a dog", "a cat"],
    ["a dog runs on the grass", "The dog runs on grass"],
]


class Oracle(CaptioningTask):
    """Says SENTENCES[k] of a picture that is all k / 10, and thinks every next word is as likely."""

    def __init__(self, words, looks=False, optimizer=lambda p: optim.SGD(p, lr=0.1), scheduler=None):
        super().__init__(words, optimizer, scheduler)
        self.example_input_array = torch.zeros(1, 3, 8, 8)
        self.backbone, self.head = nn.Linear(1, 1), nn.Linear(1, 1)

    def scores(self, images, tokens):
        return (
            self.head(self.backbone(images.new_zeros(len(images), 1)))
            .expand(-1, len(self.words))[:, None]
            .expand(-1, tokens.shape[1] - 1, -1)
        )

    def caption(self, images):
        rows = [encoded(SENTENCES[round(float(image.mean() * 10))])[1:] for image in images]
        attention = torch.full((len(rows), 9, 2, 2), 0.25) if self.hparams.looks else None
        tokens = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 9)
        return Captions(tokens, -torch.arange(len(rows), dtype=torch.float32), attention)


def encoded(sentence, length=10):
    row = [START, *(WORDS.index(word) if word in WORDS else UNKNOWN for word in sentence.split()), END]
    return row + [NULL] * (length - len(row))


def batch(numbers):
    images = torch.stack([torch.full((3, 8, 8), k / 10) for k in numbers]) if numbers else torch.zeros(0, 3, 8, 8)
    tokens = torch.tensor([encoded("a dog on the grass"[: 5 + 4 * (k % 2)]) for k in numbers], dtype=torch.int64)
    return images, tokens.reshape(-1, 10), [REFERENCES[k] for k in numbers]


class Pictures(LightningDataModule):
    def __init__(self, batches):
        super().__init__()
        self.batches = [batch(numbers) for numbers in batches]

    def loader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


def official(sentences, references):
    """The COCO caption code's scores of captions whose punctuation was taken away by hand."""
    plain = [[text.lower().strip(".!") for text in texts] for texts in references]
    truths, said = dict(enumerate(plain)), {k: [text] for k, text in enumerate(sentences)}
    bleus, _ = Bleu(4).compute_score(truths, said, verbose=0)
    scores = {f"bleu_{n}": value for n, value in enumerate(bleus, start=1)}
    return scores | {"rouge_l": Rouge().compute_score(truths, said)[0], "cider": Cider().compute_score(truths, said)[0]}


@pytest.mark.parametrize("split", [[[0, 1, 2], [3, 4], [5]], [[0, 1, 2, 3, 4, 5]], [[], [0, 1], [2, 3, 4, 5], []]])
def test_the_scores_of_a_run_are_the_coco_caption_codes_however_batches_fall(split):
    trainer = Trainer(**QUIET, logger=False)
    (measured,) = trainer.test(Oracle(WORDS), Pictures(split), verbose=False)
    expected = official(SENTENCES, REFERENCES)
    assert {name: measured[f"test/{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert measured["test/samples"] == 6
    # An even guess among 11 tokens at each of a caption's words and its end, mean over the captions.
    lengths = [len(("a dog on the grass"[: 5 + 4 * (k % 2)]).split()) + 1 for numbers in split for k in numbers]
    assert measured["test/loss"] == pytest.approx(np.log(11) * np.mean(lengths), rel=1e-5)


def test_validation_logs_the_same_scores_and_a_checkpoint_may_follow_them():
    trainer = Trainer(**QUIET, logger=False)
    (measured,) = trainer.validate(Oracle(WORDS), Pictures([[0, 1, 2], [3, 4, 5]]), verbose=False)
    expected = official(SENTENCES, REFERENCES)
    assert measured["val/cider"] == pytest.approx(expected["cider"], abs=1e-6)
    assert measured["val/bleu_4"] == pytest.approx(expected["bleu_4"], abs=1e-6)
    assert Oracle(WORDS).monitor in measured


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_after_one_that_was_broken_off_counts_its_own_pictures(stage):
    class BreaksOff(Oracle):
        left = 1

        def caption(self, images):
            self.left -= 1
            if self.left < 0:
                raise KeyError("on purpose")
            return super().caption(images)

    task = BreaksOff(WORDS)
    with pytest.raises(KeyError, match="on purpose"):
        getattr(Trainer(**QUIET, logger=False), stage)(task, Pictures([[5, 4], [3]]), verbose=False)
    task.left = 3
    data = Pictures([[0, 1, 2], [3, 4], [5]])
    (measured,) = getattr(Trainer(**QUIET, logger=False), stage)(task, data, verbose=False)
    name = "val/cider" if stage == "validate" else "test/cider"
    assert measured[name] == pytest.approx(official(SENTENCES, REFERENCES)["cider"], abs=1e-6)


def test_the_loss_is_summed_over_words_and_leaves_out_what_is_behind_the_end():
    scores = torch.randn(3, 5, 11, dtype=torch.float64)
    targets = torch.tensor([[4, 5, END, NULL, NULL], [END, NULL, NULL, NULL, NULL], [4, 5, 6, 7, 8]])
    by_hand = 0.0
    for row, truth in zip(scores.softmax(-1), targets, strict=True):
        for probabilities, token in zip(row, truth, strict=True):
            by_hand -= 0.0 if token == NULL else float(probabilities[token].log())
    assert float(captioning_loss(scores, targets)) == pytest.approx(by_hand / 3, rel=1e-12)


def test_sentences_end_where_the_network_ended_them():
    tokens = torch.tensor([encoded("a dog runs")[1:], [4, 5, END, 6, 6, 6, 6, 6, 6], [4, 5, 6, 7, 8, 9, 10, 4, 5]])
    assert Oracle(WORDS).sentences(tokens) == ["a dog runs", "a dog", "a dog cat on the grass runs a dog"]


@pytest.mark.parametrize(
    "words", [["a", "dog"], [*SPECIAL, "a", "a"], [], ["<START>", "<NULL>", "<END>", "<UNK>", "a"]]
)
def test_a_vocabulary_that_is_none_is_refused(words):
    with pytest.raises(ValueError, match="words must begin with <NULL>, <START>, <END>, <UNK> and have each word once"):
        Oracle(words)


@pytest.mark.parametrize("looks", [False, True])
def test_a_test_shows_twenty_captions_and_where_the_network_looked(tmp_path, looks):
    trainer = Trainer(**QUIET, logger=CSVLogger(tmp_path, name="", version=""))
    trainer.test(Oracle(WORDS, looks), Pictures([[0, 1, 2], [3, 4, 5]] * 6), verbose=False)
    written = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert written == (["test_attention.png"] if looks else []) + ["test_captions.png"]
    for name in written:
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert len(set(picture.convert("L").tobytes())) > 20


def test_the_shown_pictures_are_drawn_from_all_evenly():
    """Of 200 pictures each must be among the 20 in about a tenth of 400 draws."""
    task = Oracle(WORDS)
    counts = np.zeros(200)
    for seed in range(400):
        task._draw.manual_seed(seed)
        places = [-1] * SHOWN
        for before in range(0, 200, 8):
            for row, place in task._drawn(before, 8):
                places[place] = before + row
        assert len(set(places)) == SHOWN
        counts[places] += 1
    # Binomial with p = 0.1: mean 40, deviation 6.
    assert abs(counts - 40).max() < 5 * 6


@pytest.mark.parametrize("alone", [False, True])
def test_predictions_are_sentences(alone):
    images, tokens, references = batch([0, 1, 3])
    given = images if alone else (images, tokens, references)
    said = Oracle(WORDS).predict_step(given, 0)
    assert said == [
        {"caption": "a dog on the grass", "log_probability": 0.0},
        {"caption": "a cat runs", "log_probability": -1.0},
        {"caption": "", "log_probability": -2.0},
    ]
    for looks in (False, True):
        png = to_png(Oracle(WORDS, looks).draw_predictions(given, said))
        assert png.startswith(b"\x89PNG")


def test_training_goes_on_with_batches_of_an_evaluation_too():
    task = Oracle(WORDS)
    Trainer(**QUIET, logger=False, max_epochs=1, log_every_n_steps=1).fit(task, Pictures([[0, 1], [2, 3]]))
    assert all(torch.isfinite(p).all() for p in task.parameters())


def test_pictures_of_nothing_are_drawn_too():
    assert to_png(captions_figure([], [], None)).startswith(b"\x89PNG")
    assert to_png(attention_figure([], [], [])).startswith(b"\x89PNG")
    images = list(torch.rand(1, 3, 8, 8))
    assert to_png(attention_figure(images, [[]], [torch.zeros(3, 2, 2)])).startswith(b"\x89PNG")


def test_signs_of_money_are_no_formula():
    """Two dollars in a text are a formula to matplotlib, which cannot set all of them."""
    images, texts = list(torch.rand(1, 3, 8, 8)), ["from $5^a^b to $6"]
    assert to_png(captions_figure(images, texts, [texts])).startswith(b"\x89PNG")
    assert to_png(attention_figure(images, [["$5^a^b$"]], [torch.ones(1, 2, 2)])).startswith(b"\x89PNG")


def test_attention_lights_the_place_that_was_looked_at():
    """The mean light of the quarter of the picture that a word looked at exceeds the others' by far."""
    from matplotlib.figure import Figure

    from zoo.running.caption_pictures import _show

    for place in range(4):
        look = torch.zeros(4)
        look[place] = 1
        axes = Figure().add_subplot()
        _show(axes, torch.ones(3, 16, 16), look.view(2, 2))
        light = torch.from_numpy(axes.images[0].get_array().copy()).mean(-1)[None]
        quarters = F.avg_pool2d(light, 8).flatten()
        assert quarters.argmax() == place
        assert quarters[place] > 0.3 + quarters[[k for k in range(4) if k != place]].max()
