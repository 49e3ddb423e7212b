"""What local training will take of a device's memory, item by item, from the exported memory plan.

An upper bound, made before a program is opened: items that are never alive at the same time are added all the same.
``tests/benchmarks/bench_memory.py`` holds it against the kernel's account of real device processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.messages import SecurePlan
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import Manifest, MethodSpec, Role
from client_sdk.protocol.secure import SecureLayout, shared_size
from client_sdk.protocol.training import TrainingPlan, update_size

MIB: Final = 2**20

BASELINE_BYTES: Final[Mapping[str, int]] = {"native": 80 * MIB, "pybindings": 300 * MIB}
"""What a ``pocketfed device`` process takes beside what follows from the model, by runtime, rounded up (Linux x86_64):
interpreter, libraries, network, the runtime's code. The benchmark fails where it has become larger. The examples, which
an app may hold in memory, or map, come on top.
"""

_PROCESS: Final = "process"
_PROGRAM_COPIES = 3  # as downloaded, as read to be hashed, and the runtime's own
_FLOAT = 4
_INDEX = 8
# A codec's working memory: magnitudes, order and the decoded update, by coordinate; and the blocks that it works in.
_CODEC_BYTES = 24
_CODEC_BLOCK_BYTES = 4 * MIB
# Of each example while it is found out which are equal: measured with CPython 3.11, rounded up.
_SPLIT_BYTES = 256
_SUMMING = frozenset({Role.GRAD, Role.MAML, Role.FOMAML})


@dataclass(frozen=True)
class MemoryItem:
    """One use of memory.

    Attributes:
        name: For messages.
        num_bytes: How much.
        by_batch: Whether smaller batches need less of it.
    """

    name: str
    num_bytes: int
    by_batch: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """What a device process takes at most while it trains and reports."""

    items: tuple[MemoryItem, ...]

    @property
    def total_bytes(self) -> int:
        """All items together."""
        return sum(item.num_bytes for item in self.items)

    @property
    def process_bytes(self) -> int:
        """What is there without training."""
        return sum(item.num_bytes for item in self.items if item.name == _PROCESS)

    @property
    def added(self) -> tuple[MemoryItem, ...]:
        """What training adds to the process, the largest first."""
        added = (item for item in self.items if item.name != _PROCESS)
        return tuple(sorted(added, key=lambda item: -item.num_bytes))

    def __str__(self) -> str:
        """``103.4 MiB: 80.0 process, 12.1 planned memory of train_b64, ...``: the largest first, no crumbs."""
        largest = sorted(self.items, key=lambda item: -item.num_bytes)
        named = [f"{mib(item.num_bytes)} {item.name}" for item in largest if item.num_bytes >= MIB / 20]
        return f"{mib(self.total_bytes)} MiB: {', '.join(named)}"


def mib(num_bytes: int) -> str:
    """A number of bytes in MiB, for messages."""
    return f"{num_bytes / MIB:.1f}"


def estimate_memory(
    manifest: Manifest,
    method: MethodSpec,
    plan: TrainingPlan,
    *,
    num_samples: int,
    baseline_bytes: int,
    compression: str | None = None,
    secure: SecurePlan | None = None,
    also: Sequence[MethodSpec] = (),
) -> MemoryEstimate:
    """What training with one method, and reporting, takes.

    The plan's methods share one arena in the native runtime, and what a method does not touch is never resident: only
    the methods that are used count.

    Args:
        manifest: Of the program.
        method: The method that training will call.
        plan: Local training.
        num_samples: The device's examples. Training takes their order and a batch of them; they themselves are the
            app's.
        baseline_bytes: What the process takes without any of it, examples in memory included.
        compression: Of the report.
        secure: How the update is shared, where it is.
        also: Other methods that training calls.

    Raises:
        ConfigurationError: A compression that this device does not know, or personal layers that are none.
    """
    d = manifest.num_parameters
    vector = _FLOAT * d
    called = {m.name: m for m in (method, *also)}
    sliced = 2 if any(m.role in _SUMMING for m in called.values()) else 0
    layers = SharedLayers.of(manifest.parameters, plan.personal)
    size = update_size(plan, layers.size)
    planned = {name: m.planned_memory_bytes for name, m in called.items()}
    if secure is not None:
        planned |= {m.name: m.planned_memory_bytes for m in manifest.methods if m.role is Role.SHARE}
    largest = max(planned, key=lambda name: planned[name])
    items = {
        _PROCESS: baseline_bytes,
        "program": _PROGRAM_COPIES * manifest.program_bytes,
        f"planned memory of {largest}": planned[largest],
        **{f"inputs of {name}": _input_bytes(m) for name, m in called.items()},
        # The downloaded model, in which training starts; the weights of a step and those after it.
        "weights": 3 * vector,
        "gradient sums": sliced * vector,
        f"{plan.algorithm} and proximal vectors": _algorithm_vectors(plan) * vector,
        # A snapshot of weights and sums, its encoding, and the encoding's encryption.
        "checkpoint": 3 * (1 + sliced // 2) * vector,
        "update": _FLOAT * (d + size),
        "report": _report_bytes(size, compression, secure),
        "personal layers": _personal_bytes(layers),
        "order of the examples": _INDEX * num_samples * _orders(plan),
        "split of the examples": _SPLIT_BYTES * num_samples if plan.meta is not None else 0,
    }
    by_batch = {f"{what} of {name}" for name in called for what in ("planned memory", "inputs")}
    return MemoryEstimate(tuple(MemoryItem(name, size, name in by_batch) for name, size in items.items() if size))


def _input_bytes(method: MethodSpec) -> int:
    """Batches that are gathered for a call: of support, query and Hessian examples, as it takes them."""
    return sum(t.num_bytes for t in method.inputs if t.name.split("_")[-1] in {"x", "y", "mask"})


def _orders(plan: TrainingPlan) -> int:
    """Orders of all examples that are held at once: an epoch's and the one before; of meta-learning three streams'."""
    return min(2, plan.local_epochs) if plan.meta is None else 6


def _personal_bytes(layers: SharedLayers) -> int:
    """What keeping layers on the device takes: a model with them, which coordinates they are, and themselves."""
    if not layers.personal:
        return 0
    own = _FLOAT * (layers.num_parameters - layers.size)
    # As remembered, in the checkpoint, and in the new memory: each as it is and encoded.
    return (_FLOAT + 2) * layers.num_parameters + 3 * 2 * own


def _algorithm_vectors(plan: TrainingPlan) -> int:
    """Vectors of length d that the local algorithm keeps beside the weights."""
    if plan.algorithm == "scaffold":
        return 5  # two control variates, the correction, what changes of the device's, and that in its checkpoint
    return 1 if plan.prox_mu > 0 else 0


def _report_bytes(size: int, compression: str | None, secure: SecurePlan | None) -> int:
    """What making a report takes beside the update, the report included."""
    if secure is not None:
        shared = shared_size(compression, size)
        layout = SecureLayout.of(secure, shared)
        codec = _codec_bytes(size) if compression else 0
        # The codes, the field's elements that they become, and the shares: plain, sealed, and in the frame.
        return (8 + layout.scheme.field.element_bytes) * layout.length + 3 * layout.max_frame_bytes + codec
    spec = CompressionSpec.parse(compression or "none")
    if spec.is_none:
        return _FLOAT * size
    residuals = 2 * 2 * _FLOAT * size if spec.error_feedback else 0  # old and new, each in memory and encoded
    return 2 * Codec(spec, size).max_bytes + _codec_bytes(size) + residuals


def _codec_bytes(size: int) -> int:
    return _CODEC_BYTES * size + _CODEC_BLOCK_BYTES
