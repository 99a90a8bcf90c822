"""Every option that names a file or a folder: what lies there may be anything, and the command ends at once."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import LLAMA, llama_tensors, write_checkpoint
from tests.publish import results
from w8a8 import quantize
from w8a8.cli import app
from w8a8.errors import W8A8Error

ANYTHING: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "endless zeros": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "nothing": lambda path: None,
}
COMMANDS = (
    "quantize X OUT",
    "quantize SRC OUT --recipe smooth --calibration X",
    "quantize SRC OUT --recipe smooth --calibration X.jsonl",
    "inspect X",
    "verify X --source SRC",
    "verify MADE --source X",
    "fit X --gpu 24GiB",
    "compare X RESULT",
    "compare RESULT X",
    "card X",
    "card MADE --baseline X",
    "card MADE --kld X",
    "report X --source SRC",
    "push X org/name --dry-run",
    "serve X --dry-run --describe 24GiB",
    "chat http://127.0.0.1:9/v1 --prompt hi --image X",
    "eval gsm8k --base-url http://127.0.0.1:9/v1 --model m --data X",
    "eval gsm8k --base-url http://127.0.0.1:9/v1 --model m --data FOLDER",
    "eval kld SRC MADE --text X",
    "eval kld SRC MADE --jsonl X",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its result, and a result of an evaluation."""
    folder = tmp_path_factory.mktemp("paths")
    write_checkpoint(folder / "SRC", llama_tensors(layers=1), config=LLAMA)
    quantize(folder / "SRC", folder / "MADE")
    results.write(folder / "RESULT", results.gsm8k("base", [True, False] * 3))
    (folder / "FOLDER").mkdir()
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ANYTHING)
def test_a_command_ends_whatever_lies_where_it_should_read(
    command: str, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = [folder / name for name in ("X", "X.jsonl", "FOLDER/train.jsonl")]
    try:
        for place in places:
            ANYTHING[kind](place)

        with pytest.raises(W8A8Error) as raised:
            app(command.split(), standalone_mode=False)
    finally:
        for place in places:
            place.unlink(missing_ok=True)

    assert "\n" not in str(raised.value)
    assert not (folder / "OUT").exists()
