"""The commands `eval gsm8k`, `eval lm`, `eval kld`, `compare`: how good a model is, how far from the original."""

from pathlib import Path
from typing import Annotated

import typer

from w8a8.cli.common import Dtype, Json, LogJson, Quiet, app, enforce, engines, eval_app, interruptible, showing
from w8a8.errors import UsageError

BaseUrls = Annotated[
    list[str] | None,
    typer.Option(help="Base URL of an OpenAI-compatible server. Repeatable: several that serve the same model."),
]
Served = Annotated[
    str | None, typer.Option(metavar="CKPT", help="Checkpoint to serve during the run: folder or Hub id.")
]
ServedName = Annotated[
    str | None, typer.Option(help="Name of the model on the server.", show_default="the only one it has")
]
Key = Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="API key of the server.")]
Engine = Annotated[
    str, typer.Option(help="Engine that serves CKPT: `auto`, `transformers` or `vllm`.", autocompletion=engines)
]
Concurrency = Annotated[int, typer.Option(min=1, max=1024, help="Requests at the same time, to each server.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds before a request is tried again.")]


@eval_app.command(
    "gsm8k",
    epilog="""
Examples:

- `w8a8 eval gsm8k --base-url http://localhost:8000/v1`
- `w8a8 eval gsm8k --base-url http://gpu1:8000/v1 --base-url http://gpu2:8000/v1`
- `w8a8 eval gsm8k --ckpt ./gemma-W8A8 --limit 100`
- `w8a8 eval gsm8k --ckpt ./gemma-3-270m-W8A8 --completions --data ./gsm8k --out results/quantized.json`
""",
)
def eval_gsm8k(
    base_url: BaseUrls = None,
    ckpt: Served = None,
    model: ServedName = None,
    api_key: Key = None,
    engine: Engine = "auto",
    dtype: Dtype = "auto",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with train.jsonl and test.jsonl.", show_default="openai/gsm8k from the Hub"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask only this many questions, from the first.", show_default="all 1,319")
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Training examples to show first, as turns of the chat.")] = 8,
    completions: Annotated[
        bool, typer.Option("--completions", help="Complete plain text: for base models without a chat template.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")] = 512,
    concurrency: Concurrency = 16,
    timeout: Timeout = 600,
    out: Annotated[
        Path | None, typer.Option(help="Result file, ending in .json.", show_default="results/gsm8k-MODEL.json")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Ask all questions again, also those answered already.")
    ] = False,
    no_texts: Annotated[
        bool,
        typer.Option(
            "--no-texts",
            help="Leave the texts of questions and answers out of the result and its journal: small files.",
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    log_json: LogJson = False,
) -> None:
    """Ask a model the 1,319 test questions of GSM8K, and score its answers.

    Each answer is saved at once, in a .jsonl beside the result. After an interruption or failed requests, give the same
    command again: it asks only the questions that have no answer yet.
    """
    from w8a8.evals.gsm8k.questions import load
    from w8a8.evals.gsm8k.run import evaluate
    from w8a8.evals.gsm8k.showing import live_score, show_gsm8k
    from w8a8.evals.server import connected
    from w8a8.terminal.output import Terminal

    terminal = Terminal(json=json, quiet=quiet, log_json=log_json)
    _check_one_server(base_url, ckpt)
    questions = load(data, shots=shots, limit=limit)
    with (
        interruptible("the answers so far are kept, and the same command goes on from there"),
        connected(
            base_url or (),
            ckpt,
            api_key=api_key,
            engine=engine,
            dtype=dtype,
            completions=completions,
            timeout=timeout,
            notice=terminal.notice,
        ) as server,
        live_score(terminal, len(questions.questions)) as progress,
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
            texts=not no_texts,
            progress=progress,
            notice=terminal.notice,
        )
    with showing(f"{result.path} is written"):
        terminal.table(result, show_gsm8k)


@eval_app.command(
    "lm",
    epilog="""
Examples:

- `w8a8 eval lm arc_easy,hellaswag --ckpt ./gemma-W8A8`
- `w8a8 eval lm mmlu --base-url http://localhost:8000/v1 --tokenizer google/gemma-3-270m --num-fewshot 5`
- `w8a8 eval lm ifeval --ckpt ./gemma-W8A8 --chat --limit 100`
- `w8a8 eval lm mine --include-path ./tasks --ckpt ./gemma-W8A8`
""",
)
def eval_lm(
    tasks: Annotated[
        str, typer.Argument(metavar="TASKS", help="The harness's tasks, groups or tags, with commas between them.")
    ],
    base_url: BaseUrls = None,
    ckpt: Served = None,
    model: ServedName = None,
    api_key: Key = None,
    engine: Engine = "auto",
    dtype: Dtype = "auto",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT",
            help="Folder or Hub id of a checkpoint with the model's tokenizer.",
            show_default="that of --ckpt, or of the folder that the server names its model by",
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder with tasks of yours, as YAML; it may hold programs.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples to show first.", show_default="each task's own number")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask only this many documents of each task.", show_default="all")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask as a chat, with the model's chat template.")] = False,
    concurrency: Concurrency = 16,
    timeout: Timeout = 600,
    out: Annotated[
        Path | None, typer.Option(help="Result file, ending in .json.", show_default="results/lm-MODEL.json")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Ask everything again, also what was answered already.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    log_json: LogJson = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a model, such as ARC, HellaSwag, MMLU.

    The harness makes the prompts and scores the answers; most tasks fetch their data from the Hub. Each answer is saved
    at once, in a .jsonl beside the result. After an interruption or a failed request, give the same command again.
    """
    from w8a8.evals.lm.run import evaluate
    from w8a8.evals.lm.showing import show_lm
    from w8a8.evals.lm.tasks import load, tokenizer_of
    from w8a8.evals.server import connected
    from w8a8.terminal.output import Terminal
    from w8a8.terminal.progress import live

    terminal = Terminal(json=json, quiet=quiet, log_json=log_json)
    _check_one_server(base_url, ckpt)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with interruptible("the answers so far are kept, and the same command goes on from there"):
        loaded = load(names, include=include_path, shots=num_fewshot, notice=terminal.notice)
        words = tokenizer_of(tokenizer or ckpt)
        with connected(
            base_url or (),
            ckpt,
            api_key=api_key,
            engine=engine,
            dtype=dtype,
            completions=not chat,
            timeout=timeout,
            notice=terminal.notice,
        ) as server:
            result = evaluate(
                server,
                loaded,
                asked=names,
                model=model,
                tokenizer=lambda name: words or tokenizer_of(name if Path(name).is_dir() else None),
                shots=num_fewshot,
                limit=limit,
                chat=chat,
                concurrency=concurrency,
                out=out,
                restart=restart,
                progress=lambda what, total: live(terminal, what, total, unit="requests"),
                notice=terminal.notice,
            )
    with showing(f"{result.path} is written"):
        terminal.table(result, show_lm)


@eval_app.command(
    "kld",
    epilog="""
Examples:

- `w8a8 eval kld ./gemma ./gemma-W8A8`
- `w8a8 eval kld google/gemma-3-270m ./gemma-3-270m-W8A8 --text book.txt --tokens 32768 --context 2048`
- `w8a8 eval kld ./gemma ./gemma-W8A8 --data ./gsm8k --out kld.json`
- `w8a8 eval kld ./gemma ./gemma-W8A8 --float32 --at-most 0.01`
- `w8a8 eval kld ./gemma-4-31b-it ./gemma-4-31b-it-W8A8 --stream`
- `w8a8 eval kld ./gemma-4-31b-it ./gemma-4-31b-it-W8A8 --stream --ray auto`
""",
)
def eval_kld(
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="The original checkpoint: folder, GGUF file, or Hub id.")
    ],
    candidate: Annotated[str, typer.Argument(metavar="CAND", help="The quantized checkpoint: folder or Hub id.")],
    text: Annotated[
        Path | None, typer.Option(help="Plain text file to read.", show_default="GSM8K's test split")
    ] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="JSONL file to read; each line has a `text`, or a `question` and its `answer`.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with GSM8K's `train.jsonl` and `test.jsonl`.", show_default="the Hub")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to predict.")] = 8192,
    context: Annotated[int, typer.Option(min=2, help="Maximum tokens per window.")] = 512,
    stream: Annotated[
        bool, typer.Option("--stream", help="Keep one layer at a time in memory; automatic if RAM cannot hold both.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="With --stream, run the layers on the nodes of a Ray cluster: `local`, `auto` or `host:port`.",
        ),
    ] = None,
    float32: Annotated[
        bool, typer.Option("--float32", help="Compute in float32, so that BF16's own rounding does not count.")
    ] = False,
    at_most: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="NATS",
            help="End with code 64 unless the 95% interval of the mean KL divergence ends at or below this.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    log_json: LogJson = False,
) -> None:
    """Measure how far one model's predictions lie from another's: KL divergence per token, agreement, perplexity.

    Both models are loaded at the same time, on the GPU if there is one, else in RAM, and read the same text. If RAM
    cannot hold both, or one is quantized in another way than W8A8, they run one decoder layer at a time.
    """
    from w8a8.evals.kld.run import prepare, run
    from w8a8.evals.kld.showing import show
    from w8a8.evals.kld.windows import choose
    from w8a8.evals.limits import Judged, judge_kld
    from w8a8.storage.writer import write_json
    from w8a8.terminal.output import Terminal
    from w8a8.terminal.progress import live

    terminal = Terminal(json=json, quiet=quiet, log_json=log_json)
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
        with live(terminal, "reading", job.steps, unit="steps" if job.streamed else "tokens") as advance:
            result = run(job, ray=ray, advance=advance, notice=terminal.notice)
        if out is not None:
            write_json(out, result.to_dict(), indent=1)
    limit = None if at_most is None else judge_kld(result, at_most)
    with showing(f"{out} is written" if out else "give --out for a file"):
        terminal.table(Judged(result, limit), lambda judged, say: show(judged.result, say))
    enforce(limit.broken if limit else "")


@app.command(
    epilog="""
Examples:

- `w8a8 compare results/gsm8k-gemma.json results/gsm8k-gemma-W8A8.json`
- `w8a8 compare base.json quantized.json --flips 3`
- `w8a8 compare results/lm-gemma.json results/lm-gemma-W8A8.json --metric acc_norm`
- `w8a8 compare base.json quantized.json --at-most-worse 1%`
"""
)
def compare(
    base: Annotated[
        Path, typer.Argument(metavar="BASE.json", help="Result of `eval gsm8k` or `eval lm` for the original model.")
    ],
    quant: Annotated[
        Path, typer.Argument(metavar="QUANT.json", help="Result of the same command for the quantized model.")
    ],
    flips: Annotated[
        int, typer.Option(min=0, help="GSM8K: number of flipped questions to show, with both answers side by side.")
    ] = 0,
    flexible: Annotated[
        bool, typer.Option("--flexible", help="GSM8K: score by the last number in an answer, not the one after `####`.")
    ] = False,
    metric: Annotated[
        str | None, typer.Option(help="eval lm: the metric to compare by.", show_default="each task's first")
    ] = None,
    at_most_worse: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="End with code 64 unless a larger loss is ruled out: `1%` are 1 of 100 questions, by the interval.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compare two models' answers to the same questions, question by question.

    Both models must have been asked the same questions in the same way. Of several tasks all have to hold a limit.
    """
    from w8a8.evals.gsm8k.compare import compare as compare_gsm8k
    from w8a8.evals.gsm8k.results import read as read_gsm8k
    from w8a8.evals.gsm8k.showing import show_comparison
    from w8a8.evals.limits import Judged, judge_comparison, judge_tasks, share
    from w8a8.evals.lm.compare import compare as compare_lm
    from w8a8.evals.lm.results import is_lm
    from w8a8.evals.lm.results import read as read_lm
    from w8a8.evals.lm.showing import show_lm_comparison
    from w8a8.terminal.output import Terminal

    at_most = None if at_most_worse is None else share(at_most_worse, "--at-most-worse")
    terminal = Terminal(json=json)
    if is_lm(base):
        tasks = compare_lm(read_lm(base), read_lm(quant), metric=metric)
        limit = None if at_most is None else judge_tasks(tasks, at_most)
        terminal.table(Judged(tasks, limit), lambda judged, say: show_lm_comparison(judged.result, say))
    else:
        found = compare_gsm8k(read_gsm8k(base), read_gsm8k(quant), score="flexible" if flexible else "strict")
        limit = None if at_most is None else judge_comparison(found, at_most)
        terminal.table(Judged(found, limit), lambda judged, say: show_comparison(judged.result, say, flips=flips))
    enforce(limit.broken if limit else "")


def _check_one_server(base_url: list[str] | None, ckpt: str | None) -> None:
    if bool(base_url) == (ckpt is not None):
        raise UsageError("give --base-url of a running server, or --ckpt to serve a checkpoint")
