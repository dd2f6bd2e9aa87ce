import builtins

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")

from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv  # noqa: E402

from datamodules.environments import Collector, Episode, evaluate  # noqa: E402
from datamodules.replay import ReplayBuffer  # noqa: E402

MODES = list(AutoresetMode)


class Counting(gymnasium.Env):
    """Episode e of this environment, from 0, is seen as 10 e + t after t steps; rewards are t + action / 10.

    Its episodes are as ``endings`` says, over and over: (steps, terminated).
    """

    observation_space = gymnasium.spaces.Box(0, 1e6, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, endings):
        self.endings = endings
        self.episode = -1

    def seen(self):
        return np.array([10 * self.episode + self.t], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed_seen = seed if seed is not None else getattr(self, "seed_seen", None)
        self.episode += 1
        self.t = 0
        return self.seen(), {}

    def step(self, action):
        self.t += 1
        steps, terminated = self.endings[self.episode % len(self.endings)]
        over = self.t == steps
        return self.seen(), self.t + action / 10, over and terminated, over and not terminated, {}


FIRST = [(2, True), (3, False)]
SECOND = [(1, False), (1, True), (4, True)]
# (obs, reward with action 1, next_obs, terminated, truncated), by hand
FIRST_STEPS = [
    (0, 1.1, 1, False, False),
    (1, 2.1, 2, True, False),
    (10, 1.1, 11, False, False),
    (11, 2.1, 12, False, False),
    (12, 3.1, 13, False, True),
    (20, 1.1, 21, False, False),
    (21, 2.1, 22, True, False),
]
SECOND_STEPS = [
    (0, 1.1, 1, False, True),
    (10, 1.1, 11, True, False),
    (20, 1.1, 21, False, False),
    (21, 2.1, 22, False, False),
    (22, 3.1, 23, False, False),
    (23, 4.1, 24, True, False),
]


def counting(mode, kind=SyncVectorEnv, **options):
    return kind([lambda: Counting(FIRST), lambda: Counting(SECOND)], autoreset_mode=mode, **options)


def ones(obs):
    return np.ones(len(obs), np.int64)


def told(collector, steps):
    """The transitions of each environment, and its first observations, as lists."""
    transitions, begun, episodes = ([], []), ([], []), ([], [])
    for _ in range(steps):
        step = collector.step(ones)
        for i, env in enumerate(step.which):
            values = step.obs[i, 0], step.reward[i], step.next_obs[i, 0], step.terminated[i], step.truncated[i]
            transitions[env].append(tuple(value.item() for value in values))
        for env, obs in zip(step.begun, step.first_obs[:, 0], strict=True):
            begun[env].append(obs)
        for env, episode in zip(step.ended, step.episodes, strict=True):
            episodes[env].append(episode)
    return transitions, begun, episodes


# The three rules


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_transitions_are_those_of_the_episodes_under_each_rule(mode, copies):
    transitions, begun, episodes = told(Collector(counting(mode, copy=copies)), 9)
    for found, expected in zip(transitions, (FIRST_STEPS, SECOND_STEPS), strict=True):
        length = min(len(found), len(expected))
        assert length >= 6
        assert found[:length] == expected[:length]
    assert begun[0][:2] == [10, 20]
    assert begun[1][:2] == [10, 20]
    assert episodes[0][:2] == [Episode(pytest.approx(3.2), 2), Episode(pytest.approx(6.3), 3)]
    assert episodes[1][:3] == [Episode(pytest.approx(r), n) for r, n in ((1.1, 1), (1.1, 1), (10.4, 4))]


def test_a_step_that_only_resets_is_counted_where_there_is_one():
    counts = {}
    for mode in MODES:
        collector = Collector(counting(mode))
        transitions, _, _ = told(collector, 4)
        counts[mode] = [len(one) for one in transitions]
        assert collector.steps == sum(counts[mode])
    # by hand: the first environment's third step and the second's second and fourth only reset
    assert counts == {
        AutoresetMode.NEXT_STEP: [3, 2],
        AutoresetMode.SAME_STEP: [4, 4],
        AutoresetMode.DISABLED: [4, 4],
    }


@pytest.mark.parametrize("mode", MODES)
def test_processes_of_their_own_give_the_same(mode):
    environments = counting(mode, AsyncVectorEnv)
    try:
        transitions, _, _ = told(Collector(environments), 6)
    finally:
        environments.close()
    assert transitions == told(Collector(counting(mode)), 6)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_step", [1, 2])
def test_the_buffer_holds_the_same_under_each_rule(mode, n_step):
    collector = Collector(counting(mode))
    buffer = ReplayBuffer(200, (1,), "float32", num_envs=2, n_step=n_step, discount=0.5)
    episodes = collector.collect(buffer, 40, ones)
    assert 40 <= collector.steps <= 41
    assert collector.episodes == len(episodes) > 10
    batch = buffer.transitions(np.arange(5))  # the first environment's slots: 0 → 1 → 2, then 10 → 11 → …
    if n_step == 1:
        assert batch["obs"][[0, 1, 3, 4], 0].tolist() == [0, 1, 10, 11]
        assert batch["next_obs"][[0, 1, 3, 4], 0].tolist() == [1, 2, 11, 12]
        assert batch["terminated"][[0, 1, 3, 4]].tolist() == [False, True, False, False]
    else:
        assert batch["next_obs"][[0, 1, 3, 4], 0].tolist() == [2, 2, 12, 13]
        assert batch["terminated"][[0, 1, 3, 4]].tolist() == [True, True, False, False]
        torch.testing.assert_close(batch["reward"][[0, 1]], torch.tensor([1.1 + 2.1 / 2, 2.1]))


@pytest.mark.parametrize("mode", MODES)
def test_no_transition_of_cart_pole_leads_into_another_episode(mode):
    environments = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 3, autoreset_mode=mode)
    collector = Collector(environments, seed=1)
    buffer = ReplayBuffer(900, (4,), "float32", num_envs=3)
    episodes = collector.collect(buffer, 600, ones, epsilon=0.7)
    batch = buffer.sample(2000)
    obs, next_obs = batch["obs"], batch["next_obs"]
    # Euler's rule, 0.02 s a step: places follow from speeds, whatever the forces
    torch.testing.assert_close(next_obs[:, [0, 2]], obs[:, [0, 2]] + 0.02 * obs[:, [1, 3]], atol=1e-6, rtol=1e-5)
    tilted = (next_obs[:, 2].abs() > 12 * 2 * np.pi / 360) | (next_obs[:, 0].abs() > 2.4)
    assert torch.equal(batch["terminated"], tilted)
    assert 0 < tilted.sum() < 2000
    assert all(episode.ret == episode.length for episode in episodes)


# Exploration and seeds


def test_the_share_of_random_actions_is_epsilon():
    collector = Collector(counting(AutoresetMode.SAME_STEP))
    actions = np.concatenate([collector.step(ones, epsilon=0.3).action for _ in range(2000)])
    shares = np.bincount(actions, minlength=3) / len(actions)
    np.testing.assert_allclose(shares, [0.1, 0.8, 0.1], atol=0.025)  # 4000 draws: 4 standard deviations


def test_the_policy_is_not_asked_where_all_is_random():
    def never(obs):
        raise AssertionError

    Collector(counting(AutoresetMode.SAME_STEP)).step(never, epsilon=1.0)


def carts(seed):
    makers = [lambda: gymnasium.make("CartPole-v1")] * 2
    return Collector(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP), seed)


def run(collector, steps):
    return np.concatenate([collector.step(ones, epsilon=0.5).next_obs for _ in range(steps)])


def test_a_seed_gives_the_same_steps_and_another_seed_others():
    first = run(carts(3), 80)
    np.testing.assert_array_equal(first, run(carts(3), 80))
    assert not np.array_equal(first[:2], run(carts(4), 80)[:2])
    assert not np.array_equal(first[0], first[1])  # the two environments differ


def test_environments_get_seeds_in_a_row_which_a_signed_number_of_32_bits_holds():
    for seed in range(20):
        collector = Collector(counting(AutoresetMode.NEXT_STEP), seed)
        collector.reset()
        first, second = (environment.seed_seen for environment in collector.environments.envs)
        assert second == first + 1 < 2**31


# Resuming


def test_counters_and_exploration_go_on_and_episodes_begin_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.environments.KNOWN", ("nothing",))  # an environment whose state is not known
    collector = carts(0)
    run(collector, 100)
    torch.save(collector.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    others = [carts(9), carts(9)]
    for other in others:
        other.load_state_dict(state)
        assert (other.steps, other.episodes, other.seed) == (collector.steps, collector.episodes, 0)
    begun = others[0].reset()
    assert not np.array_equal(begun, carts(0).reset())  # not those of the run's beginning once more
    np.testing.assert_array_equal(begun, others[1].reset())
    for _ in range(20):
        expected = collector.step(ones, epsilon=1.0).action
        assert others[0].step(ones, epsilon=1.0).action.tolist() == expected.tolist()
    assert others[0].resumed == 1


def test_a_resumed_buffer_is_cut_where_the_run_was_stopped():
    collector = Collector(counting(AutoresetMode.NEXT_STEP))
    buffer = ReplayBuffer(200, (1,), "float32", num_envs=2)
    collector.collect(buffer, 5, ones)
    other, again = Collector(counting(AutoresetMode.NEXT_STEP)), ReplayBuffer(200, (1,), "float32", num_envs=2)
    other.load_state_dict(collector.state_dict())
    again.load_state_dict(buffer.state_dict())
    other.collect(again, 20, ones)
    batch = again.sample(1000)
    torch.testing.assert_close(batch["next_obs"], batch["obs"] + 1)


# Evaluation


@pytest.mark.parametrize("mode", MODES)
def test_each_environment_plays_its_share_of_the_episodes(mode):
    # The first 5 to end would be 3 of the second environment, which are short.
    episodes = evaluate(counting(mode), ones, 5)
    assert sorted(episode.length for episode in episodes) == sorted([2, 3, 2, 1, 1])


def test_evaluation_is_the_same_each_time():
    environments = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 2)
    played = [evaluate(environments, ones, 6, seed=1) for _ in range(2)]
    assert played[0] == played[1]
    assert len(played[0]) == 6


# What is refused


@pytest.mark.parametrize(
    "policy",
    [
        lambda obs: np.zeros((2, 1), int),
        lambda obs: np.zeros(2),
        lambda obs: np.array([0, 3]),
        lambda obs: np.array([-1, 0]),
    ],
)
def test_actions_that_cannot_be_are_refused(policy):
    with pytest.raises(ValueError, match=r"2 integers in \[0, 3\)"):
        Collector(counting(AutoresetMode.NEXT_STEP)).step(policy)


def test_actions_that_are_not_discrete_are_refused():
    with pytest.raises(ValueError, match="Discrete actions"):
        Collector(SyncVectorEnv([lambda: gymnasium.make("Pendulum-v1")]))


def test_no_episodes_are_refused():
    with pytest.raises(ValueError, match="episodes=0"):
        evaluate(counting(AutoresetMode.NEXT_STEP), ones, 0)


def test_gymnasium_is_named_where_it_is_missing(monkeypatch):
    environments = counting(AutoresetMode.NEXT_STEP)
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("gymnasium"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'zoo\[control\]'"):
        Collector(environments)
