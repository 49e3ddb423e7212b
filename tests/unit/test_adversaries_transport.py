"""A malicious device's report is in order in every respect but its update, and the same whoever uploads it when."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from client_sdk.client import MobileClient
from client_sdk.errors import IllegalTransition, TransportUnavailable
from client_sdk.identity import DeviceIdentity
from client_sdk.programs import model_weights
from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.frames import decode_frame, encode_frame
from client_sdk.protocol.messages import REPORT_TENSOR, UNCOMPRESSED, F32Encoding, ReportFacts, ReportReply
from client_sdk.protocol.profile import DeviceProfile, DeviceTier
from client_sdk.protocol.training import TrainingPlan
from client_sdk.session_state import RetryPolicy
from client_sdk.store import MemoryDeviceStore
from client_sdk.training import LocalTrainer
from client_sdk.transport import TransferCounters
from simulator.adversaries import AttackPlan, Roster, parse_attack
from simulator.adversaries import vectors as v
from simulator.adversaries.sdk import SdkAttackers
from simulator.adversaries.transport import AdversarialTransport
from simulator.datasets import Split
from simulator.errors import AttackError
from tests.devices import (
    BATCH,
    NUM_PARAMETERS,
    ToyProgram,
    ToyServer,
    make_assignment,
    make_data,
    make_manifest,
    make_model,
)

PARTS = np.array_split(np.arange(40), 8)
DATA = Split(*make_data(40))
MODEL = make_model()
WEIGHTS = model_weights(decode_frame(MODEL), make_manifest())


def plan_for(attack, **changes):
    facts = {"fraction": 0.5, "seed": 3, "reports": 6, "num_classes": 3}
    return AttackPlan(parse_attack(attack), Roster.of(3, 8, 0.5), **(facts | changes))


class ThreadToys:
    """A program for each thread, which no other thread may run meanwhile."""

    def __init__(self):
        self._local = threading.local()

    def open(self, _assignment, _read):
        if not hasattr(self._local, "program"):
            owner = threading.get_ident()

            def only_here():
                assert threading.get_ident() == owner

            self._local.program = ToyProgram(before_run=only_here)
        return self._local.program

    def close(self):
        """Nothing to close."""


def attackers_for(plan, model=MODEL):
    return SdkAttackers(plan, programs=ThreadToys(), blob=lambda _: model, data=DATA, parts=PARTS)


class Captured:
    """An inner transport that keeps what would go over the wire."""

    def __init__(self):
        self.counters = TransferCounters()
        self.frames = []

    def upload(self, report_id, frame):
        self.frames.append(bytes(frame))
        return ReportReply(report_id=report_id, assignment_id="0" * 32)


def honest_frame(assignment, update):
    """What a device uploads for an assignment: the tensor, and the facts that it repeats."""
    facts = ReportFacts(
        report_id="1" * 32,
        assignment_id=assignment.assignment_id,
        model_version=str(assignment.model_version),
        parameter_table_sha256=assignment.parameter_table_sha256,
        kind=assignment.kind,
        encoding="f32",
        algorithm=assignment.plan.algorithm,
        compression=assignment.compression or UNCOMPRESSED,
        compression_seed=str(assignment.compression_seed),
        steps="6",
        train_loss="0.5",
    )
    if assignment.compression is not None:
        codec = Codec(CompressionSpec.parse(assignment.compression), len(update))
        update = np.frombuffer(codec.encode(update, assignment.compression_seed), np.uint8)
    return encode_frame({REPORT_TENSOR: update}, facts.model_dump(mode="json"))


def honest_update(device, assignment, shuffle_seed=None):
    rows = PARTS[device]
    seed = assignment.shuffle_seed if shuffle_seed is None else shuffle_seed
    plan = assignment.plan
    if plan.algorithm == "scaffold":
        plan = plan.model_copy(update={"algorithm": "fedavg"})
    return LocalTrainer(ToyProgram()).train(WEIGHTS, DATA.x[rows], DATA.y[rows], plan, seed).update(plan)


def sent(attackers, device, assignment, update):
    """The frame that an attacker sends instead of an honest one."""
    inner = Captured()
    transport = attackers.transport(device, inner)
    transport.expect(assignment)
    transport.upload("1" * 32, honest_frame(assignment, update))
    return decode_frame(inner.frames[0])


def test_all_but_the_update_stays_as_the_device_wrote_it():
    plan = plan_for("sign-flip")
    assignment = make_assignment(1)
    device = plan.roster.attackers[0]
    update = honest_update(device, assignment)
    frame = sent(attackers_for(plan), device, assignment, update)
    assert frame.metadata == decode_frame(honest_frame(assignment, update)).metadata
    assert list(frame.tensors) == [REPORT_TENSOR]
    assert np.array_equal(frame.tensors[REPORT_TENSOR], -update)


def test_colluders_know_what_their_own_devices_would_honestly_send():
    plan = plan_for("alie:1.5")
    assignment = make_assignment(1, model_version=4)
    device = plan.roster.attackers[-1]
    frame = sent(attackers_for(plan), device, assignment, honest_update(device, assignment))
    known = np.stack([honest_update(d, assignment, plan.rehearsal_seed(4, d)) for d in plan.roster.attackers])
    assert np.array_equal(frame.tensors[REPORT_TENSOR], v.a_little_is_enough(known, 1.5))


def test_with_fednova_colluders_divide_by_their_steps_as_everybody_does():
    plan = plan_for("ipm:1")
    assignment = make_assignment(1, plan=TrainingPlan(local_epochs=2, batch_size=BATCH, algorithm="fednova"))
    device = plan.roster.attackers[0]
    frame = sent(attackers_for(plan), device, assignment, honest_update(device, assignment))
    known = np.stack([honest_update(d, assignment, plan.rehearsal_seed(0, d)) for d in plan.roster.attackers])
    assert np.array_equal(frame.tensors[REPORT_TENSOR], v.inner_product(known, 1.0))


def test_with_scaffold_the_control_variate_stays_honest():
    plan = plan_for("mimic")
    scaffold = TrainingPlan(local_epochs=2, batch_size=BATCH, algorithm="scaffold")
    assignment = make_assignment(1, plan=scaffold, control_sha256="e" * 64)
    device = plan.roster.attackers[0]
    update = np.concatenate([honest_update(device, assignment), np.arange(NUM_PARAMETERS, dtype=np.float32)])
    tensor = sent(attackers_for(plan), device, assignment, update).tensors[REPORT_TENSOR]
    known = np.stack([honest_update(d, assignment, plan.rehearsal_seed(0, d)) for d in plan.roster.attackers])
    assert np.array_equal(tensor[:NUM_PARAMETERS], v.mimic(known))
    assert np.array_equal(tensor[NUM_PARAMETERS:], update[NUM_PARAMETERS:])


@pytest.mark.parametrize(
    "line",
    [
        "topk:0.3",
        "topk:0.5,bits=8",
        "randomk:0.5",
        "randomk:0.5,bits=4,rotate",
        "threshold:0.001",
        "quantize:1,rotate",
        "sketch:0.9",
    ],
)
@pytest.mark.parametrize("attack", ["sign-flip", "scaling:1e9", "alie:1.5", "gaussian", "zero"])
def test_a_compressed_report_is_compressed_again_and_within_its_bound(line, attack):
    plan = plan_for(attack)
    line = str(CompressionSpec.parse(line))
    assignment = make_assignment(1, compression=line, compression_seed=7, encoding=F32Encoding(max_abs=2.0))
    device = plan.roster.attackers[0]
    frame = sent(attackers_for(plan), device, assignment, honest_update(device, assignment))
    assert frame.metadata["compression"] == line
    # As the server decodes it: strictly.
    codec = Codec(CompressionSpec.parse(line), NUM_PARAMETERS)
    decoded = codec.decode(frame.payload, 7)
    assert np.abs(decoded).max() <= 2.0
    if attack == "sign-flip" and line == "topk:0.3":
        honest = codec.decode(codec.encode(honest_update(device, assignment), 7), 7)
        assert np.array_equal(decoded, -honest)


@pytest.mark.parametrize("attack", ["scaling:1e12", "gaussian:1e12", "collude:1e12", "ipm:1e12"])
def test_what_a_server_would_refuse_for_its_size_is_scaled_down(attack):
    plan = plan_for(attack)
    assignment = make_assignment(1, encoding=F32Encoding(max_abs=1024.0))
    device = plan.roster.attackers[0]
    tensor = sent(attackers_for(plan), device, assignment, honest_update(device, assignment)).tensors[REPORT_TENSOR]
    assert 1000 < np.abs(tensor).max() <= 1024


def test_a_report_of_another_assignment_is_not_touched_but_refused():
    transport = attackers_for(plan_for("zero")).transport(0, Captured())
    assignment = make_assignment(1)
    frame = honest_frame(assignment, honest_update(0, assignment))
    with pytest.raises(IllegalTransition):
        transport.upload("1" * 32, frame)
    transport.expect(make_assignment(2))
    with pytest.raises(IllegalTransition):
        transport.upload("1" * 32, frame)


def test_a_model_that_is_not_there_any_more_is_an_error_with_its_reason():
    assignment = make_assignment(1)
    with pytest.raises(AttackError, match="has left the pool"):
        sent(attackers_for(plan_for("alie"), model=None), 0, assignment, honest_update(0, assignment))


def test_a_real_device_enrols_checks_in_trains_and_is_poisoned_on_the_way():
    server = ToyServer(work=1)
    plan = plan_for("sign-flip")
    lost = iter([True, False])

    def lose_the_first_answer(request):
        if request == "upload" and next(lost):
            raise TransportUnavailable("cut")

    server.after = lose_the_first_answer
    identity = DeviceIdentity.generate()
    inner = server.device(identity.device_id)
    attackers = SdkAttackers(plan, programs=ThreadToys(), blob=server.blobs.get, data=DATA, parts=PARTS)
    device = plan.roster.attackers[0]
    client = MobileClient(
        ToyProgram(server.manifest),
        DeviceProfile("toy", DeviceTier.HIGH_END, 1024, 4),
        data=(DATA.x[PARTS[device]], DATA.y[PARTS[device]]),
        transport=attackers.transport(device, inner),
        store=MemoryDeviceStore(identity),
        policy=RetryPolicy(base_s=0.0, cap_s=0.0),
        wait=lambda _delay, _stop: None,
    )
    assert client.run(max_reports=1).reports == 1
    # The server compares a repeated report with the first one, byte by byte.
    assert server.requests.count("upload") == 2
    ((assignment_id, update),) = server.updates().items()
    assignment = make_assignment(1, **server.hashes)
    assert assignment_id == assignment.assignment_id
    assert np.array_equal(update, -honest_update(device, assignment))
    assert inner.counters.bytes_up > 0


@pytest.mark.parametrize("attack", ["alie", "mimic", "min-max", "gaussian", "collude", "backdoor:scale=5"])
def test_threads_and_their_order_do_not_change_a_bit(attack):
    plan = plan_for(attack)
    work = [
        (device, make_assignment(10 * version + device, model_version=version))
        for version in (0, 1)
        for device in plan.roster.attackers
    ]

    def craft_all(workers, order):
        attackers = attackers_for(plan)

        def one(item):
            device, assignment = item
            return sent(attackers, device, assignment, honest_update(device, assignment)).payload.tobytes()

        shuffled = random.Random(order).sample(range(len(work)), len(work))
        with ThreadPoolExecutor(workers) as pool:
            found = dict(zip(shuffled, pool.map(one, [work[i] for i in shuffled]), strict=True))
        return [found[i] for i in range(len(work))]

    alone = craft_all(1, 0)
    assert all(craft_all(workers, order) == alone for workers, order in [(1, 1), (2, 2), (4, 3), (8, 4)])


def test_the_rest_of_the_transport_is_the_inner_one_s():
    server = ToyServer()
    inner = server.device("d")
    transport = AdversarialTransport(inner, None)
    assert transport.counters is inner.counters
    into = bytearray()
    (blob,) = (b for b in server.blobs if server.blobs[b] == server.model)
    transport.fetch(blob, into, max_bytes=10_000)
    assert bytes(into) == server.model
    transport.close()
