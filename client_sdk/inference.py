"""Serving a personal model: logits and answers for any number of examples, in float or in int8, and what that takes.

Float runs the program's ``infer`` methods with the whole personal weights. Int8 runs ``infer_int8``: a body that was
quantised once, from one global model, behind which each device's own head runs in float. It serves weights that differ
from that global model in the head alone; anything else is refused, because the body would be another model's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from client_sdk.errors import Int8Refused, PersonalBody, StaleBody
from client_sdk.footprint import BASELINE_BYTES, MemoryEstimate, MemoryItem
from client_sdk.protocol.errors import ConfigurationError, ProgramInputError, UnknownMethod
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Float32Array, Manifest, MethodSpec, ParameterSpec, Program, Role, body_hash

_WARM_UP_CALLS = 3
_PROGRAM_COPIES = 2  # as read to be hashed, and the runtime's own


class Precision(StrEnum):
    """What a personal model is served in."""

    FLOAT = "float"
    """The whole model in float32."""

    INT8 = "int8"
    """A float head over a body that is frozen in int8."""

    AUTO = "auto"
    """Int8 where the program's body is that of the weights, else float."""


@dataclass(frozen=True)
class Latency:
    """Durations of calls of one method, in seconds of the caller's clock.

    Attributes:
        calls: How many were timed.
        batch_size: Examples of each.
        median_s: Median.
        p90_s: 90 % of the calls took no longer.
    """

    calls: int
    batch_size: int
    median_s: float
    p90_s: float

    def __str__(self) -> str:
        """``1.23 ms (90 % within 1.50 ms) for batches of 8, 50 calls``."""
        return (
            f"{self.median_s * 1e3:.3g} ms (90 % within {self.p90_s * 1e3:.3g} ms) for batches of {self.batch_size}, "
            f"{self.calls} calls"
        )


class PersonalInference:
    """A program with one device's weights.

    Float keeps the weights that it is given, not a copy; int8 keeps the head's values alone, so that the rest of them
    can be released.

    Attributes:
        precision: What it runs in: float or int8.
        refusal: With ``auto``, why it does not run in int8; else None.
    """

    def __init__(
        self,
        program: Program,
        weights: Float32Array,
        *,
        precision: str = Precision.FLOAT,
        global_weights: Float32Array | None = None,
        monotonic: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Choose the methods.

        Args:
            program: With ``infer`` methods, or ``infer_int8`` methods, or both. Whoever opened it closes it.
            weights: The personal model, float32 ``[d]``; the global model where nothing is personal.
            precision: ``"float"``, ``"int8"`` or ``"auto"``.
            global_weights: The global model that ``weights`` were adapted from, float32 ``[d]``. Only read where int8
                is refused, to say whose fault it is.
            monotonic: Clock that ``latency`` reads, in seconds.

        Raises:
            UnknownMethod: The program has no method for it.
            StaleBody, PersonalBody: Int8 is asked for, and the program's body is not that of the weights.
            ProgramInputError: Weights that are not finite float32 ``[d]``.
            ConfigurationError: An unknown precision.
        """
        wanted = known_precision(precision)
        self._program = program
        self._monotonic = monotonic
        manifest = program.manifest
        _check_weights("the personal weights", weights, manifest)
        if global_weights is not None:
            _check_weights("the global weights", global_weights, manifest)
        self.precision = Precision.FLOAT
        self.refusal: Int8Refused | UnknownMethod | None = None
        self._own = weights
        if wanted is not Precision.FLOAT:
            try:
                self._own = int8_head(manifest, weights, global_weights)
                self.precision = Precision.INT8
            except (Int8Refused, UnknownMethod) as e:
                if wanted is Precision.INT8:
                    raise
                self.refusal = e
        self._role = Role.INFER_INT8 if self.precision is Precision.INT8 else Role.INFER
        self._sizes = manifest.batch_sizes(self._role)
        if not self._sizes:
            raise UnknownMethod(f"{manifest.model_name} has no infer method: export it with --batch-sizes infer=1,32")

    def logits(self, x: npt.ArrayLike) -> Float32Array:
        """Logits of examples.

        They are run in the program's batch sizes, the largest that fits first; only where none fits is one filled up
        with zeros.

        Args:
            x: Float32 ``[n, *feature_shape]``, any n.

        Returns:
            Float32 ``[n, num_classes]``.

        Raises:
            ProgramInputError: Another shape, or not numbers.
            ProgramExecutionError: The runtime failed.
        """
        examples = self._examples(x)
        n = len(examples)
        if n == 0:
            return np.empty((0, self._program.manifest.num_classes), np.float32)
        parts, start = [], 0
        for size in batches(n, self._sizes):
            batch = examples[start : start + size]
            if len(batch) < size:
                batch = np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), np.float32)])
            parts.append(self._run(self._method(size), batch)[: n - start])
            start += size
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def predict(self, x: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The likeliest class of each example, int64 ``[n]``; of two that are equal the first. See ``logits``."""
        answers: npt.NDArray[np.int64] = self.logits(x).argmax(axis=1)
        return answers

    def latency(self, *, calls: int = 30, batch_size: int | None = None) -> Latency:
        """Time calls of one method, after a few that do not count.

        Args:
            calls: How many to time.
            batch_size: One of the program's; by default the smallest.

        Raises:
            UnknownMethod: No method of this batch size.
            ConfigurationError: Fewer than one call.
        """
        if calls < 1:
            raise ConfigurationError(f"at least one call has to be timed, not {calls}")
        method = self._method(min(self._sizes) if batch_size is None else batch_size)
        batch = np.zeros((method.batch_size, *self._program.manifest.feature_shape), np.float32)
        for _ in range(_WARM_UP_CALLS):
            self._run(method, batch)
        durations = []
        for _ in range(calls):
            begun = self._monotonic()
            self._run(method, batch)
            durations.append(self._monotonic() - begun)
        durations.sort()
        return Latency(calls, method.batch_size, statistics.median(durations), durations[-(-9 * calls // 10) - 1])

    def memory(
        self, *, batch_size: int | None = None, baseline_bytes: int = BASELINE_BYTES["native"]
    ) -> MemoryEstimate:
        """What serving takes, item by item, from the manifest.

        In int8, XNNPACK's own copy of the body counts; its working memory (a batch's activations, a byte each) is not
        in the manifest and does not.

        Args:
            batch_size: One of the program's; by default the largest, because a method that is never called costs
                nothing.
            baseline_bytes: What the process takes without it.

        Raises:
            UnknownMethod: No method of this batch size.
        """
        manifest = self._program.manifest
        method = self._method(max(self._sizes) if batch_size is None else batch_size)
        items = {
            "process": baseline_bytes,
            "program": _PROGRAM_COPIES * manifest.program_bytes,
            f"planned memory of {method.name}": method.planned_memory_bytes,
            "weights" if self.precision is Precision.FLOAT else "head": self._own.nbytes,
            "packed int8 body": manifest.num_parameters - self._own.size,
            "examples and logits": sum(t.num_bytes for t in (*method.inputs[1:], *method.outputs)),
        }
        by_batch = {f"planned memory of {method.name}", "examples and logits"}
        return MemoryEstimate(tuple(MemoryItem(name, size, name in by_batch) for name, size in items.items() if size))

    def _method(self, batch_size: int) -> MethodSpec:
        return self._program.manifest.method(self._role, batch_size)

    def _run(self, method: MethodSpec, batch: Float32Array) -> Float32Array:
        [logits] = self._program.run(method.name, self._own, np.ascontiguousarray(batch))
        return logits.astype(np.float32, copy=False)

    def _examples(self, x: npt.ArrayLike) -> Float32Array:
        try:
            examples = np.asarray(x, np.float32)
        except (TypeError, ValueError) as e:
            raise ProgramInputError(f"examples must be numbers: {e}") from e
        shape = self._program.manifest.feature_shape
        if examples.ndim != len(shape) + 1 or examples.shape[1:] != shape:
            raise ProgramInputError(f"examples must be float32 {['n', *shape]}, got {list(examples.shape)}")
        if not np.isfinite(examples).all():
            raise ProgramInputError("examples hold NaN or infinite values")
        return examples


def known_precision(name: str) -> Precision:
    """A precision by its name.

    Raises:
        ConfigurationError: There is none of it.
    """
    try:
        return Precision(name)
    except ValueError as e:
        raise ConfigurationError(f"unknown precision {name!r}; choose one of {[p.value for p in Precision]}") from e


def batches(n: int, sizes: tuple[int, ...]) -> Iterator[int]:
    """Batch sizes that n examples are run in: the largest that fits, and where none does the smallest there is.

    Args:
        n: Number of examples.
        sizes: What there is, ascending; at least one.

    >>> list(batches(75, (1, 32)))[:4], list(batches(11, (8, 32)))
    ([32, 32, 1, 1], [8, 8])
    """
    while n > 0:
        size = max((s for s in sizes if s <= n), default=sizes[0])
        yield size
        n -= size


def int8_head(manifest: Manifest, weights: Float32Array, global_weights: Float32Array | None = None) -> Float32Array:
    """Cut the head out of weights that the program's int8 body serves.

    Args:
        manifest: Of the program.
        weights: Float32 ``[d]``.
        global_weights: The global model that they were adapted from, float32 ``[d]``, for the message of a refusal.

    Returns:
        Float32 ``[h]``, a copy.

    Raises:
        UnknownMethod: The program has no int8 method.
        PersonalBody: The weights differ from the quantised global model outside of the head.
        StaleBody: The body was quantised from another global model; or from another body, where no global model tells.
    """
    method = manifest.method(Role.INFER_INT8)
    layers = SharedLayers(manifest.parameters, method.head or ())
    if body_hash(layers.gather(weights)) == method.body_sha256:
        return layers.personal_of(weights)
    if global_weights is not None and body_hash(layers.gather(global_weights)) == method.body_sha256:
        own = tuple(
            p.name
            for p in manifest.parameters
            if p.name not in layers.personal and _value(p, weights) != _value(p, global_weights)
        )
        raise PersonalBody(own, layers.personal)
    raise StaleBody(manifest.model_name, known=global_weights is not None)


def _value(parameter: ParameterSpec, weights: Float32Array) -> bytes:
    return weights[parameter.offset : parameter.offset + parameter.num_elements].tobytes()


def _check_weights(what: str, weights: Float32Array, manifest: Manifest) -> None:
    if weights.dtype != np.float32 or weights.shape != (manifest.num_parameters,):
        raise ProgramInputError(
            f"{what} of {manifest.model_name} are float32 [{manifest.num_parameters}], not {weights.dtype} "
            f"{list(weights.shape)}"
        )
    if not weights.flags.c_contiguous:
        raise ProgramInputError(f"{what} must be C-contiguous")
    if not np.isfinite(weights).all():
        raise ProgramInputError(f"{what} hold NaN or infinite values")
