"""Nodes that are ticked together: those of one block, and what follows from one node.

Apart from `exclusions`, because pages ask for it at every run and load no runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def block_of(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """The nodes of the block that a node belongs to, in the order of `names`.

    A block is what shares the path before the last ``/`` of a name; () where the name has none, or
    where nobody else is in it.
    """
    path, slash, _ = name.rpartition("/")
    if not slash or not path:
        return ()
    found = tuple(n for n in names if n.startswith(f"{path}/"))
    return found if len(found) > 1 else ()


def nodes_after(name: str, nodes: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The nodes that compute with what a node gives, and what follows from it, in graph order.

    Args:
        name: of the node, which is not among them.
        nodes: in topological order, each with "name", "inputs" and "outputs".
    """
    reached: set[str] = set()
    found = []
    for node in nodes:
        if node["name"] == name:
            reached.update(o for o in node["outputs"] if o)
        elif reached.intersection(node["inputs"]):
            found.append(str(node["name"]))
            reached.update(o for o in node["outputs"] if o)
    return tuple(found)
