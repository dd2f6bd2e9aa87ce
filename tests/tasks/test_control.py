"""What every model that learns to act does: acting, evaluating, its curve, its films."""

import json

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image

import zoo
from zoo.running import control_pictures
from zoo.running.control_pictures import Curve, episode_figure, policy_figure, returns_figure, write_film
from zoo.running.pictures import to_png

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
EPISODES = {"returns": torch.tensor([10.0, 20.0, 60.0]), "lengths": torch.tensor([1, 2, 6])}
MODELS = ("ActorCritic", "DQN", "REINFORCE")


def one_batch(batch):
    return torch.utils.data.DataLoader([batch], batch_size=None)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_numbers_of_an_evaluation_by_hand(stage):
    trainer = Trainer(**QUIET, logger=False)
    (found,) = getattr(trainer, stage)(zoo.DQN(hidden=[4]), one_batch(EPISODES), verbose=False)
    name = "val" if stage == "validate" else "test"
    assert found == {
        f"{name}/return": pytest.approx(30),
        f"{name}/return_std": pytest.approx(np.sqrt((400 + 100 + 900) / 3)),
        f"{name}/length": pytest.approx(3),
        f"{name}/episodes": 3,
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_greedy_policy_takes_the_largest(name):
    model = getattr(zoo, name)(hidden=[8], num_actions=5)
    obs = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    expected = model(torch.from_numpy(obs)).argmax(1)
    found = model.act(obs, greedy=True)
    assert found.dtype == np.int64
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["ActorCritic", "REINFORCE"])
def test_a_policy_draws_as_its_logits_say(name):
    torch.manual_seed(0)
    model = getattr(zoo, name)(hidden=[8], num_actions=3)
    obs = np.random.default_rng(0).normal(size=(1, 4)).astype(np.float32)
    expected = model(torch.from_numpy(obs)).softmax(1)[0].tolist()
    drawn = model.act(obs.repeat(4000, 0))
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, expected, atol=0.04)  # 5 standard deviations
    assert model.exploration(0) == 0


@pytest.mark.parametrize("name", MODELS)
def test_pixels_are_seen_by_the_network_of_the_paper(name):
    model = getattr(zoo, name)(observation_shape=[4, 84, 84], num_actions=6)
    obs = np.random.default_rng(0).integers(0, 256, (2, 4, 84, 84)).astype(np.uint8)
    assert model.act(obs, greedy=True).shape == (2,)
    scaled = torch.from_numpy(obs) / 255
    torch.testing.assert_close(model(torch.from_numpy(obs)), model(scaled))
    shapes = [tuple(p.shape) for p in model.network.parameters() if p.ndim == 4]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"observation_shape": [4, 4]}, r"observation_shape=\[4, 4\] must be \[D\] or \[C, H, W\]"),
        ({"num_actions": 0}, "num_actions=0"),
        ({"discount": 2.0}, "discount=2.0"),
    ],
)
def test_wrong_numbers_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        zoo.DQN(**arguments)


def test_the_curve_survives_a_checkpoint(tmp_path):
    model = zoo.DQN(hidden=[4])
    model._curve = Curve([(10, 3.0), (30, 5.0)], [(10, 0.9)], [(20, 7.0, 1.0)])
    model._steps, model._returns = 30, [5.0]
    checkpoint: dict = {}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "c.ckpt")
    other = zoo.DQN(hidden=[4])
    other.on_load_checkpoint(torch.load(tmp_path / "c.ckpt", weights_only=True))
    assert (other._curve, other._steps, other._returns) == (model._curve, 30, [5.0])


def test_a_long_curve_keeps_a_bounded_number_of_points_evenly():
    curve = Curve()
    for steps in range(0, 5_000_000, 100):
        curve.episodes.append((steps, float(steps)))
        curve.epsilon.append((7, 0.5))
        curve.thin()
        assert len(curve.episodes) <= 2000
    assert len(curve.epsilon) <= 2000
    apart = np.diff([steps for steps, _ in curve.episodes])
    assert len(curve.episodes) > 500
    assert apart[:500].max() <= 2 * 8192
    short = [(steps, 0.0) for steps in range(2000)]
    curve = Curve(episodes=[*short])
    curve.thin()
    assert curve.episodes == short


def test_points_are_the_first_ones_of_equal_parts(monkeypatch):
    monkeypatch.setattr(control_pictures, "POINTS", 4)
    points = [(steps, f"{steps}") for steps in (0, 1, 3, 4, 5, 6, 11, 12, 13)]
    assert [steps for steps, _ in control_pictures.thinned(points)] == [0, 4, 11, 12]
    assert control_pictures.thinned(control_pictures.thinned(points)) == control_pictures.thinned(points)


# Pictures


def looks_like_something(figure, tmp_path):
    (tmp_path / "figure.png").write_bytes(to_png(figure))
    with Image.open(tmp_path / "figure.png") as picture:
        return min(picture.size) > 200 and len(set(picture.convert("L").tobytes())) > 20


def test_returns_are_drawn_with_epsilon_and_without(tmp_path):
    episodes = [(k, float(k % 7)) for k in range(1, 50)]
    for epsilon, axes in (([(0, 1.0), (50, 0.1)], 2), ([(0, 0.0)], 1)):
        figure = returns_figure(Curve(episodes, epsilon, [(25, 3.0, 1.0), (50, 5.0, 1.0)]))
        assert len(figure.axes) == axes
        assert looks_like_something(figure, tmp_path)
    assert looks_like_something(returns_figure(Curve(episodes[:1], [], [])), tmp_path)


def test_an_episode_is_drawn_with_and_without_its_scenes(tmp_path):
    episode = {"return": 3.0, "actions": [0, 1, 1], "scores": [[1.0, 2.0], [2.0, 1.0], [0.0, 3.0]]}
    bare = episode_figure(episode, "Q(s, a)")
    seen = episode_figure(episode | {"frames": torch.randint(255, (3, 40, 60, 3), dtype=torch.uint8)}, "Q(s, a)")
    assert len(seen.axes) == len(bare.axes) + 3
    assert looks_like_something(bare, tmp_path)
    assert looks_like_something(seen, tmp_path)


def test_arrows_point_where_the_best_moves_lead(tmp_path):
    values = np.full((9, 4), -5.0)
    values[1, 3] = -1.0  # left of the first row: the end is beside it
    values[4, 0] = values[4, 3] = -2.0  # up and left are as good
    figure = policy_figure(values, 3, "by hand")
    arrows = [text for text in figure.axes[0].texts if getattr(text, "arrow_patch", None) is not None]
    ways = {
        (text.xyann, (round(text.xy[0] - text.xyann[0], 1), round(text.xy[1] - text.xyann[1], 1))) for text in arrows
    }
    assert ((1, 0), (-0.3, 0)) in ways
    assert {way for cell, way in ways if cell == (1, 1)} == {(0, -0.3), (-0.3, 0)}
    assert looks_like_something(figure, tmp_path)


def test_a_film_lasts_as_long_as_the_episode(tmp_path):
    frames = np.zeros((600, 20, 30, 3), np.uint8)
    frames[np.arange(600), :, np.arange(600) % 30] = 255
    write_film(tmp_path / "film.gif", frames, 60)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 250
        assert film.n_frames * film.info["duration"] / 1000 == pytest.approx(10, rel=0.05)


def test_predictions_are_plain_but_for_the_film(tmp_path):
    model = zoo.DQN(hidden=[4]).eval()
    batch = {"obs": torch.rand(5, 4), "action": torch.zeros(5, dtype=torch.int64), "reward": torch.ones(5)}
    (bare,) = model.predict_step(batch, 0)
    assert json.loads(json.dumps(model.write_prediction(tmp_path, 0, bare)))["return"] == 5
    film = {"frames": torch.zeros(5, 20, 20, 3, dtype=torch.uint8), "frames_per_second": torch.tensor(50.0)}
    (row,) = model.predict_step(batch | film, 0)
    written = json.loads(json.dumps(model.write_prediction(tmp_path, 3, row)))
    assert written["film"] == "episodes/00003.gif"
    assert (tmp_path / written["film"]).is_file()
    assert "frames" not in written
