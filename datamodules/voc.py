"""Pascal VOC: pictures of 20 kinds of things, or any set in its format, with an xml file of boxes for each picture.

Source: Everingham et al., 2010, The Pascal Visual Object Classes (VOC) Challenge, http://host.robots.ox.ac.uk/pascal/VOC;
its pictures are from flickr, under flickr's terms.
"""

import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Literal
from xml.etree import ElementTree

from lightning.pytorch.utilities import rank_zero_info

from datamodules.annotations import AnnotatedPictures, Findings, FoundObject, FoundPicture, collect
from datamodules.detection import DetectionDataModule, Split
from datamodules.download import Member, alone, fetch, members_of
from datamodules.pictures import Picture

CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip
LAYOUT = (
    "expected <root>/JPEGImages, <root>/Annotations and <root>/ImageSets/Main, or VOC2007 or VOCdevkit/VOC2007 above"
)
UNPACKED = 50  # times its own size that an archive may have in it; pictures hardly shrink
Year = Literal["2007", "2008", "2009", "2010", "2011", "2012"]


class VOCDataModule(DetectionDataModule):
    """Batches ``(images, targets)`` from Pascal VOC's xml; see :class:`DetectionDataModule` for what is in them.

    Classes are VOC's twenty in their usual order where a set has those, else the sorted names of its own. VOC counts
    pixels from 1 and names the last one that belongs to an object, so that its boxes are, in edges, xmin - 1, ymin - 1,
    xmax, ymax. A picture's id is the number in its name (``2008_000021`` is 2008000021), or where those are not
    different its place in the sorted list of all xml files, from 1.

    Args:
        root: Folder with ``JPEGImages``, ``Annotations`` and ``ImageSets/Main``, or one above with ``VOC<year>`` or
            ``VOCdevkit/VOC<year>``. Without ``ImageSets/Main`` all pictures are for training, and are split.
        year: Which VOC.
        download: Fetch what is missing to ``root/VOCdevkit``, verified by torchvision's checksum; the test pictures
            of 2007 only.
        train_list: Name of the list of training pictures in ``ImageSets/Main``: ``train`` or ``trainval``.
        val_list: Name of that for validation; with ``trainval`` give ``test``, or null to hold pictures out of it.
        test_list: Name of that for testing; where it does not exist, the validation pictures are tested on.
        difficult: Use objects that are marked as difficult as all others are. Else they are left out of training and
            ignored in evaluation, as VOC does: ``iscrowd`` is 1 there.
        one_based: Pixels are counted from 1, as VOC does. Set to false for files that count from 0, as many tools
            write them.
        batch_size: Pictures of a global training batch: all processes together.
        eval_batch_size: Pictures per process in validation, test and prediction.
        size: Length of the longer side, or ``[height, width]``, to which all pictures are resized, in evaluation too;
            None leaves them as they are.
        flip: Mirror half of the training pictures left to right.
        scale_jitter: Enlarge each training picture by a factor from ``[least, most]``, then cut or pad it to its size.
        iou_crop: Cut random boxes out of training pictures, as SSD does.
        val_size: Pictures held out of training for validation where there is no list of those: their number, or below
            1 their share. 0 trains without validation.
        test_size: Likewise for testing.
        split_seed: Seed of that split.
        keep_empty: Train on pictures without objects too.
        corrupt: Stop at what makes no sense or cannot be read (``refuse``), or leave it out (``skip``).
        cache: Keep decoded pictures in memory; None does so where those of a split need no more than 1 GiB.
        workers: Processes that read pictures, for each process that trains; None means one per processor, at most 4.

    Raises:
        FileNotFoundError: There is no such set in ``root``, and it may not be downloaded; or a list is missing.
        ValueError: An xml file is broken, there are no objects in any, or a number is out of range.
    """

    def __init__(
        self,
        root: str = "data",
        year: Year = "2007",
        download: bool = False,
        train_list: str = "train",
        val_list: str | None = "val",
        test_list: str | None = "test",
        difficult: bool = False,
        one_based: bool = True,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        size: list[int] | int | None = None,
        flip: bool = True,
        scale_jitter: list[float] | None = None,
        iou_crop: bool = False,
        val_size: int | float = 0.1,
        test_size: int | float = 0,
        split_seed: int = 0,
        keep_empty: bool = True,
        corrupt: Literal["refuse", "skip"] = "refuse",
        cache: bool | None = None,
        workers: int | None = None,
    ) -> None:
        super().__init__(
            batch_size,
            eval_batch_size,
            size,
            flip,
            scale_jitter,
            iou_crop,
            False,
            False,
            val_size,
            test_size,
            split_seed,
            keep_empty,
            corrupt,
            cache,
            workers,
        )
        self.root = Path(root).expanduser()
        self.year = year
        self.download = download
        self.difficult = difficult
        self.one_based = one_based
        self.lists = {"train": train_list, "val": val_list, "test": test_list}
        self.folder = find_folder(self.root, year, download)
        self.class_names = find_classes(self.folder, corrupt == "skip")
        self.num_classes = len(self.class_names)
        self.category_ids = list(range(1, self.num_classes + 1))
        self.own_splits = tuple(split for split, name in self.lists.items() if self._has_list(split, name))

    def prepare_data(self) -> None:
        """Make sure that the lists are there, by download if allowed."""
        if self.download:
            download_voc(self.root, self.year, [name for name in self.lists.values() if name])

    def read(self, split: Split, findings: Findings) -> AnnotatedPictures:
        """Read the xml files of a split.

        Raises:
            FileNotFoundError: A list is missing.
            ValueError: A file makes no sense, and ``corrupt`` is refuse; or a training picture is one of validation.
        """
        names = self._names(split)
        if split == "val" and (both := sorted(set(names) & set(self._names("train")))):
            raise ValueError(
                f"{both[0]} and {len(both) - 1} more pictures are in the lists {self.lists['train']} and "
                f"{self.lists['val']}: give another val_list, or null to hold pictures out of training"
            )
        return read_voc(self.folder, names, self.class_names, self.difficult, self.one_based, findings)

    def _has_list(self, split: str, name: str | None) -> bool:
        if split == "train" or name is None:
            return split == "train"
        expected = self.download and (split != "test" or self.year == "2007")
        return expected or list_file(self.folder, name).is_file()

    def _names(self, split: str) -> list[str]:
        name = self.lists[split] or ""
        file = list_file(self.folder, name)
        if split == "train" and not file.parent.is_dir():
            return sorted(path.stem for path in (self.folder / "Annotations").glob("*.xml"))
        if not file.is_file():
            raise FileNotFoundError(f"there is no list {file}: give another {split}_list, or set download to true")
        return [line.split()[0] for line in file.read_text().splitlines() if line.strip()]


# Files


def find_folder(root: Path, year: str, download: bool) -> Path:
    """The folder with ``Annotations``: in ``root``, or where it will be once it is downloaded.

    Raises:
        FileNotFoundError: There is none, and it may not be downloaded.
    """
    for folder in (root, root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}"):
        if (folder / "Annotations").is_dir():
            return folder
    if not download:
        raise FileNotFoundError(
            f"{root.absolute()} has no VOC{year}: {LAYOUT}; or set --data.init_args.download true to fetch it"
        )
    return root / "VOCdevkit" / f"VOC{year}"


def list_file(folder: Path, name: str) -> Path:
    """Where a list of pictures lies."""
    return folder / "ImageSets" / "Main" / f"{name}.txt"


def download_voc(root: Path, year: str, lists: list[str]) -> None:
    """Fetch and unpack what is missing of VOC; nothing half-written counts as there.

    Raises:
        FileNotFoundError: It cannot be downloaded; the message says where to put the file by hand.
    """
    from torchvision.datasets.voc import DATASET_YEAR_DICT  # imported here: a run that has its files does not pay

    folder = find_folder(root, year, download=True)
    for key, wanted in ((year, [name for name in lists if name != "test"]), (f"{year}-test", ["test"])):
        missing = [name for name in wanted if name in lists and not list_file(folder, name).is_file()]
        if not missing or key not in DATASET_YEAR_DICT:
            continue
        source = DATASET_YEAR_DICT[key]
        root.mkdir(parents=True, exist_ok=True)
        file = Path(source["url"]).name
        if not (root / file).is_file():
            rank_zero_info(f"downloading {file} to {root}")
            fetch([source["url"].removesuffix(file)], file, source["md5"], root)
        unpack(root / file, source["base_dir"], folder)


def unpack(archive: Path, inside: str, folder: Path) -> None:
    """Unpack the part ``inside`` of an archive into ``folder``; its lists come last, since they say that it is whole.

    Raises:
        ValueError: The archive is broken, or has members that do harm: links, devices, places outside, far more bytes
            than it has itself.
    """
    with (
        alone(archive.parent, ".unpacking-*"),
        tempfile.TemporaryDirectory(dir=archive.parent, prefix=".unpacking-") as partial,
    ):
        try:
            _write_members(archive, PurePosixPath(inside), Path(partial))
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, RecursionError) as error:
            raise ValueError(f"{archive} cannot be unpacked ({error}): delete it and fetch it again") from error
        files = sorted(path for path in Path(partial).rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: "ImageSets" in path.parts):
            target = folder / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


def _write_members(archive: Path, inside: PurePosixPath, folder: Path) -> None:
    """Write the plain files below ``inside``; all else in the archive is left where it is."""
    room = UNPACKED * archive.stat().st_size
    with tarfile.open(archive, tarinfo=Member) as members:
        for member in members_of(members):
            name = PurePosixPath(member.name)
            if not name.is_relative_to(inside) or member.isdir():
                continue
            room -= member.size
            if not member.isreg() or ".." in name.parts or room < 0:
                what = "is no plain file inside of it" if room >= 0 else f"makes it more than {UNPACKED} times its size"
                raise ValueError(f"{archive} is refused: {member.name!r} {what}. Delete it and fetch it again")
            target = folder / name.relative_to(inside)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                shutil.copyfileobj(members.extractfile(member), file)  # type: ignore[arg-type]


def find_classes(folder: Path, skip: bool = False) -> list[str]:
    """VOC's twenty classes where a set has those, else its own, sorted.

    Args:
        folder: With ``Annotations``. One that is named as VOC's own and has no other classes has the twenty; of that
            the first hundred files decide. One that is still to be downloaded has them too.
        skip: Pass over broken files; else they are an error.

    Raises:
        ValueError: A file is broken, or no file has an object.
    """
    if not (folder / "Annotations").is_dir():
        return list(CLASSES)
    named_as_vocs = re.fullmatch(r"VOC20\d\d", folder.name) is not None
    names: set[str] = set()
    for i, path in enumerate(sorted((folder / "Annotations").glob("*.xml"))):
        if i == 100 and named_as_vocs and names <= set(CLASSES):
            break  # to read all takes seconds
        try:
            names |= {text.strip() for item in parse(path).iter("object") if (text := item.findtext("name"))}
        except ValueError:
            if not skip:
                raise
    if not names:
        raise ValueError(f"{folder / 'Annotations'} has no xml files with objects, so that there is nothing to detect")
    twenty = names == set(CLASSES) or (named_as_vocs and names <= set(CLASSES))
    return list(CLASSES) if twenty else sorted(names)


def parse(path: Path) -> ElementTree.Element:
    """The root of an xml file.

    Raises:
        ValueError: It is no whole xml file of an annotation; the message names it.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path} is no whole xml file ({error})") from error
    if root.tag != "annotation":
        raise ValueError(f"{path} begins with <{root.tag}>, expected VOC's <annotation>")
    return root


# Annotations


def read_voc(
    folder: Path, names: list[str], class_names: list[str], difficult: bool, one_based: bool, findings: Findings
) -> AnnotatedPictures:
    """Read the xml files of pictures by their names.

    Args:
        folder: With ``Annotations`` and ``JPEGImages``.
        names: Of the pictures, without ending.
        class_names: Those of the labels 1, 2, ….
        difficult: Whether difficult objects are as all others.
        one_based: Whether pixels are counted from 1.
        findings: Is told what is wrong.

    Raises:
        ValueError: A file makes no sense, and ``findings`` does not skip; the message names it.
    """
    annotations, pictures = folder / "Annotations", folder / "JPEGImages"
    files = {Path(file).stem: file for file in sorted(os.listdir(pictures), reverse=True)} if pictures.is_dir() else {}
    numbers = picture_numbers([path.stem for path in annotations.glob("*.xml")])
    labels = {name: i + 1 for i, name in enumerate(class_names)}
    found, seen = [], set()
    for name in names:
        try:
            if name in seen:
                raise ValueError(f"{name} is in its list twice")
            if name not in numbers:
                raise FileNotFoundError(f"there is no file {annotations / f'{name}.xml'}")
            if name not in files:
                raise FileNotFoundError(f"there is no picture {name} in {pictures}, as {name}.xml says")
            seen.add(name)
            height, width, objects = read_xml(annotations / f"{name}.xml", labels, difficult, one_based, findings)
            if not (height and width):
                picture = Picture(pictures / files[name])
                height, width = picture.height, picture.width
            found.append(FoundPicture(files[name], numbers[name], height, width, objects))
        except FileNotFoundError as error:
            findings.refuse("files that are missing", str(error))
        except ValueError as error:
            findings.refuse("files that make no sense", str(error))
    return collect(pictures, found, 0, findings)


def picture_numbers(names: list[str]) -> dict[str, int]:
    """A number for each picture of a set: that in its name, or where those are not different its place from 1."""
    digits = {name: "".join(re.findall(r"[0-9]", name)) for name in names}
    in_names = [int(text) for text in digits.values() if text and len(text) < 19]
    if len(set(in_names)) == len(names):
        return dict(zip(names, in_names, strict=True))
    return {name: i + 1 for i, name in enumerate(sorted(names))}


def read_xml(
    path: Path, labels: dict[str, int], difficult: bool, one_based: bool, findings: Findings
) -> tuple[int, int, list[FoundObject]]:
    """Height, width and objects of a picture; height and width are 0 where the file does not say them.

    Raises:
        ValueError: The file is broken.
    """
    root = parse(path)
    objects = []
    for i, item in enumerate(root.findall("object")):
        name = f"{path}: object {i + 1}"
        label = (item.findtext("name") or "").strip()
        if label not in labels:
            known = ", ".join(list(labels)[:20])
            findings.refuse("objects of unknown classes", f"{name} is called {label!r}, the classes are {known}")
            continue
        try:
            edges = [float(item.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")]
        except ValueError:
            edges = []
        if not edges or any(abs(edge) > 1e9 or edge != edge for edge in edges):
            findings.refuse("boxes that make no sense", f"{name} has no box of numbers xmin, ymin, xmax, ymax")
            continue
        first = 1.0 if one_based else 0.0
        box = (edges[0] - first, edges[1] - first, edges[2], edges[3])
        ignored = not difficult and (item.findtext("difficult") or "0").strip() == "1"
        objects.append(FoundObject(f"object {i + 1}", box, labels[label], crowd=ignored))
    return _side(root, "height"), _side(root, "width"), objects


def _side(root: ElementTree.Element, name: str) -> int:
    text = (root.findtext(f"size/{name}") or "").strip()
    return int(text) if text.isdecimal() and len(text) < 10 else 0
