"""What a model must be to become a functional program, checked before anything is traced."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import UninitializedParameter

from client_sdk.protocol.program import ParameterSpec
from mobile_export.errors import UnsupportedModel


def parameter_table(model: nn.Module) -> tuple[ParameterSpec, ...]:
    """Check the model and lay its parameters out in one flat vector, in ``named_parameters`` order.

    Raises:
        UnsupportedModel: The model has buffers, batch statistics or active dropout; or it has no parameters, or
            tied, frozen, lazy or non-float32 ones. The message names the layer and says what to do.
    """
    _check_layers(model)
    _check_parameters(model)
    table: list[ParameterSpec] = []
    offset = 0
    for name, parameter in model.named_parameters():
        table.append(ParameterSpec(name=name, shape=tuple(parameter.shape), offset=offset))
        offset += parameter.numel()
    if offset == 0:
        raise UnsupportedModel("", "the model has no parameters: there is nothing to train")
    return tuple(table)


def flat_weights(model: nn.Module) -> torch.Tensor:
    """The model's parameters as one detached float32 vector ``[d]``, in table order (a copy)."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def check_graph(graph: torch.fx.Graph) -> None:
    """Refuse a traced method that draws random numbers: all randomness of a program is an input.

    Raises:
        UnsupportedModel: Names the random operator.
    """
    for node in graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise UnsupportedModel(
                str(node.target),
                "draws random numbers, which an exported program cannot; remove it or call model.eval()",
            )


def _check_layers(model: nn.Module) -> None:
    for name, module in model.named_modules():
        layer = name or type(model).__name__
        kind = type(module).__name__
        if isinstance(module, _BatchNorm):
            raise UnsupportedModel(
                layer,
                f"{kind} mixes the examples of a batch and keeps running statistics, which have no place in a flat "
                "weight vector; use nn.GroupNorm instead",
            )
        buffers = [b for b, tensor in module.named_buffers(recurse=False) if tensor is not None]
        if buffers:
            raise UnsupportedModel(
                layer,
                f"{kind} has buffers {buffers}, which have no place in a flat weight vector; make them parameters, "
                "or compute constants inside forward (nn.GroupNorm replaces a normalisation with running statistics)",
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise UnsupportedModel(
                layer,
                f"{kind} looks rows up by integers, and a program's features are arbitrary float32 values; give the "
                "model one-hot or precomputed features and use nn.Linear instead",
            )
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise UnsupportedModel(
                layer, f"{kind} is in training mode and draws random numbers; call model.eval() or remove it"
            )


def _check_parameters(model: nn.Module) -> None:
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, UninitializedParameter):
            raise UnsupportedModel(name, "is not initialised yet; run the model once before the export")
        if parameter.dtype is not torch.float32:
            raise UnsupportedModel(name, f"is {parameter.dtype}; all parameters must be torch.float32: model.float()")
        if not parameter.requires_grad:
            raise UnsupportedModel(name, "is frozen (requires_grad=False), but every parameter is trained; unfreeze it")
        if parameter.numel() == 0:
            continue
        owner = owners.setdefault(parameter.untyped_storage().data_ptr(), name)
        if owner != name:
            raise UnsupportedModel(name, f"shares its memory with {owner} (tied parameters); give it its own tensor")
