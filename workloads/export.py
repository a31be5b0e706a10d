"""Merge an adapter into plain weights, a folder that transformers loads without parallelmind.

    python -m workloads.export lora_path=runs/demo-HASH/adapter output_path=merged

Only where that is exact: adapters trained with patch_rope=false, or with rope_2d_ratio=0 positions=time,
whose lone branch has the base model's own positions. Any other is refused. The weights are float32, and are
compared with the adapter's logits before the folder appears.
"""

from __future__ import annotations

from pydantic import Field

from parallelmind import cli
from parallelmind.config import FrozenConfig


class ExportConfig(FrozenConfig):
    """One run of this command."""

    lora_path: str = Field(min_length=1, description="adapter folder")
    output_path: str = Field(
        min_length=1, description="folder for the merged model: new, empty, or an earlier one to replace"
    )
    base_model: str | None = Field(
        None, description="smollm2-135m, a local folder, or a hub id; null: the adapter's own"
    )
    trust_remote_code: bool = Field(False, description="allow a hub model to run its own code")


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        return cli.print_help(__doc__ or "", ExportConfig)
    config = cli.parse(ExportConfig, argv)
    from parallelmind.model.export import export  # takes seconds: not for --help

    export(config.lora_path, config.output_path, config.base_model, config.trust_remote_code)
    print(f"exported {config.output_path}; same logits as the adapter")
    print(f"load it with transformers: AutoModelForCausalLM.from_pretrained({config.output_path!r})")
    return None


if __name__ == "__main__":
    cli.run(main)
