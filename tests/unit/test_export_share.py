"""The ``share`` method of a program: the shares of numpy, bit for bit; there where it is asked for; gated like all."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client_sdk import fulfilment, program_sharing
from client_sdk.native.sharing import NativeKernels, PlainKernels, load_kernels, share_update
from client_sdk.program_sharing import ProgramKernels, choose_kernels
from client_sdk.protocol.clipping import integer_norm_squared
from client_sdk.protocol.errors import ConfigurationError, NonFiniteUpdate, ShapeMismatch, UnknownMethod
from client_sdk.protocol.field import MERSENNE_61, MERSENNE_127
from client_sdk.protocol.messages import I64SharesEncoding, SecurePlan
from client_sdk.protocol.privacy import EncodedBounds, encode_clipped
from client_sdk.protocol.program import Program, Role, norm_squared
from client_sdk.protocol.sealing import SealingKey, SealingSuite
from client_sdk.protocol.shamir import Scheme, draw_seeds, reconstruct
from client_sdk.reports import build_report
from client_sdk.runtime import load_program
from mobile_export import ParityError, build_model, check_parity, export_program, sharing
from mobile_export.cli import export_command
from mobile_export.sharing import check_share
from tests.aggregators import DEVICE_ID, opened_codes
from tests.devices import ToyProgram, make_assignment

SCHEME = Scheme(3, 5)
SIZE = 4 * 3 + 3
PLAIN = PlainKernels()
KEYS = [SealingKey.generate(SealingSuite.X25519) for _ in range(5)]


def export(folder: Path, **options):
    options.setdefault("batch_sizes", {Role.INFER: (1,)})
    return export_program(build_model("softmax", (4,), 3, 0), out_dir=folder, feature_shape=(4,), **options)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory):
    return export(tmp_path_factory.mktemp("share") / "bundle", share=SCHEME)


@pytest.fixture(scope="module")
def program(bundle) -> Iterator[Program]:
    loaded = load_program(bundle.path)
    yield loaded
    loaded.close()


def update(scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(SIZE)).astype(np.float32)


def test_the_manifest_says_what_goes_in_and_out(bundle):
    (method,) = (m for m in bundle.manifest.methods if m.role is Role.SHARE)
    assert method.name == "share"
    assert [(s.name, s.dtype, s.shape) for s in method.inputs] == [
        ("update", "float32", (SIZE,)),
        ("clip_factor", "float64", (1,)),
        ("scale", "float64", (1,)),
        ("share_1", "int64", (SIZE,)),
        ("share_2", "int64", (SIZE,)),
    ]
    assert [(s.name, s.dtype, s.shape) for s in method.outputs] == [
        ("norm_limbs", "int64", (6,)),
        ("share_3", "int64", (SIZE,)),
        ("share_4", "int64", (SIZE,)),
        ("share_5", "int64", (SIZE,)),
    ]
    # Each of these has been seen to be wrong, or slow, for integers.
    assert not {o for o in bundle.manifest.operators if "remainder" in o or "fmod" in o or "shift" in o}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e20])
@pytest.mark.parametrize("fraction_bits", [1, 24, 40])
def test_its_shares_are_those_of_numpy_and_of_the_native_kernels(program: Program, scale: float, fraction_bits: int):
    bounds, tail = EncodedBounds(clip_norm=0.75, fraction_bits=fraction_bits), MERSENNE_61.random(2, os.urandom)
    seeds = draw_seeds(SCHEME, os.urandom)
    found = ProgramKernels(program).split_update(update(scale), bounds, tail, seeds, SCHEME)
    for kernels in (PLAIN, load_kernels()):
        expected = kernels.split_update(update(scale), bounds, tail, seeds, SCHEME)
        assert all(map(np.array_equal, found, expected))
        assert len(found) == len(expected)


def test_a_shared_update_opens_as_its_codes(program: Program):
    bounds, tail = EncodedBounds(clip_norm=0.75, fraction_bits=40), MERSENNE_61.random(1, os.urandom)
    shares = share_update(update(), bounds, tail, SCHEME, kernels=ProgramKernels(program))
    everyone = shares.expand(SCHEME, SIZE + 1)
    opened = reconstruct({x: everyone[x - 1] for x in (1, 4, 5)}, SCHEME, SIZE + 1)
    assert np.array_equal(MERSENNE_61.to_signed(opened[:SIZE]), encode_clipped(update(), bounds))
    assert np.array_equal(opened[SIZE:], tail)


def test_a_norm_that_rounding_pushes_beyond_its_bound_is_corrected(program: Program):
    # On the grid of halves each coordinate would become 1/2, and the norm 1.94.
    flat, bounds = np.full(SIZE, 0.2588, np.float32), EncodedBounds(clip_norm=1.25, fraction_bits=1)
    seeds = draw_seeds(SCHEME, os.urandom)
    method = program.manifest.method(Role.SHARE)
    drawn = [MERSENNE_61.expand(seed, SIZE).view(np.int64) for seed in seeds]
    limbs, *_ = program.run(method.name, flat, np.ones(1), np.array([2.0]), *drawn)
    assert norm_squared(limbs) == SIZE > bounds.norm_bound**2
    found = ProgramKernels(program).split_update(flat, bounds, MERSENNE_61.empty(0), seeds, SCHEME)
    assert all(map(np.array_equal, found, PLAIN.split_update(flat, bounds, MERSENNE_61.empty(0), seeds, SCHEME)))


def test_the_norm_in_limbs_is_exact_for_codes_of_sixty_bits(program: Program):
    method = program.manifest.method(Role.SHARE)
    values, scale = update(1.0, 3), 2.0**57
    zeros = np.zeros(SIZE, np.int64)
    limbs, *_ = program.run(method.name, values, np.ones(1), np.array([scale]), zeros, zeros)
    codes = np.rint(values.astype(np.float64) * scale).astype(np.int64)
    assert np.abs(codes).max() > 2**57
    assert norm_squared(limbs) == integer_norm_squared(codes)


def test_what_it_cannot_split_is_refused(program: Program):
    kernels, bounds = ProgramKernels(program), EncodedBounds(clip_norm=1.0, fraction_bits=24)
    empty = MERSENNE_61.empty(0)
    for values, scheme in ((update()[:-1], SCHEME), (update(), Scheme(2, 5)), (update(), Scheme(3, 5, packing=2))):
        seeds = draw_seeds(scheme, os.urandom)
        with pytest.raises(UnknownMethod, match="the program splits"):
            kernels.split_update(values, bounds, empty, seeds, scheme)
    seeds = draw_seeds(SCHEME, os.urandom)
    with pytest.raises(NonFiniteUpdate):
        kernels.split_update(update() * np.float32(np.nan), bounds, empty, seeds, SCHEME)
    with pytest.raises(ShapeMismatch):
        kernels.split_update(update().astype(np.float64), bounds, empty, seeds, SCHEME)


def test_without_the_option_there_is_no_such_method(tmp_path: Path):
    plain = export(tmp_path / "bundle", use_cache=False, parity=False)
    assert [m.role for m in plain.manifest.methods] == [Role.INFER]
    program = load_program(plain.path)
    with pytest.raises(UnknownMethod, match="no share method"):
        ProgramKernels(program)
    program.close()


# --- what a device splits with ---


class Watched:
    """A program that remembers what was run."""

    def __init__(self, program: Program) -> None:
        self.manifest = program.manifest
        self.ran: list[str] = []
        self._program = program

    def run(self, method: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        self.ran.append(method)
        return self._program.run(method, *inputs)

    def close(self) -> None:
        """Nothing: the fixture closes it."""


def test_native_kernels_come_before_the_program_and_the_program_before_numpy(program: Program):
    native = load_kernels()
    assert isinstance(native, NativeKernels), "the machine that tests has a compiler"
    assert choose_kernels(program, SCHEME, SIZE) is native
    assert choose_kernels(program, SCHEME, SIZE, available=native) is native
    assert isinstance(choose_kernels(program, SCHEME, SIZE, available=PLAIN), ProgramKernels)
    for scheme, size in ((Scheme(2, 5), SIZE), (Scheme(3, 5, MERSENNE_127), SIZE), (SCHEME, SIZE - 1)):
        assert choose_kernels(program, scheme, size, available=PLAIN) is PLAIN
    assert choose_kernels(ToyProgram(), SCHEME, SIZE, available=PLAIN) is PLAIN


@pytest.mark.parametrize("changes", [{}, {"noise": "devices", "noise_variance": "1000"}], ids=["plain", "noised"])
@pytest.mark.parametrize("host", ["native", "program", "numpy"])
def test_what_aggregators_open_is_the_same_whatever_splits(
    program: Program, monkeypatch, host: str, changes: dict[str, str]
):
    """The program is asked where it is the choice, and only there."""
    if host != "native":
        monkeypatch.setattr(program_sharing, "load_kernels", PlainKernels)
    watched = Watched(program)
    plan = SecurePlan(fraction_bits=24, clip_norm=0.75, aggregator_keys=tuple(k.public.hex for k in KEYS), **changes)
    assignment = make_assignment(1, encoding=I64SharesEncoding(), secure=plan)
    kernels = fulfilment._kernels(assignment, watched if host != "numpy" else ToyProgram(), SIZE)
    report = build_report(assignment, "2" * 32, update(), device_id=DEVICE_ID, steps=1, train_loss=0.5, kernels=kernels)
    codes = opened_codes(bytes(report.frame), assignment, SIZE, KEYS, [5, 2, 1])
    if not changes:
        assert np.array_equal(codes, encode_clipped(update(), plan.bounds))
        assert watched.ran == (["share"] if host == "program" else [])
    else:
        assert 0 < np.abs(codes - encode_clipped(update(), plan.bounds)).max() < 1000
        assert watched.ran == [], "noise is added to codes, which the method does not give away"


def test_the_gate_sees_one_wrong_unit(bundle, monkeypatch: pytest.MonkeyPatch):
    report = check_parity(bundle, build_model("softmax", (4,), 3, 0))
    assert {o.output for o in report.outputs if o.method == "share"} == {"norm_limbs", "share_3", "share_4", "share_5"}
    assert all(o.error == 0 for o in report.outputs if o.method == "share")
    run = type(load_program(bundle.path)).run

    def off_by_one(self, method, *inputs):
        outputs = run(self, method, *inputs)
        if method == "share":
            outputs[2][SIZE - 1] += 1
        return outputs

    monkeypatch.setattr(type(load_program(bundle.path)), "run", off_by_one)
    with pytest.raises(ParityError, match="share_4"):
        check_parity(bundle, build_model("softmax", (4,), 3, 0))


@pytest.mark.parametrize("scheme", [Scheme(3, 5, MERSENNE_127), Scheme(3, 5, packing=2)])
def test_what_it_does_not_do_is_refused_before_anything_is_traced(scheme: Scheme, tmp_path: Path):
    with pytest.raises(ConfigurationError, match="modulo 2\\^61 - 1"):
        export(tmp_path / "bundle", share=scheme)


def test_models_whose_norm_would_wrap_around_are_refused():
    check_share(SCHEME, sharing._MAX_ELEMENTS)
    with pytest.raises(ConfigurationError, match="parameters"):
        check_share(SCHEME, sharing._MAX_ELEMENTS + 1)


def test_a_batch_size_makes_no_share_method(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="no batch size"):
        export(tmp_path / "b", batch_sizes={Role.SHARE: (1,)})
    with pytest.raises(ConfigurationError, match="no method's name"):
        export(tmp_path / "b", constants={"share": 1}, share=SCHEME)


def test_the_command_takes_a_scheme(capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    export_command(parser)
    assert parser.parse_args(["mlp", "--out", "x"]).share is None
    chosen = parser.parse_args(["mlp", "--out", "x", "--share", "3of5"]).share
    assert chosen == dataclasses.replace(SCHEME)
    for wrong in ("3", "5of3", "of", "threeoffive", "-3of5"):
        with pytest.raises(SystemExit):
            parser.parse_args(["mlp", "--out", "x", "--share", wrong])
    with pytest.raises(SystemExit):
        parser.parse_args(["mlp", "--out", "x", "--batch-sizes", "share=1"])
