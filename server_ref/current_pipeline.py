"""A task's pipeline, which changes with its clip norm where that is adaptive."""

from __future__ import annotations

from collections.abc import Callable

from server_ref.aggregation.adaptive_clipping import AdaptiveClipNorm
from server_ref.aggregation.pipeline import Pipeline


class CurrentPipeline:
    """The pipeline of the present model version, in memory.

    An adaptive clip norm belongs to a model version, like its weights: it follows from the release that made them, and
    is durable with them.

    Args:
        build: Makes the pipeline for a clip norm; None: for the one that the settings say.
        first: The first round's clip norm; None where it does not change.

    Attributes:
        pipeline: Of the present model version.
        clip_norm: Likewise; None where it does not change.
    """

    def __init__(
        self, build: Callable[[AdaptiveClipNorm | None], Pipeline], first: AdaptiveClipNorm | None = None
    ) -> None:
        self._build = build
        self._first = first
        self.clip_norm = first
        self.pipeline = build(first)

    def begin(self, clip_norm: AdaptiveClipNorm | None) -> None:
        """Go over to another model version.

        Args:
            clip_norm: Its clip norm; None for the first model's.
        """
        clip_norm = clip_norm or self._first
        if clip_norm != self.clip_norm:
            self.clip_norm, self.pipeline = clip_norm, self._build(clip_norm)
