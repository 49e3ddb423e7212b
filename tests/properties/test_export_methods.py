"""Laws of the functional methods that hold for any batch, mask and split, against the independent oracle."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client_sdk.protocol.program import Manifest, MethodSpec, Role, TensorSpec, parameter_table_hash
from mobile_export import EagerProgram
from mobile_export.checks import flat_weights, parameter_table
from mobile_export.methods import INPUT_NAMES, OUTPUT_NAMES, Methods, cross_entropy
from mobile_export.parity import parameter_error, relative_error
from tests.bundles import FEATURE_SHAPES, NUM_CLASSES, tiny_model

MODELS = {name: tiny_model(name) for name in FEATURE_SHAPES}
TABLES = {name: parameter_table(model) for name, model in MODELS.items()}
METHODS = {name: Methods(model, cross_entropy, TABLES[name]) for name, model in MODELS.items()}


@st.composite
def batches(draw):
    """A model's name, weights near its own, a batch, and a mask that keeps at least one example."""
    name = draw(st.sampled_from(sorted(MODELS)))
    batch = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.01, 1.0, 30.0]))
    initial = flat_weights(MODELS[name])
    w = initial * torch.from_numpy(rng.uniform(-2, 2, len(initial)).astype("f4"))
    x = torch.from_numpy((scale * rng.standard_normal((batch, *FEATURE_SHAPES[name]))).astype("f4"))
    y = torch.from_numpy(rng.integers(0, NUM_CLASSES, batch))
    mask = torch.from_numpy((rng.random(batch) < draw(st.sampled_from([0.3, 0.7, 1.0]))).astype("f4"))
    mask[draw(st.integers(0, batch - 1))] = 1
    return name, w, x, y, mask


def close(a, b, tolerance=1e-4):
    """Relative in the norm: sums of the same terms in another order."""
    return relative_error(a.numpy(), b.numpy()) <= tolerance


@given(batches(), st.integers(0, 9))
def test_slices_accumulate_to_the_whole_batch(sample, cut):
    name, w, x, y, mask = sample
    grad = METHODS[name].grad
    whole = grad(w, x, y, mask)
    parts = [grad(w, x[s], y[s], mask[s]) for s in (slice(0, cut), slice(cut, None)) if len(x[s])]
    for i, total in enumerate(whole):
        assert close(sum(part[i] for part in parts), total)


@given(batches(), st.integers(1, 5))
def test_padding_a_batch_with_masked_examples_changes_nothing(sample, extra):
    name, w, x, y, mask = sample
    padded = [torch.cat([t, t.new_zeros(extra, *t.shape[1:])]) for t in (x, y, mask)]
    padded[0][-extra:] = torch.nan
    for role in (Role.GRAD, Role.EVALUATE):
        run = METHODS[name].function(role)
        for a, b in zip(run(w, *padded), run(w, x, y, mask), strict=True):
            assert close(a, b)


OF_THE_MODEL = list(INPUT_NAMES)
"""Methods of one batch; those of several are checked with the gradients through them."""


def manifest_of(name: str, batch: int) -> Manifest:
    """A manifest for the oracle alone: no program stands behind it."""
    table = TABLES[name]
    shapes = {
        "w": ("float32", (table[-1].offset + table[-1].num_elements,)),
        "x": ("float32", (batch, *FEATURE_SHAPES[name])),
        "y": ("int64", (batch,)),
        "mask": ("float32", (batch,)),
        "logits": ("float32", (batch, NUM_CLASSES)),
    }
    shapes["grad_sum"] = shapes["w"]

    def specs(names):
        return tuple(TensorSpec(name=n, dtype=d, shape=s) for n in names for d, s in [shapes.get(n, ("float32", (1,)))])

    return Manifest(
        model_name=name,
        program_sha256="0" * 64,
        program_bytes=1,
        initial_weights_sha256="0" * 64,
        executorch_version="",
        torch_version="",
        content_key="",
        operators=(),
        parameters=table,
        parameter_table_sha256=parameter_table_hash(table),
        feature_shape=FEATURE_SHAPES[name],
        num_classes=NUM_CLASSES,
        methods=tuple(
            MethodSpec(
                name=f"{role.value}_b{batch}",
                role=role,
                batch_size=batch,
                inputs=specs(INPUT_NAMES[role]),
                outputs=specs(OUTPUT_NAMES[role]),
                planned_memory_bytes=0,
            )
            for role in OF_THE_MODEL
        ),
    )


@settings(max_examples=60)
@given(batches(), st.sampled_from(OF_THE_MODEL))
def test_the_oracle_agrees_though_it_shares_no_code(sample, role):
    name, w, x, y, mask = sample
    manifest = manifest_of(name, len(x))
    eager = EagerProgram(MODELS[name], manifest)
    values = {"w": w, "lr": torch.tensor([0.1]), "x": x, "y": y, "mask": mask}
    inputs = [values[n] for n in INPUT_NAMES[role]]
    expected = eager.run(f"{role.value}_b{len(x)}", *(t.numpy() for t in inputs))
    actual = METHODS[name].function(role)(*inputs)
    for output, a, e in zip(OUTPUT_NAMES[role], actual, expected, strict=True):
        if output in {"w", "grad_sum"}:
            assert parameter_error(a.numpy(), e, TABLES[name])[1] <= 1e-3
        else:
            assert relative_error(a.numpy(), e) <= 1e-4
