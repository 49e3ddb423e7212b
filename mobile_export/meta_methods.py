"""The methods of meta-learning: several steps of gradient descent, and gradients through them, in one call.

Signatures are those of ``client_sdk.protocol.program``, and what the algorithms are is in
``client_sdk.protocol.meta_learning``. ``inner_x [K, B, *feature_shape]`` and its kin hold the batch of each step. An
inner step is the formula of ``train``, so that one whose examples are all masked changes nothing, and no derivative
passes through it but unchanged. Masked examples contribute exactly nothing, here as everywhere (``Batch``).

What ``maml`` differentiates is the whole adaptation, not its last step: the gradients of the inner steps are part of
the graph that is differentiated again. That costs memory and time in proportion to K; ``fomaml`` and ``reptile`` keep
the weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.func import grad, grad_and_value

from client_sdk.protocol.program import Role
from mobile_export.methods import Batch, MethodFunction, Methods, Pieces

_INNER: Final = ("inner_x", "inner_y", "inner_mask")
_QUERY: Final = ("x", "y", "mask")

META_INPUT_NAMES: Final[Mapping[Role, tuple[str, ...]]] = {
    Role.ADAPT: ("w", "rates", *_INNER),
    Role.REPTILE: ("w", "lr", *_INNER),
    Role.MAML: ("w", "lr", *_INNER, *_QUERY),
    Role.FOMAML: ("w", "lr", *_INNER, *_QUERY),
    Role.PER_FEDAVG: ("w", "lr", "meta_lr", *_INNER, *_QUERY, "hessian_x", "hessian_y", "hessian_mask"),
}
META_OUTPUT_NAMES: Final[Mapping[Role, tuple[str, ...]]] = {
    Role.ADAPT: ("w", "loss_sums"),
    Role.REPTILE: ("delta", "loss_sums"),
    Role.MAML: ("grad_sum", "loss_sum", "count"),
    Role.FOMAML: ("grad_sum", "loss_sum", "count"),
    Role.PER_FEDAVG: ("w", "loss_sum", "count"),
}


@dataclass(frozen=True)
class MetaMethods:
    """The five methods of one model and loss that adapt, and learn to be adapted.

    Attributes:
        methods: The plain methods, whose loss and parameter table these share.
    """

    methods: Methods

    def function(self, role: Role) -> MethodFunction:
        """The method of a role."""
        functions: dict[Role, MethodFunction] = {
            Role.ADAPT: self.adapt,
            Role.REPTILE: self.reptile,
            Role.MAML: self.maml,
            Role.FOMAML: self.fomaml,
            Role.PER_FEDAVG: self.per_fedavg,
        }
        return functions[role]

    def adapt(
        self, w: Tensor, rates: Tensor, inner_x: Tensor, inner_y: Tensor, inner_mask: Tensor
    ) -> tuple[Tensor, ...]:
        """K steps from ``w``, each parameter at its own rate: the weights, and loss sums ``[K]`` before each."""
        by_name = {p.name: rates[i] for i, p in enumerate(self.methods.parameters)}
        adapted, loss_sums = self._descend(self.methods.split(w), by_name, _steps(inner_x, inner_y, inner_mask))
        return self.methods.join(adapted), torch.cat(loss_sums)

    def reptile(
        self, w: Tensor, lr: Tensor, inner_x: Tensor, inner_y: Tensor, inner_mask: Tensor
    ) -> tuple[Tensor, ...]:
        """What K steps change, ``U_K(w) - w [d]``, and the loss sum before each step ``[K]``."""
        adapted, loss_sums = self._descend(self.methods.split(w), self._alike(lr), _steps(inner_x, inner_y, inner_mask))
        return self.methods.join(adapted) - w, torch.cat(loss_sums)

    def maml(  # noqa: PLR0917 - the method's own signature
        self,
        w: Tensor,
        lr: Tensor,
        inner_x: Tensor,
        inner_y: Tensor,
        inner_mask: Tensor,
        x: Tensor,
        y: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, ...]:
        """Gradient with respect to ``w`` of the query examples' loss sum after K steps; that loss, and their count."""
        steps, query, rates = _steps(inner_x, inner_y, inner_mask), Batch.of(x, y, mask), self._alike(lr)

        def adapted_loss(pieces: Pieces) -> Tensor:
            adapted, _ = self._descend(pieces, rates, steps)
            return self.methods.loss_sum(adapted, query)

        gradients, loss_sum = grad_and_value(adapted_loss)(self.methods.split(w))
        return self.methods.join(gradients), loss_sum.reshape(1), query.count

    def fomaml(  # noqa: PLR0917 - the method's own signature
        self,
        w: Tensor,
        lr: Tensor,
        inner_x: Tensor,
        inner_y: Tensor,
        inner_mask: Tensor,
        x: Tensor,
        y: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, ...]:
        """Gradient of the query examples' loss sum *at* the adapted weights; that loss, and their count."""
        adapted, _ = self._descend(self.methods.split(w), self._alike(lr), _steps(inner_x, inner_y, inner_mask))
        query = Batch.of(x, y, mask)
        gradients, loss_sum = grad_and_value(self.methods.loss_sum)(adapted, query)
        return self.methods.join(gradients), loss_sum.reshape(1), query.count

    def per_fedavg(  # noqa: PLR0917 - the method's own signature
        self,
        w: Tensor,
        lr: Tensor,
        meta_lr: Tensor,
        inner_x: Tensor,
        inner_y: Tensor,
        inner_mask: Tensor,
        x: Tensor,
        y: Tensor,
        mask: Tensor,
        hessian_x: Tensor,
        hessian_y: Tensor,
        hessian_mask: Tensor,
    ) -> tuple[Tensor, ...]:
        """One local meta step, ``w - meta_lr * (I - lr H) g``; loss sum and count are the query examples'.

        g is the gradient of the query examples' mean loss after one step on the inner batch, H the Hessian of the third
        batch's mean loss at ``w`` [Fallah et al. 2020].
        """
        pieces, query = self.methods.split(w), Batch.of(x, y, mask)
        adapted, _ = self._descend(pieces, self._alike(lr), [Batch.of(inner_x, inner_y, inner_mask)])
        gradients, loss_sum = grad_and_value(self.methods.loss_sum)(adapted, query)
        direction = {name: g / query.count.clamp(min=1.0) for name, g in gradients.items()}
        curved = self._hessian_product(pieces, direction, Batch.of(hessian_x, hessian_y, hessian_mask))
        step = self.methods.join({name: g - lr * curved[name] for name, g in direction.items()})
        return w - meta_lr * step, loss_sum.reshape(1), query.count

    def _descend(self, pieces: Pieces, rates: Mapping[str, Tensor], steps: list[Batch]) -> tuple[Pieces, list[Tensor]]:
        """Weights after gradient descent on the mean loss of one batch after another, and loss sums ``[1]`` before."""
        loss_sums = []
        for batch in steps:
            gradients, loss_sum = grad_and_value(self.methods.loss_sum)(pieces, batch)
            count = batch.count.clamp(min=1.0)
            pieces = {
                name: value - (rates[name] / count).reshape(()) * gradients[name] for name, value in pieces.items()
            }
            loss_sums.append(loss_sum.reshape(1))
        return pieces, loss_sums

    def _hessian_product(self, pieces: Pieces, direction: Pieces, batch: Batch) -> Pieces:
        """The Hessian of a batch's mean loss times a vector, as the gradient of the gradient's product with it."""

        def slope(at: Pieces) -> Tensor:
            gradients = grad(self.methods.loss_sum)(at, batch)
            along = [(gradients[name] * v).sum() for name, v in direction.items()]
            return torch.stack(along).sum() / batch.count.clamp(min=1.0).reshape(())

        product: Pieces = grad(slope)(pieces)
        return product

    def _alike(self, lr: Tensor) -> dict[str, Tensor]:
        return {p.name: lr for p in self.methods.parameters}


def _steps(inner_x: Tensor, inner_y: Tensor, inner_mask: Tensor) -> list[Batch]:
    """The batches of K steps."""
    return [Batch.of(x, y, mask) for x, y, mask in zip(inner_x, inner_y, inner_mask, strict=True)]
