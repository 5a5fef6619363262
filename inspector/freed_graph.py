"""A quantized file's graph with the sites of `sites` in one form or the other, or with both.

Puts nodes together, and takes out what has lost its readers or hands on in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import onnx
import onnx.helper

from inspector.model import Model, bodies_of
from inspector.scheme import Q
from inspector.sites import Site, Sites, copied


def graph_nodes(
    sites: Sites, form: Callable[[float, Site], list[onnx.NodeProto]]
) -> list[onnx.NodeProto]:
    """The nodes with what stands for each site, not yet without what nobody reads.

    Args:
        form: gives the nodes of a site.
    """
    moved = {at for site in sites.by_place.values() for at in site.moved}
    found: list[onnx.NodeProto] = []
    for index, proto in enumerate(sites.protos):
        found += copied(sites.before.get(index, ()))
        if index in sites.by_place:
            found += form(index, sites.by_place[index])
        elif index not in moved:
            found += copied([proto])
        if index + 0.5 in sites.by_place:
            found += form(index + 0.5, sites.by_place[index + 0.5])
        found += copied(sites.after.get(index, ()))
    _reroute(sites, found)
    return found


def _reroute(sites: Sites, nodes: Iterable[onnx.NodeProto]) -> None:
    """Has nodes read behind a rectifier that is a node again, as in the float model."""
    if sites.rerouted:
        for node in nodes:
            if node.op_type != Q and node.name not in sites.own_nodes:
                _renamed(node, sites.rerouted)


def quantized_form(sites: Sites, site: Site) -> list[onnx.NodeProto]:
    """The nodes of a site as the file has them."""
    return copied((*(sites.protos[at] for at in site.moved), *site.quantized))


def resolved_nodes(sites: Sites, states: Mapping[float, bool]) -> list[onnx.NodeProto]:
    """The nodes with each site in one form, and nothing that has lost its readers.

    Args:
        sites: of the file.
        states: by place, whether a site has its freed form.
    """

    def form(at: float, site: Site) -> list[onnx.NodeProto]:
        return copied(site.freed) if states[at] else quantized_form(sites, site)

    nodes = _simplified(graph_nodes(sites, form), sites.outputs, sites.identities, sites.copies)
    live = live_nodes(sites, nodes)
    return [node for at, node in enumerate(nodes) if at in live]


def both_forms(sites: Sites, site: Site, condition: str) -> onnx.NodeProto:
    """Both forms of a site behind an If, of which one is run."""
    branches = []
    forms = (copied(site.freed), "float"), (quantized_form(sites, site), "quantized")
    for inner, how in forms:
        _reroute(sites, inner)
        names: dict[str, str] = {}
        for node in inner:
            for at, tensor in enumerate(node.input):
                node.input[at] = names.get(tensor, tensor)
            for at, tensor in enumerate(node.output):
                if tensor:
                    names[tensor] = sites.names.fresh(f"{tensor}_if_{how}")
                    node.output[at] = names[tensor]
        outputs = [onnx.ValueInfoProto(name=names[o]) for o in site.outputs]
        branches.append(onnx.helper.make_graph(inner, how, [], outputs))
    name = sites.names.fresh(f"{site.outputs[0]}_If")
    sites.own_nodes.add(name)  # its forms read what they are to read
    return onnx.helper.make_node(
        "If", [condition], list(site.outputs), name,
        then_branch=branches[0], else_branch=branches[1],
    )  # fmt: skip


def live_nodes(sites: Sites, nodes: Sequence[onnx.NodeProto]) -> set[int]:
    """What outputs need, and what nobody needed in the file as it came."""
    makers = {o: at for at, node in enumerate(nodes) for o in node.output if o}
    idle = _idle(sites)
    waiting = [o for o in sites.outputs if o in makers]
    live: set[int] = set()
    for at, node in enumerate(nodes):
        if node.name in idle:
            waiting += [o for o in node.output if o in makers]
            live.add(at)
            waiting += [i for i in _read_by(node) if i in makers]
    while waiting:
        at = makers[waiting.pop()]
        if at not in live:
            live.add(at)
            waiting += [i for i in _read_by(nodes[at]) if i in makers]
    return live


def _idle(sites: Sites) -> set[str]:
    """Nodes of the file that no output needs."""
    needed: set[int] = set()
    waiting = [o for o in sites.outputs if o in sites.producers]
    while waiting:
        node = sites.producers[waiting.pop()]
        if node.index not in needed:
            needed.add(node.index)
            waiting += [i for i in (*node.inputs, *node.captured) if i in sites.producers]
    return {n.name for n in sites.q.nodes if n.index not in needed}


def _simplified(
    nodes: list[onnx.NodeProto],
    outputs: Collection[str],
    plain: Collection[str],
    copies: Mapping[str, str],
) -> list[onnx.NodeProto]:
    """The nodes without those that change nothing.

    Args:
        nodes: in topological order; they are changed.
        outputs: of the file, which keep their names.
        plain: names of the nodes that hand a tensor on in the place of a pair.
        copies: by output of a copied carrier, the original's: a copy that reads what the original
            reads is the original.
    """
    names: dict[str, str] = {}
    found = []
    reads: dict[str, str] = {}
    made: set[str] = set()
    ends: dict[str, str] = {}
    for node in nodes:
        _renamed(node, names)
        if node.name in plain:
            source, target = node.input[0], node.output[0]
            if target not in outputs:
                names[target] = source
                continue
            if source in made and source not in outputs and source not in ends:
                ends[source] = target  # what computes it gives the output itself
                continue
        original = next((copies[o] for o in node.output if o in copies), "")
        if original and reads.get(original) == node.input[0]:
            names.update((o, copies[o]) for o in node.output if o)
            continue
        if node.input:
            reads.update((o, node.input[0]) for o in node.output)
        made.update(node.output)
        found.append(node)
    if ends:
        for node in found:
            _renamed(node, ends)
            for at, name in enumerate(node.output):
                node.output[at] = ends.get(name, name)
    return found


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Gives the tensors that a node reads other names, in its bodies, too."""
    for at, name in enumerate(node.input):
        if name in names:
            node.input[at] = names[name]
    for body in bodies_of(node):
        own = {i.name for i in body.initializer} | {i.name for i in body.input}
        own.update(o for inner in body.node for o in inner.output)
        outer = {old: new for old, new in names.items() if old not in own}
        if not outer:
            continue
        for inner in body.node:
            _renamed(inner, outer)
        for output in body.output:
            output.name = outer.get(output.name, output.name)


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """Tensors that a node reads, those that its bodies take from outside included."""
    yield from filter(None, node.input)
    for body in bodies_of(node):
        own = {i.name for i in body.initializer} | {i.name for i in body.input}
        own.update(o for inner in body.node for o in inner.output)
        for inner in body.node:
            yield from (name for name in _read_by(inner) if name not in own)
        yield from (o.name for o in body.output if o.name not in own)


def model_of(
    sites: Sites, nodes: Sequence[onnx.NodeProto], inputs: Sequence[onnx.ValueInfoProto] = ()
) -> Model:
    """The quantized model with other nodes and the constants they read."""
    source = sites.q.proto
    proto = onnx.ModelProto()
    proto.CopyFrom(_without_graph(source))
    # Before version 4 every constant had to be a graph input.
    proto.ir_version = max(4, proto.ir_version)
    graph = proto.graph
    old = source.graph
    graph.name, graph.doc_string = old.name, old.doc_string
    graph.node.extend(nodes)
    graph.output.extend(old.output)
    graph.metadata_props.extend(old.metadata_props)
    read = {name for node in nodes for name in _read_by(node)} | sites.outputs
    before = {name for node in sites.protos for name in _read_by(node)} | sites.outputs
    gone = {i.name for i in old.initializer if i.name in before and i.name not in read}
    graph.input.extend(i for i in old.input if i.name not in gone)
    graph.input.extend(inputs)
    there = read | {o for node in nodes for o in node.output}
    graph.value_info.extend(v for v in old.value_info if v.name in there)
    graph.quantization_annotation.extend(
        a for a in old.quantization_annotation if a.tensor_name in there
    )
    graph.sparse_initializer.extend(old.sparse_initializer)
    external = {}
    for tensor in old.initializer:
        if tensor.name not in gone:
            graph.initializer.append(tensor)
            if tensor.name in sites.q.external:
                external[tensor.name] = sites.q.external[tensor.name]
    for tensor, place in sites.floats.initializers(read):
        graph.initializer.append(tensor)
        if place is not None:
            external[tensor.name] = place
    return Model(proto, path=sites.q.path, external=external)


def _without_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """All of a model but its graph, which may be large."""
    return onnx.ModelProto(
        ir_version=model.ir_version,
        opset_import=model.opset_import,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        metadata_props=model.metadata_props,
        functions=model.functions,
    )
