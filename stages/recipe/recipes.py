"""Recipes: what to quantize, and how, in modelopt's own names and formats."""

import contextlib
import copy
import io
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from state.errors import InputError
from state.identity import digest_json

PRESETS = "configs/ptq/presets/model"
"""Where modelopt's library of recipes has its presets."""


@dataclass(frozen=True)
class Recipe:
    """One of modelopt's quantization recipes.

    name: as the user typed it. quant_cfg: modelopt's ordered list of quantizer rules. algorithm: the name of
    the calibration algorithm the recipe asks for (`max`, `awq_lite`, ...). algorithm_options: the options
    that come with it. awq_first: the recipe lists `awq_lite` before `gptq`.
    """

    name: str
    quant_cfg: list[dict[str, Any]]
    algorithm: str
    algorithm_options: dict[str, Any]
    awq_first: bool = False

    @property
    def digest(self) -> str:
        """Of all that a checkpoint's bytes depend on."""
        return digest_json(_text_keys([self.quant_cfg, self.algorithm, self.algorithm_options]))

    def as_json(self) -> dict[str, Any]:
        """The recipe as JSON holds it: for its digest and its solver, not to place quantizers by."""
        stated: dict[str, Any] = _text_keys(vars(self))
        return stated

    def config(self) -> dict[str, Any]:
        """The recipe as `mtq.quantize` takes it, without an algorithm: quantizers are placed, nothing is
        calibrated.
        """
        return {"quant_cfg": copy.deepcopy(self.quant_cfg), "algorithm": None}


def resolve(name: str) -> Recipe:
    """Look a recipe up in modelopt's library: a preset (`nvfp4`), a shipped recipe file or a path to one of
    your own.

    Raises InputError when modelopt knows no such recipe, when the file is not a post-training quantization
    recipe, or when it lists algorithms that can't be run one after the other here.
    """
    from modelopt.recipe.presets import QUANT_CFG_CHOICES

    if name in QUANT_CFG_CHOICES:
        return _recipe(name, QUANT_CFG_CHOICES[name])
    if "/" not in name and not Path(name).is_file():
        raise InputError(_unknown(name, list(QUANT_CFG_CHOICES)))
    return _recipe(name, _load_file(name))


def shipped() -> list[str]:
    """Names of every recipe modelopt ships: presets first, then whole recipe files."""
    import modelopt_recipes  # type: ignore[import-untyped]
    from modelopt.recipe.presets import QUANT_CFG_CHOICES

    root = Path(modelopt_recipes.__file__).parent
    files = [str(path.relative_to(root).with_suffix("")) for path in sorted(root.glob("general/ptq/*.yaml"))]
    return [*QUANT_CFG_CHOICES, *files]


def is_shipped(name: str) -> bool:
    """Whether a name means a recipe of modelopt's library, and nothing of a person's own."""
    root = _library()
    shipped = (root / PRESETS / f"{name}.yaml").is_file() or (root / f"{name}.yaml").is_file()
    return shipped and not any(Path(name + suffix).exists() for suffix in ("", ".yaml", ".yml"))


def _library() -> Path:
    import modelopt_recipes

    return Path(modelopt_recipes.__file__).parent


def _load_file(name: str) -> dict[str, Any]:
    from modelopt.recipe import load_recipe
    from modelopt.recipe.config import ModelOptPTQRecipe

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # load_recipe prints where it reads from
            recipe = load_recipe(name)
    except (ValueError, OSError) as error:
        if "not a valid YAML file or directory" in str(error):
            raise InputError(_unknown(name, shipped())) from error
        raise InputError(f"recipe {name!r} can't be read: {error}") from error
    if not isinstance(recipe, ModelOptPTQRecipe):
        raise InputError(
            f"recipe {name!r} is a {type(recipe).__name__}, not a post-training quantization recipe"
        )
    quantize: dict[str, Any] = recipe.quantize.model_dump(exclude_unset=True)
    return quantize


def _text_keys(value: Any) -> Any:
    """The value with text keys: recipes name axes by number (`block_sizes: {-1: 16}`), unsortable."""
    if isinstance(value, Mapping):
        return {str(key): _text_keys(item) for key, item in value.items()}
    return [_text_keys(item) for item in value] if isinstance(value, list | tuple) else value


def _recipe(name: str, config: dict[str, Any]) -> Recipe:
    stated = config.get("algorithm") or "max"
    steps = [
        {"method": step} if isinstance(step, str) else dict(step)
        for step in (stated if isinstance(stated, list) else [stated])
    ]
    methods = [step.pop("method") for step in steps]
    awq_first = methods == ["awq_lite", "gptq"]
    if len(steps) != 1 and not awq_first:
        raise InputError(
            f"recipe {name!r} lists the algorithms {', '.join(map(repr, methods))}; "
            "supported: one algorithm, or awq_lite and then gptq"
        )
    options = {option: value for step in steps for option, value in step.items()}
    return Recipe(name, copy.deepcopy(config["quant_cfg"]), methods[-1], options, awq_first)


def _unknown(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"modelopt ships: {', '.join(known)}"
    return f"no recipe is called {name!r}; {hint}"
