"""Result files as `w8a8 eval` writes them, about questions that nobody asked."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from w8a8.evals.statistics import wilson


def gsm8k(model: str, right: Sequence[bool], answers: Mapping[int, str] | None = None) -> dict[str, Any]:
    """A GSM8K result with these outcomes, and some answers in particular."""
    outcomes = [
        {
            "index": i,
            "question": f"Ana has {i + 2} boxes with {i + 3} pencils each and gives 4 pencils away. How many are left?",
            "gold": str((i + 2) * (i + 3) - 4),
            "answer": (answers or {}).get(
                i, f"{i + 2} boxes of {i + 3} pencils are {(i + 2) * (i + 3)}.\n#### {(i + 2) * (i + 3) - 4 * hit}"
            ),
            "strict": hit,
            "flexible": hit,
            "finish_reason": "stop",
        }
        for i, hit in enumerate(right)
    ]
    score = {"correct": sum(right), "accuracy": sum(right) / len(right), "interval": wilson(sum(right), len(right))}
    return {
        "kind": "w8a8.gsm8k",
        "schema": 1,
        "w8a8": "0.1.0",
        "model": model,
        "base_url": "http://127.0.0.1:8000/v1",
        "protocol": {
            "dataset": "openai/gsm8k",
            "split": "test",
            "questions": len(right),
            "shots": 8,
            "endpoint": "chat",
            "temperature": 0.0,
            "max_tokens": 512,
            "concurrency": 16,
            "answer_format": "#### <answer>",
            "prompt_sha256": "0" * 64,
        },
        "versions": {},
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 100.0,
        "tokens": {"prompt": 1000, "completion": 2000},
        "questions": len(right),
        "strict": score,
        "flexible": score,
        "cut_off": 3,
        "empty": 1,
        "errors": 0,
        "outcomes": outcomes,
    }


def kld() -> dict[str, Any]:
    """A KL divergence result."""
    edges = [0.0, *(10 ** (-6 + i / 5) for i in range(36))]
    counts = [round(400 * math.exp(-(((i - 20) / 6) ** 2))) for i in range(len(edges) - 1)]
    return {
        "kind": "w8a8.kld",
        "schema": 1,
        "w8a8": "0.1.0",
        "reference": "gemma-3-270m",
        "candidate": "gemma-3-270m-W8A8",
        "text": {"name": "licence.txt", "sha256": "0" * 64, "tokens": sum(counts) + 1},
        "tokens": sum(counts),
        "kl": {"mean": 0.0286, "median": 0.0113, "p99": 0.241, "max": 2.71, "interval": [0.0271, 0.0302]},
        "top1": {"agreement": 0.912, "interval": [0.901, 0.922]},
        "perplexity": {"reference": 14.21, "candidate": 14.55},
        "positions": [
            {"first": 64 * i, "last": 64 * i + 63, "tokens": 64, "mean_kl": 0.05 / (i + 1) + 0.02} for i in range(8)
        ],
        "histogram": [{"from": a, "to": b, "count": n} for a, b, n in zip(edges, edges[1:], counts, strict=False)],
        "seconds": 10.0,
        "versions": {},
    }


def lm(model: str, right: Sequence[bool]) -> dict[str, Any]:
    """A result of lm-evaluation-harness: a task, a group of two, all with these outcomes, and one that is only read."""

    def metric(name: str, value: float, **more: Any) -> dict[str, Any]:
        return {"metric": name, "filter": "none", "value": value, "stderr": 0.0123, "higher_is_better": True, **more}

    share = sum(right) / len(right)
    accuracy, bits = metric("acc", share), metric("bits_per_byte", 0.75, stderr=None, higher_is_better=False)
    documents = [f"{i:016x}" for i in range(len(right))]
    scores = {"acc": [int(hit) for hit in right]}
    common = {"version": "1.0", "shots": 5, "of": 1000, "documents": documents}
    names = ("arc_easy", "mmlu_anatomy", "mmlu_virology")
    return {
        "kind": "w8a8.lm",
        "schema": 1,
        "w8a8": "0.1.0",
        "model": model,
        "base_url": "http://127.0.0.1:8000/v1",
        "protocol": {
            "tasks": ["arc_easy", "mmlu", "prose"],
            "shots": None,
            "limit": None,
            "chat": False,
            "tokenized": True,
            "context": 2048,
            "concurrency": 16,
        },
        "versions": {"lm-eval": "0.4.13"},
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 100.0,
        "rows": [
            {"name": "arc_easy", "tasks": ["arc_easy"], "metrics": [accuracy]},
            {"name": "mmlu", "tasks": list(names[1:]), "metrics": [accuracy]},
            {"name": "prose", "tasks": ["prose"], "metrics": [bits]},
        ],
        "tasks": [
            *({"name": name, **common, "metrics": [accuracy], "scores": scores} for name in names),
            {"name": "prose", **common, "metrics": [bits], "scores": {}},
        ],
    }


def pair(questions: int, seed: int = 0) -> tuple[list[bool], list[bool]]:
    """Which questions a model and its quantized self get right: about 70%, a few of them not the same."""
    random_ = random.Random(seed)
    base = [random_.random() < 0.7 for _ in range(questions)]
    return base, [hit != (random_.random() < 0.04) for hit in base]


def write(path: Path, result: Mapping[str, Any]) -> Path:
    """Write `result` as JSON."""
    path.write_text(json.dumps(result))
    return path
