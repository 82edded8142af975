"""Models that build a sparse mask only under an attention name they know: statistics equal hooks of one's
own to the bit, on windows longer than what a token may see.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from stages.calibrate.run import calibrate
from stages.progress import Silent
from state.names import Site
from state.reader import Calibration, open_run
from tests.families.deepseek import deepseek_v32
from tests.families.layout import Family
from tests.families.newest import minimax_m3
from tests.families.tokenizer import write_text
from tests.families.write import write_family
from tests.stages.calibrate import runs

SEQ, BATCH = 64, 2
FAMILIES: dict[str, Callable[[], Family]] = {
    "deepseek-v3.2": deepseek_v32,
    "glm-5": lambda: deepseek_v32(glm=True),
    "minimax-m3": minimax_m3,
}

COMPARED = {"deepseek-v3.2": 27, "glm-5": 27, "minimax-m3": 15}
MINIMAX_NAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    ("^lm_head$", "language_model.lm_head"),
    (r"indexer\.(.)_proj$", r"index_\1_proj"),
)
"""Names of the class and the hub's."""


class Reading(TorchFunctionMode):
    """Takes in rows by name: inputs of linears by own hooks, K and V from the arguments of torch's own
    attention, whose calls follow the order of the layers.
    """

    def __init__(self, model: nn.Module, attentions: list[str], heads: int) -> None:
        super().__init__()
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.attentions, self.heads, self.calls = attentions, heads, 0
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _module, args: self.take(name, args[0].reshape(-1, args[0].shape[-1]))

    def take(self, name: str, rows: torch.Tensor) -> None:
        self.rows.setdefault(name, []).append(rows.clone())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            name = self.attentions[self.calls % len(self.attentions)]
            self.calls += 1
            for role, states in zip("kv", args[1:3], strict=True):
                own = states[:, :: states.shape[1] // self.heads]  # without the repetition over query heads
                self.take(f"{name}.{role}", own.transpose(1, 2).flatten(2).flatten(0, 1))
        return func(*args, **(kwargs or {}))

    def seen(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """amax, and the sum of |x| in float64."""
        rows = torch.cat(self.rows[name]).abs()
        total = sum(part.abs().double().sum(0) for part in self.rows[name])
        return rows.amax(0).float().numpy(), total.numpy()


def own_reading(family: Family, folder: Path, tokens: np.ndarray) -> Reading:
    built = getattr(transformers, family.config["architectures"][0])
    model = built.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.set_experts_implementation("grouped_mm")
    text = model.config.get_text_config()
    assert text._attn_implementation == "sdpa"
    attentions = [
        name for name, _ in model.named_modules() if name.endswith("self_attn") and "tower" not in name
    ]
    with torch.inference_mode(), Reading(model, attentions, text.num_key_value_heads) as reading:
        for batch in torch.from_numpy(tokens.astype(np.int64)).split(BATCH):
            model(input_ids=batch, use_cache=False)
    return reading


def assert_as_seen(run: Calibration, reading: Reading, name: str, site: Site) -> None:
    amax, total = reading.seen(name)
    assert run.statistic("amax", site).tobytes() == amax.tobytes(), site
    assert run.statistic("abs_sum", site).tobytes() == total.tobytes(), site


@pytest.mark.parametrize("schedule", ["whole", "layerwise"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_sparse_mask_stays(name: str, schedule: str, tmp_path: Path) -> None:
    family = FAMILIES[name]()
    write_family(family, tmp_path / "model")
    write_text(tmp_path / "text.jsonl")
    wish = runs.settings(tmp_path, tmp_path / "run", samples=4, seq=SEQ, batch=BATCH, schedule=schedule)
    calibrate(wish, Silent())
    run = open_run(tmp_path / "run")
    reading = own_reading(family, tmp_path / "model", run.tokens)
    compared = 0
    for memory in reading.rows:
        hub, role = memory, "input"
        if memory.endswith((".k", ".v")):
            hub, role = memory[:-2], memory[-1]
        if name == "minimax-m3":
            if ".mlp." in memory:  # under other names on the hub, and not behind the mask alone
                continue
            for in_memory, on_hub in MINIMAX_NAMES:
                hub = re.sub(in_memory, on_hub, hub)
        assert_as_seen(run, reading, memory, Site(hub, role))
        compared += 1
    assert compared == COMPARED[name]
