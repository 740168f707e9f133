"""The run of `support.stopped_runs` that nobody stopped, which those that were stopped and resumed are compared with."""

import pytest

from support.stopped_runs import results, train, write_rows


@pytest.fixture(scope="session")
def where(tmp_path_factory):
    """A folder with the rows, in which every run has a folder of its own."""
    folder = tmp_path_factory.mktemp("stopped")
    write_rows(folder)
    return folder


@pytest.fixture(scope="session")
def whole(where):
    """The results of the run that nobody stopped."""
    run = train(where, "whole")
    assert run.returncode == 0, run.stderr
    return results(where / "whole")
