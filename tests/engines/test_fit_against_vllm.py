"""What `w8a8 fit` counts, against the installed vLLM's own classes: Gemma 4 31B and small models of other families."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.memory.reference import family, gemma4_31b
from tests.memory.test_against_vllm import UNNAMED, counted

CONTEXT = 8192
SMALL = ("qwen3_next", "deepseek_v3", "falcon_h1", "gemma3", "gemma4_e2b", "llama", "qwen3")
"""One with experts comes first: the first model decides whether vLLM makes a group of GPUs for experts."""


@pytest.mark.parametrize("gpus", [1, 2])
def test_weights_and_kv_cache_are_what_the_installed_vllm_allocates(
    vllm_python: Path, tmp_path: Path, gpus: int
) -> None:
    checkpoints = {**{name: family(name, context=CONTEXT) for name in SMALL}, "gemma4_31b": gemma4_31b("quark")}
    for name, checkpoint in checkpoints.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(checkpoint.config))
    script = Path(__file__).with_name("vllm_sizes.py")
    options = json.dumps({"context": CONTEXT})
    run = subprocess.run(
        [vllm_python, script, str(gpus), options, *checkpoints],
        cwd=tmp_path, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for name, expected in json.loads(run.stdout.splitlines()[-1]).items():
        found = counted(checkpoints[name], gpus, CONTEXT)
        assert abs(found.pop("weights") - expected["weights"]) <= UNNAMED, name
        assert found == {key: expected[key] for key in found}, name
