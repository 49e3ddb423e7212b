"""Fewer and smaller copies: what is a free view in eager mode is a slow copy in ExecuTorch.

Four rewrites of a traced method, whose values stay the same but for rounding:

- transposes move down through whatever works entry by entry, and vanish where they meet their inverses;
- every matrix product takes the form that copies least, of which ``a @ b^T`` is one, with a kernel of its own;
- shape changes that move nothing (transposes of a batch of one among them) become reshapes, which are free;
- what is computed twice is computed once, unless keeping it would take more memory than its inputs do.
"""

from __future__ import annotations

from torch import fx, ops

from mobile_export.transposes import call, num_elements, sink_permutes, transposed

_aten = ops.aten


def simplify(module: fx.GraphModule) -> None:
    """Rewrite a traced method in place."""
    graph = module.graph
    changed = True
    while changed:
        sink_permutes(graph)
        changed = False
        for node in list(graph.nodes):
            changed |= _take_the_cheapest_form(graph, node)
    _merge_equals(graph)
    graph.eliminate_dead_code()
    module.recompile()


def _take_the_cheapest_form(graph: fx.Graph, product: fx.Node) -> bool:
    """Rewrite ``a @ b`` so that the fewest elements are transposed, as in ``x @ W^T`` or for a small batch.

    The forms are ``a @ b``, ``a @ (b^T)^T`` with one kernel, and the transposes of both of the product of the
    transposes; the batched product has no such kernel.
    """
    if product.target not in {_aten.mm.default, _aten.bmm.default}:
        return False
    a, b = product.args
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or "val" not in a.meta or "val" not in b.meta:
        return False
    a_flipped, b_flipped = transposed(a), transposed(b)

    def cost(node: fx.Node, flipped: fx.Node | None, *, turned: bool) -> int:
        """Elements to copy for an operand, or for its transpose."""
        return 0 if (flipped is not None) == turned else num_elements(node)

    result = 0 if all(transposed(user) is product for user in product.users) else num_elements(product)
    plain = cost(a, a_flipped, turned=False) + cost(b, b_flipped, turned=False)
    both = cost(a, a_flipped, turned=True) + cost(b, b_flipped, turned=True) + result
    forms = {"plain": plain, "both": both}
    if product.target is _aten.mm.default:
        forms["second"] = cost(a, a_flipped, turned=False) + cost(b, b_flipped, turned=True)
        forms["first"] = cost(b, b_flipped, turned=True) + cost(a, a_flipped, turned=False) + result
    best = min(forms, key=forms.__getitem__)
    if best == "plain":
        return False

    def turn(node: fx.Node, flipped: fx.Node | None) -> fx.Node:
        return flipped or _transpose(graph, node)

    with graph.inserting_before(product):
        match best:
            case "second":
                new = call(graph, _aten.linear.default, a, turn(b, b_flipped))
            case "first":
                new = _transpose(graph, call(graph, _aten.linear.default, turn(b, b_flipped), a))
            case _:
                swapped = call(graph, product.target, turn(b, b_flipped), turn(a, a_flipped))
                new = _transpose(graph, swapped)
    product.replace_all_uses_with(new)
    graph.erase_node(product)
    return True


def _transpose(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A new node that swaps the last two axes of a product's operand or result."""
    rank = node.meta["val"].ndim
    return call(graph, _aten.permute.default, node, [*range(rank - 2), rank - 1, rank - 2])


def _merge_equals(graph: fx.Graph) -> None:
    """Compute equal values once; but not those that are larger than what they are made of, such as windows."""
    seen: dict[tuple[object, ...], fx.Node] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not hasattr(value, "numel"):
            continue
        sources = [source for source in node.all_input_nodes if hasattr(source.meta.get("val"), "numel")]
        if num_elements(node) > max((num_elements(source) for source in sources), default=0):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        twin = seen.setdefault(key, node)
        if twin is not node:
            node.replace_all_uses_with(twin)
            graph.erase_node(node)
