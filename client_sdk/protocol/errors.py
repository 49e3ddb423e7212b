"""The error tree both ends share.

Every condition that a caller may want to tell apart has a class of its own. Errors carry ids and limits, never
update values. A ``ProtocolError`` crosses the wire as problem+json: its ``slug`` is the stable ``type``, and
``from_problem`` turns it back into the same class on the other side.
"""

from __future__ import annotations

from typing import ClassVar

PROBLEM_PREFIX = "urn:pocketfed:problem:"


class PocketfedError(Exception):
    """Root of all errors that pocketfed raises on purpose."""


# --- what goes over the wire ---------------------------------------------------------------------------------


class ProtocolError(PocketfedError):
    """A message or a frame that breaks the protocol, or a refusal that the server states.

    Attributes:
        slug: Stable identifier; ``PROBLEM_PREFIX + slug`` is the ``type`` of the problem+json.
        http_status: Status the server answers with.
        title: One line that does not change between occurrences.
        retryable: Whether the same request can succeed later without the client changing anything.
        retry_after_s: ``(min, max)`` seconds to wait before the retry, where the sender knows.
    """

    slug: ClassVar[str] = "protocol-error"
    http_status: ClassVar[int] = 400
    title: ClassVar[str] = "The request breaks the protocol."
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str = "", *, retry_after_s: tuple[float, float] | None = None) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        self.retry_after_s = retry_after_s

    @property
    def type_uri(self) -> str:
        """The problem's stable ``type``."""
        return PROBLEM_PREFIX + self.slug


class MalformedFrame(ProtocolError):
    """A binary frame that is not the canonical encoding of anything."""

    slug = "malformed-frame"
    title = "The binary frame is malformed."


class TruncatedFrame(MalformedFrame):
    """Fewer bytes than the frame (or the request) declares."""

    slug = "truncated-frame"
    title = "The body is shorter than it declares."


class OversizedBody(ProtocolError):
    """More bytes, tensors or header than the limits allow."""

    slug = "oversized-body"
    http_status = 413
    title = "The body is larger than this resource accepts."


class MalformedMessage(ProtocolError):
    """A JSON message that does not fit its schema."""

    slug = "malformed-message"
    http_status = 422
    title = "The message does not fit its schema."


class UnsupportedVersion(ProtocolError):
    """The peer speaks another protocol version."""

    slug = "unsupported-version"
    title = "The protocol version is not supported."


class AuthenticationFailed(ProtocolError):
    """The signature is missing, wrong, or of an unknown device."""

    slug = "authentication-failed"
    http_status = 401
    title = "The request is not signed by an enrolled device."


class UnknownDevice(AuthenticationFailed):
    """The device id was never enrolled here (or the server's state was reset)."""

    slug = "unknown-device"
    title = "The device is not enrolled on this server."


class BodyAltered(AuthenticationFailed):
    """The body is not the one whose digest was signed: something on the way changed it. Sent again it may arrive."""

    slug = "body-altered"
    http_status = 400
    title = "The body is not the one that was signed."
    retryable = True


class UnknownAssignment(ProtocolError):
    """No assignment with this id was given to this device."""

    slug = "unknown-assignment"
    http_status = 404
    title = "No such assignment belongs to this device."


class UnknownBlob(ProtocolError):
    """No blob with this content hash."""

    slug = "unknown-blob"
    http_status = 404
    title = "No blob has this content hash."


class StaleReport(ProtocolError):
    """The report's assignment is over: its round closed, or its model is too old."""

    slug = "stale-report"
    http_status = 409
    title = "The assignment's round is over."


class LeaseExpired(StaleReport):
    """The report came after the assignment's deadline."""

    slug = "lease-expired"
    title = "The assignment's lease has expired."


class DuplicateReport(ProtocolError):
    """Another report was accepted for this assignment already."""

    slug = "duplicate-report"
    http_status = 409
    title = "The assignment already has a report."


class ReportMismatch(ProtocolError):
    """The report repeats the assignment's facts wrongly (version, hash, kind, encoding, ...)."""

    slug = "report-mismatch"
    http_status = 409
    title = "The report contradicts its assignment."


class InvalidUpdate(ProtocolError):
    """The tensors are well framed but cannot be aggregated."""

    slug = "invalid-update"
    http_status = 422
    title = "The update cannot be aggregated."


class NonFiniteUpdate(InvalidUpdate):
    """NaN or infinity in the update."""

    slug = "non-finite-update"
    title = "The update holds NaN or infinite values."


class UpdateOutOfRange(InvalidUpdate):
    """A value beyond the bound that the assignment declares."""

    slug = "update-out-of-range"
    title = "The update holds values beyond the declared bound."


class ShapeMismatch(InvalidUpdate):
    """Wrong shape, dtype or length."""

    slug = "shape-mismatch"
    title = "The update's tensors do not fit the parameter table."


class MalformedEncoding(InvalidUpdate):
    """A compressed update that no encoder writes."""

    slug = "malformed-encoding"
    title = "The compressed update is malformed."


class TruncatedEncoding(MalformedEncoding):
    """Fewer bytes than the compressed update's content takes."""

    slug = "truncated-encoding"
    title = "The compressed update is cut short."


class MalformedShare(InvalidUpdate):
    """A secure report, or a share of one, that no device writes."""

    slug = "malformed-share"
    title = "The secure report or one of its shares is malformed."


class SealingFailed(InvalidUpdate):
    """A ciphertext does not open under this key and this context. It never says why."""

    slug = "sealing-failed"
    title = "The sealed bytes do not open."


class ServerBusy(ProtocolError):
    """Overload; come back later."""

    slug = "server-busy"
    http_status = 503
    title = "The server is busy."
    retryable = True


class StorageUnavailable(ProtocolError):
    """The server cannot make the report durable now (full disk, database down)."""

    slug = "storage-unavailable"
    http_status = 507
    title = "The server cannot store the report now."
    retryable = True


class UnknownUpload(ProtocolError):
    """No chunks of this report are expected: it was not announced, or its upload is over. Announced again it may be."""

    slug = "unknown-upload"
    http_status = 404
    title = "No upload of this report is under way."
    retryable = True


class UploadOffsetMismatch(ProtocolError):
    """The chunk does not begin where the upload stands: another one was lost, or this one came before.

    Attributes:
        offset: Where it stands, on the side that knows; the problem's ``offset``.
    """

    slug = "upload-offset"
    http_status = 409
    title = "The chunk does not begin where the upload stands."
    retryable = True

    def __init__(
        self, detail: str = "", *, retry_after_s: tuple[float, float] | None = None, offset: int | None = None
    ) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)
        self.offset = offset


class RangeNotSatisfiable(ProtocolError):
    """The requested byte range lies outside the blob."""

    slug = "range-not-satisfiable"
    http_status = 416
    title = "The byte range lies outside the blob."


def _walk(cls: type[ProtocolError]) -> list[type[ProtocolError]]:
    return [cls, *(c for sub in cls.__subclasses__() for c in _walk(sub))]


def from_problem(type_uri: str, detail: str = "", *, http_status: int = 400) -> ProtocolError:
    """Rebuild the error that a problem+json stands for.

    An unknown ``type`` gives a plain ``ProtocolError`` for a 4xx status and a retryable ``ServerBusy`` for a 5xx one,
    so that an older client still knows whether to try again.
    """
    slug = type_uri.removeprefix(PROBLEM_PREFIX)
    for cls in _walk(ProtocolError):
        if cls.slug == slug:
            return cls(detail)
    return ServerBusy(detail) if http_status >= 500 else ProtocolError(detail or f"{type_uri} ({http_status})")


# --- values and bounds ---------------------------------------------------------------------------------------


class BudgetExceeded(PocketfedError):
    """An exact sum or encoding would leave its declared budget; the answer would no longer be exact."""


class NotEnoughShares(PocketfedError):
    """Fewer shares than reconstruct a secret, or than can be checked against each other; the message says which."""


class EmptyAggregate(PocketfedError):
    """A mean over no updates was asked for."""


class TooManyByzantine(PocketfedError):
    """More dishonest updates are assumed than the rule stands among so many; the message says what to change.

    Attributes:
        rule: Name of the rule.
        num_rows: Updates (or means of updates) that it was given.
        num_byzantine: How many of them were assumed to be dishonest.
        limit: The largest number that it stands; negative if there are too few updates even for 0.
    """

    def __init__(self, detail: str, *, rule: str, num_rows: int, num_byzantine: int, limit: int) -> None:
        super().__init__(detail)
        self.rule = rule
        self.num_rows = num_rows
        self.num_byzantine = num_byzantine
        self.limit = limit


class DivergenceDetected(PocketfedError):
    """Training left its course: its loss or the norms of its updates explode. The message says by what it shows."""


# --- programs ------------------------------------------------------------------------------------------------


class ProgramError(PocketfedError):
    """Something about an exported program."""


class ManifestError(ProgramError):
    """The manifest is missing, unreadable, or of an unknown format."""


class ProgramHashMismatch(ProgramError):
    """The program's bytes are not those that the manifest describes."""


class ProgramVersionMismatch(ProgramError):
    """The program was exported by another ExecuTorch release than the one that would run it."""


class MissingOperator(ProgramError):
    """The program calls an operator that this runtime does not have."""


class ProgramInputError(ProgramError):
    """Inputs that do not fit the method's signature."""


class UnknownMethod(ProgramError):
    """The program has no method of this name, role or batch size."""


class ProgramExecutionError(ProgramError):
    """The runtime reported an error while it ran a method."""


class TrainingDiverged(ProgramError):
    """Local training left the finite numbers; the message names the step."""


class NotEnoughExamples(ProgramError):
    """The device has too few different examples for what it is asked to learn."""


class RuntimeUnavailable(ProgramError):
    """No ExecuTorch adapter can run here; the message says what to install."""


class MemoryBudgetExceeded(ProgramError):
    """The method needs more memory than the device may use."""


# --- configuration -------------------------------------------------------------------------------------------


class ConfigurationError(PocketfedError):
    """A setting (or a combination of settings) that cannot work; the message says what to change."""


class InvalidSealingKey(ConfigurationError):
    """A key that nothing can be sealed to, or opened with: wrong length, not a key of its suite, of low order."""
