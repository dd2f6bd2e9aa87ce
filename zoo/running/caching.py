"""What a frozen encoder makes of each picture, computed once and kept for all epochs and runs."""

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from zoo.running.checkpoint import replacing
from zoo.running.probing import digest_of

SPLITS = ("train", "val")


class CacheFeatures(Callback):
    """Trains a head on features of a frozen ``backbone`` that are computed before the first epoch.

    The pictures of the training and validation splits go through the backbone once, as an evaluation sees them; their
    features are written to a safetensors file and take the pictures' place until the fit is over. The file's name is
    made of the backbone's tensors and structure, of the precision, and of each picture's name, size, time of change
    and order: another encoder, other weights or other pictures make another file, and none goes stale.

    All of a split's features are in memory, in each process. A test sees the pictures themselves, and so does a
    ``fast_dev_run``. The first process computes while others wait: of a set that takes longer than half an hour, let a
    run on one device do it. Nothing removes old files.

    Args:
        folder: Where the files are kept; of several machines, on a disk that all of them see.

    Raises:
        FileNotFoundError: A process does not see what the first one has written.
        ValueError: The backbone is trained, now or later, the data module has no pictures whose place features can
            take, or a file is damaged.
    """

    def __init__(self, folder: str = "data/features") -> None:
        self.folder = Path(folder).expanduser()
        self._pictures: list[tuple[Any, Tensor | None]] = []  # a split and the images that it had

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put features in place of pictures: those of the files if they are there."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        backbone = cast(nn.Module, pl_module.backbone)
        # FreezeBackbone hands the optimizer what it will release: that has no gradient yet.
        later = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        if trained := [name for name, p in backbone.named_parameters() if p.requires_grad or id(p) in later]:
            raise ValueError(
                f"CacheFeatures needs a backbone that stands still, and {trained[0]} is trained: set "
                "frozen_backbone true, or leave CacheFeatures out"
            )
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "picture_fingerprint"):
            given = "no data module" if data is None else f"a {type(data).__name__}"
            raise ValueError(
                "CacheFeatures needs a data module that tells when its pictures change (picture_fingerprint), such as "
                f"COCOCaptionsDataModule, and there is {given}: leave CacheFeatures out"
            )
        known = digest_of(backbone)
        for split in SPLITS:
            pictures = getattr(data, f"{split}_set")
            if pictures is not None:
                key = json.dumps([known, str(trainer.precision), data.picture_fingerprint(split)])
                path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
                features = self._features(trainer, backbone, split, path)
                self._pictures.append((pictures, pictures.images))
                pictures.images = features

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the data its pictures back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise, since Lightning tears no callback down that way."""
        self._give_back()

    def _give_back(self) -> None:
        for pictures, images in self._pictures:
            pictures.images = images
        self._pictures = []

    def _features(self, trainer: Trainer, backbone: nn.Module, split: str, path: Path) -> Tensor:
        """Read the features of a split, which the first process has computed if they are not there."""
        from filelock import FileLock  # torch brings it
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        if trainer.is_global_zero and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # runs that start together: one computes
                if not path.is_file():
                    rank_zero_info(f"computing the features of split {split}, once, for {path}")
                    features = _computed(trainer, backbone, split)
                    with replacing(path) as partial:
                        save_file({"features": features}, partial)
        trainer.strategy.barrier("features")
        if not path.is_file():
            raise FileNotFoundError(
                f"process {trainer.global_rank} does not see {path}, which the first process wrote: set CacheFeatures' "
                "folder to one on a disk that all machines share"
            )
        try:
            features = load_file(path)["features"]
        except (SafetensorError, KeyError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and it will be made again") from error
        rank_zero_info(f"{split}: features {tuple(features.shape)} from {path}")
        return features


@torch.no_grad()
def _computed(trainer: Trainer, backbone: nn.Module, split: str) -> Tensor:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    device = trainer.strategy.root_device
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()  # what FreezeBackbone freezes is put into this mode later
    features = []
    for batch in data.evaluation_dataloader(split):
        images = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, device, 0), 0)[0]
        with trainer.precision_plugin.val_step_context():
            features.append(backbone(images).cpu().contiguous())
    for module, training in modes:
        module.training = training
    return torch.cat(features)
