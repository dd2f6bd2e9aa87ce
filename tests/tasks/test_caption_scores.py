"""BLEU, ROUGE-L and CIDEr-D as pycocoevalcap has them on the same words, and by hand; on one process and on two."""

import json
import math
import random

import numpy as np
import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing
from torch import tensor

from datamodules import caption_files
from zoo.tasks.caption_scores import CaptionScores, bleu, cider_d, rouge_l, tokenize

NAMES = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]
WORDS = ["a", "the", "man", "dog", "on", "red", "two", "bench", "runs", "man's", "with", "grass"]


def generated(seed=0, pictures=40, longest=14):
    """Words of captions to judge and of references: often alike, some empty, some of one word."""
    chance = random.Random(seed)

    def words():
        return chance.choices(WORDS, k=chance.choice([0, 1, 2, *range(longest)]))

    references = [[words() for _ in range(chance.randint(1, 6))] for _ in range(pictures)]
    candidates = []
    for captions in references:
        near = list(chance.choice(captions))
        for _ in range(chance.randint(0, 3)):
            near.insert(chance.randint(0, len(near)), chance.choice(WORDS))
        candidates.append(chance.choice([near, near, words(), [], near[:1]]))
    return candidates, references


def official(candidates, references):
    """Per set and per picture, from the COCO caption code's scorers, which take words that spaces part."""
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is what the scores are compared with")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    given = {i: [" ".join(words)] for i, words in enumerate(candidates)}
    truths = {i: [" ".join(words) for words in captions] for i, captions in enumerate(references)}
    rouge, each_rouge = Rouge().compute_score(truths, given)
    cider, each_cider = Cider().compute_score(truths, given)
    scores = [*Bleu(4).compute_score(truths, given, verbose=0)[0], rouge, cider]
    return dict(zip(NAMES, map(float, scores), strict=True)), each_rouge, each_cider


def check(candidates, references):
    """Compare all with the official numbers, which are handed back."""
    scores, each_rouge, each_cider = official(candidates, references)
    assert bleu(candidates, references) == pytest.approx([scores[name] for name in NAMES[:4]], rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(rouge_l(candidates, references), each_rouge, rtol=0, atol=1e-9)
    np.testing.assert_allclose(cider_d(candidates, references), each_cider, rtol=0, atol=1e-9)
    assert scores["rouge_l"] == pytest.approx(rouge_l(candidates, references).mean(), abs=1e-9)
    assert scores["cider"] == pytest.approx(cider_d(candidates, references).mean(), abs=1e-9)
    return scores


@pytest.mark.parametrize("seed", range(20))
def test_random_sentences_get_the_official_scores(seed):
    scores = check(*generated(seed))
    assert 0.05 < scores["bleu_4"] < 0.9
    assert scores["cider"] > 0.5


@pytest.mark.parametrize("candidate", ["", "a", "cat", "a dog", "a dog runs on the grass", "dog " * 70])
def test_a_picture_alone_gets_the_official_scores(candidate):
    references = [[["a", "dog", "runs", "on", "grass"], ["the", "dog"], ["a"]]]
    scores = check([candidate.split()], references)
    assert scores["cider"] == 0
    if not candidate:
        assert list(scores.values()) == [0] * 6


@pytest.mark.parametrize(
    "candidates", [["", "", ""], ["", "dog", ""], ["cat", "sofa", "a"], ["a dog", "", "a a a a a"]]
)
def test_empty_captions_and_those_of_one_word_get_the_official_scores(candidates):
    references = [["a dog", "one dog runs"], ["", "a dog"], ["a a dog a a a", "dog"]]
    check([one.split() for one in candidates], [[one.split() for one in captions] for captions in references])


def coco(zoo_data, part):
    """The captions of each picture, by its id."""
    captions = {}
    annotations = json.loads((zoo_data / f"coco_captions/annotations/captions_{part}.json").read_text())["annotations"]
    for annotation in annotations:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return captions


@pytest.mark.parametrize("part", [pytest.param("train", marks=pytest.mark.slow), "val"])
def test_the_first_annotator_of_coco_against_the_others_gets_the_official_scores(zoo_data, part):
    captions = coco(zoo_data, part)
    metric = CaptionScores()
    for picture, (first, *others) in captions.items():
        metric.update([first], [others], tensor([picture]))
    words = [[tokenize(caption) for caption in all] for all in captions.values()]
    scores = check([first for first, *_ in words], [others for _, *others in words])
    assert metric.compute() == pytest.approx(scores, abs=1e-9)
    assert metric.samples() == len(captions) >= 500
    assert 0.7 < scores["cider"] < 1  # people's, after the authors of CIDEr: near 0.9


def test_bleu_by_hand():
    """The paper's example: of "the" seven times two are right, as a reference has it twice at most."""
    reference = ["the", "cat", "is", "on", "the", "mat"]
    assert bleu([["the"] * 7], [[reference]])[0] == pytest.approx(2 / 7)
    # 5 of 6 words, 3 of 5 pairs ("the cat", "on the", "the mat"), 1 of 4 threes, and of 3 fours none.
    scores = bleu([["the", "cat", "sat", "on", "the", "mat"]], [[reference]])
    assert scores[:3] == pytest.approx([5 / 6, math.sqrt(5 / 6 * 3 / 5), (5 / 6 * 3 / 5 * 1 / 4) ** (1 / 3)])
    assert scores[3] < 1e-3
    # Over both pictures: 3 of 3 words; the closest references have 3 and 2 words (of 2 and 4 the shorter is taken).
    candidates, references = [["a", "dog"], ["cat"]], [[["a", "dog", "runs"]], [["cat", "sat"], ["the", "cat", "x"]]]
    assert bleu(candidates, references)[0] == pytest.approx(math.exp(1 - 5 / 3))
    assert bleu([["a"] * 3], [[["a"] * 4, ["a"] * 2]])[0] == pytest.approx(1)


def test_rouge_l_by_hand():
    """ "police the gunman": in order there are two of three, against four and three words."""
    candidate, references = ["police", "the", "gunman"], [["police", "killed", "the", "gunman"], ["gunman", "the", "x"]]
    precision, recall = 3 / 3, 3 / 4
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert rouge_l([candidate], [references]).tolist() == pytest.approx([expected])
    crossed = rouge_l([["the", "gunman", "police"], ["x"]], [references, [["y"]]])
    # Precision and recall are each of the reference that is best for it: 2 of 3 words, and 1 of 1.
    mixed = rouge_l([["a", "b", "c"]], [[["a", "b", "x", "y", "z"], ["c"]]])
    assert mixed.tolist() == pytest.approx([2.44 * (2 / 3) / (1 + 1.44 * 2 / 3)])
    precision, recall = 2 / 3, 2 / 4
    assert crossed.tolist() == pytest.approx([2.44 * precision * recall / (recall + 1.44 * precision), 0])


def test_cider_d_by_hand():
    """Four pictures; "a" is in every one's references and weighs nothing, "dog" is in two, "red" in one."""
    references = [[["a", "red", "dog"]], [["a", "dog"]], [["a"]], [["a", "cat"]]]
    rare, half = math.log(4), math.log(2)
    scores = cider_d([["dog"], ["a", "dog"], ["a"], ["cat", "cat", "a"]], references)
    # 1-grams alone, over the norm of ("red", "dog"); two words too few.
    first = half / math.hypot(rare, half) * math.exp(-4 / 72) / 4
    # A perfect caption of two words has no 3- and 4-grams to agree.
    second = 2 / 4
    # "cat" twice: clipped to once, though the norm is of twice; "cat cat" is in no picture; one word too many.
    fourth = rare * rare / (2 * rare * rare) * math.exp(-1 / 72) / 4
    assert scores.tolist() == pytest.approx([10 * first, 10 * second, 0, 10 * fourth])
    # Two references: the mean.
    both = cider_d([["dog"], ["x"]], [[["dog"], ["cat"]], [["y"]]])
    assert both.tolist() == pytest.approx([10 / 4 / 2, 0])


def test_a_perfect_caption_gets_the_ends_of_the_scales():
    references = [[["one", "red", "bird", "sings"]], [["two", "blue", "fish", "swim"]]]
    candidates = [captions[0] for captions in references]
    assert bleu(candidates, references) == pytest.approx([1] * 4)
    assert rouge_l(candidates, references) == pytest.approx([1, 1])
    assert cider_d(candidates, references) == pytest.approx([10, 10])


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's dog doesn't run.", ["a", "man's", "dog", "doesn't", "run"]),
        ('"Black-and-white" T-shirt,  3.5 ft', ["black", "and", "white", "t", "shirt", "3", "5", "ft"]),
        ("the kids' 'STOP' sign_1\n", ["the", "kids", "stop", "sign", "1"]),
        ("Café’s & (crème)", ["café's", "crème"]),
        (" ... ", []),
        ("", []),
    ],
)
def test_words(caption, words):
    assert tokenize(caption) == words
    assert caption_files.tokenize(caption) == words


@pytest.mark.parametrize("score", [bleu, rouge_l, cider_d])
@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [([], [], "one picture"), ([["a"]], [], "1 candidates"), ([["a"], ["b"]], [[["a"]], []], r"pictures \[1\]")],
)
def test_wrong_numbers_of_captions_are_errors(score, candidates, references, message):
    with pytest.raises(ValueError, match=message):
        score(candidates, references)


@pytest.mark.parametrize(
    ("references", "ids", "message"),
    [([["a"]], [1, 2], "1 lists"), ([["a"], []], [1, 2], r"ids \[2\]"), (["ab", "c"], [1, 2], "single caption")],
)
def test_a_wrong_batch_is_an_error_and_leaves_nothing(references, ids, message):
    metric = CaptionScores()
    with pytest.raises(ValueError, match=message):
        metric.update(["a", "b"], references, tensor(ids))
    assert metric.samples() == 0


def test_without_pictures_the_scores_are_nan_with_a_warning():
    metric = CaptionScores()
    metric.update([], [], torch.zeros(0, dtype=torch.int64))
    with pytest.warns(UserWarning, match="no picture"):
        scores = metric.compute()
    assert list(scores) == NAMES
    assert all(math.isnan(score) for score in scores.values())


def test_it_counts_on_after_compute_and_forgets_at_reset():
    metric = CaptionScores()
    metric.update(["a dog"], [["a dog"]], tensor([1]))
    assert metric.compute()["bleu_1"] == pytest.approx(1)
    metric.update(["x y"], [["a cat"]], tensor([2]))
    assert metric.compute()["bleu_1"] == pytest.approx(0.5)
    assert metric.samples() == 2
    metric.reset()
    assert metric.samples() == 0
    with pytest.raises(NotImplementedError, match="update"):
        metric(["a"], [["a"]], tensor([1]))


def test_a_picture_given_twice_counts_once_with_a_warning_and_different_ones_are_an_error():
    metric = CaptionScores()
    metric.update(["a dog", "a cat"], [["a dog"], ["the sofa"]], tensor([5, 3]))
    once = metric.compute()
    metric.update(["a dog"], [["a dog"]], tensor([5]))
    with pytest.warns(UserWarning, match="1 of 3 pictures"):
        assert metric.compute() == once
    metric.update(["a dog"], [["another"]], tensor([3]))
    with pytest.raises(ValueError, match="the id 3"):
        metric.compute()


def batch(seed=3):
    """Plain captions with capitals, dots and letters that are not English."""
    candidates, references = generated(seed)
    text = [[" ".join(["Ünder", *words]) + ".\n" for words in captions] for captions in references]
    return [" ".join(words) for words in candidates], text, 1000 - 7 * torch.arange(len(candidates))


def share(rank, world, folder, cuts, same_id):
    """One process's part of the pictures; its scores as a file."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    candidates, references, ids = batch()
    mine = slice(*cuts[rank])
    metric = CaptionScores()
    if candidates[mine]:
        metric.update(candidates[mine], references[mine], ids[mine] * (0 if same_id else 1))
    try:
        outcome = {"scores": metric.compute(), "samples": metric.samples()}
    except ValueError as error:
        outcome = {"error": str(error)}
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    distributed.barrier()  # and no destroy_process_group(), in which torch 2.6 hangs at times


def outcomes(folder, cuts, same_id=False):
    torch.multiprocessing.start_processes(share, (2, folder, cuts, same_id), nprocs=2, start_method="fork")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("cuts", [[(0, 13), (13, 40)], [(0, 40), (40, 40)], [(0, 0), (0, 40)], [(0, 22), (20, 40)]])
def test_two_processes_count_each_picture_once_also_if_one_has_none_or_one_is_padded(tmp_path, cuts):
    alone = CaptionScores()
    alone.update(*batch())
    expected = {"scores": alone.compute(), "samples": 40}
    assert outcomes(tmp_path, cuts) == [expected, expected]


def test_an_error_in_what_processes_have_together_reaches_each(tmp_path):
    for outcome in outcomes(tmp_path, [(0, 20), (20, 40)], same_id=True):
        assert "the id 0" in outcome["error"]
