"""``IntegratedAttackDetector``: attacks that live off how compression, noise and robust rules interact.

An alarm is evidence against a stated hypothesis about honest clients, with a stated rate of false alarms. "Indices are
clustered" and "the aggregate varies more than the noise" are no such evidence: honest top-k indices cluster (in the
last layer, in the rows of an embedding that occurred), and a signal varies more than noise when training works.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError, MalformedEncoding, NonFiniteUpdate, ShapeMismatch
from client_sdk.protocol.updates import WorkerGradient
from server_ref.aggregation.evidence import (
    DriftEvidence,
    Evidence,
    check_alpha,
    direction_p_value,
    norm_p_value,
    rank_p_value,
)
from server_ref.aggregation.tensors import as_numpy

Float64Array = npt.NDArray[np.float64]

DEFAULT_ALPHA: Final = 0.01
DEFAULT_REFERENCE: Final = 1000

_EXCHANGEABLE: Final = "the update is as likely to come at its place as at any other among the reference's honest ones"
_SHORT: Final = "the aggregate without noise is no longer than signal_norm"
_ALONG: Final = "the aggregate without noise does not go against the direction by more than tolerance"


@dataclass(frozen=True)
class SparseTraits:
    """What a sparse update shows, whatever the model's layers look like.

    Attributes:
        names: Its parameters, in order.
        shares: float64[layers], the part of the sent coordinates that lies in each.
        clustering: How close the coordinates lie within their layers: minus the mean logarithm of the gaps, each
            relative to an even spread.
        one_sided: Surplus of values of one sign, from 0 to 1.
        log_norm: Logarithm of the values' L2 norm.
    """

    names: tuple[str, ...]
    shares: Float64Array
    clustering: float
    one_sided: float
    log_norm: float

    @classmethod
    def of(cls, worker_gradient: WorkerGradient, metadata: Mapping[str, Any]) -> SparseTraits:
        """Read a compressed update.

        Args:
            worker_gradient: ``gradients`` by name: the values sent, or dense tensors of which those at the indices
                count.
            metadata: ``indices`` (name -> int array into the flattened parameter, rising) and ``shapes`` by name.

        Raises:
            MalformedEncoding: Indices or shapes are missing, of other names, out of range, or not rising.
            ShapeMismatch: Values that do not go with the indices.
            NonFiniteUpdate: NaN or infinities.
        """
        indices, shapes = metadata.get("indices"), metadata.get("shapes")
        if not isinstance(indices, Mapping) or not isinstance(shapes, Mapping) or indices.keys() != shapes.keys():
            raise MalformedEncoding("a compressed update comes with the indices and shapes of its parameters")
        counts, gaps, signs, squares = [], [], 0, 0.0
        for name, at in indices.items():
            size = int(np.prod(shapes[name], dtype=np.int64))
            where = as_numpy(at).astype(np.int64)
            steps = np.diff(where)
            if where.ndim != 1 or (where.size and (where[0] < 0 or where[-1] >= size or (steps <= 0).any())):
                raise MalformedEncoding(f"the indices of {name!r} do not rise within {size} coordinates")
            values = _values(worker_gradient, name, where, size)
            counts.append(where.size)
            gaps.append(steps * (where.size / max(size, 1)))
            signs += int(np.count_nonzero(values > 0)) - int(np.count_nonzero(values < 0))
            squares += float(values @ values)
        total = max(1, sum(counts))
        relative = np.concatenate(gaps) if gaps else np.zeros(0)
        return cls(
            names=tuple(indices),
            shares=np.array(counts, np.float64) / total,
            clustering=-float(np.log(relative).mean()) if relative.size else 0.0,
            one_sided=abs(signs) / total,
            log_norm=0.5 * float(np.log(max(squares, np.finfo(np.float64).tiny))),
        )


class IntegratedAttackDetector:
    """Raises alarms with a stated rate of false ones.

    Two families of tests:

    - **Of one compressed update** (clear mode, without DP): how its coordinates are spread over the layers, how close
      they lie, how one-sided its values are, how long it is, together, *ranked among honest updates* that were shown to
      ``learn``. The rate is exact for any model and any data, as long as the update in question and the reference are
      exchangeable: same model, same phase of training, and a reference that is honest. Learn from *all* updates of a
      trusted period or trusted devices, never from those that passed: that would trim the reference's tail, and the
      rate would creep up. Attackers among the reference lower the power, not the rate.
    - **Of the noised aggregate** (with DP): its length and its direction against the known law of the noise. Whatever
      these find is post-processing and costs no privacy. A test of single updates would, so under DP there is none.

    Not safe for threads.

    Args:
        alpha: Rate of false alarms of each ``detect_`` method, per call.
        reference: How many honest updates to remember, the last ones. Fewer than ``1 / alpha - 1`` cannot raise an
            alarm.
        noise_stddev: Of each coordinate of a released aggregate; from its ``PrivateAggregate``.
        signal_norm: Largest L2 norm of an honest aggregate before noise: the clip norm, or less if known from public
            data.
        direction: Name -> tensor: where an honest aggregate does not go against, such as the gradient on public data
            that the server holds, or the last released aggregate.
        tolerance: How far against it an honest aggregate may go, in its own units.
    """

    def __init__(
        self,
        alpha: float = DEFAULT_ALPHA,
        *,
        reference: int = DEFAULT_REFERENCE,
        noise_stddev: float | None = None,
        signal_norm: float | None = None,
        direction: Mapping[str, Any] | None = None,
        tolerance: float = 0.0,
    ) -> None:
        if reference < 1 or tolerance < 0:
            raise ConfigurationError(f"a reference of {reference} updates, a tolerance of {tolerance}")
        for name, value in (("noise_stddev", noise_stddev), ("signal_norm", signal_norm)):
            if value is not None and not 0 < value < np.inf:
                raise ConfigurationError(f"{name} must be positive and finite, got {value}")
        self._alpha = check_alpha(alpha)
        self._reference: deque[SparseTraits] = deque(maxlen=reference)
        self._noise_stddev = noise_stddev
        self._signal_norm = signal_norm
        self._direction = direction
        self._tolerance = tolerance
        self._drift = DriftEvidence()

    # --- one compressed update -----------------------------------------------------------------------------

    def learn(self, worker_gradient: WorkerGradient, compression_metadata: Mapping[str, Any]) -> None:
        """Remember an update that is known to be honest; see ``SparseTraits.of`` for arguments and errors."""
        traits = SparseTraits.of(worker_gradient, compression_metadata)
        self._check_alike(traits)
        self._reference.append(traits)

    def compression_evidence(
        self, worker_gradient: WorkerGradient, compression_metadata: Mapping[str, Any]
    ) -> Evidence:
        """How strange a compressed update is among honest ones; see ``SparseTraits.of`` for arguments and errors."""
        traits = SparseTraits.of(worker_gradient, compression_metadata)
        self._check_alike(traits)
        scores = _strangeness([*self._reference, traits])
        p_value = rank_p_value(scores)
        possible = 1 / len(scores) <= self._alpha
        return Evidence("compression", _EXCHANGEABLE, float(scores[-1]), p_value, self._alpha, conclusive=possible)

    def detect_compression_exploitation(
        self, worker_gradient: WorkerGradient, compression_metadata: Mapping[str, Any]
    ) -> bool:
        """Whether a compressed update is stranger than all but a part alpha of honest ones.

        Example attack: only large values of one sign, on coordinates that lie together. See ``compression_evidence``.
        """
        return self.compression_evidence(worker_gradient, compression_metadata).alarm

    def _check_alike(self, traits: SparseTraits) -> None:
        if self._reference and self._reference[0].names != traits.names:
            raise ShapeMismatch("the update has other parameters than those the detector learned from")

    # --- a noised aggregate --------------------------------------------------------------------------------

    def masking_evidence(self, aggregated: Mapping[str, Any]) -> tuple[Evidence, ...]:
        """What a released aggregate shows that its noise does not explain; each test gets an equal part of alpha.

        Args:
            aggregated: Name -> tensor, after noise.

        Raises:
            ConfigurationError: The law of the noise, or what is known of honest aggregates, was not declared.
            ShapeMismatch: The direction has other parameters.
            NonFiniteUpdate: NaN or infinities.
        """
        if self._noise_stddev is None or (self._signal_norm is None and self._direction is None):
            raise ConfigurationError(
                "what noise hides can only be told from noise whose law is known: give noise_stddev, and signal_norm "
                "or direction"
            )
        vector = _flat(aggregated)
        tests = (self._signal_norm is not None) + (self._direction is not None)
        found = []
        if self._signal_norm is not None:
            squared = float(vector @ vector)
            p_value = norm_p_value(squared, vector.size, self._signal_norm, self._noise_stddev)
            found.append(Evidence("length", _SHORT, float(np.sqrt(squared)), p_value, self._alpha / tests))
        if self._direction is not None:
            along = self._along(aggregated, vector)
            p_value = direction_p_value(along + self._tolerance, self._noise_stddev)
            found.append(Evidence("direction", _ALONG, along, p_value, self._alpha / tests))
        return tuple(found)

    def detect_dp_masking_attack(self, gradients: Sequence[WorkerGradient], aggregated: Mapping[str, Any]) -> bool:
        """Whether the released aggregate is longer than, or goes against, what honest clients and the noise explain.

        Args:
            gradients: The updates that went in. Not looked at: an alarm that depended on them would be a release
                without noise.
            aggregated: As for ``masking_evidence``, which documents the errors.
        """
        del gradients
        return any(e.alarm for e in self.masking_evidence(aggregated))

    def watch(self, aggregated: Mapping[str, Any]) -> Evidence:
        """One round more of a run: evidence that many rounds together go against the direction.

        What hides below each round's noise adds up, while the noise averages out. The rate alpha holds for the whole
        run, however many rounds it has. Arguments and errors as ``masking_evidence``; needs a direction.
        """
        if self._noise_stddev is None or self._direction is None:
            raise ConfigurationError("a drift is watched along a direction, in units of the noise: give both")
        along = self._along(aggregated, _flat(aggregated))
        self._drift = self._drift.after(-(along + self._tolerance) / self._noise_stddev)
        return Evidence("drift", _ALONG + ", in every round", self._drift.value, self._drift.p_value, self._alpha)

    def point(self, direction: Mapping[str, Any]) -> None:
        """Replace the direction, for the next round; what ``watch`` has seen so far stays."""
        self._direction = direction

    def _along(self, aggregated: Mapping[str, Any], vector: Float64Array) -> float:
        direction = self._direction or {}
        if direction.keys() != aggregated.keys():
            raise ShapeMismatch("the direction has other parameters than the aggregate")
        unit = _flat({name: direction[name] for name in aggregated})
        length = float(np.linalg.norm(unit))
        if unit.size != vector.size or length == 0.0:
            raise ShapeMismatch("the direction is not a vector of the aggregate's shape, or it is zero")
        return float(vector @ unit) / length


def _strangeness(traits: Sequence[SparseTraits]) -> Float64Array:
    """float64[n]: how far each stands out, in the trait in which it does most; symmetric in all of them."""
    shares = np.stack([t.shares for t in traits])
    columns = [
        np.abs(shares - np.median(shares, axis=0)).sum(axis=1) / 2,
        np.array([t.clustering for t in traits]),
        np.array([t.one_sided for t in traits]),
        np.array([t.log_norm for t in traits]),
    ]
    return np.asarray(np.max([_standardised(c) for c in columns], axis=0))


def _standardised(column: Float64Array) -> Float64Array:
    centred = column - np.median(column)
    # Where most are equal any difference counts, by however little.
    return np.asarray(centred / max(float(np.median(np.abs(centred))), 1e-12))


def _values(
    worker_gradient: WorkerGradient, name: str, where: npt.NDArray[np.int64], size: int
) -> npt.NDArray[np.float64]:
    if name not in worker_gradient.gradients:
        raise ShapeMismatch(f"the update lacks parameter {name!r}")
    values = as_numpy(worker_gradient.gradients[name]).reshape(-1)
    if values.size != where.size:
        if values.size != size:
            raise ShapeMismatch(f"parameter {name!r} has {values.size} values for {where.size} indices")
        values = values[where]
    if not np.isfinite(values).all():
        raise NonFiniteUpdate("the compressed update holds NaN or infinite values")
    return values.astype(np.float64)


def _flat(tensors: Mapping[str, Any]) -> Float64Array:
    parts = [as_numpy(t).reshape(-1).astype(np.float64) for t in tensors.values()]
    vector = np.concatenate(parts) if parts else np.zeros(0)
    if not vector.size:
        raise ShapeMismatch("an aggregate without coordinates")
    if not np.isfinite(vector).all():
        raise NonFiniteUpdate("the aggregate holds NaN or infinite values")
    return vector
