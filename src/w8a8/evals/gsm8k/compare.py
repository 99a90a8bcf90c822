"""`w8a8 compare` for two results of `w8a8 eval gsm8k`: checks that they are comparable, and pairs them."""

from collections.abc import Mapping
from typing import Any

from w8a8.errors import UsageError
from w8a8.evals.paired import Comparison, Flip, paired
from w8a8.reading import brief


def compare(base: Mapping[str, Any], quant: Mapping[str, Any], *, score: str = "strict") -> Comparison:
    """Pair two GSM8K results (`w8a8.evals.gsm8k.results.read`); `score` is `strict` or `flexible`.

    Raises UsageError naming the difference if they were not asked the same questions in the same way.
    """
    _check_same(base, quant)
    first, second = ({o["index"]: o for o in result["outcomes"]} for result in (base, quant))
    indices = sorted(first)
    return paired(
        [(first[i][score], second[i][score]) for i in indices],
        base=base["model"],
        quant=quant["model"],
        score=score,
        flips=[_flip(first[i], second[i], score) for i in indices if first[i][score] != second[i][score]],
        errors=(_errors(base), _errors(quant)),
    )


def _flip(base: Mapping[str, Any], quant: Mapping[str, Any], score: str) -> Flip:
    right = "base" if base[score] else "quant"
    question = base.get("question") or quant.get("question")
    return Flip(base["index"], question, base["gold"], right, base.get("answer"), quant.get("answer"))


def _errors(result: Mapping[str, Any]) -> int:
    return sum(outcome.get("error") is not None for outcome in result["outcomes"])


def _check_same(base: Mapping[str, Any], quant: Mapping[str, Any]) -> None:
    first, second = base["protocol"], quant["protocol"]
    names = sorted((first.keys() | second.keys()) - {"concurrency"})
    differing = [
        " ".join((brief(n), brief(first.get(n)), "and", brief(second.get(n))))
        for n in names
        if first.get(n) != second.get(n)
    ]
    texts = all("question" in outcome for result in (base, quant) for outcome in result["outcomes"])
    if not differing and _asked(base, texts=texts) != _asked(quant, texts=texts):
        differing = ["the questions"]
    if differing:
        raise UsageError(
            f"not comparable, the models were asked differently: {'; '.join(differing[:10])}; run "
            "`w8a8 eval gsm8k` again, with the same options for both"
        )


def _asked(result: Mapping[str, Any], *, texts: bool) -> set[tuple[Any, ...]]:
    names = ("index", "gold", "question") if texts else ("index", "gold")
    return {tuple(outcome[name] for name in names) for outcome in result["outcomes"]}
