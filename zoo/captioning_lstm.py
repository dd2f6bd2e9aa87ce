"""Image captioning with a recurrent network: vanilla RNN, LSTM, and an LSTM that looks at the image anew at each word.

Papers: Vinyals, Toshev, Bengio and Erhan, 2015, Show and tell: a neural image caption generator (section 3; beam search
in 3.2); Xu, Ba, Kiros, Cho, Courville, Salakhutdinov, Zemel and Bengio, 2015, Show, attend and tell (section 3.1).
Lecture: EECS 498-007, lectures 12, "Recurrent networks", and 13, "Attention"; assignment 4.
Differs from Show and Tell, as the lecture does: the image gives the first hidden state and is no word of the sentence.
Differs from Show, Attend and Tell, as the lecture does: scaled dot products in place of a small network, no gate on
what was seen, words from the hidden state alone, no penalty on the attention.

Images come as maps of features (N, C, S, S), captions as tokens (N, L): ``<START>``, words, ``<END>``, then ``<NULL>``.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim
from torch.nn import functional as F

from zoo.arguments import plain_arguments
from zoo.running.optimizing import SchedulerCallable
from zoo.standardization import IMAGENET_MEAN, IMAGENET_STD, standardized
from zoo.tasks.captioning import END, NULL, SPECIAL, START, UNKNOWN, CaptioningTask, Captions
from zoo.weights import load_trunk, load_weights

Cell = Literal["rnn", "lstm", "attention"]
Network = Literal["mobilenet_v2", "squeezenet1_0", "vgg19", "googlenet", "resnet18", "resnet101", "small"]

HALF = (0.5, 0.5, 0.5)
OF_WORDS = ("head.words.", "head.scores.")  # what has a row for each word
ASSIGNMENT_WORDS = 864  # of the assignment's vocabulary, the special ones among them


# The image encoder


@dataclass(frozen=True)
class Encoder:
    """Which part of an image classifier of torchvision gives the features.

    Attributes:
        builder: The function of ``torchvision.models``.
        channels: Channels C of the features.
        layers: So many of the classifier's children, from the first on; a negative number leaves out the last ones.
        options: What the builder is told.
        mean: Of each colour of the images that its weights were trained on.
        std: Likewise the standard deviation.
    """

    builder: str
    channels: int
    layers: int = 1  # those that call it ``features``
    options: tuple[tuple[str, Any], ...] = ()
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def build(self) -> nn.Sequential:
        """Images (N, 3, H, W) to features (N, C, S, S), its tensors named as in the published files."""
        from torchvision import models

        built = getattr(models, self.builder)(weights=None, **dict(self.options))
        children = OrderedDict(list(built.named_children())[: self.layers])
        if self.builder.startswith("vgg"):
            children["features"] = children["features"][:-1]  # Show, Attend and Tell looks before the last pooling
        return nn.Sequential(children)


GOOGLENET = (("aux_logits", False), ("init_weights", False))
ENCODERS = {
    "mobilenet_v2": Encoder("mobilenet_v2", 1280),
    "squeezenet1_0": Encoder("squeezenet1_0", 512),
    "vgg19": Encoder("vgg19", 512),
    "googlenet": Encoder("googlenet", 1024, -3, GOOGLENET, HALF, HALF),
    "resnet18": Encoder("resnet18", 512, -2),
    "resnet101": Encoder("resnet101", 2048, -2),
}
SMALL_LAYERS = ((32, 2), (64, 2), (128, 2), (128, 1))  # channels and stride


def small_network() -> nn.Sequential:
    """Four convolutions with batch norm: images (N, 3, H, W) to (N, 128, H / 8, W / 8), each seeing 31 pixels."""
    layers: list[nn.Module] = []
    before = 3
    for width, stride in SMALL_LAYERS:
        convolution = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        before = width
    return nn.Sequential(*layers)


class ScaledFeatures(nn.Module):
    """Divides the features at each place by the root of their mean square over the channels."""

    def forward(self, features: Tensor) -> Tensor:
        """Map features (N, C, S, S) to as many whose mean square over C is 1 at every place, or 0 where all are 0."""
        mean_square = features.square().mean(1, keepdim=True)  # (N, 1, S, S)
        return features * mean_square.clamp_min(1e-12).rsqrt()


# The recurrent cells


def _with_one_bias(recurrence: nn.RNNBase) -> None:
    """Make the second bias of a layer of torch's a constant zero.

    It has one for the input and one for the state. Only their sum counts, and the lecture's cells have one bias.
    """
    zeros = torch.zeros_like(recurrence.all_weights[0][3], requires_grad=False)
    del recurrence.bias_hh_l0
    recurrence.register_buffer("bias_hh_l0", zeros, persistent=False)
    recurrence.bias_hh_l0 = zeros  # the layer also keeps a list of its weights, which it renews at an assignment


def _initialize(recurrence: nn.RNNBase) -> None:
    """The assignment's initial values: weights of variance 1 / inputs, no bias."""
    w_x, w_h, b, _ = recurrence.all_weights[0]
    nn.init.normal_(w_x, std=recurrence.input_size**-0.5)
    nn.init.normal_(w_h, std=recurrence.hidden_size**-0.5)
    nn.init.zeros_(b)


class VanillaRNN(nn.Module):
    """The lecture's recurrent network: ``h_t = tanh(x_t W_x + h_{t-1} W_h + b)``.

    Its weights are those of a ``torch.nn.RNN``, which computes whole sequences; W_x and W_h are kept there transposed.

    Args:
        input_dim: Length D of an input.
        hidden_dim: Length H of the hidden state.
    """

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.recurrence = nn.RNN(input_dim, hidden_dim, batch_first=True)
        _with_one_bias(self.recurrence)
        _initialize(self.recurrence)

    def from_input(self, x: Tensor) -> Tensor:
        """The part of the sum that the input gives, ``x W_x + b``: (..., D) to (..., H)."""
        w_x, _, b, _ = self.recurrence.all_weights[0]
        return F.linear(x, w_x, b)

    def from_state(self, h: Tensor) -> Tensor:
        """The part of the sum that the hidden state gives, ``h W_h``: (..., H) to (..., H)."""
        return F.linear(h, self.recurrence.all_weights[0][1])

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        """One step, with any leading dimensions: input (..., D) and state (..., H) to the next state (..., H)."""
        return torch.tanh(self.from_input(x) + self.from_state(h))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Map inputs (N, T, D) and the initial state (N, H) to the states after each step (N, T, H)."""
        states, _ = self.recurrence(x, h.to(x.dtype)[None])
        return cast(Tensor, states)


class LSTM(nn.Module):
    """The lecture's long short-term memory.

    ``a = x_t W_x + h_{t-1} W_h + b``; ``i, f, o = sigmoid(a_i, a_f, a_o)``; ``g = tanh(a_g)``;
    ``c_t = f * c_{t-1} + i * g``; ``h_t = o * tanh(c_t)``.

    Its weights are those of a ``torch.nn.LSTM``, which computes whole sequences; W_x and W_h are kept there transposed,
    and its gates are in the order i, f, g, o, where the lecture writes i, f, o, g.

    Args:
        input_dim: Length D of an input.
        hidden_dim: Length H of the hidden state and of the cell state.
    """

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.recurrence = nn.LSTM(input_dim, hidden_dim, batch_first=True)
        _with_one_bias(self.recurrence)
        _initialize(self.recurrence)

    def from_input(self, x: Tensor) -> Tensor:
        """The part of the activations a that the input gives, ``x W_x + b``: (..., D) to (..., 4 H)."""
        w_x, _, b, _ = self.recurrence.all_weights[0]
        return F.linear(x, w_x, b)

    def from_state(self, h: Tensor) -> Tensor:
        """The part of the activations a that the hidden state gives, ``h W_h``: (..., H) to (..., 4 H)."""
        return F.linear(h, self.recurrence.all_weights[0][1])

    @staticmethod
    def gates(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Map activations (..., 4 H) and the cell state (..., H) to the next hidden and cell state."""
        i, f, g, o = a.chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step: input (..., D), hidden and cell state (..., H) to the next hidden and cell state."""
        return self.gates(self.from_input(x) + self.from_state(h), c)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Map inputs (N, T, D) and the initial hidden state (N, H) to the hidden states after each step (N, T, H)."""
        h = h.to(x.dtype)[None]
        states, _ = self.recurrence(x, (h, torch.zeros_like(h)))
        return cast(Tensor, states)


class AttentionLSTM(nn.Module):
    """The lecture's LSTM with attention over a grid of features A (H, S, S), which are keys and values alike.

    The last hidden state asks: ``M = softmax(h_{t-1} A / sqrt(H))`` over the S × S places. What it sees,
    ``x_attn = sum of M A``, is one more input, ``a = x_t W_x + h_{t-1} W_h + x_attn W_attn + b``, to the same gates.

    Args:
        input_dim: Length D of an input.
        hidden_dim: Length H of the states and of the features at each place of the grid.
    """

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.lstm = LSTM(input_dim, hidden_dim)
        self.attended = nn.Linear(hidden_dim, 4 * hidden_dim, bias=False)
        nn.init.normal_(self.attended.weight, std=hidden_dim**-0.5)

    @staticmethod
    def initial_state(grid: Tensor) -> Tensor:
        """Both states before the first step, the mean of the grid: (N, H, S, S) to (N, H)."""
        return grid.mean(dim=(2, 3))

    @staticmethod
    def attend(h: Tensor, keys: Tensor) -> Tensor:
        """Where the hidden states (N, ..., H) look among keys (N, H, P): weights (N, ..., P), which sum to one."""
        return torch.softmax(torch.einsum("n...h,nhp->n...p", h, keys) / math.sqrt(keys.shape[1]), dim=-1)

    def step(self, x: Tensor, h: Tensor, c: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step as the lecture writes it.

        Args:
            x: Inputs (N, D), or (N, K, D) where K sequences go with each grid.
            h: Hidden states (N, H) or (N, K, H).
            c: Cell states of the same shape.
            grid: Features (N, H, S, S).

        Returns:
            The next hidden and cell states, and the attention's weights (N, S, S) or (N, K, S, S).
        """
        h, c, weights = self.advance(self.lstm.from_input(x), h, c, grid.flatten(2))
        return h, c, weights.unflatten(-1, grid.shape[2:])

    def advance(self, from_input: Tensor, h: Tensor, c: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``step`` from ``lstm.from_input(x)``, which can be had for all steps at once, on P places (N, H, P) in a row.

        The weights are (N, ..., P). To project the P places by W_attn once, and not what is seen at each step, was
        slower on a CPU: 16 places, 16 steps.
        """
        weights = self.attend(h, keys)
        x_attn = torch.einsum("n...p,nhp->n...h", weights, keys)
        a = from_input + self.lstm.from_state(h) + self.attended(x_attn)
        return *self.lstm.gates(a, c), weights

    def forward(self, x: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Map inputs (N, T, D) and the grid (N, H, S, S) to hidden states (N, T, H) and weights (N, T, S, S)."""
        h = c = self.initial_state(grid)
        keys = grid.flatten(2)
        states, looks = [], []
        for from_input in self.lstm.from_input(x).unbind(1):
            h, c, weights = self.advance(from_input, h, c, keys)
            states.append(h)
            looks.append(weights)
        return torch.stack(states, 1), torch.stack(looks, 1).unflatten(-1, grid.shape[2:])


# Decoding


def _select(tensor: Tensor, parents: Tensor) -> Tensor:
    """Of (N, K, ...) the rows ``parents`` (N, K) of each image."""
    return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], parents]


class _Beams:
    """K captions of each of N images while they grow, their log-probabilities, and where the network looked."""

    def __init__(self, features: Tensor, width: int, max_length: int, attends: bool) -> None:
        if max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1")
        n, device = len(features), features.device
        self.max_length = max_length
        self.step = 0
        self.tokens = torch.full((n, width, max_length), NULL, device=device)
        self.last = torch.full((n, width), START, device=device)
        self.ended = torch.zeros(n, width, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(n, width, device=device)
        # The K captions begin alike: all but the first are impossible, or each would be found K times.
        dtype = torch.promote_types(features.dtype, torch.float32)
        self.log_p = torch.full((n, width), -torch.inf, dtype=dtype, device=device)
        self.log_p[:, 0] = 0
        self.attention = features.new_zeros(n, width, max_length, *features.shape[2:]) if attends else None

    @property
    def full(self) -> bool:
        """Whether the captions have reached their greatest length."""
        return self.step == self.max_length

    def candidates(self, scores: Tensor, length_penalty: float) -> tuple[Tensor, Tensor, Tensor]:
        """The best K continuations: the captions that they continue, their tokens, and their log-probabilities.

        Args:
            scores: float (N, K, V), logits of the next token of every caption.
            length_penalty: As in ``beam_search``.

        Returns:
            Three (N, K).
        """
        k = scores.shape[1]
        # No more than K come from one caption: all else is done with K numbers in place of V.
        best, tokens = scores.topk(min(k, scores.shape[2]))  # (N, K, K)
        log_p = best - scores.logsumexp(-1, keepdim=True)
        # The only continuation of what has ended: nothing more, at no cost.
        stay = torch.full_like(log_p[0, 0], -torch.inf)
        stay[0] = 0
        log_p = self.log_p[..., None] + torch.where(self.ended[..., None], stay, log_p)
        tokens = tokens.masked_fill(self.ended[..., None], NULL)
        lengths = self.lengths + ~self.ended
        places = (log_p / lengths[..., None] ** length_penalty).flatten(1).topk(k).indices
        return places // log_p.shape[2], tokens.flatten(1).gather(1, places), log_p.flatten(1).gather(1, places)

    def extend(self, parents: Tensor, tokens: Tensor, log_p: Tensor, looks: Tensor | None) -> None:
        """Continue the captions ``parents`` (N, K) with ``tokens`` (N, K), which are ``<NULL>`` where one has ended.

        Args:
            parents: Places of captions among the K of their image.
            tokens: Their next tokens.
            log_p: The log-probabilities (N, K) of the captions with them.
            looks: Weights of the attention (N, K, P) of every caption, or None.
        """
        ended = _select(self.ended, parents)
        self.log_p = log_p
        self.lengths = _select(self.lengths, parents) + ~ended
        self.last = tokens
        self.tokens = _select(self.tokens, parents)
        self.tokens[..., self.step] = tokens
        if self.attention is not None and looks is not None:
            seen = _select(looks, parents).masked_fill(ended[..., None], 0)
            self.attention = _select(self.attention, parents)
            self.attention[:, :, self.step] = seen.view_as(self.attention[:, :, self.step])
        self.ended = ended | (tokens == END)
        self.step += 1

    def settled(self, length_penalty: float) -> bool:
        """Whether every image has an ended caption that none of its others can still surpass."""
        finished = self._scores(length_penalty).masked_fill(~self.ended, -torch.inf)
        # A log-probability only falls, and weighs least at the greatest length.
        hopes = (self.log_p / self.max_length**length_penalty).masked_fill(self.ended, -torch.inf)
        return bool((finished.amax(1) > hopes.amax(1)).all())

    def best(self, length_penalty: float) -> Captions:
        """The best caption of each image."""
        best = self._scores(length_penalty).argmax(1, keepdim=True)  # (N, 1)
        attention = None if self.attention is None else _select(self.attention, best)[:, 0]
        return Captions(_select(self.tokens, best)[:, 0], _select(self.log_p, best)[:, 0], attention)

    def _scores(self, length_penalty: float) -> Tensor:
        return self.log_p / self.lengths.clamp(min=1) ** length_penalty


# The network


class CaptioningNetwork(nn.Module):
    """From a map of image features to captions: word vectors, a recurrent cell, and scores of the next word.

    ``"rnn"`` and ``"lstm"`` start from an affine map of the pooled features. ``"attention"`` maps the features to H
    channels at every place, starts from the mean of those, and looks at them before every word.

    A caption's probability is the product of its tokens', ``<END>`` among them; ``<NULL>``, ``<START>`` and ``<UNK>``
    are never produced, and the softmax goes over the other tokens. Decoding works on all images at once, where the
    features are.

    Args:
        vocab_size: Number V of tokens, of which the first four are special.
        cell: The recurrent cell.
        feature_dim: Channels C of the features.
        wordvec_dim: Length W of a word vector.
        hidden_dim: Length H of the hidden state.
        dropout: Share of the hidden states' values that are dropped before the scores, in training.

    Raises:
        ValueError: ``cell`` is none of the three.
    """

    def __init__(
        self,
        vocab_size: int,
        cell: Cell = "lstm",
        feature_dim: int = 1280,
        wordvec_dim: int = 256,
        hidden_dim: int = 512,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        cells: dict[str, type[nn.Module]] = {"rnn": VanillaRNN, "lstm": LSTM, "attention": AttentionLSTM}
        if cell not in cells:
            raise ValueError(f"cell={cell!r} is not one of {', '.join(cells)}")
        self.features = nn.Linear(feature_dim, hidden_dim)
        self.words = nn.Embedding(vocab_size, wordvec_dim)
        self.cell = cells[cell](wordvec_dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.scores = nn.Linear(hidden_dim, vocab_size)
        self._initialize()

    def _initialize(self) -> None:
        """The assignment's initial values; those of the cell are its own."""
        nn.init.normal_(self.words.weight, std=self.words.num_embeddings**-0.5)
        for affine in (self.features, self.scores):
            nn.init.kaiming_normal_(affine.weight)
            nn.init.zeros_(affine.bias)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Score every next token, given the true ones before it (teacher forcing).

        Args:
            features: float (N, C, S, S).
            tokens: int64 (N, L), from ``<START>`` on.

        Returns:
            Scores (N, L - 1, V) of ``tokens[:, 1:]``, logits over the whole vocabulary.
        """
        vectors = self.words(tokens[:, :-1])  # (N, L - 1, W)
        if isinstance(self.cell, AttentionLSTM):
            states, _ = self.cell(vectors, self.grid(features))
        else:
            states = self.cell(vectors, self.initial_state(features))
        return cast(Tensor, self.scores(self.dropout(states)))

    def initial_state(self, features: Tensor) -> Tensor:
        """The hidden state before the first word, without attention: features (N, C, S, S) to (N, H)."""
        return cast(Tensor, self.features(features.mean(dim=(2, 3))))

    def grid(self, features: Tensor) -> Tensor:
        """What attention looks at: features (N, C, S, S) to (N, H, S, S)."""
        return cast(Tensor, self.features(features.movedim(1, -1)).movedim(-1, 1))

    @torch.no_grad()
    def greedy(self, features: Tensor, max_length: int = 15) -> Captions:
        """Take the most probable token at every step.

        Args:
            features: float (N, C, S, S).
            max_length: Tokens of a caption at most, with ``<END>``.

        Raises:
            ValueError: ``max_length`` is less than 1.
        """
        return self._one_by_one(features, max_length, lambda log_p: log_p.argmax(-1, keepdim=True))

    @torch.no_grad()
    def sample(
        self,
        features: Tensor,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        max_length: int = 15,
    ) -> Captions:
        """Draw every token from its distribution.

        Args:
            features: float (N, C, S, S).
            temperature: Divides the scores before the draw: below 1 for the probable words, above 1 for variety. The
                log-probabilities that are returned are those of temperature 1.
            generator: Draws the tokens, on the features' device; None is torch's own.
            max_length: Tokens of a caption at most, with ``<END>``.

        Raises:
            ValueError: ``temperature`` is not positive, or ``max_length`` is less than 1.
        """
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive; greedy() is its limit at 0")

        def draw(log_p: Tensor) -> Tensor:
            return torch.multinomial((log_p / temperature).softmax(-1), 1, generator=generator)

        return self._one_by_one(features, max_length, draw)

    @torch.no_grad()
    def beam_search(
        self, features: Tensor, width: int = 5, length_penalty: float = 0.0, max_length: int = 15
    ) -> Captions:
        """Keep the best unfinished and finished captions of each image at every step, and return the best at the end.

        A finished caption stays as it is and keeps its place among the ``width`` as long as it is good enough. What is
        best is decided by the log-probability over ``length ** length_penalty``, ``<END>`` counted, at every step. A
        search ends when no unfinished caption can become better than the best finished one.

        Args:
            features: float (N, C, S, S).
            width: Captions K that are kept of each image; 1 is greedy.
            length_penalty: 0 compares the probabilities, which favours short captions; 1 their mean over the tokens.
            max_length: Tokens of a caption at most, with ``<END>``.

        Raises:
            ValueError: ``width`` or ``max_length`` is less than 1, or ``length_penalty`` is negative.
        """
        if width < 1:
            raise ValueError(f"width={width} must be at least 1")
        if length_penalty < 0:
            raise ValueError(f"length_penalty={length_penalty} must not be negative")
        beams = _Beams(features, width, max_length, isinstance(self.cell, AttentionLSTM))
        state, keys = self._start(features, width)
        inputs = self._inputs(len(features) * width * max_length)
        while not beams.full and not beams.settled(length_penalty):
            scores, state, looks = self._next(inputs(beams.last), state, keys)
            parents, tokens, log_p = beams.candidates(scores, length_penalty)
            state = (_select(state[0], parents), _select(state[1], parents))
            beams.extend(parents, tokens, log_p, looks)
        return beams.best(length_penalty)

    def _one_by_one(self, features: Tensor, max_length: int, choose: Callable[[Tensor], Tensor]) -> Captions:
        """Caption by choosing each token (N, 1) from its log-probabilities (N, V)."""
        beams = _Beams(features, 1, max_length, isinstance(self.cell, AttentionLSTM))
        state, keys = self._start(features, 1)
        inputs = self._inputs(len(features) * max_length)
        while not beams.full and not bool(beams.ended.all()):
            scores, state, looks = self._next(inputs(beams.last), state, keys)
            log_p = scores[:, 0].log_softmax(-1)
            tokens = choose(log_p)
            added = log_p.gather(1, tokens).masked_fill(beams.ended, 0)
            tokens = tokens.masked_fill(beams.ended, NULL)
            beams.extend(torch.zeros_like(tokens), tokens, beams.log_p + added, looks)
        return beams.best(length_penalty=0.0)

    def _start(self, features: Tensor, width: int) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """The states (N, K, H) before the first word, and what attention looks at (N, H, P), once for the K."""
        keys = None
        if isinstance(self.cell, AttentionLSTM):
            grid = self.grid(features)
            h = self.cell.initial_state(grid)
            state, keys = (h, h), grid.flatten(2)
        else:
            h = self.initial_state(features)
            state = (h, torch.zeros_like(h))  # the vanilla RNN leaves the second as it is
        h, c = (part[:, None].expand(-1, width, -1) for part in state)
        return (h, c), keys

    def _inputs(self, uses: int) -> Callable[[Tensor], Tensor]:
        """From tokens (N, K) to what the cell makes of their words; for all words at once where they are fewer."""
        cell = self.cell.lstm if isinstance(self.cell, AttentionLSTM) else self.cell
        from_input = cast(VanillaRNN | LSTM, cell).from_input
        if uses <= self.words.num_embeddings:
            return lambda tokens: from_input(self.words(tokens))
        return from_input(self.words.weight).__getitem__

    def _next(
        self, from_input: Tensor, state: tuple[Tensor, Tensor], keys: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """From the last words (N, K, …): logits of the next (N, K, V), states, and attention (N, K, P)."""
        h, c = state
        weights = None
        if isinstance(self.cell, AttentionLSTM) and keys is not None:
            h, c, weights = self.cell.advance(from_input, h, c, keys)
        elif isinstance(self.cell, LSTM):
            h, c = self.cell.gates(from_input + self.cell.from_state(h), c)
        else:
            h = torch.tanh(from_input + cast(VanillaRNN, self.cell).from_state(h))
        scores = self.scores(h)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores[..., [NULL, START, UNKNOWN]] = -torch.inf
        return scores, (h, c), weights


class CaptioningLSTM(CaptioningTask):
    """Writes a sentence about an image, word by word.

    The image encoder is frozen by default, as in the assignment: no parameter and no buffer of it changes, whatever
    calls ``train()``. Its features can then be computed once for all epochs
    (:class:`zoo.running.caching.CacheFeatures`).

    A checkpoint holds the words, and captions alone. Started from ``weights`` of another vocabulary, the rows of the
    words that both have are kept and the others are fresh.

    Args:
        words: The vocabulary, ``<NULL>``, ``<START>``, ``<END>`` and ``<UNK>`` first; from a data module's ``words``.
            None is the assignment's 864, without their names, to look at the network.
        cell: The recurrent cell: ``rnn`` and ``lstm`` see the image once, ``attention`` at every word.
        network: The image encoder: ``mobilenet_v2`` is the assignment's, ``googlenet`` that of Show and Tell, ``vgg19``
            that of Show, Attend and Tell; ``small`` is four convolutions, for small pictures and to be trained.
        frozen_backbone: Leave the encoder as it is; else it is trained with the rest.
        grid: Side S of the grid of features, to which they are averaged; None leaves what the encoder gives.
        scaled_features: Divide the features at each place by the root of their mean square. The assignment does not;
            for encoders whose features are large, as SqueezeNet's, whose mean square is some 800.
        wordvec_dim: Length of a word vector.
        hidden_dim: Length of the hidden state.
        dropout: Share of the hidden state's values that are dropped before the scores, in training.
        image_size: Side of the pictures that the model is made for, in pixels.
        beam_width: Captions that are kept while one is searched for; 1 takes the best word at each step.
        length_penalty: 0 compares whole captions' probabilities, which favours short ones; 1 their mean over the words.
        max_length: Words of a caption at most, ``<END>`` counted.
        weights: A file of a captioner (``.safetensors``, ``.ckpt``) or ``hf://owner/name``.
        backbone_weights: torchvision's name (``DEFAULT``, ``IMAGENET1K_V1``) or a file of a classifier, for the encoder
            alone.
        optimizer: Makes the optimizer from the parameters. Default: the assignment's.
        scheduler: Makes the schedule from the optimizer and the run's number of steps. Default: none.

    Raises:
        FileNotFoundError: A weights file is missing.
        ValueError: A value is out of range, ``words`` is no vocabulary, or a weights file does not fit.
    """

    @plain_arguments
    def __init__(
        self,
        words: list[str] | None = None,
        cell: Cell = "attention",
        network: Network = "mobilenet_v2",
        frozen_backbone: bool = True,
        grid: int | None = None,
        scaled_features: bool = False,
        wordvec_dim: int = 256,
        hidden_dim: int = 512,
        dropout: float = 0.0,
        image_size: int = 112,
        beam_width: int = 3,
        length_penalty: float = 0.0,
        max_length: int = 16,
        weights: str | None = None,
        backbone_weights: str | None = None,
        optimizer: OptimizerCallable = lambda params: optim.Adam(params, lr=1e-3),
        scheduler: SchedulerCallable | None = None,
    ) -> None:
        vocabulary = [*SPECIAL, *map(str, range(len(SPECIAL), ASSIGNMENT_WORDS))] if words is None else words
        super().__init__(vocabulary, optimizer, scheduler)
        if network not in (*ENCODERS, "small"):
            raise ValueError(f"network={network!r} is not one of {', '.join(ENCODERS)}, small")
        least = {"grid": 1 if grid is None else grid, "image_size": image_size, "beam_width": beam_width}
        for name, value in (least | {"max_length": max_length}).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if length_penalty < 0:
            raise ValueError(f"length_penalty={length_penalty} must not be negative")
        self.example_input_array = torch.zeros(1, 3, image_size, image_size)
        self.frozen_backbone = frozen_backbone
        self.decoding = (beam_width, length_penalty, max_length)
        encoder = ENCODERS.get(network)
        trunk = small_network() if encoder is None else encoder.build()
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if encoder is None else (encoder.mean, encoder.std)
        self.backbone = standardized(trunk, mean, std)
        if grid is not None:
            self.backbone.append(nn.AdaptiveAvgPool2d(grid))
        if scaled_features:
            self.backbone.append(ScaledFeatures())
        channels = SMALL_LAYERS[-1][0] if encoder is None else encoder.channels
        self.head = CaptioningNetwork(len(vocabulary), cell, channels, wordvec_dim, hidden_dim, dropout)
        self.backbone.to(memory_format=torch.channels_last)
        self.backbone.requires_grad_(not frozen_backbone)
        self.train()
        if backbone_weights is not None:
            load_trunk(trunk, backbone_weights, None if encoder is None else encoder.builder)
        if weights is not None:
            transfer = load_weights(self, weights, keep_matching_classes=True)
            if other := [key for key in transfer.fresh if not key.startswith(OF_WORDS)]:
                raise ValueError(
                    f"{weights} does not fit this CaptioningLSTM: {', '.join(other[:4])} are missing or of another "
                    "size. Give cell, network and hidden_dim as they were there"
                )

    def train(self, mode: bool = True) -> "CaptioningLSTM":
        """Set the mode; a frozen encoder stays in evaluation mode, or its batch norms would move."""
        super().train(mode)
        self.backbone.train(mode and not self.frozen_backbone)
        return self

    def features(self, images: Tensor) -> Tensor:
        """The encoder's features (N, C, S, S) of images (N, 3, H, W); of features, which a cache kept, themselves."""
        return cast(Tensor, self.backbone(images)) if images.shape[1] == 3 else images.to(self.dtype)

    def scores(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Logits (N, L - 1, V) of the tokens after the first, each given the true ones before it."""
        return cast(Tensor, self.head(self.features(images), tokens))

    @torch.no_grad()
    def caption(self, images: Tensor) -> Captions:
        """Search the best caption of each image, of images (N, 3, H, W) in [0, 1] or their features."""
        return cast(CaptioningNetwork, self.head).beam_search(self.features(images), *self.decoding)

    def class_rows(self, key: str, rows: int, classes: int) -> list[Tensor] | None:
        """Of word vectors and scores each row is a word's; of other tensors none is."""
        return list(torch.arange(rows)[:, None]) if key.startswith(OF_WORDS) and rows == classes else None
