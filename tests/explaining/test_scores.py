"""Saliency of a box's score, of a word, of a frame and of a Q-value, against gradients taken by hand."""

import pytest
import torch
from torch import nn

from zoo.explaining.attributions import saliency
from zoo.explaining.scores import BoxScores, WordScores

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


@pytest.mark.slow
def test_a_detector_of_the_zoo_has_a_gradient():
    from zoo import FasterRCNN

    torch.manual_seed(0)
    model = FasterRCNN(2, network="resnet18", min_size=64, max_size=64, test_proposals=10, score_threshold=0.0).train()
    maps = saliency(BoxScores(model, 2), torch.rand(1, 3, 64, 64), 1)
    assert maps.shape == (1, 64, 64)
    assert maps.max() > 0
    assert model.training


def test_a_word_is_scored_after_the_caption_so_far():
    from zoo import CaptioningLSTM
    from zoo.tasks.captioning import END, SPECIAL, START

    torch.manual_seed(0)
    words = [*SPECIAL, "a", "dog", "cat"]
    captioner = CaptioningLSTM(words, network="small", image_size=32, wordvec_dim=8, hidden_dim=16).eval()
    images = torch.rand(2, 3, 32, 32)
    model = WordScores(captioner, [START, 4])
    given = images.clone().requires_grad_()
    scores = captioner.scores(given, torch.tensor([[START, 4, 6, END]] * 2))[:, 1]
    torch.testing.assert_close(model(images), scores)
    (gradient,) = torch.autograd.grad(scores[:, 5].sum(), given)
    torch.testing.assert_close(saliency(model, images, 5), gradient.abs().amax(1))


def test_a_q_value():
    from zoo.dqn import nature_network

    torch.manual_seed(0)
    network = nature_network(4, side=84)
    obs = torch.rand(1, 4, 84, 84, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(obs)[0, 2], obs)
    torch.testing.assert_close(saliency(network, obs.detach(), 2), gradient.abs().amax(1))
