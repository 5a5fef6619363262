"""An exclusion list as other tools take it.

Apart from `exclusions`, because every tool finds nodes in a way of its own: by exact name, by a
regular expression of which only the start must fit, by names that it checks or passes over in
silence, before or after a pre-processing that renames. A text made here means the same nodes in
its tool as the list means in ours. What decides that was read in the tools' own code (ONNX Runtime
1.31, Olive 0.13, AMD Quark 0.13 with onnxslim 0.1, NNCF 3.4, NVIDIA ModelOpt 0.47). Whole op types
are never named, as that would take in nodes that are not on the list.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from inspector.exclusions import ExclusionList, resolve
from inspector.model import Model, Node, dtype_name, shown
from inspector.prepare import Prepared
from inspector.recipe import QuantConfig

TARGETS = ("ort", "olive", "quark", "nncf", "modelopt")
# Those that look names up in the model as ONNX Runtime's pre-processing leaves it, or may.
PREPARED_TARGETS = frozenset({"ort", "olive", "quark"})
_SHOWN = {
    "ort": "ONNX Runtime",
    "olive": "Olive",
    "quark": "AMD Quark",
    "nncf": "NNCF",
    "modelopt": "NVIDIA ModelOpt",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ListExport:
    """An exclusion list in another tool's format.

    Attributes:
        target: one of `TARGETS`.
        text: a file's content: JSON for Olive, Python for the others; ends with a newline.
        names: what stands in the text, once each: names, or regular expressions where the target
            takes those.
        notes: what the target cannot express, or has to be prepared for, one sentence each; the
            Python texts hold them as comments.
    """

    target: str
    text: str
    names: tuple[str, ...]
    notes: tuple[str, ...]


def export_list(
    exclusions: ExclusionList | Sequence[str],
    float_model: Model,
    target: str,
    *,
    prepared: Prepared | None = None,
) -> str:
    """The text that gives a target an exclusion list; see `export`, whose notes it leaves out."""
    return export(exclusions, float_model, target, prepared=prepared).text


def export(
    exclusions: ExclusionList | Sequence[str],
    float_model: Model,
    target: str,
    *,
    prepared: Prepared | None = None,
) -> ListExport:
    """An exclusion list in the format of another tool, with what has to be known about it.

    Patterns of the list become the names they stand for. Nodes that have no name in the file, or
    share it, are named as they are called here: the Python texts hold the lines that do it in a
    copy of the file. Whether the list was made for this model is for the caller to check
    (`check_same_model`).

    - **ort**: Python, ``nodes_to_exclude = [...]``, exact names. Dynamic quantization renames Gemm
      ``g`` to ``g_MatMul`` before it looks, so both are named unless the recipe is a static one.
    - **olive**: JSON, one pass; exact names, handed on to ONNX Runtime.
    - **quark**: Python, ``exclude = [...]``, exact names. A string that starts with ``^`` is an
      expression there, which must hold ``.*``: a name that starts so is written as one. Names that
      its simplification (onnxslim) gives to fused nodes stand beside those of the file.
    - **nncf**: Python, ``IgnoredScope(names=[...])``, exact names. It raises on names that it does
      not find, so nodes that it removes first are left out.
    - **modelopt**: Python, ``nodes_to_exclude = [...]``, regular expressions that need fit the
      start of a name only (``/conv1`` fits ``/conv10``): each is escaped and anchored at both ends.

    Args:
        exclusions: the list, or names and patterns of nodes of the float file.
        float_model: the float model.
        target: one of `TARGETS`.
        prepared: what ONNX Runtime's pre-processing makes of the float model. For
            `PREPARED_TARGETS` the nodes that took over listed ones are named beside them; names
            that exist only after pre-processing can be listed. Without it names are those of the
            file.

    Raises:
        ExclusionError: a name or pattern that the model does not have.
        ValueError: an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r}, expected one of {', '.join(TARGETS)}")
    if isinstance(exclusions, str):
        raise TypeError("exclusions is one string, expected a list or several names")
    entries, recipe = _entries(exclusions)
    foreign: list[str] = []
    if target not in PREPARED_TARGETS:
        made = {} if prepared is None else prepared.model.node_by_name
        foreign = [e for e in entries if e in made and e not in float_model.node_by_name]
        entries = [e for e in entries if e not in foreign]
        prepared = None
    resolved = resolve(entries, float_model, prepared=prepared)
    notes = list(resolved.notes)
    if foreign:
        notes.append(
            f"{_listed(foreign)} cannot be given to {_SHOWN[target]}: only ONNX Runtime's "
            "pre-processing, which it does not run, makes such a node"
        )
    of_file = [n for n in resolved.names if n in float_model.node_by_name]
    names = [*of_file, *_after_preparing(resolved.prepared_names, of_file, prepared)]
    renamed = _given_names(float_model, of_file, every_copy=target == "nncf")
    inlined = any("local functions are inlined" in note for note in float_model.notes)
    if target == "olive" and (renamed or inlined):
        what = _listed(list(renamed.values())) if renamed else "what local functions held"
        notes.append(
            f"Olive finds nodes by their names in the file, and {what} cannot be found so: give it "
            "the copy that the lines for ONNX Runtime (ort) write"
        )
    wanted = _Wanted(
        names=names,
        model=float_model,
        prepared=prepared,
        recipe=recipe,
        renamed=renamed,
        inlined=inlined,
    )
    return _BUILDERS[target](wanted, notes)


def needs_preparing(exclusions: ExclusionList, float_model: Model, target: str) -> bool:
    """Whether `export` has to be given the prepared model to be right.

    So it is for `PREPARED_TARGETS` with a recipe that pre-processes (the default), and where the
    list names a node that is not in the file.
    """
    names = [entry.name for entry in exclusions.nodes]
    if any(name not in float_model.node_by_name for name in names):
        return True
    recipe = exclusions.recipe or QuantConfig()
    return target in PREPARED_TARGETS and recipe.preprocess and bool(names or exclusions.patterns)


def _entries(
    exclusions: ExclusionList | Sequence[str],
) -> tuple[list[str], QuantConfig | None]:
    if isinstance(exclusions, ExclusionList):
        entries = [*(entry.name for entry in exclusions.nodes), *exclusions.patterns]
        return entries, exclusions.recipe
    return list(exclusions), None


# -- names --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    """What a text is made from.

    Attributes:
        names: to give to the tool, each once.
        model: the float model.
        prepared: what pre-processing makes of it, where that matters and is known.
        recipe: of the list; None where unsaid.
        renamed: by first output, the names that nodes get in a copy of the file.
        inlined: nodes of the model are calls of functions in the file.
    """

    names: list[str]
    model: Model
    prepared: Prepared | None
    recipe: QuantConfig | None
    renamed: Mapping[str, str]
    inlined: bool

    def op_type(self, name: str) -> str:
        models = [self.model] if self.prepared is None else [self.model, self.prepared.model]
        return next((m.node_by_name[name].op_type for m in models if name in m.node_by_name), "")


def _after_preparing(
    prepared_names: Sequence[str], of_file: Sequence[str], prepared: Prepared | None
) -> list[str]:
    """The nodes of the prepared model to name beside those of the file."""
    if prepared is None:
        return []
    wanted: dict[str, None] = {}
    for name in prepared_names:
        wanted.update(dict.fromkeys((name, *prepared.companions.get(name, ()))))
    given = set(of_file)
    return [name for name in wanted if name not in given]


def _given_names(model: Model, names: Sequence[str], *, every_copy: bool) -> dict[str, str]:
    """By first output, the nodes to be named so that these names mean these nodes in the file.

    Those are listed nodes without a name in the file, listed ones that share theirs, and further
    nodes that share a listed one's. In such a file, a node that has a name of the same make can be
    among them: naming it so again changes nothing.

    Args:
        model: the float model.
        names: nodes of it.
        every_copy: name all that share a name, listed or not.
    """
    if not any("have no name" in note or "share a name" in note for note in model.notes):
        return {}
    listed = set(names)
    found = {}
    for node in model.nodes:
        output = next((o for o in node.outputs if o), "")
        stems = _stems(node, output)
        keepers = stems & model.node_by_name.keys()
        own = node.name in listed and (node.op_type in stems or keepers)
        if own or keepers & listed or (every_copy and keepers):
            found[output] = node.name
    return found


def _stems(node: Node, output: str) -> set[str]:
    """What a node may be called in the file, had `model` to add its output (and a count) to that.

    Its op type stands for a node without a name.
    """
    names = (node.name, re.sub(r"_\d+$", "", node.name))
    end = f"_{output}"
    return {name.removesuffix(end) for name in names if output and name.endswith(end)}


def _listed(names: Sequence[str]) -> str:
    """Names as messages show them: the first few, and how many there are."""
    text = ", ".join(shown(name) for name in names[:3])
    return text if len(names) <= 3 else f"{text} and {len(names) - 3} more"


# -- texts --------------------------------------------------------------------------------------


def _escaped(text: str) -> str:
    """On one line, without characters that a terminal obeys or an editor hides."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _expression(name: str, model: Model) -> str:
    """A regular expression that fits this name of the model from its start, and no other."""
    # "$" also stands before a line break that ends a name.
    end = r"\Z" if f"{name}\n" in model.node_by_name else "$"
    return f"^{re.escape(name)}{end}"


def _list_lines(head: str, names: Sequence[str], tail: str) -> list[str]:
    if not names:
        return [f"{head}{tail}"]
    return [head, *(f"    {name!r}," for name in names), tail]


def _named_copy(wanted: _Wanted) -> tuple[list[str], str]:
    """Python that names nodes in a copy of the file, and the file to use; no lines for no copy."""
    file = wanted.model.name if wanted.model.path is not None else "model.onnx"
    if not (wanted.renamed or wanted.inlined):
        return [], file
    copy = f"{file.removesuffix('.onnx')}.named.onnx"
    lines = ["import onnx", *(["import onnx.inliner"] if wanted.inlined else []), ""]
    # Without external data: the copy goes on using those of the file.
    lines.append(f"model = onnx.load({file!r}, load_external_data=False)")
    if wanted.inlined:
        lines.append("model = onnx.inliner.inline_local_functions(model)")
    if wanted.renamed:
        lines += [
            "# These nodes have no name of their own in the file: they get one by first output.",
            "names = {",
            *(f"    {output!r}: {name!r}," for output, name in wanted.renamed.items()),
            "}",
            "for node in model.graph.node:",
            "    output = next((o for o in node.output if o), '')",
            "    node.name = names.get(output, node.name)",
        ]
    lines += [f"onnx.save(model, {copy!r})  # in the folder of {file!r}", ""]
    return lines, copy


def _python(
    target: str,
    wanted: _Wanted,
    names: Sequence[str],
    notes: Sequence[str],
    *,
    how: str,
    imports: Sequence[str] = (),
    head: str,
    tail: str = "]",
    use: Sequence[str],
) -> ListExport:
    """A Python text: what it is, notes, a named copy where one is due, the list, how to use it."""
    copy, file = _named_copy(wanted)
    count = f"{len(names)} {'entry' if len(names) == 1 else 'entries'}"
    comments = [
        f"What {_SHOWN[target]} leaves in float of {shown(wanted.model.name)}: {count}, {how}.",
        *(f"Note: {note}." for note in notes),
    ]
    after = [*([f"Use it with {file!r}, which the lines above write."] if copy else []), *use]
    lines = [
        *(f"# {_escaped(line)}" for line in comments),
        *imports,
        *([""] if imports and not copy else []),
        *copy,
        *_list_lines(head, names, tail),
        *(f"# {line}" for line in after),
        "",
    ]
    return ListExport(target=target, text="\n".join(lines), names=tuple(names), notes=tuple(notes))


def _command_words(option: str, words: Sequence[str], begin: str) -> list[str]:
    """The same on a shell's command line, where every name can be written there."""
    if not words or any(w.startswith("-") or not w.isprintable() for w in words):
        return []
    return [f"On its command line: {begin} {option} {shlex.join(words)}"]


def _with_gemm_parts(wanted: _Wanted, notes: list[str], *, sure: bool) -> list[str]:
    """The names, each Gemm followed by the MatMul that dynamic quantization makes of it.

    Args:
        wanted: the names.
        notes: gets a sentence where such a name is another node's.
        sure: quantization is dynamic; else a name that is another node's is left out.
    """
    given = dict.fromkeys(wanted.names)
    for name in wanted.names:
        part = f"{name}_MatMul"
        if wanted.op_type(name) != "Gemm" or part in given:
            continue
        if wanted.op_type(part):
            if not sure:
                continue
            notes.append(
                f"dynamic quantization calls what it makes of {shown(name)} {shown(part)}, as "
                "another node is called: both are left in float"
            )
        given[part] = None
    return list(given)


def _ort(wanted: _Wanted, notes: list[str]) -> ListExport:
    names = wanted.names
    recipe = wanted.recipe
    if recipe is None or not recipe.static:
        names = _with_gemm_parts(wanted, notes, sure=recipe is not None)
    dynamic = "quantize_dynamic(…, nodes_to_exclude=nodes_to_exclude)"
    static = "quantize_static(…, nodes_to_exclude=nodes_to_exclude)"
    calls = f"{static} or {dynamic}" if recipe is None else static if recipe.static else dynamic
    runner = "python -m onnxruntime.quantization.static_quantize_runner …"
    command = (
        []
        if recipe is not None and not recipe.static
        else _command_words("--nodes_to_exclude", names, runner)
    )
    return _python(
        "ort",
        wanted,
        names,
        notes,
        how="by exact name; names it does not find are passed over in silence",
        head="nodes_to_exclude = [",
        use=[f"Use: {calls}", *command],
    )


def _olive(wanted: _Wanted, notes: list[str]) -> ListExport:
    recipe = wanted.recipe
    dynamic = recipe is not None and not recipe.static
    names = _with_gemm_parts(wanted, notes, sure=True) if dynamic else wanted.names
    values: dict[str, object] = {
        "type": "OnnxDynamicQuantization" if dynamic else "OnnxStaticQuantization",
        "nodes_to_exclude": names,
        "op_types_to_exclude": [],
    }
    if recipe is not None and not recipe.preprocess:
        values["quant_preprocess"] = False
    text = json.dumps(values, ensure_ascii=False, indent=2)
    text = "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    return ListExport(target="olive", text=f"{text}\n", names=tuple(names), notes=tuple(notes))


def _quark(wanted: _Wanted, notes: list[str]) -> ListExport:
    slimmed = _slimmed_names(wanted.model, wanted.names)
    # Behind the anchor, a comment holds the ".*" without which Quark drops an expression.
    names = [
        f"{_expression(n, wanted.model)}(?#.*)" if n.startswith("^") else n
        for n in dict.fromkeys((*wanted.names, *slimmed))
    ]
    command = []
    if names and all(n.isprintable() and ";" not in n for n in names):
        command = [f"On its scripts' command line: --exclude_nodes {shlex.quote(';'.join(names))}"]
    fused = ", the names its simplification gives fused nodes among them" if slimmed else ""
    return _python(
        "quark",
        wanted,
        names,
        notes,
        how=f"by exact name{fused}; a string that starts with ^ is a regular expression",
        head="exclude = [",
        use=["Use: QConfig(…, exclude=exclude)", *command],
    )


# What onnxslim, which Quark runs first, puts constants of the nodes behind into.
_SLIM_HEADS = frozenset({"Conv", "ConvTranspose", "MatMul"})
_SLIM_TAILS = frozenset({"Add", "BatchNormalization", "Mul"})


def _slimmed_names(model: Model, names: Sequence[str]) -> list[str]:
    """The names that onnxslim may give to nodes in which listed ones end up.

    It fuses Conv and MatMul with what adds or multiplies constants behind them (and Conv with a Pad
    before it), and calls the result by the tensor between the two. Where a node has that name
    already, it is left out.
    """
    found: dict[str, None] = {}
    for name in names:
        node = model.node_by_name.get(name)
        if node is None:
            continue
        head: Node | None = node
        while head is not None and head.op_type not in _SLIM_HEADS:
            head = _before(model, head)
        if head is None:
            continue
        chain = [head]
        while (after := _behind(model, chain[-1])) is not None:
            chain.append(after)
        before = model.producers.get(next(iter(head.inputs), ""))
        last = len(chain) if before is not None and before.op_type == "Pad" else -1
        found.update((output, None) for part in chain[:last] for output in part.outputs[:1])
    return [name for name in found if name and name not in model.node_by_name]


def _before(model: Model, node: Node) -> Node | None:
    """The node whose output this one adds constants to or multiplies with them; None for none."""
    if node.op_type not in _SLIM_TAILS:
        return None
    computed = [t for t in node.inputs if t not in model.constant_names]
    source = model.producers.get(computed[0]) if len(computed) == 1 else None
    return source if source is not None and _behind(model, source) is node else None


def _behind(model: Model, node: Node) -> Node | None:
    """The only reader of a node, where it adds constants to what it reads, or multiplies."""
    readers = model.consumers.get(node.outputs[0], ()) if node.outputs else ()
    if len(readers) != 1 or readers[0].op_type not in _SLIM_TAILS:
        return None
    computed = [t for t in readers[0].inputs if t not in model.constant_names]
    return readers[0] if computed == [node.outputs[0]] else None


def _nncf(wanted: _Wanted, notes: list[str]) -> ListExport:
    removed = [name for name in wanted.names if _casts_nothing(wanted.model, name)]
    if removed:
        notes.append(
            f"{_listed(removed)} is left out: NNCF removes a Cast to the type that its input has, "
            "and raises on a name that it does not find"
        )
    names = [name for name in wanted.names if name not in removed]
    return _python(
        "nncf",
        wanted,
        names,
        notes,
        how="by exact name; it raises on names that it does not find",
        imports=["from nncf import IgnoredScope"],
        head="ignored_scope = IgnoredScope(names=[",
        tail="])",
        use=["Use: nncf.quantize(model, calibration_dataset, ignored_scope=ignored_scope)"],
    )


def _casts_nothing(model: Model, name: str) -> bool:
    """It is a Cast to the type that its input has."""
    node = model.node_by_name[name]
    if node.op_type != "Cast" or "to" not in node.attributes or not node.inputs:
        return False
    return model.info(node.inputs[0]).dtype == dtype_name(node.attributes["to"])


def _modelopt(wanted: _Wanted, notes: list[str]) -> ListExport:
    names = [_expression(name, wanted.model) for name in wanted.names]
    module = "python -m modelopt.onnx.quantization --onnx_path …"
    return _python(
        "modelopt",
        wanted,
        names,
        notes,
        how="by regular expressions, each for one whole name",
        head="nodes_to_exclude = [",
        use=[
            "Use: modelopt.onnx.quantization.quantize(…, nodes_to_exclude=nodes_to_exclude), "
            "without simplify, which renames nodes",
            *_command_words("--nodes_to_exclude", names, module),
        ],
    )


_BUILDERS: dict[str, Callable[[_Wanted, list[str]], ListExport]] = {
    "ort": _ort,
    "olive": _olive,
    "quark": _quark,
    "nncf": _nncf,
    "modelopt": _modelopt,
}
