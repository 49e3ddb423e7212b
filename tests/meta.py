"""A program with every method of meta-learning, by plain autograd, and what sessions with it have to come to.

The program masks, works in float32 and knows the protocol's signatures. The oracle below knows none of that: it removes
what is masked, works in float64 and is written from the definitions in ``client_sdk.protocol.meta_learning``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from client_sdk.protocol.frames import encode_frame
from client_sdk.protocol.program import (
    Manifest,
    MethodSpec,
    ParameterSpec,
    Role,
    TensorSpec,
    parameter_table_hash,
)

# pytest-xdist uses the cores already; torch's threads would wait for one another.
torch.set_num_threads(1)

FEATURES, HIDDEN, CLASSES = 3, 4, 3
_SHAPES = {
    "body.weight": (HIDDEN, FEATURES),
    "body.bias": (HIDDEN,),
    "output.weight": (CLASSES, HIDDEN),
    "output.bias": (CLASSES,),
}
PROGRAM_BYTES = b"stands for program.pte with the methods of meta-learning"


def _table() -> tuple[ParameterSpec, ...]:
    table, offset = [], 0
    for name, shape in _SHAPES.items():
        table.append(ParameterSpec(name=name, shape=shape, offset=offset))
        offset += table[-1].num_elements
    return tuple(table)


PARAMETERS = _table()
D = sum(p.num_elements for p in PARAMETERS)
BODY = sum(p.num_elements for p in PARAMETERS if p.name.startswith("body."))


def method(role: Role, batch: int, steps: int | None = None, planned: int = 0) -> MethodSpec:
    """One method by the protocol's table of signatures."""

    def f32(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=shape)

    def examples(prefix: str = "", *outer: int) -> list[TensorSpec]:
        shape = (*outer, batch)
        labels = TensorSpec(name=f"{prefix}y", dtype="int64", shape=shape)
        return [f32(f"{prefix}x", *shape, FEATURES), labels, f32(f"{prefix}mask", *shape)]

    w, rate = f32("w", D), f32("lr", 1)
    sums = [f32("grad_sum", D), f32("loss_sum", 1), f32("count", 1)]
    inner = examples("inner_", steps or 0)
    inputs, outputs = {
        Role.GRAD: ([w, *examples()], sums),
        Role.TRAIN: ([w, rate, *examples()], [w, f32("loss_sum", 1)]),
        Role.ADAPT: ([w, f32("rates", len(PARAMETERS)), *inner], [w, f32("loss_sums", steps or 0)]),
        Role.REPTILE: ([w, rate, *inner], [f32("delta", D), f32("loss_sums", steps or 0)]),
        Role.MAML: ([w, rate, *inner, *examples()], sums),
        Role.FOMAML: ([w, rate, *inner, *examples()], sums),
        Role.PER_FEDAVG: (
            [w, rate, f32("meta_lr", 1), *examples("inner_"), *examples(), *examples("hessian_")],
            [w, f32("loss_sum", 1), f32("count", 1)],
        ),
    }[role]
    middle = "" if steps is None else f"_k{steps}"
    return MethodSpec(
        name=f"{role.value}{middle}_b{batch}",
        role=role,
        batch_size=batch,
        inner_steps=steps,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        planned_memory_bytes=planned,
    )


ALL_METHODS = (
    method(Role.GRAD, 4),
    method(Role.TRAIN, 4),
    *(method(role, 4, 3) for role in (Role.ADAPT, Role.REPTILE, Role.MAML, Role.FOMAML)),
    method(Role.PER_FEDAVG, 4),
)


def make_manifest(methods: Iterable[MethodSpec] = ALL_METHODS) -> Manifest:
    """Manifest of a program with these methods."""
    return Manifest(
        model_name="meta-toy",
        program_sha256=hashlib.sha256(PROGRAM_BYTES).hexdigest(),
        program_bytes=len(PROGRAM_BYTES),
        initial_weights_sha256="0" * 64,
        executorch_version="1.5.1",
        torch_version="2.13.0",
        content_key="meta-toy",
        operators=(),
        parameters=PARAMETERS,
        parameter_table_sha256=parameter_table_hash(PARAMETERS),
        feature_shape=(FEATURES,),
        num_classes=CLASSES,
        methods=tuple(methods),
    )


def with_roles(*roles: Role) -> Manifest:
    """Manifest of a program with the methods of these roles alone."""
    return make_manifest(m for m in ALL_METHODS if m.role in roles)


def loss_sum(w: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of a small network, summed over the unmasked examples."""
    parts = {p.name: w[p.offset : p.offset + p.num_elements].reshape(p.shape) for p in PARAMETERS}
    hidden = torch.tanh(x @ parts["body.weight"].T + parts["body.bias"])
    logits = hidden @ parts["output.weight"].T + parts["output.bias"]
    return (F.cross_entropy(logits, y, reduction="none") * mask).sum()


class MetaProgram:
    """The ``Program`` protocol by autograd in float32; ``before_run`` may raise or look."""

    def __init__(self, manifest: Manifest | None = None, before_run: Callable[[], None] = lambda: None) -> None:
        self.manifest = manifest or make_manifest()
        self.before_run = before_run
        self.calls: list[str] = []

    def run(self, name: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        spec = self.manifest.named(name)
        spec.check_inputs(inputs)
        self.before_run()
        self.calls.append(name)
        a = {s.name: torch.tensor(array) for s, array in zip(spec.inputs, inputs, strict=True)}
        w = a["w"].requires_grad_()
        outputs: list[Tensor]
        match spec.role:
            case Role.GRAD:
                loss = loss_sum(w, a["x"], a["y"], a["mask"])
                outputs = [_gradient(loss, w), loss.reshape(1), a["mask"].sum().reshape(1)]
            case Role.TRAIN:
                new, loss = _step(w, a["lr"], a["x"], a["y"], a["mask"])
                outputs = [new, loss.reshape(1)]
            case Role.PER_FEDAVG:
                outputs = _per_fedavg(w, a)
            case _:
                outputs = _with_inner_steps(spec.role, w, a)
        return tuple(np.ascontiguousarray(o.detach().numpy()) for o in outputs)

    def close(self) -> None:
        """Nothing to close."""


def _gradient(loss: Tensor, w: Tensor, *, create_graph: bool = False) -> Tensor:
    return torch.autograd.grad(loss, w, create_graph=create_graph)[0]


def _step(w: Tensor, rate: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    loss = loss_sum(w, x, y, mask)
    return w - rate * _gradient(loss, w, create_graph=True) / mask.sum().clamp(min=1), loss


def _with_inner_steps(role: Role, w: Tensor, a: dict[str, Tensor]) -> list[Tensor]:
    rate = a["lr"] if "lr" in a else torch.cat([a["rates"][i].expand(p.num_elements) for i, p in enumerate(PARAMETERS)])
    now, losses = w, []
    for x, y, mask in zip(a["inner_x"], a["inner_y"], a["inner_mask"], strict=True):
        now, loss = _step(now, rate, x, y, mask)
        losses.append(loss)
    if role is Role.ADAPT:
        return [now, torch.stack(losses)]
    if role is Role.REPTILE:
        return [now - w, torch.stack(losses)]
    loss = loss_sum(now, a["x"], a["y"], a["mask"])
    gradient = _gradient(loss, w if role is Role.MAML else now)
    return [gradient, loss.reshape(1), a["mask"].sum().reshape(1)]


def _per_fedavg(w: Tensor, a: dict[str, Tensor]) -> list[Tensor]:
    adapted, _ = _step(w, a["lr"], a["inner_x"], a["inner_y"], a["inner_mask"])
    loss, count = loss_sum(adapted, a["x"], a["y"], a["mask"]), a["mask"].sum()
    direction = (_gradient(loss, adapted) / count).detach()
    curving = loss_sum(w, a["hessian_x"], a["hessian_y"], a["hessian_mask"]) / a["hessian_mask"].sum()
    product = _gradient((_gradient(curving, w, create_graph=True) * direction).sum(), w)
    meta = direction - a["lr"] * product
    return [w - a["meta_lr"] * meta, loss.reshape(1), count.reshape(1)]


Examples = tuple[np.ndarray, np.ndarray]


def make_weights(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, D).astype(np.float32)


def make_examples(n: int = 20, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, FEATURES)).astype(np.float32), rng.integers(0, CLASSES, n)


def make_model(weights: np.ndarray) -> bytes:
    """A model's frame."""
    return encode_frame({p.name: weights[p.offset : p.offset + p.num_elements].reshape(p.shape) for p in PARAMETERS})


class Oracle:
    """The definitions, in float64, over a device's examples."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self._x, self._y = torch.tensor(x, dtype=torch.float64), torch.tensor(y)

    def mean_loss(self, w: Tensor, rows: Sequence[int] | np.ndarray) -> Tensor:
        picked = torch.tensor(np.asarray(rows))
        return loss_sum(w, self._x[picked], self._y[picked], torch.ones(len(picked), dtype=torch.float64)) / len(picked)

    def adapted(
        self, w: Tensor, batches: Sequence[np.ndarray], rate: float, *, through: bool = False
    ) -> tuple[Tensor, list[float]]:
        """U_K(w), differentiable where asked for, and the loss of each step."""
        losses = []
        for rows in batches:
            w = w if w.requires_grad else w.detach().requires_grad_()
            loss = self.mean_loss(w, rows)
            losses.append(float(loss.detach()))
            w = w - rate * torch.autograd.grad(loss, w, create_graph=through)[0]
        return w, losses

    def meta_gradient(
        self,
        start: np.ndarray,
        support: Sequence[np.ndarray],
        query: Sequence[np.ndarray],
        rate: float,
        *,
        first_order: bool,
    ) -> tuple[np.ndarray, float]:
        w = torch.tensor(start, dtype=torch.float64).requires_grad_()
        adapted, _ = self.adapted(w, support, rate, through=not first_order)
        if first_order:
            adapted = adapted.detach().requires_grad_()
        loss = self.mean_loss(adapted, np.concatenate(query))
        return torch.autograd.grad(loss, adapted if first_order else w)[0].numpy(), float(loss.detach())

    def per_fedavg(
        self,
        start: np.ndarray,
        support: Sequence[np.ndarray],
        query: Sequence[np.ndarray],
        hessian: Sequence[np.ndarray],
        rate: float,
        meta_rate: float,
    ) -> tuple[np.ndarray, float]:
        """Sum of the local meta-gradients, by a Hessian that is written out; mean query loss."""
        w = torch.tensor(start, dtype=torch.float64)
        total, loss, count = torch.zeros_like(w), 0.0, 0
        for d, d1, d2 in zip(support, query, hessian, strict=True):
            adapted = self.adapted(w, [d], rate)[0].detach().requires_grad_()
            of_query = self.mean_loss(adapted, d1)
            curvature = torch.autograd.functional.hessian(lambda v, rows=d2: self.mean_loss(v, rows), w.detach())
            identity = torch.eye(len(w), dtype=torch.float64)
            meta = (identity - rate * curvature) @ torch.autograd.grad(of_query, adapted)[0]
            loss, count = loss + float(of_query.detach()) * len(d1), count + len(d1)
            total, w = total + meta, w - meta_rate * meta
        return total.numpy(), loss / count
