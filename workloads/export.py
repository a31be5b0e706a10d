"""Merge an adapter into its base model and write a folder that transformers loads without parallelmind.

    python -m workloads.export lora_path=runs/demo-HASH/adapter output_path=merged

Only exact merges are possible: adapters trained with patch_rope=false, or with rope_2d_ratio=0 and
positions=time, where a single branch has the positions of the base model. Other adapters are refused. The
weights are float32. Before the folder appears, its logits are compared with those of the adapter.
"""

from __future__ import annotations

from pydantic import Field

from parallelmind import cli
from parallelmind.config import FrozenConfig, HomePath, OutputPath


class ExportConfig(FrozenConfig):
    """Adapter and output."""

    lora_path: HomePath = Field(min_length=1, description="adapter folder")
    output_path: OutputPath = Field(
        min_length=1, description="folder for the merged model: new, empty, or an earlier export to replace"
    )
    base_model: str | None = Field(
        None, description="smollm2-135m, a local folder, or a hub id; null: the adapter's own"
    )
    trust_remote_code: bool = Field(False, description="allow a hub model to run its own code")


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        cli.print_help(__doc__ or "", ExportConfig)
        return
    config = cli.parse(ExportConfig, argv)
    # Imported late: torch and peft take seconds to import, and --help needs neither.
    from parallelmind.model.export import export

    export(config.lora_path, config.output_path, config.base_model, config.trust_remote_code)
    print(f"exported {config.output_path}; its logits equal those of the adapter")
    print(f"load it with transformers: AutoModelForCausalLM.from_pretrained({config.output_path!r})")


if __name__ == "__main__":
    cli.run(main)
