"""Upload an adapter or a model to the Hugging Face hub, with its model card.

    python -m workloads.push folder=runs/demo-HASH push_to=USER/NAME

The files of the folder become one commit of the repository, which is created if it does not exist. The token
is that of `hf auth login`, or $HF_TOKEN.
"""

from __future__ import annotations

from pydantic import Field

from parallelmind import cli
from parallelmind.config import AdapterPath, FrozenConfig, HubRepo


class PushConfig(FrozenConfig):
    """Folder and repository."""

    folder: AdapterPath = Field(
        min_length=1,
        description="adapter, model or export; run folder, or runs/NAME-*, the newest: their adapter",
    )
    push_to: HubRepo = Field(description="repository on the hub: USER/NAME")
    push_private: bool = Field(False, description="create the repository as a private one")


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        cli.print_help(__doc__ or "", PushConfig)
        return
    config = cli.parse(PushConfig, argv)
    # Imported late: --help needs no huggingface_hub.
    from parallelmind.model.push import check_push, push

    check_push(config.push_to)
    print(f"hub      {push(config.folder, config.push_to, config.push_private)}")


if __name__ == "__main__":
    cli.run(main)
