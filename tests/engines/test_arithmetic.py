"""One layer on vLLM's INT8 kernel and on ours: equal codes, equal scales, and equal sums where vLLM's are exact.

Whole models cannot be compared so closely: one code that rounds the other way because an activation differs in its last
bit moves what follows by a whole quantization step, and after some layers by as much as quantizing moved it at all.
"""

from collections.abc import Mapping

import pytest
import torch

from tests.engines.int8 import Int8Kernel, computed, cpu_has_vnni, exact_sums, saturated_sums
from tests.engines.layers import HARMLESS, LARGEST, MODULES, Tried
from w8a8.runtime.linear import quantize_tokens


@pytest.mark.parametrize("module", MODULES)
def test_a_layer_of_the_real_model_computes_what_vllm_computes(
    module: str, vllm_layers: Mapping[str, Tried], vllm_int8: Int8Kernel
) -> None:
    tried = vllm_layers[module]
    for name, x in tried.inputs.items():
        theirs, y = tried.in_vllm[name], tried.layer(x)
        codes, scale = quantize_tokens(x)
        assert torch.equal(codes, theirs.codes), name
        assert torch.equal(scale.reshape(-1), theirs.scale.reshape(-1)), name
        assert torch.equal(y, computed(exact_sums, tried.layer, x)), name
        # They scale in another order, so the last bits of FP32 may differ, and what that rounds to in BF16.
        torch.testing.assert_close(
            y if vllm_int8.exact else computed(vllm_int8.sums, tried.layer, x),
            theirs.y,
            rtol=1e-6 if x.dtype == torch.float32 else 2**-7,
            atol=0,
            msg=name,
        )


@pytest.mark.parametrize(("name", "saturates"), [(LARGEST, True), (HARMLESS, False)])
def test_vllm_s_sums_saturate_only_on_cpus_without_vnni_and_only_with_large_weights(
    name: str, saturates: bool, vllm_layers: Mapping[str, Tried], vllm_int8: Int8Kernel
) -> None:
    tried = vllm_layers[name]
    (x,), (theirs,) = tried.inputs.values(), tried.in_vllm.values()
    exact, saturated = (sums(theirs.codes, tried.layer.weight).float() for sums in (exact_sums, saturated_sums))
    assert torch.equal(exact, saturated) != saturates
    assert torch.equal(theirs.y, exact if cpu_has_vnni() else saturated)
    assert torch.equal(tried.layer(x), exact)
    assert vllm_int8.exact == cpu_has_vnni()
