"""`scripts/example.py` on a small chat model: what it publishes, in several sittings, one of them killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from example import is_whole

from tests.calibrate.checkpoints import make
from tests.command import cli
from tests.publish.results import gsm8k, write
from w8a8.publish.results import Results

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "scripts" / "example.py"
QUESTIONS = 3
CHAT = "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}assistant: "
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def command(folder: Path) -> list[str]:
    options = ("--only", "0.5B", "--limit", str(QUESTIONS), "--gsm8k", str(folder / "gsm8k"))
    return [
        sys.executable,
        str(SCRIPT),
        str(folder),
        *options,
        "--out",
        str(folder / "out"),
        "--engine",
        "transformers",
    ]


def sitting(folder: Path) -> str:
    """Run the script to its end; return what it and its commands said."""
    done = subprocess.run(command(folder), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@dataclass(frozen=True)
class Published:
    """What a killed sitting and the one behind it left; the lines that the first had written; what the second said."""

    folder: Path
    kept: list[str]
    said: str

    @property
    def results(self) -> Path:
        return self.folder / "out" / "0.5B"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A small model lies where Qwen's would be made; the first sitting is killed once it has an answer."""
    folder = tmp_path_factory.mktemp("example")
    model = make(folder / "qwen2.5-coder-0.5b", "Qwen2", max_position_embeddings=4096)
    (model / "chat_template.jinja").write_text(CHAT)
    (folder / "gsm8k").mkdir()
    for split, count in (("train", 8), ("test", QUESTIONS)):
        rows = [{"question": f"Hens {n} and {n}?", "answer": f"#### {2 * n}"} for n in range(count)]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    journal = folder / "out" / "0.5B" / "gsm8k-bf16.jsonl"
    with subprocess.Popen(
        command(folder), env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL
    ) as process:
        while not journal.exists() or journal.read_text().count("\n") < 2:
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    kept = journal.read_text().splitlines()[1:]
    return Published(folder, kept, sitting(folder))


def test_a_sitting_goes_on_where_the_one_before_was_killed(published: Published) -> None:
    assert f"{len(published.kept)} of {QUESTIONS} are answered already" in published.said
    assert [*published.results.glob("*.jsonl")] == []


def test_what_it_publishes_has_no_text_of_a_question_and_is_taken_like_any_result(published: Published) -> None:
    there = {path.name for path in published.results.iterdir()}
    kinds = ("gsm8k-{}.json", "kld-{}.json", "compare-{}.json", "card-{}.md", "report-{}.html")
    assert there == {"gsm8k-bf16.json", *(kind.format(name) for kind in kinds for name in ("rtn", "auto"))}
    assert not [path for path in published.results.iterdir() if "Hens" in path.read_text()]
    base, quant, kld = (published.results / name for name in ("gsm8k-bf16.json", "gsm8k-auto.json", "kld-auto.json"))
    measured = Results(base, quant, kld).read()
    assert measured.paired
    assert measured.paired.questions == QUESTIONS
    found = json.loads(cli("compare", base, quant, "--json", check=True).stdout)
    assert found == json.loads((published.results / "compare-auto.json").read_bytes())
    page = (published.folder / "out" / "results.md").read_text()
    assert found["verdict"] in page
    assert f" of {QUESTIONS}, " in page


def test_only_what_is_missing_is_made_again_and_what_was_made_from_it(published: Published) -> None:
    assert "0 of 14 steps to do" in sitting(published.folder)
    shutil.rmtree(published.folder / "qwen2.5-coder-0.5b-W8A8-auto")
    assert "0 of 14 steps to do" in sitting(published.folder)
    (published.results / "kld-auto.json").unlink()
    said = sitting(published.folder)
    assert "4 of 14 steps to do" in said
    made = [line.split()[4:6] for line in said.splitlines() if line.startswith("$ ")]
    assert made == [
        ["quantize", "qwen2.5-coder-0.5b"],
        ["eval", "kld"],
        ["card", "qwen2.5-coder-0.5b-W8A8-auto"],
        ["report", "qwen2.5-coder-0.5b-W8A8-auto"],
    ]


def test_a_result_of_other_questions_or_a_damaged_one_is_not_taken_for_whole(tmp_path: Path) -> None:
    rows = [True, False]
    file = write(tmp_path / "gsm8k.json", gsm8k("model", rows))
    assert is_whole(file, 2)
    assert not is_whole(file, 3)
    write(file, {**gsm8k("model", rows), "errors": 1})
    assert not is_whole(file, 2)
    file.write_text(file.read_text()[:-9])
    assert not is_whole(file, 2)
