"""Secret sharing: CPU time of each role and of all together, beside a plain pipeline in the same run, and upload bytes.

    .venv/bin/python tests/benchmarks/bench_sharing.py            # table, then one JSON line a case
    .venv/bin/python tests/benchmarks/bench_sharing.py --check    # exit status 1 if a bar is missed

Three of five, a million coordinates, one core, keys and seeds from the operating system. The plain pipeline does what
has to be done in the clear: the device clips, encodes to int64 and enforces the integer norm; the server checks each
report's range, adds it to an exact sum, and decodes once. Its device uses the native kernels where they run, so that
the ratio is to the fastest plain pipeline here; ``numpy`` rows use them on neither side.

Times are CPU time of the process in nanoseconds an element and client. Each repeat times the plain pipeline and then
the candidate; figures are medians over the repeats, of the times and of their ratios. A round has a hundred clients:
what is done once a round counts a hundredth.

Upload bytes are those of sealed shares, whose headers and tags are a thousandth of a bar at most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np

from client_sdk.native.sharing import PlainKernels, UpdateKernels, load_kernels, share_update
from client_sdk.protocol import sealing
from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.field import MERSENNE_61, MERSENNE_127, Field
from client_sdk.protocol.fixed_point import FixedPointGrid
from client_sdk.protocol.privacy import EncodedBounds
from client_sdk.protocol.sealing import SealingKey, seal
from client_sdk.protocol.secure import SecureLayout, encode_shares
from client_sdk.protocol.shamir import SEED_BYTES, Scheme, draw_seeds, lagrange_weights
from server_ref.aggregation.fixed import Int64Accumulator
from server_ref.secure import CompiledKernels, warm_up

SIZE = 1_000_000
CLIENTS = 100
WEIGHT = 7
BOUNDS = EncodedBounds(clip_norm=1.0, fraction_bits=40)
SLACK = 1.001

Job = Callable[[], object]


def say(line: str = "") -> None:
    print(line, flush=True)  # noqa: T201 - a benchmark reports on stdout


@dataclass(frozen=True)
class Row:
    """One figure: nanoseconds (or bytes) an element, times the plain pipeline, and the bars for them (None: none)."""

    field: str
    what: str
    value: float
    bar: float | None = None
    times_plain: float | None = None
    bar_times_plain: float | None = None

    @property
    def passed(self) -> bool:
        return (self.bar is None or self.value <= self.bar) and (
            self.bar_times_plain is None or (self.times_plain or 0) <= self.bar_times_plain
        )

    def __str__(self) -> str:
        bar = "" if self.bar is None else f"<= {self.bar:g}"
        times = "" if self.times_plain is None else f"{self.times_plain:8.2f}"
        bar_times = "" if self.bar_times_plain is None else f"<= {self.bar_times_plain:g}"
        verdict = "" if self.bar is None and self.bar_times_plain is None else ("pass" if self.passed else "FAIL")
        return f"{self.field:<5} {self.what:<52} {self.value:8.2f} {bar:<9} {times:<8} {bar_times:<6} {verdict}"


def cpu_seconds(job: Job) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start


class Plain:
    """Clip, encode, check, add: one report, and a round's decoding."""

    def __init__(self, kernels: UpdateKernels, update: np.ndarray) -> None:
        self._kernels = kernels
        self._update = update
        grid = FixedPointGrid(
            fraction_bits=BOUNDS.fraction_bits - 10, max_abs=BOUNDS.clip_norm, max_count=10_000, max_weight=100
        )
        self._sum = Int64Accumulator(len(update), grid)
        self._bounds = EncodedBounds(clip_norm=BOUNDS.clip_norm, fraction_bits=grid.fraction_bits)

    def device(self) -> np.ndarray:
        return self._kernels.encode_clipped(self._update, self._bounds)

    def seconds(self) -> float:
        reports = []
        device = cpu_seconds(lambda: reports.append(self.device()))
        # Reports arrive as bytes; the array is a view of them.
        received = np.frombuffer(reports[0].tobytes(), np.int64)
        server = cpu_seconds(lambda: self._sum.add(received, WEIGHT))
        return device + server + cpu_seconds(self._sum.result) / CLIENTS


class Shared:
    """The roles of one round in one field, each a job."""

    def __init__(self, scheme: Scheme, kernels: UpdateKernels, update: np.ndarray) -> None:
        self.scheme, self._kernels, self._update = scheme, kernels, update
        self._server = CompiledKernels()
        self.layout = SecureLayout(scheme, len(update))
        field = scheme.field
        self._secret = self.layout.secret(kernels.encode_clipped(update, BOUNDS), os.urandom(SEED_BYTES))
        self.plaintexts = self.client()
        self._totals = [field.zeros(self.layout.share_length) for _ in scheme.indices]
        ids = range(scheme.num_shares - scheme.needed + 1, scheme.num_shares + 1)
        self._weights = [lagrange_weights(ids, at) for at in scheme.secret_points]
        self._opening = [field.random(self.layout.share_length, os.urandom) for _ in ids]

    def split(self) -> object:
        return self._kernels.split_seeded(self._secret, draw_seeds(self.scheme, os.urandom), self.scheme)

    def client(self) -> list[bytes]:
        """Clip, encode, split, and lay out what is sealed. The mask is the tail; packing fills up with a zero."""
        field, layout = self.scheme.field, self.layout
        tail = field.zeros(layout.length - layout.size)
        tail[len(tail) - self.scheme.packing :] = field.expand(os.urandom(SEED_BYTES), self.scheme.packing)
        shares = share_update(self._update, BOUNDS, tail, self.scheme, kernels=self._kernels)
        return encode_shares(shares, layout)

    def add(self, index: int) -> None:
        """What the aggregator with this index does with one opened report."""
        field, total, plaintext = self.scheme.field, self._totals[index - 1], self.plaintexts[index - 1]
        if index <= self.layout.num_seeds:
            self._server.accumulate_seed(total, plaintext[1:], WEIGHT, field)
        else:
            self._server.accumulate_bytes(total, memoryview(plaintext)[1:], WEIGHT, field)

    def recombine(self) -> None:
        for weights in self._weights:
            self._server.interpolate(self._opening, weights, self.scheme.field)

    def open_sum(self) -> None:
        """Recombine, and read off the integers."""
        field = self.scheme.field
        for weights in self._weights:
            opened = self._server.interpolate(self._opening, weights, field)
            if field is MERSENNE_61:  # random elements of the larger field are no integers
                self._server.decode_signed(opened, field)

    def everything(self) -> float:
        """CPU seconds of all parties for one client."""
        aggregators = sum(cpu_seconds(partial(self.add, index)) for index in self.scheme.indices)
        return cpu_seconds(self.client) + aggregators + cpu_seconds(self.open_sum) / CLIENTS


def measured(plain: Plain, seconds: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Nanoseconds an element, and how often the plain pipeline's time of the same repeat."""
    plain.seconds()
    seconds()
    times, ratios = [], []
    for _ in range(repeats):
        base = plain.seconds()
        times.append(seconds())
        ratios.append(times[-1] / base)
    return statistics.median(times) / SIZE * 1e9, statistics.median(ratios)


def speeds(field: Field, native: UpdateKernels, update: np.ndarray, repeats: int) -> Iterator[Row]:
    is_default = field is MERSENNE_61
    plain, scheme = Plain(native, update), Scheme(field=field)
    shared = Shared(scheme, native, update)

    def row(what: str, job: Job, bar: float | None = None, against: Plain = plain) -> Row:
        value, times = measured(against, lambda: cpu_seconds(job), repeats)
        return Row(field.name, what, value, bar if is_default else None, times)

    yield row("split, seeded, all five shares", shared.split, 15)
    yield row("client: clip, encode, split, lay out", shared.client, 21)
    yield row("aggregator: expand a seed and add", partial(shared.add, 1), 5)
    yield row("aggregator: check bytes and add", partial(shared.add, 5), 4)
    yield row("recombine, three shares", shared.recombine, 3)
    value, times = measured(plain, shared.everything, repeats)
    yield Row(field.name, "all parties", value, None, times, 8 if is_default else 16)
    keys = [SealingKey.generate() for _ in scheme.indices]
    pairs = list(zip(shared.plaintexts, keys, strict=True))
    sealed = [seal(text, key.public, b"benchmark") for text, key in pairs]
    yield row("beside that: seal five shares", lambda: [seal(text, key.public, b"benchmark") for text, key in pairs])
    yield row("beside that: open a share", lambda: sealing.open(sealed[-1], keys[-1], b"benchmark"))
    packed = Shared(Scheme(field=field, packing=2), native, update)
    value, times = measured(plain, packed.everything, repeats)
    yield Row(field.name, "all parties, packed", value, None, times)

    numpy = PlainKernels()
    plain_numpy, fallback = Plain(numpy, update), Shared(scheme, numpy, update)
    yield row("numpy: split, seeded, all five shares", fallback.split, None, plain_numpy)
    yield row("numpy: client", fallback.client, None, plain_numpy)
    value, times = measured(plain_numpy, fallback.everything, repeats)
    yield Row(field.name, "numpy client: all parties", value, None, times)


def sealed_bytes(scheme: Scheme, vector: np.ndarray, kernels: UpdateKernels, keys: list[SealingKey]) -> int:
    plaintexts = Shared(scheme, kernels, vector).client()
    return sum(len(seal(text, key.public, b"benchmark")) for text, key in zip(plaintexts, keys, strict=True))


def uploads(native: UpdateKernels, update: np.ndarray) -> Iterator[Row]:
    keys = [SealingKey.generate() for _ in range(5)]
    codec = Codec(CompressionSpec.parse("randomk:0.1,feedback=off"), SIZE)
    tenth = codec.project(update, 1)

    def row(what: str, scheme: Scheme, vector: np.ndarray, bar: float) -> Row:
        size = sealed_bytes(scheme, vector, native, keys)
        return Row(scheme.field.name, f"upload, bytes an element: {what}", size / SIZE, bar * SLACK)

    yield row("seeded", Scheme(), update, 24)
    yield row("seeded, packed", Scheme(packing=2), update, 12)
    yield row("seeded, random-k 10 %", Scheme(), tenth, 2.4)
    yield row("seeded, packed, random-k 10 %", Scheme(packing=2), tenth, 1.2)
    yield row("seeded", Scheme(field=MERSENNE_127), update, 48)
    yield row("seeded, packed", Scheme(field=MERSENNE_127, packing=2), update, 24)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a bar is missed")
    parser.add_argument("--repeats", type=int, default=11, help="repeats a figure is the median of (default: 11)")
    args = parser.parse_args()
    warm_up()
    native = load_kernels()
    variant = getattr(native, "variant", "numpy: there are no native kernels here")
    update = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    plain = Plain(native, update)
    plain.seconds()
    base = statistics.median(plain.seconds() for _ in range(args.repeats)) / SIZE * 1e9
    rows = [Row("-", "plain pipeline", base, None, 1.0)]
    say(f"kernels: {variant}\n")
    say(f"{'field':<5} {'':<52} {'ns':>8} {'bar':<9} {'x plain':<8} {'bar':<6}")
    say(str(rows[0]))
    for field in (MERSENNE_61, MERSENNE_127):
        for row in speeds(field, native, update, args.repeats):
            rows.append(row)
            say(str(row))
    for row in uploads(native, update):
        rows.append(row)
        say(str(row))
    passed = all(row.passed for row in rows)
    say(f"\n{'all bars pass' if passed else 'A BAR IS MISSED'}")
    for row in rows:
        say(json.dumps({"bench": "sharing", **asdict(row), "passed": row.passed}))
    return 0 if passed or not args.check else 1


if __name__ == "__main__":
    sys.exit(main())
