import hashlib

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from datamodules.image_folder import stratified_order
from datamodules.sampling import EvaluationBatches, TensorLoader, TrainingBatches, split_at_random

SIZES = [1, 2, 3, 5, 7, 21]
WORLDS = [1, 2, 3]


def take(batches, count=None):
    """The next ``count`` batches of one iteration as lists; all of them where count is None."""
    taken = []
    for index in batches:
        taken.append(index.tolist())
        if len(taken) == count:
            break
    return taken


def ranks(world_size, *args, **kwargs):
    return [TrainingBatches(*args, **kwargs, rank=rank, world_size=world_size) for rank in range(world_size)]


def flat(batches):
    return [index for batch in batches for index in batch]


# Evaluation


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_evaluation_covers_each_sample_exactly_once_over_the_ranks(size, world_size, batch_size):
    shares = [take(EvaluationBatches(size, batch_size, rank, world_size)) for rank in range(world_size)]
    assert sorted(flat(flat(shares))) == list(range(size))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_evaluation_has_equally_many_batches_on_each_rank(size, world_size, batch_size):
    batches = [EvaluationBatches(size, batch_size, rank, world_size) for rank in range(world_size)]
    counts = [len(take(one)) for one in batches]
    assert counts == [len(one) for one in batches] == counts[:1] * world_size
    assert max(len(batch) for one in batches for batch in take(one)) <= batch_size
    # No rank waits through batches that nobody fills.
    assert all(take(batches[0]))


def test_evaluation_takes_every_kth_sample_in_order():
    assert take(EvaluationBatches(7, 2)) == [[0, 1], [2, 3], [4, 5], [6]]
    assert take(EvaluationBatches(7, 2, rank=0, world_size=2)) == [[0, 2], [4, 6]]
    assert take(EvaluationBatches(7, 2, rank=1, world_size=2)) == [[1, 3], [5]]


def test_evaluation_gives_an_empty_batch_to_a_rank_without_samples():
    assert [take(EvaluationBatches(1, 4, rank, 3)) for rank in range(3)] == [[[0]], [[]], [[]]]


def test_evaluation_repeats_itself():
    batches = EvaluationBatches(7, 2)
    assert take(batches) == take(batches)


# The training order


FULL_BATCHES = [(n, k, share) for n in SIZES for k in WORLDS for share in (1, 2, 3) if share * k <= n]


@pytest.mark.parametrize(("size", "world_size", "share"), FULL_BATCHES)
def test_training_shares_make_up_the_global_batch_of_one_process(size, world_size, share):
    batch_size = share * world_size
    alone = TrainingBatches(size, batch_size, seed=3)
    shares = ranks(world_size, size, batch_size, seed=3)
    for _ in range(2):  # epochs
        for whole, *parts in zip(take(alone), *map(take, shares), strict=True):
            assert [len(part) for part in parts] == [share] * world_size
            assert len(set(flat(parts))) == batch_size  # disjoint
            assert sorted(flat(parts)) == sorted(whole)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_training_epoch_repeats_no_sample_and_leaves_out_less_than_a_batch(size, shuffle):
    batches = TrainingBatches(size, 2, shuffle=shuffle)
    seen = flat(take(batches))
    assert len(set(seen)) == len(seen) == len(batches) * min(2, size)
    assert set(seen) <= set(range(size))
    assert size - len(seen) < 2


def test_training_epochs_differ_and_leave_out_different_samples():
    batches = TrainingBatches(21, 5)
    epochs = [flat(take(batches)) for _ in range(20)]
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert len({frozenset(range(21)) - frozenset(epoch) for epoch in epochs}) > 5


def test_training_order_is_uniform_over_positions():
    batches = TrainingBatches(5, 5)
    first = [take(batches)[0][0] for _ in range(1000)]
    assert all(150 <= first.count(sample) <= 250 for sample in range(5))  # expected 200, deviation 13


def test_same_seed_repeats_the_order_and_another_seed_does_not():
    def epochs(seed):
        batches = TrainingBatches(21, 4, seed=seed)
        return [take(batches) for _ in range(3)]

    assert epochs(7) == epochs(7)
    assert epochs(7) != epochs(8)


def test_training_order_is_independent_of_torchs_generator():
    torch.manual_seed(0)
    order = take(TrainingBatches(21, 4, seed=7))
    torch.manual_seed(1)
    assert take(TrainingBatches(21, 4, seed=7)) == order


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_seeds_of_every_size_are_accepted(seed):
    assert sorted(flat(take(TrainingBatches(6, 3, seed=seed)))) == list(range(6))


def test_without_shuffle_the_order_of_the_data_is_kept_in_every_epoch():
    batches = TrainingBatches(7, 3, shuffle=False)
    assert [take(batches) for _ in range(2)] == [[[0, 1, 2], [3, 4, 5]]] * 2


def test_set_epoch_chooses_the_epoch_of_the_next_iteration_only():
    plain = TrainingBatches(21, 4, seed=1)
    epochs = [take(plain) for _ in range(5)]
    told = TrainingBatches(21, 4, seed=1)
    told.set_epoch(3)
    assert take(told) == epochs[3]
    assert take(told) == epochs[4]
    told.set_epoch(0)
    assert take(told) == epochs[0]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("size", [3, 5, 7])
def test_data_smaller_than_a_batch_is_one_batch_shared_equally(size, world_size):
    shares = ranks(world_size, size, 60)
    assert [len(share) for share in shares] == [1] * world_size
    (parts,) = zip(*map(take, shares), strict=True)
    assert {len(part) for part in parts} == {size // world_size}
    assert len(set(flat(parts))) == size - size % world_size


def test_indices_name_the_samples_of_a_batch_of_the_current_epoch():
    for batches in ranks(2, 21, 4, seed=2):
        take(batches)
        second = take(batches)
        assert [batches.indices(batch) for batch in range(len(batches))] == second


@pytest.mark.parametrize(
    ("batch_size", "world_size", "nearest"), [(5, 2, 4), (7, 3, 6), (1, 3, 3), (0, 1, 1), (-4, 2, 2)]
)
def test_batch_size_that_ranks_cannot_share_is_a_clear_error(batch_size, world_size, nearest):
    with pytest.raises(ValueError, match=rf"batch_size={batch_size} .*: {nearest} would do"):
        TrainingBatches(100, batch_size, world_size=world_size)


@pytest.mark.parametrize(("size", "world_size"), [(0, 1), (1, 2), (2, 3)])
def test_fewer_samples_than_processes_is_a_clear_error(size, world_size):
    with pytest.raises(ValueError, match=f"{size} training samples are too few for {world_size} processes"):
        TrainingBatches(size, 6, world_size=world_size)


# The place in the order


@pytest.mark.parametrize("lightning", [True, False])
@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_place_saved_after_some_batches_continues_with_exactly_the_remaining_ones(done, world_size, lightning):
    for straight, stopped, resumed in zip(*(ranks(world_size, 35, 6, seed=5) for _ in range(3)), strict=True):
        epochs = [take(straight) for _ in range(3)]
        take(stopped)
        take(stopped, done)  # of the second epoch's five batches
        resumed.load_state_dict(stopped.state_dict())
        if lightning:
            resumed.set_epoch(1)
        assert take(resumed) == epochs[1][done:]
        if lightning:
            resumed.set_epoch(2)
        assert take(resumed) == epochs[2]


@pytest.mark.parametrize("lightning", [True, False])
@pytest.mark.parametrize("count", [None, 5])
def test_place_of_a_finished_epoch_starts_the_next_one_at_its_beginning(count, lightning):
    straight, stopped, resumed = (TrainingBatches(35, 6, seed=5) for _ in range(3))
    epochs = [take(straight) for _ in range(2)]
    take(stopped, count)  # Lightning takes all five batches, but never asks for a sixth
    resumed.load_state_dict(stopped.state_dict())
    if lightning:
        resumed.set_epoch(1)
    assert take(resumed) == epochs[1]


@pytest.mark.parametrize("told", [0, 2, 5])
def test_place_in_another_epoch_than_the_told_one_is_dropped(told):
    stopped, resumed, expected = (TrainingBatches(35, 6, seed=5) for _ in range(3))
    take(stopped)
    take(stopped, 2)  # of epoch 1, all that limit_train_batches=2 lets through
    resumed.load_state_dict(stopped.state_dict())
    resumed.set_epoch(told)
    expected.set_epoch(told)
    assert take(resumed) == take(expected)


def test_place_saved_before_the_first_batch_starts_at_the_beginning():
    fresh, resumed = TrainingBatches(9, 2, seed=4), TrainingBatches(9, 2)
    resumed.load_state_dict(fresh.state_dict())
    assert take(resumed) == take(fresh)


def test_place_saved_while_a_batch_is_in_use_does_not_repeat_it():
    stopped, resumed = TrainingBatches(9, 2, seed=4), TrainingBatches(9, 2)
    used = []
    for index in stopped:
        used.append(index.tolist())
        if len(used) == 2:
            resumed.load_state_dict(stopped.state_dict())
    assert used[:2] + take(resumed) == used


def test_place_outlives_several_stops_and_saves_before_the_next_batch():
    expected = take(TrainingBatches(21, 2, seed=4))
    seen, state = [], TrainingBatches(21, 2, seed=4).state_dict()
    while len(seen) < len(expected):
        batches, again = TrainingBatches(21, 2, seed=99), TrainingBatches(21, 2)
        batches.load_state_dict(state)
        again.load_state_dict(batches.state_dict())
        seen += take(again, 3)
        state = again.state_dict()
    assert seen == expected


@pytest.mark.parametrize("world_size", [2, 3])
def test_place_saved_by_one_process_continues_on_several(world_size):
    stopped = TrainingBatches(21, 6, seed=4)
    take(stopped, 1)
    state = stopped.state_dict()
    shares = ranks(world_size, 21, 6)
    for share in shares:
        share.load_state_dict(state)
    alone = TrainingBatches(21, 6)
    alone.load_state_dict(state)
    for whole, *parts in zip(take(alone), *map(take, shares), strict=True):
        assert sorted(flat(parts)) == sorted(whole)


def test_place_brings_the_seed_of_the_first_run():
    stopped, resumed = TrainingBatches(21, 4, seed=4), TrainingBatches(21, 4, seed=5)
    take(stopped)
    resumed.load_state_dict(stopped.state_dict())
    assert take(resumed) == take(stopped)


def test_place_consists_of_plain_values():
    assert all(type(value) in (int, str) for value in TrainingBatches(9, 2).state_dict().values())


@pytest.mark.parametrize(("name", "size", "batch_size", "now"), [("size", 22, 4, 22), ("batch_size", 21, 5, 5)])
def test_resuming_mid_epoch_with_other_data_or_batches_is_a_clear_error(name, size, batch_size, now):
    stopped = TrainingBatches(21, 4)
    take(stopped, 2)
    with pytest.raises(ValueError, match=rf"after batch 2 of an epoch with {name}=\d+, .* now has {name}={now}"):
        TrainingBatches(size, batch_size).load_state_dict(stopped.state_dict())


@pytest.mark.parametrize("lightning", [True, False])
@pytest.mark.parametrize(("size", "batch_size"), [(50, 4), (21, 2), (8, 4)])
def test_resuming_between_epochs_with_other_data_or_batches_starts_the_next_epoch(size, batch_size, lightning):
    stopped, resumed, expected = TrainingBatches(21, 4), *(TrainingBatches(size, batch_size) for _ in range(2))
    take(stopped)
    resumed.load_state_dict(stopped.state_dict())
    expected.set_epoch(1)
    if lightning:
        resumed.set_epoch(1)
    assert take(resumed) == take(expected)


# The loader


def tensors(size):
    return torch.rand(size, 1, 2, 2), torch.arange(size)


@pytest.mark.parametrize("make", [TrainingBatches, EvaluationBatches])
def test_loader_rows_equal_plain_indexing(make):
    images, labels = tensors(9)
    loader = TensorLoader((images, labels), make(9, 4))
    batches = list(loader)
    assert len(batches) == len(loader)
    for (some_images, some_labels), index in zip(batches, take(make(9, 4)), strict=True):
        assert some_labels.tolist() == index
        assert torch.equal(some_images, torch.stack([images[i] for i in index]))


def test_loader_hands_out_copies_of_the_held_data():
    images, labels = tensors(4)
    before = images.clone()
    for batch, _ in TensorLoader((images, labels), EvaluationBatches(4, 2)):
        batch.zero_()
    assert torch.equal(images, before)


def test_loader_saves_the_place_of_training_and_nothing_of_evaluation():
    training = TensorLoader(tensors(9), TrainingBatches(9, 2, seed=4))
    batches = iter(training)
    next(batches)
    resumed = TensorLoader(tensors(9), TrainingBatches(9, 2))
    resumed.load_state_dict(training.state_dict())
    assert [y.tolist() for _, y in resumed] == [y.tolist() for _, y in batches]

    evaluation = TensorLoader(tensors(9), EvaluationBatches(9, 2))
    assert evaluation.state_dict() == {}
    evaluation.load_state_dict({})
    assert len(list(evaluation)) == 5


# In Lightning


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((self.current_epoch, labels.tolist()))
        return self.layer(images.flatten(1)).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(seed=0, ckpt_path=None, **settings):
    model = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    training = TensorLoader(tensors(11), TrainingBatches(11, 2, seed=seed))
    validation = TensorLoader(tensors(3), EvaluationBatches(3, 2))
    trainer.fit(model, training, validation, ckpt_path=ckpt_path)
    return model.seen


def reference(epochs, limit=None):
    batches = TrainingBatches(11, 2)
    return [(epoch, batch) for epoch in range(epochs) for batch in take(batches)[:limit]]


class SaveAt(Callback):
    """Save once, when the hook is called for the ``count``-th time."""

    def __init__(self, hook, count, path):
        self.left, self.path = count, path
        setattr(self, hook, self.save)

    def save(self, trainer, *args):
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("limit", [2, 5, 0.5, 1.0])
def test_trainer_runs_the_limited_batches_of_each_epochs_own_order(limit):
    count = int(limit * 5) if isinstance(limit, float) else limit
    assert fit(max_epochs=3, limit_train_batches=limit) == reference(3, count)


@pytest.mark.parametrize(
    ("hook", "count", "done"),
    [
        ("on_train_start", 1, 0),
        ("on_train_batch_end", 2, 2),  # in the middle of the first epoch
        ("on_train_batch_end", 8, 8),
        ("on_train_batch_end", 5, 5),  # after the last batch, before validation
        ("on_validation_end", 1, 5),
        ("on_train_epoch_end", 2, 10),
    ],
)
def test_trainer_resumed_from_a_checkpoint_sees_the_batches_it_had_not_seen(hook, count, done, tmp_path):
    path = tmp_path / "stopped.ckpt"
    assert fit(max_epochs=3, callbacks=[SaveAt(hook, count, path)]) == reference(3)
    assert fit(ckpt_path=path, max_epochs=3) == reference(3)[done:]


def test_trainer_resumed_mid_epoch_keeps_the_order_of_the_first_runs_seed(tmp_path):
    path = tmp_path / "stopped.ckpt"
    fit(max_epochs=2, callbacks=[SaveAt("on_train_batch_end", 2, path)])
    assert fit(seed=99, ckpt_path=path, max_epochs=2) == reference(2)[2:]


def test_trainer_resumed_after_limited_epochs_starts_the_next_epoch_at_its_beginning(tmp_path):
    path = tmp_path / "stopped.ckpt"
    limited = {"limit_train_batches": 2, "max_epochs": 3}
    fit(**limited, callbacks=[SaveAt("on_train_epoch_end", 1, path)])
    assert fit(ckpt_path=path, **limited) == reference(3, 2)[2:]


def digest(*indices):
    content = b"".join(np.asarray(each, dtype=np.int64).tobytes() for each in indices)
    return hashlib.sha256(content).hexdigest()[:16]


def test_splits_and_orders_are_those_of_every_version():
    """Of numpy, torch and this project: else what was validated on would be trained on after an upgrade."""
    split = split_at_random(1000, 0.1, 50, seed=0)
    assert digest(split["train"], split["val"], split["test"]) == "af40773bd367d1d5"
    assert digest(stratified_order(np.arange(300) % 7, seed=5)) == "7fef970ea84c4d76"
    assert digest(*TrainingBatches(1000, 64, seed=3)) == "966dc78dbc7f9aba"
