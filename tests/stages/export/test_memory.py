"""Memory does not grow with the model: one tensor of experts that is larger than the bound."""

import json
import threading
from pathlib import Path

import pytest
import torch

from stages.export.flow import in_order
from stages.export.reading import SourceReader
from stages.export.rescale import Rescaling
from stages.export.run import AHEAD
from stages.export.shards import Assembly, TensorSpec
from stages.export.tensors import Ingredients, TensorMaker, all_work
from stages.export.units import Shard, Unit
from stages.formats import NVFP4
from stages.model.matrices import StoredMatrix
from state.large_reads import LargeReads
from state.source import Source

EXPERTS, ROWS, COLUMNS = 2, 40960, 8192  # 1.34 GB in bf16, each expert 671 MB
BOUND = 1_000_000_000


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def sparse_source(folder: Path) -> Source:
    """A checkpoint of zeros that takes no room on the disk."""
    shape, nbytes = [EXPERTS, ROWS, COLUMNS], EXPERTS * ROWS * COLUMNS * 2
    head = json.dumps({"all": {"dtype": "BF16", "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + nbytes)
    return Source.open(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_layer_larger_than_the_bound(tmp_path: Path) -> None:
    source, units, scales = sparse_source(tmp_path), [], {}
    for expert in range(EXPERTS):
        module = f"experts.{expert}.up"
        held = NVFP4.stored(ROWS, COLUMNS)
        specs = tuple(TensorSpec(f"{module}.{one.leaf}", *one[1:]) for one in held)
        leaves = {f"{module}.{one.leaf}": one.leaf for one in held}
        scales[f"{module}.weight_scale_2"] = torch.tensor(1.0)
        units.append(
            Unit(f"{module}.weight", None, specs, {module: StoredMatrix("all", expert)}, NVFP4, leaves)
        )
    amax = {f"experts.{expert}.up": torch.tensor(1.0) for expert in range(EXPERTS)}
    given = Ingredients(source, source.digests(1), amax, scales, Rescaling(torch.bfloat16, exact=True))
    shard = Shard("model.safetensors", tuple(units))
    assembly = Assembly(shard.specs)
    before, peak, over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    with LargeReads() as files:
        work = all_work([shard], given, SourceReader(source, given.digests, files))
        results = in_order(work, TensorMaker(given).make, lambda one: one.nbytes, AHEAD, 1, lambda: None)
        made = (part for _, parts in results for part in parts)
        written = sum(len(memoryview(data).cast("B")) for _, data in assembly.parts(made))
    over.set()
    watching.join()
    assert written == assembly.nbytes
    assert peak[0] - before < BOUND / 2
