"""A model's losses and gradients for many weight vectors at once: ``torch.func`` over its functional form."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad_and_value, vmap

from client_sdk.protocol.program import ParameterSpec
from mobile_export.methods import Loss, cross_entropy
from server_ref.evaluation import Evaluation

_EVALUATION_BATCH = 1024
_NONE: Mapping[str, Tensor] = MappingProxyType({})


class Batch(NamedTuple):
    """One step's examples of c clients.

    Attributes:
        x: float32 [c, B, *feature_shape].
        y: int64 [c, B].
        keep: bool [c, B], which of them count; None for all. The others must be finite examples too.
    """

    x: Tensor
    y: Tensor
    keep: Tensor | None


class Slope(NamedTuple):
    """The gradients of c clients' summed losses.

    Attributes:
        losses: float32 [c], the summed losses.
        columns: Where each parameter is in a flat vector.
        leaves: Each parameter, [c, *shape].
        gradients: Each parameter's gradients, [c, *shape].
    """

    losses: Tensor
    columns: tuple[slice, ...]
    leaves: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]

    def descend(self, before: Tensor, rates: Tensor, after: Tensor) -> None:
        """A step: ``after = before - rate * gradient``.

        Args:
            before: float32 [d] or [c, d].
            rates: float32 [c, 1].
            after: float32 [c, d], receives the new weights.
        """
        _add(before, zip(self.columns, self.gradients, strict=True), rates, after, -1)

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        """``total += factor * gradient``, float32 [c, d] and [c, 1]."""
        _add(total, zip(self.columns, self.gradients, strict=True), factors, total, 1)

    def step_back(self, rates: Tensor, directions: Tensor) -> None:
        """``directions -= rate * (Hessian @ directions)``, in place: a gradient taken back through a step of descent.

        For a differentiable slope, and once: what it holds is freed.

        Args:
            rates: float32 [c, 1], of the step.
            directions: float32 [c, d].
        """
        curved = [i for i, gradient in enumerate(self.gradients) if gradient.requires_grad]
        products = torch.autograd.grad(
            [self.gradients[i] for i in curved],
            self.leaves,
            [directions[:, self.columns[i]].reshape(self.leaves[i].shape) for i in curved],
            materialize_grads=True,
        )
        _add(directions, zip(self.columns, products, strict=True), rates, directions, -1)


def _add(before: Tensor, gradients: Iterable[tuple[slice, Tensor]], factors: Tensor, after: Tensor, sign: int) -> None:
    """A parameter at a time: the gradients of all clients are never copied into one array."""
    for where, gradient in gradients:
        flat = gradient.detach().reshape(len(after), -1)
        torch.addcmul(before[..., where], flat, factors, value=sign, out=after[:, where])


class BatchedModel:
    """The same arithmetic as the exported program's methods, but for c clients in one call. Safe between threads.

    Args:
        model: The module that was exported; its own parameters are not read, flat vectors replace them.
        parameters: The parameter table that lays the flat vectors out.
        loss: Per-example loss, as in ``mobile_export.methods``.
    """

    def __init__(self, model: nn.Module, parameters: tuple[ParameterSpec, ...], loss: Loss = cross_entropy) -> None:
        self._template = model
        self._local = threading.local()
        self._loss = loss
        self._parameters = parameters
        self._slices = [slice(p.offset, p.offset + p.num_elements) for p in parameters]

    @property
    def _model(self) -> nn.Module:
        """A copy for the calling thread: ``functional_call`` swaps the module's parameters while it runs."""
        model: nn.Module | None = getattr(self._local, "model", None)
        if model is None:
            model = self._local.model = copy.deepcopy(self._template)
        return model

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """The parameter table."""
        return self._parameters

    @property
    def num_parameters(self) -> int:
        """Length d of a weight vector."""
        return self._slices[-1].stop

    def descend(
        self, before: Tensor, after: Tensor, batch: Batch, rates: Tensor, *, frozen: Collection[str] = ()
    ) -> Tensor:
        """One step of gradient descent for each client: ``after = before - rate * (sum of gradients)``.

        A parameter at a time: the gradients of all clients are never copied into one array.

        Args:
            before: float32 [d], the weights that all clients have, or [c, d], each client's own.
            after: float32 [c, d], receives the new weights; may be ``before``.
            batch: The clients' examples.
            rates: float32 [c, 1].
            frozen: Names of parameters that stay as they are.

        Returns:
            float32 [c]: each client's summed loss before the step.
        """
        loss: Callable[..., Tensor] = self._summed_loss if batch.keep is None else self._masked_loss
        inputs = [tensor for tensor in batch if tensor is not None]
        of_weights = None if before.dim() == 1 else 0
        over_clients = vmap(grad_and_value(loss), (of_weights, *(0 for _ in inputs), of_weights))
        free = self._split(before)
        fixed = {name: free.pop(name) for name in frozen}
        gradients, losses = over_clients(free, *inputs, fixed)
        where = {p.name: columns for p, columns in zip(self._parameters, self._slices, strict=True)}
        for name in fixed:
            after[:, where[name]] = before[..., where[name]]
        _add(before, ((where[name], gradient) for name, gradient in gradients.items()), rates, after, -1)
        return cast("Tensor", losses)

    def slope(self, weights: Tensor, batch: Batch, *, differentiable: bool = False) -> Slope:
        """The gradients of each client's summed loss, by autograd over the batched model.

        Args:
            weights: float32 [d] or [c, d]; may not change while a differentiable slope is in use, nor may the batch.
            batch: The clients' examples.
            differentiable: Whether ``Slope.hessian_product`` is wanted, which keeps what the backward pass computed.
        """
        here = self._split(weights.detach().expand(len(batch.x), -1))
        leaves = {name: parameter.requires_grad_() for name, parameter in here.items()}
        loss: Callable[..., Tensor] = self._summed_loss if batch.keep is None else self._masked_loss
        inputs = [tensor for tensor in batch if tensor is not None]
        losses = vmap(loss)(leaves, *inputs)
        gradients = torch.autograd.grad(
            losses.sum(), list(leaves.values()), create_graph=differentiable, materialize_grads=True
        )
        return Slope(losses.detach(), tuple(self._slices), tuple(leaves.values()), gradients)

    @torch.no_grad()
    def judge(self, weights: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """How each client's model does on its examples.

        Args:
            weights: float32 [d], one model for all, or [c, d], each client's own.
            batch: The clients' examples.

        Returns:
            Correct answers (first argmax equals the label), int64 [c], and the summed loss, float64 [c].
        """

        def one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            logits = functional_call(self._model, parameters, (x,))
            return logits.argmax(dim=-1) == y, self._loss(logits, y)

        over_clients = vmap(one, (None if weights.dim() == 1 else 0, 0, 0))
        right, losses = over_clients(self._split(weights), batch.x, batch.y)
        if batch.keep is not None:
            right, losses = right & batch.keep, torch.where(batch.keep, losses, 0.0)
        return right.sum(dim=1), losses.sum(dim=1, dtype=torch.float64)

    def bytes_per_client(self, x: Tensor, y: Tensor, *, differentiated_steps: int = 0) -> int:
        """Memory of one client's step, about: its weights and gradients, and what the backward pass keeps, twice.

        Args:
            x: One batch, float32 [B, *feature_shape].
            y: Its labels, int64 [B].
            differentiated_steps: Steps whose differentiable slopes are kept at once, if any: of each its weights and
                all that its backward pass is made of.
        """
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        weights = {p.name: torch.zeros(p.shape, requires_grad=True) for p in self._parameters}
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            self._summed_loss(weights, x, y)
        a_step = 3 * 4 * self.num_parameters + 2 * (sum(kept.values()) + x.nbytes)
        if not differentiated_steps:
            return a_step
        kept.clear()
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            self.slope(torch.zeros(self.num_parameters), Batch(x[None], y[None], None), differentiable=True)
        # Of each its weights and gradients; and once the gradient that goes back, and what comes of it.
        vectors = 4 * self.num_parameters * (2 * differentiated_steps + 2)
        return a_step + vectors + differentiated_steps * (sum(kept.values()) + x.nbytes)

    @torch.no_grad()
    def evaluate(
        self, weights: npt.NDArray[np.float32], x: npt.NDArray[np.float32], y: npt.NDArray[np.int64]
    ) -> Evaluation:
        """Accuracy (first argmax equals the label) and mean loss of float32[d] weights on held-out examples."""
        parameters = self._split(torch.tensor(weights))
        loss = correct = 0.0
        for at in range(0, len(x), _EVALUATION_BATCH):
            labels = torch.tensor(y[at : at + _EVALUATION_BATCH])
            logits = functional_call(self._model, parameters, (torch.tensor(x[at : at + _EVALUATION_BATCH]),))
            loss += float(self._loss(logits, labels).sum(dtype=torch.float64))
            correct += int((logits.argmax(dim=-1) == labels).sum())
        return Evaluation(correct / len(x), loss / len(x), len(x))

    def _split(self, weights: Tensor) -> dict[str, Tensor]:
        """Named parameters as views of [d] or [c, d] weights."""
        return {
            p.name: weights[..., columns].reshape(*weights.shape[:-1], *p.shape)
            for p, columns in zip(self._parameters, self._slices, strict=True)
        }

    def _summed_loss(
        self, parameters: dict[str, Tensor], x: Tensor, y: Tensor, fixed: Mapping[str, Tensor] = _NONE
    ) -> Tensor:
        return self._loss(functional_call(self._model, {**parameters, **fixed}, (x,)), y).sum()

    def _masked_loss(
        self, parameters: dict[str, Tensor], x: Tensor, y: Tensor, keep: Tensor, fixed: Mapping[str, Tensor] = _NONE
    ) -> Tensor:
        losses = self._loss(functional_call(self._model, {**parameters, **fixed}, (x,)), y)
        return torch.where(keep, losses, 0.0).sum()
