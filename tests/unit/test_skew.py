"""Skew of pictures: one style for each device, within what was asked for, and the same whenever it is asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.errors import SkewError
from simulator.skew import WRITERS, Skew, Style, check_images, parse_skew

ALL = Skew(rotation=30, slant=20, brightness=0.2, contrast=0.5, blur=0.7, noise=0.05, thickness=0.8)
KINDS = ("rotation", "slant", "brightness", "contrast", "blur", "noise", "thickness")


def pictures(n: int = 6) -> np.ndarray:
    return np.random.default_rng(0).random((n, 1, 8, 8), np.float32)


@given(st.integers(0, 2**31 - 1), st.integers(0, 10**6))
def test_a_style_stays_within_its_amplitudes_and_is_a_function_of_seed_and_device(seed: int, device: int):
    style = Style.of(ALL, seed, device)
    assert style == Style.of(ALL, seed, device)
    assert style not in {Style.of(ALL, seed, device + 1), Style.of(ALL, seed + 1, device)}
    assert all(abs(getattr(style, kind)) <= getattr(ALL, kind) for kind in KINDS if kind != "contrast")
    assert 1 / 1.5 <= style.contrast <= 1.5
    assert min(style.blur, style.noise) >= 0


def test_one_kind_more_leaves_the_others_as_they_were():
    alone, beside = Style.of(Skew(rotation=30), 1, 5), Style.of(ALL, 1, 5)
    assert alone.rotation == beside.rotation
    assert (alone.slant, alone.brightness, alone.contrast, alone.blur, alone.noise) == (0, 0, 1, 0, 0)
    assert alone.thickness == 0


def test_pictures_repeat_stay_pixels_and_the_callers_are_left_alone():
    before = pictures()
    given_ = before.copy()
    given_.flags.writeable = False
    first, again, other = (Style.of(ALL, 1, device).apply(given_) for device in (3, 3, 4))
    assert np.array_equal(given_, before)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert (first.dtype, first.shape) == (np.float32, before.shape)
    assert 0 <= first.min() <= first.max() <= 1


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, -1)])
def test_a_quarter_turn_is_exact_and_clockwise(degrees: float, turns: int):
    turned = Style(degrees, 0, 0, 1, 0, 0, 0).apply(pictures())
    assert np.allclose(turned, np.rot90(pictures(), -turns, axes=(2, 3)), atol=1e-6)


def test_what_light_does_to_a_pixel():
    flat = np.full((1, 1, 4, 4), 0.7, np.float32)
    assert np.allclose(Style(0, 0, 0.1, 2.0, 0, 0, 0).apply(flat), 1.0)  # 0.5 + 2 * 0.2 + 0.1
    assert np.allclose(Style(0, 0, -0.1, 0.5, 0, 0, 0).apply(flat), 0.5)  # 0.5 + 0.2 / 2 - 0.1
    assert np.allclose(Style(0, 0, 0, 1, 2.0, 0, 0).apply(flat), 0.7), "a blur leaves what is even"
    assert np.array_equal(Style(0, 0, 0, 1, 0, 0, 0).apply(pictures()), pictures())


def test_strokes_become_wider_or_narrower_by_a_pixel():
    stroke = np.zeros((1, 1, 7, 7), np.float32)
    stroke[..., 2:5] = 0.8
    wide, narrow, half = (Style(0, 0, 0, 1, 0, 0, 0, t).apply(stroke) for t in (1.0, -1.0, 0.5))
    assert np.allclose(wide[0, 0, 3], [0, 0.8, 0.8, 0.8, 0.8, 0.8, 0])
    assert np.allclose(narrow[0, 0, 3], [0, 0, 0, 0.8, 0, 0, 0])
    assert np.allclose(half[0, 0, 3], [0, 0.4, 0.8, 0.8, 0.8, 0.4, 0])


def test_writers_stands_for_a_mixture_that_other_kinds_may_change():
    assert parse_skew("writers") == WRITERS
    assert parse_skew("writers,rotation:10,noise:0.1") == WRITERS.replaced(Skew(rotation=10, noise=0.1))
    assert parse_skew(str(WRITERS)) == WRITERS
    styles = [Style.of(WRITERS, 1, device) for device in range(100)]
    changes = [np.abs(style.apply(pictures()) - pictures()).mean() for style in styles]
    assert min(changes) > 0.01, "nobody writes like the data set"


@pytest.mark.parametrize("text", ["rotation:30", "slant:12.5,blur:0.5", "rotation:180,slant:60,noise:1"])
def test_what_is_parsed_is_written_again(text: str):
    assert str(parse_skew(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown skew ''; the form is KIND:AMOUNT"),
        ("tilt:3", "unknown skew 'tilt:3'"),
        ("rotation", "unknown skew"),
        ("rotation:-3", "unknown skew"),
        ("rotation:nan", "unknown skew"),
        ("rotation:3,", "unknown skew ''"),
        ("rotation:181", r"rotation must lie in \(0, 180\], got 181"),
        ("blur:0", r"blur must lie in \(0, 5\]"),
        ("blur:1,blur:2", "blur is given twice"),
        ("blur:1,writers", "unknown skew 'writers'"),
        ("writers,", "unknown skew ''"),
        ("thickness:1.5", r"thickness must lie in \(0, 1\]"),
    ],
)
def test_what_is_no_skew_is_refused(text: str, message: str):
    with pytest.raises(SkewError, match=message):
        parse_skew(text)


def test_a_profile_replaces_the_kinds_that_it_names():
    assert parse_skew("rotation:30,blur:1").replaced(parse_skew("blur:2,noise:0.1")) == Skew(
        rotation=30, blur=2, noise=0.1
    )


@pytest.mark.parametrize(
    ("shape", "low", "high"), [((64,), 0, 1), ((1, 8, 8), -0.1, 1), ((1, 8, 8), 0, 16)], ids=["flat", "below", "above"]
)
def test_only_pictures_are_skewed(shape: tuple[int, ...], low: float, high: float):
    check_images((1, 8, 8), 0, 1, "digits")
    with pytest.raises(SkewError, match="--skew changes pictures"):
        check_images(shape, low, high, "numbers")
