"""Recipes: what to quantize, and how, in modelopt's own names and formats."""

import contextlib
import copy
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.formats import TABLE
from state.errors import InputError
from state.identity import digest_json

PRESETS = "configs/ptq/presets/model"
"""Where modelopt's library of recipes has its presets."""

ALGORITHMS = (
    "max",
    "mse",
    "awq_lite",
    "awq_clip",
    "awq_full",
    "gptq",
    "local_hessian",
    "smoothquant",
    "tune",
)
"""Those that are served."""

TUNED = {"nvfp4_tuned": "nvfp4", "w4a16_nvfp4_tuned": "w4a16_nvfp4"}
"""Presets of our own: the preset of modelopt's whose quantizers each has, with the algorithm `tune`."""

NAMED = 3  # recipes suggested for a name that is none


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
    """Look a recipe up: one of modelopt's presets (`nvfp4`) or of ours (`nvfp4_tuned`), a recipe file that
    modelopt ships, or a path to one of your own.

    Raises InputError when modelopt knows no such recipe, when the file is not a post-training quantization
    recipe, or when it lists algorithms that can't be run one after the other here.
    """
    if name in presets():
        return _recipe(name, _load_preset(name))
    if "/" not in name and not Path(name).is_file():
        raise InputError(_unknown(name))
    return _recipe(name, _load_file(name))


def shipped() -> list[str]:
    """Names of every preset, modelopt's and ours, then of the whole recipe files that modelopt ships, general
    ones first. Files that only others draw on are left out.
    """
    root = _library()
    files = [path for path in root.rglob("*.yaml") if path.relative_to(root).parts[0] != "configs"]
    whole = [path for path in files if re.search(r"^  recipe_type:", path.read_text(), re.MULTILINE)]
    return [*presets(), *sorted(str(path.relative_to(root).with_suffix("")) for path in whole)]


def presets() -> list[str]:
    """Names of modelopt's presets and ours."""
    return sorted([*(path.stem for path in (_library() / PRESETS).glob("*.yaml")), *TUNED])


def is_shipped(name: str) -> bool:
    """Whether a name means a preset or a recipe of modelopt's library, and nothing of a person's own."""
    if name in presets():
        return True
    files = (Path(name + suffix) for suffix in ("", ".yaml", ".yml"))
    return (_library() / f"{name}.yaml").is_file() and not any(path.exists() for path in files)


def _library() -> Path:
    """The folder of modelopt's recipes, which are a package of files; to import it would import modelopt."""
    spec = find_spec("modelopt_recipes")
    assert spec is not None and spec.submodule_search_locations is not None  # comes with modelopt
    return Path(spec.submodule_search_locations[0])


def _load_preset(name: str) -> dict[str, Any]:
    """One preset alone: modelopt's table of all takes a second to read."""
    from modelopt.torch.opt.config_loader import load_config
    from modelopt.torch.quantization.config import QuantizeConfig

    path = f"{PRESETS}/{TUNED.get(name, name)}"
    preset: dict[str, Any] = load_config(path, schema_type=QuantizeConfig).model_dump(exclude_unset=True)
    return preset | {"algorithm": "tune"} if name in TUNED else preset


def _load_file(name: str) -> dict[str, Any]:
    from modelopt.recipe import load_recipe
    from modelopt.recipe.config import ModelOptPTQRecipe
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # load_recipe prints where it reads from
            recipe = load_recipe(name)
    except (ValueError, OSError, YAMLError) as error:
        if "not a valid YAML file or directory" in str(error):
            raise InputError(_unknown(name)) from error
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


def _unknown(name: str) -> str:
    known = sorted(shipped(), key=_probably_refused)  # in modelopt's order otherwise
    if near := _near(name, known):
        return f"no recipe is called {name!r}; did you mean {' or '.join(near)}?"
    return f"no recipe is called {name!r}; there are (likely served first): {', '.join(known)}"


def _near(name: str, known: list[str]) -> list[str]:
    """Names that are the same in another spelling, else those that hold all its words, else those like it."""
    wanted = _words(name)
    spelled = {other: _words(other) for other in known}
    if same := [other for other, words in spelled.items() if words == wanted]:
        alike = [other for other in same if ("/" in other) == ("/" in name)]
        return (alike or same)[:NAMED]
    if wanted and (holding := [other for other, words in spelled.items() if set(wanted) <= set(words)]):
        return holding[:NAMED]
    joined: dict[str, str] = {}
    for other, words in spelled.items():
        joined.setdefault("_".join(words), other)
    alike = get_close_matches("_".join(wanted), joined, n=NAMED, cutoff=0.4)
    return sorted((joined[words] for words in alike), key=_probably_refused)


def _words(name: str) -> list[str]:
    """`NVFP4_AWQ_FULL_CFG`, `nvfp4-awq-full` → nvfp4, awq, full. A file counts by its own name alone."""
    words = re.split(r"[^a-z0-9]+", Path(name.lower()).name.removesuffix(".yaml"))
    return [word for word in words if word not in ("", "default", "cfg")]


def _probably_refused(name: str) -> bool:
    """Whether a shipped recipe is likely not served, by its algorithm and the formats in its name: good
    enough to sort by. For certain, only its quantizers on a model can tell.
    """
    families = {weight_format.partition("_")[0] for weight_format in TABLE}
    if not families & set(_words(name)):
        return True
    try:
        return resolve(name).algorithm not in ALGORITHMS
    except InputError:
        return True
