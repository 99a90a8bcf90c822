"""Run inside vLLM's environment: log-probabilities of given tokens. `vllm_logprobs.py PROMPTS OUT FOLDER...`

PROMPTS is a JSON list of lists of token ids. OUT gets, for each of the checkpoints and in it for each prompt, the
log-probabilities of the prompt's tokens but the first, given those before them.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm import LLM, SamplingParams


def log_probabilities(folder: str, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """What the checkpoint gives the prompts' tokens."""
    model = LLM(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=max(map(len, prompts)) + 1,
        max_num_seqs=2,
        kv_cache_memory_bytes=2**27,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = model.generate([{"prompt_token_ids": [*prompt]} for prompt in prompts], sampling)
    return [
        [position[token].logprob for token, position in zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def main(prompts: Path, out: Path, *folders: Path) -> None:
    asked = json.loads(prompts.read_text())
    out.write_text(json.dumps([log_probabilities(str(folder), asked) for folder in folders]))


if __name__ == "__main__":  # vLLM's workers import this file
    main(*map(Path, sys.argv[1:]))
