"""Occlusion of one picture, seconds side by side: many covered pictures in a forward pass, and one in each.

    python benchmarks/explain.py [--architecture SqueezeNet] [--size 224] [--rounds 3] [--patch 44] [--stride 22]
                                 [--batch_size N] [--cpu_time]

Both go through captum and give the same map (checked). Rounds are interleaved and medians compared; only the ratio
means something. Weights are random: they make no difference to the time. Where others use the machine, ``--cpu_time``
counts this process's own seconds. By default the patch is a fifth of the side, and as many go together as
``occlusion`` takes by itself.
"""

import argparse
import statistics
import time

import torch

import zoo
from zoo.explaining.attributions import TOGETHER, occlusion


def seconds(model, images, batch_size, arguments):
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    start = clock()
    falls = occlusion(model, images, 0, arguments.patch, arguments.stride, batch_size=batch_size)
    return clock() - start, falls


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="SqueezeNet")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--patch", type=int)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--cpu_time", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = getattr(zoo, arguments.architecture)()
    images = torch.rand(1, 3, arguments.size, arguments.size)
    together = arguments.batch_size or TOGETHER // arguments.size**2
    passes = {"one in a pass": 1, f"{together} in a pass": together}
    seconds(model, images, together, arguments)  # warm-up
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
