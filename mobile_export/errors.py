"""Refusals of the exporter."""

from __future__ import annotations

from client_sdk.protocol.errors import ProgramError


class UnsupportedModel(ProgramError):
    """The model cannot become a functional program over one flat float32 vector; the message names the layer.

    Attributes:
        layer: Dotted name of the layer, parameter or operator at fault.
    """

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(f"{layer}: {reason}" if layer else reason)
        self.layer = layer


class ParityError(ProgramError):
    """The exported program does not compute what the model computes.

    Attributes:
        method: Method that differs.
        output: Name of the output that differs.
        error: Relative error (see ``mobile_export.parity.relative_error``); infinite for NaN or a wrong shape.
        tolerance: What was allowed.
        suspects: Operators of the method that are known to go wrong, most likely first; empty if none is known.
    """

    def __init__(self, method: str, output: str, error: float, tolerance: float, suspects: tuple[str, ...]) -> None:
        hint = f"likely operator: {', '.join(suspects)}" if suspects else "no operator of it is known to be wrong"
        super().__init__(
            f"{method}: output {output!r} differs from eager PyTorch by {error:.3g} (relative; {tolerance:.3g} is "
            f"allowed); {hint}"
        )
        self.method = method
        self.output = output
        self.error = error
        self.tolerance = tolerance
        self.suspects = suspects
