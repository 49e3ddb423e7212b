"""Named tensors to one flat float32 vector and back: torch or numpy in, the model's own kind out.

The pipeline knows flat vectors only; the specification's signatures take ``parameter name -> tensor``. A layout, read
off the server's model, fixes the order of the coordinates, and with it what an update must look like.

torch is never loaded here unless a torch tensor was given, and then it is loaded already.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, TypeGuard

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError, ShapeMismatch, UpdateOutOfRange
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.batch import Float32Array, Float64Array

if TYPE_CHECKING:
    import torch

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Parameter:
    """One parameter: its place in the flat vector, and what the server's own tensor is made of.

    Attributes:
        start: First coordinate.
        stop: Last coordinate, exclusive.
        shape: Of the tensor.
        dtype: numpy's or torch's.
        device: Where torch keeps it; None for a numpy array.
    """

    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: Any
    device: Any


@dataclass(frozen=True)
class TensorLayout:
    """How a model's parameters lie in the flat vector: in the order of its mapping, each in row-major order.

    Attributes:
        entries: Name -> place.
        size: Coordinates in all.
        without_values: Names of what the model holds besides (integer buffers such as counters): no part of an update,
            ignored where an update repeats it.
    """

    entries: Mapping[str, Parameter]
    size: int
    without_values: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, model_state: Mapping[str, Any]) -> Self:
        """The layout of a model's state.

        Args:
            model_state: Name -> ``numpy.ndarray`` or ``torch.Tensor``, e.g. ``model.state_dict()``. Any shape, scalars
                and empty tensors too.

        Raises:
            ConfigurationError: A value that is neither, or of complex numbers.
        """
        entries: dict[str, Parameter] = {}
        without_values = set()
        size = 0
        for name, tensor in model_state.items():
            if not (_is_torch(tensor) or isinstance(tensor, np.ndarray | np.generic)):
                raise ConfigurationError(f"the model's {name!r} is neither a numpy array nor a torch tensor")
            if _is_complex(tensor):
                raise ConfigurationError(f"the model's {name!r} holds complex numbers; split them into real parts")
            if not _is_real(tensor):
                without_values.add(name)
                continue
            shape = tuple(int(n) for n in tensor.shape)
            stop = size + math.prod(shape)
            device = tensor.device if _is_torch(tensor) else None
            entries[name] = Parameter(size, stop, shape, tensor.dtype, device)
            size = stop
        return cls(MappingProxyType(entries), size, frozenset(without_values))

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """First and last (exclusive) coordinate of each parameter that is not empty."""
        return tuple((e.start, e.stop) for e in self.entries.values() if e.stop > e.start)

    def flatten(self, tensors: Mapping[str, Any], out: Float32Array) -> None:
        """Write an update's tensors into a flat vector.

        float16 and bfloat16 become float32 exactly; float64 is rounded, once, to the nearest float32. NaN and
        infinities are written as they are: whoever reads the vector checks it.

        Args:
            tensors: Name -> array or tensor of the model's shape; strides and devices do not matter.
            out: float32[size], contiguous.

        Raises:
            ShapeMismatch: A name is missing or unknown, or a tensor has another shape or holds no real numbers.
            UpdateOutOfRange: A finite float64 value that float32 cannot hold.
        """
        if not isinstance(tensors, Mapping):
            raise ShapeMismatch("an update is a mapping from parameter names to tensors")
        for name, entry in self.entries.items():
            if name not in tensors:
                raise ShapeMismatch(f"the update lacks parameter {name!r}")
            tensor = tensors[name]
            if not (_is_torch(tensor) or isinstance(tensor, np.ndarray | np.generic)) or not _is_real(tensor):
                raise ShapeMismatch(f"parameter {name!r} must be a numpy array or a torch tensor of real numbers")
            if tuple(tensor.shape) != entry.shape:
                raise ShapeMismatch(f"parameter {name!r} has shape {list(tensor.shape)}, not {list(entry.shape)}")
            _copy(tensor, out[entry.start : entry.stop].reshape(entry.shape), name)
        unknown = len(tensors.keys() - self.entries.keys() - self.without_values)
        if unknown:
            raise ShapeMismatch(f"the update holds {unknown} tensors that the model does not have")

    def unflatten(self, values: Float64Array) -> dict[str, Any]:
        """Tensors of the model's kinds, dtypes and devices, each value rounded once.

        Args:
            values: float64[size].

        Raises:
            UpdateOutOfRange: A value that a parameter's dtype cannot hold.
        """
        return {
            name: _converted(values[entry.start : entry.stop].reshape(entry.shape), entry, name)
            for name, entry in self.entries.items()
        }


class AggregatedUpdate(dict[str, Any]):
    """What ``aggregate`` returns: name -> tensor, and how it is to be applied.

    Attributes:
        kind: A ``delta`` is added to the model, a ``gradient`` subtracted; ``apply_update`` knows.
        count: Updates in it.
        total_weight: Their weights' sum.
        measurements: What the stages saw (norms, who was excluded): plain JSON values, no update values.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        *,
        kind: UpdateKind,
        count: int,
        total_weight: int,
        measurements: Mapping[str, Any],
    ) -> None:
        super().__init__(tensors)
        self.kind = kind
        self.count = count
        self.total_weight = total_weight
        self.measurements = measurements


def apply_update(
    model_state: Mapping[str, Any], update: AggregatedUpdate, *, learning_rate: float = 1.0
) -> dict[str, Any]:
    """The model after one aggregate: deltas are added, gradients subtracted.

    Computed in float64 and rounded to each parameter's dtype. A float32 model therefore loses steps below half a unit
    in its last place; over many small rounds keep float64 master weights (the pipeline's ``apply`` slot does).

    Args:
        model_state: Name -> array or tensor; not changed.
        update: From ``aggregate`` for this model.
        learning_rate: The server's.

    Returns:
        A new mapping of the same names, kinds and dtypes; what the update does not name is passed through.

    Raises:
        ConfigurationError: A learning rate that is not positive and finite.
        ShapeMismatch: An update of another model.
        UpdateOutOfRange: A parameter would leave its dtype's range.
    """
    if not 0 < learning_rate < math.inf:
        raise ConfigurationError(f"learning_rate must be positive and finite, got {learning_rate}")
    signed = learning_rate if update.kind is UpdateKind.DELTA else -learning_rate
    layout = TensorLayout.of(model_state)
    if layout.entries.keys() != update.keys():
        raise ShapeMismatch("the update was made for a model with other parameters")
    after = dict(model_state)
    for name, entry in layout.entries.items():
        if tuple(update[name].shape) != entry.shape:
            raise ShapeMismatch(f"parameter {name!r} has shape {list(update[name].shape)}, not {list(entry.shape)}")
        moved = _as_float64(model_state[name]) + signed * _as_float64(update[name])
        after[name] = _converted(np.asarray(moved), entry, name)
    return after


def as_numpy(tensor: Any) -> npt.NDArray[Any]:  # noqa: ANN401 - an array or a tensor
    """An array or a tensor as an array; a view where it can be one.

    Raises:
        ShapeMismatch: Neither, or a tensor that is not dense.
    """
    if _is_torch(tensor) and str(tensor.layout) == "torch.strided" and not tensor.is_meta:
        array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
        return array
    if isinstance(tensor, np.ndarray):
        return tensor
    raise ShapeMismatch("neither a numpy array nor a dense torch tensor")


def in_kind_of(like: Any, array: npt.NDArray[Any]) -> Any:  # noqa: ANN401 - a parameter, an array or a tensor
    """The array itself, or as a torch tensor where ``like`` is one or the place of one."""
    if not (_is_torch(like) or (isinstance(like, Parameter) and like.device is not None)):
        return array
    import torch  # noqa: PLC0415 - loaded already: the tensor is one of its own

    return torch.from_numpy(array)


def _is_torch(value: object) -> TypeGuard[torch.Tensor]:
    # Whoever holds a torch tensor has loaded torch; nobody else shall.
    loaded = sys.modules.get("torch")
    return loaded is not None and isinstance(value, loaded.Tensor)


def _is_complex(tensor: Any) -> bool:  # noqa: ANN401 - an array or a tensor
    return bool(tensor.is_complex()) if _is_torch(tensor) else tensor.dtype.kind == "c"


def _is_real(tensor: Any) -> bool:  # noqa: ANN401 - an array or a tensor
    """Whether it is a dense array of float16, bfloat16, float32 or float64."""
    if _is_torch(tensor):
        return tensor.is_floating_point() and str(tensor.layout) == "torch.strided" and not tensor.is_meta
    return bool(tensor.dtype.kind == "f" and tensor.dtype.itemsize <= 8)


def _copy(tensor: Any, out: Float32Array, name: str) -> None:  # noqa: ANN401 - an array or a tensor
    of_torch = _is_torch(tensor)
    if of_torch:
        tensor = tensor.detach()
    if tensor.dtype.itemsize > 4 and out.size:
        peak = max(float(tensor.max()), -float(tensor.min()))  # NaN passes through both
        if math.isfinite(peak) and peak > _LARGEST_FLOAT32:
            raise UpdateOutOfRange(f"parameter {name!r} holds values that float32 cannot hold")
    if of_torch:
        import torch  # noqa: PLC0415 - loaded already: the tensor is one of its own

        torch.from_numpy(out).copy_(tensor)
        return
    with np.errstate(over="ignore"):
        np.copyto(out, tensor, casting="same_kind")


def _as_float64(tensor: Any) -> npt.NDArray[np.float64]:  # noqa: ANN401 - an array or a tensor
    if _is_torch(tensor):
        import torch  # noqa: PLC0415 - as above

        array: npt.NDArray[np.float64] = tensor.detach().to("cpu", torch.float64).numpy()
        return array
    return np.asarray(tensor, np.float64)


def _converted(values: Float64Array, entry: Parameter, name: str) -> Any:  # noqa: ANN401 - an array or a tensor
    """A new array or tensor with these values, of the parameter's kind, dtype and device."""
    converted: Any
    if entry.device is not None:
        import torch  # noqa: PLC0415 - as above

        converted = torch.from_numpy(values).to(entry.device, entry.dtype, copy=True)
        finite = bool(torch.isfinite(converted).all())
    else:
        with np.errstate(over="ignore"):
            converted = values.astype(entry.dtype)
        finite = bool(np.isfinite(converted).all())
    if not finite:
        raise UpdateOutOfRange(f"parameter {name!r} would leave the range of {entry.dtype}")
    return converted
