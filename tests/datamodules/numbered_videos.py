"""Video files whose frames show their number, for the tests of what reads videos."""

from fractions import Fraction

import av
import numpy as np

MILLISECONDS = Fraction(1, 1000)


def picture(number):
    """A number in 16 black and white blocks, the first of them white: uint8 (64, 96, 3)."""
    bits = [(number >> k) & 1 for k in range(15)]
    blocks = np.array([1, *bits], dtype=np.uint8).reshape(4, 4) * 215 + 20
    return np.repeat(np.kron(blocks, np.ones((16, 24), dtype=np.uint8))[..., None], 3, axis=2)


def number(frame):
    """The number that a frame shows, whatever its size."""
    height, width, _ = frame.shape
    rows, columns = ((np.arange(4) + 0.5) * side / 4 for side in (height, width))
    blocks = frame[rows.astype(int)][:, columns.astype(int)].mean(-1) > 128
    bits = blocks.reshape(-1)
    assert bits[0], "it is not upright"
    return int((bits[1:] * 2 ** np.arange(15)).sum())


def write(path, count, rate=30, codec="libx264", options=None, stamps=None, turn=0, form=None, container_options=None):
    """A video whose frames are numbered; ``stamps`` are their times in milliseconds, if not evenly by ``rate``."""
    with av.open(str(path), "w", format=form, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.thread_count = 1
        if stamps is not None:
            stream.codec_context.time_base = MILLISECONDS
        if turn:
            stream.set_display_rotation(turn)
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(picture(k), "rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[k], MILLISECONDS
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for k in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, 1024 * k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
