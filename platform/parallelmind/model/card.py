"""The model card (README.md) of an adapter or a model, without local paths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from parallelmind.config import ModelConfig
from parallelmind.model.base_name import SMOLLM2, is_hub_id
from parallelmind.model.manifest import CARD, Manifest

_SMOLLM2_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PARALLEL = "It reads and writes several branches of text in one sequence, in one forward pass."
_PLAIN = "It was trained on plain sequences, one branch each, without 2D RoPE."


def write_card(folder: Path, manifest: Manifest, base: ModelConfig) -> None:
    (folder / CARD).write_text(model_card(manifest, base), encoding="utf-8")


def model_card(manifest: Manifest, base: ModelConfig) -> str:
    """Markdown with the hub's front matter. Metrics come from `manifest.extra["metrics"]`."""
    name = manifest.base_model if is_hub_id(manifest.base_model) else Path(manifest.base_model).name
    is_whole = manifest.lora is None
    front = ModelCardData(
        base_model=_SMOLLM2_ON_HUB if name == SMOLLM2 else name,
        library_name="transformers" if is_whole else "peft",
        pipeline_tag="text-generation",
        tags=["parallelmind", "branch-parallel", *(() if is_whole else ("lora",))],
    )
    tables = {
        "Placement": manifest.rope.model_dump(),
        "LoRA": {} if manifest.lora is None else manifest.lora.model_dump(),
        "Metrics": manifest.extra.get("metrics", {}),
        "Versions": manifest.versions,
    }
    contents = f"{'All parameters' if is_whole else 'A LoRA adapter'} of {name}."
    use = _PARALLEL if manifest.rope.patch_rope else _PLAIN
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {name}, branch-parallel",
        f"{contents} {use} Trained with dtype={base.dtype} and quantize={base.quantize}.",
        _usage(name, is_whole),
        *(_table(title, rows) for title, rows in tables.items() if rows),
    ]
    return "\n\n".join(parts) + "\n"


def _usage(name: str, is_whole: bool) -> str:
    source = 'base_model="this folder"' if is_whole else f'base_model="{name}", lora_path="this folder"'
    return f"""```python
import parallelmind as pm

model, tokenizer = pm.load_model_with_lora({source})
print(pm.generate_text(model, tokenizer, "Hello"))
```"""


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [
        f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |"
        for name, value in rows.items()
    ]
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *lines])
