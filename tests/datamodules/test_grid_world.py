import numpy as np
import pytest

pytest.importorskip("gymnasium")

from gymnasium.utils.env_checker import check_env

from datamodules.embedded.grid_world import GridWorld, value_iteration

UP, RIGHT, DOWN, LEFT = range(4)


def cell(obs):
    assert obs.dtype == np.float32
    assert obs.sum() == 1
    return int(obs.argmax())


def at(world, place, seed=None):
    return world.reset(seed=seed, options={"cell": place})


@pytest.mark.filterwarnings("ignore")
def test_it_is_an_environment_as_gymnasium_wants_it():
    check_env(GridWorld(), skip_render_check=True)


@pytest.mark.parametrize(
    ("start", "action", "end", "over"),
    [
        (5, UP, 1, False),
        (5, RIGHT, 6, False),
        (5, DOWN, 9, False),
        (5, LEFT, 4, False),
        (3, UP, 3, False),
        (3, RIGHT, 3, False),
        (12, DOWN, 12, False),
        (12, LEFT, 12, False),
        (1, LEFT, 0, True),
        (11, DOWN, 15, True),
    ],
)
def test_moves_by_hand(start, action, end, over):
    world = GridWorld()
    at(world, start)
    obs, reward, terminated, truncated, _ = world.step(action)
    assert (cell(obs), reward, terminated, truncated) == (end, -1, over, False)


def test_an_episode_is_truncated_unless_it_ends_in_that_step():
    world = GridWorld(max_steps=2)
    at(world, 3)
    assert world.step(UP)[2:4] == (False, False)
    assert world.step(UP)[2:4] == (False, True)
    at(world, 2)
    world.step(LEFT)
    assert world.step(LEFT)[2:4] == (True, False)


def test_episodes_begin_everywhere_but_at_the_ends():
    world = GridWorld()
    world.reset(seed=0)
    assert {cell(world.reset()[0]) for _ in range(300)} == set(range(1, 15))


def test_slipping_goes_where_the_model_says():
    world = GridWorld(slip=0.4)
    at(world, 5, seed=0)
    counts = np.zeros(16)
    for _ in range(4000):
        at(world, 5)
        counts[cell(world.step(RIGHT)[0])] += 1
    chances = world.model().chances[5, RIGHT]
    assert chances[[6, 1, 9, 4]].tolist() == pytest.approx([0.7, 0.1, 0.1, 0.1])
    np.testing.assert_allclose(counts / 4000, chances, atol=0.03)  # 4 standard deviations


def test_best_values_are_the_steps_to_the_nearer_corner():
    discount = 0.9
    found = value_iteration(GridWorld().model(), discount)
    for place in range(1, 15):
        row, column = divmod(place, 4)
        steps = min(row + column, 6 - row - column)
        assert found[place].max() == pytest.approx(-(1 - discount**steps) / (1 - discount), abs=1e-8)
    assert not found[[0, 15]].any()
    assert value_iteration(GridWorld().model(), 1.0)[1:-1].max(1).reshape(-1).tolist() == [
        -1, -2, -3, -1, -2, -3, -2, -2, -3, -2, -1, -3, -2, -1,
    ]  # fmt: skip


def test_best_values_of_a_slippery_world_are_those_of_their_own_policy():
    model, discount = GridWorld(side=3, slip=0.3).model(), 0.95
    found = value_iteration(model, discount)
    policy = found.argmax(1)
    chances, rewards = model.chances[np.arange(9), policy], model.rewards[np.arange(9), policy] * ~model.terminal
    # the policy's values solve linear equations, and no other action is better
    value = np.linalg.solve(np.eye(9) - discount * chances * ~model.terminal[:, None], rewards)
    np.testing.assert_allclose(value, found.max(1), atol=1e-7)
    assert np.allclose(model.chances.sum(2), 1)


@pytest.mark.parametrize("arguments", [{"side": 1}, {"slip": 1.5}, {"max_steps": 0}])
def test_worlds_that_cannot_be_are_refused(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        GridWorld(**arguments)


def test_no_episode_begins_at_an_end():
    with pytest.raises(ValueError, match="cell=15"):
        at(GridWorld(), 15)
