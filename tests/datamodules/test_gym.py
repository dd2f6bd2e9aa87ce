"""Collecting keeps its ratio, resumes where it was, and evaluates in environments of its own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium")

from datamodules.environments import Collector  # noqa: E402
from datamodules.gym import GymDataModule  # noqa: E402
from datamodules.rollouts import RolloutsDataModule  # noqa: E402

SMALL = {"num_envs": 4, "capacity": 4000, "batch_size": 8, "learning_starts": 40, "collect_steps": 16, "updates": 6}


class Balance:
    """Pushes towards where the pole leans, which holds it for a while; notes when it is asked how much to explore."""

    def __init__(self):
        self.asked = []

    def act(self, obs, greedy=False):
        return (obs[:, 2] > 0).astype(np.int64)

    def exploration(self, steps):
        self.asked.append(steps)
        return 0.1


def run_by(data, module=None):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module = module or Balance()
    data.trainer = SimpleNamespace(lightning_module=module, world_size=1, overfit_batches=0, strategy=strategy)
    return data


def replay(**more):
    data = run_by(GymDataModule(**(SMALL | {"epoch_steps": 64, "seed": 3} | more)))
    data.setup("fit")
    return data


def rollouts(**more):
    data = run_by(RolloutsDataModule(**({"num_envs": 2, "seed": 3} | more)))
    data.setup("fit")
    return data


def saved(data, loader, path):
    torch.save([data.state_dict(), loader.state_dict()], path)
    return torch.load(path, weights_only=True)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Training


def test_the_model_is_told_of_the_environment_before_it_is_set_up():
    data = GymDataModule()
    assert (data.num_actions, data.observation_shape, data.discount) == (2, [4], 0.99)
    assert GymDataModule("GridWorld", options={"side": 3}).observation_shape == [9]


def test_steps_and_batches_take_turns_in_the_ratio_asked_for():
    data = replay()
    loader = data.train_dataloader()
    assert len(loader) == 64 // 16 * 6
    steps, told = [], []
    for batch in loader:
        steps.append(data.collector.steps)
        if "steps" in batch:
            told.append(int(batch["steps"]))
    assert len(steps) == 24
    for number, count in enumerate(steps):
        wanted = 40 + 16 * (number // 6 + 1)
        assert wanted <= count <= wanted + 3, "up to N - 1 more, and never more with time"
    assert told == steps[::6]


def test_batches_are_transitions_and_tell_of_the_episodes_that_ended():
    data = replay()
    batches = list(data.train_dataloader())
    first = batches[0]
    assert first["obs"].shape == first["next_obs"].shape == (8, 4)
    assert first["action"].dtype == torch.int64
    assert first["terminated"].dtype == torch.bool
    torch.testing.assert_close(first["next_obs"][:, 0], first["obs"][:, 0] + 0.02 * first["obs"][:, 1])
    assert sum(len(batch.get("returns", [])) for batch in batches) == data.collector.episodes
    assert "returns" not in batches[1]


def test_the_model_says_how_much_to_explore_after_the_random_steps():
    data = replay()
    next(iter(data.train_dataloader()))
    asked = data.trainer.lightning_module.asked
    assert 40 <= asked[0] <= 43
    assert asked == sorted(asked)
    assert asked[-1] < 56


@pytest.mark.parametrize("together", [2, 6])
def test_batches_that_are_handed_over_together_are_the_same(together):
    one, several = replay(), replay(updates_per_step=together)
    single, grouped = list(one.train_dataloader()), list(several.train_dataloader())
    assert len(several.train_dataloader()) == len(grouped) == 24 // together
    assert grouped[0]["obs"].shape == (together, 8, 4)
    for number, batch in enumerate(single):
        group = grouped[number // together]
        assert all(torch.equal(batch[name], group[name][number % together]) for name in ("obs", "action", "reward"))
    assert [batch["steps"] for batch in single if "steps" in batch] == [b["steps"] for b in grouped if "steps" in b]


@pytest.mark.parametrize("exponent", [0.0, 0.6])
@pytest.mark.parametrize("stop", [1, 3, 6, 17, 23])
def test_a_resumed_run_goes_on_with_the_same_batches(stop, exponent, tmp_path):
    data = replay(priority_exponent=exponent)
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(stop):
        batch = next(batches)
        data.update_priorities(batch["index"], batch["obs"][:, 1])
    states = saved(data, loader, tmp_path / "state.pt")
    other = replay(priority_exponent=exponent)
    next(iter(other.train_dataloader()))  # whatever it has done before
    other.load_state_dict(states[0])
    again = other.train_dataloader()
    again.load_state_dict(states[1])
    rest, expected = list(again), list(batches)
    assert len(rest) == len(expected) == 24 - stop
    assert same(rest[0], expected[0])
    if not exponent:  # else the errors of the later ones would have to be told, too
        assert all(same(one, two) for one, two in zip(rest, expected, strict=True))
        assert same(next(iter(again)), next(iter(loader)))  # the next epoch
    assert other.collector.steps == data.collector.steps
    assert other.collector.episodes == data.collector.episodes


def test_an_epoch_that_was_cut_short_goes_on_in_the_middle_of_a_round():
    data = replay()
    first = [batch for batch, _ in zip(data.train_dataloader(), range(4), strict=False)]
    more = next(iter(data.train_dataloader()))
    whole = list(replay().train_dataloader())
    assert same(first[3], whole[3])
    assert not same(more, whole[3])
    assert data.collector.steps <= 59, "nothing is collected before the round is over"


def test_without_its_buffer_a_resumed_run_collects_anew(tmp_path):
    data = replay(save_buffer=False)
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(8):
        next(batches)
    states = saved(data, loader, tmp_path / "state.pt")
    assert "buffer" not in states[0]
    other = replay(save_buffer=False)
    other.load_state_dict(states[0])
    before = other.collector.steps
    again = other.train_dataloader()
    again.load_state_dict(states[1])
    assert len(list(again)) == 24 - 8
    assert other.collector.steps >= before + 40 + 3 * 16 - 4


def test_one_batch_is_repeated_where_it_is_to_be_learnt_by_heart():
    data = replay()
    data.trainer.overfit_batches = 1
    loader = data.train_dataloader()
    assert same(next(iter(loader)), next(iter(loader)))


def test_n_steps_and_the_discount_reach_the_batch():
    data = replay(n_step=3, discount=0.5)
    batch = next(iter(data.train_dataloader()))
    assert set(batch["discount"].tolist()) <= {0.5, 0.25, 0.125}
    assert set(batch["reward"].tolist()) <= {1.0, 1.5, 1.75}


# Evaluation


def test_an_evaluation_is_what_a_plain_loop_measures():
    data = run_by(GymDataModule(test_episodes=12, eval_envs=3))
    episodes = data.play("test")
    assert [episode.length for episode in episodes] == [episode.length for episode in data.play("test")]
    assert [episode.length for episode in episodes] != [episode.length for episode in data.play("val")][:12]
    lengths = []
    for seed in range(200):
        environment = gymnasium.make("CartPole-v1")
        obs, _ = environment.reset(seed=seed)
        over, length = False, 0
        while not over:
            obs, _, terminated, truncated, _ = environment.step(int(obs[2] > 0))
            over, length = terminated or truncated, length + 1
        lengths.append(length)
    error = np.std(lengths) / np.sqrt(12)
    assert abs(np.mean([episode.length for episode in episodes]) - np.mean(lengths)) < 4 * error
    (batch,) = data.test_dataloader()
    assert batch["returns"].tolist() == [episode.ret for episode in episodes]
    assert batch["lengths"].tolist() == [episode.length for episode in episodes]


def test_an_evaluation_leaves_training_alone():
    one, other = replay(), replay()
    batches, others = iter(one.train_dataloader()), iter(other.train_dataloader())
    next(batches), next(others)
    one.play("val")
    one.film(0)
    assert all(same(a, b) for a, b in zip(batches, others, strict=True))


def test_a_film_shows_an_episode():
    pytest.importorskip("pygame")
    data = run_by(GymDataModule())
    (batch,) = data.predict_dataloader()
    steps = len(batch["reward"])
    assert batch["reward"].sum() == steps > 20
    assert batch["obs"].shape == (steps, 4)
    assert batch["frames"].shape[0] == steps
    assert batch["frames"].dtype == torch.uint8
    assert batch["frames"].shape[-1] == 3
    assert len(batch["frames"].unique()) > 4
    torch.testing.assert_close(batch["obs"][1:, 0], batch["obs"][:-1, 0] + 0.02 * batch["obs"][:-1, 1])


def test_a_grid_world_has_the_best_values():
    data = run_by(GymDataModule("GridWorld", discount=1.0, options={"side": 4}))
    assert data.best_values()[1].max() == -1
    assert data.best_values()[6].max() == -3
    assert GymDataModule().best_values() is None


# Rollouts


def test_a_rollout_is_steps_in_a_row():
    data = rollouts(steps=50, batches=3)
    batches = list(data.train_dataloader())
    assert [int(batch["steps"]) for batch in batches] == [100, 200, 300]
    for batch in batches:
        assert batch["obs"].shape == (50, 2, 4)
        ended = batch["terminated"] | batch["truncated"]
        assert torch.equal(batch["obs"][1:][~ended[:-1]], batch["next_obs"][:-1][~ended[:-1]])
        assert (batch["obs"][1:][ended[:-1]].abs() <= 0.05).all(), "a first observation follows an end"
        tilted = (batch["next_obs"][..., 2].abs() > 12 * 2 * np.pi / 360) | (batch["next_obs"][..., 0].abs() > 2.4)
        assert torch.equal(batch["terminated"], tilted)
    assert torch.equal(batches[1]["obs"][0], batches[0]["next_obs"][-1]), "episodes go on in the next batch"


def test_whole_episodes_are_one_after_the_other():
    data = rollouts(episodes=6, batches=2)
    for batch in data.train_dataloader():
        ended = (batch["terminated"] | batch["truncated"])[:, 0]
        assert ended.sum() == 6
        assert ended[-1]
        first = torch.cat([torch.tensor([True]), ended[:-1]])
        assert (batch["obs"][first].abs() <= 0.05).all()
        lengths = np.diff(np.flatnonzero(np.concatenate([[True], ended.numpy()])))
        assert sorted(lengths) == sorted(batch["returns"].tolist())


@pytest.mark.parametrize("kind", [{"steps": 20}, {"episodes": 2}])
def test_resumed_rollouts_are_the_same(kind, tmp_path):
    data = rollouts(batches=6, **kind)
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches), next(batches)
    states = saved(data, loader, tmp_path / "state.pt")
    other = rollouts(batches=6, **kind)
    other.load_state_dict(states[0])
    again = other.train_dataloader()
    again.load_state_dict(states[1])
    rest, expected = list(again), list(batches)
    assert len(rest) == 4
    assert all(same(one, two) for one, two in zip(rest, expected, strict=True))


# Atari


@pytest.fixture(scope="module")
def pong():
    pytest.importorskip("ale_py")
    small = {"num_envs": 2, "capacity": 3000, "batch_size": 4, "learning_starts": 40, "collect_steps": 8, "updates": 2}
    return {"environment": "ALE/Pong-v5", "epoch_steps": 16, "seed": 0, **small}


class Still:
    def act(self, obs, greedy=False):
        return np.zeros(len(obs), np.int64)


def test_pixels_are_stacked_and_held_once(pong):
    data = run_by(GymDataModule(**pong), Still())
    assert (data.num_actions, data.observation_shape) == (6, [4, 84, 84])
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["obs"].shape == (4, 4, 84, 84)
    assert batch["obs"].dtype == torch.uint8
    assert torch.equal(batch["next_obs"][:, :-1], batch["obs"][:, 1:]), "next stacks are shifted by a frame"
    assert data.buffer.memory(3000, (4, 84, 84), num_envs=2, stack=4) < 3000 * (84 * 84 + 20)
    data.teardown("fit")


def test_games_are_evaluated_without_clipping_and_trained_with_it(pong, monkeypatch):
    made = []
    monkeypatch.setattr(gymnasium, "make_vec", lambda name, count, **options: made.append(options))
    data = GymDataModule(**pong, options={"noop_max": 1})
    data.make(2)
    data.make(1, training=False)
    assert (made[0]["reward_clipping"], made[0]["episodic_life"]) == (True, True)
    assert (made[1]["reward_clipping"], made[1]["episodic_life"]) == (False, False)
    assert all(options["repeat_action_probability"] == 0 and options["noop_max"] == 1 for options in made)


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs=0 must be at least 1"),
        ({"updates": 0}, "updates=0 must be at least 1"),
        ({"discount": 1.5}, r"discount=1.5 must be in \[0, 1\]"),
        ({"epoch_steps": 10, "collect_steps": 20}, "epoch_steps=10 must be at least collect_steps=20"),
        ({"importance_exponent": 2.0}, "importance_exponent=2.0"),
        ({"updates": 6, "updates_per_step": 4}, "updates_per_step=4 must divide updates=6"),
        ({"updates_per_step": 2, "priority_exponent": 0.6}, "updates_per_step=2 must be 1 with priority_exponent=0.6"),
    ],
)
def test_wrong_numbers_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GymDataModule(**arguments)


def test_steps_or_episodes_are_wanted():
    for arguments in ({}, {"steps": 3, "episodes": 3}):
        with pytest.raises(ValueError, match="either steps or episodes"):
            RolloutsDataModule(**arguments)
    with pytest.raises(ValueError, match="episodes=3 must be a multiple of num_envs=2"):
        RolloutsDataModule(num_envs=2, episodes=3)


def test_what_cannot_be_played_is_refused():
    with pytest.raises(ValueError, match="environment='NoSuch-v0'"):
        _ = GymDataModule("NoSuch-v0").num_actions
    with pytest.raises(ValueError, match=r"options=\{'gravity': 3\}"):
        _ = GymDataModule(options={"gravity": 3}).num_actions
    with pytest.raises(ValueError, match="Discrete actions"):
        _ = GymDataModule("Pendulum-v1").num_actions
    with pytest.raises(ValueError, match=r"needs a model with act\(obs, greedy\)"):
        run_by(GymDataModule(), SimpleNamespace()).setup("fit")
    data = run_by(GymDataModule())
    data.trainer.world_size = 2
    with pytest.raises(ValueError, match="trains on one process"):
        data.setup("fit")


# What environments hold


@pytest.mark.parametrize("mode", ["vector_entry_point", "sync"])
@pytest.mark.parametrize("environment", ["CartPole-v1", "GridWorld", "MountainCar-v0"])
def test_known_environments_go_on_where_they_were(environment, mode, tmp_path):
    if environment == "MountainCar-v0" and mode != "sync":
        pytest.skip("it has no vector environment of its own")
    more = {} if environment == "GridWorld" else {"vectorization_mode": mode}

    def collector():
        return Collector(GymDataModule(environment).make(3, **more), seed=5)

    def steps(one, count):
        return [one.step(lambda obs: np.zeros(3, np.int64), epsilon=0.8) for _ in range(count)]

    straight = collector()
    steps(straight, 37)
    torch.save(straight.state_dict(), tmp_path / "state.pt")
    resumed = collector()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one, two in zip(steps(straight, 250), steps(resumed, 250), strict=True):
        np.testing.assert_array_equal(one.next_obs, two.next_obs)
        np.testing.assert_array_equal(one.terminated, two.terminated)
        assert one.episodes == two.episodes
    assert straight.episodes == resumed.episodes > 0 or environment == "MountainCar-v0"
