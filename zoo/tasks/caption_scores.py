"""How near captions come to people's: BLEU, ROUGE-L and CIDEr-D, as the COCO caption code counts them.

On the same words the numbers are those of ``pycocoevalcap`` (https://github.com/salaniz/pycocoevalcap, the code of
https://arxiv.org/abs/1504.00325); nothing of it, and no Java, is needed here. The words are not quite the same: see
:func:`tokenize`. METEOR and SPICE, which that code has too, need Java and are not here.

Scales: BLEU and ROUGE-L lie in [0, 1], CIDEr-D in [0, 10], since its definition has a factor of 10. These are the
numbers that the COCO caption code prints; papers print 100 times each of them, CIDEr too ("94.3" is 0.943 here).
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

LONGEST = 4  # n-grams have one to four words
RECALL = 1.2  # beta of ROUGE-L: how much more recall counts than precision
SPREAD = 6.0  # sigma of CIDEr-D: how far lengths may differ, in words
NAMES = [*(f"bleu_{n}" for n in range(1, LONGEST + 1)), "rouge_l", "cider"]


# The data modules have the same lines for their vocabulary: what reads data and what learns from it never import each
# other. A test holds them together.
def tokenize(caption: str) -> list[str]:
    """The words of a caption: lower case, letters, digits and apostrophes within a word; all else parts words.

    The COCO caption code runs Stanford's PTBTokenizer, a Java program, and drops punctuation. It differs in that it

    - parts clitics: ``man's`` is ``man 's``, ``doesn't`` is ``does n't``, ``cannot`` is ``can not``, ``gonna`` is
      ``gon na``; here each is one word;
    - keeps words together that a hyphen, a slash, an underscore or a dot joins: ``t-shirt``, ``black/white``,
      ``u.s.``, ``3.5``, ``5:30``, ``1,000``; here they are ``t shirt``, ``black white``, ``u s``, ``3 5`` …;
    - keeps signs as words (``&``, ``#``, ``%``, ``$``, ``@``, ``?!``) and writes brackets as words (``-lrb-``); here
      they are dropped.

    On 13,956 captions of COCO val2017 the words differ in 263, that is 1.9 %, mostly by ``'s`` and hyphens.
    """
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", caption.lower().replace("’", "'"))


def bleu(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """BLEU of a set of captions, https://aclanthology.org/P02-1040, from 1-grams alone to all up to 4-grams.

    One number for the set, and not a mean over its pictures: the shares of n-grams that a reference of the same picture
    has, at most as often as that reference, are counted over all. Captions that are shorter in all than the references
    closest to each in length (of two as close, the shorter) are punished. Where no n-gram could be right, the COCO
    caption code has 1e-6 instead of a share, and so has this.

    Args:
        candidates: The words of the caption to judge of each of N pictures, which may be none.
        references: For each picture the words of at least one caption that is right.

    Returns:
        BLEU-1, -2, -3 and -4, in [0, 1].

    Raises:
        ValueError: There are no pictures, not as many candidates as lists of references, or a picture has no reference.
    """
    _check(candidates, references)
    scores, product = [], 1.0
    shortness = _shortness([len(words) for words in candidates], [[len(words) for words in all] for all in references])
    for n, terms in enumerate(_terms(candidates, references), 1):
        right = np.zeros(len(terms.count))
        np.maximum.at(right, terms.met, np.minimum(terms.count[terms.met], terms.reference_count[terms.meets]))
        possible = sum(max(len(words) - n + 1, 0) for words in candidates)
        product *= (float(right.sum()) + 1e-15) / (possible + 1e-9)
        scores.append(product ** (1 / n) * shortness)
    return scores


def rouge_l(candidates: list[list[str]], references: list[list[list[str]]]) -> np.ndarray:
    """ROUGE-L of each picture's caption, https://aclanthology.org/W04-1013; the set's score is their mean.

    The longest common subsequence of caption and reference, as a share of the caption's words (precision) and of the
    reference's (recall), each with the reference that is best for it, weighted with beta = 1.2.

    Args:
        candidates: As for :func:`bleu`.
        references: As for :func:`bleu`.

    Returns:
        (N,) float64 in [0, 1].

    Raises:
        ValueError: As for :func:`bleu`.
    """
    _check(candidates, references)
    return np.array([_rouge_l(*both) for both in zip(candidates, references, strict=True)])


def cider_d(candidates: list[list[str]], references: list[list[list[str]]]) -> np.ndarray:
    """CIDEr-D of each picture's caption, https://arxiv.org/abs/1411.5726 (section 8); the set's score is their mean.

    The cosine between the n-grams of caption and reference, rare ones weighing more: an n-gram that k of the N pictures
    have in a reference weighs log(N / k). What a caption says more often than the reference does not count more, and a
    difference of d words in length is punished with exp(-d² / 72). Mean over references and n = 1…4, times 10.

    The weights come from the references that are given: scores on different sets, or on a part of one, cannot be
    compared, and for one picture alone every weight and the score are 0.

    Args:
        candidates: As for :func:`bleu`.
        references: As for :func:`bleu`.

    Returns:
        (N,) float64 in [0, 10]; papers print 100 times the mean. One of COCO's annotators against the others gets
        about 0.9.

    Raises:
        ValueError: As for :func:`bleu`.
    """
    _check(candidates, references)
    pictures, lengths = _flat_lengths(references)
    cosines = np.zeros(len(pictures))
    for terms in _terms(candidates, references):
        weights = _weights(terms, pictures)
        values, reference_values = terms.count * weights[terms.ngram], terms.reference_count * weights[terms.other]
        shared = np.minimum(values[terms.met], reference_values[terms.meets]) * reference_values[terms.meets]
        products = np.bincount(terms.reference[terms.meets], shared, minlength=len(pictures))
        norms = np.sqrt(np.bincount(terms.picture, values**2, minlength=len(candidates)))[pictures]
        norms *= np.sqrt(np.bincount(terms.reference, reference_values**2, minlength=len(pictures)))
        cosines += np.divide(products, norms, out=np.zeros(len(pictures)), where=norms > 0)
    differences = np.array([len(words) for words in candidates])[pictures] - lengths
    similar = cosines / LONGEST * np.exp(-(differences**2) / (2 * SPREAD**2))
    return 10 * np.bincount(pictures, similar) / np.bincount(pictures)


class CaptionScores(Metric):
    """BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D of captions, over all processes' pictures.

    What it keeps is text, on the CPU. ``update`` and ``compute`` are what it is for; ``forward``, a value for a single
    batch, it has not: CIDEr-D and BLEU of a batch say nothing about those of the set.

    A picture is known by its id. Given twice with the same references, as a padding sampler does, it is counted once
    (with the caption that came first), with a warning; given twice with different ones it is an error.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)  # texts are not what it knows to gather
        self._rows: list[_Row] = []
        self._everyones: list[_Row] | None = None

    def update(self, candidates: list[str], references: list[list[str]], ids: Tensor) -> None:
        """Count a batch, which may be empty.

        Args:
            candidates: A caption for each of N pictures, as plain text; it may be empty.
            references: For each picture one caption or more that people gave, as plain text.
            ids: (N,) int64, by which pictures are told apart, over all processes.

        Raises:
            ValueError: They are not equally many, or a picture has no reference.
        """
        if not len(candidates) == len(references) == len(ids):
            raise ValueError(
                f"{len(candidates)} candidates, {len(references)} lists of references and {len(ids)} ids were given: "
                f"there must be one of each for every picture"
            )
        rows = list(zip(ids.tolist(), candidates, map(list, references), strict=True))
        if bare := [row[0] for row in rows if not row[2]]:
            raise ValueError(f"the pictures with the ids {bare} have no references; each needs at least one")
        if any(isinstance(captions, str) for captions in references):
            raise ValueError("references must be a list of captions for each picture; a single caption was given")
        self._everyones = None
        self._rows += rows

    def compute(self) -> dict[str, float]:
        """The scores of all pictures; every process must call it, and each gets the same.

        Returns:
            ``bleu_1`` … ``bleu_4``, ``rouge_l`` in [0, 1] and ``cider`` (CIDEr-D) in [0, 10]; times 100 they are what
            papers print. NaN without pictures: as NaN it is nobody's best, and ModelCheckpoint takes any number for
            better.

        Raises:
            ValueError: Two pictures with different references have the same id.
        """
        rows = self._all_rows()
        if not rows:
            rank_zero_warn("there is no picture whose caption could be scored: the scores are NaN")
            return dict.fromkeys(NAMES, math.nan)
        candidates = [tokenize(candidate) for _, candidate, _ in rows]
        references = [[tokenize(caption) for caption in captions] for _, _, captions in rows]
        scores = [
            *bleu(candidates, references),
            *(score(candidates, references).mean() for score in (rouge_l, cider_d)),
        ]
        return dict(zip(NAMES, map(float, scores), strict=True))

    def samples(self) -> int:
        """The number of pictures that were counted, over all processes; every process must call it."""
        return len(self._all_rows())

    def reset(self) -> None:
        """Forget all pictures."""
        super().reset()
        self._rows = []
        self._everyones = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not there: the scores of a batch say nothing about those of the set.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("call update() for each batch and compute() at the end")

    def _all_rows(self) -> "list[_Row]":
        if self._everyones is None:
            self._everyones = _once(_gather(self._rows, self.device))
        return self._everyones


_Row = tuple[int, str, list[str]]  # id, candidate, references


def _gather(rows: list[_Row], device: torch.device) -> list[_Row]:
    """Every process's rows, those of the first process first."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    text = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8).to(device)
    shares = [json.loads(bytes(share.cpu().numpy())) for share in gather_all_tensors(text)]
    return [tuple(row) for share in shares for row in share]


def _once(rows: list[_Row]) -> list[_Row]:
    """Each picture once, by its id."""
    unique: dict[int, _Row] = {}
    for row in rows:
        if unique.setdefault(row[0], row)[2] != row[2]:
            raise ValueError(f"two pictures with different references have the id {row[0]}: it must be unique")
    if repeated := len(rows) - len(unique):
        rank_zero_warn(f"{repeated} of {len(rows)} pictures were captioned twice (a padding sampler?) and count once")
    return [unique[picture] for picture in sorted(unique)]


def _check(candidates: list[list[str]], references: list[list[list[str]]]) -> None:
    if not candidates or len(candidates) != len(references):
        raise ValueError(
            f"{len(candidates)} candidates and {len(references)} lists of references were given: there must be one of "
            f"each for every picture, and one picture at least"
        )
    if bare := [i for i, captions in enumerate(references) if not captions]:
        raise ValueError(f"the pictures {bare} (counted from 0) have no references; each needs at least one")


def _shortness(lengths: list[int], reference_lengths: list[list[int]]) -> float:
    """BLEU's factor for captions that are too short in all."""
    pairs = zip(lengths, reference_lengths, strict=True)
    closest = [min((abs(other - own), other) for other in others)[1] for own, others in pairs]
    ratio = (sum(lengths) + 1e-15) / (sum(closest) + 1e-9)  # as the COCO caption code: no division by zero
    return math.exp(min(1 - 1 / ratio, 0))


def _rouge_l(candidate: list[str], references: list[list[str]]) -> float:
    candidate = candidate or [""]  # for the COCO caption code no words are one empty word
    places: dict[str, int] = {}  # of each word, as bits
    for i, word in enumerate(candidate):
        places[word] = places.get(word, 0) | 1 << i
    precision = recall = 0.0
    for reference in references:
        common = _longest_common(places, len(candidate), reference or [""])
        precision, recall = max(precision, common / len(candidate)), max(recall, common / max(len(reference), 1))
    return (1 + RECALL**2) * precision * recall / (recall + RECALL**2 * precision) if precision else 0.0


def _longest_common(places: dict[str, int], length: int, words: list[str]) -> int:
    """The length of the longest common subsequence, a whole row of the usual table at a time.

    Bit i of a row is 0 where the table rises from place i to i + 1 (Hyyrö 2004, "Bit-parallel LCS-length computation
    revisited").
    """
    full = (1 << length) - 1
    row = full
    for word in words:
        rises = row & places.get(word, 0)
        row = (row + rises | row - rises) & full
    return length - row.bit_count()


@dataclass
class _Terms:
    """The n-grams of one n, each once for every sentence that has it.

    Attributes:
        picture: (A,) the picture of each n-gram of a candidate.
        ngram: (A,) which one it is.
        count: (A,) how often the candidate has it.
        reference: (B,) the reference, counted over all pictures, of each n-gram of a reference.
        other: (B,) which n-gram it is.
        reference_count: (B,) how often the reference has it.
        meets: (C,) those of the B that the candidate of the same picture has,
        met: (C,) and which of the A they are there.
    """

    picture: np.ndarray
    ngram: np.ndarray
    count: np.ndarray
    reference: np.ndarray
    other: np.ndarray
    reference_count: np.ndarray
    meets: np.ndarray
    met: np.ndarray


def _terms(candidates: list[list[str]], references: list[list[list[str]]]) -> Iterator[_Terms]:
    """For n = 1, 2, 3, 4."""
    pictures, _ = _flat_lengths(references)
    sentences = [*candidates, *(words for captions in references for words in captions)]
    for sentence, ngram, count in _counts(sentences):
        own = int(np.searchsorted(sentence, len(candidates)))  # candidates come first
        reference = sentence[own:] - len(candidates)
        size = ngram.max(initial=0) + 1
        keys, wanted = sentence[:own] * size + ngram[:own], pictures[reference] * size + ngram[own:]
        places = np.searchsorted(keys, wanted)
        meets = np.flatnonzero(np.append(keys, -1)[places] == wanted)
        parts = (sentence[:own], ngram[:own], count[:own], reference, ngram[own:], count[own:])
        yield _Terms(*parts, meets=meets, met=places[meets])


def _counts(sentences: list[list[str]]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For n = 1, 2, 3, 4 which sentence has which n-gram how often, sorted by sentence and n-gram."""
    known: dict[str, int] = {}
    words = np.array([known.setdefault(word, len(known)) for words in sentences for word in words], dtype=np.int64)
    lengths = np.array([len(words) for words in sentences])
    sentence, ends = np.repeat(np.arange(len(sentences)), lengths), np.repeat(np.cumsum(lengths), lengths)
    starts, ngrams = np.arange(len(words)), np.zeros_like(words)
    for n in range(1, LONGEST + 1):
        fits = starts + n <= ends[starts]
        starts = starts[fits]
        # An n-gram is the (n - 1)-gram that begins at the same place, and a word more.
        found, ngrams = np.unique(ngrams[fits] * len(known) + words[starts + n - 1], return_inverse=True)
        keys, counts = np.unique(sentence[starts] * max(len(found), 1) + ngrams, return_counts=True)
        yield *np.divmod(keys, max(len(found), 1)), counts


def _weights(terms: _Terms, pictures: np.ndarray) -> np.ndarray:
    """Of each n-gram: the logarithm of how many times fewer pictures have it in a reference than there are."""
    size = max(terms.ngram.max(initial=0), terms.other.max(initial=0)) + 1
    keys = np.sort(
        pictures[terms.reference] * size + terms.other
    )  # NumPy 2.4's np.unique hashes: several times as long
    having = np.bincount(keys[np.diff(keys, prepend=-1) > 0] % size, minlength=size)
    return np.log(pictures[-1] + 1) - np.log(np.maximum(having, 1))


def _flat_lengths(references: list[list[list[str]]]) -> tuple[np.ndarray, np.ndarray]:
    """For each reference, counted over all pictures, its picture and its number of words."""
    pictures = np.repeat(np.arange(len(references)), [len(captions) for captions in references])
    return pictures, np.array([len(words) for captions in references for words in captions])
