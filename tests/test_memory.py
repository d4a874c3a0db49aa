"""A worker stays within its memory, whatever the size of the volume; the driver does not grow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import noise, write_image, write_model

from bigseg.config import UNetSpec

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="measured as Linux tells it"
)

SPEC = UNetSpec.build(3, out_channels=2, depth=2, width=8)
MEASURE = """
import json, sys
from pathlib import Path
from bigseg.config import SegmentConfig
from bigseg.machine import Resources
from bigseg.progress import NullProgress
from bigseg.places import SerialExecutor
from bigseg.segment import carry_out, prepare
image, model, out, memory = sys.argv[1:]
memory = int(memory)
config = SegmentConfig(
    image=image, model=model, out=out, memory=memory, engine="ENGINE", tile=TILE
)
plan, ledger = prepare(config, Resources("cpu", 1, 2, memory))
with SerialExecutor(plan, 2) as executor:
    carry_out(plan, ledger, executor, NullProgress())
# Not ru_maxrss: that begins with what the parent had when it forked.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps({"peak": peak, "tile": plan.tile, "blocks": len(plan.grid)}))
"""


def measure(image, model, out, memory, engine, tile=None):
    code = MEASURE.replace("ENGINE", engine).replace("TILE", str(tile))
    words = [sys.executable, "-c", code, str(image), str(model), str(out), str(memory)]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    ("engine", "mirror"), [("openvino", False), ("torch", False), ("openvino", True)]
)
def test_a_worker_stays_within_its_memory(tmp_path, engine, mirror):
    spec = SPEC.model_copy(update={"mirror": mirror})
    model = write_model(tmp_path / "m.safetensors", spec)[1]
    image = write_image(tmp_path / "i.zarr", noise((150, 200, 200)), chunks=(50, 64, 64))
    small, large = 1000 << 20, 1500 << 20
    tight = measure(image, model, tmp_path / "a.zarr", small, engine)
    loose = measure(image, model, tmp_path / "b.zarr", large, engine)
    assert tight["peak"] <= small
    assert loose["peak"] <= large
    # The memory is there to be used.
    assert loose["peak"] > 0.5 * large
    assert tight["blocks"] > loose["blocks"]


def test_a_larger_volume_takes_no_more_memory(tmp_path):
    model = write_model(tmp_path / "m.safetensors", SPEC)[1]
    peaks = []
    for name, shape in {"a": (60, 120, 120), "b": (240, 240, 120)}.items():
        image = write_image(tmp_path / f"{name}.zarr", noise(shape), chunks=(60, 60, 60))
        out = tmp_path / f"{name}-out.zarr"
        found = measure(image, model, out, 900 << 20, "openvino", tile=(60, 60, 60))
        peaks.append(found["peak"])
    assert peaks[1] <= 1.1 * peaks[0]
    assert max(peaks) <= 900 << 20
