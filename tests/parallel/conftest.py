"""Every case by one process and by two, once for all workers of a test run."""

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.parallel import member
from tests.parallel.runs import cases, finish, launch


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, half_silent: str) -> Path:
    """A folder with ONE/CASE and TWO/CASE: the run folders of one process, and of two."""
    mine = tmp_path_factory.getbasetemp()
    root = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "parallel"
    with FileLock(f"{root}.lock"):
        if not (root / "done").exists():
            root.mkdir()
            (root / "cases.json").write_text(json.dumps(cases(root, half_silent)))
            two = launch(root, 2, "two")
            member.run(root, "one", [])
            finish(two)
            (root / "done").touch()
    return root
