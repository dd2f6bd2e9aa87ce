"""Reading clips of videos, beside what it would replace, in one run.

    ZOO_DATA=… python benchmarks/video.py decoding [--clips 40] [--rounds 3] [--short_side 256] [--folder FOLDER]

decoding: random clips of 32 frames over 64/30 seconds, uint8 with a short side of 256 pixels, one thread.

- PyAV, whole: each frame of the file is decoded and becomes RGB, in the loop of most tutorials; the clip's frames are
  picked and resized by PyTorch;
- PyAV, whole, picked: the same, but only the picked frames become RGB and are resized;
- decord, torchcodec: their readers' frames by number or by time, where they are installed;
- zoo: ``VideoFile.frames``.

Two sets: the videos of about 10 seconds in the folder, and, as long ones, two of them played again and again for a
minute and encoded anew (H.264, x264's key frames).

Rounds are interleaved and the median of each way is compared, since machines are noisy; only ratios mean something.
Times are those of the processor.

Measured on 23 November 2026 on a core of an Intel Xeon at 2.5 GHz that several other processes used as well (PyAV
18.1.0, decord 0.6.0), one round of 10 clips, clips per second: of the nine videos of 10 seconds in
``$ZOO_DATA/video/clips``, and of two of them made a minute long.

                            10 seconds       60 seconds
    PyAV, whole             1.76   1.00       0.42   1.00
    PyAV, whole, picked     2.74   1.56       1.15   2.74
    decord                  4.13   2.35       7.15  17.06
    zoo                     7.85   4.45      15.05  35.89

torchcodec 0.17.0 found no FFmpeg there.
"""

import argparse
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from datamodules.pictures import resize_short_side
from datamodules.video_files import VideoFile

FRAMES, SECONDS = 32, 64 / 30
Job = tuple[Path, np.ndarray]  # a file, and the times of a clip's frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("decoding", help="clips per second")
    part.add_argument("--clips", type=int, default=40)
    part.add_argument("--rounds", type=int, default=3)
    part.add_argument("--short_side", type=int, default=256)
    part.add_argument("--minute", type=int, default=60, help="seconds of a long video")
    part.add_argument("--folder", help="folder of videos; the default is $ZOO_DATA/video/clips")
    part.set_defaults(run=decoding)
    arguments = parser.parse_args()
    arguments.run(arguments)


# decoding


def decoding(arguments: argparse.Namespace) -> None:
    """Clips per second of each way, of short and of long videos."""
    folder = Path(arguments.folder or Path(os.environ["ZOO_DATA"]) / "video" / "clips")
    short = [path for path in sorted(folder.iterdir()) if 9 < length(path) < 15]
    with tempfile.TemporaryDirectory() as written:
        long = [write_long(path, Path(written) / f"{path.stem}.mp4", arguments.minute) for path in short[:2]]
        for name, paths in (("10 seconds", short), (f"{arguments.minute} seconds", long)):
            compare(f"{name}, {len(paths)} videos", jobs(paths, arguments.clips), arguments)


def length(path: Path) -> float:
    with VideoFile(path) as video:
        return video.duration


def write_long(source: Path, path: Path, seconds: int) -> Path:
    """A video played again and again."""
    with av.open(str(source), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        rate = round(stream.average_rate)
        frames = [frame.reformat(format="yuv420p") for frame in container.decode(stream)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        for k in range(seconds * rate):
            frame = frames[k % len(frames)]
            frame.pts, frame.time_base = k, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def jobs(paths: list[Path], count: int) -> list[Job]:
    rng = np.random.default_rng(0)
    chosen = [paths[k % len(paths)] for k in range(count)]
    steps = np.arange(FRAMES) * (SECONDS / FRAMES)
    return [(path, rng.uniform(0, length(path) - SECONDS) + steps) for path in chosen]


def whole(job: Job, short_side: int, picked: bool = False) -> list:
    """A loop over all frames; only those of the clip are kept, since a minute of them would not fit everywhere."""
    path, times = job
    clip: list = []
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        last = None
        for frame in container.decode(stream):
            seen = frame if picked else frame.to_ndarray(format="rgb24")
            shown = (frame.pts - (stream.start_time or 0)) * float(stream.time_base)
            while len(clip) < len(times) and times[len(clip)] + 1e-3 < shown:
                clip.append(seen if last is None else last)
            last = seen
    clip += [last] * (len(times) - len(clip))
    pixels = {id(frame): frame.to_ndarray(format="rgb24") if picked else frame for frame in clip}
    small = {key: resize_short_side(frame, short_side) for key, frame in pixels.items()}
    return [small[id(frame)] for frame in clip]


def by_decord(job: Job, short_side: int) -> list:
    decord = importlib.import_module("decord")
    path, times = job
    reader = decord.VideoReader(str(path), num_threads=1)
    rows = (times * reader.get_avg_fps()).astype(int).clip(0, len(reader) - 1)
    return [resize_short_side(frame, short_side) for frame in reader.get_batch(rows).asnumpy()]


def by_torchcodec(job: Job, short_side: int) -> list:
    decoders = importlib.import_module("torchcodec.decoders")
    path, times = job
    decoder = decoders.VideoDecoder(str(path), num_ffmpeg_threads=1, seek_mode="approximate", dimension_order="NHWC")
    frames = decoder.get_frames_played_at(times.tolist()).data.numpy()
    return [resize_short_side(frame, short_side) for frame in frames]


def zoo(job: Job, short_side: int) -> list:
    path, times = job
    with VideoFile(path) as video:
        return video.frames(times, short_side)


def ways(first: Job, short_side: int) -> dict[str, Callable[[Job], list]]:
    """Those that can read a clip here."""
    every: dict[str, Callable[[Job], list]] = {
        "PyAV, whole": lambda job: whole(job, short_side),
        "PyAV, whole, picked": lambda job: whole(job, short_side, picked=True),
        "decord": lambda job: by_decord(job, short_side),
        "torchcodec": lambda job: by_torchcodec(job, short_side),
        "zoo": lambda job: zoo(job, short_side),
    }
    found = {}
    for name, way in every.items():
        try:
            assert len(way(first)) == FRAMES
        except (ImportError, RuntimeError) as error:
            print(f"  {name} does not work here: {str(error).splitlines()[0]}")
        else:
            found[name] = way
    return found


def compare(title: str, clips: list[Job], arguments: argparse.Namespace) -> None:
    found = ways(clips[0], arguments.short_side)  # libraries and files come into memory
    speeds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(arguments.rounds):
        for name, way in found.items():
            start = time.process_time()
            for clip in clips:
                way(clip)
            speeds[name].append(len(clips) / (time.process_time() - start))
    first = statistics.median(speeds["PyAV, whole"])
    print(f"{title}; clips per second of one core, median of {arguments.rounds} rounds of {len(clips)}")
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"  {name:20s} {median:7.2f}  (max {max(values):.2f})  {median / first:.2f} x PyAV, whole", flush=True)


if __name__ == "__main__":
    main()
