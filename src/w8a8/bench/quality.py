"""`w8a8 bench quality`: what each way of quantizing a model costs, in KL divergence from BF16, in one table.

Two kinds of text are measured apart: GSM8K's test questions with their answers, and English prose (by default
`prose.txt` beside this file, written for it). The recipes, and the peers that calibrate, do so on one and the same text
of both kinds, in which none of the measured is: the built-in calibration text, mostly prose, and GSM8K's training
questions, about as much.

Everything is computed in float32, so that only quantization counts; what BF16 arithmetic does by itself, which every
engine adds to all of them alike, has a row of its own.

Peers are called as their documentation does, each in an environment of its own, and their checkpoints are measured as
ours are, by `eval kld` on the embedded engine. llm-compressor's SmoothQuant comes twice: with the mappings it infers,
and with ones given by hand, since those it infers for Gemma name a norm that does not feed the layers it rescales. It
takes Gemma 3's norms, which multiply by 1 + weight, for ones that multiply by the weight.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import w8a8
from w8a8.bench.peers import CALIBRATED_PEERS, PEERS, Peer
from w8a8.bench.process import timed
from w8a8.calibrate.request import SAMPLES, TOKENS
from w8a8.checkpoint import resolve
from w8a8.errors import W8A8Error
from w8a8.evals.gsm8k.questions import load
from w8a8.evals.kld import run as kld
from w8a8.evals.kld.windows import choose
from w8a8.quantization import Options
from w8a8.texts import samples as calibration_text
from w8a8.texts.files import Text

if TYPE_CHECKING:
    from w8a8.evals.kld.models import Dtype

EXAMPLES = 150
"""GSM8K's training examples to calibrate on; with the built-in text, as much as the default samples take."""
ARITHMETIC = "the source, in BF16"
"""The row for what is computed in BF16 and not quantized at all."""
OURS: Mapping[str, Mapping[str, Any]] = {
    "w8a8 rtn": {},
    "w8a8 smooth": {"recipe": "smooth"},
    "w8a8 smooth+gptq": {"recipe": "smooth+gptq"},
    "w8a8 auto": {"recipe": "auto"},
    "w8a8 smooth+gptq, 5% in BF16": {"recipe": "smooth+gptq", "keep_bf16": "5%"},
}
BASELINE = "w8a8 rtn"


@dataclass(frozen=True, slots=True)
class Score:
    """Nats per token, and the share of tokens that both think likeliest."""

    mean: float
    p99: float
    top1: float


@dataclass(frozen=True, slots=True)
class Row:
    """One way of quantizing: how long it took in seconds, None where nothing was done, the result's size in bytes, its
    score by kind of text."""

    name: str
    seconds: float | None
    nbytes: int
    scores: Mapping[str, Score]


@dataclass(frozen=True, slots=True)
class QualityResult:
    """The table; `tokens` by kind of text."""

    model: str
    tokens: Mapping[str, int]
    rows: tuple[Row, ...]
    failed: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The table as plain JSON values."""
        return asdict(self)


def bench(
    model: str,
    *,
    folder: Path,
    gsm8k: Path | None = None,
    prose: Path | None = None,
    tokens: int = 4096,
    samples: int = SAMPLES,
    peers: bool = False,
    notice: Callable[[str], None] = lambda _: None,
) -> QualityResult:
    """Quantize `model` in every way there is, measure `tokens` tokens of each kind, and remove the results.

    Those that calibrate do so on `samples` samples of 512 tokens.

    Raises what quantizing and `eval kld` raise; a peer that fails is noted, and the others go on.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    source, out = resolve(model).path, folder / "out"
    texts = _texts(gsm8k, prose)
    calibration = folder / "calibration.jsonl"
    calibration.write_text("".join(f"{json.dumps({'text': text})}\n" for text in _calibration(gsm8k)), encoding="utf-8")
    notice(ARITHMETIC)
    arithmetic = {kind: _score(source, source, text, tokens, "bfloat16") for kind, text in texts.items()}
    rows = [Row(ARITHMETIC, None, _size(source), arithmetic)]
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
        except (W8A8Error, subprocess.CalledProcessError) as error:
            if name in OURS:
                raise
            failed[name] = _last_line(error)
    shutil.rmtree(out, ignore_errors=True)
    counts = {kind: kld.prepare(source, source, text, tokens=tokens).tokens for kind, text in texts.items()}
    return QualityResult(model, counts, tuple(rows), failed)


def show(result: QualityResult, say: Callable[[Any], None]) -> None:
    """The table for a person; `say` prints what Rich can."""
    from w8a8.terminal.output import plain_table

    counted = ", ".join(f"{count:,} tokens of {kind}" for kind, count in result.tokens.items())
    say(f"{result.model}, KL divergence from the source in nats, computed in float32, over {counted}")
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
        say(f"{name} did not run: {reason}")


def _texts(gsm8k: Path | None, prose: Path | None) -> dict[str, Text]:
    """What is measured, by kind."""
    given = choose(text=prose) if prose else None
    own = Text("prose.txt", (files("w8a8.bench").joinpath("prose.txt").read_text(encoding="utf-8"),))
    return {"GSM8K": choose(data=gsm8k), "prose": given or own}


def _calibration(gsm8k: Path | None) -> Iterator[str]:
    """Texts to calibrate on: the built-in one's records, and between them GSM8K's training examples."""
    records = calibration_text.load(None).records
    examples = load(gsm8k, shots=EXAMPLES).examples
    each = -(-len(examples) // len(records))
    for number, record in enumerate(records):
        yield record if isinstance(record, str) else "\n".join(turn["content"] for turn in record)
        yield from (f"{e.text}\n{e.solution}" for e in examples[number * each : (number + 1) * each])


def _ours(source: Path, out: Path, calibration: Path, samples: int, options: Mapping[str, Any]) -> Callable[[], None]:
    given: dict[str, Any] = {"calibration": str(calibration), "samples": samples, "tokens": TOKENS} if options else {}

    def make() -> None:
        w8a8.quantize(source, out, Options(**{**given, **options}))

    return make


def _peers(*, wanted: bool) -> Sequence[Peer]:
    return (*PEERS, *CALIBRATED_PEERS) if wanted else ()


def _theirs(peer: Peer, folder: Path, source: Path, out: Path, calibration: Path, samples: int) -> Callable[[], None]:
    def make() -> None:
        run = timed([*peer.command(folder, source, out), str(calibration), str(samples), str(TOKENS)])
        if run.returncode != 0 or not (out / "config.json").is_file():
            raise W8A8Error(f"ended with {run.returncode}: {run.stderr.strip()[-300:]}")

    return make


def _score(source: Path, out: Path, text: Text, tokens: int, dtype: "Dtype" = "float32") -> Score:
    found = kld.run(kld.prepare(source, out, text, tokens=tokens, dtypes=("float32", dtype)))
    return Score(found.mean, found.p99, found.agreement)


def _size(out: Path) -> int:
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def _last_line(error: Exception) -> str:
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    return (str(said or error).strip().splitlines() or [type(error).__name__])[-1]
