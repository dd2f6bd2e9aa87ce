"""Reading clips of videos, beside what it would replace, in one run.

ZOO_DATA=… python benchmarks/video.py decoding [--clips 60] [--rounds 3] [--folder FOLDER]
"""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    decoding = parts.add_parser("decoding", help="clips per second of long videos")
    decoding.add_argument("--clips", type=int, default=60)
    decoding.add_argument("--rounds", type=int, default=3)
    decoding.add_argument("--folder", help="folder of videos; the default is those of $ZOO_DATA/video/clips")
    arguments = parser.parse_args()
    print(arguments.part)


if __name__ == "__main__":
    main()
