"""Reading assembly: the inner loop, and the width of loads."""

import pytest

from w8a8.bench import assembly
from w8a8.bench.assembly import inner_loop

AMD_TEXT = """
kernel:
  s_mov_b32 s0, 0
.LBB0_1:                                ; outer
  v_mov_b32 v0, 0
.LBB0_2:                                ; inner
  buffer_load_b128 v[0:3], v4, s[0:3], 0 offen
  v_wmma_i32_16x16x16_iu8 v[8:15], v[0:3], v[4:7], v[8:15]
  ; a comment
  s_cbranch_scc1 .LBB0_2
  v_add_f32 v1, v1, v1
  s_cbranch_scc0 .LBB0_1
.LBB0_3:
  s_branch .LBB0_3
"""


def test_the_inner_loop_is_the_shortest_with_matrix_instructions() -> None:
    body = inner_loop(AMD_TEXT)
    assert [line.split()[0] for line in body] == ["buffer_load_b128", "v_wmma_i32_16x16x16_iu8", "s_cbranch_scc1"]
    with pytest.raises(ValueError, match="no loop"):
        inner_loop(AMD_TEXT.replace("v_wmma_i32_16x16x16_iu8", "v_nop"))


@pytest.mark.parametrize(
    ("line", "bits"),
    [
        ("buffer_load_b128 v[0:3]", 128),
        ("global_load_b32 v0", 32),
        ("global_load_dwordx4 v[0:3]", 128),
        ("buffer_load_dword v0", 32),
        ("buffer_load_u8 v0", 8),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R1], desc", 128),
        ("LDG.E.64 R2", 64),
        ("LDG.E.U8 R2", 8),
        ("LDG.E R2", 32),
        ("ds_load_b128 v[0:3]", 0),
    ],
)
def test_the_width_of_a_load_is_read_from_its_name(line: str, bits: int) -> None:
    found = assembly._AMD_LOAD.search(line) or assembly._NVIDIA_LOAD.search(line)
    assert (assembly._bits(found) if found else 0) == bits
