"""Attention maps: all of the attention is somewhere, and it is where the rule of visibility and the plain
model put it.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import save_tiny

from parallelmind.config import RopeConfig
from parallelmind.errors import UserError
from parallelmind.evaluation.attention_maps import attention_map
from parallelmind.evaluation.probes import BRANCHES, MAIN, patched
from parallelmind.evaluation.tiny_models import tiny_model
from parallelmind.layout import Tokens
from workloads.evaluate import command as evaluate

TOKENS = Tokens.of(MAIN, BRANCHES)
TYPES = ["llama", "gemma3_text", "gptj"]


@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
@pytest.mark.parametrize("model_type", TYPES)
def test_shares_add_up_and_siblings_are_seen_by_the_rule(model_type, visibility):
    model = tiny_model(model_type)
    with patched(model, RopeConfig(visibility=visibility)):
        found = attention_map(model, TOKENS, branch=1)
    shares = found.shares()
    assert shares.shape == (model.config.num_hidden_layers, 3)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-5)
    siblings = shares[:, 2]
    assert (siblings > 1e-3).any() if visibility == "columnar" else (siblings == 0).all()
    assert (shares[:, 1] > 0).all()
    # Where there is a token, and nowhere else, there is a figure.
    lengths = [np.isfinite(found.weights[0, row]).sum() for row in range(4)]
    assert lengths == [len(MAIN), *map(len, BRANCHES)]
    assert found.query_times == [len(MAIN) + len(BRANCHES[1]) - 1]


@pytest.mark.parametrize("align_to", ["left", "right"])
def test_nobody_looks_ahead_in_time(align_to):
    model = tiny_model("llama")
    with patched(model, RopeConfig(align_to=align_to)):
        found = attention_map(model, TOKENS, branch=0)
    (now,) = found.query_times
    assert now == len(MAIN) + (3 if align_to == "left" else 5)
    seen = np.nan_to_num(found.weights)
    assert (seen[:, :, now + 1 :] == 0).all()
    assert (np.delete(seen[:, :, now], found.query_sequence, axis=1) == 0).all()


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_the_map_is_the_plain_models_own_attention(model_type):
    """Isolated branches with ratio 0 attend as main and branch do alone."""
    model, branch = tiny_model(model_type), 2
    text = torch.tensor([MAIN + BRANCHES[branch]])
    alone = [
        layer[0].mean(dim=0).numpy()
        for layer in model(text, output_attentions=True, use_cache=False).attentions
    ]
    with patched(model, RopeConfig(visibility="isolated", rope_2d_ratio=0)):
        last, mean = (attention_map(model, TOKENS, branch, query_tokens) for query_tokens in ("last", "all"))
    for number, layer in enumerate(alone):
        for found, expected in ((last, layer[-1]), (mean, layer[len(MAIN) :].mean(axis=0))):
            own = found.weights[number, branch + 1]
            row = np.concatenate([found.weights[number, 0, : len(MAIN)], own[np.isfinite(own)]])
            np.testing.assert_allclose(row, expected, atol=1e-4)
    assert mean.query_times == [len(MAIN), len(MAIN) + 1]


def test_what_has_no_map_is_refused():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="patch_rope=false: an attention map needs the patch"):
        attention_map(model, TOKENS)
    with (
        patched(model, RopeConfig()),
        pytest.raises(UserError, match="branch=3: the sample has branches 0 to 2"),
    ):
        attention_map(model, TOKENS, branch=3)


def test_the_command(tmp_path, capsys):
    output = tmp_path / "maps" / "map.png"
    prompts = "prompts=[who lives, where is the passage, what]"
    given = ["attention", f"base_model={save_tiny(tmp_path)}", "main=the answer is in the passage", prompts]
    evaluate.main([*given, "branch=1", "tokens=all", f"output_path={output}", "visibility=isolated"])
    assert output.read_bytes().startswith(b"\x89PNG")
    found = json.loads(output.with_suffix(".json").read_text())
    assert len(found["layers"]) == 2
    for shares in (*found["layers"], found["mean"]):
        assert sum(shares[name] for name in ("main", "own", "siblings")) == pytest.approx(1, abs=1e-4)
        assert shares["siblings"] == pytest.approx(0, abs=1e-6)
    assert "siblings" in capsys.readouterr().out
    with pytest.raises(UserError, match="output_path=map.jpg: .*end it in .png"):
        evaluate.main([*given, "output_path=map.jpg"])
    with pytest.raises(UserError, match="prompts"):
        evaluate.main(["attention", "output_path=map.png"])
