"""`w8a8 bench quality`: the KL divergence from BF16 that each way of quantizing a model costs, in one table.

Three kinds of text are measured apart: GSM8K's test questions with their answers, English prose (`prose.txt` beside
this file, written for it), and a kind that no calibration saw (German prose, `german.txt`, written for it too). The
recipes and the peers that calibrate all use the same text of the first two kinds: the built-in calibration text, mostly
English prose, and about as much of GSM8K's training questions. No measured text is in it.

Everything is computed in float32, so that only quantization counts. BF16 arithmetic alone, which every engine adds to
all of them alike, has its own row.

Peers are called as their documentation shows, each in its own environment, and their checkpoints are measured as ours
are, by `eval kld` on the embedded engine. llm-compressor's SmoothQuant comes twice: with the mappings that it infers,
and with mappings given by hand, because those it infers for Gemma name a norm that does not feed the layers it
rescales.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w8a8.bench.peers import CALIBRATED_PEERS, PEERS, Peer
from w8a8.bench.process import timed
from w8a8.calibrate.request import SAMPLES, TOKENS
from w8a8.checkpoint import resolve
from w8a8.errors import UnsupportedModelError, W8A8Error, first_line
from w8a8.evals.gsm8k.questions import load
from w8a8.evals.kld import run as kld
from w8a8.evals.kld.windows import choose
from w8a8.quantization import Options, quantize
from w8a8.terminal.output import plain_table
from w8a8.terminal.wording import clean
from w8a8.texts import samples as calibration_text
from w8a8.texts.files import Text

if TYPE_CHECKING:
    from w8a8.evals.kld.models import Dtype

EXAMPLES = 150
"""Number of GSM8K's training examples to calibrate on: with the built-in text, enough for the default samples."""
ARITHMETIC = "the source, in BF16"
"""The row of the source itself, computed in BF16 and not quantized."""
OURS: Mapping[str, Options] = {
    "w8a8 rtn": Options(),
    "w8a8 smooth": Options(recipe="smooth"),
    "w8a8 smooth+gptq": Options(recipe="smooth+gptq"),
    "w8a8 rotate+smooth+gptq": Options(recipe="rotate+smooth+gptq"),
    "w8a8 auto": Options(recipe="auto"),
    "w8a8 smooth+gptq, 5% in BF16": Options(recipe="smooth+gptq", keep_bf16="5%"),
}
"""Options by the name of a row."""
BASELINE = "w8a8 rtn"
"""The row that the others are compared with."""


@dataclass(frozen=True, slots=True)
class Score:
    """Nats per token (mean, 99th percentile), and the share of tokens whose likeliest prediction is the same."""

    mean: float
    p99: float
    top1: float


@dataclass(frozen=True, slots=True)
class Row:
    """One way of quantizing: its seconds (None for the source), the result's bytes, and its score by kind of text."""

    name: str
    seconds: float | None
    nbytes: int
    scores: Mapping[str, Score]


@dataclass(frozen=True, slots=True)
class QualityResult:
    """The table; `tokens` measured by kind of text; `failed` holds a reason for each peer that did not run."""

    model: str
    tokens: Mapping[str, int]
    rows: tuple[Row, ...]
    failed: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values."""
        return asdict(self)


def bench(
    model: str,
    *,
    folder: Path,
    gsm8k: Path | None = None,
    prose: Path | None = None,
    other: Path | None = None,
    tokens: int = 4096,
    samples: int = SAMPLES,
    peers: bool = False,
    notice: Callable[[str], None] = lambda _: None,
) -> QualityResult:
    """Quantize `model` in every way, measure `tokens` tokens of each kind of text, and remove the results.

    Recipes and peers that calibrate use `samples` samples of 512 tokens. Raises the errors of quantizing and of `eval
    kld`; a peer that fails, and a recipe that does not take the model, gets its reason in the result, and the others go
    on.
    """
    # 1) The texts to measure and to calibrate on.
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    source, out = resolve(model).path, folder / "w8a8-bench-out"
    texts = measured_texts(gsm8k, prose, other)
    calibration = folder / "w8a8-bench-calibration.jsonl"
    calibration.write_text("".join(f"{json.dumps({'text': text})}\n" for text in _calibration(gsm8k)), encoding="utf-8")
    # 2) The source itself, in BF16.
    notice(ARITHMETIC)
    arithmetic = {kind: _score(source, source, text, tokens, "bfloat16") for kind, text in texts.items()}
    rows = [Row(ARITHMETIC, None, _size(source), arithmetic)]
    # 3) Every way of quantizing: quantize, measure, remove.
    failed: dict[str, str] = {}
    jobs: dict[str, Callable[[], None]] = {
        **{name: _ours(source, out, calibration, samples, options) for name, options in OURS.items()},
        **{peer.name: _theirs(peer, folder, source, out, calibration, samples) for peer in _peers(wanted=peers)},
    }
    for name, make in jobs.items():
        notice(name)
        shutil.rmtree(out, ignore_errors=True)
        try:
            start = time.monotonic()
            make()
            seconds = time.monotonic() - start
            scores = {kind: _score(source, out, text, tokens) for kind, text in texts.items()}
            rows.append(Row(name, seconds, _size(out), scores))
            notice(", ".join(f"{kind} {score.mean:.5f} nats, top-1 {score.top1:.1%}" for kind, score in scores.items()))
        except W8A8Error as error:
            if name in OURS and not isinstance(error, UnsupportedModelError):
                raise
            failed[name] = first_line(error)
    shutil.rmtree(out, ignore_errors=True)
    counts = {kind: kld.prepare(source, source, text, tokens=tokens).tokens for kind, text in texts.items()}
    return QualityResult(model, counts, tuple(rows), failed)


def show(result: QualityResult, say: Callable[[Any], None]) -> None:
    """Print the tables for a person; `say` prints text and Rich tables."""
    counted = ", ".join(f"{count:,} tokens of {kind}" for kind, count in result.tokens.items())
    say(f"{clean(result.model)}, KL divergence from the source in nats, computed in float32, over {counted}")
    base = next(row for row in result.rows if row.name == BASELINE)
    for kind in result.tokens:
        table = plain_table(kind, "KLD", "x rtn", "p99", "top-1", "MB", "s", left=1)
        for row in result.rows:
            score = row.scores[kind]
            table.add_row(
                row.name,
                f"{score.mean:.5f}",
                f"{score.mean / base.scores[kind].mean:.3f}",
                f"{score.p99:.3f}",
                f"{score.top1:.1%}",
                f"{row.nbytes / 1e6:.0f}",
                "" if row.seconds is None else f"{row.seconds:.0f}",
            )
        say(table)
    for name, reason in result.failed.items():
        say(f"{clean(name)} did not run: {clean(reason)}")


def measured_texts(gsm8k: Path | None, prose: Path | None, other: Path | None) -> dict[str, Text]:
    """Return the texts to measure, by kind; `other` is of a kind that no calibration saw."""
    return {
        "GSM8K": choose(data=gsm8k),
        "prose": choose(text=prose) if prose else _own("prose.txt"),
        **({other.name: choose(text=other)} if other else {"German": _own("german.txt")}),
    }


def _own(name: str) -> Text:
    """A text beside this file."""
    return Text(name, (files("w8a8.bench").joinpath(name).read_text(encoding="utf-8"),))


def _calibration(gsm8k: Path | None) -> Iterator[str]:
    """Yield texts to calibrate on: the built-in text's records, and between them GSM8K's training examples."""
    records = calibration_text.load(None).records
    examples = load(gsm8k, shots=EXAMPLES).examples
    each = -(-len(examples) // len(records))
    for number, record in enumerate(records):
        yield record if isinstance(record, str) else "\n".join(turn["content"] for turn in record)
        yield from (f"{e.text}\n{e.solution}" for e in examples[number * each : (number + 1) * each])


def _ours(source: Path, out: Path, calibration: Path, samples: int, options: Options) -> Callable[[], None]:
    if options.recipe is not None:
        options = replace(options, calibration=str(calibration), samples=samples, tokens=TOKENS)

    def make() -> None:
        quantize(source, out, options)

    return make


def _peers(*, wanted: bool) -> Sequence[Peer]:
    return (*PEERS, *CALIBRATED_PEERS) if wanted else ()


def _theirs(peer: Peer, folder: Path, source: Path, out: Path, calibration: Path, samples: int) -> Callable[[], None]:
    def make() -> None:
        run = timed([*peer.command(folder, source, out), str(calibration), str(samples), str(TOKENS)])
        if run.returncode != 0 or not (out / "config.json").is_file():
            raise W8A8Error(f"ended with {run.returncode}: {run.complaint}")

    return make


def _score(source: Path, out: Path, text: Text, tokens: int, dtype: "Dtype" = "float32") -> Score:
    found = kld.run(kld.prepare(source, out, text, tokens=tokens, dtypes=("float32", dtype)))
    return Score(found.mean, found.p99, found.agreement)


def _size(out: Path) -> int:
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))
