"""Where scales might be folded in one decoder layer, from what a forward showed of it: no model type, no
names but those of parents and children.

Each place has alternatives, of which the first that is proven counts: a norm may multiply by its weight or by
1 + weight, V may lie in a projection of its own or in one with Q and K. Whether one holds is for the layer
itself to show (stages/fold/trial.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from stages.fold.folds import FoldSite, Operand
from state.names import split_name

NOTHING = "no norm, V or up projection stands directly before it"


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer in hub names.

    Attributes:
        operands: module → where its weight lies, in the order in which the modules were called; experts one
            by one.
        norms: norm → all modules that read its output, as far as a forward showed them.
        values: attention module → (channels of V, heads of V).
        reads: module → a number for the tensor that it read; equal where it is the very same.
        shapes: hub tensor → shape, at least of norms and biases of the layer.
    """

    operands: Mapping[str, Operand]
    norms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    values: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    reads: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """Module → the modules with weights right below it, in the order of their calls."""
        found: dict[str, list[str]] = {}
        for module in self.operands:
            found.setdefault(module.rpartition(".")[0], []).append(module)
        return found

    def with_bias(self, operand: Operand) -> tuple[Operand, ...]:
        """A source and its bias, whose entries are divided as the rows are."""
        bias = f"{operand.module}.bias"
        if bias not in self.shapes:
            return (operand,)
        return operand, replace(operand, tensor=bias, shape=self.shapes[bias])


@dataclass(frozen=True)
class Attempt:
    """A place to scale the inputs of some modules.

    consumers: these modules. alternatives: sites to try, best guess first; those of all experts together.
    reason: why the place is given up, where no alternative holds.
    """

    consumers: tuple[str, ...]
    alternatives: tuple[tuple[FoldSite, ...], ...]
    reason: str


def attempts(layer: LayerParts) -> list[Attempt]:
    """Every place of a layer where a scale might be folded: norms, then V, then up projections."""
    taken = {module for consumers in layer.norms.values() for module in consumers}
    values: list[Attempt] = []
    for attention, (channels, heads) in layer.values.items():
        children = layer.children.get(attention, [])
        if len(children) > 1 and children[-1] not in taken:
            values.append(_value(layer, children, channels, channels // heads))
            taken.add(children[-1])
    unseen = [module for module in layer.operands if module not in taken]
    norms = [_norm(layer, norm, consumers, unseen) for norm, consumers in layer.norms.items()]
    return norms + values + list(_downs(layer, unseen))


def _norm(layer: LayerParts, norm: str, consumers: Sequence[str], unseen: Sequence[str]) -> Attempt:
    """unseen: modules that nothing was seen to stand before. Some may read the norm all the same, through a
    cast or a product of their own: routers in float32, experts that weigh their inputs.
    """
    weight = f"{norm}.weight"
    shape = layer.shapes.get(weight)
    if shape is None:
        return Attempt(tuple(consumers), (), f"{_short(norm)} has no weight that could be divided")
    source = Operand(norm, weight, shape)
    for module in consumers:
        operand = layer.operands.get(module)
        if operand is None:
            why = f"{_short(norm)} also feeds {_short(module)}, of which the checkpoint has no weight"
            return Attempt(tuple(consumers), (), why)
        if operand.columns != source.rows:
            why = f"{_short(norm)} has {source.rows} channels, but {_short(module)} reads {operand.columns}"
            return Attempt(tuple(consumers), (), why)
    fitting = [module for module in unseen if layer.operands[module].columns == source.rows]
    patterns = dict.fromkeys(split_name(module)[0] for module in fitting)
    alone = [[module for module in fitting if split_name(module)[0] == name] for name in patterns]
    more = [fitting, *alone] if len(alone) > 1 else alone
    site = FoldSite("norm", norm, source.rows, layer.with_bias(source), ())
    sites = [
        replace(
            site, consumers=tuple(layer.operands[module] for module in (*consumers, *added)), plus_one=one
        )
        for added in ([], *more)
        for one in (False, True)
    ]
    why = f"dividing {_short(norm)} and multiplying what is seen to read it changes what the layer hands on"
    return Attempt(tuple(consumers), tuple((site,) for site in sites), why)


def _value(layer: LayerParts, children: Sequence[str], channels: int, width: int) -> Attempt:
    """V into the projection that is called last. V is all rows of a projection, its last rows (behind Q and
    K), or the last rows of each head's (behind the keys, or behind Q and K of a group)."""
    output = children[-1]
    consumer = layer.operands[output]
    sites: list[FoldSite] = []
    if consumer.columns % channels == 0:
        repeat = consumer.columns // channels
        for module in reversed(children[:-1]):
            operand = layer.operands[module]
            for source in _holding(operand, channels, width):
                sources = layer.with_bias(source)
                sites.append(
                    FoldSite("v_to_o", module, channels, sources, (consumer,), block=width, repeat=repeat)
                )
    why = f"a scale of V doesn't reach {_short(output)} as it left, or not {_short(output)} alone"
    return Attempt((output,), tuple((site,) for site in sites), why)


def _holding(operand: Operand, channels: int, width: int) -> Iterator[Operand]:
    rows, heads = operand.rows, channels // width
    if rows == channels:
        yield operand
    if rows > channels:
        yield replace(operand, period=rows, first=rows - channels)
        if heads > 1 and rows % heads == 0:
            yield replace(operand, period=rows // heads, first=rows // heads - width)


def _downs(layer: LayerParts, unseen: Sequence[str]) -> Iterator[Attempt]:
    """Up into down: an earlier projection beside it with a row, or two, for each of its columns."""
    downs: dict[str, list[str]] = {}
    for module in unseen:
        downs.setdefault(split_name(module)[0], []).append(module)
    for modules in downs.values():
        each = [_ups(layer, module) for module in modules]
        alternatives = tuple(zip(*each, strict=True)) if len({len(sites) for sites in each}) == 1 else ()
        if alternatives:
            source = alternatives[0][0].name
            why = f"what stands between {_short(source)} and {_short(modules[0])} doesn't let a scale through"
            yield Attempt(tuple(modules), alternatives, why)


def _ups(layer: LayerParts, down: str) -> list[FoldSite]:
    consumer, sites = layer.operands[down], []
    beside = layer.children[down.rpartition(".")[0]]
    for module in reversed(beside[: beside.index(down)]):
        operand, width = layer.operands[module], consumer.columns
        if layer.reads.get(module, -1) == layer.reads.get(down):
            continue  # side by side, not one behind the other
        sources = [operand] if _own_rows(operand) == width else []
        if operand.expert is None and operand.rows == 2 * width:
            sources = [replace(operand, period=2 * width, first=first) for first in (width, 0)]
        for source in sources:
            sites.append(FoldSite("up_to_down", module, width, layer.with_bias(source), (consumer,)))
    return sites + [replace(site, degree=2) for site in sites]


def _own_rows(operand: Operand) -> int:
    """Rows of the operand's own module, which may share its tensor with one other."""
    return operand.rows // 2 if operand.period else operand.rows


def _short(module: str) -> str:
    """A module's name within its layer, which is the same in all layers of a kind."""
    pattern, layer, _ = split_name(module)
    return pattern if layer is None else pattern.partition("L.")[2]
