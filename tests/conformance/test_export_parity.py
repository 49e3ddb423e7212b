"""The parity gate against real programs: what it passes, and the bugs planted for it to find."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import nn

from client_sdk.protocol.errors import ConfigurationError, MissingOperator, ProgramError
from client_sdk.protocol.program import ParameterSpec, Program, Role
from client_sdk.runtime import load_program
from mobile_export import EagerProgram, ParityError, ProgramBundle, build_model, check_parity, export_program
from mobile_export.decompositions import decomposition_table
from mobile_export.manifest import PlannedMethod
from mobile_export.parity import likely_operators, parameter_error, relative_error
from tests.bundles import meta_bundle, meta_model, tiny_bundle, tiny_model

aten = torch.ops.aten


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The tiny reference bundles by name, each exported once."""
    folder = tmp_path_factory.mktemp("bundles")
    made: dict[str, ProgramBundle] = {}

    def get(name: str) -> ProgramBundle:
        return made.get(name) or made.setdefault(name, tiny_bundle(name, folder / name))

    return get


@pytest.mark.parametrize("runtime", ["native", "pybindings"])
@pytest.mark.parametrize("name", ["softmax", "mlp", "cnn"])
def test_the_reference_models_pass(bundles, cnn_bundle, name, runtime):
    bundle = ProgramBundle.open(cnn_bundle) if name == "cnn" else bundles(name)
    model = build_model("cnn", (8, 8), 10, seed=0) if name == "cnn" else tiny_model(name)
    report = check_parity(bundle, model, runtime=runtime, repeats=4)
    assert report.worst.error <= report.tolerance == 1e-5
    assert report.repeats == 4
    assert [(o.method, o.output) for o in report.outputs] == [
        (m.name, t.name) for m in bundle.manifest.methods for t in m.outputs
    ]


class Convolved(nn.Module):
    """What a CNN has, small: a convolution whose image has a gradient, max-pooling, a linear layer; 62 parameters."""

    feature_shape = (1, 5, 5)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 25).reshape(1, 1, 5, 5))
        self.convolution = nn.Conv2d(1, 2, 2)
        self.output = nn.Linear(8, 3)

    def forward(self, x):
        return self.output(F.max_pool2d(torch.relu(self.convolution(x * self.scale)), 2).flatten(1))


def convolved():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Convolved()


META_ROLES = (Role.ADAPT, Role.REPTILE, Role.MAML, Role.FOMAML, Role.PER_FEDAVG)


@pytest.mark.parametrize(
    ("model", "roles"),
    [
        (tiny_model("softmax"), META_ROLES),
        (convolved(), (Role.MAML,)),
    ],
    ids=["softmax", "convolutions"],
)
def test_gradients_through_two_steps_pass(tmp_path, model, roles):
    bundle = export_program(model, out_dir=tmp_path / "out", batch_sizes=dict.fromkeys(roles, (4,)), inner_steps=(2,))
    assert [m.name for m in bundle.manifest.methods] == [
        f"{role.value}{'' if role is Role.PER_FEDAVG else '_k2'}_b4" for role in roles
    ]
    assert bundle.parity is not None
    assert bundle.parity.worst.error <= 1e-5
    assert not any("convolution" in operator or "max_pool" in operator for operator in bundle.manifest.operators)


# --- planted bugs ---------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Max-pooling as one would write it, and nothing that the bug could hide behind."""

    feature_shape = (1, 6, 6)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, 36).reshape(1, 1, 6, 6))
        self.output = nn.Linear(9, 3)

    def forward(self, x):
        return self.output(F.max_pool2d(x * self.scale, 2).flatten(1))


def without(*operators):
    """The table with some rewrites removed."""
    return {op: f for op, f in decomposition_table().items() if op not in operators}


def test_the_max_pooling_bug_is_found_named_and_not_written(tmp_path):
    with pytest.raises(ParityError) as refusal:
        export_program(
            Pooled(),
            out_dir=tmp_path / "out",
            batch_sizes={Role.GRAD: (2,)},
            decompositions=without(aten.max_pool2d_with_indices_backward.default),
        )
    error = refusal.value
    assert (error.method, error.output) == ("grad_b2", "grad_sum[scale]")
    assert error.error > error.tolerance == 1e-5
    assert error.suspects[0].startswith("aten::max_pool2d_with_indices_backward")
    for said in ("grad_b2", "grad_sum[scale]", "aten::max_pool2d_with_indices_backward", f"{error.error:.3g}"):
        assert said in str(error)
    assert isinstance(error, ProgramError)
    assert list(tmp_path.iterdir()) == []


def test_the_same_model_passes_with_the_rewrite(tmp_path):
    bundle = export_program(Pooled(), out_dir=tmp_path / "out", batch_sizes={Role.GRAD: (2,)})
    assert bundle.parity is not None
    assert bundle.parity.worst.error <= 1e-6


class Shifted(nn.Module):
    """Padding whose gradient is a padding by a negative amount."""

    feature_shape = (5,)

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(5, 4)
        self.output = nn.Linear(6, 3)

    def forward(self, x):
        return self.output(F.pad(self.hidden(x), (1, 1)))


def test_an_operator_that_fails_when_it_runs_is_named(tmp_path):
    with pytest.raises(ParityError, match="Padding values must be non-negative") as refusal:
        export_program(
            Shifted(),
            out_dir=tmp_path / "out",
            batch_sizes={Role.GRAD: (2,)},
            decompositions=without(aten.constant_pad_nd.default),
        )
    assert refusal.value.suspects == ("aten::constant_pad_nd.out",)
    assert np.isinf(refusal.value.error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parity", [True, False])
def test_an_operator_without_a_kernel_is_refused_by_name(tmp_path, parity):
    class Sorted(nn.Linear):
        def forward(self, x):
            return torch.sort(super().forward(x), dim=1).values

    with pytest.raises(MissingOperator, match=r"aten::sort\.values"):
        export_program(
            Sorted(4, 3),
            out_dir=tmp_path / "out",
            feature_shape=(4,),
            batch_sizes={Role.INFER: (2,)},
            parity=parity,
            use_cache=False,
        )
    assert not (tmp_path / "out").exists()


def test_a_view_of_a_pooled_channels_last_tensor_is_exported_right(tmp_path):
    """The rewrite lays its result out otherwise than torch's kernel; views that were traced must still hold."""

    class ChannelsLast(nn.Module):
        feature_shape = (4, 4, 2)

        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(2, 3)
            self.output = nn.Linear(12, 3)

        def forward(self, x):
            pooled = F.max_pool2d(self.mix(x).permute(0, 3, 1, 2), 2)
            return self.output(pooled.flatten(1))

    export_program(ChannelsLast(), out_dir=tmp_path / "out", batch_sizes={Role.GRAD: (2,)}, use_cache=False)


def test_the_wrong_model_or_loss_is_found(bundles):
    bundle = bundles("mlp")

    with pytest.raises(ParityError) as refusal:
        check_parity(bundle, _reparametrised(lambda z: 1.001 * z))
    assert refusal.value.method == "grad_b4"
    with pytest.raises(ParityError, match="loss_sum"):
        check_parity(bundle, tiny_model("mlp"), loss=lambda logits, y: F.cross_entropy(logits, y, reduction="none") + 1)


def _reparametrised(function):
    """The tiny perceptron with a function of its logits."""
    model = tiny_model("mlp")
    forward = model.forward
    model.forward = lambda x: function(forward(x))
    return model


@pytest.fixture(scope="module")
def adapting(tmp_path_factory) -> ProgramBundle:
    """A perceptron with all methods of meta-learning."""
    return meta_bundle(tmp_path_factory.mktemp("meta") / "bundle")


@pytest.mark.parametrize(
    ("role", "output", "instead"),
    [
        # First order in place of second, and the other way round.
        (Role.MAML, "grad_sum", lambda program, call: program.run(call(Role.FOMAML), *call.inputs)),
        (Role.FOMAML, "grad_sum", lambda program, call: program.run(call(Role.MAML), *call.inputs)),
        # One step too few.
        (Role.ADAPT, "w", lambda program, call: program.run(call(Role.ADAPT), *call.inputs[:4], call.fewer())),
        (Role.REPTILE, "delta", lambda program, call: program.run(call(Role.REPTILE), *call.inputs[:4], call.fewer())),
        # Without the Hessian: its examples are masked.
        (
            Role.PER_FEDAVG,
            "w",
            lambda program, call: program.run(call(Role.PER_FEDAVG), *call.inputs[:-1], 0 * call.inputs[-1]),
        ),
    ],
)
def test_a_weakened_method_of_meta_learning_is_found(adapting, role, output, instead):
    class Call:
        def __init__(self, inputs):
            self.inputs = inputs

        def __call__(self, role):
            return adapting.manifest.method(role).name

        def fewer(self):
            mask = self.inputs[4].copy()
            mask[-1] = 0
            return mask

    class Weakened(Spy):
        def run(self, method, *inputs):
            right = self.program.run(method, *inputs)
            if method != adapting.manifest.method(role).name:
                return right
            wrong = instead(self.program, Call(inputs))
            return (wrong[0], *right[1:])

    bundle = SpiedBundle(adapting.path, adapting.manifest, program=Weakened(load_program(adapting.path)))
    with pytest.raises(ParityError) as refusal:
        check_parity(bundle, meta_model())
    assert (refusal.value.method, refusal.value.output.partition("[")[0]) == (
        adapting.manifest.method(role).name,
        output,
    )


def test_steps_are_drawn_with_masks_of_their_own_and_rates_that_do_not_explode(adapting):
    bundle = spied(adapting)
    report = check_parity(bundle, meta_model())
    assert report.worst.error <= 1e-5
    [spy] = bundle.spies
    names = {role: adapting.manifest.method(role) for role in META_ROLES}
    runs = {
        role: [dict(zip((t.name for t in m.inputs), i, strict=True)) for n, i in spy.calls if n == m.name]
        for role, m in names.items()
    }
    for role, drawn in runs.items():
        assert len(drawn) >= 4
        assert not drawn[-1]["inner_mask"].any()
        assert drawn[0]["inner_mask"].all()
        if role is not Role.PER_FEDAVG:
            kept = [d["inner_mask"].sum(axis=1) for d in drawn]
            assert any(0 in k and k.any() for k in kept)  # a whole step is masked among others
            assert any(((k > 0) & (k < 8)).all() for k in kept)
        assert any(not np.isfinite(d["inner_x"]).all() for d in drawn)
    rates = [d["rates"] for d in runs[Role.ADAPT]]
    assert all(len(set(r.tolist())) == len(r) for r in rates)
    assert any((r == 0).sum() == 1 for r in rates)
    eager = EagerProgram(meta_model(), adapting.manifest)
    for d in runs[Role.REPTILE][:-1]:
        delta, _ = eager.run(names[Role.REPTILE].name, *(d[t.name] for t in names[Role.REPTILE].inputs))
        assert 0.2 < np.linalg.norm(delta) / np.linalg.norm(d["w"]) < 20


# --- how the gate runs ----------------------------------------------------------------------------------------


class Spy:
    """A program that records what is run on it, and may tamper with the outputs."""

    def __init__(self, program: Program, tamper=None):
        self.program = program
        self.calls: list[tuple[str, tuple[np.ndarray, ...]]] = []
        self.tamper = tamper
        self.closed = 0

    @property
    def manifest(self):
        return self.program.manifest

    def run(self, method, *inputs):
        self.calls.append((method, inputs))
        outputs = self.program.run(method, *inputs)
        return outputs if self.tamper is None else self.tamper(method, len(self.calls), inputs, outputs)

    def close(self):
        self.closed += 1
        self.program.close()


@dataclasses.dataclass(frozen=True)
class SpiedBundle(ProgramBundle):
    """A bundle that opens as a spy."""

    spies: list[Spy] = dataclasses.field(default_factory=list)
    tamper: object = None
    program: object = None

    def load(self, runtime="auto"):
        self.spies.append(Spy(self.program or load_program(self.path, runtime), self.tamper))
        return self.spies[-1]


def spied(bundle: ProgramBundle, **what) -> SpiedBundle:
    return SpiedBundle(bundle.path, bundle.manifest, **what)


def test_every_method_runs_repeatedly_in_one_program_interleaved_on_varied_inputs(bundles):
    bundle = spied(bundles("mlp"))
    check_parity(bundle, tiny_model("mlp"))
    [spy] = bundle.spies
    order = [method for method, _ in spy.calls]
    assert spy.closed == 1
    assert all(order.count(m.name) >= 3 for m in bundle.manifest.methods)
    followers = {(a, b) for a, b in itertools.pairwise(order) if a == "grad_b4"}
    assert len(followers) >= 2
    runs = [dict(zip(("w", "lr", "x", "y", "mask"), inputs, strict=True)) for m, inputs in spy.calls if m == "train_b4"]
    assert len({r["w"].tobytes() for r in runs}) >= 3
    kept = [r["mask"].sum() for r in runs]
    assert (max(kept), min(kept)) == (4, 0)
    assert any(0 < k < 4 for k in kept)
    seen = np.concatenate([r["x"][r["mask"] > 0] for r in runs])
    assert (seen == 0).all(axis=1).any()
    assert (seen < 0).any()
    assert (seen > 0).any()
    assert any(not np.isfinite(r["x"][r["mask"] == 0]).all() for r in runs)


def test_a_step_is_long_enough_that_a_wrong_gradient_shows(bundles):
    bundle = spied(bundles("mlp"))
    check_parity(bundle, tiny_model("mlp"))
    for method, (w, *rest) in bundle.spies[0].calls:
        if method == "train_b4" and rest[-1].any():
            stepped, _ = EagerProgram(tiny_model("mlp"), bundle.manifest).run(method, w, *rest)
            assert np.linalg.norm(stepped - w) >= 5 * np.linalg.norm(w)


def test_stale_memory_is_found_though_the_first_call_is_right(bundles):
    """What the max-pooling kernel does, in miniature: each call adds to the last one's output."""
    last = {}

    def accumulate(method, _call, _inputs, outputs):
        total = tuple(o + last.get((method, i), 0) for i, o in enumerate(outputs))
        last.update({(method, i): t for i, t in enumerate(total)})
        return total

    with pytest.raises(ParityError) as refusal:
        check_parity(spied(bundles("softmax"), tamper=accumulate), tiny_model("softmax"))
    assert refusal.value.method in {"grad_b4", "infer_b4"}


@pytest.mark.parametrize(
    ("break_", "output"),
    [
        (lambda o: [o[0] * np.nan, *o[1:]], "grad_sum[]"),
        (lambda o: [o[0], o[1] * 1.0001, o[2]], "loss_sum"),
        (lambda o: [o[0], o[1], o[2] + 1], "count"),
        (lambda o: [np.concatenate([o[0][:-1], o[0][-1:] * 1.01]), *o[1:]], "grad_sum[output.bias]"),
        (lambda o: [o[0][:-1], *o[1:]], "grad_sum[]"),
    ],
)
def test_each_output_is_watched_and_each_parameter(bundles, break_, output):
    def tamper(method, _call, _inputs, outputs):
        return tuple(break_(list(outputs))) if method == "grad_b4" else outputs

    bundle = spied(bundles("mlp"), tamper=tamper)
    with pytest.raises(ParityError) as refusal:
        check_parity(bundle, tiny_model("mlp"))
    assert (refusal.value.method, refusal.value.output) == ("grad_b4", output)
    assert bundle.spies[0].closed == 1


def kinked(*, from_batch: int):
    """Softmax regression whose logits jump by a half where the last bits of a logit say so, in larger batches."""
    model = tiny_model("softmax")
    forward = model.forward

    def jumping(x):
        logits = forward(x)
        odd = (logits * 2**19).round() % 2 == 1
        return torch.where(odd & torch.tensor(len(x) >= from_batch), logits + 0.5, logits)

    model.forward = jumping
    return model


class Nudged(EagerProgram):
    """An exported program as good as eager PyTorch: what it computes with is an ulp away."""

    def run(self, method, *inputs):
        w, *rest = inputs
        return super().run(method, np.nextafter(w, np.float32(9)), *rest)


@pytest.fixture
def evaluation(bundles) -> ProgramBundle:
    """A bundle with the evaluate method alone."""
    bundle = bundles("softmax")
    methods = (bundle.manifest.method(Role.EVALUATE),)
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"methods": methods}))


def test_a_draw_that_rounding_decides_is_replaced_and_counted(evaluation):
    model = kinked(from_batch=2)
    bundle = spied(evaluation, program=Nudged(model, evaluation.manifest))
    report = check_parity(bundle, model)
    assert report.redrawn > 0
    assert len(bundle.spies[0].calls) == 4 + report.redrawn
    assert report.worst.error <= 1e-5


def test_a_wrong_program_does_not_hide_behind_a_kinked_model(evaluation):
    model = kinked(from_batch=1)
    bundle = spied(
        evaluation, program=Nudged(model, evaluation.manifest), tamper=lambda _m, _n, _i, o: (o[0] * 1.001, *o[1:])
    )
    with pytest.raises(ParityError, match="loss_sum"):
        check_parity(bundle, model)
    assert len(bundle.spies[0].calls) <= 9


def test_fewer_than_three_runs_prove_nothing(bundles):
    with pytest.raises(ConfigurationError, match="at least 3"):
        check_parity(bundles("softmax"), tiny_model("softmax"), repeats=2)


# --- definitions ----------------------------------------------------------------------------------------------


def test_relative_error_is_the_norm_of_the_difference_over_the_norm():
    expected = np.array([3.0, 4.0], np.float32)
    assert relative_error(expected, expected) == 0
    assert relative_error(np.array([3.0, 4.5], np.float32), expected) == pytest.approx(0.1)
    assert relative_error(np.array([1e-6], np.float32), np.zeros(1, np.float32)) == pytest.approx(1)
    assert relative_error(np.array([np.nan, 4], np.float32), expected) == np.inf
    assert relative_error(expected, np.array([np.inf, 4], np.float32)) == np.inf
    assert relative_error(expected[:1], expected) == np.inf


def test_a_small_parameter_is_not_hidden_by_a_large_one():
    table = (ParameterSpec(name="big", shape=(1000,), offset=0), ParameterSpec(name="small", shape=(1,), offset=1000))
    expected = np.ones(1001, np.float32)
    actual = expected.copy()
    actual[-1] = 1.001
    assert relative_error(actual, expected) < 1e-4
    name, error = parameter_error(actual, expected, table)
    assert (name, error) == ("small", pytest.approx(1e-3, rel=1e-3))


def test_rounding_in_a_slice_that_cancels_is_no_error():
    table = (ParameterSpec(name="big", shape=(100,), offset=0), ParameterSpec(name="zero", shape=(1,), offset=100))
    expected = np.append(np.ones(100, np.float32), np.float32(1e-9))
    actual = np.append(np.ones(100, np.float32), np.float32(2e-9))
    assert parameter_error(actual, expected, table)[1] < 1e-6


@pytest.mark.parametrize(
    ("operators", "passed", "blamed"),
    [
        (("aten::add.out", "aten::fmod.Tensor_out"), set(), ("aten::fmod.Tensor_out",)),
        (
            ("aten::constant_pad_nd.out", "aten::max_pool2d_with_indices_backward.grad_input"),
            set(),
            ("aten::max_pool2d_with_indices_backward.grad_input", "aten::constant_pad_nd.out"),
        ),
        (("aten::add.out", "aten::exotic.out"), {"good"}, ("aten::exotic.out",)),
        (("aten::add.out", "aten::exotic.out"), set(), ()),
        (("aten::add.out",), {"good"}, ()),
    ],
)
def test_the_operator_to_blame(operators, passed, blamed):
    methods = {
        "bad": PlannedMethod("bad", operators, 0, (), ()),
        "good": PlannedMethod("good", ("aten::add.out", "aten::mm.out"), 0, (), ()),
    }
    assert likely_operators("bad", methods, passed) == blamed


def test_the_oracle_checks_its_inputs_and_leaves_them_alone(bundles):
    eager = EagerProgram(tiny_model("mlp"), bundles("mlp").manifest)
    w = np.zeros(131, np.float32)
    x = np.ones((4, 12), np.float32)
    [logits] = eager.run("infer_b4", w, x)
    assert (logits.dtype, logits.shape) == (np.float32, (4, 3))
    assert not w.any()
    assert (x == 1).all()
    with pytest.raises(ProgramError, match="'x' must be"):
        eager.run("infer_b4", w, x[:3])
    assert isinstance(eager, Program)
    assert Path(bundles("mlp").path).exists()
    eager.close()
