"""Gemma 4's drafter scores tokens as transformers' does, from the target's pages, and writes none.

transformers 5.23 cannot build its class as it stands: a config in which every layer is shared is refused, and targets without shared
layers hand out no keys and values. Both are mended here for the oracle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity.harness import Paged, load, random_ids, randomise
from parity.test_gemma4 import SHAPES, VOCAB, F, S, tiny_gemma4

from kvshare.cache.draft_step import DraftStep
from kvshare.cache.paged_step import PagedStep
from kvshare.checkpoints import open_checkpoint
from kvshare.checkpoints.weights import load_weights
from kvshare.errors import ConfigError
from kvshare.models import build_drafter, build_model
from kvshare.models.gemma4_assistant import Gemma4Assistant

WINDOW = 8


@pytest.fixture(autouse=True)
def _drafters_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    original = transformers.Gemma4TextConfig.kv_sharing_modes.fget

    def modes(config: Any) -> list[str]:
        count = config.num_hidden_layers
        return ["reuse"] * count if config.num_kv_shared_layers == count else original(config)

    monkeypatch.setattr(transformers.Gemma4TextConfig, "kv_sharing_modes", property(modes))


def tiny_assistant(name: str, directory: Path, **changes: Any) -> transformers.PreTrainedModel:
    """A random drafter for a tiny Gemma 4, saved to `directory`."""
    shape = SHAPES[name]
    text = {
        "model_type": "gemma4_text",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_hidden_layers": 4,
        "num_key_value_heads": shape["num_key_value_heads"],
        "num_global_key_value_heads": shape.get("num_global_key_value_heads"),
        "attention_k_eq_v": shape.get("attention_k_eq_v", False),
        "layer_types": [S, S, S, F],
        "sliding_window": WINDOW,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "pad_token_id": 0,
    }
    config = transformers.Gemma4AssistantConfig(
        **{"text_config": text, "backbone_hidden_size": 64, "num_centroids": 16, "centroid_intermediate_top_k": 4, **changes}
    )
    oracle = randomise(transformers.Gemma4AssistantForCausalLM(config), seed=3)
    if oracle.masked_embedding is not None:
        oracle.masked_embedding.token_ordering.copy_(torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0)))
    oracle.save_pretrained(directory)
    return oracle


def load_drafter(directory: Path, target: Any) -> Gemma4Assistant:
    checkpoint = open_checkpoint(directory)
    drafter = build_drafter(checkpoint.config, torch.float32, target)
    load_weights(drafter, checkpoint, torch.float32)
    return drafter.eval()


@torch.no_grad()
def oracle_draft(target: Any, assistant: Any, ids: torch.Tensor, count: int) -> torch.Tensor:  # [tokens] -> [count, vocab_size]
    """The scores of `count` tokens drafted behind `ids` and the target's own next one."""
    kinds = target.config.layer_types[: len(target.config.layer_types) - target.config.num_kv_shared_layers]
    for kind in (S, F):
        last = max(index for index, each in enumerate(kinds) if each == kind)
        target.model.layers[last].self_attn.store_full_length_kv = True
    out = target(input_ids=ids[None], return_shared_kv_states=True, output_hidden_states=True)
    shared = dict(out.shared_kv_states)
    shared[S] = tuple(rows[:, :, -WINDOW:] for rows in shared[S])
    token, hidden, logits = out.logits[:, -1:].argmax(-1), out.hidden_states[-1][:, -1:], []
    for _ in range(count):
        inputs = torch.cat([target.model.embed_tokens(token), hidden], dim=-1)
        drafted = assistant(inputs_embeds=inputs, position_ids=torch.tensor([[len(ids)]]), shared_kv_states=shared)
        logits.append(drafted.logits[0, 0])
        token, hidden = drafted.logits.argmax(-1), drafted.last_hidden_state
    return torch.stack(logits)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("name", "kv_form"), [("E2B", "plain"), ("31B", "plain"), ("31B", "compact"), ("31B", "v-only")])
@torch.no_grad()
def test_drafts_equal_transformers(name: str, kv_form: str, ordered: bool, tmp_path: Path) -> None:
    oracle_target = tiny_gemma4(name, tmp_path / "target")
    oracle = tiny_assistant(name, tmp_path / "drafter", use_ordered_embeddings=ordered)
    prompts = [random_ids(VOCAB, 1, length, seed)[0] for seed, length in enumerate((5, 30, 13))]
    expected = torch.stack([oracle_draft(oracle_target, oracle, ids, 3) for ids in prompts], dim=1)  # [drafted, sequences, vocab_size]

    target = load(tmp_path / "target", kv_form=kv_form)
    drafter, paged = load_drafter(tmp_path / "drafter", target), Paged(target, 3)
    for cache, ids in zip(paged.sequences, prompts, strict=True):
        cache.reserve(len(ids))
    ends = [4, 34, 47]
    hidden = target(torch.cat(prompts), PagedStep(paged.cache, paged.sequences, [len(ids) for ids in prompts], ends))
    for cache, ids in zip(paged.sequences, prompts, strict=True):
        cache.commit(len(ids))
    tokens, before = target.logits(hidden).argmax(-1), paged.arena.pages.clone()
    step = DraftStep(paged.cache, paged.sequences)
    for logits in expected:
        draft = drafter(tokens, hidden, step)
        assert (draft.logits - logits).abs().max() < 2e-3  # random maps add noise up; a wrong position gives 3
        tokens, hidden = draft.logits.argmax(-1), draft.hidden
    assert torch.equal(paged.arena.pages, before)
    assert paged.arena.num_held == sum(cache.num_pages for cache in paged.sequences)


def test_owns_nothing_and_reads_the_last_owner_of_each_kind(tmp_path: Path) -> None:
    tiny_gemma4("E2B", tmp_path / "target")
    tiny_assistant("E2B", tmp_path / "drafter")
    drafter = load_drafter(tmp_path / "drafter", load(tmp_path / "target"))
    assert drafter.owner == (6, 6, 6, 4)
    assert not [name for name in drafter.state_dict() if "k_norm" in name or "v_norm" in name]
    assert drafter.blocks[0].attention.qkv.weight.shape == (4 * 16, 32)  # queries only


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("backbone_hidden_size", 96, "backbone_hidden_size"),
        ("vocab_size", 8, "vocab_size"),
        ("num_key_value_heads", 2, "head_dim"),
        ("hidden_size_per_layer_input", 8, "hidden_size_per_layer_input"),
    ],
)
def test_drafter_of_another_model_is_refused(field: str, value: int, named: str, tmp_path: Path) -> None:
    tiny_gemma4("E2B", tmp_path / "target")
    tiny_assistant("E2B", tmp_path / "drafter")
    target, config = load(tmp_path / "target"), open_checkpoint(tmp_path / "drafter").config
    with pytest.raises(ConfigError, match=named):
        build_drafter({**config, field: value}, torch.float32, target)


def test_drafter_alone_and_model_as_drafter_are_refused(tmp_path: Path) -> None:
    tiny_gemma4("E2B", tmp_path / "target")
    tiny_assistant("E2B", tmp_path / "drafter")
    with pytest.raises(ConfigError, match="is a drafter"):
        build_model(open_checkpoint(tmp_path / "drafter").config, torch.float32)
    with pytest.raises(ConfigError, match="is no drafter"):
        build_drafter(open_checkpoint(tmp_path / "target").config, torch.float32, load(tmp_path / "target"))


def test_needs_a_cache_to_read(tmp_path: Path) -> None:
    tiny_gemma4("E2B", tmp_path)
    paged = Paged(load(tmp_path), 1)
    with pytest.raises(RuntimeError, match="none yet"):
        DraftStep(paged.cache, paged.sequences)
