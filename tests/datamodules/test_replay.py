from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from datamodules import replay
from datamodules.replay import ReplayBuffer, SumTree

FIELDS = ("obs", "action", "reward", "next_obs", "terminated", "discount")


class Plain:
    """What the buffer should hold, in lists: every slot of every environment since the beginning."""

    def __init__(self, slots, num_envs, stack, padding, n_step, discount):
        self.slots, self.stack, self.padding, self.n_step, self.discount = slots, stack, padding, n_step, discount
        self.envs = [[] for _ in range(num_envs)]

    def reset(self, frame, env):
        if self.envs[env] and self.envs[env][-1]["age"] > 0:
            self.envs[env][-2]["end"] = True  # cut, if it was not over
        self.envs[env].append({"frame": frame, "age": 0})

    def add(self, action, reward, terminated, truncated, frame, env):
        slot = self.envs[env][-1]
        slot.update(action=action, reward=reward, terminated=terminated, end=terminated or truncated)
        self.envs[env].append({"frame": frame, "age": slot["age"] + 1})

    def observation(self, slots, i):
        frames = [slots[i - min(back, slots[i]["age"])]["frame"] for back in range(max(self.stack, 1))]
        if self.padding == "zeros":
            frames = [frame if back <= slots[i]["age"] else 0 * frame for back, frame in enumerate(frames)]
        return np.stack(frames[::-1]) if self.stack else frames[0]

    def transitions(self):
        """{index: transition}"""
        found = {}
        for env, slots in enumerate(self.envs):
            for i, slot in enumerate(slots):
                steps = 0
                reward = 0.0
                for j in range(self.n_step):
                    if i + j >= len(slots) or "action" not in slots[i + j]:
                        steps = None
                        break
                    reward += self.discount**j * slots[i + j]["reward"]
                    steps = j + 1
                    if slots[i + j]["end"]:
                        break
                oldest = i - min(slot["age"], max(self.stack, 1) - 1)
                if steps is None or oldest < len(slots) - self.slots:
                    continue
                found[env * self.slots + i % self.slots] = {
                    "obs": self.observation(slots, i),
                    "action": slot["action"],
                    "reward": reward,
                    "next_obs": self.observation(slots, i + steps),
                    "terminated": slots[i + steps - 1]["terminated"],
                    "discount": self.discount**steps,
                }
        return found


def drawn(buffer, draws=4000):
    """{index: transition} of all that can be drawn."""
    index = np.unique(buffer.sample(draws)["index"].numpy())
    batch = buffer.transitions(index)
    return {int(place): {name: batch[name][i].numpy() for name in FIELDS} for i, place in enumerate(index)}


def same(buffer, plain):
    expected = plain.transitions()
    assert len(buffer) == len(expected)
    if not expected:
        return
    found = drawn(buffer)
    assert found.keys() == expected.keys()
    for place, transition in expected.items():
        for name in FIELDS:
            np.testing.assert_allclose(found[place][name], transition[name], rtol=1e-6, err_msg=f"{place} {name}")


class Play:
    """Random episodes, in the buffer and in plain lists."""

    def __init__(self, buffer, plain, rng):
        self.buffer, self.plain, self.rng = buffer, plain, rng
        self.stacks = [None] * buffer.num_envs
        self.due = np.ones(buffer.num_envs, bool)

    def frame(self):
        shape = self.buffer.obs_shape[1:] if self.buffer.stack else self.buffer.obs_shape
        return self.rng.integers(1, 256, size=shape).astype(self.buffer.obs_dtype)

    def stacked(self, env, frame, first):
        if not self.buffer.stack:
            return frame
        if first:
            rest = frame if self.buffer.padding == "repeat" else 0 * frame
            self.stacks[env] = [rest] * (self.buffer.stack - 1) + [frame]
        else:
            self.stacks[env] = [*self.stacks[env][1:], frame]
        return np.stack(self.stacks[env])

    def step(self, cut=0.0):
        for_reset = np.flatnonzero(self.due | (self.rng.random(len(self.due)) < cut))
        if len(for_reset):
            frames = [self.frame() for _ in for_reset]
            obs = [self.stacked(env, frame, True) for env, frame in zip(for_reset, frames, strict=True)]
            self.buffer.reset(np.stack(obs), for_reset)
            for env, frame in zip(for_reset, frames, strict=True):
                self.plain.reset(frame, env)
            self.due[for_reset] = False
        which = np.flatnonzero(self.rng.random(len(self.due)) < 0.8)
        if not len(which):
            return
        frames = [self.frame() for _ in which]
        obs = np.stack([self.stacked(env, frame, False) for env, frame in zip(which, frames, strict=True)])
        action, reward = self.rng.integers(5, size=len(which)), self.rng.normal(size=len(which)).astype(np.float32)
        terminated, truncated = self.rng.random((2, len(which))) < 0.15
        self.buffer.add(action, reward, terminated, truncated, obs, which)
        for i, env in enumerate(which):
            self.plain.add(action[i], float(reward[i]), terminated[i], truncated[i], frames[i], env)
        self.due[which] = terminated | truncated


def game(seed=0, capacity=40, num_envs=2, stack=0, padding="repeat", n_step=1, shape=(3,), dtype="float32", alpha=0.0):
    discount = 0.9
    obs_shape = (stack, *shape) if stack else shape
    buffer = ReplayBuffer(capacity, obs_shape, dtype, num_envs, stack, padding, n_step, discount, alpha, seed)
    plain = Plain(capacity // num_envs, num_envs, stack, padding, n_step, discount)
    return Play(buffer, plain, np.random.default_rng(seed))


# Against plain lists


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"n_step": 3},
        {"stack": 4, "dtype": "uint8", "shape": (2, 2)},
        {"stack": 4, "dtype": "uint8", "shape": (2, 2), "padding": "zeros", "n_step": 3},
        {"stack": 1, "dtype": "uint8", "shape": (2, 2), "n_step": 2},
        {"stack": 4, "n_step": 3, "capacity": 16},  # as small as may be
        {"num_envs": 1, "capacity": 3},
    ],
)
def test_what_can_be_drawn_is_what_plain_lists_hold(case, alpha):
    play = game(**case, alpha=alpha)
    for step in range(120):
        play.step(cut=0.03)
        if step % 7 == 0 or step < 12:
            same(play.buffer, play.plain)


# By hand


def numbers(*values):
    return np.array(values, np.float32)[:, None]


def told(buffer, *steps):
    """Take (reward, terminated, truncated, next observation) steps of one environment."""
    for reward, terminated, truncated, obs in steps:
        buffer.add(np.array([1]), np.array([reward]), np.array([terminated]), np.array([truncated]), numbers(obs))


def test_a_truncated_episode_is_valued_from_its_last_observation_and_a_terminated_one_is_not():
    buffer = ReplayBuffer(20, (1,), "float32", n_step=3, discount=0.5)
    buffer.reset(numbers(10))
    told(buffer, (1, False, False, 11), (2, False, False, 12), (4, False, True, 13))
    buffer.reset(numbers(20))
    told(buffer, (8, False, False, 21), (16, True, False, 22))
    batch = buffer.transitions(np.array([0, 1, 2, 4, 5]))
    assert len(buffer) == 5
    assert batch["obs"][:, 0].tolist() == [10, 11, 12, 20, 21]
    assert batch["reward"].tolist() == [1 + 2 / 2 + 4 / 4, 2 + 4 / 2, 4, 8 + 16 / 2, 16]
    assert batch["next_obs"][:, 0].tolist() == [13, 13, 13, 22, 22]
    assert batch["terminated"].tolist() == [False, False, False, True, True]
    assert batch["discount"].tolist() == [0.125, 0.25, 0.5, 0.25, 0.5]


def test_frames_are_held_once_and_stacks_begin_with_their_episode():
    buffer = ReplayBuffer(8, (3, 1), "uint8", stack=3)
    buffer.reset(np.uint8([[[1], [1], [1]]]))
    for stack, end in (([1, 1, 2], False), ([1, 2, 3], True)):
        buffer.add(np.array([0]), np.array([0]), np.array([end]), np.array([False]), np.uint8([stack])[:, :, None])
    buffer.reset(np.uint8([[[7], [7], [7]]]))
    buffer.add(np.array([0]), np.array([0]), np.array([False]), np.array([False]), np.uint8([[[7], [7], [8]]]))
    batch = buffer.transitions(np.array([0, 1, 3]))
    assert batch["obs"].dtype == torch.uint8
    assert batch["obs"][:, :, 0].tolist() == [[1, 1, 1], [1, 1, 2], [7, 7, 7]]
    assert batch["next_obs"][:, :, 0].tolist() == [[1, 1, 2], [1, 2, 3], [7, 7, 8]]


def test_an_episode_that_was_left_open_is_cut_and_still_valued():
    buffer = ReplayBuffer(20, (1,), "float32", n_step=2)
    buffer.reset(numbers(1))
    told(buffer, (1, False, False, 2), (1, False, False, 3))
    assert len(buffer) == 1  # the second step waits for its next
    buffer.reset(numbers(9))
    assert len(buffer) == 2
    last = buffer.transitions(np.array([1]))
    assert (last["next_obs"].item(), last["terminated"].item()) == (3, False)
    told(buffer, (1, False, False, 10))
    assert len(buffer) == 2


# Draws


def filled(capacity=64, alpha=0.0, seed=0, transitions=20):
    buffer = ReplayBuffer(capacity, (1,), "float32", priority_exponent=alpha, seed=seed)
    buffer.reset(numbers(0))
    told(buffer, *((0, False, False, i + 1) for i in range(transitions)))
    return buffer


@pytest.mark.parametrize("ended", [False, True])
def test_even_draws_are_even(ended):
    buffer = filled(capacity=1000)
    if ended:  # with slots between that hold no transition
        for _ in range(60):
            buffer.reset(numbers(0))
    counts = torch.bincount(buffer.sample(20_000)["index"], minlength=20)
    assert len(counts) == 20
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_draws_are_in_proportion_to_the_priorities():
    buffer = filled(alpha=0.6)
    errors = torch.linspace(-3, 3, 20)
    buffer.update_priorities(torch.arange(20), errors)
    expected = (errors.abs().double().numpy() + 1e-6) ** 0.6
    # One at a time: the draws of a batch are stratified, and not independent.
    counts = np.bincount([buffer.sample(1)["index"].item() for _ in range(3000)], minlength=20)
    assert chisquare(counts, expected / expected.sum() * 3000).pvalue > 1e-3
    counts = torch.bincount(buffer.sample(8000)["index"], minlength=20).numpy()
    assert np.abs(counts - expected / expected.sum() * 8000).max() <= 2


def test_weights_are_those_of_the_formula():
    buffer = filled(alpha=0.7)
    errors = torch.rand(20, generator=torch.Generator().manual_seed(0)) + 0.1
    buffer.update_priorities(torch.arange(20), errors)
    batch = buffer.sample(16, beta=0.4)
    chance = (errors.double() + 1e-6) ** 0.7
    chance /= chance.sum()
    weights = (20 * chance[batch["index"]]) ** -0.4
    torch.testing.assert_close(batch["weight"], (weights / weights.max()).float(), rtol=1e-5, atol=0)
    assert buffer.sample(16, beta=0.0)["weight"].tolist() == [1] * 16


def test_a_new_transition_has_the_largest_priority_so_far():
    buffer = filled(alpha=1.0)
    buffer.update_priorities(torch.arange(20), torch.full((20,), 1e-3))
    buffer.update_priorities(torch.tensor([3]), torch.tensor([5.0]))
    told(buffer, (0, False, False, 21))
    counts = torch.bincount(buffer.sample(1000)["index"])
    assert abs(counts[3] - counts[20]) <= 2
    assert counts[3] > 490


def test_a_transition_that_was_written_over_takes_no_priority():
    buffer = filled(capacity=5, alpha=1.0)
    gone = set(range(5)) - set(buffer.sample(200)["index"].tolist())
    buffer.update_priorities(torch.tensor(sorted(gone)), torch.full((len(gone),), 9.0))
    assert not gone & set(buffer.sample(200)["index"].tolist())


def test_the_sum_tree_against_a_cumulative_sum():
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 7, 64, 100):
        tree, values = SumTree(size), np.zeros(size)
        for _ in range(5):
            places = rng.integers(size, size=5)
            for place in places:
                values[place] = rng.integers(0, 4)
            tree.set(places, values[places])
        masses = np.arange(int(values.sum())) + 0.5
        assert tree.total == values.sum()
        assert tree.values.tolist() == values.tolist()
        assert tree.find(masses).tolist() == np.searchsorted(np.cumsum(values), masses, side="right").tolist()


def test_a_mass_that_rounding_made_too_large_finds_a_place_that_has_some():
    tree = SumTree(8)
    tree.set(np.array([1, 2]), np.array([0.1, 0.2]))
    assert tree.find(np.array([0.0, 0.3, 1.0])).tolist() == [1, 2, 2]


# Saving


@pytest.mark.parametrize("steps", [6, 90])  # before and after the ring is full
@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_a_saved_buffer_goes_on_exactly(tmp_path, steps, alpha):
    case = {"stack": 3, "n_step": 2, "alpha": alpha, "shape": (2, 2), "dtype": "uint8"}
    play, other = game(**case), game(**case, seed=5)
    for _ in range(steps):
        play.step()
        other.step()
    torch.save(play.buffer.state_dict(), tmp_path / "buffer.pt")
    other.buffer.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    twin = Play(other.buffer, deepcopy(play.plain), np.random.default_rng(8))
    play.rng, twin.stacks, twin.due = np.random.default_rng(8), list(play.stacks), play.due.copy()
    for _ in range(60):
        for one in (play, twin):
            one.step()
        first, second = (one.buffer.sample(9, beta=0.5) for one in (play, twin))
        assert first.keys() == second.keys()
        for name, values in first.items():
            assert torch.equal(values, second[name]), name
        for one, batch in ((play, first), (twin, second)):
            one.buffer.update_priorities(batch["index"], batch["reward"])
    same(twin.buffer, play.plain)


def test_a_partly_filled_buffer_is_saved_without_its_empty_part(tmp_path):
    buffer = ReplayBuffer(10_000, (4, 20, 20), "uint8", stack=4)
    buffer.reset(np.zeros((1, 4, 20, 20), np.uint8))
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    assert (tmp_path / "buffer.pt").stat().st_size < 20_000


def test_another_buffer_is_refused():
    with pytest.raises(ValueError, match="n_step=1, this one n_step=3"):
        game(n_step=3).buffer.load_state_dict(game().buffer.state_dict())


# Memory


def test_the_stated_memory_is_what_is_taken(monkeypatch):
    said = []
    monkeypatch.setattr(replay, "rank_zero_info", said.append)
    for alpha in (0.0, 0.6):
        buffer = ReplayBuffer(1000, (4, 84, 84), "uint8", 3, 4, priority_exponent=alpha)
        stated = ReplayBuffer.memory(1000, (4, 84, 84), "uint8", 3, 4, alpha)
        arrays = [value for value in vars(buffer).values() if isinstance(value, np.ndarray)]
        taken = sum(array.nbytes for array in arrays) + (buffer._tree._nodes.nbytes if alpha else 0)
        assert stated <= taken < 1.001 * stated
        assert taken < 1.02 * 999 * 84 * 84  # a frame is held once
    assert said[0] == "replay buffer: 999 observations, 6.7 MiB when full"


def test_a_buffer_that_does_not_fit_is_refused_with_one_that_would(monkeypatch):
    monkeypatch.setattr(replay, "available_memory", lambda: 100 * 2**20)
    with pytest.raises(ValueError, match=r"needs 6,747 MiB when full, 100 MiB are free.* 14,8\d\d would fit"):
        ReplayBuffer(1_000_000, (4, 84, 84), "uint8", stack=4)
    ReplayBuffer(14_000, (4, 84, 84), "uint8", stack=4)


def test_the_systems_free_memory_is_read():
    available = replay.available_memory()
    assert available is None or 2**20 < available < 2**50


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 4, "stack": 4, "obs_shape": (4, 1)}, "must be 6 at least"),
        ({"stack": 4}, "first number of obs_shape"),
        ({"n_step": 0}, "n_step=0"),
        ({"discount": 1.5}, "discount=1.5"),
        ({"padding": "none"}, "padding='none'"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReplayBuffer(**{"capacity": 100, "obs_shape": (3,), **arguments})


def test_misuse_is_refused():
    buffer = ReplayBuffer(20, (1,), "float32")
    with pytest.raises(ValueError, match="no whole transition"):
        buffer.sample(2)
    with pytest.raises(ValueError, match=r"environments \[0\] are in no episode"):
        told(buffer, (0, False, False, 0))
    with pytest.raises(ValueError, match=r"must be float32 \(1, 1\)"):
        buffer.reset(np.zeros((1, 2), np.float32))
    pixels = ReplayBuffer(20, (2, 1), "uint8", stack=2)
    with pytest.raises(ValueError, match="try padding='zeros'"):
        pixels.reset(np.uint8([[[0], [3]]]))
    with pytest.raises(ValueError, match="must be uint8"):
        pixels.reset(np.zeros((1, 2, 1)))
    with pytest.raises(ValueError, match="finite"):
        filled(alpha=1.0).update_priorities(torch.tensor([0]), torch.tensor([torch.nan]))
