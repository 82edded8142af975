"""AWQ lite and SmoothQuant against modelopt on small dense models, without folding constraints."""

import copy
from collections.abc import Callable

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from stages.formats import INT4_AWQ, NVFP4, WeightFormat
from stages.solve import awq_lite, smoothquant
from stages.solve.moments import SiteStatistics

SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = [LlamaConfig(**SHAPE), Qwen3Config(**SHAPE)]
# modelopt's fake quantization to NVFP4 needs a GPU.
FORMATS = [
    pytest.param(INT4_AWQ, mtq.INT4_AWQ_CFG, "cpu", id="int4"),
    pytest.param(
        NVFP4,
        mtq.NVFP4_AWQ_LITE_CFG,
        "cuda",
        id="nvfp4",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ),
]
# Losses of two alphas nearer than this are a tie that summation order decides.
NEAR_TIE = 0.005


def build(config: PretrainedConfig) -> nn.Module:
    """A random model whose norms make some channels large, as trained ones do."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.mul_(torch.exp(torch.randn_like(parameter)))
    return model


def forward_loop() -> Callable[[nn.Module], None]:
    torch.manual_seed(1)
    batches = torch.randint(0, 256, (4, 4, 32))

    def run(model: nn.Module) -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch.to(model.device), use_cache=False)

    return run


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"}  # fmt: skip


def inputs(model: nn.Module, run: Callable[[nn.Module], None]) -> dict[str, Tensor]:
    """Everything each linear saw, f32 `[tokens, K]`."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, module in decoder_linears(model).items()
    ]
    run(model)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.parametrize(("weight_format", "recipe", "device"), FORMATS)
def test_awq_lite_losses_and_alphas(config, weight_format: WeightFormat, recipe, device):
    model, run = build(config).to(device), forward_loop()
    seen = inputs(model, run)
    recipe = copy.deepcopy(recipe)
    recipe["algorithm"] = {"method": "awq_lite", "alpha_step": 0.1, "debug": True}
    reference = mtq.quantize(copy.deepcopy(model), recipe, run)

    different = []
    for name, linear in decoder_linears(model).items():
        x = seen[name]
        site = SiteStatistics((x.T @ x)[None], x.abs().sum(0)[None], torch.tensor([len(x)], device=device))
        solution = awq_lite.search([awq_lite.Member(linear.weight.detach()[None], site)], weight_format)
        theirs = reference.get_submodule(name).awq_lite
        # modelopt adds up one mean per batch.
        losses = torch.tensor([float(loss) for loss in theirs.loss.values()]) / theirs.num_search_steps
        assert len(losses) == len(awq_lite.ALPHAS)
        found = solution.losses.cpu()
        assert_close(found, losses, rtol=0.02, atol=0, msg=lambda m, name=name: f"{name}: {m}")
        ours, best = int(found.argmin()), int(losses.argmin())
        if ours == best:
            assert_close(solution.scale, theirs.best_scale, rtol=1e-4, atol=0)
        else:
            different.append((name, ours, best))
            assert losses[ours] < losses[best] * (1 + NEAR_TIE)
    print(f"near ties decided otherwise (linear, our alpha, modelopt's): {different}")
    assert len(different) <= 1, different


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_smoothquant_scales(config, alpha):
    model, run = build(config), forward_loop()
    # A dead channel, which modelopt's clamp leaves at 1e4.
    model.model.layers[0].input_layernorm.weight.data[5] = 0
    seen = inputs(model, run)
    recipe = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)
    recipe["algorithm"] = {"method": "smoothquant", "alpha": alpha}
    reference = mtq.quantize(copy.deepcopy(model), recipe, run)
    for name, linear in decoder_linears(model).items():
        ours = smoothquant.pre_quant_scale(seen[name].abs().amax(0), linear.weight.detach(), alpha)
        theirs = reference.get_submodule(name).input_quantizer._pre_quant_scale
        assert_close(ours, theirs.flatten(), rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")
