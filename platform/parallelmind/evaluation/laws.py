"""The laws that a patched model obeys, as checks on a model: each raises LawViolationError with the figure that broke
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from parallelmind.config import LoraConfig, ModelConfig, RopeConfig
from parallelmind.engine.decoding_check import LogitRecorder, decoding_distance, layout_logits
from parallelmind.evaluation.probes import (
    BRANCHES,
    CLOSE,
    MAIN,
    LawViolationError,
    check_close,
    check_differ,
    patched,
    plain_logits,
    sample_logits,
)
from parallelmind.evaluation.tiny_models import tiny_tokenizer
from parallelmind.layout import Tokens, arrange
from parallelmind.model.adapter import add_lora, load_model_with_lora, save_adapter
from parallelmind.model.base_model import no_progress_bars
from parallelmind.model.structure import causal_lm

_FAR = 100_003  # a move that turns even the slowest pair of a long-context model
_SHIFT = 600  # past the longest text of a tiny model, where scaled frequencies would change


def rope_config_grid(**values: Sequence[Any]) -> list[RopeConfig]:
    """Every combination of the values of some fields."""
    return [
        RopeConfig.model_validate(dict(zip(values, chosen, strict=True)))
        for chosen in product(*values.values())
    ]


_LAYOUTS = rope_config_grid(
    visibility=("columnar", "isolated"), positions=("time", "flat"), align_to=("left", "right")
)
_ANGLES = [
    *rope_config_grid(
        rope_2d_ratio=(0.0, 0.5, 1.0), pairs=("low",), branch_angle=("alone",), sibling_penalty=(0.0,)
    ),
    *rope_config_grid(rope_2d_ratio=(0.5,), pairs=("high",), branch_angle=("added",), sibling_penalty=(1.5,)),
]
_TURNING = {"rope_2d_ratio", "pairs", "branch_angle", "sibling_penalty"}
ALL_ROPE_CONFIGS = [
    placed.model_copy(update=turned.model_dump(include=_TURNING))
    for placed, turned in product(_LAYOUTS, _ANGLES)
]
SAMPLED_ROPE_CONFIGS = [
    ALL_ROPE_CONFIGS[4 * k + (k + k // 4) % 4] for k in range(8)
]  # every layout, and each way of turning twice


def check_unpatch(model: PreTrainedModel) -> None:
    """Law 1: unpatch restores the model bit for bit."""
    before = [(type(module), sorted(module._buffers)) for module in model.modules()]
    logits = plain_logits(model, MAIN)
    with patched(model, RopeConfig(rope_2d_ratio=1.0)):
        check_differ(
            plain_logits(model, MAIN + BRANCHES[0]),
            plain_logits(model, MAIN[::-1] + BRANCHES[0]),
            "two texts",
        )
    if [(type(module), sorted(module._buffers)) for module in model.modules()] != before:
        raise LawViolationError("classes or buffers are not what they were")
    if not torch.equal(plain_logits(model, MAIN), logits):
        raise LawViolationError("logits are not what they were")


def check_single_branch(model: PreTrainedModel) -> None:
    """Law 1: one branch and positions = time is the unpatched model, with r = 0, or at coordinate 0 where
    that is added.
    """
    text = MAIN + BRANCHES[1]
    expected = plain_logits(model, text)
    with patched(model, RopeConfig(rope_2d_ratio=1, branch_angle="added")) as config:
        check_close(plain_logits(model, text), expected, "a call without pos2d and the unpatched model")
        check_close(
            layout_logits(model, arrange(Tokens.of([], [text]), config), config)[1],
            expected,
            "a branch at 0 and the base",
        )
    with patched(model, RopeConfig(rope_2d_ratio=0)) as config:
        if not torch.equal(plain_logits(model, text), expected):
            raise LawViolationError("a call without pos2d is not what it was")
        check_close(
            torch.cat(sample_logits(model, config, BRANCHES[1:2])),
            expected,
            "one branch and the unpatched model",
        )


def check_isolated_branches(model: PreTrainedModel) -> None:
    """Law 2: isolated branches with r = 0 and time positions are main and branch run alone."""
    expected = [plain_logits(model, MAIN + branch)[len(MAIN) :] for branch in BRANCHES]
    with patched(model, RopeConfig(rope_2d_ratio=0, visibility="isolated")) as config:
        for found, lone in zip(sample_logits(model, config)[1:], expected, strict=True):
            check_close(found, lone, "a branch beside siblings and alone")


def check_cached_decoding(model: PreTrainedModel, among: Iterable[RopeConfig] = SAMPLED_ROPE_CONFIGS) -> None:
    """Law 3: cached incremental decoding is one full forward, for every visibility, ratio and alignment; main
    comes and goes.
    """
    for number, setting in enumerate(among):
        with patched(model, setting) as config:
            check_cached_sample(model, MAIN if number % 2 else [], config)


def check_cached_sample(
    model: PreTrainedModel | PeftModel, main: list[int], config: RopeConfig, share: float = CLOSE
) -> None:
    """Law 3 for one sample on a patched model: logits of cached decoding are those of one forward pass in
    training's layout.

    share: how far apart they may be, as a share of the largest logit.
    """
    distance = decoding_distance(model, tiny_tokenizer(), config, main)
    if not distance <= share:
        raise LawViolationError(
            f"cached and full logits ({config}) differ by {distance:.2g} of the largest logit"
        )


def check_separate_rows(model: PreTrainedModel) -> None:
    """The fallback of a model that cannot be patched: every branch, in a row of its own, says what it says
    alone.

    A scan over a text and steps along it round differently, by more than attention does.
    """
    for main in ([], MAIN):
        engine = LogitRecorder(model, tiny_tokenizer(), main)
        engine.run()
        for branch, prompt in enumerate(BRANCHES):
            lone = plain_logits(model, [*main, *prompt, *engine.state.generated(branch).tolist()])
            first = len(main) + len(prompt) - 1
            check_close(
                torch.stack(engine.logits[branch]),
                lone[first:-1],
                "a branch in a row of its own and alone",
                10 * CLOSE,
            )


def check_siblings(model: PreTrainedModel) -> None:
    """Law 4: isolated, no branch changes another; columnar, it changes only what is later in time."""
    changed = [[*BRANCHES[0][:1], 99, *BRANCHES[0][2:]], *BRANCHES[1:]]
    heard = rope_config_grid(
        visibility=("columnar", "isolated"),
        align_to=("left", "right"),
        rope_2d_ratio=(0.0, 0.5),
        pairs=("low",),
        branch_angle=("alone",),
        branch_stride=(128,),
        sibling_penalty=(0.0,),
    )
    for setting in heard:
        with patched(model, setting) as config:
            layout = arrange(Tokens.of(MAIN, BRANCHES), config)
            at = int(layout.time[layout.sequence == 1][1])  # when the changed token stands
            before, after = sample_logits(model, config), sample_logits(model, config, changed)
        check_differ(before[1][1:], after[1][1:], "a branch whose token was changed")
        for number in (0, 2, 3):
            time = torch.from_numpy(np.sort(layout.time[layout.sequence == number]))
            unmoved = time <= at if config.visibility == "columnar" else time >= 0
            check_close(
                before[number][unmoved], after[number][unmoved], f"a sibling of a changed branch ({config})"
            )
        if config.visibility == "columnar":
            check_differ(before[2], after[2], "a sibling of a changed branch")


def check_coordinate_shift(model: PreTrainedModel) -> None:
    """Law 5: a shift of all branch coordinates changes nothing, moving one branch changes logits."""
    chosen = rope_config_grid(
        pairs=("low", "mid", "spread"),
        branch_angle=("alone",),
        rope_2d_ratio=(0.25, 1.0),
        positions=("time", "flat"),
        branch_stride=(3,),
    )
    added = rope_config_grid(
        pairs=("high",),
        branch_angle=("added",),
        rope_2d_ratio=(0.25,),
        positions=("time", "flat"),
        branch_stride=(3,),
    )
    for setting in [*chosen[::3], *added]:  # each choice of pairs, ratio, angle and kind of position
        with patched(model, setting) as config:
            still = torch.cat(sample_logits(model, config))
            check_close(
                torch.cat(sample_logits(model, config, shift=_SHIFT)), still, f"shifted branches ({config})"
            )
            check_differ(
                torch.cat(sample_logits(model, config, move=2, by=_FAR)), still, f"a moved branch ({config})"
            )


def check_save_load(model: PreTrainedModel) -> None:
    """Law 6: base model and adapter, saved and loaded, give the same logits."""
    rope, lora, attention = (
        RopeConfig(visibility="isolated"),
        LoraConfig(lora_rank=2),
        model.config._attn_implementation,
    )
    with TemporaryDirectory() as folder:
        _save_base(model, f"{folder}/base")
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


def _save_base(model: PreTrainedModel, folder: str) -> None:
    with no_progress_bars():
        model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    # Where a type's causal LM is built from the text part of its configuration alone, checkpoints carry the
    # whole.
    kinds: list[Any] = list(MODEL_FOR_CAUSAL_LM_MAPPING)
    if type(model.config) not in kinds:
        whole = next(kind for kind in kinds if kind.sub_configs.get("text_config") is type(model.config))
        whole(text_config=model.config.to_dict()).save_pretrained(folder)


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
    )
}
