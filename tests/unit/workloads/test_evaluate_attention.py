"""Attention maps: weights sum to one, follow the visibility and equal those of the unpatched model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import save_tiny, tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.errors import UserError
from parallelmind.evaluation.attention_maps import attention_map
from parallelmind.evaluation.probes import BRANCHES, MAIN, patched
from parallelmind.evaluation.tiny_models import tiny_model
from parallelmind.layout import Tokens
from parallelmind.tree import Tree
from workloads.evaluate.command import main as evaluate

TOKENS = Tokens.of(MAIN, BRANCHES)
MODEL_TYPES = ["llama", "gemma3_text", "gptj"]


@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_shares_sum_to_one_and_siblings_follow_the_visibility(model_type, visibility):
    model = tiny_model(model_type)
    with patched(model, RopeConfig(visibility=visibility)):
        attention = attention_map(model, TOKENS, branch=1)
    shares = attention.shares()
    assert list(shares) == ["main", "own", "siblings"]
    assert all(len(share) == model.config.num_hidden_layers for share in shares.values())
    np.testing.assert_allclose(sum(shares.values()), 1, atol=1e-5)
    siblings = shares["siblings"]
    assert (siblings > 1e-3).any() if visibility == "columnar" else (siblings == 0).all()
    assert (shares["own"] > 0).all()
    # Every token has a weight, and cells without a token have none.
    lengths = [np.isfinite(attention.weights[0, sequence]).sum() for sequence in range(4)]
    assert lengths == [len(MAIN), *map(len, BRANCHES)]
    assert attention.query_times == [len(MAIN) + len(BRANCHES[1]) - 1]


@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
def test_a_reduce_attends_to_the_branches_that_it_joins(visibility):
    model = tiny_model("llama")
    tokens = Tokens.of_tree([MAIN, *BRANCHES, [7, 8, 9]], Tree.flat(len(BRANCHES), has_reduce=True))
    with patched(model, RopeConfig(visibility=visibility)):
        attention = attention_map(model, tokens, branch=len(BRANCHES))
        of_branch = attention_map(model, tokens, branch=0).shares()
    shares = attention.shares()
    assert list(shares) == ["main", "own", "siblings", "joined"]
    np.testing.assert_allclose(sum(shares.values()), 1, atol=1e-5)
    assert (shares["joined"] > 1e-3).all()
    assert (shares["siblings"] == 0).all()
    assert attention.query_times == [len(MAIN) + max(map(len, BRANCHES)) + 2]
    assert list(of_branch) == ["main", "own", "siblings"]


@pytest.mark.parametrize("align_to", ["left", "right"])
def test_later_times_have_no_weight(align_to):
    model = tiny_model("llama")
    with patched(model, RopeConfig(align_to=align_to)):
        attention = attention_map(model, TOKENS, branch=0)
    (query_time,) = attention.query_times
    assert query_time == len(MAIN) + (3 if align_to == "left" else 5)
    weights = np.nan_to_num(attention.weights)
    assert (weights[:, :, query_time + 1 :] == 0).all()
    assert (np.delete(weights[:, :, query_time], attention.query_segment, axis=1) == 0).all()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_isolated_map_equals_the_attention_of_the_unpatched_model(model_type):
    """Isolated branches with ratio 0 attend as main and branch run alone."""
    model, branch = tiny_model(model_type), 2
    text = torch.tensor([MAIN + BRANCHES[branch]])
    expected_layers = [
        layer[0].mean(dim=0).numpy()
        for layer in model(text, output_attentions=True, use_cache=False).attentions
    ]
    with patched(model, RopeConfig(visibility="isolated", rope_2d_ratio=0)):
        last = attention_map(model, TOKENS, branch, query_tokens="last")
        mean = attention_map(model, TOKENS, branch, query_tokens="all")
    for number, layer in enumerate(expected_layers):
        for attention, expected in ((last, layer[-1]), (mean, layer[len(MAIN) :].mean(axis=0))):
            own = attention.weights[number, branch + 1]
            main = attention.weights[number, 0, : len(MAIN)]
            row = np.concatenate([main, own[np.isfinite(own)]])
            np.testing.assert_allclose(row, expected, atol=1e-4)
    assert mean.query_times == [len(MAIN), len(MAIN) + 1]


def test_unpatched_models_and_missing_branches_are_refused():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="patch_rope=false: an attention map needs the patch"):
        attention_map(model, TOKENS)
    with (
        patched(model, RopeConfig()),
        pytest.raises(UserError, match="branch=3: the sample has the indices 0 to 2"),
    ):
        attention_map(model, TOKENS, branch=3)
    tree = Tokens.of_tree([MAIN, *BRANCHES, [7]], Tree.flat(len(BRANCHES), has_reduce=True))
    with (
        patched(model, RopeConfig()),
        pytest.raises(UserError, match="branch=4: the sample has the indices 0 to 3, its reduce included"),
    ):
        attention_map(model, tree, branch=4)


def test_command_writes_maps_and_shares(tmp_path, capsys):
    output = tmp_path / "maps" / "map.png"
    prompts = "prompts=[who lives, where is the passage, what]"
    argv = ["attention", f"base_model={save_tiny(tmp_path)}", "main=the answer is in the passage", prompts]
    evaluate([*argv, "branch=1", "tokens=all", f"output_path={output}", "visibility=isolated"])
    assert output.read_bytes().startswith(b"\x89PNG")
    report = json.loads(output.with_suffix(".json").read_text())
    assert len(report["layers"]) == 2
    for shares in (*report["layers"], report["mean"]):
        assert sum(shares[name] for name in ("main", "own", "siblings")) == pytest.approx(1, abs=1e-4)
        assert shares["siblings"] == pytest.approx(0, abs=1e-6)
    assert "siblings" in capsys.readouterr().out
    evaluate([*argv, "reduce= so", "branch=3", f"output_path={output}"])
    joined = json.loads(output.with_suffix(".json").read_text())["mean"]
    assert joined["joined"] > 0 == joined["siblings"]
    assert "joined" in capsys.readouterr().out
    with pytest.raises(UserError, match="output_path=map.jpg: .*end it in .png"):
        evaluate([*argv, "output_path=map.jpg"])
    with pytest.raises(UserError, match="prompts"):
        evaluate(["attention", "output_path=map.png"])


def test_a_token_without_a_row_in_the_embedding_is_refused(tmp_path):
    tiny, tokenizer = save_tiny(tmp_path / "tiny"), tiny_tokenizer()
    tokenizer.add_tokens([f"<more{number}>" for number in range(500)])
    tokenizer.save_pretrained(tiny)
    (tmp_path / "in.jsonl").write_text(json.dumps({"main": "the", "branches": [" who <more499>"] * 2}))
    attention = ["attention", 'prompts=["<more499>", "who"]', f"output_path={tmp_path}/a.png"]
    tax = ["tax", f"data_path={tmp_path}/in.jsonl", "branches=[1, 2]"]
    for command in (attention, tax):
        with pytest.raises(UserError, match=r"token id \d+: the model's vocabulary is 0\.\."):
            evaluate([*command, f"base_model={tiny}"])
