"""The reference models: shapes, parameter counts, and initial weights that depend on the seed alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom

from client_sdk.protocol.errors import ConfigurationError
from mobile_export import REFERENCE_MODELS, build_model
from mobile_export.models import ByteEmbedding, Im2colConv2d


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(
    ("name", "shape", "classes", "hidden", "num_parameters"),
    [
        ("softmax", (784,), 10, None, 7_850),
        ("mlp", (784,), 10, None, 50_890),
        ("mlp", (28, 28), 10, (64,), 50_890),
        ("mlp", (12,), 3, (8, 5), 167),
        ("cnn", (28, 28), 10, None, 26_698),
        ("cnn", (8, 8), 10, None, 3_658),
        ("byte-mlp", (16,), 256, None, 26_944),
        ("byte-mlp", (4,), 6, (5,), 249),
        ("byte-gru", (16,), 256, None, 22_944),
        ("byte-gru", (4,), 6, (5,), 309),
    ],
)
def test_a_model_gives_one_row_of_logits_per_example(name, shape, classes, hidden, num_parameters):
    model = build_model(name, shape, classes, seed=0, hidden=hidden)
    assert model(torch.ones(5, *shape)).shape == (5, classes)
    assert weights(model).numel() == num_parameters
    assert model.feature_shape == shape


def shape_for(name: str) -> tuple[int, ...]:
    """A feature shape that the model takes."""
    return (8,) if name.startswith("byte-") else (8, 8)


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_the_seed_alone_fixes_the_weights(name):
    torch.manual_seed(1)
    first = weights(build_model(name, shape_for(name), 3, seed=5))
    torch.manual_seed(2)
    again = weights(build_model(name, shape_for(name), 3, seed=5))
    other = weights(build_model(name, shape_for(name), 3, seed=6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.isfinite(first).all()
    assert first.abs().max() <= 1


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_building_leaves_the_global_generator_alone(name):
    before = torch.random.get_rng_state()
    build_model(name, shape_for(name), 3, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_cnn_takes_an_image_in_any_of_its_shapes():
    x = torch.randn(4, 784, generator=torch.Generator().manual_seed(0))
    shapes = ((784,), (28, 28), (1, 28, 28))
    logits = [build_model("cnn", s, 10, seed=0)(x.reshape(4, *s)) for s in shapes]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 1), (5, 9, 3), (1, 1, 2)])
def test_im2col_is_a_3x3_convolution_with_zero_padding(height, width, channels):
    generator = torch.Generator().manual_seed(0)
    conv = Im2colConv2d(channels, 4)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator))
        conv.bias.copy_(torch.randn(4, generator=generator))
    x = torch.randn(2, channels, height, width, generator=generator)
    expected = F.conv2d(x, conv.weight.reshape(4, channels, 3, 3), conv.bias, padding=1)
    torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)


def test_an_embedding_looks_vectors_up():
    embedding = ByteEmbedding(256, 8)
    with torch.no_grad():
        embedding.weight.copy_(torch.randn(256, 8, generator=torch.Generator().manual_seed(0)))
    ids = torch.arange(256).reshape(16, 16)
    assert torch.equal(embedding(ids.to(torch.float32)), F.embedding(ids, embedding.weight))


def test_the_recurrent_model_computes_what_a_gru_computes():
    model = build_model("byte-gru", (7,), 11, seed=0, hidden=(6,))
    gru = torch.nn.GRU(model.WIDTH, 6, batch_first=True)
    with torch.no_grad():
        for name, layer in (("ih", model.reads), ("hh", model.recurs)):
            getattr(gru, f"weight_{name}_l0").copy_(layer.weight)
            getattr(gru, f"bias_{name}_l0").copy_(layer.bias)
    ids = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(1))
    states, _ = gru(F.embedding(ids, model.embedding.weight))
    torch.testing.assert_close(model(ids.to(torch.float32)), model.output(states[:, -1]))


@pytest.mark.parametrize(
    ("name", "shape", "classes", "hidden", "said"),
    [
        ("resnet", (784,), 10, None, "byte-gru, byte-mlp, cnn, mlp, softmax"),
        ("softmax", (784,), 10, (64,), "use mlp"),
        ("mlp", (), 10, None, "at least 1"),
        ("mlp", (0,), 10, None, "at least 1"),
        ("mlp", (4,), 0, None, "at least 1"),
        ("mlp", (4,), 2, (0,), "at least 1"),
        ("cnn", (783,), 10, None, "(H, W)"),
        ("cnn", (3, 28, 28), 10, None, "grey images"),
        ("cnn", (2, 2), 10, None, "4x4"),
        ("byte-mlp", (4, 4), 10, None, "ids in a row"),
        ("byte-gru", (4, 4), 10, None, "ids in a row"),
        ("byte-gru", (4,), 10, (8, 8), "one recurrent layer"),
    ],
)
def test_what_cannot_be_built_is_refused(name, shape, classes, hidden, said):
    with pytest.raises(ConfigurationError) as refusal:
        build_model(name, shape, classes, seed=0, hidden=hidden)
    assert said in str(refusal.value)
