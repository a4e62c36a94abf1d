"""Archives are opened in the test's own process here: a process for each takes a third of a second."""

import pytest

from co3d_ensemble.challenge import archive
from co3d_ensemble.challenge.archive_file import opened_archive


@pytest.fixture(autouse=True)
def archives_in_this_process(monkeypatch):
    monkeypatch.setattr(archive, "open_archive", opened_archive)
