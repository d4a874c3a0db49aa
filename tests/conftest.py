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
