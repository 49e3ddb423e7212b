"""``CompressedGradientAggregator``: the specification's class for sparse updates, over the codecs of the protocol.

In the product the device compresses and keeps what it did not send (``client_sdk.protocol.compression``, in its own
checkpoint), and the server decodes bytes. The specification's class plays both parts, so this one holds a residual for
each worker: only here, and only for whoever plays both parts in one process.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
from pydantic import ValidationError

from client_sdk.protocol.compression import Codec, CompressionMethod, CompressionSpec, CompressionStats, ErrorFeedback
from client_sdk.protocol.errors import ConfigurationError, MalformedEncoding, NonFiniteUpdate, ShapeMismatch
from client_sdk.protocol.updates import WorkerGradient
from server_ref.aggregation.intake import Intake, RefusedUpdate
from server_ref.aggregation.presets import OnRejected, one_vector, passes
from server_ref.aggregation.reduce import ExactMean
from server_ref.aggregation.robust_reduce import RobustRule
from server_ref.aggregation.settings import AggregationMethod, IntakeSettings, MethodOptions
from server_ref.aggregation.stages import Reduce
from server_ref.aggregation.tensors import AggregatedUpdate, TensorLayout, as_numpy, in_kind_of

_METHODS = (CompressionMethod.TOPK, CompressionMethod.RANDOMK, CompressionMethod.THRESHOLD)
_MAX_COORDINATES = 2**31 - 1


@dataclass(frozen=True)
class _Worker:
    """What the device would keep: its residual, and how often it has compressed."""

    shapes: Mapping[str, tuple[int, ...]]
    feedback: ErrorFeedback
    rounds: int = 0


class CompressedGradientAggregator:
    """Sparse updates: compressed for a worker, decompressed for the server, and aggregated.

    The update is compressed as one vector: the largest values of all parameters, not of each. What crosses the network
    is ``metadata["payload"]``, whose bytes are counted, coordinates included; ``values`` and ``indices`` are the same
    content, decoded.

    Args:
        compression_ratio: Share of the coordinates that ``topk`` and ``randomk`` send: ``max(1, int(d * ratio))`` of d.
        compression_method: ``topk`` (largest magnitudes, ties to the lowest index), ``randomk`` (drawn from a public
            seed) or ``threshold`` (magnitudes of ``threshold`` and more).
        error_feedback: Add what was not sent to the worker's next update. Without it ``randomk`` sends a share of the
            sum, and ``aggregate`` multiplies the outcome by d/k, which makes it right in expectation.
        threshold: For the method of that name.
        value_bits: 32 (as they are), 8, 4 or 1 bits a value.
        aggregation_rule: A robust rule instead of the exact mean.
        num_byzantine: For the rule; see ``ByzantineRobustAggregator``.
        on_rejected: Called with each refusal.
        **options: See ``IntakeSettings``. Clipping comes after decompression.

    Raises:
        ConfigurationError: Settings that do not go together, or keywords of differential privacy: which coordinates are
            the largest gives away data (docs/aggregation.md).
    """

    def __init__(
        self,
        compression_ratio: float = 0.01,
        compression_method: str = "topk",
        error_feedback: bool = True,
        *,
        threshold: float | None = None,
        value_bits: int = 32,
        aggregation_rule: str | None = None,
        num_byzantine: int | None = None,
        on_rejected: OnRejected | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        settings = one_vector(IntakeSettings.parse(options))
        self._spec = _spec(compression_method, compression_ratio, threshold, value_bits, error_feedback=error_feedback)
        renormalise = settings.aggregation_method is AggregationMethod.FEDNOVA
        reduce: Reduce = ExactMean(renormalise=renormalise)
        if aggregation_rule is not None:
            reduce = RobustRule(aggregation_rule, num_byzantine=num_byzantine, renormalise=renormalise)
        elif num_byzantine is not None:
            raise ConfigurationError("num_byzantine says something to a robust rule; name one (aggregation_rule)")
        self._intake = Intake(reduce, settings, opener=self._opened, on_rejected=on_rejected)
        self._workers: dict[str, _Worker] = {}
        self._stats = CompressionStats()

    # --- the device's part -------------------------------------------------------------------------------

    def compress_gradient(
        self, gradient: Mapping[str, Any], worker_id: str, *, seed: int | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compress one update of a worker.

        Args:
            gradient: Name -> array or tensor of real numbers.
            worker_id: Whose residual takes part.
            seed: Public seed of ``randomk`` and of rounding; by default the number of updates that this worker has
                compressed before, which is the same for all workers of a synchronous round.

        Returns:
            Name -> float32[n] values, in the kind given (torch or numpy), and the metadata: ``indices`` (name ->
            int64[n], ascending, into the flattened parameter), ``shapes``, ``payload`` (the bytes for the network),
            ``num_bytes``, ``num_values`` and ``seed``.

        Raises:
            NonFiniteUpdate: NaN or infinities. The residual is as it was.
            ShapeMismatch: Not the parameters that the worker's residual belongs to.
            ConfigurationError: Neither arrays nor tensors.
        """
        layout = TensorLayout.of(gradient)
        vector = np.empty(layout.size, np.float32)
        layout.flatten(gradient, vector)
        shapes = {name: entry.shape for name, entry in layout.entries.items()}
        worker = self._workers.get(worker_id) or _Worker(shapes, ErrorFeedback.zeros(layout.size))
        if worker.shapes != shapes:
            raise ShapeMismatch("the worker's residual belongs to other parameters; forget the worker first")
        codec = Codec(self._spec, layout.size)
        if self._spec.error_feedback:
            vector = worker.feedback.compensate(vector)
        seed = worker.rounds if seed is None else seed
        payload = codec.encode(vector, seed, rounding_seed=_rounding_seed(worker_id))
        sent = codec.decode_sparse(payload, seed)
        feedback = ErrorFeedback.after(vector, sent.dense()) if self._spec.error_feedback else worker.feedback
        self._workers[worker_id] = _Worker(shapes, feedback, worker.rounds + 1)
        self._stats += codec.stats(payload)
        compressed, indices = {}, {}
        for name, entry in layout.entries.items():
            first, last = np.searchsorted(sent.indices, (entry.start, entry.stop))
            compressed[name] = in_kind_of(entry, sent.values[first:last].copy())
            indices[name] = in_kind_of(entry, sent.indices[first:last] - entry.start)
        return compressed, {
            "indices": indices,
            "shapes": shapes,
            "payload": payload,
            "num_bytes": len(payload),
            "num_values": sent.values.size,
            "seed": seed,
        }

    def residual_norm(self, worker_id: str) -> float:
        """L2 norm of what this worker has not sent yet; 0 for an unknown one."""
        worker = self._workers.get(worker_id)
        return 0.0 if worker is None else worker.feedback.norm

    def forget(self, worker_id: str) -> None:
        """Drop a worker's residual, and what it has not sent with it."""
        self._workers.pop(worker_id, None)

    @property
    def stats(self) -> CompressionStats:
        """Bytes of all updates compressed so far, and what they would have taken."""
        return self._stats

    # --- the server's part -------------------------------------------------------------------------------

    def decompress_gradient(
        self, compressed_gradient: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Dense tensors, float32, in the kind given; for input from anywhere.

        Args:
            compressed_gradient: Name -> values.
            metadata: ``indices`` and ``shapes`` by name.

        Raises:
            MalformedEncoding: Not what ``compress_gradient`` returns: names that differ, indices that are out of range,
                repeated or out of order, more coordinates than any update has.
            NonFiniteUpdate: NaN or infinities.
        """
        indices, shapes = metadata.get("indices"), metadata.get("shapes")
        if not isinstance(indices, Mapping) or not isinstance(shapes, Mapping):
            raise MalformedEncoding("a compressed update comes with the indices and shapes of its parameters")
        if not compressed_gradient.keys() == indices.keys() == shapes.keys():
            raise MalformedEncoding("values, indices and shapes name different parameters")
        declared = _shapes(shapes)
        dense = {}
        for name, values in compressed_gradient.items():
            flat = np.zeros(math.prod(declared[name]), np.float32)
            at, new = as_numpy(indices[name]), as_numpy(values)
            _check_sparse(at, new, flat.size)
            flat[at] = new
            dense[name] = in_kind_of(values, flat.reshape(declared[name]))
        return dense

    def aggregate(
        self, worker_gradients: Iterable[WorkerGradient], server_model_state: Mapping[str, Any]
    ) -> AggregatedUpdate:
        """The aggregate of updates that went through ``compress_gradient``.

        Args:
            worker_gradients: ``gradients`` and ``metadata`` as ``compress_gradient`` returned them, or ``gradients`` as
                ``decompress_gradient`` returned them.
            server_model_state: As for ``GradientAggregator.aggregate``.

        Raises:
            EmptyAggregate: No update is left; ``rejections`` says why.
            PocketfedError: As the mean or the rule raises it.
        """
        gathered = self._intake.gather(worker_gradients, server_model_state)
        return gathered.named(gathered.aggregate.values * Codec(self._spec, gathered.layout.size).unbias_factor)

    @property
    def rejections(self) -> tuple[RefusedUpdate, ...]:
        """Who was refused in the last ``aggregate``, and why."""
        return self._intake.rejections

    def validate_gradient(self, gradient: WorkerGradient, server_model_state: Mapping[str, Any] | None = None) -> bool:
        """As ``GradientAggregator.validate_gradient``, for compressed updates too."""
        return passes(self._intake, gradient, server_model_state)

    def describe(self) -> str:
        """The pipeline's slots as a table."""
        return self._intake.describe()

    def _opened(self, worker: WorkerGradient, layout: TensorLayout) -> WorkerGradient:
        """The worker with dense tensors. Shapes are compared before anything of that size is allocated."""
        if worker.metadata is None or "indices" not in worker.metadata:
            return worker
        if _shapes(worker.metadata.get("shapes")) != {name: entry.shape for name, entry in layout.entries.items()}:
            raise ShapeMismatch("the compressed update is of another model")
        return replace(worker, gradients=self.decompress_gradient(worker.gradients, worker.metadata))


def _spec(
    method: str, ratio: float, threshold: float | None, value_bits: int, *, error_feedback: bool
) -> CompressionSpec:
    if method not in _METHODS:
        raise ConfigurationError(f"there is no method {method!r} here; choose one of {', '.join(_METHODS)}")
    fields: dict[str, Any] = {"method": CompressionMethod(method), "value_bits": value_bits}
    fields |= {"error_feedback": error_feedback, "threshold": threshold}
    if method != CompressionMethod.THRESHOLD:
        fields["ratio"] = ratio
    try:
        return CompressionSpec(**fields)
    except ValidationError as e:
        raise ConfigurationError("; ".join(str(error["msg"]) for error in e.errors())) from e


def _rounding_seed(worker_id: str) -> int:
    return int.from_bytes(hashlib.sha256(worker_id.encode()).digest()[:8], "little")


def _shapes(declared: Any) -> dict[str, tuple[int, ...]]:  # noqa: ANN401 - from anywhere
    """Shapes by name, of an update that is not too large to be one."""
    if not isinstance(declared, Mapping):
        raise MalformedEncoding("a compressed update comes with the shapes of its parameters")
    for shape in declared.values():
        if not isinstance(shape, tuple | list) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise MalformedEncoding("a parameter's shape is a tuple of integers from 0")
    if sum(map(math.prod, declared.values())) > _MAX_COORDINATES:
        raise MalformedEncoding("the update declares more coordinates than any update has")
    return {name: tuple(shape) for name, shape in declared.items()}


def _check_sparse(indices: Any, values: Any, size: int) -> None:  # noqa: ANN401 - arrays of any dtype and shape
    if indices.dtype != np.int64 or values.dtype != np.float32 or indices.ndim != 1 or indices.shape != values.shape:
        raise MalformedEncoding("a sparse parameter is int64[n] indices and float32[n] values")
    if indices.size and (indices[0] < 0 or indices[-1] >= size or (np.diff(indices) <= 0).any()):
        raise MalformedEncoding("indices must rise, and lie within the parameter")
    if not np.isfinite(values).all():
        raise NonFiniteUpdate("the compressed update holds NaN or infinite values")
