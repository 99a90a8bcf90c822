import pytest

from tests.named import NAMES, Family, headers, plan_of
from w8a8.checkpoint import TensorSpec
from w8a8.errors import NothingToQuantizeError
from w8a8.plan import Rules, architectures, module_name


def spec(name: str, shape: tuple[int, ...] = (8, 8), dtype: str = "BF16") -> TensorSpec:
    return TensorSpec(name, dtype, shape, "model.safetensors", 0, 128)


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_decoders_linear_layers_are_quantized(name: str) -> None:
    family = Family.load(name)
    decisions = plan_of(family.checkpoint).decisions
    assert {d.tensor.name for d in decisions if d.quantize} == family.quantized
    assert len(decisions) == len(family.kinds)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_belongs_to_a_component(name: str) -> None:
    family = Family.load(name)
    plan = plan_of(family.checkpoint)
    assert [d.tensor.name for d in plan.decisions if d.component == "other"] == []
    assert plan.warnings == ()


@pytest.mark.parametrize("name", NAMES)
def test_members_of_a_fused_group_share_one_fate(name: str) -> None:
    family = Family.load(name)
    rules = Rules.for_config(family.checkpoint.config)
    fate = {module_name(d.tensor.name): d.quantize for d in plan_of(family.checkpoint).decisions}
    fused = [group for group in map(rules.group_of, fate) if group]
    assert name == "phi3" or fused
    for group in fused:
        assert len({fate[member] for member in group if member in fate}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_norms_and_convolutions_are_never_quantized(name: str) -> None:
    family = Family.load(name)
    for decision in plan_of(family.checkpoint).decisions:
        kind = family.kinds[decision.tensor.name]
        assert kind == "linear" or not decision.quantize
        assert (kind == "embedding") <= (decision.component == "embeddings")


def test_every_family_has_rules_of_its_own() -> None:
    families = {Family.load(name).checkpoint.config["model_type"] for name in NAMES}
    assert families <= set(architectures())


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "granite", "phi", "phi3"])
def test_the_generic_rules_decide_a_plain_decoder_the_same_way(name: str) -> None:
    family = Family.load(name)
    generic = Rules.for_config({"model_type": "brand_new"})
    assert not generic.known
    assert {t.name for t in family.checkpoint.tensors.values() if generic.judge(t).quantize} == family.quantized


def test_an_unknown_architecture_is_warned_about_with_what_was_decided() -> None:
    layers = {f"model.layers.{i}.self_attn.q_proj.weight": ("BF16", (16, 16)) for i in range(12)}
    odd = {"model.layers.3.mixer.mixing.weight": ("BF16", (16, 16)), "lm_head.weight": ("BF16", (32, 16))}
    plan = plan_of(headers({**layers, **odd, "model.norm.weight": ("BF16", (16,))}, {"model_type": "brand_new"}))
    (warning,) = plan.warnings
    assert "'brand_new'" in warning
    assert "Quantized: model.layers.*.self_attn.q_proj.weight. " in warning
    assert warning.endswith("Left alone: lm_head.weight, model.layers.*.mixer.mixing.weight")
    assert plan.architecture == "brand_new"


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ["llama"]}])
def test_a_config_without_a_usable_model_type_is_judged_generically(config: dict[str, object]) -> None:
    assert not Rules.for_config(config).known


def test_a_matrix_of_a_known_architecture_that_no_rule_names_is_left_alone_with_a_warning() -> None:
    tensors = {f"model.layers.{i}.{leaf}.weight": ("BF16", (8, 8)) for i in range(3) for leaf in ("mlp.up_proj", "new")}
    plan = plan_of(headers(tensors, {"model_type": "llama"}))
    assert plan.warnings == ("matrices that no rule names are left alone: model.layers.*.new.weight",)


def test_a_model_without_decoder_layers_has_nothing_to_quantize() -> None:
    checkpoint = headers({"transformer.h.0.attn.c_attn.weight": ("F32", (8, 24))}, {"model_type": "gpt2"})
    with pytest.raises(NothingToQuantizeError, match=r"gpt2.*--include"):
        plan_of(checkpoint)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (spec("model.layers.0.mlp.up_proj.weight"), "decoder linear"),
        (spec("model.layers.0.mlp.up_proj.bias", (8,)), "not a weight"),
        (spec("model.layers.0.mlp.up_proj.weight", (2, 8, 8)), "not a matrix: [2, 8, 8]"),
        (spec("model.layers.0.mlp.up_proj.weight", (0, 8)), "not a matrix: [0, 8]"),
        (spec("model.layers.0.mlp.up_proj.weight", dtype="F64"), "F64 is not a dtype to quantize from"),
        (spec("lm_head.weight"), "kept in BF16"),
        (spec("rotary.inv_freq", (8,), "F32"), "no rule names it"),
    ],
)
def test_a_verdict_says_why(tensor: TensorSpec, reason: str) -> None:
    verdict = Rules.for_config({"model_type": "llama"}).judge(tensor)
    assert verdict.reason == reason
    assert verdict.quantize == (reason == "decoder linear")


@pytest.mark.parametrize(
    "name",
    [
        "mtp.layers.0.self_attn.q_proj.weight",
        "vision_tower.transformer.layers.0.self_attn.q_proj.weight",
        "model.visual.layers.0.mlp.up_proj.weight",
        "audio_tower.layers.0.self_attn.k_proj.weight",
    ],
)
def test_what_only_looks_like_the_decoder_is_kept(name: str) -> None:
    for model_type in (*architectures(), "brand_new"):
        assert not Rules.for_config({"model_type": model_type}).judge(spec(name)).quantize


@pytest.mark.parametrize(
    ("leaf", "component"),
    [
        ("mlp.gate.weight", "router"),
        ("mlp.gate.e_score_correction_bias", "router"),
        ("mlp.shared_expert_gate.weight", "router"),
        ("block_sparse_moe.gate.weight", "router"),
        ("mlp.experts.7.down_proj.weight", "experts"),
        ("mlp.shared_experts.down_proj.weight", "mlp"),
        ("mlp.gate_proj.weight", "mlp"),
    ],
)
def test_a_router_is_not_taken_for_a_gate_projection(leaf: str, component: str) -> None:
    assert Rules.for_config({"model_type": "brand_new"}).judge(spec(f"model.layers.0.{leaf}")).component == component


@pytest.mark.parametrize(
    ("module", "group"),
    [
        ("a.k_proj", ("a.q_proj", "a.k_proj", "a.v_proj")),
        ("a.up_proj", ("a.gate_proj", "a.up_proj")),
        ("up_proj", ("gate_proj", "up_proj")),
        ("a.o_proj", ()),
    ],
)
def test_group_of_names_what_engines_fuse(module: str, group: tuple[str, ...]) -> None:
    assert Rules.for_config({"model_type": "llama"}).group_of(module) == group
