"""Whole exports of a tiny mixture-of-experts model: one run, many formats; resuming; every refusal."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.export.report import ExportReport
from stages.export.run import export
from stages.settings import ExportSettings
from state.durable import Disk
from state.errors import HoldfastError, IdentityMismatch, InputError, OutOfSpace
from tests.stages.export import support
from tests.stages.export.kill_driver import CountPuts, tree
from tests.stages.export.test_folder import FailAt

EXPERT = "model.layers.1.mlp.experts.2"


def run_export(made: Path, out: Path, disk: Disk | None = None, **settings: object) -> ExportReport:
    chosen = {"run": made / "run", "out": out} | settings
    return export(ExportSettings.model_validate(chosen), disk=disk)


def unseen(arrays: dict[str, np.ndarray]) -> None:
    """As if no token had reached expert 2 of layer 1."""
    for name, values in arrays.items():
        if ".experts.E." in name and not name.startswith("weight_amax/"):
            values[1, 2] = -1 if name.startswith("tokens/") else math.nan


class TestOneRunManyFormats:
    def test_without_a_forward_pass(
        self, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def forward(*_: object, **__: object) -> None:
            raise AssertionError("export ran a forward pass")

        monkeypatch.setattr(torch.nn.Linear, "forward", forward)
        monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
        nvfp4 = run_export(made, tmp_path / "nvfp4", recipe="nvfp4")
        fp8 = run_export(made, tmp_path / "fp8", recipe="fp8")
        assert nvfp4.formats == {"nvfp4": 32} and fp8.formats == {"fp8": 32}
        assert fp8.nbytes > nvfp4.nbytes

    def test_the_recipe_given_to_calibrate_is_the_default(self, made: Path, tmp_path: Path) -> None:
        assert run_export(made, tmp_path / "out").recipe == "nvfp4"

    def test_shards_hold_the_same_tensors(self, made: Path, tmp_path: Path) -> None:
        run_export(made, tmp_path / "one")
        report = run_export(made, tmp_path / "many", shard_size=10_000)
        files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
        assert files == list(report.shards) and len(files) > 3
        index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == report.nbytes
        assert support.tensors(tmp_path / "many") == support.tensors(tmp_path / "one")

    @pytest.mark.parametrize("recipe", ["nvfp4", "fp8", "int8_smoothquant"])
    def test_bytes_do_not_depend_on_the_size_of_pieces(
        self, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
    ) -> None:
        run_export(made, tmp_path / "one", recipe=recipe)
        monkeypatch.setattr("stages.export.reading.AT_ONCE", 600)
        monkeypatch.setattr("stages.export.run.AHEAD", 1000)
        run_export(made, tmp_path / "pieces", recipe=recipe, shard_size=50_000)
        assert support.tensors(tmp_path / "one") == support.tensors(tmp_path / "pieces")

    def test_bytes_depend_on_neither_paths_nor_shards_of_the_source(self, made: Path, tmp_path: Path) -> None:
        run_export(made, tmp_path / "one")
        moved = tmp_path / "elsewhere"
        shutil.copytree(made / "model", moved)
        content = load_file(moved / "model.safetensors")
        (moved / "model.safetensors").unlink()
        weight_map = {}
        for number, names in enumerate((sorted(content)[::2], sorted(content)[1::2])):
            save_file(
                {name: content[name] for name in names}, moved / f"part{number}.safetensors", {"format": "pt"}
            )
            weight_map |= dict.fromkeys(names, f"part{number}.safetensors")
        (moved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        run_export(made, tmp_path / "two", model=str(moved))
        assert tree(tmp_path / "one") == tree(tmp_path / "two")
        small = b"".join(
            data for name, data in tree(tmp_path / "two").items() if not name.endswith(".safetensors")
        )
        assert str(tmp_path).encode() not in small and str(made).encode() not in small


class TestResume:
    def test_the_same_again_writes_nothing(self, made: Path, tmp_path: Path) -> None:
        run_export(made, tmp_path / "out")
        report = run_export(made, tmp_path / "out", disk=FailAt(0, errno.EIO))
        assert report.already_finished and report.shards_written == 0

    def test_only_what_is_unfinished_is_written(self, made: Path, tmp_path: Path) -> None:
        whole = run_export(made, tmp_path / "whole", shard_size=10_000)
        with pytest.raises(OutOfSpace):
            run_export(made, tmp_path / "out", disk=FailAt(40, errno.ENOSPC), shard_size=10_000)
        assert not (tmp_path / "out").exists()
        counted = CountPuts()
        report = run_export(made, tmp_path / "out", disk=counted, shard_size=10_000)
        assert 0 < report.shards_kept < len(whole.shards)
        assert report.shards_written + report.shards_kept == len(whole.shards)
        assert sum(name.endswith(".safetensors") for name in counted.put_names) == report.shards_written
        assert tree(tmp_path / "out") == tree(tmp_path / "whole")

    def test_another_recipe_at_the_same_place_is_refused(self, made: Path, tmp_path: Path) -> None:
        run_export(made, tmp_path / "out", recipe="nvfp4")
        with pytest.raises(IdentityMismatch) as caught:
            run_export(made, tmp_path / "out", recipe="fp8")
        assert {"recipe", "layout"} <= {difference.field for difference in caught.value.differences}
        run_export(made, tmp_path / "out", recipe="fp8", overwrite=True)
        assert (
            json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["quant_algo"]
            == "FP8"
        )

    def test_a_persons_files_in_out_outlive_an_overwrite(self, made: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        run_export(made, out, recipe="nvfp4", shard_size=10_000)
        (out / "README.md").write_text("by hand")
        (out / "eval").mkdir()
        (out / "eval" / "scores.json").write_text("{}")
        run_export(made, out, recipe="fp8", overwrite=True)
        run_export(made, tmp_path / "fp8", recipe="fp8")
        kept = {"README.md": b"by hand", "eval/scores.json": b"{}"}
        assert tree(out) == tree(tmp_path / "fp8") | kept


class TestPolicies:
    def test_every_quantizer_touched_is_in_the_report(self, made: Path, tmp_path: Path) -> None:
        run = support.variant_of(made / "run", tmp_path / "run", unseen)
        report = run_export(made, tmp_path / "out", run=run)
        content = json.loads((tmp_path / "out" / "export_report.json").read_text())
        uses = {(use["policy"], name) for use in content["policies"] for name in use["quantizers"]}
        leaves = ("gate_proj", "up_proj", "down_proj")
        assert {use for use in uses if use[0].startswith("unseen")} == {
            ("unseen=layer", f"{EXPERT}.{leaf}.input_quantizer") for leaf in leaves
        }
        assert report.policy_counts()["unseen=layer"] == 3
        assert content["formats"] == {"nvfp4": 32} and content["unfinished_run"] is False

    def test_weights_only_writes_no_input_scale_for_the_unseen(self, made: Path, tmp_path: Path) -> None:
        run = support.variant_of(made / "run", tmp_path / "run", unseen)
        run_export(made, tmp_path / "layer", run=run)
        run_export(made, tmp_path / "weights", run=run, unseen="weights-only")
        found = support.differing(support.tensors(tmp_path / "layer"), support.tensors(tmp_path / "weights"))
        assert found.keys() == {
            f"{EXPERT}.{leaf}.input_scale" for leaf in ("gate_proj", "up_proj", "down_proj")
        }
        assert all(weights is None for _, weights in found.values())

    def test_policies_are_part_of_the_identity(self, made: Path, tmp_path: Path) -> None:
        run_export(made, tmp_path / "out")
        with pytest.raises(IdentityMismatch, match=r"policy\.dead: stored floor, now error"):
            run_export(made, tmp_path / "out", dead="error")


def dead(arrays: dict[str, np.ndarray]) -> None:
    arrays["amax/model.layers.L.self_attn.o_proj.input"][0] = 0.0


def infinite(arrays: dict[str, np.ndarray]) -> None:
    arrays["amax/model.layers.L.self_attn.o_proj.input"][1, 5] = math.inf


def overflown(arrays: dict[str, np.ndarray]) -> None:
    arrays["amax/model.layers.L.self_attn.o_proj.input"][1] = math.nan


def nan_weight(arrays: dict[str, np.ndarray]) -> None:
    arrays["weight_amax/model.layers.L.self_attn.o_proj.weight"][1] = math.nan


def short_weight(arrays: dict[str, np.ndarray]) -> None:
    arrays["weight_amax/model.layers.L.self_attn.o_proj.weight"][1] /= 2


class TestStatisticsRefused:
    @pytest.mark.parametrize(
        ("change", "settings", "message"),
        [
            (unseen, {"unseen": "error"}, rf"^{EXPERT}.gate_proj.input_quantizer: no token .*--unseen layer"),
            (
                dead,
                {"dead": "error"},
                r"^model.layers.0.self_attn.o_proj.input_quantizer: amax is zero .*--dead floor",
            ),
            (
                infinite,
                {},
                r"^model.layers.1.self_attn.o_proj.input_quantizer: 1 of 64 amax values are not finite",
            ),
            (
                overflown,
                {},
                r"^model.layers.1.self_attn.o_proj: tokens reached its input but every amax is NaN",
            ),
            (nan_weight, {}, r"^model.layers.1.self_attn.o_proj: the weight's amax in the run is nan"),
            (
                short_weight,
                {},
                r"^model.layers.1.self_attn.o_proj.weight reaches .* but the run's weight amax is",
            ),
        ],
    )
    def test_nothing_is_published(
        self, made: Path, tmp_path: Path, change: object, settings: dict[str, str], message: str
    ) -> None:
        run = support.variant_of(made / "run", tmp_path / "run", change)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=message) as caught:
            run_export(made, tmp_path / "out", run=run, **settings)
        assert caught.value.exit_code == 2
        assert not (tmp_path / "out").exists()

    def test_an_unfinished_run_needs_partial(self, made: Path, tmp_path: Path) -> None:
        run = support.variant_of(made / "run", tmp_path / "run", lambda _: None, finished=False)
        with pytest.raises(InputError, match=r"is unfinished: .* --partial"):
            run_export(made, tmp_path / "out", run=run)
        assert run_export(made, tmp_path / "out", run=run, partial=True).partial
        assert json.loads((tmp_path / "out" / "export_report.json").read_text())["unfinished_run"] is True

    def test_a_recipe_that_needs_more_is_refused(self, made: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="int4_awq"):
            run_export(made, tmp_path / "out", recipe="int4_awq")
        assert list(tmp_path.iterdir()) == []


class TestSourceRefused:
    @pytest.fixture
    def copy(self, made: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(made / "model", tmp_path / "copy"))

    def refuse(self, made: Path, copy: Path, kind: type[HoldfastError], message: str) -> HoldfastError:
        out = copy.parent / "out"
        with pytest.raises(kind, match=message) as caught:
            run_export(made, out, model=str(copy), shard_size=10_000)
        assert not out.exists()
        return caught.value

    def test_other_bytes_are_named_and_the_right_source_goes_on(self, made: Path, copy: Path) -> None:
        original = (copy / "model.safetensors").read_bytes()
        content = load_file(copy / "model.safetensors")
        changed = ("model.layers.0.mlp.gate.weight", "model.layers.1.self_attn.q_proj.weight")
        for name in changed:
            content[name][0, 0] += 1
        save_file(content, copy / "model.safetensors", {"format": "pt"})
        error = self.refuse(
            made, copy, IdentityMismatch, "is not the model this run was calibrated with; 2 field"
        )
        assert isinstance(error, IdentityMismatch)
        assert [difference.field for difference in error.differences] == [
            f"tensors.{name}" for name in changed
        ]
        (copy / "model.safetensors").write_bytes(original)
        run_export(made, copy.parent / "out", model=str(copy), shard_size=10_000)
        run_export(made, copy.parent / "whole", shard_size=10_000)
        assert tree(copy.parent / "out") == tree(copy.parent / "whole")

    def test_other_shapes_are_named_before_anything_is_written(self, made: Path, copy: Path) -> None:
        content = load_file(copy / "model.safetensors")
        content["model.norm.weight"] = torch.ones(32, dtype=torch.bfloat16)
        save_file(content, copy / "model.safetensors", {"format": "pt"})
        message = r"tensors\.model\.norm\.weight: stored BF16\[64\], now BF16\[32\]"
        self.refuse(made, copy, IdentityMismatch, message)
        assert not (copy.parent / "out.partial").exists()

    def test_another_config_and_tokenizer_are_named(self, made: Path, copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text()) | {"rms_norm_eps": 0.5}
        (copy / "config.json").write_text(json.dumps(config))
        (copy / "tokenizer.json").write_text("{}")
        error = self.refuse(made, copy, IdentityMismatch, r"config\.rms_norm_eps: stored 1e-06, now 0\.5")
        assert isinstance(error, IdentityMismatch)
        assert {difference.field for difference in error.differences} == {
            "config.rms_norm_eps",
            "tokenizer.tokenizer.json",
        }

    def test_truncated(self, made: Path, copy: Path) -> None:
        path = copy / "model.safetensors"
        os.truncate(path, path.stat().st_size - 1)
        self.refuse(made, copy, InputError, "model.safetensors is truncated")

    def test_quantized_already(self, made: Path, copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text()) | {
            "quantization_config": {"quant_method": "fp8"}
        }
        (copy / "config.json").write_text(json.dumps(config))
        self.refuse(made, copy, InputError, "says that the checkpoint is already quantized")

    def test_absent(self, made: Path, copy: Path) -> None:
        shutil.rmtree(copy)
        self.refuse(made, copy, InputError, "there is no folder")


class FullDisk(Disk):
    def free_bytes(self, path: Path) -> int:
        return 1000


def test_too_little_space_is_found_before_the_first_shard(made: Path, tmp_path: Path) -> None:
    with pytest.raises(OutOfSpace, match="1,000 are free"):
        run_export(made, tmp_path / "out", disk=FullDisk())
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_custom_code_and_templates_are_carried(made: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(made / "model", tmp_path / "model"))
    (moved / "modeling_custom.py").write_text("X = 1\n")
    (moved / "additional_chat_templates").mkdir()
    (moved / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    (moved / "README.md").write_text("not part of a checkpoint")
    run_export(made, tmp_path / "out", model=str(moved))
    assert (tmp_path / "out" / "modeling_custom.py").read_text() == "X = 1\n"
    assert (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").read_text() == "{{ x }}"
    assert not (tmp_path / "out" / "README.md").exists()
