"""The functional methods of a program: pure functions of one flat float32 weight vector.

Signatures are those of ``client_sdk.protocol.program``. Shapes: ``w [d]``, ``x [B, *feature_shape]``, ``y [B]``
int64, ``mask [B]``, scalars ``[1]``.

The mask is boolean in meaning: an example counts if its mask is above 0. A masked example contributes *exactly*
nothing, whatever its ``x`` (NaN and infinity included) and ``y`` hold: both are replaced by zeros before the model
sees them, because 0 * NaN would be NaN, and its loss is replaced afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from client_sdk.protocol.program import ParameterSpec, Role
from mobile_export.errors import UnsupportedModel

Loss = Callable[[Tensor, Tensor], Tensor]
"""``(logits [B, ...], y [B]) -> per-example losses [B]``; nothing is reduced over the batch."""

MethodFunction = Callable[..., tuple[Tensor, ...]]

Pieces = dict[str, Tensor]
"""Parameters, or gradients by them, by name."""

INPUT_NAMES = {
    Role.GRAD: ("w", "x", "y", "mask"),
    Role.TRAIN: ("w", "lr", "x", "y", "mask"),
    Role.EVALUATE: ("w", "x", "y", "mask"),
    Role.INFER: ("w", "x"),
}
OUTPUT_NAMES = {
    Role.GRAD: ("grad_sum", "loss_sum", "count"),
    Role.TRAIN: ("w", "loss_sum"),
    Role.EVALUATE: ("loss_sum", "correct", "count"),
    Role.INFER: ("logits",),
}


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Softmax cross-entropy of each example, in nats: ``logits [B, C]``, ``y [B]`` int64 -> ``[B]``."""
    return -F.log_softmax(logits, dim=-1).gather(-1, y[:, None]).squeeze(-1)


@dataclass(frozen=True)
class Batch:
    """Examples with a mask, of which the masked ones hold zeros.

    Attributes:
        x: ``[B, *feature_shape]``.
        y: int64 ``[B]``.
        keep: Bool ``[B]``: which examples count.
    """

    x: Tensor
    y: Tensor
    keep: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, mask: Tensor) -> Batch:
        """The batch without what its masked examples hold."""
        keep, size = mask > 0, len(mask)
        # Each masked example becomes the row of zeros at the end. ExecuTorch copies whole rows twenty times faster
        # than it selects element by element.
        rows = torch.where(keep, torch.arange(size), size)
        padded = torch.cat([x, torch.zeros(1, *x.shape[1:])])
        return cls(padded.index_select(0, rows), torch.where(keep, y, 0), keep)

    @property
    def count(self) -> Tensor:
        """Number of unmasked examples ``[1]``."""
        return _count(self.keep)


@dataclass(frozen=True)
class Methods:
    """The four methods of one model and loss.

    Attributes:
        model: The module; its own parameters are not read, the flat vector replaces them.
        loss: Per-example loss.
        parameters: The parameter table that lays out the flat vector.
    """

    model: nn.Module
    loss: Loss
    parameters: tuple[ParameterSpec, ...]

    def function(self, role: Role) -> MethodFunction:
        """The method of a role."""
        functions: dict[Role, MethodFunction] = {
            Role.GRAD: self.grad,
            Role.TRAIN: self.train,
            Role.EVALUATE: self.evaluate,
            Role.INFER: self.infer,
        }
        return functions[role]

    def grad(self, w: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Sums over the unmasked examples: gradient ``[d]``, loss ``[1]``, and their count ``[1]``."""
        batch = Batch.of(x, y, mask)
        # Differentiating by the pieces and concatenating costs one pass over d; differentiating by the flat vector
        # would cost one pass for each parameter.
        gradients, loss_sum = grad_and_value(self.loss_sum)(self.split(w), batch)
        return self.join(gradients), loss_sum.reshape(1), batch.count

    def train(self, w: Tensor, lr: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """One step ``w - lr * grad_sum / count``, and the loss sum before it; a fully masked batch changes nothing."""
        grad_sum, loss_sum, count = self.grad(w, x, y, mask)
        return w - (lr / count.clamp(min=1.0)) * grad_sum, loss_sum

    def evaluate(self, w: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Sums over the unmasked examples: loss, correct answers (first argmax equals y), count; each ``[1]``."""
        batch = Batch.of(x, y, mask)
        logits = functional_call(self.model, self.split(w), (batch.x,))
        losses = torch.where(batch.keep, self._checked_loss(logits, batch.y), 0.0)
        correct = (logits.argmax(dim=-1) == batch.y) & batch.keep
        return losses.sum().reshape(1), _count(correct), batch.count

    def infer(self, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Logits ``[B, C]``."""
        return (functional_call(self.model, self.split(w), (x,)),)

    def split(self, w: Tensor) -> Pieces:
        """The flat vector's parameters by name, each in its shape."""
        return {p.name: w[p.offset : p.offset + p.num_elements].reshape(p.shape) for p in self.parameters}

    def join(self, pieces: Pieces) -> Tensor:
        """The flat vector ``[d]`` of parameters, or of gradients, by name."""
        return torch.cat([pieces[p.name].reshape(-1) for p in self.parameters])

    def loss_sum(self, pieces: Pieces, batch: Batch) -> Tensor:
        """Sum of the unmasked examples' losses: a scalar, which can be differentiated by the pieces."""
        losses = self._checked_loss(functional_call(self.model, pieces, (batch.x,)), batch.y)
        return torch.where(batch.keep, losses, 0.0).sum()

    def _checked_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        losses = self.loss(logits, y)
        if losses.shape != y.shape:
            raise UnsupportedModel(
                "loss",
                f"must return one value per example, shape {list(y.shape)}, not {list(losses.shape)}; "
                "drop its reduction over the batch (reduction='none')",
            )
        return losses


def _count(flags: Tensor) -> Tensor:
    return flags.to(torch.float32).sum().reshape(1)
