"""`w8a8 bench calibrate`: the time and memory to calibrate a layer, against one plain forward of the same tokens.

The layers are Gemma 4 31B's, all sizes divided by `scale`, with random weights, in a checkpoint that is streamed like
any other. Every contender is a process of its own, so that the kernel reports its peak memory: first one that only lets
each layer read all samples in float32, then the recipes, by turns.

A layer's time runs from the end of the layer before to its own end, and includes reading its weights and writing its
result. It adds up two passes: measuring what errors cost, and calibrating. The head's time in the first pass, once for
all layers, is left out. Memory is shown in MiB, and in float32 layers beyond a process that has loaded the same
libraries and no layer.
"""

import json
import shutil
import statistics
import string
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from w8a8.bench.model import GEMMA_4_31B, make_model
from w8a8.bench.process import timed
from w8a8.errors import MissingExtraError, W8A8Error
from w8a8.terminal.output import plain_table

EMPTY, PLAIN = "libraries alone", "plain forward"
RECIPES = ("smooth", "smooth+gptq")
GOALS = {"smooth": 6.0, "smooth+gptq": 12.0}
"""The most that a recipe may take per layer, in plain forwards."""

_DIVIDED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_global_key_value_heads",
)
"""The sizes in the model's config that are divided."""


@dataclass(frozen=True, slots=True)
class Row:
    """One contender: median seconds of a layer, and the largest peak memory of its runs in MiB."""

    name: str
    seconds: float
    peak_mib: float


@dataclass(frozen=True, slots=True)
class CalibrateResult:
    """The rows, for layers of `layer_bytes` bytes in float32 and `samples` samples of `tokens` tokens."""

    scale: int
    layers: int
    layer_bytes: int
    samples: int
    tokens: int
    rows: tuple[Row, ...]

    def ratio(self, row: Row) -> float:
        """Return the seconds of a layer in plain forwards."""
        return row.seconds / next(plain.seconds for plain in self.rows if plain.name == PLAIN)

    def memory(self, row: Row) -> float:
        """Return the peak memory beyond the libraries', in float32 layers."""
        empty = next(empty.peak_mib for empty in self.rows if empty.name == EMPTY)
        return (row.peak_mib - empty) * 2**20 / self.layer_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values."""
        rows = [{**asdict(row), "ratio": self.ratio(row), "layers": self.memory(row)} for row in self.rows]
        return {**asdict(self), "rows": rows, "goals": GOALS}


def bench(
    *,
    scale: int,
    layers: int,
    samples: int,
    tokens: int,
    runs: int,
    folder: Path,
    notice: Callable[[str], None] = lambda _: None,
) -> CalibrateResult:
    """Make the checkpoint in `folder`, run every contender `runs` times by turns, and collect the table.

    Raises MissingExtraError without torch and transformers, W8A8Error where a contender fails.
    """
    # 1) The checkpoint and the text.
    source, text = folder.absolute() / "w8a8-bench-source", folder.absolute() / "w8a8-bench-text.txt"
    out = folder / "w8a8-bench-out"
    layer_bytes = make_checkpoint(source, text, scale, layers, samples * tokens, notice)
    # 2) Every contender in a process of its own, by turns.
    seconds: dict[str, list[float]] = {name: [] for name in (EMPTY, PLAIN, *RECIPES)}
    peaks = dict.fromkeys(seconds, 0.0)
    try:
        for run in range(runs):
            for name in seconds:
                command = (sys.executable, "-m", __name__, name, source, text, out, samples, tokens)
                done = timed([str(part) for part in command])
                if done.returncode != 0:
                    raise W8A8Error(f"{name} failed with {done.returncode}: {done.complaint}")
                seconds[name] += json.loads(done.stdout)
                peaks[name] = max(peaks[name], done.peak_mib)
                notice(f"run {run + 1}/{runs}  {name}: {statistics.median(seconds[name]):.2f} s a layer")
    finally:
        for path in (source, folder / f".{out.name}.w8a8-calibration"):
            shutil.rmtree(path, ignore_errors=True)
        text.unlink()
    # 3) The table.
    rows = tuple(Row(name, statistics.median(all_), peaks[name]) for name, all_ in seconds.items())
    return CalibrateResult(scale, layers, layer_bytes, samples, tokens, rows)


def show(result: CalibrateResult, say: Callable[[Any], None]) -> None:
    """Print the table for a person; `say` prints text and Rich tables."""
    table = plain_table("", "seconds a layer", "x plain", "goal", "peak MiB", "in layers", left=1)
    for row in result.rows:
        speed = (f"{row.seconds:.2f}", f"{result.ratio(row):.1f}") if row.name != EMPTY else ("", "")
        goal = f"{GOALS[row.name]:g}" if row.name in GOALS else ""
        table.add_row(row.name, *speed, goal, f"{row.peak_mib:.0f}", f"{result.memory(row):.1f}")
    say(
        f"{result.layers} layers of Gemma 4 31B, sizes divided by {result.scale}: {result.layer_bytes / 2**20:.0f} MiB "
        f"each in float32; {result.samples} samples of {result.tokens} tokens"
    )
    say(table)


def make_checkpoint(
    source: Path, text: Path, scale: int, layers: int, tokens: int, notice: Callable[[str], None]
) -> int:
    """Write the checkpoint, its tokenizer and a text; return a layer's bytes in float32."""
    try:
        import torch
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingExtraError("bench calibrate needs torch and transformers: pip install 'w8a8[serve]'") from error
    notice(f"making {layers} layers in {source}")
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    divided = {key: max(1, value // scale) if key in _DIVIDED else value for key, value in GEMMA_4_31B.items()}
    with torch.no_grad():
        model = make_model(layers, divided)
    model.save_pretrained(source)
    letters = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(string.ascii_letters)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(source)
    drawn = torch.randint(len(string.ascii_letters), (tokens,), generator=torch.Generator().manual_seed(0))
    text.write_text("".join(string.ascii_letters[i] for i in drawn.tolist()))
    return int(4 * sum(p.numel() for p in model.model.layers.parameters()) / layers)


# --- in the contender's own process -------------------------------------------------------------------------------


def contend(name: str, source: str, text: str, out: str, samples: str, tokens: str) -> list[float]:
    """Run one contender; return the seconds of every layer but the first."""
    from w8a8.quantization import Options, calibrated, prepare

    recipe = "smooth" if name in (EMPTY, PLAIN) else name
    job = prepare(source, Options(recipe=recipe, calibration=text, samples=int(samples), tokens=int(tokens)))
    if name in (EMPTY, PLAIN):
        return _plain(Path(source), int(samples), int(tokens), run=name == PLAIN)
    steps: list[list[float]] = []

    @contextmanager
    def watch(_layers: int) -> Iterator[Callable[[int], None]]:
        marks = [time.perf_counter()]
        steps.append(marks)
        yield lambda _count: marks.append(time.perf_counter())

    with calibrated(job, out, progress=watch):
        pass
    measuring, calibrating = ([after - before for before, after in pairwise(marks)] for marks in steps)
    count = len(calibrating)
    forwards, backwards = measuring[1:count], measuring[count + 1 :]  # the first is the embedding's, or the head's
    return [sum(each) for each in zip(forwards, backwards, calibrating[1:], strict=True)]


def _plain(source: Path, samples: int, tokens: int, *, run: bool) -> list[float]:
    """Let every layer read random samples; without `run` only load the libraries and the embedding."""
    import torch

    from w8a8.calibrate import run as libraries  # noqa: F401 - what every contender loads
    from w8a8.checkpoint import Checkpoint
    from w8a8.runtime.streamed import StreamedModel, forward
    from w8a8.sources.opening import as_run

    model = StreamedModel("bench", as_run(Checkpoint.open(source)), torch.float32)
    states, kwargs = model.embed([number % len(string.ascii_letters) for number in range(tokens)])
    seconds = []
    with torch.no_grad():
        for number in range(model.count if run else 0):
            start = time.perf_counter()
            with model.layer(number) as layer:
                for _ in range(samples):
                    forward(layer, states, kwargs[number])
            seconds.append(time.perf_counter() - start)
    return seconds[1:] or [0.0]


if __name__ == "__main__":
    print(json.dumps(contend(*sys.argv[1:])))
