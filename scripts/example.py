"""Measure a real chat model in BF16 and in two recipes' W8A8, and publish the results: `python scripts/example.py`.

Qwen2.5-Coder 0.5B and 1.5B are quantized by `rtn` and by `--recipe auto`; each answers GSM8K by the reference protocol
(8 examples, 512 tokens), 1,319 questions at 0.5B and 400 at 1.5B; then KL divergence, comparisons, cards, reports. It
takes hours on a CPU, in as many sittings and on as many machines as one likes: what lies whole in the folder of results
is not made again, and an evaluation that was stopped goes on from the journal beside its result, which is as small.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from w8a8.errors import W8A8Error
from w8a8.evals.gsm8k import results as gsm8k_results
from w8a8.evals.gsm8k.questions import load
from w8a8.publish.results import Interval, read_gsm8k, read_kld
from w8a8.storage.writer import write_whole

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = {"0.5B": 1319, "1.5B": 400}
"""How many of GSM8K's 1,319 test questions each size is asked."""
SHOTS = 8
RECIPES = {"rtn": (), "auto": ("--recipe", "auto")}
"""Options of `quantize` by the name that files and rows have."""


@dataclass(frozen=True, slots=True)
class Step:
    """A command, what it makes, and the steps whose results it reads; what is not `published` only serves the others.

    `whole` says whether the result is there. `captured` results are what the command prints; a card is `copied`.
    """

    name: str
    result: Path
    command: tuple[str, ...]
    needs: tuple["Step", ...] = ()
    published: bool = True
    captured: bool = False
    copied: Path | None = None
    whole: Callable[[Path], bool] = Path.exists


def main(arguments: Sequence[str]) -> int:
    """Run the steps that are left; return the exit code of the first that fails, else 0."""
    options = _options(arguments)
    folder, limit = options.folder.absolute(), options.limit
    out = (options.out or (folder / f"results-{limit}" if limit else ROOT / "docs" / "example")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    # 1) What there is to do: results that are not there, and what these need here.
    sizes = [options.only] if options.only else [*QUESTIONS]
    steps = [step for size in sizes for step in _steps(size, folder, out, options)]
    todo = planned(steps)
    print(f"{len(todo)} of {len(steps)} steps to do; commands run in {folder}, results go to {out}")
    # 2) One after the other; the page always shows what there is.
    for number, step in enumerate(steps, 1):
        at = f"\n{number}/{len(steps)}) {step.name}:"
        if step not in todo:
            there = f"{step.result} is there" if step.whole(step.result) else "not needed, its results are there"
            print(at, there, flush=True)
            continue
        print(at, step.result, flush=True)
        if code := _run(step, folder):
            print(f"ended with {code}; what is finished stays, and the same command goes on from here", file=sys.stderr)
            return code
        _write_page(out)
    print(f"\neverything is in {out}")
    return 0


def planned(steps: Sequence[Step]) -> list[Step]:
    """The steps to do: results that are not whole or are made from such, and what these need that is not here."""
    todo: set[Step] = set()
    for step in steps:
        if step.published and (not step.whole(step.result) or todo.intersection(step.needs)):
            todo.add(step)
    for step in reversed(steps):
        if not step.published and not step.whole(step.result) and any(step in later.needs for later in todo):
            todo.add(step)
    return [step for step in steps if step in todo]


def _steps(size: str, folder: Path, out: Path, options: argparse.Namespace) -> Iterator[Step]:
    """The steps of a size, each behind those it needs."""
    source, results = folder / f"qwen2.5-coder-{size.lower()}", out / size

    def named(path: Path) -> str:
        return os.path.relpath(path, folder)

    asked = min(options.limit or QUESTIONS[size], QUESTIONS[size])
    data: tuple[str, ...] = ()
    if options.gsm8k:
        data = ("--data", named(options.gsm8k.absolute()))
        asked = len(load(options.gsm8k, shots=SHOTS, limit=asked).questions)
    make = (named(ROOT / "scripts" / "make_qwen.py"), named(source), size)
    model = Step(f"Qwen2.5-Coder {size} in BF16", source, make, published=False)
    yield model

    def evaluated(name: str, checkpoint: Step) -> Step:
        how = ("--shots", str(SHOTS), "--limit", str(asked), "--engine", options.engine, "--no-texts")
        result = results / f"gsm8k-{name}.json"
        command = ("eval", "gsm8k", "--ckpt", named(checkpoint.result), *data, *how, "--out", named(result))
        what = f"GSM8K, {asked:,} questions, {size} {name}"
        return Step(what, result, command, (checkpoint,), whole=lambda path: is_whole(path, asked))

    base = evaluated("bf16", model)
    yield base
    for name, recipe in RECIPES.items():
        made = source.with_name(f"{source.name}-W8A8" + ("" if name == "rtn" else f"-{name}"))
        quantize = ("quantize", named(source), named(made), *recipe)
        quantized = Step(f"{size} by {name}", made, quantize, (model,), published=False)
        yield quantized
        scored = evaluated(name, quantized)
        yield scored
        kld = ("eval", "kld", named(source), named(made), "--float32", *data)
        divergence = results / f"kld-{name}.json"
        diverging = Step(
            f"KL divergence, {size} {name}",
            divergence,
            (*kld, "--out", named(divergence)),
            (model, quantized),
            whole=lambda path: _can_read(read_kld, path),
        )
        yield diverging
        pair = (named(base.result), named(scored.result))
        compare = ("compare", *pair, "--json")
        both = f"{size} {name} against BF16"
        yield Step(both, results / f"compare-{name}.json", compare, (base, scored), captured=True)
        given = ("--baseline", pair[0], "--quant", pair[1], "--kld", named(divergence))
        needs = (model, quantized, base, scored, diverging)
        card = ("card", named(made), *given, "--overwrite")
        yield Step(f"card, {size} {name}", results / f"card-{name}.md", card, needs, copied=made / "README.md")
        page, figures = results / f"report-{name}.html", folder / f"figures-{size}-{name}"
        drawn = ("--out", named(page), "--png", named(figures))
        report = ("report", named(made), "--source", named(source), *given, *drawn)
        yield Step(f"report, {size} {name}", page, report, needs)


def _run(step: Step, folder: Path) -> int:
    """Run a step's command and keep its result; return its exit code."""
    step.result.parent.mkdir(parents=True, exist_ok=True)
    script = step.command[0].endswith(".py")
    command = [sys.executable, *(() if script else ("-m", "w8a8")), *step.command]
    shown = shlex.join(["python", *command[1:]])
    print(f"$ {shown}" + (f" > {step.result.name}" if step.captured else ""), flush=True)
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE if step.captured else None) as process:

        def pass_on(number: int, _: FrameType | None) -> None:
            if number == signal.SIGTERM:  # Ctrl-C comes to the command by itself
                process.terminate()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pass_on)
        printed, _ = process.communicate()
    if process.returncode:
        return process.returncode
    if step.captured:
        write_whole(step.result, printed)
    if step.copied:
        shutil.copyfile(step.copied, step.result)
    if not step.whole(step.result):
        print(f"{step.result} is not whole: requests failed, which the same command sends again", file=sys.stderr)
        return 1
    if step.published:
        step.result.with_suffix(".jsonl").unlink(missing_ok=True)  # a journal has nothing more to tell
    return 0


def is_whole(path: Path, questions: int) -> bool:
    """Whether a GSM8K result has the answers to all `questions`."""
    if not _can_read(gsm8k_results.read, path):
        return False
    found = gsm8k_results.read(path)
    return bool(found["questions"] == questions and not found["errors"])


def _can_read(read: Callable[[Path], object], path: Path) -> bool:
    try:
        read(path)
    except W8A8Error:
        return False
    return True


def _write_page(out: Path) -> None:
    """Write `results.md` from the results that are there."""
    lines = ["# Qwen2.5-Coder, measured", "", "Made by `scripts/example.py` from the files beside this page."]
    for size in QUESTIONS:
        if rows := [*_rows(out / size)]:
            head = ("", "GSM8K", "95% interval", "KL divergence, nats", "95% interval", "same likeliest token")
            lines += ["", f"## {size}", "", *map(_cells, (head, ["---"] * len(head), *rows)), ""]
            lines += [*_verdicts(out / size)]
            names = sorted(path.name for path in (out / size).iterdir() if path.suffix != ".jsonl")
            lines += ["", "Files: " + ", ".join(f"[{name}]({size}/{name})" for name in names) + "."]
    write_whole(out / "results.md", ("\n".join(lines) + "\n").encode())


def _rows(folder: Path) -> Iterator[Sequence[str]]:
    for name in ("bf16", *RECIPES):
        cells = [name if name in RECIPES else "BF16", *[""] * 5]
        if (result := folder / f"gsm8k-{name}.json").exists():
            scored = read_gsm8k(result)
            cells[1:3] = f"{scored.right:,} of {scored.questions:,}, {scored.strict.value:.1%}", _range(scored.strict)
        if (result := folder / f"kld-{name}.json").exists():
            found = read_kld(result)
            low, high = (f"{end:.5f}" for end in (found.mean.low, found.mean.high))
            cells[3:] = f"{found.mean.value:.5f}", f"{low} to {high}", f"{found.top1.value:.1%}"
        if any(cells[1:]):
            yield cells


def _verdicts(folder: Path) -> Iterator[str]:
    for name in RECIPES:
        if (result := folder / f"compare-{name}.json").exists():
            yield f"- {name}: {json.loads(result.read_bytes())['verdict']}"


def _range(interval: Interval) -> str:
    return f"{interval.low:.1%} to {interval.high:.1%}"


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".example", help="for models (.example)")
    parser.add_argument("--only", choices=QUESTIONS, help="one size")
    parser.add_argument("--limit", type=int, metavar="N", help="a trial of N questions; results stay in FOLDER")
    parser.add_argument("--out", type=Path, help="where results go (docs/example)")
    parser.add_argument("--gsm8k", type=Path, metavar="FOLDER", help="with train.jsonl and test.jsonl (from the Hub)")
    parser.add_argument("--engine", default="auto", help="that of `eval gsm8k`: auto, transformers or vllm")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
