"""Two networks that play against each other: their losses, and what a step of both needs of Lightning.

Goodfellow et al., 2014, https://arxiv.org/abs/1406.2661; Mao et al., 2017, https://arxiv.org/abs/1611.04076 (least
squares); lecture 20 and assignment 6 of EECS 498-007, whose constants and non-saturating generator's loss these are.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from lightning import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

Loss = Literal["gan", "lsgan"]
# The discriminator's loss where it cannot tell real from generated pictures: D = 1/2 for all.
UNDECIDED: dict[Loss, float] = {"gan": 2 * math.log(2), "lsgan": 0.25}


def discriminator_loss(real: Tensor, generated: Tensor, loss: Loss) -> Tensor:
    """What the discriminator minimizes.

    ``gan``: -E[log D(x)] - E[log(1 - D(G(z)))] with D the sigmoid of the score, from the logits, so that no score is
    too large. ``lsgan``: 1/2 E[(D(x) - 1)²] + 1/2 E[D(G(z))²] with D the score itself.

    Args:
        real: Scores (N,) of real pictures.
        generated: Scores (M,) of generated ones.
        loss: Which of the two.
    """
    if loss == "lsgan":
        return 0.5 * (real - 1).square().mean() + 0.5 * generated.square().mean()
    of_real = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
    return of_real + F.binary_cross_entropy_with_logits(generated, torch.zeros_like(generated))


def generator_loss(generated: Tensor, loss: Loss) -> Tensor:
    """What the generator minimizes: -E[log D(G(z))], or 1/2 E[(D(G(z)) - 1)²].

    Args:
        generated: Scores (N,) of generated pictures.
        loss: ``gan`` or ``lsgan``, as in :func:`discriminator_loss`.
    """
    if loss == "lsgan":
        return 0.5 * (generated - 1).square().mean()
    return F.binary_cross_entropy_with_logits(generated, torch.ones_like(generated))


def unsynchronized(trainer: Trainer) -> AbstractContextManager:
    """Keep DDP out of the backward passes within: it would wait for the gradients of the network that has none."""
    return trainer.strategy.block_backward_sync() if trainer.world_size > 1 else nullcontext()  # type: ignore[attr-defined]


def step(trainer: Trainer, network: nn.Module, optimizer: Optimizer | LightningOptimizer) -> None:
    """Average the gradients of all processes, step, and forget them: precision and clipping as Lightning has them.

    Args:
        trainer: Of the run.
        network: Whose gradients and running statistics are brought together.
        optimizer: Lightning's wrapper, whose step counts as one of the run; or what it wraps, whose step does not.
    """
    if trainer.world_size > 1:
        _average([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
        for buffer in network.buffers():  # as DDP does it: the statistics of batch norms are those of the first
            torch.distributed.broadcast(buffer, 0)
    if isinstance(optimizer, LightningOptimizer):
        optimizer.step()
    else:
        trainer.strategy.optimizer_step(optimizer, closure=lambda: None)
    optimizer.zero_grad()


def _average(gradients: list[Tensor]) -> None:
    """Replace gradients by their mean over the processes, in one exchange."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
