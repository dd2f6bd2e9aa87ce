"""The usual Fréchet inception distance, for generated pictures that are compared with published numbers.

Heusel et al., 2017, https://arxiv.org/abs/1706.08500; by torchmetrics and torch-fidelity, with the network of 2015 that
the published numbers are from. It knows photographs: of digits the zoo's own ``classifier_fid`` says more.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics.image.fid import NoTrainInceptionV3

from zoo.tasks.generation_scores import FrechetDistance, as_saved

FEATURES = 2048  # of the network's last pooling, as published
FEW = 2048  # pictures: with fewer than features no covariance has full rank, and the distance means little


class InceptionFID(Callback):
    """Logs ``test/inception_fid`` of the test split and as many generated pictures, those of the test's own numbers.

    Give it to the trainer of ``test``: ``--trainer.callbacks+=zoo.running.inception.InceptionFID``. Pictures are
    compared as files of 8 bits have them, grey ones with three channels alike, on any number of processes.

    Args:
        weights: A file of the network's weights, ``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity's
            releases; None lets torch-fidelity download it once into torch's folder of models.

    Raises:
        ModuleNotFoundError: torch-fidelity is not installed.
        FileNotFoundError: There is no such file.
        ValueError: The file holds other weights, or the model generates nothing.
    """

    def __init__(self, weights: str | None = None) -> None:
        if weights is not None and not Path(weights).expanduser().is_file():
            raise FileNotFoundError(f"weights={weights}: there is no such file of Inception's weights")
        self.weights = weights
        self._fid: FrechetDistance | None = None
        self._count = 0  # real pictures of this test on this process

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the network; one process downloads it while the others wait."""
        if stage != "test" or self._fid is not None:
            return
        if trainer.is_global_zero:
            self._fid = load_inception(self.weights)
        trainer.strategy.barrier("inception")
        self._fid = self._fid or load_inception(self.weights)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch's pictures, and those that the test has generated beside them."""
        if not isinstance(outputs, Tensor) or outputs.shape != batch[0].shape:
            raise ValueError(
                f"InceptionFID is for models that generate pictures, not for zoo.{type(pl_module).__name__}"
            )
        if self._fid is not None and len(outputs):
            self._fid.network.to(pl_module.device)
            self._fid.update(_in_bytes(batch[0]), real=True)
            self._fid.update(_in_bytes(outputs), real=False)
            self._count += len(outputs)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the number over all processes."""
        if self._fid is None:
            return
        counted = torch.tensor(float(self._count), device=pl_module.device)
        count = int(trainer.strategy.reduce(counted, reduce_op="sum"))
        if count < FEW:
            rank_zero_warn(f"test/inception_fid is of {count} pictures: of fewer than {FEW} it comes out far too large")
        pl_module.log("test/inception_fid", float(self._fid.compute()))
        self._fid.reset()
        self._count = 0


def load_inception(weights: str | None) -> FrechetDistance:
    """The distance in the features of the network of 2015, with ``weights`` as :class:`InceptionFID` takes them.

    It is updated with pictures, uint8 (N, 3, H, W).
    """
    path = None if weights is None else str(Path(weights).expanduser())
    try:
        network = NoTrainInceptionV3("inception-v3-compat", [str(FEATURES)], path)
    except (ModuleNotFoundError, NameError) as error:
        raise ModuleNotFoundError("inception_fid needs torch-fidelity: pip install 'zoo[fid]'") from error
    except OSError as error:
        raise FileNotFoundError(
            f"Inception's weights cannot be downloaded ({error}): get weights-inception-2015-12-05-6726825d.pth of "
            "https://github.com/toshas/torch-fidelity/releases in another way, and name the file as weights"
        ) from error
    except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"weights={weights} are not those of torch-fidelity's Inception: {reason}") from error
    return FrechetDistance(FEATURES, network)


def _in_bytes(images: Tensor) -> Tensor:
    """Pictures (N, 1 or 3, H, W) in [0, 1] as uint8 (N, 3, H, W)."""
    return as_saved(images).mul(255).byte().to(images.device).expand(-1, 3, -1, -1)
