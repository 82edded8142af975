"""The quantizer plan: which weights, inputs and caches a recipe quantizes, and in which format.

modelopt decides. Its quantizers are placed on a meta-device model (no weights, a fraction of a second), then
read off into plain data in hub names. Only this module and weight_formats.py read modelopt's quantizer
attributes; checked against modelopt 0.47.
"""

import contextlib
import io
import re
import warnings
from typing import Any

from torch import nn

from stages.formats import WeightFormat
from stages.model.engine_fused import fused_with
from stages.model.modules import ExpertsModule
from stages.model.skeleton import Skeleton
from stages.recipe.fused_refused import (
    in_several_formats,
    with_biases_apart,
    without_layout,
    without_quantizers,
)
from stages.recipe.hub_config import in_hub_names
from stages.recipe.quantizer_plan import KvFormat, QuantizerPlan
from stages.recipe.recipes import ALGORITHMS, Recipe
from stages.recipe.scale_choice import scales_of
from stages.recipe.weight_formats import in_sequence, takes_inputs, weight_format_of
from state.errors import InputError
from state.reasons import reason


def plan_quantizers(skeleton: Skeleton, recipe: Recipe) -> QuantizerPlan:
    """Place the recipe's quantizers on a fresh meta-device model and read the plan off.

    Raises InputError when the recipe needs what this version can't serve: another algorithm than those in
    ALGORITHMS, another search of scales than `scales_of` knows, a weight format that is not in the table of
    formats, or quantizers for which no statistic is kept.
    """
    from modelopt.torch.export.quant_utils import get_quant_config

    if recipe.algorithm not in ALGORITHMS:
        raise InputError(
            f"recipe {recipe.name!r} asks for the algorithm {recipe.algorithm!r}, "
            f"which is not supported yet; supported: {', '.join(ALGORITHMS)}"
        )
    scales_of(recipe)
    model = skeleton.build_again()
    _insert(model, recipe)
    reader = _PlanReader(skeleton, recipe)
    for name, module in model.named_modules():
        reader.read(name, module)
    reader.leave_out_ignored(model)
    reader.leave_out_towers()
    reader.leave_out_half_groups()
    reader.refuse_unserved()
    return QuantizerPlan(
        recipe=recipe,
        weights=reader.weights,
        inputs=reader.inputs,
        constant_inputs=reader.constants,
        kv=reader.kv,
        fused_experts=frozenset(reader.fused),
        together=reader.together,
        merged=reader.merged,
        hf_quant_config=in_hub_names(get_quant_config(model), skeleton),
        left_out=reader.left_out,
    )


def quantizer_names(skeleton: Skeleton) -> list[str]:
    """The quantizers that modelopt can place on a model, by the names that its rules match."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    model = skeleton.build_again()
    _insert(model, Recipe("", [{"quantizer_name": "*", "enable": False}], "max", {}))
    placed = [name for name, module in model.named_modules() if isinstance(module, TensorQuantizer)]
    return list(dict.fromkeys(re.sub(r"_quantizers\.\d+$", "_quantizer", name) for name in placed))


def _insert(model: nn.Module, recipe: Recipe) -> None:
    import modelopt.torch.quantization as mtq

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            mtq.quantize(model, recipe.config(), None)
        except Exception as error:  # it reads and rewrites the model's own code
            raise InputError(
                "modelopt can't place the quantizers of this recipe in the model: "
                f"{type(error).__name__}: {reason(error)}"
            ) from error


class _PlanReader:
    """Walks a model with modelopt's quantizers in place and collects the plan."""

    def __init__(self, skeleton: Skeleton, recipe: Recipe) -> None:
        self.skeleton, self.recipe = skeleton, recipe
        self.linear_names: dict[str, list[str]] = {}
        for linear in skeleton.linears:
            self.linear_names.setdefault(linear.memory, []).append(linear.hub)
        self.expert_modules = {experts.memory: experts for experts in skeleton.experts}
        self.weights: dict[str, WeightFormat] = {}
        self.inputs: dict[str, str] = {}
        self.constants: dict[str, float] = {}
        self.kv: dict[str, KvFormat] = {}
        self.fused: set[str] = set()
        self.together: dict[str, str] = {}
        self.merged: dict[str, str] = {}
        self.served: set[str] = set()
        self.enabled: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}

    def read(self, name: str, module: nn.Module) -> None:
        from modelopt.torch.quantization.nn import TensorQuantizer

        if isinstance(module, TensorQuantizer):
            if module.is_enabled:
                self.enabled[name] = module
        elif name in self.expert_modules:
            self._read_experts(self.expert_modules[name], module)
        elif name in self.linear_names:
            self._read_linear(name, self.linear_names[name], module)
        elif hasattr(module, "k_bmm_quantizer"):
            self._read_attention(name, module)

    def _read_linear(self, memory: str, hubs: list[str], module: nn.Module) -> None:
        weight_quantizer = getattr(module, "weight_quantizer", None)
        if weight_quantizer is None or not weight_quantizer.is_enabled:
            return
        self._weight(hubs, f"{memory}.weight_quantizer", weight_quantizer, module.input_quantizer)
        self._input(hubs, f"{memory}.input_quantizer", module.input_quantizer)
        if len(hubs) > 1:
            self.merged.update(dict.fromkeys(hubs, memory))

    def _read_experts(self, experts: ExpertsModule, module: nn.Module) -> None:
        formats: set[WeightFormat] = set()
        for parameter, leaves in ((experts.up_parameter, experts.up), ("down_proj", (experts.down,))):
            hubs = [f"{experts.hub}.{number}.{leaf}" for number in range(experts.count) for leaf in leaves]
            name = f"{parameter}_weight_quantizer"
            together = hasattr(module, name)  # modelopt's word for: one tensor, one scale
            if not together and not hasattr(module, f"{name}s"):
                raise without_quantizers(experts, type(module).__name__)
            quantizer = getattr(module, name) if together else getattr(module, f"{name}s")[0]
            if not quantizer.is_enabled:
                continue
            if together:
                self.together.update((hub, self.skeleton.matrix(hub).tensor) for hub in hubs)
            elif experts.fused_on_hub and experts.arranged.biased:
                raise with_biases_apart(experts, self.recipe.name)
            else:
                name += "s.0"
                prefix = f"{experts.memory}.{parameter}_weight_quantizers"
                for number in range(experts.count):
                    self.served.add(f"{prefix}.{number}")
                    self.served.update(f"{prefix}.{number}.{step}" for step in range(2))
            inputs = getattr(module, f"{parameter}_input_quantizer")
            self._weight(hubs, f"{experts.memory}.{name}", quantizer, inputs)
            formats.add(self.weights[hubs[0]])
            if together and not self.weights[hubs[0]].holds_together:
                raise without_layout(experts, self.recipe.name, self.weights[hubs[0]].name)
            self._input(hubs, f"{experts.memory}.{parameter}_input_quantizer", inputs)
            self.fused.update(hubs)
        if len(formats) > 1:
            raise in_several_formats(experts, self.recipe.name, [one.described for one in formats])

    def _read_attention(self, memory: str, module: nn.Module) -> None:
        quantizers = {part: getattr(module, f"{part}_bmm_quantizer") for part in ("k", "v")}
        if not any(quantizer.is_enabled for quantizer in quantizers.values()):
            return
        formats = {_cache_format(quantizer) for quantizer in quantizers.values()}
        if len(formats) != 1 or (cache := formats.pop()) is None:
            return
        self.kv[self.skeleton.hub_name(memory)] = cache
        self.served.update(f"{memory}.{part}_bmm_quantizer" for part in quantizers)

    def _weight(self, hubs: list[str], name: str, quantizer: Any, inputs: Any) -> None:
        steps = in_sequence(quantizer)
        weight_format = weight_format_of(hubs[0], name, quantizer, inputs, self.recipe)
        if all(map(_plain, steps)):
            self.served.add(name)
            self.served.update(f"{name}.{number}" for number in range(len(steps)))
        self.weights.update(dict.fromkeys(hubs, weight_format))

    def _input(self, hubs: list[str], name: str, quantizer: Any) -> None:
        if not quantizer.is_enabled or not _plain(quantizer):
            return
        if not takes_inputs(self.weights[hubs[0]], quantizer):
            return
        self.served.add(name)
        if self.weights[hubs[0]].inputs == "found":
            return
        self.inputs.update(dict.fromkeys(hubs, name))
        if quantizer._constant_amax is not None:
            self.constants.update(dict.fromkeys(hubs, float(quantizer._constant_amax)))

    def leave_out_ignored(self, model: nn.Module) -> None:
        """Pass over quantizers of modules that multiply with no matrix, such as norms and convolutions:
        modelopt places them, and its exporter writes nothing of them. Embeddings it would write; engines read
        those as they are.
        """
        known = self.linear_names.keys() | self.expert_modules.keys()
        for name in sorted(self.enabled.keys() - self.served):
            memory = name.rpartition(".")[0]
            owner = model.get_submodule(memory)
            own = owner._parameters.get("weight")
            if memory not in known and own is not None and not isinstance(owner, nn.Linear):
                kind = type(owner).__name__.removeprefix("Quant")
                self.served.add(name)
                hub = self.skeleton.hub_name(memory)
                if isinstance(owner, nn.Embedding):
                    self.left_out[hub] = "embeddings stay as they are"
                    continue
                hub = f"{hub}.{name.rpartition('.')[2]}"
                self.left_out[hub] = f"modelopt's exporter writes nothing of a {kind}'s quantizers"

    def leave_out_towers(self) -> None:
        """Leave linears unquantized that text never reaches: towers for images and sound, and projectors."""
        for memory, hubs in self.linear_names.items():
            for hub in hubs:
                if hub in self.weights and not self.skeleton.is_of_text(memory):
                    self._leave_out(hub, "text does not reach it, so nothing is known of its inputs")

    def leave_out_half_groups(self) -> None:
        """Leave linears unquantized that engines load as one matrix with others which the checkpoint holds
        and the model class never builds, so that nothing is known of their inputs.
        """
        built = {hub for hubs in self.linear_names.values() for hub in hubs}
        for module in list(self.weights):
            unbuilt = [
                other
                for other in fused_with(module)
                if other not in built and self.skeleton.holds(f"{other}.weight")
            ]
            if unbuilt and module in built:
                names = ", ".join(unbuilt)
                self._leave_out(
                    module,
                    f"engines load it as one matrix with {names}, which the model class does not build",
                )

    def _leave_out(self, module: str, why: str) -> None:
        del self.weights[module]
        self.inputs.pop(module, None)
        self.merged.pop(module, None)
        self.constants.pop(module, None)
        self.left_out[module] = why

    def refuse_unserved(self) -> None:
        """Raise InputError naming every enabled quantizer that no kept statistic serves, and where the recipe
        quantizes K and V and no attention is known to have any.
        """
        unserved = sorted(self.enabled.keys() - self.served)
        if not (self.kv or unserved) and any(_asks_for_kv(rule) for rule in self.recipe.quant_cfg):
            raise InputError(
                f"recipe {self.recipe.name!r} quantizes KV caches, and modelopt finds no attention in "
                f"{type(self.skeleton.model).__name__} to do so; choose a recipe that leaves them alone"
            )
        if unserved:
            shown = ", ".join(unserved[:5]) + (f" and {len(unserved) - 5} more" if len(unserved) > 5 else "")
            raise InputError(
                f"recipe {self.recipe.name!r} enables quantizers that no kept statistic serves: {shown}; "
                "supported: weights and inputs of linears and experts by max, FP8 and NVFP4 K and V caches, "
                "without bias or rotation"
            )
        caches = sorted({cache.partition("_")[0] for cache in self.kv.values()})
        if len(caches) > 1:
            raise InputError(
                f"recipe {self.recipe.name!r} puts KV caches into {' and '.join(caches)}; a checkpoint can "
                "name one format for all: choose a recipe that does so"
            )


def _asks_for_kv(rule: dict[str, Any]) -> bool:
    names = rule.get("quantizer_name", "")
    return "bmm_quantizer" in names and rule.get("cfg") is not None and rule.get("enable") is not False


def _plain(quantizer: Any) -> bool:
    """True for a quantizer calibrated by max alone: no bias, no rotation."""
    return not quantizer.bias and not quantizer.rotate_is_enabled


def _cache_format(quantizer: Any) -> KvFormat | None:
    """What K or V is cached in; None for what no kept statistic serves."""
    if not quantizer.is_enabled or quantizer.axis is not None or not _plain(quantizer):
        return None
    if quantizer._constant_amax is not None:
        return None
    fixed = bool(quantizer._use_constant_amax)
    if quantizer.num_bits == (4, 3) and not quantizer.block_sizes and not quantizer._dynamic:
        return "fp8_cast" if fixed else "fp8"
    if quantizer.is_nvfp4_dynamic and quantizer.block_sizes[-1] == 16:
        return "nvfp4_cast" if fixed else "nvfp4"
    return None
