"""Occlusion of one picture, seconds side by side: many covered pictures in a forward pass, and one in each.

    python benchmarks/explain.py [--architecture SqueezeNet] [--size 224] [--rounds 3] [--patch 44] [--stride 22]
                                 [--batch_size 16] [--cpu_time]

Both go through captum and give the same map (checked). Rounds are interleaved and medians compared; only the ratio
means something. Weights are random: they make no difference to the time. Where others use the machine, ``--cpu_time``
counts this process's own seconds.
"""

import argparse
import statistics
import time

import torch

import zoo
from zoo.explaining.attributions import occlusion


def seconds(model, images, batch_size, arguments):
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    start = clock()
    falls = occlusion(model, images, 0, arguments.patch, arguments.stride, batch_size=batch_size)
    return clock() - start, falls


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="SqueezeNet")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--patch", type=int, default=44)
    parser.add_argument("--stride", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--cpu_time", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = getattr(zoo, arguments.architecture)()
    images = torch.rand(1, 3, arguments.size, arguments.size)
    passes = {"one in a pass": 1, f"{arguments.batch_size} in a pass": arguments.batch_size}
    seconds(model, images[..., : arguments.patch * 2, : arguments.patch * 2], 8, arguments)  # warm-up
    taken = {name: [] for name in passes}
    for _ in range(arguments.rounds):
        maps = []
        for name, batch_size in passes.items():
            needed, falls = seconds(model, images, batch_size, arguments)
            taken[name].append(needed)
            maps.append(falls)
        torch.testing.assert_close(*maps, atol=1e-5, rtol=1e-3)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    for name, median in medians.items():
        print(f"{name:>16}: {median:.2f} s ({', '.join(f'{value:.2f}' for value in taken[name])})")
    first, second = medians.values()
    print(f"ratio: {first / second:.2f}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
