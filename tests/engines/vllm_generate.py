"""Run inside vLLM's environment: greedy tokens of a checkpoint. `vllm_generate.py FOLDER RANKS COUNT TOKEN...`"""

import json
import sys

from vllm import LLM, SamplingParams


def main() -> None:
    folder, ranks, count, *prompt = sys.argv[1:]
    model = LLM(
        model=folder,
        tensor_parallel_size=int(ranks),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=2,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=2**26,
    )
    sampling = SamplingParams(max_tokens=int(count), temperature=0, detokenize=False)
    (answer,) = model.generate([{"prompt_token_ids": [*map(int, prompt)]}], sampling)
    print(json.dumps([*answer.outputs[0].token_ids]))


if __name__ == "__main__":  # vLLM's workers import this file
    main()
