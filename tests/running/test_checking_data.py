"""``zoo check-data`` finds what is wrong with every kind of data, names the files, and says nothing of sound ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, TensorDataset

from datamodules import (
    COCOCaptionsDataModule,
    COCODataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    ShapeNetDataModule,
    VOCDataModule,
)
from datamodules.checking import alike_in
from datamodules.video_lists import VideoSet
from zoo.cli import main
from zoo.running.checking_data import LookAtSamples


def picture(path: Path, seed: int, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def folder(root: Path = Path("set")) -> Path:
    """Training and validation pictures of two classes."""
    for number, name in enumerate(f"{s}/{c}/{k}.png" for s in ("train", "val") for c in ("cat", "dog") for k in "123"):
        picture(root / name, number)
    return root


def images(root: Path, **options) -> list[str]:
    return ImageFolderDataModule(str(root), image_size=16, workers=0, **options).check_samples()


def test_sound_folders_have_nothing_wrong():
    assert images(folder()) == []


def test_a_picture_in_two_splits_is_named_whatever_it_is_called():
    root = folder()
    shutil.copy(root / "train/cat/2.png", root / "val/cat/other.png")
    (line,) = images(root)
    assert line == "1 sample is in two splits: set/train/cat/2.png (train) and set/val/cat/other.png (val)"


def test_a_picture_in_two_classes_is_named():
    root = folder()
    shutil.copy(root / "train/cat/2.png", root / "train/dog/9.png")
    (line,) = images(root)
    assert line == "1 sample is in two classes: set/train/cat/2.png (cat) and set/train/dog/9.png (dog)"


def test_unreadable_pictures_are_all_named():
    root = folder()
    (root / "train/cat/1.png").write_bytes(b"")
    (root / "val/dog/3.png").write_text("<html>not found</html>")
    first, second = images(root)
    assert first.startswith("1 file of split train that cannot be used: set/train/cat/1.png is empty")
    assert second.startswith("1 file of split val that cannot be used: set/val/dog/3.png cannot be read as a picture")


@pytest.mark.parametrize("windows", [1, 2])
def test_a_video_in_two_splits_is_named_whichever_of_its_windows_are_used(tmp_path, windows):
    for name in (b"a.avi", b"b.avi"):
        (tmp_path / name.decode()).write_bytes(b"x" * 1000)
    spans = np.array([[0.0, 2.0], [2.0, 4.0]])[-windows:]
    train = VideoSet(tmp_path, np.array([b"a.avi"] * windows), np.zeros(windows, dtype=int), spans)
    test = VideoSet(tmp_path, np.array([b"b.avi"]), np.zeros(1, dtype=int), spans[-1:])
    (found,) = alike_in({"train": train, "test": test}, ["run"])
    assert found == f"1 sample is in two splits: {tmp_path}/b.avi (test) and {tmp_path}/a.avi (train)"


def test_classes_that_are_alike_or_missing_are_named():
    root = folder()
    shutil.move(root / "train/dog", root / "train/Cat ")
    shutil.move(root / "val/dog", root / "val/Cat ")
    assert images(root) == ["several classes have the same name: Cat , cat"]
    numbers = Path("numbers")
    for number, name in enumerate(f"{c}/{k}.png" for c in ("0", "1", "3") for k in range(4)):
        picture(numbers / name, number)
    assert images(numbers, val_size=2) == ["the classes are 0 to 3 without 2"]


def test_what_cannot_be_listed_is_told():
    root = folder()
    shutil.rmtree(root / "val/dog")
    (line,) = images(root)
    assert "val lacks class folders that training has: dog" in line


# In memory


class Spoiled(DigitsDataModule):
    change = staticmethod(lambda images, labels, train: None)

    def read(self, train):
        images, labels = (tensor.clone() for tensor in super().read(train))
        type(self).change(images, labels, train)
        return images, labels


def spoil(change) -> Spoiled:
    return type("Spoiled", (Spoiled,), {"change": staticmethod(change)})(image_size=8)


def test_images_in_memory_are_compared_too():
    def relabel(images, labels, train):
        if train:
            images[0], labels[0], labels[1] = images[1], (labels[1] + 1) % 10, labels[1]

    lines = spoil(relabel).check_samples()
    assert any("in two classes: image " in line for line in lines), lines


def test_labels_that_are_no_class_stop_a_run_before_it_starts(monkeypatch, capsys):
    original = DigitsDataModule.read

    def read(self, train):
        images, labels = original(self, train)
        return images, torch.where(labels == 3, 12, labels)

    monkeypatch.setattr(DigitsDataModule, "read", read)
    small = ["--data.init_args.image_size", "8", "--model.init_args.image_size", "8"]
    assert main(["fit", "lenet/embedded", *small, "--trainer.max_epochs", "1"]) == 2
    error = capsys.readouterr().err
    assert "split train has the labels 12, and the classes are 0 to 9" in error
    assert not Path("runs").exists()
    assert main(["check-data", "lenet/embedded", *small]) == 1
    out = capsys.readouterr().out
    assert "wrong: split train has the labels 12" in out
    assert "wrong: nothing in training belongs to 1 of 10 classes: 3" in out


def test_a_class_that_training_never_sees_is_a_warning():
    def without_nine(images, labels, train):
        labels[labels == 9] = 8

    module = spoil(without_nine)
    module.setup("fit")
    with pytest.warns(UserWarning, match="nothing in training belongs to 1 of 10 classes: 9"):
        assert module.check_samples(files=False) == []


# Objects


def coco(root: Path = Path("coco"), boxes: tuple = ((2, 3, 9, 8), (1, 1, 5, 5)), **changes) -> COCODataModule:
    for number in (1, 2):
        picture(root / "train" / f"{number}.png", number)
    picture(root / "val" / "9.png", 9)
    categories = [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}]
    for split, numbers in {"train": (1, 2), "val": (9,)}.items():
        content = {
            "images": [{"id": k, "file_name": f"{k}.png", "height": 24, "width": 32} for k in numbers],
            "annotations": [
                {"id": k, "image_id": numbers[k % len(numbers)], "category_id": (1, 7)[k % 2], "bbox": list(box)}
                for k, box in enumerate(boxes)
            ],
            "categories": categories,
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return COCODataModule(str(root), workers=0, corrupt="skip", **changes)


def test_sound_annotations_have_nothing_wrong():
    assert coco().check_samples() == []


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((4, 4, 0, 5), "box without area left out: annotation 1 of 2.png"),
        ((40, 4, 5, 5), "box outside of its picture left out: annotation 1 of 2.png"),
        ((30, 4, 5, 5), "box beyond the edge of its picture, in training cut there: annotation 1 of 2.png"),
        ((1, 2, "x", 5), "box that makes no sense: coco/annotations/instances_train.json: annotation 1 has the box"),
    ],
)
def test_boxes_that_are_wrong_are_named(box, message):
    lines = coco(boxes=((2, 3, 9, 8), box)).check_samples()
    assert any(line.startswith(f"split train: 1 {message}") for line in lines), lines


def test_a_category_without_objects_and_a_picture_of_another_size_are_named():
    module = coco(boxes=((2, 3, 9, 8),))
    Image.new("RGB", (16, 16)).save("coco/train/2.png")
    lines = module.check_samples()
    assert "nothing in training belongs to 1 of 2 classes: dog" in lines
    assert any("coco/train/2.png has 16 x 16 pixels, its annotations say 32 x 24" in line for line in lines)


def test_vocs_files_are_looked_at():
    xml = (
        "<annotation><object><name>{}</name><bndbox><xmin>{}</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    )
    for number, (name, left) in enumerate((("cat", 2), ("dog", 20))):
        picture(Path("voc/JPEGImages") / f"{number}.png", number)
        Path("voc/Annotations").mkdir(exist_ok=True)
        Path(f"voc/Annotations/{number}.xml").write_text(xml.format(name, left) + "</object></annotation>")
    lines = VOCDataModule("voc", val_size=0, workers=0, corrupt="skip").check_samples()
    assert any("1 box without area left out: object 1 of 1.png" in line for line in lines), lines
    assert "nothing in training belongs to 1 of 2 classes: dog" in lines


# Captions, videos, meshes, environments


def test_pictures_with_captions_are_looked_at():
    for number in range(6):
        picture(Path("flickr") / f"{number}.png", number)
    shutil.copy("flickr/0.png", "flickr/5.png")
    Path("flickr/x.token.txt").write_text("".join(f"{k}.png#0\ta cat\n" for k in range(6)))
    Path("flickr/x.trainImages.txt").write_text("0.png\n1.png\n2.png\n")
    Path("flickr/x.devImages.txt").write_text("3.png\n4.png\n5.png\n")
    Path("flickr/4.png").write_bytes(b"")
    lines = COCOCaptionsDataModule("flickr", min_count=1, workers=0, corrupt="skip").check_samples()
    assert [line for line in lines if "4.png is empty" in line]
    assert [line for line in lines if "flickr/0.png (train) and flickr/5.png (val)" in line]


def test_videos_are_looked_at():
    pytest.importorskip("av")
    from datamodules import VideoFolderDataModule
    from datamodules.embedded.moving_shapes import write_videos

    write_videos(Path("clips"), {"train": 8, "val": 8, "test": 0}, 0)
    options = {"num_frames": 4, "size": 16, "workers": 0, "corrupt": "skip"}
    assert VideoFolderDataModule("clips", **options).check_samples() == []
    first, second, *_ = sorted(Path("clips/train").rglob("*.mp4"))
    first.write_bytes(b"")
    shutil.copy(second, next(Path("clips/val").iterdir()) / "again.mp4")
    lines = VideoFolderDataModule("clips", **options).check_samples()
    assert [line for line in lines if f"{first} is empty" in line], lines
    assert [line for line in lines if "in two splits" in line and f"{second} (train)" in line], lines


def test_meshes_and_their_pictures_are_looked_at():
    pytest.importorskip("trimesh")
    mesh = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 1 2 4\n"
    for number, name in enumerate("abcd"):
        rendered = Path("shapes/ShapeNetRendering/03001627") / name / "rendering"
        rendered.mkdir(parents=True)
        Image.new("RGBA", (24, 24), (10 * number, 0, 0, 255)).save(rendered / "00.png")
        (rendered / "rendering_metadata.txt").write_text("30 25 0 0.8 25\n")
        model = Path("shapes/ShapeNetCore.v1/03001627") / name
        model.mkdir(parents=True)
        (model / "model.obj").write_text(mesh.replace("v 1 0 0", "v nan 0 0") if name == "b" else mesh)
    Path("shapes/ShapeNetRendering/03001627/d/rendering/rendering_metadata.txt").write_text("30 95 0 0.8 25\n")
    lines = ShapeNetDataModule("shapes", val_size=1, test_size=0, workers=0, corrupt="skip").check_samples()
    assert [line for line in lines if "b/model.obj has vertices that are not finite" in line], lines
    assert [line for line in lines if "1 view whose camera makes no sense" in line], lines


def test_environments_have_no_samples_to_look_at(capsys):
    pytest.importorskip("gymnasium")
    assert main(["check-data", "dqn/embedded"]) == 0
    assert "GymDataModule has no samples that could be looked at before training" in capsys.readouterr().out
    assert list(Path().iterdir()) == []


class Normed(LightningModule):
    """Logits behind a batch norm over so many positions of a picture."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.layers = nn.Sequential(nn.BatchNorm1d(1), nn.Flatten(), nn.Linear(positions, 2))

    def training_step(self, batch, batch_idx):
        return self.layers(batch[0].view(-1, 1, self.positions)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train_on(samples: int, batch_size: int, positions: int = 1, callbacks=(), **options) -> None:
    loader = DataLoader(TensorDataset(torch.rand(samples, positions)), batch_size=batch_size)
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1} | options
    trainer = Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[LookAtSamples(), *callbacks], **options,
    )  # fmt: skip
    trainer.fit(Normed(positions), loader)


@pytest.mark.parametrize(("samples", "batch_size"), [(1, 4), (2, 1), (9, 4)])
def test_one_value_of_a_channel_is_refused_with_what_there_is_to_do(samples, batch_size):
    """Also at an epoch's end, by a loader that keeps the last batch."""
    with pytest.raises(ValueError, match=r"^a batch of 1 sample .* batch norm: layers\.0 gets one value") as raised:
        train_on(samples, batch_size)
    assert f"training samples: {samples}, processes: 1" in str(raised.value)
    assert "--data.init_args.train_size" in str(raised.value)


def test_two_samples_on_two_processes_are_one_on_each():
    with pytest.raises(ProcessRaisedException, match="training samples: 2, processes: 2"):
        train_on(2, 4, devices=2, strategy="ddp_fork")


def test_one_sample_with_many_positions_is_trained_on():
    train_on(1, 4, positions=9)
    train_on(8, 4)


def test_the_command_refuses_one_sample_in_a_line(capsys):
    small = ["--data.init_args.batch_size", "1", "--model.init_args.classifier", "null", "--trainer.logger", "false"]
    assert main(["fit", "dcgan/embedded", *small]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zoo: error")]
    assert "batch norm: generator.layers.2 gets one value of each channel" in line
