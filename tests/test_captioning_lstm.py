"""The captioning network against torch, the lecture's formulas, exhaustive search and cases by hand; its weights."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from lightning import Trainer
from PIL import Image
from torch import nn

import zoo
from zoo.captioning_lstm import LSTM, AttentionLSTM, CaptioningLSTM, CaptioningNetwork, VanillaRNN, small_network
from zoo.cli import main
from zoo.layer_table import layer_table
from zoo.tasks.captioning import END, NULL, SPECIAL, START, UNKNOWN, captioning_loss

CELLS = ("rnn", "lstm", "attention")
EXACT = {"rtol": 0, "atol": 1e-6}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(cell, vocab_size=7, seed=0, **dimensions):
    """A small network in float64 with weights so large that its words differ from image to image."""
    torch.manual_seed(seed)
    dimensions = {"feature_dim": 5, "wordvec_dim": 4, "hidden_dim": 16} | dimensions
    network = CaptioningNetwork(vocab_size, cell, **dimensions).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.7 if parameter.ndim > 1 else 0.1)
    return network


def weights_of(cell):
    """W_x (D, G), W_h (H, G) and b (G,) as the lecture writes them, for an LSTM with its gates in order i, f, o, g."""
    lstm = cell.lstm if isinstance(cell, AttentionLSTM) else cell
    state = {name.removesuffix("_l0"): value.detach().numpy() for name, value in lstm.recurrence.state_dict().items()}
    weights = [state["weight_ih"].T, state["weight_hh"].T, state["bias_ih"]]
    if isinstance(cell, AttentionLSTM):
        weights.append(cell.attended.weight.detach().numpy().T)
    return weights if isinstance(cell, VanillaRNN) else [lectures_gates(w) for w in weights]


def lectures_gates(w):
    i, f, g, o = np.split(w, 4, axis=-1)
    return np.concatenate([i, f, o, g], -1)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def test_parameters_are_as_many_as_the_assignments():
    # 864 words, 1280 features, word vectors of 256, states of 512; by hand for the vanilla RNN:
    count = 864 * 256 + (1280 + 1) * 512 + (256 + 512 + 1) * 512 + (512 + 1) * 864
    assert count == 1_714_016
    expected = {"rnn": count, "lstm": 2_895_200, "attention": 3_943_776}
    for cell, number in expected.items():
        assert sum(p.numel() for p in CaptioningNetwork(864, cell).parameters()) == number


@pytest.mark.parametrize(("ours", "theirs"), [(VanillaRNN, nn.RNN), (LSTM, nn.LSTM)])
@pytest.mark.parametrize("by_steps", [False, True])
def test_cells_are_torchs_in_outputs_and_gradients(ours, theirs, by_steps):
    torch.manual_seed(0)
    cell, layer = ours(4, 6).double(), theirs(4, 6, batch_first=True).double()
    nn.init.normal_(cell.recurrence.bias_ih_l0)
    layer.load_state_dict(cell.recurrence.state_dict() | {"bias_hh_l0": torch.zeros_like(layer.bias_hh_l0)})
    x, h = random(3, 7, 4).requires_grad_(), random(3, 6, seed=1).requires_grad_()
    weight = random(3, 7, 6, seed=2)  # so that every output has a gradient of its own
    state = h[None] if theirs is nn.RNN else (h[None], torch.zeros_like(h)[None])
    expected = layer(x, state)[0]
    expected_gradients = torch.autograd.grad((expected * weight).sum(), [x, h, *list(layer.parameters())[:3]])
    found = steps(cell, x, h) if by_steps else cell(x, h)
    found_gradients = torch.autograd.grad((found * weight).sum(), [x, h, *cell.parameters()])
    torch.testing.assert_close(found, expected, **EXACT)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, **EXACT)


def steps(cell, x, h):
    c, states = torch.zeros_like(h), []
    for x_t in x.unbind(1):
        h, c = cell.step(x_t, h, c) if isinstance(cell, LSTM) else (cell.step(x_t, h), c)
        states.append(h)
    return torch.stack(states, 1)


@pytest.mark.parametrize("ours", [VanillaRNN, LSTM])
def test_the_second_bias_stays_zero_and_is_no_parameter(ours):
    cell = ours(4, 6)
    assert len(list(cell.parameters())) == 3
    assert len(cell.state_dict()) == 3
    optimizer = torch.optim.SGD(cell.parameters(), 0.1)
    cell(torch.randn(2, 3, 4), torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert not cell.recurrence.bias_hh_l0.any()
    assert cell.recurrence.bias_ih_l0.any()
    doubled = cell.double()  # moved with the rest, and known to the fast path
    assert doubled(torch.randn(2, 3, 4).double(), torch.randn(2, 6).double()).dtype == torch.float64


def test_vanilla_rnn_is_the_lectures_formula():
    cell, x, h = VanillaRNN(4, 6).double(), random(3, 7, 4), random(3, 6, seed=1)
    nn.init.normal_(cell.recurrence.bias_ih_l0)
    w_x, w_h, b = weights_of(cell)
    expected, state = [], h.numpy()
    for t in range(7):
        state = np.tanh(x[:, t].numpy() @ w_x + state @ w_h + b)
        expected.append(state)
    np.testing.assert_allclose(cell(x, h).detach().numpy(), np.stack(expected, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", [False, True])
def test_lstm_is_the_lectures_formula(attention):
    """One number at a time for the attention, on a grid that is not square."""
    torch.manual_seed(0)
    cell = AttentionLSTM(4, 6).double() if attention else LSTM(4, 6).double()
    nn.init.normal_((cell.lstm if attention else cell).recurrence.bias_ih_l0)
    x, grid = random(2, 5, 4), random(2, 6, 2, 3, seed=1)
    w_x, w_h, b, *w_attn = weights_of(cell)
    initial = grid.mean((2, 3)) if attention else random(2, 6, seed=2)
    states, looks = cell(x, grid) if attention else (cell(x, initial), None)
    for n in range(2):
        h = initial[n].numpy()
        c = h if attention else np.zeros(6)
        for t in range(5):
            a = x[n, t].numpy() @ w_x + h @ w_h + b
            if attention:
                logits = {(i, j): float(grid[n, :, i, j].numpy() @ h) / 6**0.5 for i in range(2) for j in range(3)}
                total = sum(math.exp(logit) for logit in logits.values())
                x_attn = sum(math.exp(logit) / total * grid[n, :, i, j].numpy() for (i, j), logit in logits.items())
                a = a + x_attn @ w_attn[0]
                for (i, j), logit in logits.items():
                    assert looks[n, t, i, j].item() == pytest.approx(math.exp(logit) / total, abs=1e-12)
            i, f, o, g = sigmoid(a[:6]), sigmoid(a[6:12]), sigmoid(a[12:18]), np.tanh(a[18:])
            c = f * c + i * g
            h = o * np.tanh(c)
            np.testing.assert_allclose(states[n, t].detach().numpy(), h, rtol=0, atol=1e-12)


def test_attention_computes_the_same_by_steps_as_at_once_with_the_same_gradients():
    torch.manual_seed(0)
    cell = AttentionLSTM(4, 6).double()
    x, grid = random(3, 7, 4).requires_grad_(), random(3, 6, 2, 2, seed=1).requires_grad_()
    states, looks = cell(x, grid)
    h = c = cell.initial_state(grid)
    expected, expected_looks = [], []
    for x_t in x.unbind(1):
        h, c, weights = cell.step(x_t, h, c, grid)
        expected.append(h)
        expected_looks.append(weights)
    torch.testing.assert_close(states, torch.stack(expected, 1), **EXACT)
    torch.testing.assert_close(looks, torch.stack(expected_looks, 1), **EXACT)
    factor, inputs = random(3, 7, 6, seed=2), [x, grid, *cell.parameters()]
    gradients = torch.autograd.grad((states * factor).sum(), inputs)
    expected_gradients = torch.autograd.grad((torch.stack(expected, 1) * factor).sum(), inputs)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_attention_looks_where_the_state_points():
    keys = torch.eye(4)[None] * 100  # place p holds feature p
    weights = AttentionLSTM.attend(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), keys)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
    # A state that asks for nothing looks everywhere alike; by hand, ln 3 at one of four places: 3 against 1, 1, 1.
    torch.testing.assert_close(AttentionLSTM.attend(torch.zeros(1, 4), keys), torch.full((1, 4), 0.25))
    asked = torch.tensor([[2 * math.log(3), 0.0, 0.0, 0.0]])  # sqrt(H) = 2
    torch.testing.assert_close(
        AttentionLSTM.attend(asked, torch.eye(4)[None]), torch.tensor([[3 / 6, 1 / 6, 1 / 6, 1 / 6]])
    )


def test_gates_by_hand():
    # i = f = o = 1/2, g = tanh(1): c = 2 / 2 + tanh(1) / 2
    h, c = LSTM.gates(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), torch.tensor([[2.0]]))
    assert c.item() == pytest.approx(1 + math.tanh(1) / 2)
    assert h.item() == pytest.approx(math.tanh(1 + math.tanh(1) / 2) / 2)
    # A closed forget gate drops the memory, a closed output gate hides it.
    h, c = LSTM.gates(torch.tensor([[0.0, -50.0, 0.0, -50.0]]), torch.tensor([[2.0]]))
    assert c.item() == pytest.approx(0, abs=1e-6)
    h, c = LSTM.gates(torch.tensor([[-50.0, 50.0, 0.0, -50.0]]), torch.tensor([[2.0]]))
    assert (h.item(), c.item()) == (pytest.approx(0, abs=1e-6), pytest.approx(2))


@pytest.mark.parametrize("cell", CELLS)
def test_scores_are_those_of_its_parts(cell):
    network, features, tokens = build(cell), random(2, 5, 3, 3), torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0]])
    mapped = torch.einsum("ncij,hc->nhij", features, network.features.weight) + network.features.bias[:, None, None]
    vectors = torch.stack([network.words.weight[tokens[:, t]] for t in range(3)], 1)
    if cell == "attention":
        states, _ = network.cell(vectors, mapped)
    else:
        states = network.cell(vectors, mapped.mean((2, 3)))  # the mean and an affine map may change places
    expected = states @ network.scores.weight.T + network.scores.bias
    scores = network(features, tokens)
    assert scores.shape == (2, 3, 7)
    torch.testing.assert_close(scores, expected, **EXACT)
    # A score knows the tokens before its own, and none after.
    later = network(features, torch.tensor([[1, 4, 6, 6], [1, 6, 5, 5]]))
    torch.testing.assert_close(later[:, :2], scores[:, :2], **EXACT)
    assert not torch.allclose(later[:, 2], scores[:, 2])


@pytest.mark.parametrize("cell", CELLS)
def test_initial_values_are_the_assignments_and_the_loss_is_that_of_chance(cell):
    torch.manual_seed(0)
    network = CaptioningNetwork(864, cell)
    lstm = network.cell.lstm if cell == "attention" else network.cell
    spreads = [(network.words.weight, 864**-0.5), (network.features.weight, (2 / 1280) ** 0.5)]
    spreads += [(network.scores.weight, (2 / 512) ** 0.5), (lstm.recurrence.weight_ih_l0, 256**-0.5)]
    spreads += [(lstm.recurrence.weight_hh_l0, 512**-0.5)]
    spreads += [(network.cell.attended.weight, 512**-0.5)] if cell == "attention" else []
    for weight, expected in spreads:
        assert weight.std().item() == pytest.approx(expected, rel=0.01)
        # Normal, not uniform: five in a hundred thousand lie beyond four deviations.
        assert weight.abs().max() > 3.5 * expected
    assert not any(bias.any() for name, bias in network.named_parameters() if "bias" in name)
    tokens = torch.randint(4, 864, (8, 17))
    loss = captioning_loss(network(torch.rand(8, 1280, 4, 4), tokens), tokens[:, 1:])
    assert loss.item() == pytest.approx(16 * math.log(864), rel=0.05)


def test_loss_by_hand():
    targets = torch.tensor([[4, 5, 2, 0, 0], [4, 2, 0, 0, 0]])
    # Equal scores: log V at each of the 3 + 2 tokens that count, over 2 captions.
    assert captioning_loss(torch.zeros(2, 5, 8), targets).item() == pytest.approx(5 * math.log(8) / 2)
    scores = random(2, 5, 8).requires_grad_()
    loss = captioning_loss(scores, targets)
    log_p = scores.log_softmax(-1)
    expected = -(log_p[0, 0, 4] + log_p[0, 1, 5] + log_p[0, 2, 2] + log_p[1, 0, 4] + log_p[1, 1, 2]) / 2
    torch.testing.assert_close(loss, expected, **EXACT)
    loss.backward()
    assert (scores.grad.abs().sum(-1) > 0).tolist() == (targets != NULL).tolist()


def log_probabilities(network, features, tokens):
    """Those of each next token (N, T, V), by teacher forcing, among the tokens that may be produced."""
    inputs = torch.cat([torch.full_like(tokens[:, :1], START), tokens], 1)
    scores = network(features, inputs).detach()
    scores[..., [NULL, START, UNKNOWN]] = -torch.inf
    return scores.log_softmax(-1)


def log_probability(network, features, tokens):
    """Of whole captions (N,), where all tokens up to ``<END>`` count."""
    every = log_probabilities(network, features, tokens).gather(-1, tokens[..., None])[..., 0]
    return every.masked_fill(tokens == NULL, 0).sum(1)


@pytest.mark.parametrize("cell", CELLS)
def test_greedy_takes_the_best_token_at_every_step(cell):
    network, features = build(cell), 2 * random(16, 5, 2, 2)
    # The forbidden tokens have the greatest scores.
    with torch.no_grad():
        network.scores.bias[[NULL, START, UNKNOWN]] = 100
    captions = network.greedy(features, max_length=6)
    assert captions.tokens.shape == (16, 6)
    assert captions.tokens.dtype == torch.int64
    best = log_probabilities(network, features, captions.tokens).argmax(-1)
    ended = (captions.tokens == END).cumsum(1) - (captions.tokens == END).long() > 0
    assert 0 < ended.any(1).sum() < 16, "some should end, and some be cut"
    assert captions.tokens.tolist() == best.masked_fill(ended, NULL).tolist()
    expected = log_probability(network, features, captions.tokens)
    torch.testing.assert_close(captions.log_probabilities, expected, **EXACT)


def chain(probabilities):
    """A network whose next word depends on the last one alone: rows are ``{last token: {next token: probability}}``."""
    v = 1 + max(max(probabilities), *(token for row in probabilities.values() for token in row))
    network = CaptioningNetwork(v, "rnn", feature_dim=1, wordvec_dim=v, hidden_dim=v).double()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        network.words.weight.copy_(torch.eye(v) * 50)
        network.cell.recurrence.weight_ih_l0.copy_(torch.eye(v))  # the state is the last word, one-hot: tanh(50) = 1
        network.scores.weight.fill_(-1000)
        for last, row in probabilities.items():
            for token, probability in row.items():
                network.scores.weight[token, last] = math.log(probability)
    return network


# The probable first word leads to many improbable ones; the improbable one to a certain end.
GARDEN_PATH = {START: {4: 0.6, 5: 0.4}, 4: {6: 0.34, 7: 0.33, END: 0.33}, 5: {END: 1.0}, 6: {END: 1.0}, 7: {END: 1.0}}


def test_beam_search_finds_what_greedy_misses_by_hand():
    network, features = chain(GARDEN_PATH), torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    greedy = network.greedy(features, max_length=5)
    assert greedy.tokens.tolist() == [[4, 6, END, NULL, NULL]] * 2
    assert greedy.log_probabilities.exp().tolist() == pytest.approx([0.6 * 0.34] * 2)
    beam = network.beam_search(features, width=2, max_length=5)
    assert beam.tokens.tolist() == [[5, END, NULL, NULL, NULL]] * 2
    assert beam.log_probabilities.exp().tolist() == pytest.approx([0.4] * 2)


def test_length_penalty_prefers_the_longer_of_two_by_hand():
    # log 0.3 = -1.204 over 1; log 0.7 + 2 log 0.6 + log 1 = -1.378 over 4: by its mean the longer is better.
    network = chain({START: {END: 0.3, 4: 0.7}, 4: {5: 0.6, 8: 0.4}, 5: {6: 0.6, 7: 0.4}, 6: {END: 1.0}})
    features = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    found = {penalty: network.beam_search(features, 3, penalty, max_length=4) for penalty in (0.0, 1.0)}
    assert found[0.0].tokens.tolist() == [[END, NULL, NULL, NULL]]
    assert found[1.0].tokens.tolist() == [[4, 5, 6, END]]
    assert found[1.0].log_probabilities.exp().tolist() == pytest.approx([0.7 * 0.6 * 0.6])  # not divided


def test_a_search_goes_on_while_an_unfinished_caption_may_still_win_by_hand():
    # After one step log 0.3 of an ended caption leads log 0.25, which is sure to go on: by the mean over 3 it wins.
    network = chain({START: {END: 0.3, 4: 0.25, 5: 0.15, 6: 0.15, 7: 0.15}, 4: {8: 1.0}, 8: {END: 1.0}})
    features = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    assert network.beam_search(features, 2, 0.0).tokens[0, :3].tolist() == [END, NULL, NULL]
    assert network.beam_search(features, 2, 1.0).tokens[0, :4].tolist() == [4, 8, END, NULL]


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("cell", CELLS)
def test_a_beam_of_one_is_greedy(cell, length_penalty):
    network, features = build(cell, vocab_size=30), 2 * random(16, 5, 2, 2)
    greedy, beam = network.greedy(features), network.beam_search(features, 1, length_penalty)
    assert len({tuple(row) for row in greedy.tokens.tolist()}) > 4
    assert beam.tokens.equal(greedy.tokens)
    torch.testing.assert_close(beam.log_probabilities, greedy.log_probabilities, **EXACT)
    if cell == "attention":
        torch.testing.assert_close(beam.attention, greedy.attention, **EXACT)
    else:
        assert beam.attention is greedy.attention is None


def all_captions(vocab_size, max_length):
    """Every caption that ends in time, and every one that is cut."""
    words = range(4, vocab_size)
    for length in range(max_length):
        for row in itertools.product(words, repeat=length):
            yield [*row, END] + [NULL] * (max_length - length - 1)
    yield from (list(row) for row in itertools.product(words, repeat=max_length))


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("cell", CELLS)
def test_beam_search_is_exhaustive_search_where_the_beam_is_wide_enough(cell, length_penalty):
    network, features = build(cell, vocab_size=7), 2 * random(8, 5, 2, 2)
    every = torch.tensor(list(all_captions(7, 4)))
    assert len(every) == 1 + 3 + 9 + 27 + 81
    found = network.beam_search(features, width=200, length_penalty=length_penalty, max_length=4)
    for n in range(8):
        scores = log_probability(network, features[n : n + 1].expand(len(every), -1, -1, -1), every)
        best = (scores / (every != NULL).sum(1) ** length_penalty).argmax()
        assert found.tokens[n].tolist() == every[best].tolist()
        torch.testing.assert_close(found.log_probabilities[n], scores[best], **EXACT)


def slow_beam_search(network, features, width, length_penalty, max_length):
    """Of one image, with lists, and without an early end."""
    beams = [([], 0.0)]
    for _ in range(max_length):
        candidates = []
        for tokens, score in beams:
            if tokens[-1:] == [END]:
                candidates.append((tokens, score))
                continue
            row = log_probabilities(network, features, torch.tensor([[*tokens, NULL]]))[0, -1]
            candidates += [([*tokens, k], score + row[k].item()) for k in range(2, len(row))]
        beams = sorted(candidates, key=lambda one: -one[1] / len(one[0]) ** length_penalty)[:width]
    return beams[0]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("cell", CELLS)
def test_a_narrow_beam_over_a_batch_is_a_slow_search_of_each_image(cell, length_penalty):
    network, features = build(cell, vocab_size=9), 2 * random(8, 5, 2, 2)
    captions = network.beam_search(features, 3, length_penalty, max_length=6)
    assert not captions.tokens.equal(network.greedy(features, 6).tokens)
    for n in range(8):
        tokens, score = slow_beam_search(network, features[n : n + 1], 3, length_penalty, 6)
        assert captions.tokens[n].tolist() == tokens + [NULL] * (6 - len(tokens))
        assert captions.log_probabilities[n].item() == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_samples_are_drawn_from_the_distribution(cell):
    network, features = build(cell), random(1, 5, 2, 2)
    many = features.expand(4000, -1, -1, -1)
    for temperature in (1.0, 3.0):
        captions = network.sample(many, temperature, torch.Generator().manual_seed(0), max_length=2)
        expected = (log_probabilities(network, features, captions.tokens[:1])[0, 0] / temperature).softmax(-1)
        shares = captions.tokens[:, 0].bincount(minlength=7) / 4000
        assert shares.numpy() == pytest.approx(expected.numpy(), abs=0.03)  # four deviations
        assert shares[NULL] == shares[START] == shares[UNKNOWN] == 0
        assert (captions.tokens[captions.tokens[:, 0] == END, 1] == NULL).all()
        expected = log_probability(network, many, captions.tokens)
        torch.testing.assert_close(captions.log_probabilities, expected, **EXACT)


def test_samples_repeat_with_their_generator_and_turn_greedy_in_the_cold():
    network, features = build("lstm", vocab_size=30), 2 * random(16, 5, 2, 2)
    one, same, other = (network.sample(features, 1.0, torch.Generator().manual_seed(s)).tokens for s in (0, 0, 1))
    assert one.equal(same)
    assert not one.equal(other)
    assert network.sample(features, 1e-4).tokens.equal(network.greedy(features).tokens)


@pytest.mark.parametrize("decode", ["greedy", "sample", "beam_search"])
def test_attention_is_where_the_network_looked_for_each_word(decode):
    network, features = build("attention"), 2 * random(16, 5, 2, 3)
    captions = getattr(network, decode)(features, max_length=6)
    assert captions.attention.shape == (16, 6, 2, 3)
    inputs = torch.cat([torch.full((16, 1), START), captions.tokens[:, :-1]], 1)
    _, looks = network.cell(network.words(inputs), network.grid(features))
    said = captions.tokens != NULL
    assert not said.all()
    torch.testing.assert_close(captions.attention[said], looks[said].detach(), **EXACT)
    torch.testing.assert_close(captions.attention.sum((2, 3)), said.double(), **EXACT)


@pytest.mark.parametrize("cell", CELLS)
def test_no_image_gives_no_caption(cell):
    network, features = build(cell), torch.zeros(0, 5, 2, 2, dtype=torch.float64)
    for captions in (network.greedy(features), network.sample(features), network.beam_search(features)):
        assert captions.tokens.shape == (0, 15)
        assert captions.log_probabilities.shape == (0,)
    assert network(features, torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 3, 7)


@pytest.mark.parametrize("cell", CELLS)
def test_bf16_autocast_trains_and_captions(cell):
    network = build(cell).float()
    features, tokens = random(4, 5, 2, 2).float(), torch.randint(3, 7, (4, 6))
    try:
        with torch.autocast("cpu", torch.bfloat16):
            loss = captioning_loss(network(features, tokens), tokens[:, 1:])
            captions = network.beam_search(features)
    except RuntimeError as error:
        if "primitive descriptor" in str(error):
            pytest.skip("oneDNN of this torch has no LSTM in bfloat16 on this processor")
        raise
    assert loss.item() == pytest.approx(captioning_loss(network(features, tokens), tokens[:, 1:]).item(), rel=0.05)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert captions.log_probabilities.dtype == torch.float32


@pytest.mark.parametrize("cell", CELLS)
def test_it_learns_a_few_captions_by_heart(cell):
    torch.manual_seed(0)
    network = CaptioningNetwork(20, cell, feature_dim=8, wordvec_dim=32, hidden_dim=64)
    features = torch.rand(6, 8, 3, 3)
    tokens = torch.randint(4, 20, (6, 8))
    tokens[:, 0] = START
    for row, length in enumerate((4, 5, 6, 7, 7, 5)):
        tokens[row, length:] = NULL
        tokens[row, length] = END
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    losses = []
    for _ in range(120):
        loss = captioning_loss(network(features, tokens), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())
    for captions in (network.greedy(features, 7), network.beam_search(features, 3, max_length=7)):
        assert captions.tokens.equal(tokens[:, 1:])


def test_arguments_that_make_no_sense_are_named():
    network, features = build("rnn"), random(1, 5, 2, 2)
    with pytest.raises(ValueError, match="cell='gru' is not one of rnn, lstm, attention"):
        CaptioningNetwork(10, "gru")
    with pytest.raises(ValueError, match="temperature=0"):
        network.sample(features, temperature=0)
    with pytest.raises(ValueError, match="width=0"):
        network.beam_search(features, width=0)
    with pytest.raises(ValueError, match="length_penalty=-1"):
        network.beam_search(features, length_penalty=-1)
    with pytest.raises(ValueError, match="max_length=0"):
        network.greedy(features, max_length=0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"network": "vgg16"}, "network='vgg16' is not one of mobilenet_v2, .*, small"),
        ({"cell": "gru"}, "cell='gru' is not one of"),
        ({"grid": 0}, "grid=0 must be at least 1"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"beam_width": 0}, "beam_width=0 must be at least 1"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"length_penalty": -1.0}, "length_penalty=-1.0 must not be negative"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_training(wrong, said):
    with pytest.raises(ValueError, match=said):
        CaptioningLSTM(WORDS, **SMALL | wrong)


# The architecture: encoder, words, checkpoints

WORDS = [*SPECIAL, "a", "dog", "cat", "on", "the", "grass"]
SMALL = {"network": "small", "image_size": 32, "wordvec_dim": 8, "hidden_dim": 16}
ENCODERS = {  # torchvision's function, and what it does to images before its classifier
    "mobilenet_v2": lambda built, images: built.features(images),
    "squeezenet1_0": lambda built, images: built.features(images),
    "vgg19": lambda built, images: built.features[:-1](images),
    "resnet18": lambda built, images: built.layer4(
        built.layer3(built.layer2(built.layer1(built.maxpool(built.relu(built.bn1(built.conv1(images)))))))
    ),
}
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@pytest.mark.parametrize("network", ENCODERS)
def test_the_encoder_is_torchvisions_with_its_weights(network, tmp_path):
    torch.manual_seed(0)
    built = getattr(torchvision.models, network)(weights=None).eval()
    torch.save(built.state_dict(), tmp_path / "classifier.pth")
    model = CaptioningLSTM(WORDS, network=network, backbone_weights=str(tmp_path / "classifier.pth")).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = ENCODERS[network](built, (images - MEAN) / STD)
        torch.testing.assert_close(model.features(images), expected, rtol=1e-4, atol=1e-5)
    assert model.head.features.in_features == expected.shape[1]


def test_googlenets_encoder_gives_what_its_classifier_pools(tmp_path):
    """torchvision turns ImageNet's standardization into GoogLeNet's own, halves; here the first layer has them."""
    torch.manual_seed(0)
    built = torchvision.models.googlenet(weights=None, init_weights=False, transform_input=True).eval()
    torch.save(built.state_dict(), tmp_path / "googlenet.pth")
    model = CaptioningLSTM(WORDS, network="googlenet", backbone_weights=str(tmp_path / "googlenet.pth")).eval()
    pooled = []
    built.avgpool.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        built((images - MEAN) / STD)
        torch.testing.assert_close(model.features(images), pooled[0], rtol=1e-4, atol=1e-5)


def test_a_classifiers_weights_of_another_kind_are_refused_by_name(tmp_path):
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth is not of a squeezenet1_0: features\.0\.weight"):
        CaptioningLSTM(WORDS, network="squeezenet1_0", backbone_weights=str(tmp_path / "other.pth"))


def test_a_grid_is_the_mean_over_its_cells():
    model = CaptioningLSTM(WORDS, **SMALL | {"grid": 2, "image_size": 64}).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        whole = model.backbone.network(model.backbone.standardize(images))  # (2, 128, 8, 8)
        assert whole.shape == (2, 128, 8, 8)
        by_hand = torch.stack([whole[:, :, i : i + 4, j : j + 4].mean((2, 3)) for i in (0, 4) for j in (0, 4)], -1)
        torch.testing.assert_close(model.features(images).flatten(2), by_hand)


def test_scaled_features_have_a_mean_square_of_one():
    plain, scaled = (CaptioningLSTM(WORDS, **SMALL, scaled_features=scale).eval() for scale in (False, True))
    scaled.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before, after = plain.features(images).double().numpy(), scaled.features(images).double().numpy()
    scale = np.sqrt((before**2).mean(1, keepdims=True))
    np.testing.assert_allclose(after, np.divide(before, scale, out=np.zeros_like(before), where=scale > 0), rtol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_encoder_does_not_change_by_a_bit_and_another_is_trained(frozen):
    model = CaptioningLSTM(WORDS, **SMALL, frozen_backbone=frozen)
    assert model.backbone.training is not frozen
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    batch = torch.rand(4, 3, 32, 32), torch.tensor([[START, 4, 5, END, NULL]] * 4)
    trainer = Trainer(max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(model, torch.utils.data.DataLoader([batch] * 2, batch_size=None))
    assert not any(p.grad is not None for p in model.backbone.parameters()) or not frozen
    same = [torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items()]
    assert all(same) if frozen else not all(same)
    assert model.train().backbone.training is not frozen


@pytest.mark.parametrize("cell", CELLS)
def test_a_checkpoint_alone_captions(cell, tmp_path):
    model = CaptioningLSTM(WORDS, cell, **SMALL).eval()
    zoo.save(model, tmp_path / "captioner.safetensors")
    alone = zoo.load(tmp_path / "captioner.safetensors")
    images = torch.rand(3, 3, 32, 32)
    assert alone.predict_step(images, 0) == model.predict_step(images, 0)
    assert alone.words == WORDS


@pytest.mark.parametrize("cell", CELLS)
def test_another_vocabulary_keeps_the_rows_of_the_words_that_both_have(cell, tmp_path):
    model = CaptioningLSTM(WORDS, cell, **SMALL)
    zoo.save(model, tmp_path / "captioner.safetensors")
    others = [*SPECIAL, "horse", "dog", "the", "sky", "a", "meadow", "green"]
    started = CaptioningLSTM(others, cell, **SMALL, weights=str(tmp_path / "captioner.safetensors"))
    fresh = CaptioningLSTM(others, cell, **SMALL)
    for name in ("words.weight", "scores.weight", "scores.bias"):
        mine, theirs = started.head.get_parameter(name), model.head.get_parameter(name)
        assert mine.shape == fresh.head.get_parameter(name).shape
        for row, word in enumerate(others):
            kept = word in WORDS and torch.equal(mine[row], theirs[WORDS.index(word)])
            assert kept is (word in WORDS) or name == "scores.bias"  # fresh biases are all 0
    for name, value in model.head.cell.state_dict().items():
        assert torch.equal(started.head.cell.state_dict()[name], value)
    # As many words in another order are other words, too.
    turned = CaptioningLSTM(
        [*SPECIAL, *reversed(WORDS[4:])], cell, **SMALL, weights=str(tmp_path / "captioner.safetensors")
    )
    assert torch.equal(turned.head.words.weight[4:], model.head.words.weight[4:].flip(0))


@pytest.mark.parametrize("change", [{"cell": "lstm"}, {"cell": "rnn"}, {"hidden_dim": 12}])
def test_weights_of_another_cell_or_size_are_refused_by_name(change, tmp_path):
    zoo.save(CaptioningLSTM(WORDS, "attention", **SMALL), tmp_path / "captioner.safetensors")
    with pytest.raises(ValueError, match=r"captioner\.safetensors does not fit (this )?CaptioningLSTM: .*head\."):
        CaptioningLSTM(WORDS, **{"cell": "attention"} | SMALL | change, weights=str(tmp_path / "captioner.safetensors"))


def test_features_of_a_cache_give_what_pictures_give():
    model = CaptioningLSTM(WORDS, **SMALL).eval()
    images, tokens = torch.rand(3, 3, 32, 32), torch.tensor([[START, 4, 5, END]] * 3)
    features = model.features(images)
    assert torch.equal(model.scores(features, tokens), model.scores(images, tokens))
    assert torch.equal(model(features), model(images))


def test_without_words_it_is_the_assignments_network():
    model = CaptioningLSTM()
    assert sum(p.numel() for p in model.head.parameters()) == 3_943_776
    assert model.backbone(torch.zeros(1, 3, 112, 112)).shape == (1, 1280, 4, 4)


def test_dropout_is_for_training_alone():
    model = CaptioningLSTM(WORDS, **SMALL, dropout=0.5)
    images, tokens = torch.rand(2, 3, 32, 32), torch.tensor([[START, 4, 5, END]] * 2)
    model.eval()
    assert torch.equal(model.scores(images, tokens), model.scores(images, tokens))
    model.train()
    assert not torch.equal(model.scores(images, tokens), model.scores(images, tokens))


@pytest.mark.parametrize(("cell", "gates"), [("rnn", 1), ("lstm", 4), ("attention", 4)])
def test_the_layer_table_has_every_parameter_and_a_steps_products(cell, gates):
    model = CaptioningLSTM(cell=cell)
    rows = layer_table(model, model.example_input_array)
    head = {row.name: row for row in rows if row.name.startswith("head.")}
    assert sum(row.parameters for row in head.values()) == sum(p.numel() for p in model.head.parameters())
    recurrence = next(row for name, row in head.items() if name.endswith("recurrence"))
    assert recurrence.output == (1, 512)
    assert recurrence.multiply_adds == (256 + 512) * gates * 512


# From the command line


@pytest.fixture
def albums(tmp_path):
    """Two folders of pictures whose captions have different words."""
    rng = np.random.default_rng(0)
    for name, texts in (("one", ["a dog runs", "a cat sits"]), ("other", ["the horse stands here", "a dog sleeps"])):
        folder = tmp_path / name
        (folder / "train").mkdir(parents=True)
        images, annotations = [], []
        for number in range(8):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train" / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png"})
            annotations.append({"image_id": number, "id": number, "caption": texts[number % 2]})
        (folder / "captions_train.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    recipe = {
        "expect": [{"metric": "test/cider", "at_least": 0, "source": "nobody"}],
        "seed_everything": 0,
        "model": {"class_path": "zoo.CaptioningLSTM", "init_args": SMALL},
        "data": {
            "class_path": "datamodules.COCOCaptionsDataModule",
            "init_args": {"root": "one", "size": 32, "min_count": 1, "batch_size": 4, "val_size": 2, "workers": 0},
        },
        "trainer": {"max_epochs": 1, "log_every_n_steps": 1},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_a_checkpoint_keeps_its_words_on_other_data(albums):
    assert main(["fit", "mine.yaml"]) == 0
    checkpoint = "runs/mine/version_0/checkpoints/last.ckpt"
    words = zoo.load(checkpoint).words
    assert set(words) == {*SPECIAL, "a", "dog", "cat", "runs", "sits"}
    assert main(["test", "mine.yaml", "--ckpt_path", checkpoint, "--data.init_args.root", "other"]) == 0
    config = yaml.safe_load(Path("runs/mine/version_1/config.yaml").read_text())
    assert config["data"]["init_args"]["words"] == words


def test_a_checkpoint_does_not_look_for_its_encoders_file(albums):
    recipe = yaml.safe_load(Path("mine.yaml").read_text())
    torch.manual_seed(0)
    torch.save(small_network().state_dict(), "encoder.pth")
    recipe["model"]["init_args"] |= {"backbone_weights": "encoder.pth"}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "mine.yaml"]) == 0
    Path("encoder.pth").unlink()
    assert main(["test", "mine.yaml", "--ckpt_path", "runs/mine/version_0/checkpoints/last.ckpt"]) == 0


def test_words_of_other_data_are_learnt_from_weights(albums, caplog):
    assert main(["fit", "mine.yaml"]) == 0
    weights = ["--model.init_args.weights", "runs/mine/version_0/checkpoints/last.ckpt"]
    assert main(["fit", "mine.yaml", "--data.init_args.root", "other", *weights]) == 0
    assert "head.words.weight: 6 of 11 rows kept by class name" in caplog.text
    other = zoo.load("runs/mine/version_1/checkpoints/last.ckpt").words
    assert set(other) == {*SPECIAL, "a", "dog", "sleeps", "the", "horse", "stands", "here"}


def test_views_of_images_are_refused(albums, capsys):
    zoo.save(CaptioningLSTM(WORDS, **SMALL), "w.safetensors")
    options = ["--model.init_args.weights", "w.safetensors", "--test_time_augmentation", "flip"]
    assert main(["test", "mine.yaml", *options]) == 2
    assert "test_time_augmentation=flip is for classifiers: CaptioningLSTM is a captioner" in capsys.readouterr().err


def test_an_evaluation_of_weights_keeps_their_words_on_other_data(albums):
    assert main(["fit", "mine.yaml"]) == 0
    checkpoint = "runs/mine/version_0/checkpoints/last.ckpt"
    words = zoo.load(checkpoint).words
    weights = ["--model.init_args.weights", checkpoint]
    assert main(["test", "mine.yaml", "--data.init_args.root", "other", *weights]) == 0
    config = yaml.safe_load(Path("runs/mine/version_1/config.yaml").read_text())
    assert config["data"]["init_args"]["words"] == words


def test_words_cannot_be_given_by_hand(albums, capsys):
    assert main(["fit", "mine.yaml", "--model.init_args.words", "[a]"]) == 2
    assert "--model.init_args.words comes from the data" in capsys.readouterr().err


def test_zoo_check_looks_at_pictures_and_not_at_kept_features(albums, capsys):
    recipe = yaml.safe_load(Path("mine.yaml").read_text())
    recipe["trainer"]["callbacks"] = [{"class_path": "zoo.running.caching.CacheFeatures"}]
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["check", "mine.yaml", "--steps", "4"]) in (0, 1)
    output = capsys.readouterr().out
    assert "samples by heart" in output
    assert not Path("data").exists()
