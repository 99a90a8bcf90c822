"""The vLLM command, as a pure function of config, GPUs and options."""

import subprocess
from typing import Any

import pytest
from hypothesis import given as generated
from hypothesis import settings
from hypothesis import strategies as st

from w8a8.errors import NoConfigError, UsageError
from w8a8.machine import describe
from w8a8.serve.vllm import TEXT_ONLY, Options, command, given, shell, tensor_parallel

RDNA3 = describe("4x24GiB:gfx1100")
HOPPER = describe("2x141GiB:sm_90")
LOCAL = ["--host", "127.0.0.1"]


def heads(attention: int, kv: int, **more: Any) -> dict[str, Any]:
    return {"num_attention_heads": attention, "num_key_value_heads": kv, **more}


def test_gpus_decide_parallelism_and_rdna_the_kernels() -> None:
    assert command("m", Options(), gpus=RDNA3, context=8192) == [
        *("vllm", "serve", "m", "--tensor-parallel-size", "4", "--max-model-len", "8192"),
        *("--gpu-memory-utilization", "0.9", "--linear-backend", "triton", *LOCAL),
    ]
    assert "--linear-backend" not in command("m", Options(), gpus=HOPPER, context=8192)


def test_instinct_keeps_vllm_s_own_choice_of_kernels() -> None:
    assert "--linear-backend" not in command("m", Options(), gpus=describe("192GiB:gfx942"), context=8192)


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


@pytest.mark.parametrize(
    ("config", "gpus", "size"),
    [
        (heads(32, 16), 4, 4),
        (heads(32, 8), 3, 2),  # 3 does not divide the heads
        (heads(8, 1), 8, 8),  # one KV head, on every GPU
        (heads(24, 8), 6, 4),  # 6 divides the heads, but shares 8 KV heads unevenly
        (heads(12, 2), 6, 6),
        (heads(8, 8, intermediate_size=6), 8, 2),
        (heads(8, 8, intermediate_size=[4096, 6]), 8, 2),
        (heads(8, 8, moe_intermediate_size=768, intermediate_size=None), 8, 8),
        ({"text_config": heads(16, 16, num_global_key_value_heads=6)}, 4, 2),
        ({"text_config": heads(16, 16, per_layer_config={"05": {"num_key_value_heads": 6}})}, 4, 2),
        ({}, 3, 3),  # nothing to split by heads
    ],
)
def test_the_most_gpus_that_can_share_the_model_are_used(config: dict[str, Any], gpus: int, size: int) -> None:
    assert tensor_parallel(config, gpus) == size


@generated(
    attention=st.integers(1, 128), kv=st.integers(1, 128), intermediate=st.integers(1, 65536), gpus=st.integers(1, 16)
)
def test_a_size_chosen_is_legal_and_none_larger_is(attention: int, kv: int, intermediate: int, gpus: int) -> None:
    def legal(n: int) -> bool:
        return attention % n == 0 and intermediate % n == 0 and (kv % n == 0 or n % kv == 0)

    size = tensor_parallel(heads(attention, kv, intermediate_size=intermediate), gpus)
    assert legal(size)
    assert not any(legal(n) for n in range(size + 1, gpus + 1))


def test_a_size_asked_for_is_taken_or_refused_with_the_possible_ones() -> None:
    assert tensor_parallel(heads(32, 16), 4, 2) == 2
    with pytest.raises(UsageError, match="32 attention heads; possible here: 1, 2, 4"):
        tensor_parallel(heads(32, 16), 4, 3)
    with pytest.raises(UsageError, match="4 GPUs"):
        tensor_parallel(heads(32, 16), 4, 8)


@pytest.mark.parametrize("count", [0, -2, "8", True, 1.5, [8, "x"]])
def test_a_garbled_count_is_an_error_that_names_it(count: object) -> None:
    with pytest.raises(NoConfigError, match="num_attention_heads"):
        tensor_parallel({"num_attention_heads": count}, 2)


@settings(max_examples=50)
@generated(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1))
def test_a_shell_reads_back_what_is_printed(argv: list[str]) -> None:
    done = subprocess.run(["sh", "-c", f"printf '%s\\0' {shell(argv)}"], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == argv


def test_the_printed_command_has_a_flag_to_a_line() -> None:
    text = shell(["vllm", "serve", "my model", "--limit-mm-per-prompt", TEXT_ONLY, "--x"])
    assert text == ('vllm serve \'my model\' \\\n  --limit-mm-per-prompt \'{"image":0,"audio":0,"video":0}\' \\\n  --x')
