"""A quantized mixture of experts in use: served, compared with its source, counted."""

import openai
import pytest

from tests.runtime.conftest import Mixtures
from tests.runtime.moe import tensors_of
from tests.serve.embedded.servers import message, serving
from w8a8.checkpoint import Checkpoint
from w8a8.evals.kld.run import prepare, run
from w8a8.memory.ram import ram_needed
from w8a8.texts.files import Text

pytestmark = pytest.mark.slow

WORDS = Text("words", ("".join(f" w{7 * n % 300}" for n in range(60)),))


@pytest.mark.engine
def test_it_answers_over_http(mixtures: Mixtures) -> None:
    _, out = mixtures("qwen3_moe")
    with serving(out, "moe") as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
        answer = client.chat.completions.create(model="moe", messages=message(" w12 w40"), max_tokens=5, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
def test_it_diverges_little_from_its_source(mixtures: Mixtures, stream: bool) -> None:
    source, out = mixtures("qwen3_moe")
    result = run(prepare(source, out, WORDS, context=32, stream=stream))
    assert 0 < result.mean < 0.5
    assert run(prepare(source, source, WORDS, context=32, stream=stream)).mean == 0


def test_experts_are_counted_as_they_are_stored(mixtures: Mixtures) -> None:
    source, out = mixtures("qwen3_moe")
    stored = [sum(tensor.nbytes for tensor in tensors_of(folder).values()) for folder in (source, out)]
    counted = [ram_needed(Checkpoint.open(folder), 64) for folder in (source, out)]
    assert counted[0] - counted[1] == stored[0] - stored[1] > 0
