"""What an exported program is: the manifest's schema and the ``Program`` protocol. No I/O, no runtime.

A bundle is a folder with ``program.pte``, ``manifest.json`` and ``weights.safetensors`` (the initial weights).
Every method is functional: all tensors in, all tensors out. Roles and signatures (B = batch size, d = number of
parameters, ``x`` has the manifest's ``feature_shape`` after the batch axis):

=========  ====================================  =========================================
role       inputs                                outputs
=========  ====================================  =========================================
grad       w[d], x[B, ...], y[B], mask[B]        grad_sum[d], loss_sum[1], count[1]
train      w[d], lr[1], x[B, ...], y[B], mask    w[d], loss_sum[1]
evaluate   w[d], x[B, ...], y[B], mask[B]        loss_sum[1], correct[1], count[1]
infer      w[d], x[B, ...]                       logits[B, ...]
share      update[d], clip_factor[1], scale[1],  norm_limbs[6], share_t[d], ..., share_n[d]
           share_1[d], ..., share_(t-1)[d]
adapt      w[d], rates[P], inner_x[K, B, ...],   w[d], loss_sums[K]
           inner_y[K, B], inner_mask[K, B]
reptile    w[d], lr[1], inner_x, inner_y,        delta[d], loss_sums[K]
           inner_mask
maml,      w[d], lr[1], inner_x, inner_y,        grad_sum[d], loss_sum[1], count[1]
fomaml     inner_mask, x[B, ...], y[B], mask[B]
per_fedavg w[d], lr[1], meta_lr[1], inner_x[B,   w[d], loss_sum[1], count[1]
           ...], inner_y[B], inner_mask[B], x[B,
           ...], y[B], mask[B], hessian_x[B,
           ...], hessian_y[B], hessian_mask[B]
=========  ====================================  =========================================

``adapt``, ``reptile``, ``maml`` and ``fomaml`` take K steps of gradient descent in one call, K being the method's
``inner_steps``; step k is ``train`` on batch k, and one whose examples are all masked changes nothing, so that fewer
steps are a matter of the mask. ``rates`` has a learning rate for each of the P parameters in table order: 0 freezes a
layer. ``grad_sum``, ``loss_sum`` and ``count`` are sums over the unmasked query examples ``x`` at the adapted weights;
``maml``'s is the gradient with respect to ``w``, ``fomaml``'s that with respect to the adapted weights. ``per_fedavg``
is one local meta step (``meta_learning``); its loss and count are those of the query examples.

``infer_int8`` takes the weights of the float layers behind a frozen int8 body: ``head[h], x[B, ...] -> logits``. Its
manifest entry names the head's parameters, whose values ``head`` holds one after another in table order, and has the
hash of the body that was quantised: it serves weights whose other parameters have this hash.

``grad`` returns *sums* over the unmasked examples, so that accumulation over slices equals one big batch;
``train`` is the fused step ``w - lr * grad_sum / count``. ``y`` is int64, everything else float32.

``share``, which a program need not have, clips and encodes an update and splits it modulo 2**61 - 1: see
``norm_squared`` and ``mobile_export.sharing``. Shares and ``norm_limbs`` are int64, the factors float64. It has no
batch size; its manifest entry says 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from enum import StrEnum
from typing import Final, Literal, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from client_sdk.protocol.errors import ManifestError, ProgramInputError, UnknownMethod

MANIFEST_FORMAT: Final = 1
PROGRAM_FILE = "program.pte"
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"

NORM_LIMB_BITS: Final = 20
"""Of the two lower limbs that a code is taken apart into, ``code = low + middle * 2**20 + high * 2**40``."""

MAX_METHODS: Final = 256
"""Of a program: a few roles, each in a few batch sizes."""
_MAX_TENSORS: Final = 1024  # of a method: those of an update in 255 shares, with room
_MAX_OPERATORS: Final = 4096
_MAX_PARAMETERS: Final = 65536

Float32Array = npt.NDArray[np.float32]


class Role(StrEnum):
    """What a method does; its signature follows from it."""

    GRAD = "grad"
    TRAIN = "train"
    EVALUATE = "evaluate"
    INFER = "infer"
    SHARE = "share"
    ADAPT = "adapt"
    REPTILE = "reptile"
    MAML = "maml"
    FOMAML = "fomaml"
    PER_FEDAVG = "per_fedavg"
    INFER_INT8 = "infer_int8"


WITH_INNER_STEPS: Final = frozenset({Role.ADAPT, Role.REPTILE, Role.MAML, Role.FOMAML})
"""Roles whose methods take a fixed number of steps in one call."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Frozen):
    """Name, dtype and fixed shape of one input or output."""

    name: str
    dtype: Literal["float32", "float64", "int32", "int64", "bool", "uint8", "int8"]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the dense tensor in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class MethodSpec(_Frozen):
    """One method of the program."""

    name: str
    role: Role
    batch_size: int = Field(ge=1)
    inner_steps: int | None = Field(
        None, ge=1, description="K, of methods that take K steps in one call", exclude_if=lambda value: value is None
    )
    head: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        max_length=_MAX_PARAMETERS,
        description="parameters that are not frozen in an int8 body, in table order",
        exclude_if=lambda value: value is None,
    )
    body_sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="body_hash of the float32 parameters that were quantised",
        exclude_if=lambda value: value is None,
    )
    inputs: tuple[TensorSpec, ...] = Field(max_length=_MAX_TENSORS)
    outputs: tuple[TensorSpec, ...] = Field(max_length=_MAX_TENSORS)
    planned_memory_bytes: int = Field(ge=0, description="what ExecuTorch's memory plan reserves for one call")

    def check_inputs(self, inputs: tuple[npt.NDArray[np.generic], ...]) -> None:
        """Compare arrays with the signature.

        Raises:
            ProgramInputError: Wrong number, dtype or shape, or an array that is not C-contiguous.
        """
        if len(inputs) != len(self.inputs):
            raise ProgramInputError(f"{self.name} takes {len(self.inputs)} inputs, got {len(inputs)}")
        for spec, array in zip(self.inputs, inputs, strict=True):
            if array.dtype != spec.dtype or array.shape != spec.shape:
                raise ProgramInputError(
                    f"{self.name}: input {spec.name!r} must be {spec.dtype}{list(spec.shape)}, "
                    f"got {array.dtype}{list(array.shape)}"
                )
            if not array.flags.c_contiguous:
                raise ProgramInputError(f"{self.name}: input {spec.name!r} must be C-contiguous")


class ParameterSpec(_Frozen):
    """One named parameter inside the flat weight vector."""

    name: str
    shape: tuple[int, ...]
    offset: int = Field(ge=0, description="first element in the flat vector")

    @property
    def num_elements(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


def norm_squared(norm_limbs: npt.NDArray[np.int64]) -> int:
    """The codes' squared norm, exactly, from the sums of products of their limbs that ``share`` gives.

    Args:
        norm_limbs: int64 ``[6]``: sums of low*low, low*middle, low*high, middle*middle, middle*high, high*high.
    """
    ll, lm, lh, mm, mh, hh = norm_limbs.tolist()
    return int(
        ll
        + (2 * lm << NORM_LIMB_BITS)
        + (2 * lh + mm << 2 * NORM_LIMB_BITS)
        + (2 * mh << 3 * NORM_LIMB_BITS)
        + (hh << 4 * NORM_LIMB_BITS)
    )


def parameter_table_hash(parameters: tuple[ParameterSpec, ...]) -> str:
    """SHA-256 (hex) of the canonical JSON of the parameter table; both ends compare it, never the table."""
    table = [[p.name, list(p.shape), p.offset] for p in parameters]
    return hashlib.sha256(json.dumps(table, separators=(",", ":")).encode()).hexdigest()


def body_hash(body: Float32Array) -> str:
    """SHA-256 (hex) of the values of a body: the parameters that are not the head's, in table order, ``[d - h]``."""
    return hashlib.sha256(body.astype("<f4", copy=False).tobytes()).hexdigest()


class Manifest(_Frozen):
    """Everything about a program that can be known without running it."""

    format: Literal[1] = MANIFEST_FORMAT
    model_name: str
    program_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    program_bytes: int = Field(gt=0)
    initial_weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    executorch_version: str
    torch_version: str
    content_key: str = Field(description="hash of everything the export depends on; the key of the export cache")
    operators: tuple[str, ...] = Field(max_length=_MAX_OPERATORS)
    parameters: tuple[ParameterSpec, ...] = Field(max_length=_MAX_PARAMETERS)
    parameter_table_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    feature_shape: tuple[int, ...] = Field(description="shape of one example, without the batch axis")
    num_classes: int = Field(ge=1)
    methods: tuple[MethodSpec, ...] = Field(max_length=MAX_METHODS)
    constants: dict[str, int | float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        offset = 0
        for p in self.parameters:
            if p.offset != offset:
                raise ValueError(f"parameter {p.name!r} starts at {p.offset}, expected {offset}")
            offset += p.num_elements
        if offset == 0:
            raise ValueError("the model has no parameters")
        if parameter_table_hash(self.parameters) != self.parameter_table_sha256:
            raise ValueError("parameter_table_sha256 does not match the parameter table")
        names = [m.name for m in self.methods]
        if len(set(names)) != len(names):
            raise ValueError("two methods share a name")
        for m in self.methods:
            self._check_head(m)
        return self

    def _check_head(self, method: MethodSpec) -> None:
        if (method.role is Role.INFER_INT8) != (method.head is not None and method.body_sha256 is not None):
            raise ValueError(f"{method.name}: head and body_sha256 are an int8 method's, and it needs both")
        if method.head is not None:
            found = {p.name: p.num_elements for p in self.parameters if p.name in method.head}
            size = sum(found.values())
            if tuple(found) != method.head or method.inputs[:1] != (
                TensorSpec(name="head", dtype="float32", shape=(size,)),
            ):
                raise ValueError(f"{method.name}: its head is not {size} values of parameters in table order")

    @property
    def num_parameters(self) -> int:
        """Length d of the flat weight vector."""
        last = self.parameters[-1]
        return last.offset + last.num_elements

    def batch_sizes(self, role: Role) -> tuple[int, ...]:
        """Batch sizes exported for a role, ascending."""
        return tuple(sorted(m.batch_size for m in self.methods if m.role is role))

    def method(self, role: Role, batch_size: int | None = None) -> MethodSpec:
        """The method of a role; the largest batch size unless one is named.

        Raises:
            UnknownMethod: No such role or batch size in this program.
        """
        found = [m for m in self.methods if m.role is role and batch_size in (None, m.batch_size)]
        if not found:
            raise UnknownMethod(
                f"{self.model_name} has no {role.value} method for batch size {batch_size}; "
                f"it has {list(self.batch_sizes(role))}"
            )
        return max(found, key=lambda m: m.batch_size)

    def adapting_method(self, role: Role, batch_size: int, inner_steps: int) -> MethodSpec:
        """The method of a role in ``WITH_INNER_STEPS`` that takes these steps: the fewest that are enough.

        Raises:
            UnknownMethod: None of this batch size takes as many; the message lists what there is.
        """
        found = [m for m in self.methods if m.role is role and m.batch_size == batch_size]
        enough = [m for m in found if m.inner_steps is not None and m.inner_steps >= inner_steps]
        if not enough:
            there = [f"{m.name} ({m.inner_steps} steps)" for m in self.methods if m.role is role] or "none"
            raise UnknownMethod(
                f"{self.model_name} has no {role.value} method for batches of {batch_size} and {inner_steps} steps; it "
                f"has {there}: export it with --batch-sizes {role.value}={batch_size} --inner-steps {inner_steps}"
            )
        return min(enough, key=lambda m: m.inner_steps or 0)

    def training_method(self, batch_size: int) -> MethodSpec:
        """The method that trains in batches of this size: the fused step, else sums over the largest fitting slices.

        Raises:
            UnknownMethod: The program can do neither; the message lists what it can.
        """
        fused, slices = self.batch_sizes(Role.TRAIN), self.batch_sizes(Role.GRAD)
        if batch_size in fused:
            return self.method(Role.TRAIN, batch_size)
        fitting = [size for size in slices if batch_size % size == 0]
        if fitting:
            return self.method(Role.GRAD, max(fitting))
        raise UnknownMethod(
            f"{self.model_name} cannot train with batch size {batch_size}; choose one of {list(fused)} "
            f"or a multiple of one of {list(slices)}"
        )

    def named(self, name: str) -> MethodSpec:
        """The method called ``name``.

        Raises:
            UnknownMethod: No such method.
        """
        for m in self.methods:
            if m.name == name:
                return m
        raise UnknownMethod(f"{self.model_name} has no method {name!r}; it has {[m.name for m in self.methods]}")

    def to_json(self) -> str:
        """Indented, key-ordered JSON, as written to ``manifest.json``."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse ``manifest.json``.

        Raises:
            ManifestError: Not JSON, or not this schema.
        """
        try:
            return cls.model_validate_json(text)
        except ValueError as e:
            raise ManifestError(f"unreadable manifest: {e}") from e


@runtime_checkable
class Program(Protocol):
    """A program that can be run: the native shim, the official bindings, or eager PyTorch as the oracle.

    An instance is used by one thread at a time. Outputs are fresh arrays that the caller owns; inputs are not
    changed and not kept.
    """

    @property
    def manifest(self) -> Manifest:
        """Signatures, parameter table and hashes."""
        ...

    def run(self, method: str, *inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
        """Run one method by name.

        Raises:
            UnknownMethod: No such method.
            ProgramInputError: Inputs that do not fit its signature.
            ProgramExecutionError: The runtime failed.
        """
        ...

    def close(self) -> None:
        """Release the runtime's memory. The program cannot be used afterwards."""
        ...
