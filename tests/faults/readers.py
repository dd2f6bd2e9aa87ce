"""Every reader of a file that somebody else wrote, with a small sound file of its kind."""

import gzip
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mutations import Reader
from PIL import Image

import zoo
from datamodules import COCOCaptionsDataModule, COCODataModule, VOCDataModule
from datamodules.annotations import Findings
from datamodules.cifar import CIFAR10, parse
from datamodules.cifar import _read_archive as read_archive
from datamodules.mnist import read_idx
from datamodules.pictures import Picture, read_image
from datamodules.shapenet import _pixels as read_rendering
from datamodules.shapenet_files import _read_list as read_list
from datamodules.shapenet_files import read_models
from datamodules.surfaces import read_mesh, read_pickled_points
from datamodules.video_files import VideoFile
from datamodules.video_lists import read_rows
from datamodules.voc import unpack
from zoo import recipes
from zoo.darknet import load_darknet, write_darknet
from zoo.running.checkpoint import read_checkpoint
from zoo.yolov3 import YOLOv3Network

QUIET = {"val_size": 0, "workers": 0, "cache": False}


# Pictures


def picture(ending: str = "png", **options: Any) -> bytes:
    """A small picture of smooth random pixels."""
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(small).resize((32, 24), Image.Resampling.BICUBIC)
    image.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()), **options)
    return file.getvalue()


def is_picture(found: torch.Tensor) -> bool:
    return found.dtype == torch.uint8 and found.ndim == 3 and len(found) == 3 and found.numel() > 0


def pictures() -> dict[str, Reader]:
    """The formats that people have."""
    forms: dict[str, dict[str, Any]] = {
        "jpg": {}, "progressive.jpg": {"progressive": True}, "png": {}, "gif": {}, "webp": {}, "bmp": {}, "ppm": {},
        "tif": {"compression": "tiff_lzw"},
    }  # fmt: skip
    readers = {
        form: Reader(f"photo.{form}", picture(form.split(".")[-1], **options), read_image, is_picture)
        for form, options in forms.items()
    }
    readers["small.jpg"] = Reader("photo.jpg", picture("jpg"), lambda path: Picture(path).pixels(shrink=2))
    readers["rendering"] = Reader("00.png", picture(), read_rendering)
    return readers


# Annotations


def finite_boxes(module: Any) -> bool:
    """Every picture that is left gives a target that can be trained on, and one that can be evaluated."""
    for index in range(len(module.train_set)):
        for training in (True, False):
            target = module.train_set.target(index, module.masks, module.keypoints, training)
            boxes, labels = target["boxes"], target["labels"]
            good = bool(boxes.isfinite().all() and target["area"].isfinite().all())
            good &= bool((boxes[:, 2:] > boxes[:, :2]).all())
            good &= bool(((labels >= 1) & (labels <= module.num_classes)).all())
            if not good:
                return False
    return True


def set_up(build: Callable[[], Any]) -> Any:
    module = build()
    module.setup("fit")
    return module


def coco_json() -> bytes:
    """Two pictures, an object on each, with a polygon, run lengths and keypoints."""
    boxes = {1: [2, 3, 10, 8], 2: [4.5, 5, 20, 12]}
    square = [[2, 3, 12, 3, 12, 11, 2, 11]]
    runs = {"size": [24, 32], "counts": [100, 8, 660]}
    points = [3, 4, 2, 5, 6, 1, 0, 0, 0]
    categories = [{"id": 3, "name": "cat", "keypoints": ["nose", "left_ear", "right_ear"], "skeleton": [[1, 2]]}]
    return json.dumps(
        {
            "images": [{"id": k, "file_name": f"{k}.png", "height": 24, "width": 32} for k in (1, 2)],
            "annotations": [
                {"id": k, "image_id": k, "category_id": 3, "bbox": box, "area": 80, "iscrowd": 0,
                 "segmentation": square if k == 1 else runs, "keypoints": points, "num_keypoints": 2}
                for k, box in boxes.items()
            ],
            "categories": categories,
        }
    ).encode()  # fmt: skip


VOC = """<annotation><size><width>32</width><height>24</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>15</ymax>
</bndbox></object><object><name>dog</name><bndbox><xmin>5.5</xmin><ymin>3</ymin><xmax>9</xmax><ymax>7</ymax></bndbox>
</object></annotation>"""


def annotations() -> dict[str, Reader]:
    """Files that say what is on pictures."""

    def coco(**options: Any) -> Callable[[Path], Any]:
        return lambda path: set_up(lambda: COCODataModule(str(path.parents[1]), **QUIET, **options))

    def voc(path: Path) -> Any:
        return set_up(lambda: VOCDataModule(str(path.parents[1]), **QUIET))

    beside = {"train/1.png": picture(), "train/2.png": picture()}
    named = ("instances_train.json", "1.png", "2.png", "the picture /")
    sheep = VOC.replace("cat", "sheep").encode()
    xml = {"JPEGImages/1.png": picture(), "JPEGImages/2.png": picture(), "Annotations/2.xml": sheep}
    return {
        "coco": Reader("annotations/instances_train.json", coco_json(), coco(), finite_boxes, beside, named),
        "coco masks": Reader(
            "annotations/instances_train.json", coco_json(), coco(masks=True), finite_boxes, beside, named
        ),
        "coco keypoints": Reader(
            "annotations/instances_train.json", coco_json(), coco(keypoints=True), finite_boxes, beside, named
        ),
        "coco skipping": Reader(
            "annotations/instances_train.json",
            coco_json(),
            coco(corrupt="skip"),
            finite_boxes,
            beside,
            (*named, "split train"),
        ),
        "voc": Reader("Annotations/1.xml", VOC.encode(), voc, finite_boxes, xml, ("1.xml", "1.png", "Annotations")),
    }


def captions() -> dict[str, Reader]:
    """Files of captions."""

    def read(path: Path) -> Any:
        return set_up(lambda: COCOCaptionsDataModule(str(path.parent), min_count=1, **QUIET))

    def has_tokens(module: Any) -> bool:
        tokens = module.train_set.tokens
        return len(tokens) > 0 and int(tokens.min()) >= 0 and int(tokens.max()) < len(module.words)

    beside = {"1.png": picture(), "2.png": picture()}
    coco = {
        "images": [{"id": k, "file_name": f"{k}.png"} for k in (1, 2)],
        "annotations": [{"id": k, "image_id": k, "caption": "a cat on a mat"} for k in (1, 2)],
    }
    karpathy = {
        "images": [
            {"filename": f"{k}.png", "filepath": "", "cocoid": k, "split": "train", "sentences": [{"raw": "a cat"}]}
            for k in (1, 2)
        ]
    }
    tokens = b"1.png#0\ta cat on a mat\n1.png#1\tone cat\n2.png#0\ta dog\n"
    content = {
        "captions_train.json": json.dumps(coco).encode(), "dataset_x.json": json.dumps(karpathy).encode(),
        "x.token.txt": tokens,
    }  # fmt: skip
    # A caption in which no known word is left is none, and words that nobody says are no vocabulary.
    alike = ("the picture /", "no pictures in split", "no word of the training captions")
    return {name: Reader(name, text, read, has_tokens, beside, (name, *alike)) for name, text in content.items()}


# Weights and arrays


def weights() -> dict[str, Reader]:
    """Checkpoints, weights files, Darknet's."""
    torch.manual_seed(0)
    model = zoo.LeNet(image_size=8)
    zoo.save(model, "w.safetensors")
    described = {"class_path": "zoo.LeNet", "arguments": {"image_size": 8}, "class_names": [str(k) for k in range(10)]}
    torch.save({"state_dict": model.state_dict(), "zoo": described, "epoch": 3, "metrics": {"x": 1.0}}, "w.ckpt")
    torch.save({"a.weight": torch.rand(4, 4), "n": [1, "x", (2.5, None)]}, "old.pth",
               _use_new_zipfile_serialization=False)  # fmt: skip
    network = YOLOv3Network(2, tiny=True, width=0.03)
    write_darknet(network, Path("w.weights"))

    def darknet(path: Path) -> Any:
        return load_darknet(network, path)  # all of it or nothing is changed

    files = {name: Path(name).read_bytes() for name in ("w.safetensors", "w.ckpt", "old.pth", "w.weights")}
    return {
        "safetensors": Reader("w.safetensors", files["w.safetensors"], zoo.load),
        "checkpoint": Reader("w.ckpt", files["w.ckpt"], zoo.load),
        "old checkpoint": Reader("old.pth", files["old.pth"], read_checkpoint),
        "darknet": Reader("w.weights", files["w.weights"], darknet),
    }


def cifar_pickle() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    return pickle.dumps({"data": pixels, "labels": [1, 9, 0], "filenames": ["a", "b", "c"]}, protocol=2)


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def arrays() -> dict[str, Reader]:
    """Pictures and points in the official files of data sets."""
    idx = struct.pack(">BBBBIII", 0, 0, 8, 3, 3, 28, 28) + bytes(range(256)) * 9 + bytes(48)
    points = pickle.dumps(np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32), protocol=2)
    records = b"".join(bytes([k]) + bytes(range(256)) * 12 for k in (1, 9, 0))
    archive = tar_of({f"cifar-10-batches-py/{name}": b"x" * 300 for name in CIFAR10[0].train | CIFAR10[0].test})

    def cifar(path: Path) -> Any:
        return parse(path.read_bytes(), path, 10)

    def whole(found: Any) -> bool:
        return found[0].dtype == np.uint8 and len(found[0]) == len(found[1]) and found[1].max() < 10

    return {
        "idx": Reader("images-idx3-ubyte", idx, lambda path: read_idx(path, 3), lambda found: found.ndim == 3),
        "idx.gz": Reader("images-idx3-ubyte.gz", gzip.compress(idx), lambda path: read_idx(path, 3)),
        "cifar": Reader("data_batch_1", cifar_pickle(), cifar, whole),
        "cifar.bin": Reader("data_batch_1.bin", records, cifar, whole),
        "cifar.tar.gz": Reader(
            "cifar-10-python.tar.gz", archive, lambda path: read_archive(path, CIFAR10[0], CIFAR10[0].train)
        ),
        "dat": Reader("00.dat", points, read_pickled_points, lambda found: bool(np.isfinite(found).all())),
    }


# Meshes, videos, lists

MESH = b"""# a tetrahedron
mtllib model.mtl
v 0 0 0
v 1 0 0
v 0 1 0
v 0 0 1
vn 0 0 1
usemtl a
f 1 3 2
f 1/1/1 2/2/1 4/1/1
f 2//1 3//1 4//1
f 3 1 4
"""


def others() -> dict[str, Reader]:
    """Meshes, videos, lists, recipes."""

    def mesh(found: Any) -> bool:
        vertices, faces = found
        return bool(np.isfinite(vertices[faces]).all() and len(faces))

    def frames(path: Path) -> Any:
        with VideoFile(path) as video:
            return video.frames(np.array([0.0, 0.1]), 16)

    def checked(path: Path) -> Any:
        with VideoFile(path) as video:
            video.check()

    def model(path: Path) -> Any:
        root = path.parents[3]
        return read_models(root, root, ["c"], Findings(skip=False))

    def archive(path: Path) -> Any:
        folder = path.parent / "VOC2007"
        try:
            unpack(path, "VOCdevkit/VOC2007", folder)
        finally:
            for file in sorted(folder.rglob("*"), reverse=True):  # what it is there for
                file.unlink() if file.is_file() else file.rmdir()
            if folder.is_dir():
                folder.rmdir()

    inside = tar_of({f"VOCdevkit/VOC2007/{name}": b"x" * 200 for name in ("Annotations/1.xml", "JPEGImages/1.jpg")})
    metadata = b"30.5 25 0 0.8 25\n120 28.1 0 0.7 25\n"
    rendering = "c/m/rendering"
    beside = {"c/m/model.obj": MESH, f"{rendering}/00.png": picture(), f"{rendering}/01.png": picture()}
    rows = b"path,label,split\na.mp4,run,train\nb.mp4,jump,train\nc.mp4,run,val\n"
    kinetics = b"label,youtube_id,time_start,time_end\nrun,abc,12,22\njump,def,0,10\n"
    recipe = recipes.find("lenet/embedded").read_bytes()
    return {
        "obj": Reader("model.obj", MESH, read_mesh, mesh),
        "mp4": Reader("clip.mp4", video("mp4"), frames, lambda found: len(found) == 2),
        "mkv": Reader("clip.mkv", video("mkv"), checked),
        "avi": Reader("clip.avi", video("avi", "mpeg4"), frames, lambda found: len(found) == 2),
        "cameras": Reader(
            f"{rendering}/rendering_metadata.txt", metadata, model, None, beside, ("rendering_metadata.txt", "m/rend")
        ),
        "list": Reader(
            "train_list.txt", b"c/m\na/b/c/m/rendering/00.dat\n", lambda path: read_list(path, Findings(False))
        ),
        "csv": Reader("train.csv", rows, lambda path: read_rows([path])),
        "kinetics": Reader("train.csv", kinetics, lambda path: read_rows([path])),
        "voc.tar": Reader("VOC.tar.gz", inside, archive),
        "recipe": Reader("own.yaml", recipe, recipes.read),
    }


def video(form: str, codec: str = "libx264") -> bytes:
    """Twelve grey frames of 32 x 24 pixels."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format={"mkv": "matroska"}.get(form, form)) as container:
        stream = container.add_stream(codec, rate=10, options={"g": "4"})
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        stream.thread_count = 1
        for k in range(12):
            pixels = np.full((24, 32, 3), 20 * k, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def all_readers() -> dict[str, Reader]:
    """By name."""
    return pictures() | annotations() | captions() | weights() | arrays() | others()


NAMES = [
    *("jpg", "progressive.jpg", "png", "gif", "webp", "bmp", "ppm", "tif", "small.jpg", "rendering"),
    *("coco", "coco masks", "coco keypoints", "coco skipping", "voc"),
    *("captions_train.json", "dataset_x.json", "x.token.txt"),
    *("safetensors", "checkpoint", "old checkpoint", "darknet"),
    *("idx", "idx.gz", "cifar", "cifar.bin", "cifar.tar.gz", "dat"),
    *("obj", "mp4", "mkv", "avi", "cameras", "list", "csv", "kinetics", "voc.tar", "recipe"),
]
