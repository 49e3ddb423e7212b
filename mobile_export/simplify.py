"""Fewer and smaller transposes: in eager mode they are free views, in ExecuTorch each one is a slow copy."""

from __future__ import annotations

from torch import fx, ops

_aten = ops.aten
_PRODUCTS = (_aten.mm.default, _aten.bmm.default)


def simplify(module: fx.GraphModule) -> None:
    """Rewrite a traced method in place; the values stay those of the same products, to rounding."""
    for node in module.graph.nodes:
        if node.target is _aten.view.default:
            # Tensors may lie in memory otherwise than when the view was traced.
            node.target = _aten.reshape.default
    for node in list(module.graph.nodes):
        _transpose_the_smaller(module.graph, node)
    for node in module.graph.nodes:
        inner = _transposed(node)
        if inner is not None and (original := _transposed(inner)) is not None:
            # Autograd transposes the gradient of each weight twice.
            node.replace_all_uses_with(original)
    module.graph.eliminate_dead_code()
    module.recompile()


def _transpose_the_smaller(graph: fx.Graph, product: fx.Node) -> None:
    """Turn ``a @ b`` into ``(b^T @ a^T)^T`` where that moves fewer elements, as in ``x @ W^T`` for a small batch."""
    if product.target not in _PRODUCTS:
        return
    a, b = product.args
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return
    swapped = [(b, _transposed(b)), (a, _transposed(a))]
    now = sum(_num_elements(node) for node, inner in swapped if inner is not None)
    then = _num_elements(product) + sum(_num_elements(node) for node, inner in swapped if inner is None)
    if then >= now:
        return
    product.meta["val"] = product.meta["val"].mT
    with graph.inserting_after(product):
        result = _transpose(graph, product)
    product.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    with graph.inserting_before(product):
        product.args = tuple(inner or _transpose(graph, node) for node, inner in swapped)


def _transpose(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A new node that swaps the last two axes of a product's operand or result."""
    value = node.meta["val"]
    if value.ndim == 2:
        flipped = graph.call_function(_aten.t.default, (node,))
    else:
        flipped = graph.call_function(_aten.transpose.int, (node, 1, 2))
    flipped.meta["val"] = value.mT
    return flipped


def _transposed(node: fx.Node) -> fx.Node | None:
    """The node whose last two axes ``node`` swaps, if it does that."""
    if node.target is _aten.transpose.int:
        rank = node.meta["val"].ndim
        swaps = {d % rank for d in node.args[1:] if isinstance(d, int)} == {rank - 2, rank - 1}
    else:
        swaps = node.target is _aten.t.default
    inner = node.args[0] if swaps else None
    return inner if isinstance(inner, fx.Node) else None


def _num_elements(node: fx.Node) -> int:
    return int(node.meta["val"].numel())
