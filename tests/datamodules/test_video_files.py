"""Frames by their time: files written here, whose frames show their number, and real ones decoded from end to end."""

import os

import av
import cv2
import numpy as np
import pytest
import torch
from numbered_videos import number, write, write_sound
from torchvision.transforms.v2.functional import resize

from datamodules.video_files import VideoFile, resized


def read(path, times, **options):
    with VideoFile(path) as video:
        return [number(frame) for frame in video.frames(np.array(times, dtype=float), **options)]


def whole(path):
    """All frames of a file, and their times, decoded one after the other; AVI's are counted."""
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        if container.format.name == "avi":
            return frames, np.arange(len(frames)) * float(1 / stream.average_rate)
        stamps = np.array([frame.pts for frame in frames])
        return frames, (stamps - stamps[0]) * float(stream.time_base)


KINDS = {
    "h264.mp4": {"options": {"g": "12", "bf": "3", "x264-params": "scenecut=0"}},
    "open_gop.mp4": {"options": {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"}},
    "long_gop.mkv": {"options": {"g": "250", "bf": "2"}},
    "no_b_frames.mov": {"options": {"g": "10", "bf": "0"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=15:bframes=3:log-level=none"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "20", "deadline": "realtime", "cpu-used": "8"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "0"}},
    "reordered.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "fragmented.mp4": {"options": {"g": "12"}, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
}


@pytest.mark.parametrize("name", KINDS)
def test_the_frame_at_a_time_is_the_last_that_is_not_later(tmp_path, name):
    """By the number that it shows; 90 frames, 30 a second, from any place and in any order."""
    path = write(tmp_path / name, 90, **KINDS[name])
    rng = np.random.default_rng(0)
    assert read(path, np.arange(90) / 30) == list(range(90))
    for _ in range(6):
        # Not within a tick of a frame's beginning, where clocks that round may say either.
        times = (rng.integers(0, 90, 5) + rng.uniform(0.1, 0.9, 5)) / 30
        assert read(path, times) == (times * 30).astype(int).tolist()
    with VideoFile(path) as video:
        assert video.duration == pytest.approx(3.0, abs=0.04)


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    """The 60th frame of 90 needs no frame before the key frame 48, and none that nothing refers to."""
    path = write(tmp_path / "a.mp4", 90, options={"g": "12", "bf": "3", "x264-params": "scenecut=0"})
    decoded = []
    monkeypatch.setattr(VideoFile, "_decoded", counted(VideoFile._decoded, decoded))
    assert read(path, [57.5 / 30]) == [57]
    assert 1 <= len(decoded) <= 8
    decoded.clear()
    assert read(path, [2.5 / 30, 57.5 / 30]) == [2, 57]
    assert len(decoded) <= 12


def counted(function, seen):
    def wrapper(self, packets):
        for frame in function(self, packets):
            seen.append(frame.pts)
            yield frame

    return wrapper


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_times_that_a_clock_rounds_are_taken_as_meant(tmp_path, name):
    """Matroska's clock has milliseconds: the frame at 2/30 s says 0.067."""
    path = write(tmp_path / name, 40, options={"g": "8"})
    assert read(path, np.arange(40) / 30) == list(range(40))


def test_frames_of_uneven_rate_are_found_by_their_time(tmp_path):
    stamps = [0, 20, 40, 500, 520, 1500, 1510, 1520, 2900, 3000]
    for name in ("vfr.mp4", "vfr.mkv"):
        path = write(tmp_path / name, len(stamps), stamps=stamps, options={"g": "3", "bf": "2"})
        times = np.array([0, 30, 45, 300, 505, 1000, 1490, 1516, 2000, 2950, 3010])
        expected = [max(k for k, stamp in enumerate(stamps) if stamp <= time) for time in times]
        assert read(path, times / 1000) == expected
        # Sampled by number the clip would be another: the third of ten frames is at 0.04 s, not at 0.9.
        assert read(path, [0.9]) == [4]


def test_before_the_first_and_after_the_last_frame_these_stay(tmp_path):
    path = write(tmp_path / "two.mp4", 2)
    assert read(path, [-1.0, 0.0, 0.04, 0.5, 9.0]) == [0, 0, 1, 1, 1]
    with VideoFile(path) as video:
        frames = video.frames(np.array([0.5, 9.0]))
    assert frames[0] is frames[1]


def test_a_video_that_begins_later_than_its_file_is_counted_from_its_first_frame(tmp_path):
    path = write(tmp_path / "late.mkv", 30, stamps=[5000 + 40 * k for k in range(30)], options={"g": "6"})
    assert read(path, [0.0, 0.05, 1.0]) == [0, 1, 25]
    with VideoFile(path) as video:
        assert video.duration == pytest.approx(1.2, abs=0.05)


# Only the test writes it; turned videos are read by every version.
@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="av cannot write a turned video yet")
@pytest.mark.parametrize("turn", [90, -90, 180])
def test_a_turned_video_is_upright_as_opencv_has_it(tmp_path, turn):
    path = write(tmp_path / "turned.mp4", 4, turn=turn, options={"crf": "1"})
    reader = cv2.VideoCapture(str(path))
    theirs = cv2.cvtColor(reader.read()[1], cv2.COLOR_BGR2RGB)
    reader.release()
    with VideoFile(path) as video:
        (ours,) = video.frames(np.array([0.0]))
        (small,) = video.frames(np.array([0.0]), short_side=32)
    assert ours.shape == theirs.shape == ((64, 96, 3) if turn == 180 else (96, 64, 3))
    assert np.abs(ours.astype(int) - theirs).mean() < 4
    assert small.shape == ((32, 48, 3) if turn == 180 else (48, 32, 3))


def test_frames_are_resized_as_pictures_are(tmp_path):
    path = write(tmp_path / "a.mp4", 3, options={"crf": "1"})
    with VideoFile(path) as video:
        (full,), (small,) = video.frames(np.array([0.0])), video.frames(np.array([0.0]), short_side=24)
    expected = resize(torch.from_numpy(full.copy()).permute(2, 0, 1), [24], antialias=True).permute(1, 2, 0)
    assert small.shape == expected.shape == (24, 36, 3)
    assert np.abs(small.astype(int) - expected.numpy()).mean() < 3


def test_a_line_of_pixels_does_not_become_gigabytes():
    assert resized(240, 320, 128) == (128, 170)
    assert resized(320, 240, 128) == (170, 128)
    assert resized(2, 4000, 128) == (128, 2048)
    assert resized(64, 64, None) == (64, 64)


# What cannot be read


def refusal(path):
    with pytest.raises(ValueError) as error, VideoFile(path) as video:  # noqa: PT011
        video.frames(np.array([0.0, video.duration - 0.05]))
    assert str(path) in str(error.value)
    return str(error.value)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert "is empty (0 bytes)" in refusal(tmp_path / "empty.mp4")


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "page.mp4").write_text("<html>404 not found</html>" * 50)
    assert "cannot be read as a video" in refusal(tmp_path / "page.mp4")


@pytest.mark.parametrize("name", ["sound.mp4", "sound.mkv"])
def test_sound_without_pictures_is_named(tmp_path, name):
    assert "has no pictures: it holds audio (aac)" in refusal(write_sound(tmp_path / name))


def test_a_missing_file_is_an_error_of_its_own(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4"):
        VideoFile(tmp_path / "nowhere.mp4")


@pytest.mark.parametrize("keep", [0.3, 0.7])
@pytest.mark.parametrize(
    ("name", "container_options"),
    [("end.mp4", {}), ("front.mp4", {"movflags": "faststart"}), ("cut.mkv", {})],
)
def test_a_truncated_file_is_named(tmp_path, name, container_options, keep):
    path = write(tmp_path / name, 300, container_options=container_options, options={"g": "12"})
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert "it is truncated" in (message := refusal(path)) or "cannot be read as a video" in message
    with pytest.raises(ValueError, match=r"it is truncated|cannot be read"), VideoFile(path) as video:
        video.check()


def test_what_is_there_of_a_truncated_file_can_be_read(tmp_path):
    """It is refused where a frame is asked for that is not there."""
    path = write(tmp_path / "front.mp4", 300, options={"g": "12"}, container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: int(0.7 * path.stat().st_size)])
    assert read(path, [1.01, 2.01]) == [30, 60]
    with pytest.raises(ValueError, match=r"front\.mp4 ends after \d\.\d of the 10\.0 seconds"):
        read(path, [9.0])


def test_damage_inside_gives_frames_or_names_the_file(tmp_path):
    """Whatever bytes are changed, nothing but a ValueError that names the file comes out."""
    path = write(tmp_path / "whole.mp4", 40, options={"g": "10"})
    content, rng = path.read_bytes(), np.random.default_rng(0)
    read_well = 0
    for k in range(40):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 5):
            damaged[place] = rng.integers(256)
        other = tmp_path / f"damaged{k}.mp4"
        other.write_bytes(bytes(damaged))
        message = ""
        try:
            with VideoFile(other) as video:
                frames = video.frames(np.linspace(0, 1, 8), short_side=32)
            read_well += 1
        except ValueError as error:
            message = str(error)
        assert str(other) in message if message else len(frames) == 8
    assert read_well > 5


def test_files_are_closed_however_reading_ended(tmp_path):
    path = write(tmp_path / "a.mp4", 30)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(path.read_bytes()[:500])
    write_sound(tmp_path / "sound.mp4")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        read(path, [0.5])
        refusal(cut)
        refusal(tmp_path / "sound.mp4")
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_does_not_grow_with_the_videos_that_were_read(tmp_path):
    path = write(tmp_path / "a.mp4", 30, options={"g": "8"})

    def mebibytes_after(count):
        for k in range(count):
            with VideoFile(path) as video:
                video.frames(np.linspace(0, 0.9, 8) * (k % 10) / 10, short_side=48)
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    first = mebibytes_after(30)
    assert mebibytes_after(120) - first < 4  # files left open take 100


# Real files


@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_real_clips_are_those_that_are_decoded_from_end_to_end(zoo_data, large):
    """All 19: avi, mp4 and mkv of several codecs, one with tags that are no UTF-8, one of uneven rate; two of them are
    of 1920 x 1080 pixels."""
    paths = sorted((zoo_data / "video" / "clips").iterdir())
    assert len(paths) == 19
    rng = np.random.default_rng(0)
    for path in paths:
        if path.name.startswith(("mmaction2_S001", "mmaction2_demo_skeleton")) != large:
            continue
        frames, times = whole(path)
        with VideoFile(path) as video:
            assert video.duration == pytest.approx(times[-1] + np.diff(times).mean(), abs=0.2), path
            start = rng.uniform(0, max(0, video.duration - 2))
            asked = start + np.arange(4) / 2 * min(1, video.duration / 2)
            found = video.frames(asked)
        for time, frame in zip(asked, found, strict=True):
            near = [k for k in range(len(times)) if abs(times[k] - time) < 0.003]  # either, by the clock's rounding
            last = max(0, int(np.searchsorted(times, time, side="right")) - 1)
            same = (np.array_equal(frame, frames[k].to_ndarray(format="rgb24")) for k in {last, *near})
            assert any(same), (path, time)
