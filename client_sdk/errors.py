"""Conditions of the device itself: its network, its disk, its data, the bundle it was given.

What the two ends tell each other is in ``client_sdk.protocol.errors``; these never cross the wire.
"""

from __future__ import annotations

from typing import ClassVar

from client_sdk.protocol.errors import PocketfedError, ProtocolError


class DeviceError(PocketfedError):
    """Root of the device's own errors.

    Attributes:
        retryable: Whether the same step can succeed later without anything changing on the device.
        retry_after_s: ``(min, max)`` seconds to wait before that, where somebody said so.
    """

    retryable: ClassVar[bool] = False

    def __init__(self, detail: str, *, retry_after_s: tuple[float, float] | None = None) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class TransportUnavailable(DeviceError):
    """The server cannot be reached now: no route, refused, reset, timed out, cut off."""

    retryable = True


class InvalidReply(DeviceError):
    """What answered does not speak the protocol. Retried: a captive portal answers like this until one logs in."""

    retryable = True


class UntrustedReply(InvalidReply):
    """What answered did not sign its reply to this request as the server does.

    Retried, as every ``InvalidReply``: a portal, a proxy or a cache that stands in for the server goes away.
    """


class ServerKeyChanged(DeviceError):
    """The reply is signed, but by another key than the server's that this device knows.

    Not retried: waiting does not bring the key back. Either the server has a new one, which whoever embeds the device
    has to confirm, or somebody else speaks in its name.
    """


class BlobHashMismatch(DeviceError):
    """The downloaded bytes are not those the assignment names. Retried: a proxy may have mangled them."""

    retryable = True


class BundleMismatch(DeviceError):
    """Model, program and manifest are each what they claim to be, but do not belong together."""


class PrivacyRefusal(DeviceError):
    """The device will not send what the assignment asks for, now or later: the assignment is given back."""


class UntrustedAggregators(PrivacyRefusal):
    """The update would go to others than those that the device was told to trust."""


class ParticipationsSpent(PrivacyRefusal):
    """The device has taken part as often as the task's privacy allows."""


class LocalBudgetSpent(PrivacyRefusal):
    """Another noised report would spend more than the device's own budget."""


class LocalPrivacyUnavailable(PrivacyRefusal):
    """The assignment asks for what the device's local privacy does not cover."""


class IllegalTransition(DeviceError):
    """What a session or a training cannot take where it stands: a bug in whoever drives it."""


class Interrupted(DeviceError):
    """The caller asked to stop; what was begun can be begun again."""


class TrainingPaused(DeviceError):
    """The device's conditions do not allow to train now; what was done is kept, and training goes on from there.

    Attributes:
        reason: The policy's ``PauseReason``.
    """

    def __init__(self, detail: str, *, reason: str) -> None:
        super().__init__(detail)
        self.reason = reason


class StateDirLocked(DeviceError):
    """Another process uses this state directory."""


class StateDirUnusable(DeviceError):
    """The state directory cannot be read or written."""


class CheckpointError(DeviceError):
    """A checkpoint cannot be used; training begins again, or goes on from an older one."""


class CheckpointCorrupted(CheckpointError):
    """The file's bytes are not those that were written."""


class CheckpointTruncated(CheckpointError):
    """The file ends before what it declares."""


class CheckpointTooLarge(CheckpointError):
    """The checkpoint is larger than the app allows."""


class CheckpointVersionError(CheckpointError):
    """The file is whole, and of a format that this release does not read."""


class CheckpointKeyError(CheckpointError):
    """The file is whole, and was written with another key, or with one where none is given, or the other way round."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint is good, and of another training.

    Attributes:
        fields: Names of what differs, of ``CheckpointBinding``.
    """

    def __init__(self, fields: tuple[str, ...]) -> None:
        super().__init__(f"the checkpoint belongs to another training: it differs in {', '.join(fields)}")
        self.fields = fields


class PersonalModelMismatch(CheckpointError):
    """The personal model is good, and was adapted for another program: its numbers mean nothing to this one."""

    def __init__(self, program_sha256: str) -> None:
        super().__init__(f"the personal model is one of program {program_sha256}, not of the one that is here")


class NoPersonalModel(DeviceError):
    """There are no weights to serve: neither a personal model nor a global one has come so far."""


class Int8Refused(DeviceError):
    """The program's int8 body cannot serve these weights; they can be served in float."""


class StaleBody(Int8Refused):
    """The int8 body was quantised from another model than the one that these weights come from.

    After a new global model this is so until a program with its body comes; a device that goes on with the old global
    model, or a task whose body stays as it is, is not concerned.
    """

    def __init__(self, model_name: str, *, known: bool) -> None:
        """Say so.

        Args:
            model_name: The program's model.
            known: Whether the global model was at hand, and is not the quantised one.
        """
        what = "the global model" if known else "these weights, or the global model that they were adapted from"
        super().__init__(
            f"the int8 body of {model_name} was not quantised from {what}: serve in float, or export the program again "
            "from the present global model"
        )


class PersonalBody(Int8Refused):
    """The int8 body is the global model's, but the weights are personal outside of the head.

    Attributes:
        parameters: Names of the parameters outside of the head that differ from the global model.
    """

    def __init__(self, parameters: tuple[str, ...], head: tuple[str, ...]) -> None:
        super().__init__(
            f"{', '.join(parameters)} differ from the global model, and int8 serves a personal {', '.join(head)} only: "
            "serve them in float, or adapt the head alone"
        )
        self.parameters = parameters


class InvalidDataFile(DeviceError):
    """The file of training examples cannot be used; the message names the file and what to change."""


def is_transient(error: PocketfedError) -> bool:
    """Whether waiting may help. Everything that is not known to be transient is permanent."""
    return isinstance(error, ProtocolError | DeviceError) and error.retryable


def retry_window(error: PocketfedError) -> tuple[float, float] | None:
    """The ``(min, max)`` seconds that the sender of the error asked for."""
    return error.retry_after_s if isinstance(error, ProtocolError | DeviceError) else None
