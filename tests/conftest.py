"""What holds for all tests."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_entries_of_other_runs(tmp_path_factory):
    """Compiled networks of the tests go nowhere but here, also those of processes they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIGSEG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
