"""A training step of SlowFast beside pytorchvideo's network of the same size, in one run.

    python benchmarks/video_step.py [--batch_size 8] [--size 64] [--width 16] [--beta_inv 4] [--rounds 5]

SlowFast 4 x 16 of depth 50 with clips of 32 frames on a CPU: forward, backward and a step of SGD.

- zoo: its weights lie in memory as PyTorch has them by itself;
- zoo, channels last: they lie as ``torch.channels_last_3d``, which the maps then do as well;
- pytorchvideo: ``create_slowfast``, behind the same standardisation and choice of frames, where it is installed.

Rounds are interleaved and the median of each way is compared, since machines are noisy; only ratios mean something.
Times are those of the processor.

Measured on 23 November 2026 on two cores of an Intel Xeon at 2.5 GHz that several other processes used as well (torch
2.14.1, pytorchvideo 0.1.5, one thread, three rounds, 64 pixels); single rounds differ by a third:

    batch 8, width 16, beta_inv 4    zoo, channels last / zoo 1.02   pytorchvideo / zoo 1.04
    batch 2, width 64, beta_inv 8    zoo, channels last / zoo 1.10   pytorchvideo / zoo 0.95

Before, with channels last, pytorchvideo's network took 0.86 to 0.94 of the time. The network of slowfast/embedded
(depth 14, 32 pixels) is the one that takes a little less with channels last, 0.96. On a GPU nothing was measured.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.slowfast import SlowFast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--beta_inv", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    steps(parser.parse_args())


def steps(arguments: argparse.Namespace) -> None:
    """Milliseconds of a training step of SlowFast, each way in turn, and how many times as long as ours it takes."""
    torch.manual_seed(0)
    clips = torch.rand(arguments.batch_size, 3, 32, arguments.size, arguments.size)
    labels = torch.arange(arguments.batch_size)
    sizes = {"width": arguments.width, "alpha": 8, "beta_inv": arguments.beta_inv, "image_size": arguments.size}
    ways = {name: SlowFast(depth=50, **sizes) for name in ("zoo", "zoo, channels last")}
    ways["zoo, channels last"].backbone.network.to(memory_format=torch.channels_last_3d)
    runs = {name: step_of(model, clips, labels) for name, model in ways.items()}
    try:
        runs["pytorchvideo"] = step_of(theirs(arguments), clips, labels)
    except ModuleNotFoundError as error:
        print(f"without pytorchvideo: {error}")
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(arguments.rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number:  # the first one warms up
                milliseconds[name].append(1000 * (time.process_time() - start))
    medians = {name: statistics.median(values) for name, values in milliseconds.items()}
    for name, values in milliseconds.items():
        print(f"{name:18s} {medians[name]:8.0f} ms  ({min(values):.0f} to {max(values):.0f})")
    print(
        "   ".join(f"{name} / zoo {median / medians['zoo']:.2f}" for name, median in medians.items() if name != "zoo")
    )


def step_of(model: nn.Module, clips: Tensor, labels: Tensor) -> Callable[[], None]:
    """A training step on a batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(clips), labels).backward()
        optimizer.step()

    return run


def theirs(arguments: argparse.Namespace) -> nn.Module:
    """The other network of the same size, which takes both pathways' clips: standardised and sampled before it."""
    from pytorchvideo.models.slowfast import create_slowfast

    window = arguments.size // 32
    narrow = arguments.width // arguments.beta_inv
    network = create_slowfast(
        slowfast_channel_reduction_ratio=(arguments.beta_inv,),
        slowfast_fusion_conv_kernel_size=(5, 1, 1),
        slowfast_fusion_conv_stride=(8, 1, 1),
        stem_dim_outs=(arguments.width, narrow),
        head_pool_kernel_sizes=((4, window, window), (32, window, window)),
    )

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.frames = torch.linspace(0, 31, 4).long()

        def forward(self, clips: Tensor) -> Tensor:
            inputs = (clips - 0.45) / 0.225
            return self.network([inputs[:, :, self.frames], inputs])

    return Whole()


if __name__ == "__main__":
    main()
