"""Saliency of a box's score, of a word, of a frame and of a Q-value, against gradients taken by hand."""

import pytest
import torch
from torch import nn

from zoo.explaining.attributions import grad_cam, occlusion, saliency
from zoo.explaining.scores import BoxScore, BoxScores, ObservationScores, WordScores

pytest.importorskip("captum")


class Detector(nn.Module):
    """Finds a 1 as bright as the corner and one half as bright, and a 3 as bright as the middle; nothing if dark."""

    def forward(self, images):
        return [
            {"labels": torch.tensor([1, 3, 1][: 3 * bool(image.sum())]),
             "scores": torch.stack([image[0, 0, 0], image[0, 2, 2], image[0, 0, 0] / 2])[: 3 * bool(image.sum())]}
            for image in images
        ]  # fmt: skip


def test_a_box_is_known_by_its_class():
    model = BoxScores(Detector(), 3)
    images = torch.stack([torch.full((3, 4, 4), 0.5), torch.zeros(3, 4, 4)])
    assert model(images).tolist() == [[0.0, 0.5, 0.0, 0.5], [0.0] * 4]
    maps = saliency(model, images[:1].expand(2, -1, -1, -1), [1, 3])
    assert maps.nonzero().tolist() == [[0, 0, 0], [1, 2, 2]]
    assert maps[0, 0, 0] == maps[1, 2, 2] == 1


class Finder(nn.Module):
    """Finds two objects of class 2, as sure as one pixel each is bright, where that pixel is; the first moves."""

    def forward(self, images):
        return [
            {
                "labels": torch.tensor([1, 2, 2]),
                "scores": torch.stack([image[0, 1, 1] ** 2, image[0, 1, 1], image[0, 6, 6]]),
                "boxes": torch.stack([
                    torch.tensor([0.0, 0.0, 4.0, 4.0]),
                    torch.tensor([0.0, 0.0, 4.0, 2.0]) + torch.stack([*[image[0, 0, 0] * 0] * 3, image[0, 1, 1] * 2]),
                    torch.tensor([4.0, 4.0, 8.0, 8.0]),
                ]),
            }
            for image in images
        ]  # fmt: skip


def test_an_object_is_found_again_by_its_class_and_place():
    image = torch.zeros(1, 3, 8, 8)
    image[0, 0, 1, 1], image[0, 0, 6, 6] = 1.0, 0.9
    first = BoxScore(Finder(), torch.tensor([0.0, 0, 4, 4]), 2)
    second = BoxScore(Finder(), torch.tensor([4.0, 4, 8, 8]), 2)
    assert first(image).tolist() == [[1.0]]
    torch.testing.assert_close(second(image), torch.tensor([[0.9]]))
    # The gradient is that of the score alone, though the box grows with the pixel.
    assert saliency(first, image, 0).nonzero().tolist() == [[0, 1, 1]]
    assert saliency(first, image, 0)[0, 1, 1] == 1
    darker = image.clone()
    darker[0, 0, 1, 1] = 0.5
    torch.testing.assert_close(first(darker), torch.tensor([[0.5 * 3 / 4]]))  # box of 4 x 3 in 4 x 4
    falls = occlusion(second, image, 0, patch=4, stride=4, of="score")
    mean = 1.9 / 192 * 3
    torch.testing.assert_close(falls[0, 4:, 4:], torch.full((4, 4), 0.9 - mean))
    assert falls[0, :4].abs().max() == 0


@pytest.mark.parametrize("model", [BoxScores(Detector(), 3), BoxScore(Detector(), torch.tensor([0.0, 0, 2, 2]), 2)])
def test_where_nothing_is_found_no_pixel_matters(model):
    assert saliency(model, torch.zeros(1, 3, 4, 4), 0).tolist() == torch.zeros(1, 4, 4).tolist()


def test_the_saliency_of_a_box_is_the_gradient_of_its_score():
    from zoo import SingleStageDetector

    torch.manual_seed(0)
    model = SingleStageDetector(2, image_size=64, score_threshold=0.0).eval()
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    found = model(image)[0]
    for rank in (0, 3):
        score = BoxScore(model, found["boxes"][rank], int(found["labels"][rank]))
        torch.testing.assert_close(score(image)[0, 0], found["scores"][rank])
        (gradient,) = torch.autograd.grad(found["scores"][rank], image, retain_graph=True)
        torch.testing.assert_close(saliency(score, image, 0), gradient.abs().amax(1))
        assert gradient.abs().max() > 0


@pytest.mark.slow
def test_a_detector_of_the_zoo_has_a_gradient():
    from zoo import FasterRCNN

    torch.manual_seed(0)
    model = FasterRCNN(2, network="resnet18", min_size=64, max_size=64, test_proposals=10, score_threshold=0.0).train()
    maps = saliency(BoxScores(model, 2), torch.rand(1, 3, 64, 64), 1)
    assert maps.shape == (1, 64, 64)
    assert maps.max() > 0
    assert model.training


def test_grad_cam_of_a_clip():
    model = nn.Sequential(nn.Conv3d(1, 1, 1, bias=False), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(1, 1))
    model[0].weight.data.fill_(2.0)
    model[3].weight.data.fill_(24.0)
    clip = torch.rand(1, 1, 2, 3, 4)
    # A map 2x, its mean gradient 24 over 24 places.
    torch.testing.assert_close(grad_cam(model, clip, "0", 0), 2 * clip[:, 0])


def test_grad_cam_of_a_layer_that_the_score_does_not_need():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

        def forward(self, images):
            self.left(images)
            return self.right(images).mean((2, 3))

    with pytest.raises(ValueError, match="does not depend on layer left"):
        grad_cam(Two(), torch.rand(1, 1, 4, 4), "left", 0)


def test_no_gradient_goes_through_the_overlap_of_a_box():
    """A box that follows a pixel, and half covers the object's: only its score is to be felt."""

    class Follows(nn.Module):
        def forward(self, images):
            x = images[0][0, 1, 1]
            boxes = torch.stack([x, x * 0, x + 1, x * 0 + 1])[None]
            return [{"boxes": boxes, "labels": torch.tensor([1]), "scores": images[0][0, 0, 0][None]}]

    image = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    score = BoxScore(Follows(), torch.tensor([0.0, 0, 1, 1]), 1)(image)
    assert score.item() == pytest.approx(0.5 / 3)  # the boxes overlap in a half, of one and a half
    (gradient,) = torch.autograd.grad(score.sum(), image)
    assert gradient.nonzero().tolist() == [[0, 0, 0, 0]]
    assert gradient[0, 0, 0, 0].item() == pytest.approx(1 / 3)


def test_a_word_is_scored_after_the_caption_so_far():
    from zoo import CaptioningLSTM
    from zoo.tasks.captioning import END, SPECIAL, START

    torch.manual_seed(0)
    words = [*SPECIAL, "a", "dog", "cat"]
    captioner = CaptioningLSTM(words, network="small", image_size=32, wordvec_dim=8, hidden_dim=16).eval()
    images = torch.rand(2, 3, 32, 32)
    model = WordScores(captioner, [START, 4])
    given = images.clone().requires_grad_()
    scores = captioner.scores(given, torch.tensor([[START, 4, 6, END]] * 2))[:, 1].log_softmax(1)
    torch.testing.assert_close(model(images), scores)
    (gradient,) = torch.autograd.grad(scores[:, 5].sum(), given)
    torch.testing.assert_close(saliency(model, images, 5), gradient.abs().amax(1))


@pytest.mark.parametrize("cell", ["lstm", "attention"])
def test_the_words_of_a_caption_are_as_probable_as_the_search_says(cell):
    from zoo import CaptioningLSTM
    from zoo.tasks.captioning import END, NULL, SPECIAL, START, UNKNOWN

    torch.manual_seed(1)
    words = [*SPECIAL, "a", "dog", "cat"]
    captioner = CaptioningLSTM(words, cell=cell, network="small", image_size=32, wordvec_dim=8, hidden_dim=16).eval()
    captioner.head.scores.bias.data[END] = -5  # else the caption may be empty
    images = torch.rand(1, 3, 32, 32)
    found = captioner.head.greedy(captioner.features(images), max_length=5)
    tokens = [token for token in found.tokens[0].tolist() if token != NULL]
    total = torch.zeros(())
    for place, token in enumerate(tokens):
        log_p = WordScores(captioner, [START, *tokens[:place]])(images)[0].detach()
        never = log_p[[NULL, START, UNKNOWN]].exp().sum()
        total += log_p[token] - torch.log1p(-never)
    assert len(tokens) > 1
    torch.testing.assert_close(total, found.log_probabilities[0])


def test_a_q_value():
    from zoo.dqn import nature_network

    torch.manual_seed(0)
    network = nature_network(4, side=84)
    obs = torch.rand(1, 4, 84, 84, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(obs)[0, 2], obs)
    torch.testing.assert_close(saliency(network, obs.detach(), 2), gradient.abs().amax(1))
    each = saliency(ObservationScores(network), obs.detach()[:, None], 2)
    torch.testing.assert_close(each, gradient.abs())


def test_a_q_value_of_numbers():
    model = nn.Sequential(nn.Linear(3, 2))
    found = saliency(ObservationScores(model), torch.rand(2, 1, 3), 1)
    torch.testing.assert_close(found, model[0].weight.detach()[1].abs().expand(2, 3))
