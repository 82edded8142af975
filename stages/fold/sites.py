"""Where scales can be folded: the fold map of a model, from its tensor names and what calibration saw.

Three kinds of places. norm: the norm is divided, all its consumers multiplied. v_to_o: the rows of V are
divided, o_proj's columns multiplied, one entry per channel of a key-value head. up_to_down: the rows of
up_proj are divided, down_proj's columns multiplied, expert by expert. Only layers that calibration ran
through are considered: no vision tower, no MTP layer.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from stages.fold.families import FAMILIES, Family
from stages.fold.folds import FoldMap, FoldSite, Operand
from stages.model.text_model import TextModel
from state.layout import Relation
from state.names import join_name, split_name

LAYER = re.compile(r"(.*?\.)?L\.")
FUSED = re.compile(r"(?P<experts>.*\bexperts)\.(?P<number>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj)")
DOWN = {"up_proj": ("gate_proj", "down_proj"), "w3": ("w1", "w2")}
"""Leaf of an up projection → leaf of its gate, and of the down projection that follows."""

FINAL = "the final norm's output is the model's last hidden state too, which MTP layers read"
NOTHING = "no norm, V or up projection stands directly before it"


def fold_map(shapes: Mapping[str, Sequence[int]], text: TextModel, relations: Iterable[Relation]) -> FoldMap:
    """Every place where a scale can be folded, and the reason for all other modules of the calibrated layers.

    Args:
        shapes: hub tensor → shape, of the whole checkpoint.
        text: the model that the relations were seen in.
        relations: of any kind; those of kind `norm_consumers` are used.
    """
    checkpoint = _Checkpoint({name: tuple(shape) for name, shape in shapes.items()}, text)
    seen = [relation for relation in relations if relation.kind == "norm_consumers"]
    layers = {(_split_leaf(relation.norm or "")[0], layer) for relation in seen for layer in relation.layers}
    places = [place for place in checkpoint.places if (_split_leaf(place[0])[0], place[1]) in layers]
    modules = [module for place in places for module in checkpoint.places[place]]

    reasons = {module: FINAL for relation in seen if not relation.layers for module in relation.members}
    sites: dict[str, FoldSite] = {}
    for consumers, site in _attempts(checkpoint, seen, modules):
        if isinstance(site, FoldSite):
            sites[site.name] = site
        else:
            reasons.update((module, site) for module in consumers)
    folded = {operand.module for site in sites.values() for operand in site.consumers}
    others = {module: checkpoint.refusal(module) or reasons.get(module, NOTHING) for module in modules}
    return FoldMap(sites, {module: why for module, why in (reasons | others).items() if module not in folded})


def _attempts(
    checkpoint: "_Checkpoint", relations: Iterable[Relation], modules: Iterable[str]
) -> Iterator[tuple[list[str], FoldSite | str]]:
    """Every candidate: the consumers whose input it would scale, and the site, or why there is none."""
    for norm, consumers in _norms(checkpoint, relations).items():
        yield consumers, _norm_site(checkpoint, norm, consumers)
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        if leaf in ("v_proj", "kv_b_proj"):
            yield [f"{parent}.o_proj"], _value_site(checkpoint, module, f"{parent}.o_proj")
        elif leaf in DOWN:
            gate, down = (f"{parent}.{other}" for other in DOWN[leaf])
            yield [down], _down_site(checkpoint, module, gate, down)


@dataclass(frozen=True)
class _Checkpoint:
    """The tensors of a checkpoint, seen as modules with a weight."""

    shapes: dict[str, tuple[int, ...]]
    text: TextModel

    @cached_property
    def family(self) -> Family | None:
        return FAMILIES.get(self.text.model_type)

    @cached_property
    def places(self) -> dict[tuple[str, int | None], list[str]]:
        """(pattern, layer) → modules; several where the pattern has an expert number."""
        found: dict[tuple[str, int | None], list[str]] = defaultdict(list)
        for name, shape in self.shapes.items():
            for module in _modules(name, shape):
                pattern, layer, _ = split_name(module)
                found[pattern, layer].append(module)
        return found

    def refusal(self, module: str) -> str | None:
        """Why this family can't have the module's input scaled, or None."""
        if self.family is None:
            return f"folding was not checked for model type {self.text.model_type!r}"
        return self.family.impossible.get(_split_leaf(split_name(module)[0])[1])

    def operand(self, module: str) -> Operand | None:
        """The tensor of a module, or its part of the tensor of all experts; None where there is neither."""
        weight = f"{module}.weight"
        if weight in self.shapes:
            return Operand(module, weight, self.shapes[weight])
        match = FUSED.fullmatch(module)
        if match is None:
            return None
        gate_up, down = (f"{match['experts']}.{leaf}" for leaf in ("gate_up_proj", "down_proj"))
        if gate_up not in self.shapes or down not in self.shapes:
            return None
        # Stored as [experts, out, in], gate and up are twice as high as down is wide.
        transposed = self.shapes[gate_up][1] != 2 * self.shapes[down][2]
        tensor = down if match["leaf"] == "down_proj" else gate_up
        operand = Operand(module, tensor, self.shapes[tensor], int(match["number"]), transposed)
        if match["leaf"] != "up_proj":
            return operand
        half = operand.rows // 2
        return replace(operand, period=operand.rows, first=half)

    def with_bias(self, operand: Operand) -> tuple[Operand, ...]:
        """A source and its bias, whose entries are divided as the rows are."""
        bias = f"{operand.module}.bias"
        if bias not in self.shapes:
            return (operand,)
        return operand, replace(operand, tensor=bias, shape=self.shapes[bias])


def _norms(checkpoint: _Checkpoint, relations: Iterable[Relation]) -> dict[str, list[str]]:
    """Norms in layers → the modules that read them: the observed ones, and those that the family adds."""
    found: dict[str, list[str]] = defaultdict(list)
    for relation in relations:
        prefix, leaf = _split_leaf(relation.norm or "")
        added = checkpoint.family.norms.get(leaf, ()) if checkpoint.family else ()
        for layer in relation.layers:
            norm = join_name(relation.norm or "", layer)
            for name in relation.members:
                found[norm] += checkpoint.places.get((name, layer), [join_name(name, layer, 0)])
            for name in added:
                found[norm] += checkpoint.places.get((prefix + name, layer), [])
    return {norm: list(dict.fromkeys(members)) for norm, members in found.items()}


def _norm_site(checkpoint: _Checkpoint, norm: str, consumers: Sequence[str]) -> FoldSite | str:
    leaf = _split_leaf(split_name(norm)[0])[1]
    if checkpoint.family is None or leaf not in checkpoint.family.norms:
        return f"folding into {leaf} was not checked for model type {checkpoint.text.model_type!r}"
    weight = f"{norm}.weight"
    if weight not in checkpoint.shapes:
        return f"the checkpoint has no {weight}"
    source = Operand(norm, weight, checkpoint.shapes[weight])
    operands = []
    for module in consumers:
        operand = checkpoint.operand(module)
        if operand is None:
            return f"{norm} also feeds {module}, of which the checkpoint has no unquantized weight"
        if operand.columns != source.rows:
            return f"{norm} has {source.rows} channels, but {module} reads {operand.columns}"
        operands.append(operand)
    sources, plus_one = checkpoint.with_bias(source), checkpoint.family.plus_one
    return FoldSite("norm", norm, source.rows, sources, tuple(operands), plus_one=plus_one)


def _value_site(checkpoint: _Checkpoint, module: str, output: str) -> FoldSite | str:
    if why := checkpoint.refusal(output):
        return why
    source, consumer = checkpoint.operand(module), checkpoint.operand(output)
    if source is None or consumer is None:
        return f"the checkpoint has no unquantized weight of {module} or {output}"
    heads = checkpoint.text.heads
    assert heads is not None, output
    width = consumer.columns // heads
    if module.endswith(".kv_b_proj"):
        period = source.rows // heads
        source = replace(source, period=period, first=period - width)
        channels = consumer.columns
    else:
        channels = source.rows
    if consumer.columns % channels or channels % width:
        return f"{channels} channels of V don't fit {consumer.columns} columns of {output} in {heads} heads"
    sources, repeat = checkpoint.with_bias(source), consumer.columns // channels
    return FoldSite("v_to_o", module, channels, sources, (consumer,), block=width, repeat=repeat)


def _down_site(checkpoint: _Checkpoint, module: str, gate: str, down: str) -> FoldSite | str:
    if why := checkpoint.refusal(down):
        return why
    source, consumer = checkpoint.operand(module), checkpoint.operand(down)
    if source is None or consumer is None:
        return f"the checkpoint has no unquantized weight of {module} or {down}"
    if source.rows - source.first != consumer.columns:
        return f"{module} has {source.rows} rows, but {down} reads {consumer.columns}"
    degree = 1
    if checkpoint.operand(gate) is None:
        if checkpoint.text.activation != "relu2":
            return f"{checkpoint.text.activation} between up and down doesn't let a scale through"
        degree = 2
    sources = checkpoint.with_bias(source)
    return FoldSite("up_to_down", module, consumer.columns, sources, (consumer,), degree=degree)


def _modules(tensor: str, shape: tuple[int, ...]) -> list[str]:
    """Modules with a weight matrix that a hub tensor stands for: one, none, or projections of all experts."""
    if tensor.endswith(".weight"):
        return [tensor.removesuffix(".weight")] if len(shape) == 2 else []
    experts, _, leaf = tensor.rpartition(".")
    leaves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(leaf, ())
    if len(shape) != 3 or not experts.endswith("experts"):
        return []
    return [f"{experts}.{number}.{projection}" for number in range(shape[0]) for projection in leaves]


def _split_leaf(pattern: str) -> tuple[str, str]:
    """Split after the layer number: (`model.layers.L.`, `self_attn.q_proj`); ("", pattern) without one."""
    match = LAYER.match(pattern)
    return ("", pattern) if match is None else (match.group(), pattern[match.end() :])
