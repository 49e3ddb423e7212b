"""``EagerProgram``: the same methods by ordinary PyTorch, as the oracle that exported programs are measured against.

Nothing is shared with ``mobile_export.methods``: masked examples are *removed* instead of masked, and gradients come
from the autograd tape instead of a traced ``torch.func`` transform.
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
            case Role.EVALUATE:
                outputs = self._evaluate(arguments)
            case Role.INFER:
                with torch.no_grad():
                    outputs = (functional_call(self._model, self._parameters(arguments["w"]), (arguments["x"],)),)
        return tuple(np.ascontiguousarray(o.detach().numpy()) for o in outputs)

    def close(self) -> None:
        """Nothing to release."""

    def _parameters(self, w: Tensor) -> dict[str, Tensor]:
        return {
            p.name: w[p.offset : p.offset + p.num_elements].reshape(p.shape).clone().requires_grad_()
            for p in self._manifest.parameters
        }

    def _grad(self, arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        keep = arguments["mask"] > 0
        parameters = self._parameters(arguments["w"])
        count = torch.tensor([float(keep.sum())])
        if not keep.any():
            return torch.zeros(self._manifest.num_parameters), torch.zeros(1), count
        logits = functional_call(self._model, parameters, (arguments["x"][keep],))
        loss = self._loss(logits, arguments["y"][keep]).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in gradients]), loss.reshape(1), count

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
