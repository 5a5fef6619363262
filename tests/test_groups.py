"""Groups of nodes: by the path in their names, and by what flows out of them."""

from __future__ import annotations

from inspector.groups import block_of, nodes_after, nodes_between

NAMES = ("/a/b/conv", "/a/b/relu", "/a/bc/conv", "/a/top", "plain", "/lonely/one")


def test_a_block_shares_the_path_before_the_last_slash() -> None:
    assert block_of("/a/b/relu", NAMES) == ("/a/b/conv", "/a/b/relu")
    assert block_of("/a/top", NAMES) == ("/a/b/conv", "/a/b/relu", "/a/bc/conv", "/a/top")


def test_a_name_without_path_or_company_has_no_block() -> None:
    assert block_of("plain", NAMES) == ()
    assert block_of("/lonely/one", NAMES) == ()
    assert block_of("/top", ("/top", "/other")) == ()
    assert block_of("", NAMES) == ()


def node(name: str, inputs: list[str], outputs: list[str]) -> dict[str, object]:
    return {"name": name, "inputs": inputs, "outputs": outputs}


GRAPH = (
    node("first", ["x"], ["a", ""]),
    node("left", ["a"], ["b"]),
    node("right", ["x"], ["c"]),
    node("join", ["b", "c", ""], ["d"]),
    node("aside", ["c"], ["e"]),
)


def test_what_follows_a_node_is_what_computes_with_what_it_gives() -> None:
    assert nodes_after("first", GRAPH) == ("left", "join")
    assert nodes_after("right", GRAPH) == ("join", "aside")
    assert nodes_after("join", GRAPH) == ()


def test_nothing_follows_a_node_that_is_not_there() -> None:
    assert nodes_after("nobody", GRAPH) == ()


def test_between_two_nodes_lies_what_leads_from_one_to_the_other() -> None:
    assert nodes_between("first", "join", GRAPH) == ("first", "left", "join")
    assert nodes_between("join", "right", GRAPH) == ("right", "join")
    assert nodes_between("left", "left", GRAPH) == ("left",)


def test_nothing_lies_between_nodes_of_which_none_leads_to_the_other() -> None:
    assert nodes_between("left", "aside", GRAPH) == ()
    assert nodes_between("first", "nobody", GRAPH) == ()
