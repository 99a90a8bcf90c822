import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import w8a8
from tests.calibrate.checkpoints import make as make_small
from tests.calibrate.checkpoints import write_text
from tests.checkpoint.hub import local_hub
from tests.checkpoints import LLAMA, folder_bytes, llama_tensors, write_checkpoint
from tests.command import cli
from tests.publish.results import gsm8k, kld
from w8a8.checkpoint import Checkpoint
from w8a8.errors import (
    DoesNotFitError,
    InvalidResultError,
    TargetExistsError,
    UnsupportedSchemeError,
    UsageError,
    W8A8Error,
)
from w8a8.evals.statistics import wilson
from w8a8.machine import describe
from w8a8.memory import fit
from w8a8.publish.card.write import make, write
from w8a8.publish.results import Results
from w8a8.quantization import Options
from w8a8.terminal.wording import count, size

CONFIG = {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096}
SECTIONS = [
    "Model Details",
    "Quantization Scheme",
    "Accuracy",
    "How to Use",
    "Hardware Requirements",
    "Quantization Details",
    "How to Reproduce",
    "Citation",
    "License",
    "Modified Files",
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "llama", llama_tensors(), config=CONFIG, shards=2)


@pytest.fixture
def out(source: Path) -> Path:
    w8a8.quantize(source, source.with_name("llama-W8A8"))
    return source.with_name("llama-W8A8")


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under `heading`, as they are shown."""
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
    at = next(i for i, t in enumerate(tokens) if t.type == "inline" and shown(t) == heading)
    table: list[list[str]] = []
    for i, token in enumerate(tokens[at:], at):
        if token.type == "tr_open":
            table.append([])
        elif token.type in {"td_open", "th_open"}:
            table[-1].append(shown(tokens[i + 1]))
        elif token.type == "table_close":
            break
    return table


def shown(inline: Any) -> str:
    """The text a reader sees of an inline token."""
    return "".join(child.content for child in inline.children)


def blocks(text: str) -> list[str]:
    """The contents of the fenced blocks."""
    return [t.content for t in MarkdownIt("commonmark").parse(text) if t.type == "fence"]


def metadata(text: str) -> dict[str, Any]:
    """What the Hub reads."""
    return dict(ModelCard(text).data.to_dict())  # type: ignore[no-untyped-call]


def details(text: str) -> dict[str, str]:
    return {row[0]: row[1] for row in rows(text, "Model Details")}


# --- what it says -------------------------------------------------------------------------------------------------


def check_against_files(text: str, source: Path, out: Path) -> None:
    """Every number is that of the files."""
    made, original = Checkpoint.open(out), Checkpoint.open(source)
    found = details(text)
    assert found["Parameters"] == count(original.numel)
    assert found["Model Size"] == f"~{size(made.nbytes)} ({len(made.shards)} safetensors shards)"
    assert found["Original Size"] == f"~{size(original.nbytes)}"
    assert found["Compression"] == f"~{original.nbytes / made.nbytes:.1f}x size reduction"
    assert found["Architecture"] == ", ".join(made.config["architectures"])
    quantized = [t for t in made.tensors.values() if t.dtype == "I8"]
    assert f"- {len(quantized)} tensors quantized:" in text
    scheme = rows(text, "Quantization Scheme")
    assert ["Activation (inputs of these layers)", "INT8", "per token, symmetric", "dynamic"] in scheme
    assert ["Weight (mlp)", "INT8", "per output channel, symmetric", "static"] in scheme
    for gpus, needed, context, longest in rows(text, "Hardware Requirements")[1:]:
        fits = fit(out, describe(gpus))
        assert fits.fits
        assert (needed, context, longest) == (size(fits.needed), f"{fits.context:,}", f"{fits.max_context:,}")


def test_the_card_of_a_real_gemma_3(gemma3: Path, gemma3_w8a8: Path) -> None:
    text = make(gemma3_w8a8).text
    check_against_files(text, gemma3, gemma3_w8a8)
    data = metadata(text)
    assert data["pipeline_tag"] == "text-generation"
    assert {"int8", "w8a8", "vllm", Checkpoint.open(gemma3_w8a8).config["quantization_config"]["quant_method"]} <= set(
        data["tags"]
    )
    assert ["lm_head (the embeddings again)", "BF16", "", "unquantized"] in rows(text, "Quantization Scheme")
    assert re.findall(r"^## (.*)$", text, re.M) == SECTIONS


def test_the_card_of_a_gemma_4_that_sees(gemma4: Path, gemma4_w8a8: Path) -> None:
    text = make(gemma4_w8a8, base_model="google/gemma-4-31b-it").text
    check_against_files(text, gemma4, gemma4_w8a8)
    data = metadata(text)
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["base_model"] == "google/gemma-4-31b-it"
    assert data["base_model_relation"] == "quantized"
    assert ["vision tower", "BF16", "", "unquantized"] in rows(text, "Quantization Scheme")
    assert "AutoModelForImageTextToText" in text
    assert "/v1/chat/completions" in text


def test_the_vllm_command_is_what_serve_prints(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out.parent)
    for gpus in ("24GiB", "2x24GiB:gfx1100"):
        run = cli("serve", out.name, "--describe", gpus, "--dry-run")
        command, _, call = run.stdout.partition("\n\n# once it is ready:\n")
        written = blocks(make(out, describe=gpus).text)
        assert command.partition("\n")[2] + "\n" == written[0]
        assert call == written[1]


def test_examples_name_the_repository_once_it_is_known(out: Path) -> None:
    text = make(out, repo="me/llama-W8A8").text
    assert blocks(text)[0].startswith("vllm serve me/llama-W8A8 ")
    assert '"model": "me/llama-W8A8"' in blocks(text)[1]


def test_gpus_too_small_for_it_are_refused(out: Path) -> None:
    with pytest.raises(DoesNotFitError):
        make(out, describe="0.1GiB")


def test_a_model_for_several_gpus_gets_an_example_with_as_many(
    gemma3_w8a8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("w8a8.publish.card.usage.ONE_GPU", "0.5GiB")
    assert "--tensor-parallel-size 4" in make(gemma3_w8a8).text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "llm-compressor-0.14"},
        {"format": "compressed-tensors", "include": ["lm_head"], "exclude": ["*.layers.0.*", "*.down_proj"]},
    ],
)
def test_the_command_in_the_card_makes_the_same_checkpoint(
    source: Path, options: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = source.with_name("llama-W8A8")
    w8a8.quantize(source, out, Options(**options))
    check_commands(out, monkeypatch)


def test_the_command_in_the_card_calibrates_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source, text, out = make_small(tmp_path / "llama"), write_text(tmp_path), tmp_path / "llama-W8A8"
    command = ("quantize", source, out, "--recipe", "smooth", "--calibration", text, "--keep-bf16", "10%")
    run = cli(*command, "--tokens", "48", "--exclude", "*.layers.1.mlp.*")
    assert run.returncode == 0, run.stderr
    card = make(out).text
    assert re.search(r"Calibrated on \d+ samples of 48 tokens of miller\.txt \(SHA-256 `[0-9a-f]{64}`\)", card)
    assert "No calibration data" not in card
    check_commands(out, monkeypatch)


def check_commands(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the card says makes the same files again."""
    [commands] = [b for b in blocks(make(out).text) if b.startswith("w8a8 quantize")]
    expected = folder_bytes(out)
    shutil.rmtree(out)

    monkeypatch.chdir(out.parent)
    for command in commands.replace("\\\n", "").strip().splitlines():
        program, *arguments = shlex.split(command)
        assert program == "w8a8"
        run = cli(*arguments)
        assert run.returncode == 0, run.stderr
    assert folder_bytes(out) == expected


# --- results ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Results:
    right = [i % 3 > 0 for i in range(60)]
    results = Results(tmp_path / "base.json", tmp_path / "quant.json", tmp_path / "kld.json")
    for path, value in zip(
        (results.baseline, results.quant, results.kld),
        (gsm8k("base", right), gsm8k("quant", [False, *right[1:2], False, *right[3:]]), kld()),
        strict=True,
    ):
        assert path
        path.write_text(json.dumps(value))
    return results


def test_without_results_it_says_not_measured(out: Path) -> None:
    text = make(out).text
    assert [row[2] for row in rows(text, "Accuracy")] == ["Accuracy", "not measured", "not measured"]
    assert "model-index" not in text
    assert "KL divergence" not in text


def test_results_stand_in_the_table_and_in_the_metadata(out: Path, files: Results) -> None:
    text = make(out, results=files).text
    table = rows(text, "Accuracy")
    for row, name, scheme, right in ((1, "llama", "original", 40), (2, "llama-W8A8", "INT8 W8A8", 39)):
        low, high = wilson(right, 60)
        assert table[row] == [name, scheme, f"{right / 60:.2%}", f"{low:.2%} to {high:.2%}", f"{right} / 60"]
    assert "60 questions, 8-shot, chat API, temperature 0" in text
    assert "No difference shown" in text
    assert "0.0286 nats (0.0271 to 0.0302)" in text
    [index] = metadata(text)["model-index"]
    [result] = index["results"]
    assert result["dataset"]["type"] == "openai/gsm8k"
    assert [metric["value"] for metric in result["metrics"]] == [65.0]


def test_a_divergence_computed_in_float32_says_so(out: Path, files: Results) -> None:
    assert files.kld
    assert "float32" not in make(out, results=files).text
    files.kld.write_text(json.dumps(kld() | {"dtypes": ["float32", "float32"]}))
    assert "of licence.txt, both computed in float32:" in make(out, results=files).text


def test_one_result_alone_leaves_the_other_not_measured(out: Path, files: Results) -> None:
    text = make(out, results=Results(baseline=files.baseline)).text
    assert [row[2] for row in rows(text, "Accuracy")[1:]] == ["66.67%", "not measured"]
    assert "model-index" not in text


def test_the_environment_names_the_results(out: Path, files: Results) -> None:
    env = {"EVAL_BASELINE_JSON": str(files.baseline), "EVAL_QUANT_JSON": str(files.quant), "HF_REPO_ID": "me/it"}
    run = cli("card", out, "--json", env=env)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["card"] == str(out / "README.md")
    text = (out / "README.md").read_text()
    assert [row[2] for row in rows(text, "Accuracy")[1:]] == ["66.67%", "65.00%"]
    assert "vllm serve me/it" in text


def test_figures_of_the_report_are_shown_once_they_lie_there(source: Path, out: Path, files: Results) -> None:
    assert "![" not in make(out).text
    run = cli("report", out, "--source", source, "--png", out / "figures", "--quant", str(files.quant))
    assert run.returncode == 0, run.stderr
    shown = re.findall(r"!\[[^]]+\]\((.+)\)", make(out).text)
    assert set(shown) == {str(path.relative_to(out)) for path in (out / "figures").iterdir()}
    assert {"figures/size.png", "figures/sqnr.png", "figures/gsm8k.png"} <= set(shown)


def test_what_is_no_result_is_refused(out: Path, files: Results) -> None:
    with pytest.raises(InvalidResultError, match=r"kld\.json"):
        make(out, results=Results(quant=files.kld))


def test_results_of_different_questions_are_not_compared(out: Path, files: Results) -> None:
    assert files.baseline
    files.baseline.write_text(json.dumps(gsm8k("base", [True] * 12)))
    with pytest.raises(UsageError, match="questions"):
        make(out, results=files)


# --- where it comes from ------------------------------------------------------------------------------------------


def test_a_folder_is_no_base_model_and_its_readme_says_the_license(source: Path, out: Path) -> None:
    (source / "README.md").write_text("---\nlicense: gemma\nlicense_link: TERMS.md\n---\n# Llama\n")
    card = make(out, base_model=str(source))
    data = metadata(card.text)
    assert data["license"] == "gemma"
    assert "license_link" not in data  # that file did not come along
    assert "base_model" not in data
    assert any("no base_model" in notice for notice in card.notices)


def test_license_files_that_came_along_are_named(source: Path) -> None:
    (source / "LICENSE").write_text("All rights reserved.")
    out = source.with_name("licensed")
    w8a8.quantize(source, out)
    text = make(out).text
    data = metadata(text)
    assert (data["license"], data["license_link"]) == ("other", "LICENSE")
    assert "[LICENSE](LICENSE)" in text


def test_no_license_is_invented(out: Path) -> None:
    card = make(out)
    assert "license" not in metadata(card.text)
    assert any("no license" in notice for notice in card.notices)


def test_from_the_hub_it_has_base_model_revision_and_license(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("HF_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    readme = b"---\nlicense: other\nlicense_name: terms\nlicense_link: TERMS\n---\n# Llama\n"
    with local_hub({"org/llama": {**folder_bytes(source), "README.md": readme}}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        assert cli("quantize", "org/llama", tmp_path / "out", env=env).returncode == 0
        asked = len(hub.requests)
        run = cli("card", tmp_path / "out", env=env)
        assert run.returncode == 0, run.stderr
        assert len(hub.requests) == asked  # the cache has it
    text = (tmp_path / "out" / "README.md").read_text()
    data = metadata(text)
    assert data["base_model"] == "org/llama"
    assert (data["license"], data["license_name"]) == ("other", "terms")
    assert data["license_link"] == "https://huggingface.co/org/llama/blob/main/TERMS"
    [commands] = [b for b in blocks(text) if b.startswith("w8a8 quantize")]
    assert re.match(r"w8a8 quantize org/llama@[0-9a-f]{40} out\n", commands)


@pytest.mark.parametrize("base", ["not a name", "a/b/c", "../up"])
def test_what_is_neither_folder_nor_id_is_no_base_model(out: Path, base: str) -> None:
    with pytest.raises(UsageError, match="--base-model"):
        make(out, base_model=base)


def test_only_what_quantize_made_gets_a_card(source: Path, out: Path) -> None:
    with pytest.raises(UnsupportedSchemeError):
        make(source)
    (out / "w8a8.json").unlink()
    with pytest.raises(W8A8Error, match=r"w8a8\.json"):
        make(out)


# --- what a person adds -------------------------------------------------------------------------------------------


def test_text_between_the_marked_lines_stays(out: Path, files: Results) -> None:
    write(make(out))
    readme = out / "README.md"
    text = readme.read_text()
    places = re.findall(r"<!-- yours: begin (\w+) -->", text)
    assert len(places) > 3
    for place in places:
        begin = f"<!-- yours: begin {place} -->\n"
        text = text.replace(begin, f"{begin}## Mine: {place} | {{{{ x }}}} <b>\n\n```\ncode\n```\n")
    readme.write_text(text)

    write(make(out, results=files))
    again = readme.read_text()
    for place in places:
        mine = f"## Mine: {place} | {{{{ x }}}} <b>\n\n```\ncode\n```\n"
        assert f"<!-- yours: begin {place} -->\n{mine}<!-- yours: end {place} -->" in again
    assert "66.67%" in again


def test_written_again_it_is_the_same(out: Path, files: Results) -> None:
    write(make(out, results=files))
    first = (out / "README.md").read_bytes()
    write(make(out, results=files))
    assert (out / "README.md").read_bytes() == first
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_metadata_a_person_added_stay(out: Path, files: Results) -> None:
    write(make(out, results=files))
    readme = out / "README.md"
    readme.write_text(readme.read_text().replace("---\n", "---\nlicense: mit\nlanguage:\n- en\n", 1))
    write(make(out))
    data = metadata(readme.read_text())
    assert (data["license"], data["language"]) == ("mit", ["en"])
    assert "model-index" not in data  # what is no longer measured is no longer claimed


def drop_an_end(text: str) -> str:
    return text.replace("<!-- yours: end accuracy -->\n", "")


def drop_the_last_end(text: str) -> str:
    return text.replace("<!-- yours: end license -->\n", "")


def drop_a_begin(text: str) -> str:
    return text.replace("<!-- yours: begin usage -->\n", "")


def double_a_place(text: str) -> str:
    return text + "<!-- yours: begin usage -->\nx\n<!-- yours: end usage -->\n"


def garble_a_marker(text: str) -> str:
    return text.replace("<!-- yours: end about -->", "<!-- yours: end About -->")


def invent_a_place(text: str) -> str:
    return text + "<!-- yours: begin elsewhere -->\nx\n<!-- yours: end elsewhere -->\n"


@pytest.mark.parametrize(
    "damage", [drop_an_end, drop_the_last_end, drop_a_begin, double_a_place, garble_a_marker, invent_a_place]
)
def test_broken_marks_are_an_error_and_lose_nothing(damage: Callable[[str], str], out: Path) -> None:
    write(make(out))
    readme = out / "README.md"
    broken = damage(readme.read_text())
    readme.write_text(broken)
    with pytest.raises(UsageError, match=r"README\.md"):
        make(out)
    assert readme.read_text() == broken


def test_a_readme_of_someone_else_is_only_moved_aside_when_told(out: Path) -> None:
    (out / "README.md").write_text("# Mine\n")
    card = make(out)
    with pytest.raises(TargetExistsError, match="--overwrite"):
        write(card)
    assert (out / "README.md").read_text() == "# Mine\n"

    write(card, overwrite=True)
    assert (out / "README.before.md").read_text() == "# Mine\n"
    assert (out / "README.md").read_text() == card.text

    (out / "README.md").write_text("# Mine again\n")
    with pytest.raises(TargetExistsError, match=r"README\.before\.md"):
        write(make(out), overwrite=True)
    assert (out / "README.md").read_text() == "# Mine again\n"
    assert (out / "README.before.md").read_text() == "# Mine\n"


# --- what names may hold ------------------------------------------------------------------------------------------

HOSTILE = st.one_of(
    st.text(min_size=1, max_size=60),
    st.text(alphabet="|`<>*_[]()\\#~-!&;\n\r {}%\"'$:", min_size=1, max_size=40),
    st.sampled_from(
        [
            "a | b | c",
            "```\n# Owned\n```",
            "<script>alert(1)</script>",
            "<!-- yours: begin about -->",
            "x\n<!-- yours: end about -->\n",
            "](javascript:alert(1))",
            "{{ 7 * 7 }}{% raw %}",
            "---\nlicense: mit\n---",
            "$x$ ~~y~~ **z** __w__",
            "# Owned",
            "- item",
            "+ item",
            "1. one",
            "2) two",
            "===",
            "---",
            "    code",
        ]
    ),
)


@settings(
    max_examples=40,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(name=" ", architecture="x")
@given(name=HOSTILE, architecture=HOSTILE)
def test_names_are_shown_and_do_nothing_else(out: Path, name: str, architecture: str) -> None:
    from w8a8.terminal.wording import printable

    made, config = json.loads((out / "w8a8.json").read_text()), json.loads((out / "config.json").read_text())
    made["source"]["name"] = name.replace("/", "_").encode(errors="replace").decode()
    config["architectures"] = [architecture.encode(errors="replace").decode()]
    config["quantization_config"]["exclude"] = [made["source"]["name"], config["architectures"][0]]
    before = {path: path.read_bytes() for path in (out / "w8a8.json", out / "config.json")}
    try:
        (out / "w8a8.json").write_text(json.dumps(made))
        (out / "config.json").write_text(json.dumps(config))
        card = make(out)
        text = card.text
        write(card)
        assert make(out).text == text  # its own marks are still whole
    finally:
        for path, content in before.items():
            path.write_bytes(content)
        (out / "README.md").unlink(missing_ok=True)

    assert "license" not in metadata(text)
    found = details(text)
    assert found["Base Model"].strip() == printable(made["source"]["name"]).strip()
    assert found["Architecture"].strip() == printable(config["architectures"][0]).strip()
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
    assert [t.tag for t in tokens if t.type == "heading_open"].count("h1") == 1
    assert [t.tag for t in tokens if t.type == "heading_open"].count("h2") == len(SECTIONS)
    assert [t.level for t in tokens if t.type.endswith("_list_open")] == [0, 2]
    html = [t for t in tokens if t.type == "html_block"]
    html += [c for t in tokens for c in t.children or () if c.type == "html_inline"]
    assert all(line.startswith("<!-- ") for t in html for line in t.content.strip().splitlines())
    links = [c.attrs["href"] for t in tokens for c in t.children or () if c.type == "link_open"]
    assert links == []
