"""``EagerProgram``: the same methods by ordinary PyTorch, as the oracle that exported programs are measured against.

Nothing is shared with ``mobile_export.methods`` and ``mobile_export.meta_methods``: masked examples are *removed*
instead of masked, and gradients come from the autograd tape, through all inner steps, instead of a traced
``torch.func`` transform.
"""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn
from torch.func import functional_call

from client_sdk.protocol.field import MERSENNE_61
from client_sdk.protocol.program import NORM_LIMB_BITS, Manifest, MethodSpec, Role
from client_sdk.protocol.sharing_kernels import extrapolate
from mobile_export.methods import Loss

_Examples = tuple[Tensor, Tensor]
"""Features and labels."""


class EagerProgram:
    """The ``Program`` protocol over an ``nn.Module``: no ExecuTorch, no exported graph.

    Args:
        model: The module that was exported; neither its parameters nor its state are read or changed.
        manifest: Manifest of the exported program: signatures and parameter table.
        loss: Per-example loss; cross-entropy by default.
    """

    def __init__(self, model: nn.Module, manifest: Manifest, loss: Loss | None = None) -> None:
        self._model = model
        self._manifest = manifest
        self._loss = loss or _cross_entropy

    @property
    def manifest(self) -> Manifest:
        """Signatures, parameter table and hashes."""
        return self._manifest

    def run(self, method: str, *inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
        """Run one method by name; see ``Program.run``."""
        spec = self._manifest.named(method)
        spec.check_inputs(inputs)
        if spec.role is Role.SHARE:
            return _share(spec, *inputs)
        arguments = {s.name: torch.tensor(a) for s, a in zip(spec.inputs, inputs, strict=True)}
        match spec.role:
            case Role.GRAD:
                outputs: tuple[Tensor, ...] = self._grad(arguments)
            case Role.TRAIN:
                grad_sum, loss_sum, count = self._grad(arguments)
                step = arguments["lr"] * grad_sum / max(float(count), 1.0)
                outputs = (arguments["w"] - step, loss_sum)
            case Role.ADAPT:
                rates = dict(zip((p.name for p in self._manifest.parameters), arguments["rates"], strict=True))
                parameters, loss_sums = self._adapt(self._parameters(arguments["w"]), rates, _steps(arguments))
                outputs = (_flat(parameters), loss_sums)
            case Role.REPTILE:
                parameters, loss_sums = self._adapt(
                    self._parameters(arguments["w"]), self._alike(arguments), _steps(arguments)
                )
                outputs = (_flat(parameters) - arguments["w"], loss_sums)
            case Role.MAML | Role.FOMAML:
                outputs = self._meta_gradient(arguments, second_order=spec.role is Role.MAML)
            case Role.PER_FEDAVG:
                outputs = self._local_meta_step(arguments)
            case Role.EVALUATE:
                outputs = self._evaluate(arguments)
            case Role.INFER:
                with torch.no_grad():
                    outputs = (functional_call(self._model, self._parameters(arguments["w"]), (arguments["x"],)),)
        return tuple(np.ascontiguousarray(o.detach().numpy()) for o in outputs)

    def mean_gradient(
        self, w: npt.NDArray[Any], x: npt.NDArray[Any], y: npt.NDArray[Any], mask: npt.NDArray[Any]
    ) -> npt.NDArray[np.float32]:
        """Gradient ``[d]`` of the unmasked examples' mean loss, for a batch of any size; 0 if there are none."""
        given = {"w": w, "x": x, "y": y, "mask": mask}
        grad_sum, _, count = self._grad({name: torch.tensor(array) for name, array in given.items()})
        mean: npt.NDArray[np.float32] = (grad_sum / max(float(count), 1.0)).numpy()
        return mean

    def close(self) -> None:
        """Nothing to release."""

    def _parameters(self, w: Tensor) -> dict[str, Tensor]:
        return {
            p.name: w[p.offset : p.offset + p.num_elements].reshape(p.shape).clone().requires_grad_()
            for p in self._manifest.parameters
        }

    def _grad(self, arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        parameters, batch = self._parameters(arguments["w"]), _batch(arguments)
        loss = self._loss_sum(parameters, batch)
        return _flat(_gradients(loss, parameters)), loss.reshape(1), _count(batch)

    def _meta_gradient(self, arguments: dict[str, Tensor], *, second_order: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the query loss after the inner steps: by the weights before them, or by those after them."""
        start, query = self._parameters(arguments["w"]), _batch(arguments)
        adapted, _ = self._adapt(start, self._alike(arguments), _steps(arguments))
        loss = self._loss_sum(adapted, query)
        return _flat(_gradients(loss, start if second_order else adapted)), loss.reshape(1), _count(query)

    def _local_meta_step(self, arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Per-FedAvg with the Hessian's row products: the gradient of <gradient, v> for a v that is held fixed."""
        start, query, rates = self._parameters(arguments["w"]), _batch(arguments), self._alike(arguments)
        adapted, _ = self._adapt(start, rates, [_batch(arguments, "inner_")])
        loss = self._loss_sum(adapted, query)
        outer = _flat(_gradients(loss, adapted)).detach() / max(float(_count(query)), 1.0)
        curving = _batch(arguments, "hessian_")
        mean = self._loss_sum(start, curving) / max(float(_count(curving)), 1.0)
        slope = _flat(_gradients(mean, start, again=True)) @ outer
        step = outer - arguments["lr"] * _flat(_gradients(slope, start))
        return arguments["w"] - arguments["meta_lr"] * step, loss.reshape(1), _count(query)

    def _adapt(
        self, parameters: dict[str, Tensor], rates: dict[str, Tensor], steps: list[_Examples]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradient descent on the tape: what comes out can be differentiated by what went in."""
        losses = []
        for batch in steps:
            loss = self._loss_sum(parameters, batch)
            losses.append(loss.detach())
            gradients = _gradients(loss / max(float(_count(batch)), 1.0), parameters, again=True)
            parameters = {name: value - rates[name] * gradients[name] for name, value in parameters.items()}
        return parameters, torch.stack(losses)

    def _alike(self, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        return {p.name: arguments["lr"][0] for p in self._manifest.parameters}

    def _loss_sum(self, parameters: dict[str, Tensor], batch: _Examples) -> Tensor:
        x, y = batch
        if not len(y):
            # Of no parameter's making, and still on the tape.
            return _flat(parameters).sum() * 0.0
        return self._loss(functional_call(self._model, parameters, (x,)), y).sum()

    @torch.no_grad()
    def _evaluate(self, arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        keep = arguments["mask"] > 0
        y = arguments["y"][keep]
        if not keep.any():
            return torch.zeros(1), torch.zeros(1), torch.zeros(1)
        logits = functional_call(self._model, self._parameters(arguments["w"]), (arguments["x"][keep],))
        correct = sum(int(row.argmax()) == int(label) for row, label in zip(logits, y, strict=True))
        return (
            self._loss(logits, y).sum().reshape(1),
            torch.tensor([float(correct)]),
            torch.tensor([float(keep.sum())]),
        )


def _batch(arguments: dict[str, Tensor], prefix: str = "") -> _Examples:
    """The examples of a batch that are not masked."""
    keep = arguments[f"{prefix}mask"] > 0
    return arguments[f"{prefix}x"][keep], arguments[f"{prefix}y"][keep]


def _steps(arguments: dict[str, Tensor]) -> list[_Examples]:
    inner = (arguments[name] for name in ("inner_x", "inner_y", "inner_mask"))
    return [_batch({"x": x, "y": y, "mask": mask}) for x, y, mask in zip(*inner, strict=True)]


def _count(batch: _Examples) -> Tensor:
    return torch.tensor([float(len(batch[1]))])


def _gradients(loss: Tensor, parameters: dict[str, Tensor], *, again: bool = False) -> dict[str, Tensor]:
    """Gradients by name; with ``again`` such that they can be differentiated, too."""
    if not loss.requires_grad:
        # A gradient that is the same everywhere, that of no example among them, has no slope.
        return {name: torch.zeros_like(value) for name, value in parameters.items()}
    gradients = torch.autograd.grad(
        loss,
        list(parameters.values()),
        create_graph=again,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(parameters, gradients, strict=True))


def _flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


def _share(
    spec: MethodSpec,
    update: npt.NDArray[Any],
    clip_factor: npt.NDArray[Any],
    scale: npt.NDArray[Any],
    *drawn: npt.NDArray[Any],
) -> tuple[npt.NDArray[np.generic], ...]:
    """The protocol's own code on the same codes; the limbs by Python's integers."""
    clipped = (update.astype(np.float64) * clip_factor).astype(np.float32)
    codes = np.rint(clipped.astype(np.float64) * scale).astype(np.int64)
    size = 1 << NORM_LIMB_BITS
    limbs = [(int(c) % size, int(c) // size % size, int(c) // size**2) for c in codes]
    norm = [sum(limb[i] * limb[j] for limb in limbs) for i, j in combinations_with_replacement(range(3), 2)]
    values = [MERSENNE_61.from_signed(codes), *(np.ascontiguousarray(v).view(np.uint64) for v in drawn)]
    shares = extrapolate(values, len(spec.outputs) - 1, MERSENNE_61)
    return (np.array(norm, np.int64), *(share.view(np.int64) for share in shares))


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")
