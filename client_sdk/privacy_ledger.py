"""What a device has spent of its own privacy: one file, written before noise is drawn, never lowered.

A charge is one draw of noise. What is drawn again, after a crash or because a stored report was lost, is charged again:
two noised versions of one update say more about it than one. What is stored is sent as it is, as often as need be, and
costs nothing more; which bytes those are stands beside the charge.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from client_sdk.atomic import write_atomically
from client_sdk.errors import StateDirUnusable
from client_sdk.files import OS_FILES, FileLayer
from client_sdk.protocol.accountant import RdpAccount, gaussian_rdp
from client_sdk.protocol.messages import Sha256

LEDGER_FILE = "local-privacy.json"
"""Name of the ledger in a device's state directory."""


class NoisedReports(BaseModel):
    """Reports with one amount of noise.

    Attributes:
        noise_multiplier: z, standard deviation of the noise over the L2 distance of two updates, 2 C.
        count: How many.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    noise_multiplier: float = Field(gt=0, allow_inf_nan=False)
    count: int = Field(ge=1)


class LocalCharges(BaseModel):
    """Everything that was ever charged. A value: ``charging`` and ``naming`` make the next one.

    Noise multipliers are kept rather than divergences: what follows from them can be computed anew, at other orders or
    by a better accountant.

    Attributes:
        version: Of the format.
        noised: What was charged, by amount of noise.
        report_sha256: Of the report that came of the latest charge, once there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    noised: tuple[NoisedReports, ...] = ()
    report_sha256: Sha256 | None = None

    @property
    def reports(self) -> int:
        """How many noised reports were charged, whether or not they arrived."""
        return sum(each.count for each in self.noised)

    @property
    def account(self) -> RdpAccount:
        """Divergences of all of them together."""
        account = RdpAccount()
        for each in self.noised:
            account = account.plus(each.count * r for r in gaussian_rdp(each.noise_multiplier))
        return account

    def charging(self, noise_multiplier: float) -> LocalCharges:
        """These charges and one more, of which no report has come yet."""
        counts = {each.noise_multiplier: each.count for each in self.noised}
        counts[noise_multiplier] = counts.get(noise_multiplier, 0) + 1
        return LocalCharges(noised=tuple(NoisedReports(noise_multiplier=z, count=n) for z, n in counts.items()))

    def naming(self, report_sha256: str) -> LocalCharges:
        """These charges, with the hash of what came of the latest."""
        return self.model_copy(update={"report_sha256": report_sha256})


class LocalPrivacyLedger:
    """The charges of one device, over all tasks and policies, in a file of its own.

    It belongs into the state directory, whose lock keeps other processes away. Deleting it makes the device forget what
    it has spent, and nothing can notice that.

    Args:
        path: The file; its folder exists.
        files: Where it is written.
    """

    def __init__(self, path: Path, *, files: FileLayer = OS_FILES) -> None:
        self._path = path
        self._files = files

    def charges(self) -> LocalCharges:
        """What was charged so far.

        Raises:
            StateDirUnusable: The file is damaged or cannot be read. It is left as it is: a device that does not know
                what it has spent must not begin again at 0.
        """
        try:
            if self._files.status(self._path) is None:
                return LocalCharges()
            content = self._files.read(self._path)
        except OSError as e:
            raise self._unusable("read", e) from e
        digest, _, body = content.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() == digest:
            try:
                return LocalCharges.model_validate_json(body)
            except ValueError:
                pass  # whole, but of another version
        raise StateDirUnusable(
            f"{self._path} is damaged, or of another version: what this device has spent of its local privacy is not "
            "known; restore the file, or start anew with another state directory"
        )

    def charge(self, noise_multiplier: float) -> None:
        """Charge one draw of noise; durable before this returns, and before the noise is drawn.

        Raises:
            StateDirUnusable: It could not be read or written.
        """
        self._save(self.charges().charging(noise_multiplier))

    def name(self, report_sha256: str) -> None:
        """Note the bytes that came of the latest charge; durable before this returns, and before they are stored.

        Raises:
            StateDirUnusable: It could not be read or written.
        """
        self._save(self.charges().naming(report_sha256))

    def covers(self, report_sha256: str) -> bool:
        """Whether these bytes are what came of the latest charge.

        Raises:
            StateDirUnusable: The file is damaged or cannot be read.
        """
        return self.charges().report_sha256 == report_sha256

    def _save(self, charges: LocalCharges) -> None:
        body = charges.model_dump_json().encode()
        try:
            digest = hashlib.sha256(body).hexdigest().encode()
            write_atomically(self._path, digest + b"\n" + body, files=self._files)
        except OSError as e:
            raise self._unusable("write", e) from e

    def _unusable(self, verb: str, error: OSError) -> StateDirUnusable:
        return StateDirUnusable(f"cannot {verb} {self._path}: {error.strerror or error}")
