"""The demo goes all the way and leaves what it names; its settings are only shortened here."""

from pathlib import Path

from helpers import Recorder

from bigseg import demo
from bigseg.volume import open_volume


def test_the_demo_leaves_an_image_a_model_labels_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 4)
    progress = Recorder()
    result = demo.run_demo(str(tmp_path), progress)
    text = result.as_text()
    assert "AP at IoU 0.5" in text
    assert "--task instances" in text
    assert Path(result.picture).read_bytes().startswith(b"\x89PNG")
    image = open_volume(str(tmp_path / "cells.zarr"))
    assert set(image.label_names()) == {"bigseg", "cells", "tissue"}
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert (tmp_path / "cells.zarr" / "labels" / "bigseg" / "objects.parquet").exists()
    labels = [task["label"] for task in progress.tasks]
    assert labels[0] == "sample"
    assert {"train", "predict", "grow"} <= set(labels)
    assert all(task["done"] == task["total"] for task in progress.tasks)
