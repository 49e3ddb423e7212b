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
        output: Name of the output that differs, with the parameter in brackets where it is a vector over all.
        error: Relative error (see ``mobile_export.parity.relative_error``); infinite for NaN, for a wrong shape, or
            where the method fails to run.
        tolerance: What was allowed.
        suspects: Operators of the method that are known to go wrong, or that no method uses which passed; most
            likely first.
    """

    def __init__(
        self,
        method: str,
        output: str,
        error: float,
        tolerance: float,
        suspects: tuple[str, ...],
        *,
        failure: str | None = None,
    ) -> None:
        what = failure or (
            f"output {output!r} differs from eager PyTorch by {error:.3g} (relative; {tolerance:.3g} is allowed)"
        )
        hint = f"likely operator: {', '.join(suspects)}" if suspects else "no operator of it is known to be wrong"
        super().__init__(f"{method}: {what}; {hint}")
        self.method = method
        self.output = output
        self.error = error
        self.tolerance = tolerance
        self.suspects = suspects
