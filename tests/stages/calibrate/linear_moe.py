"""A mixture of experts whose experts are plain `nn.Linear` modules, one per expert, as custom model code
often has them.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP


class LinearMoeConfig(Qwen3MoeConfig):
    model_type = "linear_moe"


class LinearMoeBlock(nn.Module):
    """Routes every token to its best `num_experts_per_tok` experts, one expert after the other."""

    def __init__(self, config: LinearMoeConfig) -> None:
        super().__init__()
        self.top = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            Qwen3MoeMLP(config, intermediate_size=config.moe_intermediate_size)
            for _ in range(config.num_experts)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.view(-1, hidden.shape[-1])
        weights, chosen = self.gate(tokens).softmax(-1).topk(self.top)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            if rows.numel():
                output.index_add_(0, rows, expert(tokens[rows]) * weights[rows, place, None])
        return output.view_as(hidden)


class LinearMoeForCausalLM(Qwen3MoeForCausalLM):
    config_class = LinearMoeConfig

    def __init__(self, config: LinearMoeConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = LinearMoeBlock(config)


def register() -> None:
    AutoConfig.register("linear_moe", LinearMoeConfig, exist_ok=True)
    AutoModelForCausalLM.register(LinearMoeConfig, LinearMoeForCausalLM, exist_ok=True)
