"""A tokenizer is tried in a process of its own: a prompt that keeps it busy, or fills memory, is refused."""

from collections.abc import Iterator

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers

from tests.serve.embedded.servers import ENDLESS, word_tokenizer
from w8a8.serve.embedded.model import check_decoder
from w8a8.serve.embedded.rehearsing import Rehearsal
from w8a8.serve.embedded.worker import RefusedError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rehearsal() -> Iterator[Rehearsal]:
    tokenizer: Tokenizer = word_tokenizer()._tokenizer
    swelling = normalizers.Replace("#", "#" * 2**20)
    tokenizer.normalizer = normalizers.Sequence([tokenizer.normalizer, swelling])
    made = Rehearsal(tokenizer)
    yield made
    made.close()


def test_tokens_are_counted(rehearsal: Rehearsal) -> None:
    assert rehearsal.tokenize(" w1 w2 w3") == 3
    assert rehearsal.tokenize("") == 0


@pytest.mark.parametrize(("text", "reason"), [(ENDLESS, "did not end within 5 s"), ("#" * 2**12, "memory")])
def test_what_takes_too_much_is_refused_and_the_next_is_not(rehearsal: Rehearsal, text: str, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        rehearsal.tokenize(text)
    assert rehearsal.tokenize(" w1 w2") == 2


def test_a_decoder_with_a_pattern_is_refused() -> None:
    tokenizer: Tokenizer = word_tokenizer()._tokenizer
    check_decoder(tokenizer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace('{"Regex":', ""), decoders.Fuse()])
    check_decoder(tokenizer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex("(a|a)+$"), ""), decoders.Fuse()])
    with pytest.raises(ValueError, match="regular expression"):
        check_decoder(tokenizer)
