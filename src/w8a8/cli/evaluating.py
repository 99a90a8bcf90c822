"""`eval gsm8k`, `eval kld`, `compare`: how good a model is, and how far from the original."""

from pathlib import Path
from typing import Annotated

import typer

from w8a8.cli.common import Json, Quiet, app, engines, eval_app, interruptible
from w8a8.errors import UsageError


@eval_app.command(
    "gsm8k",
    epilog="""
Examples:

- `w8a8 eval gsm8k --base-url http://localhost:8000/v1`
- `w8a8 eval gsm8k --ckpt ./gemma-W8A8 --limit 100`
- `w8a8 eval gsm8k --ckpt ./gemma-3-270m-W8A8 --completions --data ./gsm8k --out results/quantized.json`
""",
)
def eval_gsm8k(
    base_url: Annotated[str | None, typer.Option(help="Of an OpenAI-compatible server.")] = None,
    ckpt: Annotated[
        str | None, typer.Option(metavar="CKPT", help="Folder or Hub id, to be served for as long as it takes.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Which of the server's.", show_default="the only one")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="The server's key.")] = None,
    engine: Annotated[
        str, typer.Option(help="With --ckpt: `auto`, `transformers` or `vllm`.", autocompletion=engines)
    ] = "auto",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with train.jsonl and test.jsonl.", show_default="openai/gsm8k, by `datasets`"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first so many.", show_default="all 1,319")] = None,
    shots: Annotated[int, typer.Option(min=0, help="Training examples shown first, as turns of the chat.")] = 8,
    completions: Annotated[
        bool, typer.Option("--completions", help="Complete text instead: for base models without a chat template.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 512,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Requests at the same time.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a request may take before it is tried again.")] = 600,
    out: Annotated[
        Path | None, typer.Option(help="Result, ending in .json.", show_default="results/gsm8k-MODEL.json")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Ask all again, also what OUT has answers to.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask a model the 1,319 test questions of GSM8K, and score its answers.

    Every answer is kept as it comes, in a .jsonl beside the result: a run that was stopped, and requests that failed,
    go on when the same command is given again.
    """
    from w8a8.evals.gsm8k.questions import load
    from w8a8.evals.gsm8k.run import evaluate
    from w8a8.evals.gsm8k.showing import live, show_gsm8k
    from w8a8.evals.server import connected
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet)
    if (base_url is None) == (ckpt is None):
        raise UsageError("give --base-url of a server that runs, or --ckpt to have one started")
    questions = load(data, shots=shots, limit=limit)
    with (
        interruptible("the answers so far are kept, and the same command goes on from there"),
        connected(
            base_url,
            ckpt,
            api_key=api_key,
            engine=engine,
            completions=completions,
            timeout=timeout,
            notice=terminal.notice,
        ) as server,
        live(quiet=quiet) as progress,
    ):
        result = evaluate(
            server,
            questions,
            model=model,
            completions=completions,
            temperature=temperature,
            max_tokens=max_tokens,
            concurrency=concurrency,
            out=out,
            restart=restart,
            progress=progress,
            notice=terminal.notice,
        )
    terminal.table(result, show_gsm8k)


@eval_app.command(
    "kld",
    epilog="""
Examples:

- `w8a8 eval kld ./gemma ./gemma-W8A8`
- `w8a8 eval kld google/gemma-3-270m ./gemma-3-270m-W8A8 --text book.txt --tokens 32768 --context 2048`
- `w8a8 eval kld ./gemma ./gemma-W8A8 --data ./gsm8k --out kld.json`
- `w8a8 eval kld ./gemma ./gemma-W8A8 --float32`
- `w8a8 eval kld ./gemma-4-31b-it ./gemma-4-31b-it-W8A8 --stream`
""",
)
def eval_kld(
    reference: Annotated[str, typer.Argument(metavar="REF", help="The original: folder, or Hub id.")],
    candidate: Annotated[str, typer.Argument(metavar="CAND", help="The quantized one: folder, or Hub id.")],
    text: Annotated[Path | None, typer.Option(help="Plain text to read.", show_default="GSM8K's test split")] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="A document per line: its `text`, or its `question` and `answer`.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with GSM8K's `train.jsonl` and `test.jsonl`.", show_default="the Hub")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to predict at most.")] = 8192,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window at most.")] = 512,
    stream: Annotated[
        bool, typer.Option("--stream", help="Run layer by layer, as models larger than RAM are in any case.")
    ] = False,
    float32: Annotated[
        bool, typer.Option("--float32", help="Compute in float32: BF16's own rounding does not count.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File to write the result to, as JSON.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how far one model's predictions lie from another's: KL divergence per token, agreement, perplexity.

    Both are loaded at the same time, on the GPU if there is one, else in RAM, and read the same text. Where RAM does
    not hold both, they run one decoder layer at a time.
    """
    from w8a8.evals.kld.run import prepare, run
    from w8a8.evals.kld.showing import show
    from w8a8.evals.kld.windows import choose
    from w8a8.evals.storing import store
    from w8a8.terminal.output import Terminal
    from w8a8.terminal.progress import live

    terminal = Terminal(json=json, quiet=quiet)
    source = choose(text=text, jsonl=jsonl, data=data)
    with interruptible("nothing was written"):
        job = prepare(
            reference,
            candidate,
            source,
            tokens=tokens,
            context=context,
            out=out,
            stream=stream,
            dtypes=("float32", "float32") if float32 else (None, None),
        )
        with live("reading", job.steps, unit="steps" if job.streamed else "tokens", quiet=quiet) as advance:
            result = run(job, advance=advance, notice=terminal.notice)
        if out is not None:
            store(result.to_dict(), out)
    terminal.table(result, show)


@app.command(
    epilog="""
Examples:

- `w8a8 compare results/gsm8k-gemma.json results/gsm8k-gemma-W8A8.json`
- `w8a8 compare base.json quantized.json --flips 3`
"""
)
def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE.json", help="What `eval gsm8k` found of the original.")],
    quant: Annotated[Path, typer.Argument(metavar="QUANT.json", help="What it found of the quantized model.")],
    flips: Annotated[int, typer.Option(min=0, help="How many flipped questions to show, both answers beside.")] = 0,
    flexible: Annotated[
        bool, typer.Option("--flexible", help="Right is who has the last number right, not the one after `####`.")
    ] = False,
    json: Json = False,
) -> None:
    """Compare two models' answers to the same GSM8K questions, question by question.

    Both must have been asked the same questions in the same way.
    """
    from w8a8.evals.gsm8k.compare import compare as compare_
    from w8a8.evals.gsm8k.results import read
    from w8a8.evals.gsm8k.showing import show_comparison
    from w8a8.terminal.output import Terminal

    found = compare_(read(base), read(quant), score="flexible" if flexible else "strict")
    Terminal(json=json).table(found, lambda found, say: show_comparison(found, say, flips=flips))
