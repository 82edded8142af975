"""Whether a checkpoint is complete: compared with what transformers' class of its config.json consists of."""

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from stages.model.plausible import require_possible_counts
from stages.model.skeleton import Skeleton, load_config
from stages.verify.findings import Finding, without_path
from state.errors import InputError
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


def class_findings(skeleton: Skeleton, plain: Mapping[str, TensorEntry]) -> list[Finding]:
    """Parameters of the class that no tensor feeds, and weights of another size than the class has."""
    try:
        return [*_experts(skeleton, plain), *_linears(skeleton, plain), *_others(skeleton, plain)]
    except InputError as error:
        return [Finding("shape", "config.json", f"is of a model with other weights: {error}")]


def _linears(skeleton: Skeleton, plain: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    for linear in skeleton.linears:
        name, wanted = f"{linear.hub}.weight", (linear.out_features, linear.in_features)
        if name in plain and plain[name].shape != wanted:
            yield _other_shape(plain[name], wanted)


def _experts(skeleton: Skeleton, plain: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    fed = {parameter for parameter, _ in skeleton.parameter_of.values()}
    for experts in skeleton.experts:
        together = experts.fused_on_hub and f"{experts.memory}.{experts.up_parameter}" in fed
        if together:
            continue
        up = experts.up if len(experts.up) > experts.arranged.gated else ("gate_proj", "up_proj")
        for number in range(experts.count):
            for leaf in (*up, experts.down):
                name = f"{experts.hub}.{number}.{leaf}.weight"
                wanted = (experts.intermediate, experts.hidden)
                wanted = wanted[::-1] if leaf == experts.down else wanted
                if name not in plain:
                    yield Finding(
                        "missing-tensor", name, f"the model has {experts.count} experts in each layer"
                    )
                elif plain[name].shape != wanted:
                    yield _other_shape(plain[name], wanted)


def _others(skeleton: Skeleton, plain: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    """Parameters that nothing feeds, but for experts', tied ones and those that transformers does without."""
    model = skeleton.model
    feeding: dict[str, list[str]] = {}
    for tensor, (parameter, _) in skeleton.parameter_of.items():
        feeding.setdefault(parameter, []).append(tensor)
    experts = tuple(f"{module.memory}." for module in skeleton.experts)
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    optional = [re.compile(pattern) for pattern in patterns]
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    for parameter, held in model.state_dict().items():
        sources = feeding.get(parameter, [])
        if len(sources) == 1 and prod(plain[sources[0]].shape) != held.numel():
            yield _other_shape(plain[sources[0]], tuple(held.shape))
        if sources or parameter.startswith(experts) or any(pattern.search(parameter) for pattern in optional):
            continue
        other = tied.get(parameter) or next(
            (one for one, target in tied.items() if target == parameter), None
        )
        if other is None or other not in feeding:
            module, _, leaf = parameter.rpartition(".")
            yield Finding("missing-tensor", f"{skeleton.hub_name(module)}.{leaf}", "the model has it")


def _other_shape(entry: TensorEntry, wanted: tuple[int, ...]) -> Finding:
    return Finding("shape", entry.name, f"is of a weight {list(entry.shape)}; the model has {list(wanted)}")
