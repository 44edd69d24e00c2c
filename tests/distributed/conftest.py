"""Jobs of several ranks on this machine; see `launching`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import Launcher, Server


@pytest.fixture(scope="session")
def rank_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("ranks"))
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(timeout=20)


@pytest.fixture
def ranks(rank_server: Server) -> Iterator[Launcher]:
    """Starts jobs of several ranks; whatever is left of them is killed."""
    launcher = Launcher(rank_server)
    yield launcher
    for job in launcher.jobs:
        job.kill()


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def engine(request: pytest.FixtureRequest) -> str:
    """Every rank has all, or each a part."""
    return str(request.param)
