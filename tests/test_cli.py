"""The command line as a user meets it: whole processes, their output and exit codes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import w8a8
from tests.checkpoints import write_checkpoint
from tests.command import W8A8, cli
from tests.named import plan_from
from w8a8.cli.common import interruptible


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return cli(*arguments, env=environment)


def test_quantize_prints_what_became_of_each_component(llama: Path, tmp_path: Path) -> None:
    done = run("quantize", llama, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "attention" in done.stdout
    assert "GB/s" in done.stdout
    assert (tmp_path / "out" / "w8a8.json").is_file()


def test_quiet_prints_one_line(llama: Path, tmp_path: Path) -> None:
    done = run("quantize", llama, tmp_path / "out", "--quiet")
    assert len(done.stdout.replace("\n", " ").split(" s, ")) == 2
    assert "component" not in done.stdout
    assert done.stderr == ""


def test_json_is_json_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    quantized = json.loads(run("quantize", llama, tmp_path / "out", "--json").stdout)
    assert quantized["totals"]["bytes_in"] > quantized["totals"]["bytes_out"]
    verified = json.loads(run("verify", tmp_path / "out", "--source", llama, "--json").stdout)
    assert verified["ok"]
    inspected = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert inspected["w8a8"]


def test_an_error_is_json_too_where_json_was_asked_for(tmp_path: Path) -> None:
    done = run("quantize", tmp_path / "none", tmp_path / "out", "--json")
    error = json.loads(done.stdout)
    assert (error["error"], error["exit_code"]) == ("SourceNotFoundError", done.returncode)


def test_dry_run_writes_nothing_and_needs_no_target(llama: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = run("quantize", llama, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "lm_head" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_json_is_a_plan_that_can_be_read_back(llama: Path) -> None:
    values = json.loads(run("quantize", llama, "--dry-run", "--json").stdout)
    del values["totals"]
    assert plan_from(values) == w8a8.dry_run(llama)


def test_model_in_and_model_out_work_as_arguments(llama: Path, tmp_path: Path) -> None:
    done = run("quantize", MODEL_IN=str(llama), MODEL_OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()


def test_arguments_win_over_the_environment(llama: Path, tmp_path: Path) -> None:
    run("quantize", llama, tmp_path / "out", MODEL_IN="nowhere", MODEL_OUT=str(tmp_path / "other"))
    assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize"], "give SRC, or set MODEL_IN"),
        (["quantize", "", "out"], "give SRC, or set MODEL_IN"),
        (["quantize", "src"], "give OUT, or set MODEL_OUT"),
        (["quantize", "{llama}", "out", "--format", "gguf"], "unknown format 'gguf'; there are quark"),
        (["quantize", "{llama}", "out", "--compat", "quark-9"], "unknown compatibility mode 'quark-9'"),
        (
            ["quantize", "{llama}", "out", "--compat", "quark-0.13", "--format", "compressed-tensors"],
            "name only one",
        ),
        (["quantize", "{llama}", "out", "--exclude", "nothing*"], "matches no tensor"),
    ],
)
def test_a_request_without_sense_exits_with_2_and_says_why(llama: Path, arguments: list[str], message: str) -> None:
    done = run(*(argument.format(llama=llama) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_names_with_control_characters_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_\n\x1b[31mproj.weight"
    matrix = np.full((2, 2), np.nan, np.float32)
    other = name.replace("proj", "odd")
    source = write_checkpoint(tmp_path / "in", {name: ("BF16", matrix), other: ("BF16", matrix)})
    done = run("quantize", source, tmp_path / "out", "--include", "*proj.weight")
    assert done.returncode == 24
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["warning", "w8a8"]
    assert "\x1b" not in done.stderr


def test_a_failed_verification_exits_with_1(llama: Path) -> None:
    done = run("verify", llama, "--source", llama)
    assert done.returncode == 1
    assert "FAILED" in done.stdout


def test_leaving_out_part_of_a_fused_group_names_the_group(llama: Path, tmp_path: Path) -> None:
    done = run("quantize", llama, tmp_path / "out", "--exclude", "*.q_proj")
    assert done.returncode == 30
    for member in ("q_proj", "k_proj", "v_proj"):
        assert f"model.layers.0.self_attn.{member}" in done.stderr


def test_files_that_are_not_copied_are_named(llama: Path, tmp_path: Path) -> None:
    (llama / "pytorch_model.bin").write_bytes(b"never opened")
    (llama / "model.gguf").write_bytes(b"")
    (llama / "LICENSE").write_text("mine")
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    done = run("quantize", llama, tmp_path / "out")
    assert "pytorch_model.bin" in done.stdout
    assert "model.gguf" in done.stdout
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "chat_template.jinja"} <= names
    assert not names & {"pytorch_model.bin", "model.gguf"}


def test_a_closed_pipe_is_no_error(llama: Path) -> None:
    command = f"{shlex.join(W8A8)} quantize {llama} --dry-run --json | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [[], ["quantize"], ["verify"], ["inspect"], ["bench"], ["bench", "quantize"]])
def test_every_command_has_help(arguments: list[str]) -> None:
    done = run(*arguments, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


@pytest.mark.parametrize("command", [["quantize"], ["verify"], ["inspect"], ["serve"], ["bench", "quantize"]])
def test_help_shows_examples(command: list[str]) -> None:
    assert f"w8a8 {' '.join(command)}" in run(*command, "--help").stdout.split("Examples")[1]


@pytest.mark.parametrize(
    ("typed", "word", "offered"),
    [
        ("w8a8 ver", 1, ["verify"]),
        ("w8a8 quantize --format c", 3, ["compressed-tensors"]),
        ("w8a8 quantize --compat quark", 3, ["quark-0.11", "quark-0.13"]),
        ("w8a8 serve m --engine v", 4, ["vllm"]),
    ],
)
def test_the_shell_completes_commands_and_values(typed: str, word: int, offered: list[str]) -> None:
    asked = {"_W8A8_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(word)}
    script = Path(sys.executable).parent / "w8a8"
    done = subprocess.run([script], capture_output=True, text=True, check=False, env={**os.environ, **asked})
    assert done.stdout.split() == offered


@pytest.mark.parametrize("statement", ["import w8a8", "import w8a8.cli", "from w8a8.quantization import prepare"])
def test_importing_loads_neither_torch_nor_numba(statement: str) -> None:
    code = f"import sys; {statement}; print([m for m in ('torch', 'numba', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_does_not_even_load_numpy() -> None:
    code = "import sys; sys.argv = ['w8a8', '--help']\nfrom w8a8.cli import app\ntry: app()\nexcept SystemExit: pass\n"
    code += "print('numpy' in sys.modules or 'huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_with_its_own_code_and_says_what_it_means(
    capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, interruptible("nothing is lost"):
        signal.raise_signal(number)
    assert stopped.value.code == code
    assert capsys.readouterr().err == "\nw8a8: interrupted; nothing is lost\n"
    assert signal.getsignal(signal.SIGTERM) is before
