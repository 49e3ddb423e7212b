"""What can go wrong in a simulation, beyond the protocol's own errors."""

from __future__ import annotations

from client_sdk.protocol.errors import PocketfedError


class SimulationError(PocketfedError):
    """Root of the simulator's errors."""


class DatasetUnavailable(SimulationError):
    """The data set is not on this machine, or cannot be fetched; the message says how to get it."""


class MalformedDataset(SimulationError):
    """A data file that is not what it claims to be: truncated, wrong magic, wrong checksum."""


class PartitionError(SimulationError):
    """A partition that cannot be parsed, or that the data set is too small for."""


class AttackError(SimulationError):
    """An attack that cannot be parsed, or that this run cannot carry out; the message lists what there is."""


class OutputDirectoryInUse(SimulationError):
    """The output folder holds another run, or is in use by one."""


class ResumeMismatch(SimulationError):
    """The run to be resumed had another configuration, or was written by another version."""


class ServerUnavailable(SimulationError):
    """The server did not start, or went away; the message quotes its last words."""


class FleetCannotTrain(SimulationError):
    """No device of the fleet delivers anything any more; the message says why the last one did not."""


class WorkerLost(SimulationError):
    """A worker process ended without a result; the message says how to go on."""


class ProfileError(SimulationError):
    """A file of fleet profiles that cannot be read; the message names the file, the line and the key."""


class SkewError(SimulationError):
    """A skew of features that cannot be parsed, or that the data set cannot have; the message lists the forms."""


class NothingToJudge(SimulationError):
    """No device, or one without examples that could tell a good model from a bad one."""


class MissingModel(SimulationError):
    """A device that is to be judged has no model, or one that does not fit; the message names it."""
