"""Between a run and the study of its models: where they come from, and who is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from client_sdk.protocol.frames import decode_frame
from client_sdk.protocol.program import Float32Array
from mobile_export.bundle import ProgramBundle
from simulator.folder import BUNDLE_FOLDER, RunFolder
from simulator.personalization.models import Models, rounds_to_keep
from simulator.prepare import INITIAL_WEIGHTS_SEED, Fleet
from simulator.results import PersonalizationResult
from simulator.view import ServerView


def flat_weights(frame: bytes) -> Float32Array:
    """A model blob as one vector, float32[d]."""
    return np.frombuffer(decode_frame(frame).payload, np.float32)


def models_of(view: ServerView, initial: Float32Array, own: Mapping[int, Float32Array], *, of_rounds: int) -> Models:
    """What devices adapt, from a server of the run's own, which keeps all of its models.

    Args:
        view: Of the server.
        initial: The model before the first round, float32[d].
        own: See ``Models``.
        of_rounds: That the run was to have.
    """
    made = {committed.model_version: committed.model_sha256 for committed in view.rounds(0)}
    wanted = rounds_to_keep(of_rounds, max(made, default=0))
    return Models({n: flat_weights(view.blob(made[n])) if n in made else initial for n in sorted(wanted)}, own)


def personalization_of(
    folder: RunFolder, fleet: Fleet, models: Models | None, *, threads: int, say: Callable[[str], None]
) -> PersonalizationResult | None:
    """What comes of it when devices adapt a run's models. Of both engines it is computed in batches, by torch.

    Args:
        folder: The run's, with its program.
        fleet: Who adapts.
        models: What they adapt; None for nothing.
        threads: See ``PersonalizationStudy``.
        say: Is told that it begins.

    Returns:
        None where the run asks for none, or has no models.
    """
    config, adaptation = folder.config, folder.config.adaptation
    if adaptation is None or models is None:
        return None
    from mobile_export.models import build_model  # noqa: PLC0415 - torch, where devices need none
    from simulator.cohort.model import BatchedModel  # noqa: PLC0415
    from simulator.personalization.study import PersonalizationStudy  # noqa: PLC0415

    say(f"adaptation: devices take {adaptation.steps} steps from the models of some rounds, and are judged")
    dataset = fleet.dataset
    module = build_model(config.model, dataset.feature_shape, dataset.num_classes, INITIAL_WEIGHTS_SEED)
    model = BatchedModel(module, ProgramBundle.open(folder.path / BUNDLE_FOLDER).manifest.parameters)
    return PersonalizationStudy(model, fleet, adaptation, threads=threads).result(models, of_rounds=config.rounds)
