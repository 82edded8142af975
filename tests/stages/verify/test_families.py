"""Exports of families whose tensors lie otherwise on the hub than in the class: good ones pass, beside their
source too.
"""

from pathlib import Path

import pytest

from stages.calibrate.run import calibrate
from stages.export.run import export
from stages.progress import Silent
from stages.settings import CalibrateSettings, ExportSettings
from tests.families.catalogue import FAMILIES
from tests.families.tokenizer import write_text
from tests.families.write import write_family
from tests.stages.verify.editable import verified

KV = "general/ptq/nvfp4_default-kv_fp8"
ALL = {"vllm", "sglang", "trtllm"}
CASES = {
    "phi-3": ALL,  # one matrix for q, k and v
    "gemma-2": ALL,  # norms that multiply by 1 + w, tied embeddings
    "deepseek-v3-fp8": ALL,  # MLA, an MTP layer with experts of its own, quantized already
    "qwen3-next": ALL,  # linear attention, MTP beside the model
    "mistral-4": ALL,  # experts in one tensor, other names in memory
    "kimi-k2.5-int4": ALL,  # a tower whose tensors transformers cuts, INT4
    "granite-moe": ALL,  # experts in tensors of linears
    "gpt-oss-bf16": set(),  # experts stay together
}


@pytest.mark.parametrize("name", CASES)
def test_an_export_passes_beside_its_source(name: str, tmp_path: Path) -> None:
    write_family(FAMILIES[name](), tmp_path / "model")
    write_text(tmp_path / "text.jsonl")
    given = {"model": str(tmp_path / "model"), "data": str(tmp_path / "text.jsonl"), "run": tmp_path / "run"}
    calibrate(CalibrateSettings.model_validate(given | {"samples": 4, "seq": 32, "batch": 4}), Silent())
    report = export(ExportSettings(run=tmp_path / "run", out=tmp_path / "out", recipe=KV), Silent())
    verification = verified(tmp_path / "out", model=str(tmp_path / "model"))
    assert (verification.findings, verification.left_out) == ((), ())
    loading = {engine for engine in verification.engines if verification.loads(engine)}
    assert loading == {engine for engine, reasons in report.engines.items() if not reasons} == CASES[name]
