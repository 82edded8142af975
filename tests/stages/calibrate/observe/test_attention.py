"""K and V are seen under whichever implementation a model has, and nothing of the model changes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from stages.calibrate.observe.attention import channels_last, observed_attention

TOKENS = torch.tensor([[1, 2, 3, 4, 5]])


def model(implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return made.eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_attention_is_seen_and_no_name_changes(implementation: str) -> None:
    made = model(implementation)
    plain = made(TOKENS).logits
    projected: list[torch.Tensor] = []
    for layer in made.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _i, out: projected.append(out))
    seen: list[tuple[torch.nn.Module, torch.Tensor]] = []
    names: set[str] = set()
    before = dict(AttentionInterface.__dict__), dict(AttentionMaskInterface.__dict__)

    def observe(module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        names.add(made.config._attn_implementation)
        assert key.shape == value.shape == (1, 1, 5, 8)
        seen.append((module, channels_last(value)))

    with observed_attention(observe):
        watched = made(TOKENS).logits
    assert watched.equal(plain)
    assert [module for module, _ in seen] == [layer.self_attn for layer in made.model.layers]
    assert all(value.equal(own[0]) for (_, value), own in zip(seen, projected, strict=True))
    assert names == {implementation}
    assert (dict(AttentionInterface.__dict__), dict(AttentionMaskInterface.__dict__)) == before


def test_on_the_meta_device_no_mask_is_built() -> None:
    made = model("sdpa").to("meta")
    seen = []
    with observed_attention(lambda _module, key, _value: seen.append(key.shape)):
        made(TOKENS.to("meta"), attention_mask=torch.ones_like(TOKENS, device="meta"))
    assert seen == [torch.Size((1, 1, 5, 8))] * 2
