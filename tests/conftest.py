"""What holds for all tests."""

import hypothesis
import pytest

# How long an example takes says how busy the machine is, and nothing of the law.
hypothesis.settings.register_profile("bigseg", deadline=None)
hypothesis.settings.load_profile("bigseg")


def pytest_addoption(parser):
    parser.addoption(
        "--chaos-seeds", type=int, default=1, help="how many seeds of every random kind of kill"
    )


@pytest.fixture(scope="session", autouse=True)
def _no_entries_of_other_runs(tmp_path_factory):
    """Compiled networks of the tests go nowhere but here, also those of processes they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIGSEG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """The planted shapes as an image, and the model that reads them."""
    # Half a second that most tests save.
    from helpers import write_image
    from planting import planted_shapes, write_planting_model

    folder = tmp_path_factory.mktemp("planted")
    image = write_image(folder / "image.zarr", planted_shapes(), chunks=(8, 16, 16), n_levels=2)
    return image, write_planting_model(folder / "model.safetensors")
