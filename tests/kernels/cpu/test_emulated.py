"""Instruction sets that this CPU lacks, run in emulators: every sum of every tile is exact."""

import shutil
from dataclasses import replace

import pytest
from emulate_tiles import EMULATED, QEMU, Emulated

pytestmark = pytest.mark.slow

ARM, OLD_ARM = (next(one for one in EMULATED if one.processor == name) for name in ("neoverse-n1", "cortex-a57"))


@pytest.mark.parametrize(("tool", "sets"), [(QEMU, {"i8mm", "dotprod"}), ("bochs", {"avx512vnni", "avx2"})])
def test_every_set_gives_the_exact_sums(tool: str, sets: set[str]) -> None:
    if not shutil.which(tool):
        pytest.skip("apt-get install qemu-user binutils-aarch64-linux-gnu bochs bochs-term")
    possible = [one for one in EMULATED if one.emulator == tool and one.possible()]
    assert {one.cpu.name for one in possible} >= sets
    for one in possible:
        assert all(one.run(one.trials())), one


@pytest.mark.skipif(not ARM.possible(), reason="apt-get install qemu-user binutils-aarch64-linux-gnu")
def test_an_emulated_processor_has_no_instruction_that_the_real_one_lacks() -> None:
    """So that it is the instruction that runs where there is one."""
    tried = ARM.trials()[:1]
    with pytest.raises(ValueError, match="ended before its end"):
        Emulated(ARM.cpu, OLD_ARM.processor).run(tried)


@pytest.mark.skipif(not ARM.possible(), reason="apt-get install qemu-user binutils-aarch64-linux-gnu")
def test_a_wrong_sum_is_noticed() -> None:
    trial = ARM.trials()[0]
    assert ARM.run([trial, replace(trial, expected=trial.expected + 1)]) == [True, False]
