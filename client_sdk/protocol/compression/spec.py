"""What is done to an update before it is sent: the compression specification and its one-line form.

The line travels in an assignment and is what an operator types. Both ends build the same codec from it and from the
update's length, so the bytes on the wire carry no parameters::

    none                          float32, as it is
    quantize:8                    every value in 8 bits
    topk:0.01                     the largest 1 % by magnitude
    topk:0.01,bits=8              the same, the values in 8 bits
    randomk:0.1,bits=4,rotate     10 % of the coordinates of the rotated update, drawn from a public seed
    threshold:0.001               every value of magnitude 0.001 and more
    sketch:0.05,rows=5            a count-sketch of 5 rows, 5 % of the update's size in all
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from client_sdk.protocol.errors import ConfigurationError

MAX_SIZE: Final = 2**31 - 1
"""Largest length of an update."""

DEFAULT_BLOCK: Final = 1024
DEFAULT_ROWS: Final = 5

ACCEPTED: Final = (
    "none, quantize:BITS, topk:RATIO, randomk:RATIO, threshold:MAGNITUDE or sketch:RATIO, then any of bits=8|4|1 "
    "(32 by default), block=VALUES (with fewer bits), rotate (randomk and quantize), feedback=on|off (not sketch), "
    "rows=ODD, columns=N (instead of RATIO) and recover=RATIO (sketch), separated by commas"
)
"""What ``CompressionSpec.parse`` reads, in words."""


class CompressionMethod(StrEnum):
    """How the values to be sent are chosen."""

    NONE = "none"
    """All of them."""

    TOPK = "topk"
    """The ``ratio`` largest by magnitude, ties to the lowest index. Depends on the data: not for private updates."""

    RANDOMK = "randomk"
    """A ``ratio`` of them drawn from the public seed: linear, no indices on the wire."""

    THRESHOLD = "threshold"
    """Those of magnitude ``threshold`` and more, however many there are. Depends on the data."""

    COUNT_SKETCH = "count-sketch"
    """Signed sums of coordinates that a hash throws together: linear, sketches of one seed can be added."""


_LINE_NAMES: Final = {
    "none": CompressionMethod.NONE,
    "quantize": CompressionMethod.NONE,
    "topk": CompressionMethod.TOPK,
    "randomk": CompressionMethod.RANDOMK,
    "threshold": CompressionMethod.THRESHOLD,
    "sketch": CompressionMethod.COUNT_SKETCH,
    "count-sketch": CompressionMethod.COUNT_SKETCH,
}
_BIASED: Final = frozenset({CompressionMethod.TOPK, CompressionMethod.THRESHOLD})


class CompressionSpec(BaseModel):
    """How updates are compressed. The same on both ends; with the update's length it fixes a ``Codec``.

    Guarantees: ``CompressionSpec.parse(str(spec)) == spec``, and equal specifications have equal lines.

    Attributes:
        method: How the values to be sent are chosen.
        ratio: Share of the coordinates that is sent (topk, randomk), or of the size that the sketch has.
        threshold: Smallest magnitude that is sent.
        rows: Rows of the sketch, an odd number: an estimate is the median of one per row.
        columns: Columns of the sketch, instead of ``ratio``.
        recover: Share of the coordinates, the largest estimates, that a decoded sketch keeps; None for all.
        value_bits: Bits of a value before entropy coding. Below 32 values are rounded: *stochastically* without error
            feedback, which keeps their expectation, and *to the nearest* with it, which keeps the residual bounded
            (each is the condition under which the respective theory holds).
        block: Values that share one scale; at least the update's length gives one scale for all.
        rotation: Multiply by a random orthogonal matrix drawn from the public seed first, so that no value is much
            larger than the others. Only where values are chosen without looking at them.
        error_feedback: Whether the device adds what it has not sent to its next update. On by default where the choice
            of values is biased (topk, threshold), off elsewhere.

    Raises:
        pydantic.ValidationError: A combination that makes no sense; the message says what to change.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    method: CompressionMethod = CompressionMethod.NONE
    ratio: float | None = Field(None, gt=0, le=1)
    threshold: float | None = Field(None, gt=0, le=3.4028234663852886e38, description="at most the largest float32")
    rows: int | None = Field(None, ge=1, le=31)
    columns: int | None = Field(None, ge=1, le=MAX_SIZE)
    recover: float | None = Field(None, gt=0, le=1)
    value_bits: Literal[32, 8, 4, 1] = 32
    block: int = Field(DEFAULT_BLOCK, ge=1, le=MAX_SIZE)
    rotation: bool = False
    error_feedback: bool = False

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        filled = dict(fields)
        method = filled.get("method", CompressionMethod.NONE)
        filled.setdefault("error_feedback", method in _BIASED)
        if method == CompressionMethod.COUNT_SKETCH and filled.get("rows") is None:
            filled["rows"] = DEFAULT_ROWS
        return filled

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        method, sketch = self.method, self.method is CompressionMethod.COUNT_SKETCH
        sized = method in {CompressionMethod.TOPK, CompressionMethod.RANDOMK}
        if sized and self.ratio is None:
            raise ValueError(f"{method} needs a ratio, e.g. {method}:0.01")
        if sketch and (self.ratio is None) == (self.columns is None):
            raise ValueError("a sketch is sized by a ratio or by columns, and not by both: sketch:0.05")
        if not (sized or sketch) and self.ratio is not None:
            raise ValueError(f"{method} has no ratio")
        if (self.threshold is not None) != (method is CompressionMethod.THRESHOLD):
            raise ValueError("a threshold goes with the method threshold, and the method with it: threshold:0.001")
        if not sketch and (self.rows, self.columns, self.recover) != (None, None, None):
            raise ValueError("rows, columns and recover go with a sketch only")
        if self.rows is not None and self.rows % 2 == 0:
            raise ValueError("the rows of a sketch are an odd number: estimates are medians")
        if self.value_bits == 32 and self.block != DEFAULT_BLOCK:
            raise ValueError("block goes with fewer than 32 bits a value: float32 needs no scale")
        self._check_rotation()
        self._check_feedback()
        return self

    def _check_rotation(self) -> None:
        if not self.rotation:
            return
        if self.method in _BIASED:
            raise ValueError(f"rotate spreads an update evenly, which leaves {self.method} no large values to choose")
        if self.method is CompressionMethod.COUNT_SKETCH:
            raise ValueError("rotate gains a sketch nothing: its signs are random already, and heavy values are wanted")
        if self.method is CompressionMethod.NONE and self.value_bits == 32:
            raise ValueError("rotate prepares values for fewer bits or for randomk; here all go out as float32")

    def _check_feedback(self) -> None:
        if not self.error_feedback:
            return
        if self.method is CompressionMethod.COUNT_SKETCH:
            raise ValueError(
                "a device's own sketch is too noisy for error feedback: its residual may grow without bound; set "
                "feedback=off"
            )
        if self.method is CompressionMethod.NONE and self.value_bits == 32:
            raise ValueError("nothing is lost, so there is no error to feed back; set feedback=off")

    @property
    def is_none(self) -> bool:
        """Whether updates travel as plain float32."""
        return self.method is CompressionMethod.NONE and self.value_bits == 32

    @property
    def is_linear(self) -> bool:
        """Whether values are chosen without looking at them, so that compressed updates of one seed can be added."""
        return self.method not in _BIASED

    @classmethod
    def parse(cls, line: str) -> Self:
        """Read the one-line form.

        Raises:
            ConfigurationError: Anything else; the message says what is accepted.

        Example:
            >>> str(CompressionSpec.parse("topk:1e-2,feedback=on,bits=8"))
            'topk:0.01,bits=8'
        """
        try:
            return cls(**_fields(line))
        except ValidationError as e:
            why = "; ".join(
                ": ".join([*map(str, error["loc"]), error["msg"].removeprefix("Value error, ")]) for error in e.errors()
            )
        except ValueError as e:
            why = str(e)
        raise ConfigurationError(f"compression {line!r}: {why}. Accepted: {ACCEPTED}")

    def __str__(self) -> str:
        if self.method is CompressionMethod.NONE:
            line = "none" if self.value_bits == 32 else f"quantize:{self.value_bits}"
        else:
            size = self.threshold if self.method is CompressionMethod.THRESHOLD else self.ratio
            name = "sketch" if self.method is CompressionMethod.COUNT_SKETCH else self.method.value
            line = name if size is None else f"{name}:{_number(size)}"
            if self.value_bits != 32:
                line += f",bits={self.value_bits}"
        if self.rows is not None:
            line += f",rows={self.rows}"
        if self.columns is not None:
            line += f",columns={self.columns}"
        if self.recover is not None:
            line += f",recover={_number(self.recover)}"
        if self.block != DEFAULT_BLOCK:
            line += f",block={self.block}"
        if self.rotation:
            line += ",rotate"
        if self.error_feedback != (self.method in _BIASED):
            line += f",feedback={'on' if self.error_feedback else 'off'}"
        return line


def _fields(line: str) -> dict[str, Any]:
    """What a line says, unchecked; ValueError where it cannot be read."""
    head, *options = line.strip().split(",")
    name, separator, value = head.partition(":")
    if name not in _LINE_NAMES or bool(separator) != bool(value):
        raise ValueError(f"there is no method {head!r}")
    fields: dict[str, Any] = {"method": _LINE_NAMES[name]}
    if name == "quantize":
        if not value:
            raise ValueError("quantize needs bits, e.g. quantize:8")
        fields["value_bits"] = int(value)
        if fields["value_bits"] == 32:
            raise ValueError("float32 is called none")
    elif value:
        fields["threshold" if name == "threshold" else "ratio"] = float(value)
    for option in options:
        field, read = _option(option)
        if field in fields:
            raise ValueError(f"{field} is given twice")
        fields[field] = read
    return fields


def _option(text: str) -> tuple[str, Any]:
    """Field and value of one option of a line."""
    name, _, value = text.strip().partition("=")
    match name, value:
        case "rotate", "":
            return "rotation", True
        case "feedback", "on" | "off":
            return "error_feedback", value == "on"
        case "bits", _:
            return "value_bits", int(value)
        case "block" | "rows" | "columns", _:
            return name, int(value)
        case "recover", _:
            return name, float(value)
        case _:
            raise ValueError(f"there is no option {text!r}")


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")
