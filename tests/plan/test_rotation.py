"""A rotated model is the same function, and what is not known to stay it is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.recipes import small
from w8a8.checkpoint import Checkpoint
from w8a8.errors import UnsupportedModelError
from w8a8.plan.architectures import known
from w8a8.plan.rotation import Rotation, rotated
from w8a8.plan.viewing import view_of
from w8a8.sources.rows import RowReader

ROTATING = sorted(name for table in known().values() if table.rotates for name in table.model_types)


def saved(kind: str, folder: Path, *, tied: bool = False) -> Any:
    """A small random model as a float32 checkpoint in `folder`; its head is its own, unless `tied`."""
    made = small.model(kind)
    made.config.tie_word_embeddings = tied
    if tied:
        made.lm_head.weight = made.model.embed_tokens.weight
    made.save_pretrained(folder)
    return made


def logits(made: Any) -> torch.Tensor:
    found: torch.Tensor = made(torch.arange(40)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize("size", [1, 6, 48, 128, 896, 21 * 64])
def test_a_rotation_is_orthogonal_and_mixes_all(size: int) -> None:
    rotation, identity = Rotation(size), np.eye(size, dtype=np.float32)
    q = rotation.along(identity)
    assert np.abs(q.T @ q - identity).max() < 1e-5
    assert np.array_equal(rotation.across(identity), q.T)
    assert np.abs(q).max() <= 1.42 / np.sqrt(size)


def test_it_spreads_what_lies_in_one_channel() -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((100, 896)).astype(np.float32)
    rows[:, 5] *= 100
    crest = [float((np.abs(x).max(1) / np.sqrt((x**2).mean(1))).mean()) for x in (rows, Rotation(896).along(rows))]
    assert crest[1] < 0.3 * crest[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROTATING)
def test_the_model_stays_the_same_function(kind: str, tmp_path: Path) -> None:
    made = saved(kind, tmp_path)
    seen, before = rotated(view_of(Checkpoint.open(tmp_path))), logits(made)
    reader = RowReader(seen.path)
    values = {name: torch.from_numpy(reader.values(tensor).copy()) for name, tensor in seen.tensors.items()}
    changed = {name for name, value in values.items() if not torch.equal(value, made.state_dict()[name])}
    made.load_state_dict(values)
    assert (logits(made) - before).abs().max() < 1e-4 * before.abs().max()
    assert all(any(f".layers.{n}.self_attn.o_proj.weight" in name for name in changed) for n in range(3))
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < changed


@pytest.mark.slow
def test_parts_of_a_matrix_are_those_of_the_whole(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    seen = rotated(view_of(Checkpoint.open(tmp_path)))
    reader = RowReader(seen.path)
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    ):
        tensor = seen.tensors[name]
        whole = bytes(reader.read(tensor))
        width = tensor.nbytes // tensor.shape[0]
        assert reader.part(tensor, 3, 7) == whole[3 * width : 7 * width]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "olmo2", "glm4"])
def test_models_with_norms_behind_their_layers_are_refused(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    with pytest.raises(UnsupportedModelError, match="not known to stay what they are"):
        rotated(view_of(Checkpoint.open(tmp_path)))


@pytest.mark.slow
def test_a_head_that_is_the_embedding_and_a_tensor_without_a_place_are_refused(tmp_path: Path) -> None:
    saved("qwen3", tmp_path / "tied", tied=True)
    with pytest.raises(UnsupportedModelError, match="its head is its embedding"):
        rotated(view_of(Checkpoint.open(tmp_path / "tied")))
    made = saved("qwen3", tmp_path / "more")
    made.model.layers[1].register_parameter("gate", torch.nn.Parameter(torch.ones(48)))
    made.save_pretrained(tmp_path / "more")
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.gate reads or writes"):
        rotated(view_of(Checkpoint.open(tmp_path / "more")))
