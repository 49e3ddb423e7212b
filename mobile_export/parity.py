"""The parity gate: an exported program must compute what eager PyTorch computes, on memory that was used before.

ExecuTorch has kernels that are wrong without an error, and one whose result depends on what lies in memory from the
call before. So every method runs several times in one process, interleaved with the others, on inputs that vary:
ordinary values, partial masks over garbage, zeros and negative values, and a batch that is masked altogether. Methods
of several steps are given whole steps that are masked, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from torch import nn

from client_sdk.protocol.errors import ConfigurationError, ProgramExecutionError
from client_sdk.protocol.field import MERSENNE_61
from client_sdk.protocol.program import PROGRAM_FILE, Float32Array, Manifest, MethodSpec, ParameterSpec, Program, Role
from mobile_export.bundle import ProgramBundle
from mobile_export.eager import EagerProgram
from mobile_export.errors import ParityError
from mobile_export.manifest import PlannedMethod, read_methods
from mobile_export.methods import Loss

TOLERANCE = 1e-5
REPEATS = 3

# Worst offenders first; each was seen to be wrong (or to fail) in the ExecuTorch release that this package pins.
SUSPECTS = (
    "aten::max_pool2d_with_indices_backward",  # never zeroes its output
    "aten::constant_pad_nd",  # refuses negative amounts
    "aten::remainder",  # int64: wrong for negative values
    "aten::fmod",  # int64: wrong near 2^62
    "aten::avg_pool2d_backward",
    "aten::convolution_backward",
    "aten::native_batch_norm_backward",
)

Array = npt.NDArray[Any]
Arrays = tuple[Array, ...]

_OVER_PARAMETERS = frozenset({"grad_sum", "w", "delta"})
_MAX_REDRAWS = 8
_PERTURBATIONS = 8
_PERTURBATION = 2.0**-21
_FLOOR = 1e-6
_PARAMETER_FLOOR = 1e-2
_LONG_STEP = 10.0
_INNER_STEP = 0.5
_SHORTER = 0.25
_RUNAWAY = 1e10
_NOT_FINITE = "eager PyTorch itself computes NaN, infinity or next to it on the gate's inputs"
_GARBAGE = (np.nan, np.inf, -np.inf, 1e30)


class OutputParity(BaseModel):
    """Largest relative error of one output over all runs of its method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    output: str
    error: float


class Int8Parity(BaseModel):
    """What the gate measured of one int8 method (``mobile_export.int8_parity``).

    Attributes:
        method: Its name.
        rounding_error: Largest relative error against the quantised graph in eager PyTorch.
        float_error: Largest relative error of the logits against the float model.
        agreement: Fraction of examples with the float model's answer.
        examples: Examples that were compared, with each head.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    rounding_error: float
    float_error: float
    agreement: float
    examples: int


class ParityReport(BaseModel):
    """What the gate measured.

    Attributes:
        tolerance: Relative error that was allowed.
        repeats: Runs of each method, without the extra one on a masked batch.
        redrawn: Inputs that were replaced because on them eager PyTorch itself is not finite, or not determined to
            ``tolerance``.
        outputs: Worst error of each output.
        int8: Of int8 methods, which are not held to ``tolerance``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tolerance: float
    repeats: int
    redrawn: int
    outputs: tuple[OutputParity, ...]
    int8: tuple[Int8Parity, ...] = ()

    @property
    def worst(self) -> OutputParity:
        """The output with the largest error."""
        return max(self.outputs, key=lambda o: o.error, default=OutputParity(method="", output="", error=0.0))


def relative_error(actual: Array, expected: Array) -> float:
    """``||actual - expected|| / max(||expected||, 1e-6 sqrt(n))`` in the 2-norm, computed in float64.

    The floor (a root mean square of 1e-6) keeps an expected zero from turning rounding into an infinite error.
    A wrong shape, NaN or infinity gives infinity.
    """
    if actual.shape != expected.shape or not np.isfinite(actual).all() or not np.isfinite(expected).all():
        return np.inf
    a, e = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    return _error(a, e, _FLOOR)


def parameter_error(actual: Array, expected: Array, parameters: tuple[ParameterSpec, ...]) -> tuple[str, float]:
    """The parameter whose slice of a flat vector differs most, and its relative error.

    As ``relative_error``, slice by slice, so that a wrong bias is not hidden by a large matrix. The floor of a
    slice is 1 % of the whole vector's root mean square: rounding in sums that cancel is not an error.
    """
    if actual.shape != expected.shape or not np.isfinite(actual).all() or not np.isfinite(expected).all():
        return "", np.inf
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    floor = max(_FLOOR, _PARAMETER_FLOOR * float(np.sqrt(np.mean(np.square(e)))))
    errors = {
        p.name: _error(a[p.offset : p.offset + p.num_elements], e[p.offset : p.offset + p.num_elements], floor)
        for p in parameters
        if p.num_elements
    }
    worst = max(errors, key=errors.__getitem__)
    return worst, errors[worst]


def _error(a: npt.NDArray[np.float64], e: npt.NDArray[np.float64], floor: float) -> float:
    return float(np.linalg.norm(a - e) / max(float(np.linalg.norm(e)), floor * np.sqrt(e.size)))


def _runs_away(method: MethodSpec, expected: Arrays) -> bool:
    """Whether outputs are not finite, or inner steps made them so large that the program's may just not be."""
    largest = _RUNAWAY if method.inner_steps is not None or method.role is Role.PER_FEDAVG else np.inf
    return not all(np.isfinite(e).all() and (np.abs(e) <= largest).all() for e in expected)


@dataclass(frozen=True)
class _Difference:
    output: str
    error: float


def check_parity(
    bundle: ProgramBundle,
    model: nn.Module,
    loss: Loss | None = None,
    *,
    tolerance: float = TOLERANCE,
    repeats: int = REPEATS,
    runtime: Literal["native", "pybindings", "auto"] = "auto",
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Run every method of a bundle against ``EagerProgram`` on reused memory.

    Inputs come from a fixed seed. A draw on which float32 itself does not determine the answer (a pre-activation, a
    maximum or two logits so close that rounding decides) proves nothing: when the difference exceeds the tolerance
    *and* changing the weights by an ulp or two changes eager PyTorch's own answer by more than the tolerance, the draw
    is replaced by another one with half as many unmasked examples, and inner steps a quarter as long. So is a draw on
    which eager PyTorch overflows, as gradients through long steps do. What counts in the end meets ``tolerance``.

    Args:
        bundle: The exported program.
        model: The module it was exported from.
        loss: The loss it was exported with.
        tolerance: Largest allowed relative error: ``relative_error`` for most outputs, ``parameter_error`` for
            gradients and weights.
        repeats: Runs of each method, at least three.
        runtime: Adapter to run the program with.
        progress: Called with the name of each method as one of its runs ends.

    Returns:
        The largest error of each output.

    Raises:
        ParityError: A method differs, or fails to run; names the method, the output, the error and the operators
            that are likely at fault.
        MissingOperator: The runtime lacks an operator.
        ConfigurationError: Fewer than three repeats.
    """
    if repeats < REPEATS:
        raise ConfigurationError(f"parity needs at least {REPEATS} runs of each method, not {repeats}")
    gate = _Gate(bundle, EagerProgram(model, bundle.manifest, loss), bundle.load(runtime), tolerance)
    try:
        for repeat in range(repeats + 1):
            for method in _interleaved(bundle.manifest, repeat):
                gate.check(method, fully_masked=repeat == repeats, variant=repeat)
                if progress is not None:
                    progress(method.name)
    finally:
        gate.program.close()
    return ParityReport(tolerance=tolerance, repeats=repeats, redrawn=gate.redrawn, outputs=gate.results())


def _interleaved(manifest: Manifest, repeat: int) -> Iterator[MethodSpec]:
    """All methods, forwards and backwards in turn, so that each follows another one each time."""
    methods = tuple(m for m in manifest.methods if m.role is not Role.INFER_INT8)
    return iter(methods if repeat % 2 == 0 else methods[::-1])


class _Gate:
    """State of one check: the two programs, the worst errors, the inputs' generator."""

    def __init__(self, bundle: ProgramBundle, eager: EagerProgram, program: Program, tolerance: float) -> None:
        self.program = program
        self.redrawn = 0
        self._bundle = bundle
        self._manifest = bundle.manifest
        self._eager = eager
        self._tolerance = tolerance
        self._initial = bundle.initial_weights()
        self._rng = np.random.default_rng(0)
        self._errors: dict[tuple[str, str], float] = {}

    def results(self) -> tuple[OutputParity, ...]:
        return tuple(OutputParity(method=m, output=o, error=e) for (m, o), e in self._errors.items())

    def check(self, method: MethodSpec, *, fully_masked: bool, variant: int) -> None:
        """Run one method once and compare; replace draws that float32 does not determine."""
        kept = 0 if fully_masked else method.batch_size if variant == 0 else -(-method.batch_size * 2 // 3)
        for redraw in range(_MAX_REDRAWS + 1):
            inputs = self._draw(method, variant, kept, _INNER_STEP * _SHORTER**redraw)
            expected = self._eager.run(method.name, *inputs)
            if _runs_away(method, expected):
                # Gradients through steps that are too long overflow; where nothing is unmasked, only garbage could.
                if kept == 0 or redraw == _MAX_REDRAWS:
                    raise ParityError(method.name, "", np.inf, self._tolerance, (), failure=_NOT_FINITE)
                self.redrawn += 1
                kept = max(1, kept // 2)
                continue
            try:
                actual = self.program.run(method.name, *inputs)
            except ProgramExecutionError as e:
                suspects = self._suspects(method.name)
                raise ParityError(method.name, "", np.inf, self._tolerance, suspects, failure=str(e)) from e
            differences = self._compare(method, actual, expected)
            worst = max(differences, key=lambda d: d.error)
            if worst.error <= self._tolerance:
                break
            if redraw == _MAX_REDRAWS or not self._is_undetermined(method, inputs, expected):
                raise ParityError(method.name, worst.output, worst.error, self._tolerance, self._suspects(method.name))
            self.redrawn += 1
            kept = max(1, kept // 2)
        for spec, difference in zip(method.outputs, differences, strict=True):
            key = (method.name, spec.name)
            self._errors[key] = max(self._errors.get(key, 0.0), difference.error)

    def _compare(
        self,
        method: MethodSpec,
        actual: Arrays,
        expected: Arrays,
    ) -> list[_Difference]:
        differences = []
        for spec, a, e in zip(method.outputs, actual, expected, strict=True):
            if spec.dtype == "int64":
                # Integers are right or wrong.
                differences.append(_Difference(spec.name, 0.0 if np.array_equal(a, e) else np.inf))
            elif spec.name in _OVER_PARAMETERS:
                parameter, error = parameter_error(a, e, self._manifest.parameters)
                differences.append(_Difference(f"{spec.name}[{parameter}]", error))
            else:
                differences.append(_Difference(spec.name, relative_error(a, e)))
        return differences

    def _is_undetermined(
        self,
        method: MethodSpec,
        inputs: Arrays,
        expected: Arrays,
    ) -> bool:
        """Whether rounding-sized changes of the weights move eager PyTorch's own outputs beyond the tolerance."""
        w, *rest = inputs
        if method.role is Role.SHARE:
            return False
        for _ in range(_PERTURBATIONS):
            noise = self._rng.uniform(-_PERTURBATION, _PERTURBATION, w.shape)
            moved = self._eager.run(method.name, (w * (1 + noise)).astype(np.float32), *rest)
            if max(d.error for d in self._compare(method, moved, expected)) > self._tolerance:
                return True
        return False

    def _draw(self, method: MethodSpec, variant: int, kept: int, inner_step: float) -> Arrays:
        """Inputs for a method: ``kept`` unmasked examples in each batch, garbage in the masked ones.

        ``inner_step`` is the length of the first inner step, of methods with such steps, in lengths of ``w``.
        """
        if method.role is Role.SHARE:
            return self._draw_split(method, variant)
        values: dict[str, Array] = {"w": self._initial.copy() if variant == 0 else self._nearby_weights()}
        for spec in method.inputs:
            prefix, is_batch, _ = spec.name.rpartition("y")
            if is_batch:
                values |= self._batches(prefix, spec.shape, variant, kept)
        if method.role is Role.INFER:
            values["x"] = self._features((method.batch_size,), variant)
        if "inner_x" in values:
            values |= self._inner_rates(method, values, variant, inner_step)
        if method.role is Role.TRAIN:
            values["lr"] = self._long_rate(method, values, "lr")
        if method.role is Role.PER_FEDAVG:
            values["meta_lr"] = self._long_rate(method, values, "meta_lr")
        return tuple(np.ascontiguousarray(values[s.name], dtype=s.dtype) for s in method.inputs)

    def _batches(self, prefix: str, shape: tuple[int, ...], variant: int, kept: int) -> dict[str, Array]:
        """Examples of the shape ``[B]``, or ``[K, B]``: then the masks differ, and some draws mask a whole step."""
        keep = self._rng.permuted(np.broadcast_to(np.arange(shape[-1]) < kept, shape), axis=-1)
        if len(shape) == 2 and variant == 2:
            keep[shape[0] // 2] = False
        x = self._features(shape, variant)
        y = self._rng.integers(0, self._manifest.num_classes, shape)
        x[~keep] = self._rng.choice(_GARBAGE, x[~keep].shape)
        y[~keep] = self._rng.choice([-1, 2**40], y[~keep].shape)
        return {f"{prefix}x": x, f"{prefix}y": y, f"{prefix}mask": keep.astype(np.float32)}

    def _draw_split(self, method: MethodSpec, variant: int) -> Arrays:
        """An update, a factor and a scale, for codes of two bits up to sixty, and field elements with the edges."""
        size = self._manifest.num_parameters
        update = self._rng.standard_normal(size).astype(np.float32)
        factor, bits = ((1.0, 40), (0.37, 2), (1.0, 59), (1e-9, 24))[variant % 4]
        peak = max(1.0, float(np.abs(update).max()) * factor)
        scale = 2.0 ** min(bits, 59 - np.ceil(np.log2(peak)))
        drawn = [self._rng.integers(0, MERSENNE_61.modulus, size) for _ in method.inputs[3:]]
        edges = np.array([0, MERSENNE_61.modulus - 1])
        for i, elements in enumerate(drawn):
            elements[: 2 * size // 3] = np.where(
                self._rng.random(2 * size // 3) < 0.1, edges[i % 2], elements[: 2 * size // 3]
            )
        return (update, np.array([factor]), np.array([scale]), *drawn)

    def _features(self, shape: tuple[int, ...], variant: int) -> Float32Array:
        """Standard normal values; non-negative ones; or zeros in a third of the examples and negative values."""
        x = self._rng.standard_normal((*shape, *self._manifest.feature_shape)).astype(np.float32)
        match variant % 3:
            case 1:
                x = np.abs(x)
            case 2:
                x = -np.abs(x)
                x.reshape(-1, *self._manifest.feature_shape)[::3] = 0.0
        return x

    def _nearby_weights(self) -> Float32Array:
        """The initial weights with noise: 10 % of each value and 10 % of the root mean square."""
        w = self._initial
        scale = 0.1 * (np.abs(w) + np.sqrt(np.mean(np.square(w))))
        nearby: Float32Array = (w + scale * self._rng.standard_normal(w.shape)).astype(np.float32)
        return nearby

    def _long_rate(self, method: MethodSpec, values: dict[str, Array], name: str) -> Float32Array:
        """One that makes the step ten times as long as ``w``: a wrong gradient cannot hide behind the weights."""
        unit = np.ones(1, dtype=np.float32)
        stepped = self._eager.run(method.name, *({**values, name: unit}[s.name] for s in method.inputs))[0]
        return _rate(_LONG_STEP, values["w"], stepped - values["w"])

    def _inner_rates(
        self, method: MethodSpec, values: dict[str, Array], variant: int, inner_step: float
    ) -> dict[str, Array]:
        """A rate that makes the first step ``inner_step`` times as long as ``w``; of several, all differ, one is 0.

        After a longer step, the next ones' gradients are determined by rounding alone.
        """
        x, y, mask = (values[f"inner_{name}"] for name in ("x", "y", "mask"))
        if method.inner_steps is not None:
            x, y, mask = x[0], y[0], mask[0]
        lr = _rate(inner_step, values["w"], self._eager.mean_gradient(values["w"], x, y, mask))
        if method.role is not Role.ADAPT:
            return {"lr": lr}
        rates = (lr * self._rng.uniform(0.5, 1.5, len(self._manifest.parameters))).astype(np.float32)
        if variant and len(rates) > 1:
            rates[self._rng.integers(len(rates))] = 0.0
        return {"rates": rates}

    def _suspects(self, name: str) -> tuple[str, ...]:
        methods = {m.name: m for m in read_methods((self._bundle.path / PROGRAM_FILE).read_bytes())}
        return likely_operators(name, methods, passed={m for m, _ in self._errors})


def _rate(factor: float, w: Array, step: Array) -> Float32Array:
    """What a step is multiplied by to be ``factor`` times as long as the weights; 1 if either has no length."""
    length, unit = float(np.linalg.norm(w)), float(np.linalg.norm(step))
    return np.full(1, factor * length / unit if unit > 0 and length > 0 else 1.0, dtype=np.float32)


def likely_operators(name: str, methods: dict[str, PlannedMethod], passed: set[str]) -> tuple[str, ...]:
    """Operators to blame for a failing method: known offenders first, else those that no passing method uses."""
    used = methods[name].operators
    known = tuple(o for s in SUSPECTS for o in used if o.split(".")[0] == s)
    if known:
        return known
    innocent = {o for m in passed - {name} if m in methods for o in methods[m].operators}
    return tuple(o for o in used if o not in innocent) if innocent else ()
