"""Servers of small checkpoints, started once for all tests of the embedded engine over HTTP."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.serve.embedded.servers import IMPATIENT, KEY, NAME, make_checkpoint, serving, together
from tests.servers import Server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("embedded") / "model", template=True)


@pytest.fixture(scope="session")
def plain_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("embedded-plain") / "model", template=False)


@pytest.fixture(scope="session")
def servers(checkpoint: Path, plain_checkpoint: Path) -> Iterator[tuple[Server, ...]]:
    """One with a chat template; one without, but with a key, a context of 64 and little patience."""
    locked = serving(plain_checkpoint, "plain", key=KEY, context=64, limits=IMPATIENT)
    with together(serving(checkpoint, NAME), locked) as started:
        yield started


@pytest.fixture(scope="session")
def server(servers: tuple[Server, ...]) -> Server:
    return servers[0]


@pytest.fixture(scope="session")
def locked(servers: tuple[Server, ...]) -> Server:
    return servers[1]


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client as made:
        yield made
