"""Which parameter each hub tensor feeds, and what is done to it on the way.

The map runs forward, from hub tensor to parameter, through transformers' own conversion rules; a reverse map
would have to guess. `core_model_loading` and `conversion_mapping` are semi-private in transformers;
docs/versions.md has what ran.
"""

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def map_tensors(model: PreTrainedModel, tensor_names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Hub tensor → (parameter it feeds, its place among that parameter's sources)."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    meta_state = model.state_dict()
    targets = {}
    for name in sorted(tensor_names):
        parameter, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, meta_state
        )
        order = next(
            (c.source_patterns.index(pattern) for c in converters if pattern in c.source_patterns), 0
        )
        targets[name] = (parameter, order)
    return targets


def operations(model: PreTrainedModel, tensors: Iterable[str]) -> set[str]:
    """Names of what transformers does to hub tensors as it loads them, but for transpositions that it leaves
    out where shapes agree already: those follow from the shapes.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found: set[str] = set()
    for name in tensors:
        _, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, {})
        for converter in converters:
            if pattern in converter.source_patterns:
                found.update(
                    type(operation).__name__
                    for operation in converter.operations
                    if not getattr(operation, "check_dims", False)
                )
    return found
