"""Rules over names, dtypes and shapes: what each format has, and what can't stand beside what."""

from collections.abc import Iterator, Mapping

from stages.engines.algos import ALGOS, MIXED
from stages.engines.exclusion import EXPERT
from stages.engines.findings import Finding
from stages.engines.judge import fused_groups, misfit
from stages.engines.kv import attention_of, attentions, kv_scale_names
from stages.engines.modules import Inventory, Quantized
from stages.engines.stated import Stated
from state.names import split_name
from state.source import TensorEntry

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""What a fused weight is called, and the members that it would be there twice with."""

ALLOWED_BESIDE = frozenset({"weight", "bias", "k_scale", "v_scale"})


def layout_findings(
    tensors: Mapping[str, TensorEntry], stated: Stated, inventory: Inventory, layers: int | None
) -> Iterator[Finding]:
    """All that headers and configuration say against each other, whatever the engine. layers: decoder layers
    of the model; what is numbered behind them is MTP's, which has no quantized KV cache.
    """
    for module in inventory.quantized.values():
        yield from _module(module, stated)
    yield from _beside(tensors, inventory)
    yield from _stray(tensors, inventory)
    yield from _formats(inventory)
    yield from _experts(tensors, inventory)
    yield from _twice(tensors)
    yield from _kv(tensors, stated, inventory, layers)


def _module(module: Quantized, stated: Stated) -> Iterator[Finding]:
    algo = module.algo
    if algo is None:
        said, size = stated.algo_of(module.name), stated.group_of(module.name)
        of = "" if size is None else f" in groups of {size}"
        where = f"its format is {said}{of}, which is none that is known"
        if stated.mixed and said is None:
            where = "quantized_layers does not name it"
        yield Finding("not-declared", module.name, f"is quantized, and {where}")
        return
    sizes = module.sizes
    for leaf in algo.leaves:
        found = module.tensors.get(leaf.name)
        if found is None:
            if leaf.required:
                yield Finding("missing-tensor", module.tensor(leaf.name), f"{algo.name} needs it")
            continue
        if leaf.dtype is not None and found.dtype != leaf.dtype:
            yield Finding("dtype", found.name, f"is {found.dtype}; {algo.name} has {leaf.dtype}")
        if sizes is None:
            yield Finding("shape", found.name, f"is {list(found.shape)}, which is no matrix")
            return
        shapes = leaf.shapes(*sizes)
        if module.together and leaf.role != "scalar":
            experts = module.codes.shape[0]
            turn = -1 if module.transposed else 1
            shapes = tuple((experts, *shape[::turn]) for shape in shapes)
        if found.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            grouped = leaf.role == "blocks" and algo.group_size != ALGOS[algo.name].group_size
            rule, of = ("group-size", f" in groups of {algo.group_size}") if grouped else ("shape", "")
            yield Finding(rule, found.name, f"is {list(found.shape)}; {algo.name}{of} has {wanted} there")
    for leaf_name in module.tensors.keys() - {leaf.name for leaf in algo.leaves}:
        yield Finding("extra-tensor", module.tensor(leaf_name), f"{algo.name} has no {leaf_name}")
    if sizes is not None and (why := misfit(algo, *sizes)) is not None:
        yield Finding("misfit", module.tensor("weight"), why)


def _beside(tensors: Mapping[str, TensorEntry], inventory: Inventory) -> Iterator[Finding]:
    """Tensors of a quantized module that no format has."""
    stray = set(inventory.stray)
    for name in tensors:
        parent, _, leaf = name.rpartition(".")
        module = inventory.quantized.get(parent)
        known = module is None or module.together or leaf in ALLOWED_BESIDE or leaf in module.tensors
        if not known and name not in stray:
            yield Finding("extra-tensor", name, f"is no tensor of a quantized {parent.rpartition('.')[2]}")


def _stray(tensors: Mapping[str, TensorEntry], inventory: Inventory) -> Iterator[Finding]:
    missing = set()
    for name in inventory.stray:
        parent, _, leaf = name.rpartition(".")
        weight = f"{parent}.weight"
        if leaf == "weight_packed" and weight in tensors:
            yield Finding("packed-and-plain", weight, f"is there, and so is {name}")
        elif leaf in ("weight_scale", "weight_scale_2", "input_scale") and weight not in tensors:
            if weight not in missing:
                yield Finding("missing-tensor", weight, f"is gone, and {name} is there")
            missing.add(weight)
        else:
            yield Finding("extra-tensor", name, "stands beside no quantized weight of its format")


def _formats(inventory: Inventory) -> Iterator[Finding]:
    """Groups that are run as one matrix, and the experts of a layer, in more than one format."""

    def format_of(name: str) -> str:
        module = inventory.quantized.get(name)
        if module is None:
            return "unquantized"
        return "unknown" if module.algo is None else module.algo.name

    for group in fused_groups(inventory.linears):
        formats = {member: format_of(member) for member in group}
        if len(set(formats.values())) > 1:
            said = ", ".join(f"{name.rpartition('.')[2]} {algo}" for name, algo in formats.items())
            yield Finding(
                "fused-formats", group[0], f"is run as one matrix with others, in other formats: {said}"
            )
    experts: dict[str, dict[str, str]] = {}
    for name in inventory.linears:
        if (expert := EXPERT.fullmatch(name)) is not None:
            experts.setdefault(expert[1], {}).setdefault(format_of(name), name)
    for layer, found in sorted(experts.items()):
        if len(found) > 1:
            said = ", ".join(f"{name.removeprefix(layer)[1:]} {algo}" for algo, name in sorted(found.items()))
            yield Finding("fused-formats", layer, f"has experts in several formats: {said}")


def _experts(tensors: Mapping[str, TensorEntry], inventory: Inventory) -> Iterator[Finding]:
    """Experts of a layer that lack a projection which others have, and numbers without an expert."""
    layers: dict[str, dict[str, set[str]]] = {}
    names = set(inventory.linears) | {name.rpartition(".")[0] for name in inventory.stray}
    for name in names:
        if (expert := EXPERT.fullmatch(name)) is not None:
            number, _, leaf = name.removeprefix(expert[1])[1:].partition(".")
            layers.setdefault(expert[1], {}).setdefault(number, set()).add(leaf)
    for layer, experts in sorted(layers.items()):
        leaves = set().union(*experts.values())
        for number in map(str, range(max(map(int, experts)) + 1)):
            for leaf in sorted(leaves - experts.get(number, set())):
                yield Finding("missing-tensor", f"{layer}.{number}.{leaf}.weight", "other experts have it")


def _twice(tensors: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    """Weights that are there fused and apart."""
    for name in tensors:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        members = [f"{parent}.{member}.weight" for member in FUSED.get(leaf, ())]
        if parent.endswith("experts") and not name.endswith(".weight"):
            members = [f"{parent}.0.{part}.weight" for part in (*FUSED.get(leaf, ()), leaf)]
        for member in members:
            if member in tensors:
                yield Finding("packed-and-plain", name, f"is there, and so is {member}")
                break


def _kv(
    tensors: Mapping[str, TensorEntry], stated: Stated, inventory: Inventory, layers: int | None
) -> Iterator[Finding]:
    owners = {attention for name in inventory.kv if (attention := attention_of(name)) is not None}
    for name in inventory.kv:
        entry = tensors[name]
        if stated.kv is None:
            yield Finding("kv-undeclared", name, "is there, and the configuration says nothing of a KV cache")
        if entry.shape not in ((), (1,)):
            yield Finding("shape", name, f"is {list(entry.shape)}; a scale of a KV cache is one value")
        if entry.dtype != "F32":
            yield Finding("dtype", name, f"is {entry.dtype}; a scale of a KV cache is F32")
    if stated.kv is None:
        return
    for attention in owners:
        for name in kv_scale_names(attention):
            if name not in tensors:
                yield Finding("kv-missing", name, "its other half is there")
    alike = {split_name(attention)[0] for attention in owners}
    for attention in attentions(inventory.linears):
        pattern, layer, _ = split_name(attention)
        behind = layers is not None and layer is not None and layer >= layers
        if attention not in owners and not behind and (pattern in alike or not owners):
            said = f"the configuration says that KV caches are {stated.kv}; engines take 1.0"
            yield Finding("kv-missing", kv_scale_names(attention)[0], said)


def unknown_algo(stated: Stated) -> list[Finding]:
    """A `quant_algo` that is none."""
    names = {stated.algo, *(layer.algo for layer in stated.layers.values())} - {None, MIXED}
    return [
        Finding("not-declared", name, "is no quant_algo that is known")
        for name in sorted(name for name in names if name is not None and name not in ALGOS)
    ]
