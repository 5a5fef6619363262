"""Nodes that are ticked together: those of one block, and what follows from one node.

Apart from `exclusions`, because pages ask for it at every run and load no runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


def nodes_between(first: str, last: str, nodes: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The nodes on every way from one node to another, both included, in graph order.

    () where no way leads from one to the other; which of the two comes first does not matter.

    Args:
        first: name of a node.
        last: name of a node.
        nodes: in topological order, each with "name", "inputs" and "outputs".
    """
    places = {str(node["name"]): at for at, node in enumerate(nodes)}
    if first not in places or last not in places:
        return ()
    first, last = sorted((first, last), key=places.__getitem__)
    after = {first, *nodes_after(first, nodes)}
    wanted: set[str] = set()
    found = []
    for node in reversed(nodes[: places[last] + 1]):
        name = str(node["name"])
        if name in after and (name == last or wanted.intersection(node["outputs"])):
            found.append(name)
            wanted.update(i for i in node["inputs"] if i)
    return tuple(reversed(found)) if first in found else ()
