"""Steps in the environments per second of deep Q-learning, and what replay and Atari's environments give.

    python benchmarks/control.py [learning] [replay] [atari] [--rounds 3] [--steps 2560]

learning: CartPole-v1, the same network (4-256-256-2), batch (64), optimizer (Adam), clipping (10) and ratio (256 steps,
then 128 updates), interleaved rounds in one run:

- plain: a single-file loop as CleanRL's dqn.py is: one environment, a replay buffer of numpy arrays, Adam as it comes;
- plain-8: the same loop with 8 environments, for the part that vector environments have;
- sb3: Stable-Baselines3's DQN with one environment, if it is installed (it is no dependency of this project);
- zoo: ``zoo fit dqn/embedded`` with all that it adds to a run, without validation, double Q-learning and schedule;
- lightning: the same module and data in a Trainer with no callback and no logger, an update in each training step, for
  what Lightning itself costs; the recipe makes 128 in each (``updates_per_step``).

replay: batches of 32 pixel transitions (4 x 84 x 84, and as many after) per second from 50,000 frames held once each,
against a buffer that holds both stacks of every transition, as is common.

atari: agent steps per second of Pong from ale-py's vector environments as GymDataModule makes them, against gymnasium's
wrappers (AtariPreprocessing, FrameStackObservation; they need opencv).

Seconds are the process's own, so that other work on the machine weighs less; only ratios mean something.

Measured on 23 November 2026 on one thread of a 2-core server with a load of 3 to 15 (torch 2.14.1, Stable-Baselines3
2.9.2, ale-py 0.12.1); learning in five rounds, the others in one, so that a tenth more or less means nothing:

    learning  plain 289 to 364, plain-8 282 to 340, sb3 211 to 305, zoo 280 to 394, lightning 241 to 361 steps/s;
              medians of zoo / plain 1.06, zoo / sb3 1.50, zoo / lightning 1.24, and in five rounds before 1.08, 1.47
              and 1.28. With an update in each training step they were 0.75, 1.25 and 1.03: Lightning's own loop costs
              as much as a third of an update of a network as small as this.
    replay    1,232 batches/s of 7,075 bytes a transition; stacks held twice 2,281 of 56,448
    atari     wrappers 645, ale-py with 1 environment 839, with 8 1,308 agent steps/s
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

BATCH, RATE, GAMMA, CLIP = 64, 2.3e-3, 0.99, 10.0
COLLECT, UPDATES, STARTS = 256, 128, 1000


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))


def plain(steps: int, num_envs: int = 1) -> float:
    """Seconds for so many steps of a plain loop after the first ``STARTS``."""
    import gymnasium

    makers = [lambda: gymnasium.make("CartPole-v1")] * num_envs
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    environments = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=mode)
    q, target = network(), network()
    target.load_state_dict(q.state_dict())
    optimizer = torch.optim.Adam(q.parameters(), lr=RATE)
    capacity = 100_000
    obs_held, next_held = np.zeros((capacity, 4), np.float32), np.zeros((capacity, 4), np.float32)
    actions, rewards = np.zeros(capacity, np.int64), np.zeros(capacity, np.float32)
    dones = np.zeros(capacity, np.float32)
    obs, _ = environments.reset(seed=0)
    count, begun, due = 0, 0.0, COLLECT
    while count < STARTS + steps:
        if count >= STARTS and not begun:
            begun = time.process_time()
        epsilon = max(0.04, 1 - 0.96 * count / 8000)
        if count < STARTS or np.random.random() < epsilon:
            action = environments.action_space.sample()
        else:
            with torch.no_grad():
                action = q(torch.from_numpy(obs)).argmax(1).numpy()
        after, reward, terminated, truncated, info = environments.step(action)
        last = after.copy()
        for env in np.flatnonzero(terminated | truncated):
            last[env] = info["final_obs"][env]
        rows = np.arange(count, count + num_envs) % capacity
        obs_held[rows], next_held[rows], actions[rows] = obs, last, action
        rewards[rows], dones[rows] = reward, terminated
        obs = after
        count += num_envs
        if count < STARTS + due:
            continue
        due += COLLECT
        target.load_state_dict(q.state_dict())
        for _ in range(UPDATES):
            rows = np.random.randint(0, min(count, capacity), BATCH)
            with torch.no_grad():
                best = target(torch.from_numpy(next_held[rows])).max(1).values
                wanted = torch.from_numpy(rewards[rows]) + GAMMA * best * (1 - torch.from_numpy(dones[rows]))
            values = q(torch.from_numpy(obs_held[rows])).gather(1, torch.from_numpy(actions[rows])[:, None])[:, 0]
            loss = F.smooth_l1_loss(values, wanted)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(q.parameters(), CLIP)
            optimizer.step()
    return time.process_time() - begun


def sb3(steps: int) -> float:
    """Seconds for as many steps of Stable-Baselines3's DQN, after as many at first."""
    import gymnasium
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        begun = 0.0

        def _on_step(self) -> bool:
            if self.num_timesteps == STARTS:
                self.begun = time.process_time()
            return True

    clock = Clock()
    model = DQN(
        "MlpPolicy", gymnasium.make("CartPole-v1"), learning_rate=RATE, buffer_size=100_000, learning_starts=STARTS,
        batch_size=BATCH, gamma=GAMMA, train_freq=COLLECT, gradient_steps=UPDATES, target_update_interval=10,
        exploration_fraction=0.16, exploration_final_eps=0.04, max_grad_norm=CLIP, device="cpu", seed=0,
        policy_kwargs={"net_arch": [256, 256]},
    )  # fmt: skip
    model.learn(STARTS + steps, callback=clock)
    return time.process_time() - clock.begun


def clock() -> Any:
    """A callback that takes the seconds from after the first updates, and the random steps, to the epoch's end."""
    from lightning import Callback

    class Clock(Callback):
        begun = seconds = 0.0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (batch_idx + 1) * trainer.datamodule.updates_per_step == UPDATES:
                self.begun = time.process_time()

        def on_train_epoch_end(self, trainer, pl_module):
            self.seconds = time.process_time() - self.begun

    return Clock()


def zoo(steps: int) -> float:
    """Seconds for as many steps of the recipe."""
    from lightning.pytorch.callbacks import EarlyStopping

    from zoo.running.starting import prepare

    options = {
        "trainer.max_epochs": 1,
        "trainer.limit_val_batches": 0,
        "model.init_args.double": "false",  # as the others have it
        "model.init_args.scheduler": "null",
        "data.init_args.learning_starts": STARTS,
        "data.init_args.epoch_steps": COLLECT + steps,
    }
    cli = prepare("fit", "dqn/embedded", [f"--{key}={value}" for key, value in options.items()])
    given = cli.trainer.callbacks
    timer = clock()
    cli.trainer.callbacks = [*(c for c in given if not isinstance(c, EarlyStopping)), timer]  # nothing is evaluated
    cli.run()
    return timer.seconds


def bare_trainer(steps: int) -> float:
    """Seconds for as many steps of the same module in a Trainer that does nothing else."""
    from lightning import Trainer

    from datamodules import GymDataModule
    from zoo import DQN

    model = DQN(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=RATE, fused=True))
    data = GymDataModule(
        "CartPole-v1", num_envs=8, capacity=100_000, batch_size=BATCH, learning_starts=STARTS, collect_steps=COLLECT,
        updates=UPDATES, epoch_steps=COLLECT + steps,
    )  # fmt: skip
    timer = clock()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", gradient_clip_val=CLIP, callbacks=[timer], logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return timer.seconds


def learning(rounds: int, steps: int) -> None:
    contenders = {
        "plain": plain,
        "zoo": zoo,
        "lightning": bare_trainer,
        "sb3": sb3,
        "plain-8": partial(plain, num_envs=8),
    }
    try:
        import stable_baselines3  # noqa: F401
    except ImportError as error:
        print(f"sb3 is left out: {error}")
        del contenders["sb3"]
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            found[name].append(steps / run(steps))
            print(f"{name:9} {found[name][-1]:7.0f} steps/s", flush=True)
    for name in (name for name in found if name != "zoo"):
        ratios = [ours / theirs for ours, theirs in zip(found["zoo"], found[name], strict=True)]
        print(f"zoo / {name}: {statistics.median(ratios):.2f}")


def replay(rounds: int) -> None:
    from datamodules.replay import ReplayBuffer

    frames, batch = 50_000, 32
    random = np.random.default_rng(0)
    buffer = ReplayBuffer(frames, (4, 84, 84), stack=4, padding="zeros")
    screens = random.integers(0, 256, (1000, 84, 84)).astype(np.uint8)
    stack = np.zeros((1, 4, 84, 84), np.uint8)
    stack[0, -1] = screens[0]
    buffer.reset(stack)
    for step in range(frames - 1):
        stack = np.concatenate([stack[:, 1:], screens[step % 1000][None, None]], 1)
        no = np.array([False])
        buffer.add(np.array([0]), np.array([0.0]), no, no, stack)
    count = 10_000  # of whole stacks as many more would take 2.8 GB
    obs, after = (np.zeros((count, 4, 84, 84), np.uint8) for _ in range(2))

    def stacks() -> None:
        rows = random.integers(0, count, batch)
        torch.from_numpy(obs[rows]), torch.from_numpy(after[rows])

    obs[:], after[:] = 1, 1  # else the memory is not there yet
    for name, draw in (("frames held once", lambda: buffer.sample(batch)), ("stacks held twice", stacks)):
        rates = []
        for _ in range(rounds):
            begun = time.process_time()
            for _ in range(200):
                draw()
            rates.append(200 / (time.process_time() - begun))
        each = buffer.memory(1, (4, 84, 84), stack=4) if "once" in name else 2 * 4 * 84 * 84
        rate = statistics.median(rates)
        print(f"{name}: {rate:.0f} batches of {batch} per second, {rate * batch:.0f} transitions; {each:,} bytes each")


def atari(rounds: int, steps: int = 2000) -> None:
    import ale_py
    import gymnasium
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    from datamodules.gym import GymDataModule

    gymnasium.register_envs(ale_py)

    def wrapped() -> gymnasium.Env:
        game = gymnasium.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0)
        return FrameStackObservation(AtariPreprocessing(game), 4)

    makers = {
        "wrappers, 1": lambda: gymnasium.vector.SyncVectorEnv([wrapped]),
        "ale-py, 1": lambda: GymDataModule("ALE/Pong-v5").make(1),
        "ale-py, 8": lambda: GymDataModule("ALE/Pong-v5").make(8),
    }
    found: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            environments = make()
            environments.reset(seed=0)
            actions = np.random.default_rng(0).integers(0, 6, (steps, environments.num_envs))
            begun = time.process_time()
            for action in actions[: steps // environments.num_envs]:
                environments.step(action)
            found[name].append(steps / (time.process_time() - begun))
            environments.close()
    for name, rates in found.items():
        print(f"{name}: {statistics.median(rates):.0f} agent steps per second of a processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["learning", "replay", "atari"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2560)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for what in arguments.what:
            print(f"-- {what}")
            if what == "learning":
                learning(arguments.rounds, arguments.steps)
            else:
                {"replay": replay, "atari": atari}[what](arguments.rounds)
        os.chdir("/")


if __name__ == "__main__":
    main()
