"""``zoo predict`` with videos of one's own: which frames are read, and what is written."""

import json

import numpy as np
import pytest
import torch

import zoo
from zoo.cli import main
from zoo.running.watched_files import read_clips
from zoo.slowfast import SlowFast

av = pytest.importorskip("av")


def write_video(path, shades, rate=10, size=(48, 64), times=None):
    """Grey frames of the given shades; the left half of each is 40 brighter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "1", "bf": "0"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for k, shade in enumerate(shades):
            picture = np.full((*size, 3), shade, dtype=np.uint8)
            picture[:, : size[1] // 2] += 40
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = k if times is None else times[k]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def shades_of(clips):
    """What was written for each frame, (V, T), from the middle of the right half."""
    return (255 * clips[:, 0, :, clips.shape[3] // 2, -4]).round().int()


def test_frames_are_found_by_their_time(tmp_path):
    """30 frames of 0.1 s: clips of 1 s with 5 frames see every second one, side by side to the end."""
    write_video(tmp_path / "a.mp4", range(0, 210, 7))
    clips = read_clips(tmp_path / "a.mp4", 5, 1.0, 48)
    assert clips.shape == (3, 3, 5, 48, 48)
    expected = torch.arange(0, 210, 14).view(3, 5)
    assert (shades_of(clips) - expected).abs().max() <= 2
    assert (255 * clips[0, 0, 0, 24, 4] - 40).abs() <= 2, "left is left"


def test_a_whole_video_is_one_clip_where_no_length_is_said(tmp_path):
    write_video(tmp_path / "a.mp4", range(0, 200, 10))
    clips = read_clips(tmp_path / "a.mp4", 10, None, 48)
    assert (shades_of(clips) - torch.arange(0, 200, 20)[None]).abs().max() <= 2


def test_a_varying_frame_rate_is_read_by_the_clock(tmp_path):
    """Four frames of 0.1 s, and then each for a second: half of the time has the shades from 120 on."""
    write_video(tmp_path / "a.mp4", [0, 30, 60, 90, 120, 150], times=[0, 1, 2, 3, 4, 14])
    clips = read_clips(tmp_path / "a.mp4", 14, 1.4, 48)
    found = shades_of(clips)[0]
    assert (found - torch.tensor([0, 30, 60, 90] + [120] * 10)).abs().max() <= 2


def test_the_last_frame_of_a_short_video_stays(tmp_path):
    write_video(tmp_path / "a.mp4", [10, 60, 110])
    clips = read_clips(tmp_path / "a.mp4", 8, 0.8, 48)
    assert (shades_of(clips) - torch.tensor([[10, 60] + [110] * 6])).abs().max() <= 2


def test_the_largest_middle_part_is_taken(tmp_path):
    write_video(tmp_path / "a.mp4", [0, 0], size=(48, 96))
    clips = read_clips(tmp_path / "a.mp4", 2, None, 24)
    left, right = 255 * clips[0, 0, 0, :, :10].mean(), 255 * clips[0, 0, 0, :, 14:].mean()
    assert abs(left - 40) < 3
    assert right < 3


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    names = ["down", "left", "right", "up"]
    small = {"depth": 14, "frames": 8, "alpha": 4, "beta_inv": 4, "width": 8, "image_size": 32, "seconds": 0.8}
    zoo.save(SlowFast(num_classes=4, class_names=names, **small), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_videos_are_told_with_the_mean_of_their_clips(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(zoo.ARCHITECTURES, "SlowFast", "zoo.slowfast")
    (tmp_path / "videos" / "deep").mkdir(parents=True)
    write_video(tmp_path / "videos" / "deep" / "long.mp4", range(0, 200, 10))
    write_video(tmp_path / "videos" / "short.avi", [10, 20])
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"nothing")
    (tmp_path / "videos" / "notes.txt").write_text("no video")
    assert main(["predict", str(weights), str(tmp_path / "videos"), "--top", "2"]) == 1
    rows = [json.loads(line) for line in (tmp_path / "predictions" / "predictions.jsonl").read_text().splitlines()]
    assert [row["file"].rpartition("/")[2] for row in rows] == ["long.mp4", "short.avi"]
    assert all(len(row["top"]) == 2 for row in rows)
    clips = read_clips(tmp_path / "videos" / "deep" / "long.mp4", 8, 0.8, 32)
    assert len(clips) == 2
    with torch.no_grad():
        expected = zoo.load(weights)(clips).softmax(1).mean(0)
    assert rows[0]["top"][0][1] == pytest.approx(expected.max().item(), abs=1e-5)
    assert "broken.mp4 is left out" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "predictions").iterdir()} >= {"predictions.png", "predictions.gif"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no video or folder 'nowhere'"),
        (["."], "has no videos: files that end in .mp4"),
        ([".", "--score_threshold", "0.5"], "--score_threshold is for detectors"),
        ([".", "--test_time_augmentation", "flip"], "--test_time_augmentation is for classifiers of pictures"),
    ],
)
def test_what_makes_no_sense_is_one_line(weights, arguments, message, capsys, monkeypatch):
    monkeypatch.setitem(zoo.ARCHITECTURES, "SlowFast", "zoo.slowfast")
    assert main(["predict", str(weights), *arguments]) == 2
    assert message in capsys.readouterr().err
