"""How often a device has taken part in a task: the device's own count, which no server can reset.

Differential privacy over a whole run speaks of devices that take part at most k times. Each counts for itself, before a
report leaves it: what is counted is the assignment, so that one that is sealed again after a crash counts once, and
one whose report never arrived counts all the same.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from client_sdk.atomic import write_atomically
from client_sdk.errors import StateDirUnusable
from client_sdk.files import OS_FILES, FileLayer
from client_sdk.protocol.messages import Id128


class TaskParticipations(BaseModel):
    """One task's count.

    Attributes:
        count: Assignments for which a report was sealed.
        last: The latest of them; a device holds one at a time, so no other can come again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    count: int = Field(ge=1)
    last: Id128

    def without(self, assignment_id: str) -> int:
        """The count of all assignments but this one."""
        return self.count - (assignment_id == self.last)


class Participations(BaseModel):
    """The counts of all tasks that a device has ever taken part in."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tasks: dict[Id128, TaskParticipations] = Field(default_factory=dict)

    def without(self, task_id: str, assignment_id: str) -> int:
        """How often the device took part in a task, one assignment not counted."""
        task = self.tasks.get(task_id)
        return 0 if task is None else task.without(assignment_id)

    def counting(self, task_id: str, assignment_id: str) -> Participations:
        """These counts with one assignment more; the same where it is in them."""
        count = self.without(task_id, assignment_id) + 1
        return Participations(tasks=self.tasks | {task_id: TaskParticipations(count=count, last=assignment_id)})


class ParticipationFile:
    """The counts in a file. All methods raise ``OSError``."""

    def __init__(self, path: Path, files: FileLayer = OS_FILES) -> None:
        self._path = path
        self._files = files

    def load(self) -> Participations:
        """What is counted so far.

        Raises:
            StateDirUnusable: The file is damaged. It is left as it is: a device that does not know how often it took
                part must not go on as if it never had.
        """
        if self._files.status(self._path) is None:
            return Participations()
        try:
            return Participations.model_validate_json(self._files.read(self._path))
        except ValueError as e:
            raise StateDirUnusable(
                f"{self._path} is damaged, so how often this device took part in private tasks is not known; "
                "restore it, or start anew with another state directory"
            ) from e

    def save(self, participations: Participations) -> None:
        """Make the counts durable before this returns."""
        write_atomically(self._path, participations.model_dump_json().encode(), files=self._files)
