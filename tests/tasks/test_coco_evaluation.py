"""Average precision as pycocotools has it on the same files, on one process and on two."""

import contextlib
import io
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import tensor

from zoo.tasks.average_precision import mean_average_precision
from zoo.tasks.coco_evaluation import CocoEvaluation, _turns, _turns_on_gpu

BOXES = [f"map{end}" for end in ("", "_50", "_75", "_small", "_medium", "_large")]
BOXES += [f"mar{end}" for end in ("_1", "_10", "_100", "_small", "_medium", "_large")]
KEYPOINTS = [f"keypoint_{name}{end}" for name in ("map", "mar") for end in ("", "_50", "_75", "_medium", "_large")]
ORDER = {"boxes": BOXES, "masks": [f"mask_{name}" for name in BOXES], "keypoints": KEYPOINTS}
IOU_TYPE = {"boxes": "bbox", "masks": "segm", "keypoints": "keypoints"}
CATEGORY_IDS = [1, 3, 17, 44]  # with gaps, as COCO's; the last class has no truth
HEIGHT, WIDTH = 150, 200


def blob(box):
    """An ellipse in a box."""
    x1, y1, x2, y2 = box.tolist()
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    across, down = (2 * x - x1 - x2) / max(x2 - x1, 1e-3), (2 * y - y1 - y2) / max(y2 - y1, 1e-3)
    return (across**2 + down**2 < 1).to(torch.uint8)


def boxes_at(corners, sides):
    corners = corners.clamp_min(0)
    limit = tensor([WIDTH, HEIGHT], dtype=torch.float32)
    return torch.cat([corners, torch.minimum(corners + sides.clamp_min(1), limit)], dim=1)


def generated(seed=0, images=14, keypoints=17):
    """Truths small and large, crowds, empty images; detections near, doubled, of a wrong class, nowhere near."""
    generator = torch.Generator().manual_seed(seed)
    predictions, targets = [], []
    for image in range(images):
        count = image % 5
        sides = 10 + 180 * torch.rand(count, 2, generator=generator) ** 2
        truths = boxes_at(torch.rand(count, 2, generator=generator) * tensor([100, 70]), sides)
        labels = torch.randint(1, 4, (count,), generator=generator)
        noise = torch.randn(2 * count, 4, generator=generator) * 3
        near = torch.cat([truths, truths]) + noise
        other = boxes_at(torch.rand(3, 2, generator=generator) * 100, 40 * torch.rand(3, 2, generator=generator))
        found = torch.cat([boxes_at(near[:, :2], near[:, 2:] - near[:, :2]), other])
        if image % 7 == 6:
            found = found[:0]
        wrong = torch.randint(1, 5, (3,), generator=generator)
        points = truths[:, None, :2] + torch.rand(count, keypoints, 2, generator=generator) * sides[:, None]
        visible = torch.randint(0, 3, (count, keypoints, 1), generator=generator) * (torch.rand(count, 1, 1) > 0.1)
        shifted = torch.cat([points, points, torch.rand(3, keypoints, 2, generator=generator) * 150])
        shifted = shifted + torch.randn(shifted.shape, generator=generator) * 2
        masks = [blob(box) for box in truths]
        targets.append(
            {
                "image_id": tensor(1000 - 7 * image),
                "boxes": truths,
                "labels": labels,
                "masks": torch.stack(masks) if masks else torch.zeros(0, HEIGHT, WIDTH, dtype=torch.uint8),
                "keypoints": torch.cat([points, visible], dim=2),
                "area": tensor([float(mask.sum()) for mask in masks]),
                "iscrowd": (torch.rand(count, generator=generator) < 0.2).long(),
            }
        )
        masks = [0.9 * blob(box)[None] for box in found]
        predictions.append(
            {
                "boxes": found,
                "labels": torch.cat([labels, labels, wrong])[: len(found)],
                "scores": torch.rand(len(found), generator=generator).mul(50).round() / 50,
                "masks": torch.stack(masks) if masks else torch.zeros(0, 1, HEIGHT, WIDTH),
                "keypoints": torch.cat([shifted, torch.ones(len(shifted), keypoints, 1)], dim=2)[: len(found)],
            }
        )
    return predictions, targets


def official_truths(targets):
    """The json of a set in COCO's format, written without the code that is tested."""
    from pycocotools import mask

    annotations = []
    for target in targets:
        for i, (x1, y1, x2, y2) in enumerate(target["boxes"].double().tolist()):
            runs = mask.encode(np.asfortranarray(target["masks"][i].numpy()))
            points = target["keypoints"][i]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": target["image_id"].item(),
                    "category_id": CATEGORY_IDS[target["labels"][i] - 1],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": target["area"][i].item(),
                    "iscrowd": target["iscrowd"][i].item(),
                    "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
                    "keypoints": points.double().flatten().tolist(),
                    "num_keypoints": int((points[:, 2] > 0).sum()),
                }
            )
    images = [{"id": target["image_id"].item(), "height": HEIGHT, "width": WIDTH} for target in targets]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in CATEGORY_IDS],
    }


def pycocotools_stats(truths, results, iou_type, sigmas=None):
    """The numbers that pycocotools prints for two json files."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truths))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), iou_type)
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.where(evaluation.stats == -1, np.nan, evaluation.stats)


def counted(predictions, targets, batch=4, **options):
    evaluation = CocoEvaluation(**({"num_classes": 4} | options))
    for start in range(0, len(targets), batch):
        evaluation.update(predictions[start : start + batch], targets[start : start + batch])
    return evaluation


@pytest.mark.parametrize("backend", ["pycocotools", "faster_coco_eval"])
@pytest.mark.parametrize("kind", ["boxes", "masks", "keypoints"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_numbers_are_pycocotools_on_the_written_file(tmp_path, kind, backend, seed):
    predictions, targets = generated(seed)
    evaluation = counted(predictions, targets, kinds=(kind,), backend=backend)
    numbers = evaluation.compute()
    evaluation.write_results(tmp_path / "results.json", CATEGORY_IDS, kind)
    (tmp_path / "truths.json").write_text(json.dumps(official_truths(targets)))
    theirs = pycocotools_stats(tmp_path / "truths.json", tmp_path / "results.json", IOU_TYPE[kind])
    assert list(numbers) == ORDER[kind]
    assert list(numbers.values()) == pytest.approx(theirs, abs=1e-6, nan_ok=True)
    assert 0.05 < numbers[ORDER[kind][0]] < 0.95
    assert len(set(numbers.values())) > 6
    assert evaluation.samples() == len(targets)


def test_all_kinds_at_once_in_any_batches_and_of_any_type():
    predictions, targets = generated()
    kinds = ("boxes", "masks", "keypoints")
    together = counted(predictions, targets, kinds=kinds, batch=1).compute()
    apart = [counted(predictions, targets, kinds=(kind,), batch=14).compute() for kind in kinds]
    assert together == apart[0] | apart[1] | apart[2]
    truthful = [prediction | {"masks": prediction["masks"][:, 0] > 0.5} for prediction in predictions]
    backwards = counted(truthful[::-1], targets[::-1], kinds=kinds).compute()
    assert backwards == together


def test_per_class_and_curves_agree_with_the_numbers_and_with_the_lectures_steps():
    predictions, targets = generated(2)
    targets = [target | {"iscrowd": torch.zeros_like(target["iscrowd"])} for target in targets]
    evaluation = counted(predictions, targets)
    numbers, per_class, curves = evaluation.compute(), evaluation.per_class(), evaluation.curves()
    assert np.mean(per_class[:3]) == pytest.approx(numbers["map"])
    assert math.isnan(per_class[3])
    assert curves.shape == (4, 101)
    assert curves[3].isnan().all()
    mean, each = mean_average_precision(predictions[::-1], targets[::-1], 4)  # of equal scores the lowest id is first
    assert curves[:3].mean(1).tolist() == pytest.approx(each[:3], abs=1e-9)
    assert numbers["map_50"] == pytest.approx(mean, abs=1e-9)
    assert (curves[:3].diff(dim=1) <= 0).all()


@pytest.mark.parametrize("kind", ["boxes", "masks", "keypoints"])
def test_the_truth_is_perfect_and_nothing_is_zero(kind):
    _, targets = generated()
    targets = [t | {"keypoints": t["keypoints"].clamp_min(1), "iscrowd": 0 * t["iscrowd"]} for t in targets]
    perfect = counted([t | {"scores": torch.rand(len(t["labels"]))} for t in targets], targets, kinds=(kind,)).compute()
    assert perfect[ORDER[kind][0]] == 1.0
    assert {value for name, value in perfect.items() if not name.endswith("mar_1")} == {1.0}
    nothing = {key: value[:0] for key, value in generated()[0][1].items()}
    nothing = counted([nothing] * len(targets), targets, kinds=(kind,)).compute()
    assert nothing[ORDER[kind][0]] == 0.0
    assert {value for value in nothing.values() if not math.isnan(value)} == {0.0}


def test_with_no_truth_the_numbers_are_not_numbers_and_no_model_is_best_for_them(tmp_path):
    from lightning import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    predictions, targets = generated()
    empty = [target | {key: target[key][:0] for key in ("boxes", "labels", "area", "iscrowd")} for target in targets]
    evaluation = counted(predictions, empty)
    with pytest.warns(UserWarning, match="none of 14 images has a truth"):
        numbers = evaluation.compute()
    assert len(numbers) == 12
    assert all(math.isnan(value) for value in numbers.values())

    class Scripted(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def train_dataloader(self):
            return [torch.zeros(1)]

        val_dataloader = train_dataloader

        def training_step(self, batch, batch_idx):
            return self.weight.sum()

        def validation_step(self, batch, batch_idx):
            self.log("val/map", [numbers["map"], 0.01, numbers["map"]][self.current_epoch])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    best = ModelCheckpoint(tmp_path, monitor="val/map", mode="max")
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", max_epochs=3, num_sanity_val_steps=0, callbacks=[best], **options).fit(Scripted())
    assert best.best_model_score == pytest.approx(0.01)


def test_without_any_image_there_is_no_number():
    evaluation = CocoEvaluation(2, kinds=("boxes", "keypoints"))
    evaluation.update([], [])
    with pytest.warns(UserWarning, match="none of 0 images"):
        assert all(math.isnan(value) for value in evaluation.compute().values())
    assert evaluation.results([1, 2]) == []


def test_reset_forgets_and_another_update_counts():
    predictions, targets = generated()
    evaluation = counted(predictions[:7], targets[:7])
    half = evaluation.compute()
    evaluation.update(predictions[7:], targets[7:])
    whole = evaluation.compute()
    assert whole == counted(predictions, targets).compute()
    assert whole["map"] != half["map"]
    evaluation.reset()
    evaluation.update(predictions[:7], targets[:7])
    assert evaluation.compute() == pytest.approx(half, nan_ok=True)
    assert evaluation.samples() == 7


def test_an_image_that_a_sampler_repeats_counts_once_and_another_with_its_id_is_refused():
    predictions, targets = generated()
    evaluation = counted([*predictions, *predictions[:3]], [*targets, *targets[:3]])
    with pytest.warns(UserWarning, match="3 of 17 images were evaluated twice"):
        assert evaluation.compute() == counted(predictions, targets).compute()
    assert evaluation.samples() == 14
    alike = [target | {"image_id": tensor(5)} for target in targets]
    with pytest.raises(ValueError, match="different truths have the image_id 5"):
        counted(predictions, alike).compute()


def test_a_box_turned_inside_out_is_a_wrong_detection():
    """pycocotools takes its negative area for out of range and overlooks it."""
    target = {"image_id": tensor(1), "boxes": tensor([[10.0, 10.0, 50.0, 50.0]]), "labels": tensor([1])}
    boxes = tensor([[90.0, 90.0, 60.0, 95.0], [10.0, 10.0, 50.0, 50.0]])
    prediction = {"boxes": boxes, "labels": tensor([1, 1]), "scores": tensor([0.9, 0.8])}
    assert counted([prediction], [target], num_classes=1).compute()["map"] == pytest.approx(0.5)


def strange_masks(height, width):
    """Nothing, everything, noise, single columns and rows, corners, what touches each border, holes."""
    generator = torch.Generator().manual_seed(height * width)
    masks = [torch.zeros(height, width), torch.ones(height, width)]
    masks += [(torch.rand(height, width, generator=generator) < share).float() for share in (0.02, 0.5, 0.98)]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    lines = [x == 0, x == width - 1, x == width // 2, x % 2 == 0, y == 0, y == height - 1, y == height // 2, y % 2 == 1]
    corners = [(x == i) & (y == j) for i in (0, width - 1) for j in (0, height - 1)]
    halves = [x < width // 2, x >= width // 2, y < height // 2, y >= height // 2]
    rings = [(x - width // 2).abs() + (y - height // 2).abs() == 2, (x > 0) & (y > 0) & (x < width - 1)]
    return torch.stack([mask.float() for mask in (*masks, *lines, *corners, *halves, *rings)])


def tight_boxes(masks):
    """Around what is inside, as torchvision's masks_to_boxes has them, which refuses empty masks."""
    boxes = torch.zeros(len(masks), 4)
    for box, mask in zip(boxes, masks, strict=True):
        if mask.any():
            y, x = mask.nonzero().T
            box.copy_(torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]))
    return boxes


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (13, 1), (2, 2), (24, 33), (40, 16)])
@pytest.mark.parametrize("boxed", ["tightly", "wrongly", "inside out"])
def test_run_lengths_are_pycocotools_wherever_the_boxes_are(height, width, boxed):
    from pycocotools import mask

    masks = strange_masks(height, width)
    tight = tight_boxes(masks)
    boxes = {"tightly": tight, "wrongly": tight.flip(0) * 1.7 - 9, "inside out": tight[:, [2, 3, 0, 1]]}[boxed]
    official = mask.encode(np.asfortranarray(masks.byte().permute(1, 2, 0).numpy()))
    official = [{"size": runs["size"], "counts": runs["counts"].decode()} for runs in official]
    objects = {"boxes": boxes, "labels": torch.ones(len(masks), dtype=torch.int64), "scores": torch.rand(len(masks))}
    kinds = [
        masks,
        0.6 * masks[:, None],
        masks.bfloat16(),
        masks.double(),
        masks.byte() * 255,
        -masks.long(),
        masks > 0,
    ]
    for given in kinds:
        evaluation = CocoEvaluation(1, kinds=("masks",))
        nothing = {key: value[:0] for key, value in objects.items()} | {"masks": given[:0], "image_id": tensor(1)}
        evaluation.update([objects | {"masks": given}], [nothing])
        assert [found["segmentation"] for found in evaluation.results([1], "masks")] == official
    places, at_once = _turns(masks.byte().numpy(), boxes.numpy()), _turns_on_gpu(masks)
    assert all(np.array_equal(*pair) for pair in zip(places, at_once, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": tensor([0])}, "labels from 0 to 0, not in 1…4"),
        ({"labels": tensor([5])}, "labels from 5 to 5, not in 1…4"),
        ({"labels": tensor([1, 1])}, "not as many as the labels"),
        ({"scores": tensor([float("nan")])}, "scores are NaN"),
        ({"boxes": tensor([[0.0, 0.0, float("inf"), 1.0]])}, "boxes are NaN or infinite"),
        ({"masks": torch.ones(1, 1, 9, 8)}, "masks of prediction and target differ"),
        ({"masks": torch.ones(2, 1, 8, 8)}, "masks are not as many as the labels"),
    ],
)
def test_a_prediction_that_cannot_be_right_is_named(change, message):
    boxes = tensor([[0.0, 0.0, 5.0, 5.0]])
    target = {"image_id": tensor(31), "boxes": boxes, "labels": tensor([2]), "masks": torch.ones(1, 8, 8)}
    prediction = {"boxes": boxes, "labels": tensor([2]), "scores": tensor([0.5]), "masks": torch.ones(1, 1, 8, 8)}
    evaluation = CocoEvaluation(4, kinds=("boxes", "masks"))
    evaluation.update([prediction], [target])
    with pytest.raises(ValueError, match=f"image 31.*{message}"):
        evaluation.update([prediction | change], [target])


def test_what_is_missing_is_named():
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    evaluation = CocoEvaluation(4, kinds=("masks",))
    with pytest.raises(ValueError, match="target of image 3 has no masks; it has boxes, labels, image_id"):
        evaluation.update([nothing], [nothing | {"image_id": tensor(3)}])
    with pytest.raises(ValueError, match="a target has no image_id"):
        evaluation.update([nothing], [nothing])
    with pytest.raises(ValueError, match="2 predictions were given for 1 targets"):
        evaluation.update([nothing, nothing], [nothing])
    with pytest.raises(ValueError, match="4 category_ids"):
        evaluation.results([1, 2, 3], "masks")
    with pytest.raises(ValueError, match="'boxes'"):
        evaluation.results(CATEGORY_IDS, "boxes")
    with pytest.raises(ValueError, match="kinds of"):
        CocoEvaluation(4, kinds=("segm",))
    with pytest.raises(NotImplementedError, match="update"):
        evaluation([nothing], [nothing])


def test_keypoints_of_other_sets_have_sigmas_of_their_own(tmp_path):
    predictions, targets = generated(keypoints=5)
    numbers = counted(predictions, targets, kinds=("keypoints",)).compute()
    sigmas = [0.02, 0.05, 0.1, 0.05, 0.08]
    evaluation = counted(predictions, targets, kinds=("keypoints",), keypoint_sigmas=sigmas)
    evaluation.write_results(tmp_path / "results.json", CATEGORY_IDS, "keypoints")
    (tmp_path / "truths.json").write_text(json.dumps(official_truths(targets)))
    for found, theirs in ((numbers, [0.05] * 5), (evaluation.compute(), sigmas)):
        stats = pycocotools_stats(tmp_path / "truths.json", tmp_path / "results.json", "keypoints", theirs)
        assert list(found.values()) == pytest.approx(stats, abs=1e-6, nan_ok=True)
    with pytest.raises(ValueError, match=r"\[5\] keypoints, and there are 3"):
        counted(predictions, targets, kinds=("keypoints",), keypoint_sigmas=sigmas[:3]).compute()


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    predictions, targets = generated()
    evaluation = counted(predictions, targets)
    path = tmp_path / "results.json"
    path.write_text("before")

    def full(self, text):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(OSError, match="could not be written"):
        evaluation.write_results(path, CATEGORY_IDS)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_without_the_libraries_it_says_what_to_install(monkeypatch):
    predictions, targets = generated()
    numbers = counted(predictions, targets).compute()
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert counted(predictions, targets).compute() == pytest.approx(numbers, abs=1e-9, nan_ok=True)
    with pytest.raises(ImportError, match=r"zoo\[detection\]"):
        counted(predictions, targets, backend="faster_coco_eval")
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r"zoo\[detection\]"):
        counted(predictions, targets)


def share(rank, world, folder, cuts, image_id=None):
    """One process's part of the evaluation; its numbers as a file."""
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    predictions, targets = generated()
    mine = slice(*cuts[rank])
    if image_id is not None:
        targets = [target | {"image_id": tensor(image_id)} for target in targets]
    evaluation = CocoEvaluation(4, kinds=("boxes", "masks"))
    if targets[mine]:
        evaluation.update(predictions[mine], targets[mine])
    try:
        outcome = {"numbers": evaluation.compute(), "per_class": evaluation.per_class("masks")}
        outcome |= {"samples": evaluation.samples(), "results": evaluation.results(CATEGORY_IDS)}
        evaluation.write_results(folder / "results.json", CATEGORY_IDS)
    except ValueError as error:
        outcome = {"error": str(error)}
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    distributed.barrier()  # and no destroy_process_group(), in which torch 2.6 hangs at times


@pytest.mark.parametrize("cuts", [[(0, 7), (7, 14)], [(0, 14), (14, 14)], [(0, 0), (0, 14)], [(0, 8), (7, 14)]])
def test_two_processes_count_each_image_once_also_if_one_has_none_or_one_is_padded(tmp_path, cuts):
    torch.multiprocessing.start_processes(share, (2, tmp_path, cuts), nprocs=2, start_method="fork")
    one = counted(*generated(), kinds=("boxes", "masks"))
    outcomes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for outcome in outcomes:
        assert outcome["numbers"] == pytest.approx(one.compute(), abs=1e-9, nan_ok=True)
        assert outcome["per_class"] == pytest.approx(one.per_class("masks"), abs=1e-9, nan_ok=True)
        assert outcome["samples"] == 14
    assert outcomes[0]["results"] == one.results(CATEGORY_IDS) == json.loads((tmp_path / "results.json").read_text())
    assert outcomes[1]["results"] == []


def test_an_error_on_the_first_process_reaches_the_others(tmp_path):
    torch.multiprocessing.start_processes(share, (2, tmp_path, [(0, 7), (7, 14)], 5), nprocs=2, start_method="fork")
    for rank in (0, 1):
        assert "image_id 5" in json.loads((tmp_path / f"{rank}.json").read_text())["error"]


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_jittered_truths_of_coco_get_pycocotools_numbers(zoo_data, tmp_path, kind):
    """Real pictures' truths with crowds and category ids with gaps; the truths are read from the official json."""
    from pycocotools.coco import COCO

    path = zoo_data / "coco_small/annotations/instances_val2017.json"
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    category_ids = sorted(coco.getCatIds())
    generator = torch.Generator().manual_seed(0)
    evaluation = CocoEvaluation(len(category_ids), kinds=(kind,))
    for image in coco.loadImgs(coco.getImgIds()):
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        masks = [torch.from_numpy(coco.annToMask(annotation)) for annotation in annotations]
        boxes = tensor([annotation["bbox"] for annotation in annotations]).reshape(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        target = {
            "image_id": tensor(image["id"]),
            "boxes": boxes,
            "labels": tensor([category_ids.index(a["category_id"]) + 1 for a in annotations], dtype=torch.int64),
            "masks": torch.stack(masks) if masks else torch.zeros(0, image["height"], image["width"]),
            "area": tensor([annotation["area"] for annotation in annotations]),
            "iscrowd": tensor([annotation["iscrowd"] for annotation in annotations], dtype=torch.int64),
        }
        shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
        prediction = {
            "boxes": boxes + torch.randn(boxes.shape, generator=generator) * 3,
            "labels": target["labels"],
            "scores": torch.rand(len(boxes), generator=generator),
            "masks": target["masks"].roll(shift, (1, 2))[:, None].float(),
        }
        evaluation.update([prediction], [target])
    evaluation.write_results(tmp_path / "results.json", category_ids, kind)
    theirs = pycocotools_stats(path, tmp_path / "results.json", IOU_TYPE[kind])
    numbers = evaluation.compute()
    assert list(numbers.values()) == pytest.approx(theirs, abs=1e-6)
    assert 0.2 < numbers[ORDER[kind][0]] < 0.9
