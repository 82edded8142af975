"""Good checkpoints pass; every way to damage one is found, and named."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

from stages.engines.findings import RULES
from state.errors import InputError
from tests.stages.verify.conftest import RECIPES
from tests.stages.verify.editable import INDEX, Editable, copied, damaged, verified
from tests.stages.verify.mutations import FOUND_BY_STRUCTURE

Good = Callable[[str], Path]


@pytest.mark.parametrize("name", RECIPES)
def test_a_good_checkpoint_passes(good: Good, tmp_path: Path, name: str) -> None:
    out = copied(good(name), tmp_path / "out")
    assert verified(out).findings == ()


@pytest.mark.parametrize("name", RECIPES)
def test_one_that_is_written_anew_passes(good: Good, tmp_path: Path, name: str) -> None:
    """So that what the mutations below are found by is what they change."""
    assert verified(damaged(good(name), tmp_path / "out", lambda content: None)).findings == ()


@pytest.mark.parametrize("name", FOUND_BY_STRUCTURE)
def test_damage_is_found_by_its_rule(good: Good, tmp_path: Path, name: str) -> None:
    mutation = FOUND_BY_STRUCTURE[name]
    report = verified(damaged(good(mutation.good), tmp_path / "out", mutation.edit))
    assert (mutation.rule, mutation.name) in {(finding.rule, finding.name) for finding in report.findings}
    written = json.loads((tmp_path / "out" / "verify_report.json").read_text())
    assert written["whole"] is False
    assert {finding["rule"] for finding in written["findings"]} <= RULES.keys()


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("*.safetensors"))


def truncate(out: Path) -> None:
    last = shards(out)[-1]
    last.write_bytes(last.read_bytes()[:-1])


def lose_a_shard(out: Path) -> None:
    shards(out)[1].unlink()


def leave_a_stale_shard(out: Path) -> None:
    (out / "model-00009-of-00009.safetensors").write_bytes(shards(out)[0].read_bytes())


def leave_a_single_file(out: Path) -> None:
    (out / "model.safetensors").write_bytes(shards(out)[0].read_bytes())


def with_index(change: Callable[[str], str]) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        old = (out / INDEX).read_text()
        (out / INDEX).write_text(change(old))
        assert (out / INDEX).read_text() != old

    return edit


def name_twice(text: str) -> str:
    name, file = next(iter(json.loads(text)["weight_map"].items()))
    return text.replace('"weight_map": {', f'"weight_map": {{"{name}": "{file}", ')


def name_a_stranger(text: str) -> str:
    file = next(iter(json.loads(text)["weight_map"].values()))
    return text.replace('"weight_map": {', f'"weight_map": {{"model.layers.9.weight": "{file}", ')


def name_another_file(text: str) -> str:
    content = json.loads(text)
    files = sorted(set(content["weight_map"].values()))
    name = next(name for name, file in content["weight_map"].items() if file == files[0])
    content["weight_map"][name] = files[1]
    return json.dumps(content)


def forget_a_tensor(text: str) -> str:
    content = json.loads(text)
    content["weight_map"].popitem()
    return json.dumps(content)


def of_other_sizes(text: str) -> str:
    content = json.loads(text)
    content["metadata"]["total_size"] += 1
    return json.dumps(content)


def write_config(text: str) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        (out / "config.json").write_text(text)

    return edit


def without_headers(out: Path) -> None:
    shards(out)[0].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


OF_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file is truncated": (truncate, "files"),
    "a file is a pointer of git-lfs": (without_headers, "files"),
    "a shard is gone": (lose_a_shard, "files"),
    "a shard of an older export was left": (leave_a_stale_shard, "stale-shard"),
    "a single file is read instead of the shards": (leave_a_single_file, "stale-shard"),
    "the index names a tensor twice": (with_index(name_twice), "files"),
    "the index names a tensor that no file has": (with_index(name_a_stranger), "files"),
    "the index names another file": (with_index(name_another_file), "files"),
    "the index lacks a tensor": (with_index(forget_a_tensor), "files"),
    "the index adds up to other bytes": (with_index(of_other_sizes), "index-size"),
    "config.json is cut short": (write_config('{"quantization_config": {'), "config"),
    "config.json is a list": (write_config("[]"), "config"),
    "config.json is gone": (lambda out: (out / "config.json").unlink(), "config"),
}


@pytest.mark.parametrize("name", OF_FILES)
def test_damaged_files_are_found(good: Good, tmp_path: Path, name: str) -> None:
    edit, rule = OF_FILES[name]
    out = damaged(good("nvfp4"), tmp_path / "out", lambda content: None)
    edit(out)
    assert rule in {finding.rule for finding in verified(out).findings}
    assert str(tmp_path) not in (out / "verify_report.json").read_text()


def test_the_same_checkpoint_gives_the_same_report(good: Good, tmp_path: Path) -> None:
    for name in ("one", "two"):
        verified(damaged(good("nvfp4"), tmp_path / name, lambda content: content.drop("lm_head.weight")))
    one, two = ((tmp_path / name / "verify_report.json").read_bytes() for name in ("one", "two"))
    assert one == two


def test_an_unfinished_export_is_refused(good: Good, tmp_path: Path) -> None:
    out = copied(good("fp8"), tmp_path / "out")
    (out / "holdfast_partial.json").write_text("{}")
    with pytest.raises(InputError, match="is an unfinished export; give its command again"):
        verified(out)


def mixed(content: Editable) -> None:
    """What a configuration says where each layer has a format of its own; experts under their common name."""
    modules = {name.removesuffix(".weight_scale_2") for name in content.tensors if name.endswith("_scale_2")}
    named = sorted(
        {name.partition(".experts.")[0] + ".experts" if ".experts." in name else name for name in modules}
    )
    layers = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in named}
    content.separate.update(quant_algo="MIXED_PRECISION", group_size=None, quantized_layers=layers)
    content.config["quantization_config"] = convert_hf_quant_config_format(deepcopy(content.own))


def test_a_mixed_checkpoint_passes(good: Good, tmp_path: Path) -> None:
    report = verified(damaged(good("nvfp4"), tmp_path / "out", mixed))
    assert (report.findings, report.algo, report.formats) == ((), "MIXED_PRECISION", {"NVFP4": 32})
    assert all(report.loads(engine) for engine in report.engines)


def lacking_a_layer(content: Editable) -> None:
    del content.separate["quantized_layers"]["model.layers.1.self_attn.o_proj"]
    content.config["quantization_config"] = convert_hf_quant_config_format(deepcopy(content.own))


def naming_a_plain_one(content: Editable) -> None:
    content.separate["quantized_layers"]["lm_head"] = {"quant_algo": "NVFP4", "group_size": 16}
    content.config["quantization_config"] = convert_hf_quant_config_format(deepcopy(content.own))


def lacking_a_target(content: Editable) -> None:
    content.quantization["config_groups"]["group_0"]["targets"].remove("model.layers.1.self_attn.o_proj")


def differing(content: Editable) -> None:
    content.quantization["quantized_layers"]["model.layers.1.self_attn.o_proj"] = {"quant_algo": "FP8"}


@pytest.mark.parametrize(
    ("edit", "rule", "name"),
    [
        (lacking_a_layer, "not-declared", "model.layers.1.self_attn.o_proj"),
        (naming_a_plain_one, "not-excluded", "lm_head"),
        (lacking_a_target, "config-groups", "config.json"),
        (differing, "config-disagree", "config.json"),
    ],
)
def test_damage_to_a_mixed_one_is_found(
    good: Good, tmp_path: Path, edit: Callable[[Editable], None], rule: str, name: str
) -> None:
    def both(content: Editable) -> None:
        mixed(content)
        edit(content)

    found = verified(damaged(good("nvfp4"), tmp_path / "out", both)).findings
    assert (rule, name) in {(finding.rule, finding.name) for finding in found}


def test_both_configurations_in_one_are_enough(good: Good, tmp_path: Path) -> None:
    """Older exports of modelopt have hf_quant_config.json alone; vLLM reads that then."""
    out = copied(good("fp8"), tmp_path / "out")
    content = Editable.read(out)
    del content.config["quantization_config"]
    content.write(out)
    assert verified(out).findings == ()
