"""Small random models with a tokenizer and text, their runs, and modelopt's own export of them."""

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from stages.calibrate.run import calibrate
from stages.progress import Silent
from stages.settings import CalibrateSettings
from state.claim import create_run
from state.reader import open_run
from state.source import Source
from state.update import Generation, Update

WORDS = 120
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "dtype": "bfloat16",
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    """A configuration of some ten thousand parameters."""
    if family == "llama":
        return LlamaConfig(architectures=["LlamaForCausalLM"], **(SIZES | changes))
    if family == "qwen3":
        return Qwen3Config(architectures=["Qwen3ForCausalLM"], **(SIZES | changes))
    return Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"], **(SIZES | EXPERTS | changes))


def make_model(folder: Path, config: PretrainedConfig, seed: int = 0) -> Path:
    """Save a random model of the configuration, in bf16, with a tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * torch.rand(parameter.shape) * 0.1)
            else:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape))
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {"<eos>": 0, "<unk>": 1} | {f"w{number}": number + 2 for number in range(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder
    )


def make_text(path: Path, documents: int = 40, words: int = 30) -> Path:
    numbers = np.random.default_rng(0).integers(0, WORDS, (documents, words))
    lines = [json.dumps({"text": " ".join(f"w{number}" for number in row)}) + "\n" for row in numbers]
    path.write_text("".join(lines))
    return path


def make_run(run: Path, model: Path, data: Path, samples: int = 16, seq: int = 32) -> Path:
    settings = CalibrateSettings(model=str(model), data=str(data), run=run, samples=samples, seq=seq, batch=4)
    calibrate(settings, Silent())
    return run


def quantized_by_modelopt(model_folder: Path, run: Path, recipe: str) -> PreTrainedModel:
    """The model with modelopt's quantizers, calibrated by modelopt on the run's tokens."""
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe
    from modelopt.recipe.presets import QUANT_CFG_CHOICES

    tokens = torch.from_numpy(open_run(run).tokens.astype(np.int64))

    def forward(model: PreTrainedModel) -> None:
        for batch in tokens.split(4):
            model(batch, use_cache=False)

    with quiet():
        if recipe in QUANT_CFG_CHOICES:
            config = QUANT_CFG_CHOICES[recipe]
        else:
            config = load_recipe(recipe).quantize.model_dump(exclude_unset=True)
        model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
        return mtq.quantize(model, config, forward)


def exported_by_modelopt(model: PreTrainedModel, out: Path) -> Path:
    from modelopt.torch.export import export_hf_checkpoint

    with quiet(), torch.inference_mode():
        export_hf_checkpoint(model, export_dir=out)
    return out


@contextlib.contextmanager
def quiet() -> Any:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def tensors(folder: Path) -> dict[str, str]:
    """Tensor → dtype, shape and digest of its bytes."""
    return Source.open(folder).digests(threads=1)


def parsed(path: Path) -> Any:
    """A JSON file without the version of the library that wrote it."""
    content = json.loads(path.read_text())
    content.pop("transformers_version", None)
    return content


def differing(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """Name → (ours, theirs) where they differ."""
    names = sorted(ours.keys() | theirs.keys())
    return {name: (ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)}


def variant_of(
    run: Path, out: Path, change: Callable[[dict[str, np.ndarray]], None], finished: bool = True
) -> Path:
    """A copy of a run with other statistics: `change` writes to the arrays, by `<statistic>/<key>`."""
    stored = open_run(run)
    generation = stored.generation()
    arrays = {name: values.copy() for name, values in generation.arrays.items()}
    change(arrays)
    with create_run(out, stored.record, stored.tokens) as writer:
        writer.commit(Update(stored.head.cursor, finished, Generation(generation.layout, arrays)))
    return out
