"""Axis permutations in a traced method: one notation for all of them, moved down until they cancel.

``t``, ``transpose`` and ``permute`` become ``permute``; ``view``, ``unsqueeze``, ``squeeze`` and their kin become
``reshape``; copies for the sake of strides disappear, since ExecuTorch's tensors are contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, ops

_aten = ops.aten

_RESHAPES = frozenset(
    {
        _aten.view.default,
        _aten._unsafe_view.default,  # noqa: SLF001 - torch's name
        _aten.reshape.default,
        _aten.unsqueeze.default,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
    }
)
_COPIES = frozenset({_aten.clone.default, _aten.detach.default, _aten.alias.default})


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:  # noqa: ANN401 - any operator's arguments
    """A new node at the graph's insertion point, which knows its value's shape."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda argument: argument.meta["val"]))
    return node


def num_elements(node: fx.Node) -> int:
    """Size of a node's value."""
    return int(node.meta["val"].numel())


def transposed(node: fx.Node) -> fx.Node | None:
    """The node whose last two axes ``node`` swaps, if it does that and nothing else."""
    if node.target is not _aten.permute.default:
        return None
    source, axes = _permutation(node)
    rank = len(axes)
    return source if rank > 1 and axes == (*range(rank - 2), rank - 1, rank - 2) else None


def sink_permutes(graph: fx.Graph) -> None:
    """Rewrite a graph in place, until nothing changes."""
    for node in list(graph.nodes):
        _unify(graph, node)
    changed = True
    while changed:
        changed = False
        for node in list(graph.nodes):
            if not node.users or "val" not in node.meta:
                continue
            with graph.inserting_before(node):
                new = _moved(graph, node)
            if new is not None and new is not node:
                node.replace_all_uses_with(new)
                graph.erase_node(node)
                changed = True
        graph.eliminate_dead_code()


def _unify(graph: fx.Graph, node: fx.Node) -> None:
    """Write shape changes and permutations in one way."""
    if node.op != "call_function" or "val" not in node.meta:
        return
    source, value = node.args[0] if node.args else None, node.meta["val"]
    if not isinstance(source, fx.Node) or "val" not in source.meta:
        return
    with graph.inserting_before(node):
        if node.target in _COPIES:
            new = source
        elif node.target in _RESHAPES:
            new = call(graph, _aten.reshape.default, source, list(value.shape))
        elif node.target is _aten.t.default:
            new = call(graph, _aten.permute.default, source, list(range(value.ndim))[::-1])
        elif node.target is _aten.transpose.int:
            axes = list(range(value.ndim))
            arguments: tuple[Any, ...] = node.args
            a, b = arguments[1:3]
            axes[a], axes[b] = axes[b], axes[a]
            new = call(graph, _aten.permute.default, source, axes)
        else:
            return
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _moved(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """What a node can be replaced by so that a permutation vanishes or comes later; None if nothing."""
    if node.target is _aten.permute.default:
        return _simpler_permute(graph, node)
    if node.target is _aten.reshape.default:
        return _simpler_reshape(graph, node)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _permuted_later(graph, node)
    return None


def _simpler_permute(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    source, axes = _permutation(node)
    if source.target is _aten.permute.default:
        inner, first = _permutation(source)
        return call(graph, _aten.permute.default, inner, [first[a] for a in axes])
    shape = source.meta["val"].shape
    if list(axes) == sorted(axes):
        return source
    if (moving := [a for a in axes if shape[a] != 1]) == sorted(moving):
        return call(graph, _aten.reshape.default, source, [shape[a] for a in axes])
    return None


def _simpler_reshape(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    source, shape = node.args[0], tuple(node.meta["val"].shape)
    if not isinstance(source, fx.Node):
        return None
    if tuple(source.meta["val"].shape) == shape:
        return source
    if source.target is _aten.reshape.default:
        return call(graph, _aten.reshape.default, source.args[0], list(shape))
    if source.target is _aten.permute.default:
        inner, axes = _permutation(source)
        found = _reshape_first(tuple(inner.meta["val"].shape), axes, shape)
        if found is not None:
            before, after = found
            return call(graph, _aten.permute.default, call(graph, _aten.reshape.default, inner, before), after)
    return None


def _reshape_first(
    inner: tuple[int, ...], axes: Sequence[int], shape: tuple[int, ...]
) -> tuple[list[int], list[int]] | None:
    """Reshape and permutation that give what permuting ``inner`` by ``axes`` and reshaping to ``shape`` gives.

    Possible where each block of axes that the reshape merges or splits is a run of neighbours in ``inner`` too.
    """
    if math.prod(inner) == 0:
        return None
    axes = [a for a in axes if inner[a] != 1]
    neighbours = {a: i for i, a in enumerate(sorted(axes))}
    blocks: list[tuple[int, list[int]]] = []  # where the block lies in `inner`, and its axes of `shape`
    position = 0
    done = 0
    while done < len(shape):
        block, of_inner, of_shape = [done], 1, shape[done]
        first = position
        done += 1
        while of_inner != of_shape:
            if of_inner < of_shape:
                of_inner *= inner[axes[position]]
                position += 1
            else:
                of_shape *= shape[done]
                block.append(done)
                done += 1
        members = [neighbours[a] for a in axes[first:position]]
        if members != list(range(members[0], members[0] + len(members))) if members else False:
            return None
        # An axis of size 1 goes with the block before it.
        if not members and blocks:
            blocks[-1][1].extend(block)
        else:
            blocks.append((members[0] if members else -1, block))
    order = [axis for _, block in sorted(blocks, key=lambda b: b[0]) for axis in block]
    return [shape[axis] for axis in order], [order.index(axis) for axis in range(len(shape))]


def _permuted_later(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``f(permute(a), permute(b)) -> permute(f(a, b))``, also if only one is permuted and the result turns back."""
    value = node.meta["val"]
    operands = [a for a in node.all_input_nodes if "val" in a.meta]
    leading = next(
        (a for a in operands if a.target is _aten.permute.default and a.meta["val"].shape == value.shape), None
    )
    if leading is None or len(operands) != len(node.all_input_nodes) or node.kwargs:
        return None
    _, axes = _permutation(leading)
    inverse = [axes.index(i) for i in range(len(axes))]
    turns_back = all(
        user.target is _aten.permute.default and list(_permutation(user)[1]) == inverse for user in node.users
    )
    for operand in operands:
        permuted = operand.target is _aten.permute.default and _permutation(operand)[1] == axes
        if not permuted and operand.meta["val"].shape == value.shape and not turns_back:
            return None

    def unpermuted(operand: fx.Node) -> fx.Node:
        shape = operand.meta["val"].shape
        if math.prod(shape) == 1:
            return operand
        if operand.target is _aten.permute.default and _permutation(operand)[1] == axes:
            return _permutation(operand)[0]
        if len(shape) < value.ndim:
            operand = call(graph, _aten.reshape.default, operand, [1] * (value.ndim - len(shape)) + list(shape))
        return call(graph, _aten.permute.default, operand, inverse)

    return call(
        graph, _aten.permute.default, call(graph, node.target, *fx.node.map_arg(node.args, unpermuted)), list(axes)
    )


def _permutation(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]]:
    """Source and axes of a permutation."""
    arguments: tuple[Any, ...] = node.args
    source, axes = arguments
    rank = len(axes)
    return source, tuple(axis % rank for axis in axes)
