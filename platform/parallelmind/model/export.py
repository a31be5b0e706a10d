"""Merging an adapter into plain weights that transformers loads without parallelmind, where that is exact."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from parallelmind.config import ModelConfig, RopeConfig
from parallelmind.errors import UserError, translate_write_errors
from parallelmind.layout import Tokens, arrange, collate
from parallelmind.model.adapter import load_model_with_lora
from parallelmind.model.full_model import write_model
from parallelmind.model.hf_compat import no_progress_bars
from parallelmind.model.manifest import EXPORTED, WEIGHTS, check_replaceable, read_adapter
from parallelmind.model.mask import Placement, attention_masks
from parallelmind.model.patch import unpatch
from parallelmind.model.patch_state import is_patched
from parallelmind.outputs import check_output
from parallelmind.storage import atomic_dir, expand_home

TOLERANCE = 5e-4  # largest difference of logits, as a share of the largest logit
_PROBE_TOKENS = 32


def export(
    lora_path: str | Path,
    output_path: str | Path,
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write base and adapter as one float32 model, atomically, after its logits have been compared.

    The base is loaded in float32, also where the adapter was trained on a quantised base. Raises UserError
    where plain weights cannot compute what the adapter does, and where `output_path` is anything but a new or
    empty folder or an earlier export.
    """
    output = Path(expand_home(str(output_path)))
    manifest = read_adapter(lora_path)
    _check_exact(lora_path, manifest.rope)
    base = ModelConfig(base_model=base_model or manifest.base_model, trust_remote_code=trust_remote_code)
    with translate_write_errors("output_path", output):
        check_output(output, "output_path", lora_path=[lora_path], base_model=[base.base_model])
        check_replaceable(output, "export", "output_path")
    model, tokenizer = load_model_with_lora(
        base.base_model, lora_path, dtype=base.dtype, trust_remote_code=base.trust_remote_code
    )
    ids = _probe_ids(tokenizer)
    expected = _branch_logits(model, manifest.rope, ids)
    merged: PreTrainedModel = model.merge_and_unload()  # type: ignore[operator]
    if is_patched(merged):
        unpatch(merged)
    with translate_write_errors("output_path", output, SafetensorError), atomic_dir(output) as new_folder:
        extra = {**manifest.extra, EXPORTED: manifest.files[WEIGHTS]}
        write_model(merged, tokenizer, new_folder, base, manifest.rope, extra)
        _check_merged(new_folder, lora_path, ids, expected)


def _check_exact(lora_path: str | Path, rope: RopeConfig) -> None:
    if rope.patch_rope and rope.rope_2d_ratio > 0:
        reason = (
            f"rope_2d_ratio={rope.rope_2d_ratio}, and plain weights cannot rotate by the branch coordinate"
        )
    elif rope.patch_rope and rope.positions == "flat":
        reason = "positions=flat, and plain weights do not know the positions of other branches"
    else:
        return
    remedy = "load it with load_model_with_lora, or train with rope_2d_ratio=0 positions=time"
    raise UserError(f"lora_path={lora_path}: was trained with {reason}; {remedy}")


def _probe_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """`[tokens]` random ids, the same in every process."""
    return torch.randint(len(tokenizer), (_PROBE_TOKENS,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _branch_logits(model: PreTrainedModel | PeftModel, rope: RopeConfig, ids: Tensor) -> Tensor:
    """`[tokens, vocab]` logits of a single branch in training's layout."""
    if not rope.patch_rope:
        return model(input_ids=ids[None]).logits[0]
    batch = collate([arrange(Tokens.of([], [ids.tolist()]), rope)], pad_id=0)
    pos2d = torch.from_numpy(batch.pos2d)
    placement = Placement(pos2d[..., 1], torch.from_numpy(batch.segment), torch.from_numpy(batch.relations))
    masks = attention_masks(model, placement, rope.visibility, batch.is_flat)
    return model(input_ids=ids[None], pos2d=pos2d, attention_mask=masks).logits[0]


@torch.no_grad()
def _check_merged(folder: Path, lora_path: str | Path, ids: Tensor, expected: Tensor) -> None:
    with no_progress_bars():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = plain.eval()(input_ids=ids[None]).logits[0]
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        raise UserError(
            f"lora_path={lora_path}: merged, its logits differ by {error:.2g} (over {TOLERANCE}); "
            "load it with load_model_with_lora"
        )
