"""A set is used if it computes right, and only then."""

from dataclasses import replace

import pytest

from w8a8.kernels.cpu import chosen
from w8a8.kernels.cpu.instructions import SETS, InstructionSet, available

GENERIC = SETS[-1]
WRONG = replace(GENERIC, name="wrong", product="fshl", intrinsic="llvm.fshl.v4i32", code=1, flips=True)
"""A set whose instruction every CPU has, and which shifts where it should multiply."""


@pytest.mark.parametrize("cpu", available(), ids=lambda cpu: cpu.name)
def test_every_set_of_this_cpu_proves_itself(cpu: InstructionSet) -> None:
    assert chosen.proves(cpu)


def test_a_set_that_computes_wrong_sums_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    anew: list[bool] = []
    monkeypatch.setattr(chosen, "compile_anew", lambda: anew.append(True))
    monkeypatch.setattr(chosen, "available", lambda: (WRONG, GENERIC))
    monkeypatch.setattr(chosen, "instruction_set", lambda: WRONG)
    with pytest.warns(UserWarning, match=r"fshl \(wrong\) computes wrong sums, so the INT8 kernel does without"):
        assert chosen.trusted() is GENERIC
    assert anew == [True]


@pytest.mark.filterwarnings("error")
def test_one_that_computes_right_is_used_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "compile_anew", lambda: pytest.fail("its code is kept like all other"))
    for cpu in available():
        monkeypatch.setattr(chosen, "instruction_set", lambda cpu=cpu: cpu)
        assert chosen.trusted() is cpu
