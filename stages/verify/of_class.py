"""Whether a checkpoint is complete: compared with what transformers' class of its config.json consists of."""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

from stages.engines.findings import Finding, without_path
from stages.model.plausible import require_possible_counts
from stages.model.skeleton import Skeleton, load_config
from stages.model.tensor_map import operations
from state.errors import InputError
from state.reasons import reason
from state.source import TensorEntry


def skeleton_of(folder: Path, plain: Mapping[str, TensorEntry], trust_remote_code: bool) -> Skeleton | str:
    """The model of a folder, on the meta device; or why there is none.

    Args:
        plain: the checkpoint's tensors, as they would be without quantization.
    """
    try:
        require_possible_counts(folder, plain)
        return Skeleton(load_config(folder, trust_remote_code), dict(plain), trust_remote_code)
    except InputError as error:
        return without_path(folder, str(error))
    except Exception as error:  # the configuration's class computes with what it finds
        return without_path(folder, f"config.json can't be used: {type(error).__name__}: {reason(error)}")


def class_findings(skeleton: Skeleton, plain: Mapping[str, TensorEntry]) -> list[Finding]:
    """Parameters of the class that no tensor feeds, and weights of another size than the class has."""
    try:
        feeding: dict[str, list[str]] = {}
        for tensor, (parameter, _) in skeleton.parameter_of.items():
            feeding.setdefault(parameter, []).append(tensor)
        cut = _cut(skeleton, feeding)
        return [
            *_experts(skeleton, plain),
            *_linears(skeleton, plain, cut),
            *_others(skeleton, plain, feeding, cut),
        ]
    except InputError as error:
        return [Finding("shape", "config.json", f"is of a model with other weights: {error}")]


def _linears(skeleton: Skeleton, plain: Mapping[str, TensorEntry], cut: set[str]) -> Iterator[Finding]:
    for linear in skeleton.linears:
        name, wanted = f"{linear.hub}.weight", (linear.out_features, linear.in_features)
        is_cut = _beside(f"{linear.memory}.weight") in cut
        if name in plain and plain[name].shape != wanted and not is_cut:
            yield _other_shape(plain[name], wanted)


def _experts(skeleton: Skeleton, plain: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    fed = {parameter for parameter, _ in skeleton.parameter_of.values()}
    for experts in skeleton.experts:
        together = experts.fused_on_hub and f"{experts.memory}.{experts.up_parameter}" in fed
        if together:
            continue
        up = experts.up if len(experts.up) > experts.arranged.gated else ("gate_proj", "up_proj")
        hub = _apart(skeleton, experts.memory) if experts.fused_on_hub else experts.hub
        for number in range(experts.count):
            for leaf in (*up, experts.down):
                name = f"{hub}.{number}.{leaf}.weight"
                wanted = (experts.intermediate, experts.hidden)
                wanted = wanted[::-1] if leaf == experts.down else wanted
                if name not in plain:
                    yield Finding(
                        "missing-tensor", name, f"the model has {experts.count} experts in each layer"
                    )
                elif plain[name].shape != wanted:
                    yield _other_shape(plain[name], wanted)


def _apart(skeleton: Skeleton, memory: str) -> str:
    """The hub name of experts that the hub holds together and the checkpoint one by one: of their module, as
    those beside it are called.
    """
    parent, _, leaf = memory.rpartition(".")
    return f"{skeleton.hub_name(parent)}.{leaf}"


def _cut(skeleton: Skeleton, feeding: Mapping[str, Sequence[str]]) -> set[str]:
    """What holds modules that are fed by one tensor which transformers cuts: the map names the first of the
    parameters that it feeds.
    """
    return {
        _beside(parameter)
        for parameter, sources in feeding.items()
        if len(sources) == 1 and operations(skeleton.model, sources)
    }


def _others(
    skeleton: Skeleton,
    plain: Mapping[str, TensorEntry],
    feeding: Mapping[str, Sequence[str]],
    cut: set[str],
) -> Iterator[Finding]:
    """Parameters that nothing feeds, but for experts', tied ones and those that transformers does without."""
    model = skeleton.model
    experts = tuple(f"{module.memory}." for module in skeleton.experts)
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    optional = [re.compile(pattern) for pattern in patterns]
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    for parameter, held in model.state_dict().items():
        sources = feeding.get(parameter, [])
        if parameter.startswith(experts) or _beside(parameter) in cut:
            continue
        if len(sources) == 1 and prod(plain[sources[0]].shape) != held.numel():
            yield _other_shape(plain[sources[0]], tuple(held.shape))
        if sources or any(pattern.search(parameter) for pattern in optional):
            continue
        partners = {tied.get(parameter), *(one for one, target in tied.items() if target == parameter)}
        if not partners & feeding.keys():
            module, _, leaf = parameter.rpartition(".")
            yield Finding("missing-tensor", f"{skeleton.hub_name(module)}.{leaf}", "the model has it")


def _beside(parameter: str) -> str:
    """What holds the module that a parameter belongs to."""
    return parameter.rpartition(".")[0].rpartition(".")[0]


def _other_shape(entry: TensorEntry, wanted: tuple[int, ...]) -> Finding:
    return Finding("shape", entry.name, f"is of a weight {list(entry.shape)}; the model has {list(wanted)}")
