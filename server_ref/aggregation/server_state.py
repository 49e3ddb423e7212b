"""What the server keeps from round to round: float64 master weights and what its optimizer accumulates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, Self, cast

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError, MalformedFrame, ShapeMismatch
from client_sdk.protocol.frames import FrameLimits, decode_frame, encode_frame
from server_ref.aggregation.rescaling import rescale

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

MASTER: Final = "master"
MOMENTUM: Final = "momentum"
SECOND_MOMENT: Final = "second_moment"
CONTROL: Final = "control"

MAX_EXPONENT = 900
"""Bound on the magnitude of ``ServerState.exponent``, so that ``2**exponent`` and its inverse are float64 numbers."""

_POWERS: Final[Mapping[str, int]] = MappingProxyType({MOMENTUM: 1, SECOND_MOMENT: 2})
"""Which tensors are kept scaled, and the power of the gradient they grow with."""

_NAMES: Final = frozenset({MASTER, MOMENTUM, SECOND_MOMENT, CONTROL})
_FORMAT: Final = "pocketfed-server-state-1"
_LIMITS: Final = FrameLimits(max_bytes=2**40, max_tensors=len(_NAMES))
_MAX_STEP: Final = 2**53


@dataclass(frozen=True, eq=False)
class ServerState:
    """One version of the server's state. A value: tensors are read-only, and every step makes new ones.

    The master weights are float64 because updates get small: added to a float32 weight, whatever is below half a unit
    in its last place changes nothing, however often it comes. Devices receive ``weights``, the master rounded once.

    Attributes:
        step: Number of aggregates applied so far.
        tensors: "master", and by optimizer "momentum", "second_moment", "control": float64[d] each.
        exponent: e; the true momentum is ``momentum * 2**e``, the true second moment ``second_moment * 4**e``.

    Raises:
        ShapeMismatch: No master weights, or tensors that are not all float64[d].
        ConfigurationError: A negative step, an exponent beyond ``MAX_EXPONENT``.
    """

    step: int
    tensors: Mapping[str, Float64Array]
    exponent: int = 0

    def __post_init__(self) -> None:
        if MASTER not in self.tensors:
            raise ShapeMismatch("a server's state without master weights")
        shape = self.tensors[MASTER].shape
        views = {}
        for name, tensor in self.tensors.items():
            if tensor.dtype != np.float64 or len(shape) != 1 or tensor.shape != shape:
                raise ShapeMismatch(f"the state's {name} is {tensor.dtype}{list(tensor.shape)}, not float64[d]")
            views[name] = tensor.view()
            views[name].setflags(write=False)
        if self.step < 0 or abs(self.exponent) > MAX_EXPONENT:
            raise ConfigurationError(f"a state at step {self.step} with exponent {self.exponent}")
        object.__setattr__(self, "tensors", MappingProxyType(views))

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.master.size

    @property
    def master(self) -> Float64Array:
        """The master weights, float64[size], read-only."""
        return self.tensors[MASTER]

    @cached_property
    def weights(self) -> Float32Array:
        """The weights that devices get: the master rounded once, float32[size], read-only."""
        with np.errstate(over="ignore"):
            weights = self.master.astype(np.float32)
        weights.setflags(write=False)
        return weights

    def rescaled(self, *, incoming: float = 0.0) -> tuple[Self, int]:
        """Bring what the optimizer accumulated near 1 by a power of two; see ``rescaling.rescale``.

        Args:
            incoming: Largest magnitude of the aggregate that comes next, on its own scale.

        Returns:
            A state that stands for exactly the same numbers, and the change of its exponent.

        Raises:
            NonFiniteUpdate: What was accumulated is not finite.
        """
        kept = {name: tensor for name, tensor in self.tensors.items() if name in _POWERS}
        if not kept:
            return self, 0
        scaled, shift = rescale(kept, _POWERS, incoming=float(np.ldexp(incoming, -self.exponent)))
        if not shift or abs(self.exponent + shift) > MAX_EXPONENT:
            return self, 0
        return type(self)(self.step, {**self.tensors, **scaled}, self.exponent + shift), shift

    def to_bytes(self) -> bytes:
        """Canonical encoding: one frame of float64 tensors in order of their names.

        Raises:
            MalformedFrame: A tensor of another name than those of ``tensors``.
        """
        if not self.tensors.keys() <= _NAMES:
            raise MalformedFrame(f"the state holds other tensors than {sorted(_NAMES)}")
        metadata = {"format": _FORMAT, "step": str(self.step), "exponent": str(self.exponent)}
        return encode_frame({name: self.tensors[name] for name in sorted(self.tensors)}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """The inverse of ``to_bytes``, for bytes from anywhere. The tensors are views of ``data``.

        Raises:
            TruncatedFrame: Fewer bytes than declared.
            OversizedBody: More tensors or bytes than any state has.
            MalformedFrame: Anything else that ``to_bytes`` of a state that training can reach does not write: NaN,
                weights beyond float32, a negative second moment, numbers in another notation.
        """
        frame = decode_frame(data, _LIMITS)
        if frame.metadata.keys() != {"format", "step", "exponent"} or frame.metadata["format"] != _FORMAT:
            raise MalformedFrame(f"not a server's state in the format {_FORMAT}")
        step = _canonical_int(frame.metadata["step"], 0, _MAX_STEP)
        exponent = _canonical_int(frame.metadata["exponent"], -MAX_EXPONENT, MAX_EXPONENT)
        if list(frame.tensors) != sorted(frame.tensors) or not frame.tensors.keys() <= _NAMES:
            raise MalformedFrame("the state's tensors are not those of a server, in order of their names")
        try:
            state = cls(step, cast("dict[str, Any]", frame.tensors), exponent)
        except ShapeMismatch as e:
            raise MalformedFrame(
                "the state's tensors are not float64 vectors of one size, master weights included"
            ) from e
        for name, tensor in state.tensors.items():
            if not np.isfinite(state.weights if name == MASTER else tensor).all():
                raise MalformedFrame(f"the state's {name} holds NaN or infinite values")
        if SECOND_MOMENT in state.tensors and (state.tensors[SECOND_MOMENT] < 0).any():
            raise MalformedFrame("the state's second moment holds negative values")
        return state


def _canonical_int(text: str, low: int, high: int) -> int:
    if not re.fullmatch("0|-?[1-9][0-9]{0,18}", text) or not low <= int(text) <= high:
        raise MalformedFrame(f"the state's metadata holds no integer from {low} to {high} where one belongs")
    return int(text)
