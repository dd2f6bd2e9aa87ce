"""Frames of video files by their time, decoded by PyAV (``pip install 'zoo[video]'``): as few of them as it takes.

To show what a clip asks for, a decoder needs the frames since the key frame before. All others are left out: those of
other key frames are not read, those that no frame refers to are not decoded, and only what is asked for becomes RGB.
"""

import errno
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

ROUNDING = 1e-3  # seconds: Matroska's clock has milliseconds
REORDERED = 17  # frames, of which one at least is shown no sooner than any that is stored after them: H.264 delays 16
MISSING = 1.0  # seconds that a file may end sooner than it says
Frame = np.ndarray  # uint8 (H, W, 3)


def video_library() -> Any:
    """PyAV.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how to install it.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to read videos needs PyAV: pip install 'zoo[video]'") from error
    return av


class VideoFile:
    """An opened video, whose frames are found by their time; to be used in a ``with``, which closes it.

    Times are seconds since the first frame. The frame at a time is the one that a player shows then: the last that is
    not later, to within a millisecond, since many clocks round. Before the first and after the last frame
    these stay. Frame rates may vary. AVI has no times for frames that are stored in another order than shown: such a
    file is decoded from its beginning and its frames are counted.

    Frames are turned upright by the rotation that the file says. Pixels are taken as square. Damage that a decoder
    conceals is not found.

    Args:
        path: Its file.

    Raises:
        ValueError: The file is no video, is empty or corrupt, or has sound only; the message names it.
        OSError: The file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._av = video_library()
        if not self.path.stat().st_size:
            raise ValueError(f"{path} is empty (0 bytes)")
        try:
            # Some old files have tags that are no UTF-8.
            self._container = self._av.open(str(path), metadata_errors="ignore")
        except self._av.error.FFmpegError as error:
            raise self._unreadable(error) from error
        try:
            self._stream = self._pictures()
            self._stream.codec_context.thread_count = 1  # there are as many workers as processors
            self._tick = float(self._stream.time_base)
            self._rounding = min(self._tick, ROUNDING)
            self._counted = self._container.format.name == "avi" and self._stream.codec_context.has_b_frames
            self._start = (self._stream.start_time or 0) * self._tick
            #: Seconds from the first frame to the end of the last.
            self.duration = self._duration()
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def frames(self, times: np.ndarray, short_side: int | None = None) -> list[Frame]:
        """The frames at some times, uint8 (H, W, 3) each, upright; times of one frame give the same array.

        Args:
            times: In seconds, (T,), in any order.
            short_side: The frames are resized to it (bilinear, antialiased); None leaves their size.

        Raises:
            ValueError: The file ends sooner than it says, or cannot be decoded; the message names it.
        """
        try:
            if self._counted:
                return self._by_count(times, short_side)
            first, last = self._start + float(times.min()), self._start + float(times.max())
            packets = self._packets_between(first, last)
            if any(packet.pts is None for packet in packets):
                return self._by_count(times, short_side)
            return self._by_time(packets, self._start + times, short_side)
        except self._av.error.FFmpegError as error:
            raise self._unreadable(error) from error

    def check(self) -> None:
        """Read the file from end to end, and decode its key frames.

        Raises:
            ValueError: It ends sooner than it says, or no key frame can be decoded; the message names it.
        """
        context = self._stream.codec_context
        context.skip_frame = "NONKEY"
        packets = self._from_the_start()
        self._check_end(packets, self.duration)
        if not sum(1 for _ in self._decoded([*packets, None])):
            raise ValueError(f"{self.path} cannot be read as a video: no frame of it can be decoded")
        context.flush_buffers()
        context.skip_frame = "DEFAULT"

    # What the file says

    def _pictures(self) -> Any:
        """The stream of pictures, not that of a cover."""
        cover = self._av.stream.Disposition.attached_pic
        for stream in self._container.streams.video:
            if not stream.disposition & cover and stream.codec_context is not None:
                return stream
        kinds = [f"{s.type} ({s.codec_context.name})" if s.codec_context else s.type for s in self._container.streams]
        raise ValueError(f"{self.path} has no pictures: it holds {', '.join(kinds) or 'no stream at all'}")

    def _duration(self) -> float:
        if self._stream.duration:
            return float(self._stream.duration) * self._tick
        try:
            return self._measured_duration()
        except self._av.error.FFmpegError as error:
            raise self._unreadable(error) from error

    def _measured_duration(self) -> float:
        """By the last packets: Matroska has one duration for all its streams, and some files have none."""
        said = (self._container.duration or 0) / self._av.time_base
        packets = self._after_seek(self._start + said) if said else []
        packets = [packet for packet in packets or self._from_the_start() if packet.pts is not None]
        if not packets:
            raise ValueError(f"{self.path} cannot be read as a video: it has no frames")
        end = max(_end(packet) for packet in packets) * self._tick
        if len(self._container.streams) == 1 and end < said - MISSING:  # of several others may be longer
            raise self._truncated(end, said)
        return end - self._start

    # Packets: frames as they are stored, each after those that it refers to

    def _packets_between(self, first: float, last: float) -> list[Any]:
        """Those from a key frame that is not later than ``first`` until all are there that are not later than ``last``.

        Times are the file's own.
        """
        back = 0.0
        while first - back > self._start:
            packets = self._after_seek(first - back, last)
            # Seeking goes by the order of decoding: the key frame may be shown later than those after it.
            if packets and packets[0].is_keyframe and self._time(packets[0]) <= first + self._rounding:
                return packets
            back = max(1.0, 2 * back)
        return self._from_the_start(last)

    def _after_seek(self, time: float, last: float = float("inf")) -> list[Any]:
        try:
            self._container.seek(int(time / self._tick), stream=self._stream)
        except self._av.error.FFmpegError:  # no index, or none for that time
            return []
        return self._demux(last)

    def _from_the_start(self, last: float = float("inf")) -> list[Any]:
        try:
            self._container.seek(self._stream.start_time or 0, stream=self._stream)
        except self._av.error.FFmpegError:  # it cannot seek: open it anew
            self._container.close()
            self._container = self._av.open(str(self.path), metadata_errors="ignore")
            self._stream = self._pictures()
            self._stream.codec_context.thread_count = 1
        return self._demux(last)

    def _demux(self, last: float) -> list[Any]:
        """Packets from here on until none can follow that is not later than ``last``: by when they are decoded, which
        is not later than when they are shown, or, after a jump in Matroska, by how many are."""  # noqa: D205, D209
        packets, later = [], 0
        enough = REORDERED if self._stream.codec_context.has_b_frames else 1
        try:
            for packet in self._container.demux(self._stream):
                if not packet.size:  # it is the end
                    break
                packets.append(packet)
                later += self._time(packet) > last + self._rounding
                decoded = packet.dts is not None and packet.dts * self._tick > last + self._rounding
                if decoded or later >= enough:
                    break
        except self._av.error.InvalidDataError:
            pass  # where damage begins the file ends; whether that is too soon is asked where it matters
        return packets

    def _time(self, packet: Any) -> float:
        return float("inf") if packet.pts is None else packet.pts * self._tick

    def _check_end(self, packets: list[Any], asked: float) -> None:
        """Whether packets reach the seconds that were asked for, or at least those that the file says it has."""
        end = max((_end(packet) for packet in packets if packet.pts is not None), default=0) * self._tick - self._start
        if end < min(asked, self.duration) - MISSING:
            raise self._truncated(end, self.duration)

    def _truncated(self, end: float, said: float) -> ValueError:
        there = f"{max(0.0, end):.1f} of the {said:.1f} seconds"
        return ValueError(f"{self.path} ends after {there} that it says it has: it is truncated or corrupt")

    # Decoding

    def _by_time(self, packets: list[Any], times: np.ndarray, short_side: int | None) -> list[Frame]:
        self._check_end(packets, float(times.max()) - self._start)
        shown = [packet for packet in packets if not packet.is_discard]
        stamps = np.unique([packet.pts for packet in shown])
        if not len(stamps):
            raise ValueError(f"{self.path} cannot be read as a video: it has no frames")
        chosen = stamps[_last_before(stamps * self._tick, times + self._rounding)]
        convert = Converter(self._av, short_side)
        found: dict[int, Frame] = {}
        for run, needed in _runs(packets, set(chosen.tolist())):
            for frame in self._decoded(self._sparing(run, needed)):
                if frame.pts in needed:
                    found[frame.pts] = convert(frame)
            self._stream.codec_context.flush_buffers()
        return self._with_gaps_filled(found, chosen)

    def _by_count(self, times: np.ndarray, short_side: int | None) -> list[Frame]:
        packets = self._from_the_start()
        stamps = [packet.dts if packet.pts is None else packet.pts for packet in packets]
        known = np.sort(np.array([stamp for stamp in stamps if stamp is not None], dtype=np.int64))
        if not len(known):
            raise ValueError(f"{self.path} cannot be read as a video: its frames have no times")
        self._check_end(packets, float(times.max()))
        chosen = _last_before((known - known[0]) * self._tick, times + self._rounding)
        convert = Converter(self._av, short_side)
        found: dict[int, Frame] = {}
        needed = set(chosen.tolist())
        for number, frame in enumerate(self._decoded([*packets, None])):
            if number in needed:
                found[number] = convert(frame)
            if number >= max(needed):
                break
        self._stream.codec_context.flush_buffers()
        return self._with_gaps_filled(found, chosen)

    def _sparing(self, packets: list[Any], needed: set[int]) -> Iterator[Any]:
        """Packets, of which the decoder skips what neither is asked for nor referred to; then the end."""
        context = self._stream.codec_context
        for packet in packets:
            context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
            yield packet
        yield None

    def _decoded(self, packets: Any) -> Iterator[Any]:
        for packet in packets:
            try:
                yield from self._stream.codec_context.decode(packet)
            except self._av.error.InvalidDataError:
                continue  # as a player does; what is missing then is noticed where it was asked for

    def _with_gaps_filled(self, found: dict[int, Frame], chosen: np.ndarray) -> list[Frame]:
        """The chosen frames; one that was not decoded is as the last before it that was."""
        wanted = set(chosen.tolist())
        if len(found) < len(wanted) / 2 or not found:
            missing = f"{len(wanted) - len(found)} of the {len(wanted)} frames that a clip asked for"
            raise ValueError(f"{self.path} cannot be read as a video: {missing} cannot be decoded")
        there = np.array(sorted(found))
        return [found[int(there[k])] for k in _last_before(there, chosen)]

    def _unreadable(self, error: Exception) -> Exception:
        # FFmpeg says EIO of damaged Matroska as of a damaged disk.
        if isinstance(error, OSError) and error.errno != errno.EIO:
            return error
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ValueError(f"{self.path} cannot be read as a video: {reason}")


class Converter:
    """Turns decoded frames into upright RGB, uint8 (H, W, 3), all of the size of the first.

    Args:
        library: PyAV.
        short_side: Of the result; None leaves the size.
    """

    def __init__(self, library: Any, short_side: int | None) -> None:
        self._scaler = library.video.reformatter.VideoReformatter()
        self._how = library.video.reformatter.Interpolation.BILINEAR
        self._short_side = short_side
        self._size: tuple[int, int] | None = None

    def __call__(self, frame: Any) -> Frame:
        """The picture of a decoded frame."""
        if self._size is None:
            self._size = resized(frame.height, frame.width, self._short_side)
        height, width = self._size
        small = self._scaler.reformat(frame, width, height, "rgb24", interpolation=self._how, threads=1)
        return np.rot90(small.to_ndarray(), round(frame.rotation / 90) % 4)


def resized(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Height and width with another short side, as torchvision's ``Resize``; the long one is at most 16 times it."""
    if short_side is None:
        return height, width
    short = min(height, width)
    tall, wide = (min(16 * short_side, int(short_side * side / short)) for side in (height, width))
    return tall, wide


def _end(packet: Any) -> int:
    """When a packet's frame is over, in ticks."""
    return packet.pts + (packet.duration or 0)


def _last_before(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """For each that is asked for the place of the last known number that is not greater; the first for none."""
    return (np.searchsorted(known, asked, side="right") - 1).clip(0)


def _runs(packets: list[Any], needed: set[int]) -> Iterator[tuple[list[Any], set[int]]]:
    """Packets to decode one after the other, each run from a key frame to the last that is needed, and which are.

    A frame is decoded from the last key frame before it that is shown no later: one that is shown sooner than the key
    frame before it refers to what comes before that.
    """
    runs: dict[int, tuple[int, set[int]]] = {}  # key frame -> last packet, needed
    keys: list[tuple[int, int]] = [(0, packets[0].pts)]
    for place, packet in enumerate(packets):
        if packet.is_keyframe:
            keys.append((place, packet.pts))
        if packet.pts in needed:
            key = next(start for start, pts in reversed(keys) if pts <= packet.pts or start == 0)
            runs.setdefault(key, (place, set()))[1].add(packet.pts)
            runs[key] = place, runs[key][1]
    for key, (last, pts) in sorted(runs.items()):
        yield packets[key : last + 1], pts
