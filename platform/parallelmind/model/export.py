"""Adapters as plain weights or plain adapters that compute without parallelmind, where that is exact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from parallelmind.config import ModelConfig, RopeConfig
from parallelmind.errors import UserError, translate_write_errors
from parallelmind.layout import Tokens, arrange, collate
from parallelmind.model.adapter import load_model_with_lora
from parallelmind.model.adapter_files import read_settings
from parallelmind.model.base_model import base_location, load_base
from parallelmind.model.card import write_card
from parallelmind.model.full_model import write_model
from parallelmind.model.hf_compat import delayed_progress_bars
from parallelmind.model.manifest import (
    EXPORTED,
    WEIGHTS,
    Manifest,
    check_replaceable,
    fetch_adapter,
    read_adapter,
    save_manifest,
)
from parallelmind.model.mask import Placement, attention_masks
from parallelmind.model.patch import unpatch
from parallelmind.model.patch_state import is_patched
from parallelmind.outputs import check_output
from parallelmind.progress import waiting
from parallelmind.storage import atomic_dir, expand_home, sha256
from parallelmind.visibility import learns_penalty

TOLERANCE = 5e-4  # largest difference of logits, as a share of the largest logit
_PROBE_TOKENS = 32


def export(
    lora_path: str | Path,
    output_path: str | Path,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    lone: bool = False,
    merge: bool = True,
) -> None:
    """Write an adapter in a form that computes without parallelmind, atomically, after comparing its logits.

    lone: for one branch alone, without siblings. merge: as one float32 model; otherwise as a plain peft
    adapter. The base is loaded in float32, also where the adapter was trained on a quantised base. Raises
    UserError where plain weights cannot compute what the adapter does, and where `output_path` is anything
    but a new or empty folder or an earlier export.
    """
    output = Path(expand_home(str(output_path)))
    folder, manifest = fetch_adapter(lora_path), read_adapter(lora_path)
    _check_exact(lora_path, manifest.rope, lone)
    base = ModelConfig(base_model=base_model or manifest.base_model, trust_remote_code=trust_remote_code)
    with translate_write_errors("output_path", output):
        check_output(output, "output_path", lora_path=[str(folder)], base_model=[base.base_model])
        check_replaceable(output, "export", "output_path")
    model, tokenizer = load_model_with_lora(
        base.base_model, folder, dtype=base.dtype, trust_remote_code=base.trust_remote_code
    )
    embeddings: Any = model.get_input_embeddings()
    ids = _probe_ids(min(len(tokenizer), len(embeddings.weight)))
    expected = _branch_logits(model, manifest.rope, ids)
    manifest = manifest.model_copy(update={"extra": {**manifest.extra, EXPORTED: manifest.files[WEIGHTS]}})
    with translate_write_errors("output_path", output, SafetensorError), atomic_dir(output) as new_folder:
        if merge:
            _write_merged(model, tokenizer, new_folder, base, manifest)
        else:
            _write_adapter(folder, tokenizer, new_folder, base, manifest)
        extended = base.model_copy(update={"add_tokens": manifest.add_tokens})
        plain = _load_plain(new_folder, None if merge else extended)
        _check_logits(plain, lora_path, ids, expected)


def _write_merged(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    base: ModelConfig,
    manifest: Manifest,
) -> None:
    with waiting("merging the adapter into the weights"):
        merged: PreTrainedModel = model.merge_and_unload()  # type: ignore[operator]
    if is_patched(merged):
        unpatch(merged)
    write_model(
        merged, tokenizer, folder, base, manifest.rope, manifest.extra, fork_markers=manifest.fork_markers
    )


def _write_adapter(
    adapter: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, base: ModelConfig, manifest: Manifest
) -> None:
    """Copy the files of an adapter, which peft reads, and name the base so that peft finds it here."""
    settings = read_settings(adapter)
    settings.base_model_name_or_path = base_location(base.base_model)
    settings.save_pretrained(str(folder))
    shutil.copyfile(adapter / WEIGHTS, folder / WEIGHTS)
    tokenizer.save_pretrained(folder)
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    manifest = manifest.model_copy(update={"files": files, "base_model": base.base_model})
    save_manifest(folder, manifest)
    write_card(folder, manifest, base)


def _load_plain(folder: Path, base: ModelConfig | None) -> PreTrainedModel | PeftModel:
    """What transformers loads from an export, or peft onto the base; without parallelmind's patch."""
    if base is None:
        with delayed_progress_bars():
            merged: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return merged
    return PeftModel.from_pretrained(load_base(base)[0], folder)


def _check_exact(lora_path: str | Path, rope: RopeConfig, lone: bool) -> None:
    if not rope.patch_rope or (lone and (rope.rope_2d_ratio == 0 or rope.branch_angle == "added")):
        return  # the branch coordinate of a lone branch is 0: added to its time, it changes nothing
    lone_remedy, trained = "", "rope_2d_ratio=0 positions=time"
    if rope.rope_2d_ratio > 0:
        reason = (
            f"rope_2d_ratio={rope.rope_2d_ratio}, and plain weights cannot rotate by the branch coordinate"
        )
        if rope.branch_angle == "alone":
            reason += ", which takes the place of the time with branch_angle=alone"
        elif not lone:
            lone_remedy = ", export one branch alone (lone=true)"
    elif rope.positions == "flat":
        reason = "positions=flat, and plain weights do not know the positions of other branches"
        lone_remedy = ", export one branch alone (lone=true)"
    elif learns_penalty(rope):
        reason = "sibling_penalty=learned, and plain weights hold no penalty for each head"
        lone_remedy, trained = ", export one branch alone (lone=true)", "sibling_penalty=0"
    elif rope.branch_embeddings:
        reason = f"branch_embeddings={rope.branch_embeddings}, and plain weights hold none"
        lone_remedy, trained = ", export one branch alone (lone=true)", "branch_embeddings=0"
    else:
        return
    remedy = f"load it with load_model_with_lora{lone_remedy}, or train with {trained}"
    raise UserError(f"lora_path={lora_path}: was trained with {reason}; {remedy}")


def _probe_ids(vocabulary: int) -> Tensor:
    """`[tokens]` random ids, the same in every process."""
    return torch.randint(vocabulary, (_PROBE_TOKENS,), generator=torch.Generator().manual_seed(0))


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
def _check_logits(
    plain: PreTrainedModel | PeftModel, lora_path: str | Path, ids: Tensor, expected: Tensor
) -> None:
    logits = plain.eval()(input_ids=ids[None]).logits[0]
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        raise UserError(
            f"lora_path={lora_path}: exported, its logits differ by {error:.2g} (over {TOLERANCE}); "
            "load it with load_model_with_lora"
        )
