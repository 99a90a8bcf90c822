"""The vLLM command, as a pure function of GPUs and options."""

import subprocess

import pytest
from hypothesis import given as generated
from hypothesis import settings
from hypothesis import strategies as st

from w8a8.machine import describe
from w8a8.serve.vllm import TEXT_ONLY, Options, command, given, shell

RDNA3 = describe("4x24GiB:gfx1100")
HOPPER = describe("2x141GiB:sm_90")
BLACKWELL = describe("32GiB:sm_120")
LOCAL = ["--host", "127.0.0.1"]


def test_gpus_decide_parallelism_and_rdna_the_kernels() -> None:
    assert command("m", Options(), gpus=RDNA3, context=8192) == [
        *("vllm", "serve", "m", "--tensor-parallel-size", "4", "--max-model-len", "8192"),
        *("--gpu-memory-utilization", "0.9", "--linear-backend", "triton", *LOCAL),
    ]
    assert "--linear-backend" not in command("m", Options(), gpus=HOPPER, context=8192)


def test_instinct_keeps_vllm_s_own_choice_of_kernels() -> None:
    assert "--linear-backend" not in command("m", Options(), gpus=describe("192GiB:gfx942"), context=8192)


def test_blackwell_gets_a_kernel_that_can_run_int8() -> None:
    argv = command("m", Options(), gpus=BLACKWELL, context=8192, int8=True)
    assert given(argv)["--linear-backend"] == "triton"
    assert "--linear-backend" not in command("m", Options(), gpus=BLACKWELL, context=8192)
    assert "--linear-backend" not in command("m", Options(), gpus=HOPPER, context=8192, int8=True)
    insisted = command("m", Options(extra=("--linear-backend", "cutlass")), gpus=BLACKWELL, context=8192, int8=True)
    assert insisted.count("--linear-backend") == 1


def test_on_a_cpu_the_kv_cache_has_a_size_and_nothing_is_split() -> None:
    argv = command("m", Options(), gpus=(), context=2048, kv_cache_bytes=2**30)
    assert argv == ["vllm", "serve", "m", "--max-model-len", "2048", "--kv-cache-memory-bytes", str(2**30), *LOCAL]


def test_several_nodes_are_stages_of_a_pipeline_on_ray() -> None:
    argv = command("m", Options(nodes=2), gpus=HOPPER, context=8192)
    assert argv[3:9] == [
        *("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"),
        *("--distributed-executor-backend", "ray"),
    ]


def test_options_become_flags_only_where_they_differ_from_vllm_s_defaults() -> None:
    options = Options(host="::", port=9000, gpu_memory_utilization=0.85, text_only=True, trust_remote_code=True)
    argv = command("org/m", options, gpus=HOPPER, context=100, revision="abc")
    assert argv[5:] == [
        *("--max-model-len", "100", "--gpu-memory-utilization", "0.85", "--limit-mm-per-prompt", TEXT_ONLY),
        *("--trust-remote-code", "--revision", "abc", "--host", "::", "--port", "9000"),
    ]


@pytest.mark.parametrize(
    "passed_on",
    [
        ["--max-model-len", "4096"],
        ["--max_model_len=4096"],
        ["-tp", "2"],
        ["--limit-mm-per-prompt.image", "1"],
        ["--enforce-eager", "--gpu-memory-utilization=0.5", "--host", "h"],
    ],
)
def test_what_is_passed_on_stands_last_untouched_and_once(passed_on: list[str]) -> None:
    options = Options(text_only=True, extra=tuple(passed_on))
    argv = command("m", options, gpus=RDNA3, context=8192)
    assert argv[-len(passed_on) :] == passed_on
    assert not given(argv[: -len(passed_on)]).keys() & given(passed_on).keys()


def test_given_reads_flags_with_their_values() -> None:
    extra = ["-tp", "2", "--port=80", "--enforce-eager", "--served-model-name", "a", "b", "--max_num_seqs", "4"]
    assert given(extra) == {
        "--tensor-parallel-size": "2",
        "--port": "80",
        "--enforce-eager": "",
        "--served-model-name": "a",
        "--max-num-seqs": "4",
    }


@settings(max_examples=50)
@generated(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1))
def test_a_shell_reads_back_what_is_printed(argv: list[str]) -> None:
    done = subprocess.run(["sh", "-c", f"printf '%s\\0' {shell(argv)}"], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == argv


def test_the_printed_command_has_a_flag_to_a_line() -> None:
    text = shell(["vllm", "serve", "my model", "--limit-mm-per-prompt", TEXT_ONLY, "--x"])
    assert text == ('vllm serve \'my model\' \\\n  --limit-mm-per-prompt \'{"image":0,"audio":0,"video":0}\' \\\n  --x')
