"""The laws of a patched model, each as a check that raises LawViolationError with the measured difference.

docs/pos2d.md explains the laws. The checks use the sample of MAIN and BRANCHES, law 3 also a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import cycle
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from parallelmind.config import LoraConfig, ModelConfig, RopeConfig
from parallelmind.engine.decoding_check import CHECK_TREE, LogitRecorder, decoding_distance, layout_logits
from parallelmind.engine.request import Sample
from parallelmind.evaluation.probes import (
    BRANCHES,
    MAIN,
    ROUNDING_TOLERANCE,
    LawViolationError,
    check_close,
    check_differ,
    patched,
    plain_logits,
    sample_logits,
)
from parallelmind.evaluation.rope_configs import SAMPLED_ROPE_CONFIGS, rope_config_grid
from parallelmind.evaluation.tiny_models import tiny_tokenizer
from parallelmind.evaluation.tree_law import check_tree_gradients, check_tree_paths, check_tree_siblings
from parallelmind.layout import Tokens, arrange
from parallelmind.model.adapter import add_lora, load_model_with_lora, save_adapter
from parallelmind.model.hf_compat import no_progress_bars
from parallelmind.model.structure import causal_lm

_LARGE_MOVE = 100_003  # changes the angle of even the slowest pair of a long-context model
_SHIFT = 600  # longer than any text of a tiny model, where length-dependent frequencies would change


def check_unpatch(model: PreTrainedModel) -> None:
    """Law 1: unpatch restores the model bit for bit."""
    modules_before = _module_state(model)
    logits_before = plain_logits(model, MAIN)
    with patched(model, RopeConfig(rope_2d_ratio=1.0)):
        check_differ(
            plain_logits(model, MAIN + BRANCHES[0]),
            plain_logits(model, MAIN[::-1] + BRANCHES[0]),
            "two texts",
        )
    if _module_state(model) != modules_before:
        raise LawViolationError("unpatch does not restore all classes and buffers")
    if not torch.equal(plain_logits(model, MAIN), logits_before):
        raise LawViolationError("unpatch does not restore the logits")


def check_single_branch(model: PreTrainedModel) -> None:
    """Law 1: one branch is the unpatched model, at branch coordinate 0 or with ratio 0 (positions=time)."""
    text = MAIN + BRANCHES[1]
    expected = plain_logits(model, text)
    with patched(model, RopeConfig(rope_2d_ratio=1, branch_angle="added")) as config:
        check_close(plain_logits(model, text), expected, "a call without pos2d and the unpatched model")
        layout = arrange(Tokens.of([], [text]), config)
        branch_logits = layout_logits(model, layout, config)[1]
        check_close(branch_logits, expected, "a branch at coordinate 0 and the unpatched model")
    with patched(model, RopeConfig(rope_2d_ratio=0)) as config:
        if not torch.equal(plain_logits(model, text), expected):
            raise LawViolationError("a call without pos2d differs from the unpatched model")
        logits = torch.cat(sample_logits(model, config, BRANCHES[1:2]))
        check_close(logits, expected, "one branch and the unpatched model")


def check_isolated_branches(model: PreTrainedModel) -> None:
    """Law 2: with `isolated`, ratio 0 and positions=time, a branch equals main and branch run alone."""
    expected = [plain_logits(model, MAIN + branch)[len(MAIN) :] for branch in BRANCHES]
    with patched(model, RopeConfig(rope_2d_ratio=0, visibility="isolated")) as config:
        for branch_logits, expected_logits in zip(sample_logits(model, config)[1:], expected, strict=True):
            check_close(branch_logits, expected_logits, "a branch beside siblings and alone")


def check_cached_decoding(
    model: PreTrainedModel, configs: Iterable[RopeConfig] = SAMPLED_ROPE_CONFIGS
) -> None:
    """Law 3: cached decoding equals one full forward pass.

    The configs are checked in turn with a sample without main, one with main, and a tree.
    """
    samples = cycle([Sample([], BRANCHES), Sample(MAIN, BRANCHES), CHECK_TREE])
    for config, sample in zip(configs, samples, strict=False):
        with patched(model, config):
            distance = decoding_distance(model, tiny_tokenizer(), config, sample)
        if not distance <= ROUNDING_TOLERANCE:
            raise LawViolationError(
                f"cached and full logits ({config}) differ by {distance:.2g} of the largest logit"
            )


def check_separate_rows(model: PreTrainedModel) -> None:
    """Fallback of a model that cannot be patched: a branch in its own batch row equals the branch alone.

    The tolerance is larger than for attention: a scan over a text and single steps round differently.
    """
    for main in ([], MAIN):
        engine = LogitRecorder(model, tiny_tokenizer(), Sample(main, BRANCHES))
        engine.run()
        for branch, prompt in enumerate(BRANCHES):
            text = [*main, *prompt, *engine.group.branches[branch].generated]
            first_decoded = len(main) + len(prompt) - 1
            check_close(
                torch.stack(engine.logits[branch]),
                plain_logits(model, text)[first_decoded:-1],
                "a branch in its own row and alone",
                tolerance=10 * ROUNDING_TOLERANCE,
            )


def check_siblings(model: PreTrainedModel) -> None:
    """Law 4: a changed token affects no sibling (isolated), or only later times of siblings (columnar)."""
    changed_token = 1  # index within the first branch
    changed = [[*BRANCHES[0][:changed_token], 99, *BRANCHES[0][changed_token + 1 :]], *BRANCHES[1:]]
    configs = rope_config_grid(
        visibility=("columnar", "isolated"),
        align_to=("left", "right"),
        rope_2d_ratio=(0.0, 0.5),
        pairs=("low",),
        branch_angle=("alone",),
        branch_stride=(128,),
        sibling_penalty=(0.0,),
    )
    for config in configs:
        with patched(model, config):
            layout = arrange(Tokens.of(MAIN, BRANCHES), config)
            change_time = int(layout.time[layout.segment == 1][changed_token])
            before, after = sample_logits(model, config), sample_logits(model, config, changed)
        check_differ(before[1][1:], after[1][1:], "a branch whose token was changed")
        for segment in (0, 2, 3):
            time = torch.from_numpy(np.sort(layout.time[layout.segment == segment]))
            unaffected = time <= change_time if config.visibility == "columnar" else time >= 0
            check_close(
                before[segment][unaffected],
                after[segment][unaffected],
                f"logits before and after a change in a sibling ({config})",
            )
        if config.visibility == "columnar":
            check_differ(before[2], after[2], "logits before and after a change in a sibling")


def check_coordinate_shift(model: PreTrainedModel) -> None:
    """Law 5: shifting all branch coordinates changes nothing, moving one branch changes logits."""
    alone_configs = rope_config_grid(
        pairs=("low", "mid", "spread"),
        branch_angle=("alone",),
        rope_2d_ratio=(0.25, 1.0),
        positions=("time", "flat"),
        branch_stride=(3,),
    )
    added_configs = rope_config_grid(
        pairs=("high",),
        branch_angle=("added",),
        rope_2d_ratio=(0.25,),
        positions=("time", "flat"),
        branch_stride=(3,),
    )
    for config in [
        *alone_configs[::3],
        *added_configs,
    ]:  # every value of pairs, ratio, angle and positions is included
        with patched(model, config):
            unmoved = torch.cat(sample_logits(model, config))
            shifted = torch.cat(sample_logits(model, config, shift=_SHIFT))
            moved = torch.cat(sample_logits(model, config, moved_branch=2, move_by=_LARGE_MOVE))
        check_close(shifted, unmoved, f"logits before and after a shift of all branches ({config})")
        check_differ(moved, unmoved, f"logits before and after a move of one branch ({config})")


def check_save_load(model: PreTrainedModel) -> None:
    """Law 6: a base model and its adapter give the same logits after saving and loading."""
    rope, lora = RopeConfig(visibility="isolated"), LoraConfig(lora_rank=2)
    attention = model.config._attn_implementation
    with TemporaryDirectory() as folder:
        _save_base_model(model, f"{folder}/base")
        base = ModelConfig(base_model=f"{folder}/base")
        copy, _ = load_model_with_lora(
            base_model=base.base_model, attn_implementation=attention, **rope.model_dump()
        )
        adapted = add_lora(causal_lm(copy), lora, seed=0)
        with torch.no_grad():
            for weight in adapted.parameters():
                if weight.requires_grad:
                    weight.normal_(0, 0.1)
        save_adapter(adapted, tiny_tokenizer(), f"{folder}/adapter", base, rope, lora)
        loaded, _ = load_model_with_lora(lora_path=f"{folder}/adapter", attn_implementation=attention)
        expected = torch.cat(sample_logits(adapted.eval(), rope))
        check_close(torch.cat(sample_logits(loaded, rope)), expected, "a saved and a loaded model")
        with patched(model, rope):
            check_differ(torch.cat(sample_logits(model, rope)), expected, "a base model and its adapter")


LAWS: dict[str, Callable[[PreTrainedModel], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_unpatch,
        check_single_branch,
        check_isolated_branches,
        check_cached_decoding,
        check_siblings,
        check_coordinate_shift,
        check_save_load,
        check_tree_paths,
        check_tree_siblings,
        check_tree_gradients,
    )
}


def _module_state(model: PreTrainedModel) -> list[tuple[type, list[str]]]:
    """Class and buffer names of every module."""
    return [(type(module), sorted(module._buffers)) for module in model.modules()]


def _save_base_model(model: PreTrainedModel, folder: str) -> None:
    with no_progress_bars():
        model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    # Some causal LMs are built from the text part of a configuration. Their checkpoints hold the whole one.
    config_classes: list[Any] = list(MODEL_FOR_CAUSAL_LM_MAPPING)
    if type(model.config) not in config_classes:
        whole_config = next(
            config_class
            for config_class in config_classes
            if config_class.sub_configs.get("text_config") is type(model.config)
        )
        whole_config(text_config=model.config.to_dict()).save_pretrained(folder)
