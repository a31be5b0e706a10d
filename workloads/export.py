"""Export an adapter as a folder that transformers or peft loads without parallelmind.

    python -m workloads.export lora_path=runs/demo-HASH output_path=merged
    python -m workloads.export lora_path=runs/demo-HASH output_path=plain lone=true merge=false

Only what is exact can be exported: adapters trained with patch_rope=false, or with rope_2d_ratio=0,
positions=time and no branch_embeddings, where a single branch has the positions of the base model. With
lone=true an adapter trained with branch_angle=added, the default, is exact too: one branch alone has the
coordinate 0, and siblings are lost. The result is a model with float32 weights, or with merge=false an
adapter of peft. Before the folder appears, its logits are compared with those of the adapter.
"""

from __future__ import annotations

from pydantic import Field

from parallelmind import cli
from parallelmind.config import AdapterPath, FrozenConfig, OutputPath
from parallelmind.model.preflight import check_model


class ExportConfig(FrozenConfig):
    """Adapter and output."""

    lora_path: AdapterPath = Field(
        min_length=1, description="adapter folder, run folder or runs/NAME-*, the newest"
    )
    output_path: OutputPath = Field(
        min_length=1, description="folder for the result: new, empty, or an earlier export to replace"
    )
    lone: bool = Field(False, description="for one branch alone: siblings are lost")
    merge: bool = Field(True, description="false: a plain adapter of peft in place of a merged model")
    base_model: str | None = Field(
        None, description="smollm2-135m, a local folder, or a hub id; null: the adapter's own"
    )
    trust_remote_code: bool = Field(False, description="allow a hub model to run its own code")


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        cli.print_help(__doc__ or "", ExportConfig)
        return
    config = cli.parse(ExportConfig, argv)
    check_model(config.base_model, config.lora_path, None, {})
    # Imported late: torch and peft take seconds to import, and --help needs neither.
    from parallelmind.model.export import export

    export(
        config.lora_path,
        config.output_path,
        config.base_model,
        config.trust_remote_code,
        config.lone,
        config.merge,
    )
    print(f"exported {config.output_path}; its logits equal those of the adapter")
    if config.lone:
        print("lost: siblings; it computes one branch alone, several need load_model_with_lora")
    loader = "AutoModelForCausalLM" if config.merge else "AutoPeftModelForCausalLM"
    library = "transformers" if config.merge else "peft"
    print(f"load it with {library}: {loader}.from_pretrained({config.output_path!r})")


if __name__ == "__main__":
    cli.run(main)
