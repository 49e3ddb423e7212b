"""Skew of features: what one device's camera, light and hand do to its pictures, drawn by hash.

Labels stay as they are; the partition is what deals them out unevenly. A device's style is a function of the seed, the
device and the amplitudes, so that it is the same in both engines and in any order of questions.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, fields
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from simulator.errors import SkewError

Images = npt.NDArray[np.float32]

FORMS: Final = (
    "KIND:AMOUNT, several after commas, of rotation (degrees, up to 180), slant (degrees, up to 60), brightness (0 .. "
    "1), contrast (0 .. 1), blur (pixels, up to 5), noise (0 .. 1), thickness (of strokes, 0 .. 1), such as "
    "rotation:30,brightness:0.2; or writers, which stands for how differently people write, beside kinds of your own"
)
_MOST: Final = {
    "rotation": 180.0, "slant": 60.0, "brightness": 1.0, "contrast": 1.0, "blur": 5.0, "noise": 1.0, "thickness": 1.0,
}  # fmt: skip
# Images are worked on a few at a time, so that the temporary arrays stay small.
_CHUNK: Final = 512


@dataclass(frozen=True)
class Skew:
    """How far devices differ: the amplitude of each kind, 0 for none.

    Attributes:
        rotation: Largest angle to either side, degrees.
        slant: Largest shear to either side, degrees: how upright somebody writes.
        brightness: Most that is added to every pixel or taken off.
        contrast: Pixels' distance from 1/2 is scaled by at most ``1 + contrast``, or divided by it.
        blur: Largest standard deviation of a Gaussian, pixels.
        noise: Largest standard deviation of what the sensor adds to each pixel, anew for every picture.
        thickness: How far strokes are at most blended with ones that are a pixel wider, or narrower, to either side.
    """

    rotation: float = 0.0
    slant: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    thickness: float = 0.0

    def __str__(self) -> str:
        return ",".join(f"{f.name}:{getattr(self, f.name):g}" for f in fields(self) if getattr(self, f.name))

    def __bool__(self) -> bool:
        return any(getattr(self, f.name) for f in fields(self))

    def replaced(self, other: Skew) -> Skew:
        """These amplitudes, with those kinds that the other one has taken from there."""
        return Skew(**{f.name: getattr(other, f.name) or getattr(self, f.name) for f in fields(self)})


WRITERS: Final = Skew(rotation=30.0, slant=30.0, contrast=0.5, blur=0.4, thickness=0.7)
"""What ``writers`` stands for: how the hand turns, leans and presses, and what the pen does. Chosen by eye."""


def parse_skew(text: str) -> Skew:
    """Parse the command line's form.

    >>> parse_skew("rotation:30,blur:0.5")
    Skew(rotation=30.0, slant=0.0, brightness=0.0, contrast=0.0, blur=0.5, noise=0.0, thickness=0.0)
    >>> str(parse_skew("writers,rotation:10"))
    'rotation:10,slant:30,contrast:0.5,blur:0.4,thickness:0.7'

    Raises:
        SkewError: Another form, a kind twice, or an amount out of range; the message names the forms.
    """
    amounts: dict[str, float] = {}
    items = text.split(",")
    base = WRITERS if items[0].strip() == "writers" else Skew()
    for item in items[1:] if base else items:
        match = re.fullmatch(r"([a-z]+):(\d+\.?\d*|\.\d+)", item.strip())
        if match is None or match[1] not in _MOST:
            raise SkewError(f"unknown skew {item.strip()!r}; the form is {FORMS}")
        kind, amount = match[1], float(match[2])
        if kind in amounts:
            raise SkewError(f"{kind} is given twice")
        if not 0 < amount <= _MOST[kind]:
            raise SkewError(f"{kind} must lie in (0, {_MOST[kind]:g}], got {match[2]}")
        amounts[kind] = amount
    return base.replaced(Skew(**amounts))


@dataclass(frozen=True)
class Style:
    """One device's way with pictures; ``Skew`` has the units.

    Attributes:
        rotation: Clockwise, degrees.
        slant: Of the upright, degrees.
        brightness: Added to each pixel.
        contrast: Factor of a pixel's distance from 1/2.
        blur: Standard deviation, pixels.
        noise: Standard deviation.
        noise_seed: Fixes the noise.
        thickness: Above 0 the part of wider strokes in the blend, below 0 of narrower ones.
    """

    rotation: float
    slant: float
    brightness: float
    contrast: float
    blur: float
    noise: float
    noise_seed: int
    thickness: float = 0.0

    @classmethod
    def of(cls, skew: Skew, seed: int, device: int) -> Self:
        """A device's style, evenly drawn within the amplitudes."""

        def draw(kind: str) -> int:
            digest = hashlib.blake2b(f"pocketfed-style-v1:{seed}:{kind}:{device}".encode(), digest_size=8).digest()
            return int.from_bytes(digest, "big")

        def uniform(kind: str) -> float:
            return (draw(kind) + 0.5) / 2**64

        def either(kind: str) -> float:
            return 2 * uniform(kind) - 1

        return cls(
            rotation=skew.rotation * either("rotation"),
            slant=skew.slant * either("slant"),
            brightness=skew.brightness * either("brightness"),
            contrast=math.exp(math.log1p(skew.contrast) * either("contrast")),
            blur=skew.blur * uniform("blur"),
            noise=skew.noise * uniform("noise"),
            noise_seed=draw("noise-seed"),
            thickness=skew.thickness * either("thickness"),
        )

    def apply(self, images: Images) -> Images:
        """Pictures as this device has them.

        Args:
            images: float32[n, channels, height, width] in [0, 1]; not changed.

        Returns:
            The same shape, in [0, 1] again.
        """
        done = np.empty_like(images)
        rng = np.random.default_rng(self.noise_seed)
        for at in range(0, len(images), _CHUNK):
            part = images[at : at + _CHUNK].astype(np.float64)
            if self.thickness:
                part = _thickened(part, self.thickness)
            if self.rotation or self.slant:
                part = _turned(part, math.radians(self.rotation), math.tan(math.radians(self.slant)))
            if self.blur:
                part = _blurred(part, self.blur)
            part = (part - 0.5) * self.contrast + 0.5 + self.brightness
            if self.noise:
                part += self.noise * rng.standard_normal(part.shape)
            done[at : at + _CHUNK] = np.clip(part, 0.0, 1.0)
        return done


def check_images(feature_shape: tuple[int, ...], low: float, high: float, name: str) -> None:
    """Whether features are pictures that a style can be laid on.

    Raises:
        SkewError: They are not.
    """
    if len(feature_shape) != 3 or low < 0 or high > 1:
        raise SkewError(
            f"--skew changes pictures with pixels in [0, 1]; {name} has features {list(feature_shape)} in "
            f"[{low:g}, {high:g}]"
        )


def _thickened(images: npt.NDArray[np.float64], amount: float) -> npt.NDArray[np.float64]:
    """Bright strokes wider (or narrower) by up to a pixel: a blend with the largest (smallest) of 3 x 3 neighbours."""
    size = images.shape[-2:]
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    most = np.maximum if amount > 0 else np.minimum
    extreme = images
    for y in range(3):
        for x in range(3):
            extreme = most(extreme, padded[:, :, y : y + size[0], x : x + size[1]])
    return images + abs(amount) * (extreme - images)


def _turned(images: npt.NDArray[np.float64], angle: float, shear: float) -> npt.NDArray[np.float64]:
    """Rotated and slanted about the middle; what comes in from outside is 0. Bilinear."""
    height, width = images.shape[-2:]
    y, x = np.mgrid[:height, :width].astype(np.float64)
    y -= (height - 1) / 2
    x -= (width - 1) / 2
    # Where each pixel of the result comes from: the inverse map.
    from_y = math.cos(angle) * y - math.sin(angle) * x
    from_x = math.sin(angle) * y + math.cos(angle) * x + shear * from_y
    from_y += (height - 1) / 2
    from_x += (width - 1) / 2
    top, left = np.floor(from_y).astype(np.int64), np.floor(from_x).astype(np.int64)
    down, right = from_y - top, from_x - left
    # A border of zeros answers for everything outside.
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    turned = np.zeros_like(images)
    for step_y, weight_y in ((0, 1 - down), (1, down)):
        for step_x, weight_x in ((0, 1 - right), (1, right)):
            rows = np.clip(top + step_y + 1, 0, height + 1)
            columns = np.clip(left + step_x + 1, 0, width + 1)
            turned += weight_y * weight_x * padded[:, :, rows, columns]
    return turned


def _blurred(images: npt.NDArray[np.float64], stddev: float) -> npt.NDArray[np.float64]:
    """Gaussian blur; the border is continued."""
    reach = max(1, math.ceil(3 * stddev))
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / stddev) ** 2)
    kernel /= kernel.sum()
    for axis in (2, 3):
        size = images.shape[axis]
        padded = np.pad(images, [(reach, reach) if i == axis else (0, 0) for i in range(4)], mode="edge")
        images = sum(
            (
                weight * np.take(padded, range(start, start + size), axis=axis)
                for start, weight in enumerate(kernel.tolist())
            ),
            np.zeros_like(images),
        )
    return images
