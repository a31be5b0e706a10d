"""Base models: resolving names and loading models, configurations and tokenizers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from parallelmind.config import ModelConfig
from parallelmind.errors import UserError, first_line
from parallelmind.hardware import decided_dtype
from parallelmind.model.base_name import SMOLLM2, check_base_name, is_hub_id
from parallelmind.model.hf_compat import delayed_progress_bars, no_load_report, sharded_loading
from parallelmind.model.hub import find_hub_model
from parallelmind.model.new_tokens import extend_model, extend_tokenizer
from parallelmind.model.quantize import keep_differentiable, quantization_config
from parallelmind.model.smollm2 import fetch_smollm2, smollm2_folder
from parallelmind.model.weight_check import check_loaded, find_file_problem, find_pickles
from parallelmind.progress import DelayedBar
from parallelmind.storage import expand_home

# Passed to from_pretrained. FlexAttention reads long sequences of a patched model that is set to sdpa. Flash
# attention takes no mask that depends on two coordinates.
ATTENTION = ("sdpa", "eager")


def resolve_base_model(name: str) -> str:
    """The local folder or hub id that transformers loads for `name`; fetches smollm2-135m on first use.

    Raises UserError for a folder without config.json, for a name that cannot be a hub id and for a failed
    fetch.
    """
    if name == SMOLLM2:
        return str(fetch_smollm2())
    check_base_name(name)
    folder = Path(expand_home(name))
    return str(folder) if folder.is_dir() else name


def base_location(name: str) -> str:
    """What other libraries load as the base model `name`: a hub id, or an absolute path of this machine."""
    folder = smollm2_folder() if name == SMOLLM2 else Path(expand_home(name))
    return str(folder.absolute()) if folder.is_dir() else name


def load_base(
    config: ModelConfig, attn_implementation: str | None = None, mesh: DeviceMesh | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model in eval mode and in `config.dtype`, and its tokenizer; every weight is from its files.

    The model is on the CPU. A quantised model is on the current accelerator, if there is one.
    attn_implementation: by default sdpa where the model supports it, else eager. mesh: of processes on the
    CPU, each of which reads and holds its shard of every weight, and no more; without it, the model is whole.
    Raises UserError if the model cannot be loaded.
    """
    if attn_implementation not in (None, *ATTENTION):
        raise UserError(
            f"attn_implementation={attn_implementation}: not supported; choose one of {', '.join(ATTENTION)}"
        )
    sharded = sharded_loading(mesh, bool(config.add_tokens)) if mesh is not None else nullcontext()
    with delayed_progress_bars(), no_load_report(), sharded:
        model, info = _from_pretrained(
            AutoModelForCausalLM,
            config,
            dtype=getattr(torch, decided_dtype(config.dtype)),
            quantization_config=quantization_config(config),
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with both shapes
            tqdm_class=DelayedBar,  # of downloads
        )
    check_loaded(config.base_model, model, info)
    keep_differentiable(model)
    # Saved files contain the user's name for the model, never a cache path of this machine.
    model.config._name_or_path = model.name_or_path = config.base_model
    tokenizer = load_tokenizer(config)
    if config.add_tokens:
        extend_model(model, len(tokenizer), len(config.add_tokens))
    return model.eval(), tokenizer


def load_meta_model(config: ModelConfig) -> PreTrainedModel:
    """Build the model on the meta device, without weights. Raises UserError as `load_base` does."""
    base_config = load_base_config(config)
    with _load_errors(config.base_model):
        return build_meta_model(base_config, config.trust_remote_code)


def load_base_config(config: ModelConfig) -> PreTrainedConfig:
    """Load the model's configuration. Raises UserError as `load_base` does."""
    loaded: PreTrainedConfig = _from_pretrained(AutoConfig, config)
    if config.add_tokens:
        text_config = loaded.get_text_config(decoder=True)
        text_config.vocab_size = max(text_config.vocab_size, len(load_tokenizer(config)))
    return loaded


def build_meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model of a configuration on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with eos as padding if it has none. Raises UserError as `load_base` does."""
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, config)
    extend_tokenizer(tokenizer, config.add_tokens)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_pretrained(auto_class: Any, config: ModelConfig, **options: Any) -> Any:
    """What the base model's files hold for a class of transformers; from the cache while the hub is away."""
    name = resolve_base_model(config.base_model)
    source = find_hub_model(name) if is_hub_id(name) else name
    with _load_errors(config.base_model, Path(source) if auto_class is AutoModelForCausalLM else None):
        return auto_class.from_pretrained(
            source,
            trust_remote_code=config.trust_remote_code,
            local_files_only=source != name,  # code of other hub models, too, comes from the cache then
            **options,
        )


@contextmanager
def _load_errors(name: str, weights: Path | None = None) -> Iterator[None]:
    """Turn errors of loading files into UserErrors of one line. weights: the folder of weights to load."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # hides a dozen lines about retries
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged files raise any type; the reason and the traceback are kept
        text = repr(error) if isinstance(error, KeyError) else first_line(error).rstrip(".")
        reason = (weights and _file_reason(weights, error)) or text
        raise UserError(
            f"base_model={name}: cannot be loaded ({reason}); "
            f"give {SMOLLM2}, a folder with config.json and weights, or a hub id that this machine can reach"
        ) from error
    finally:
        hub_logging.set_verbosity(verbosity)


def _file_reason(folder: Path, error: Exception) -> str | None:
    """The file of weights that caused the error, with what is wrong, None if none did or the hub has it."""
    if not folder.is_dir():
        return None
    if problem := find_file_problem(folder):
        return problem
    if not isinstance(error, OSError | ValueError | ImportError):
        pickles = ", ".join(find_pickles(folder))
        return pickles and f"{pickles} is damaged or holds code, which is not run; save it as safetensors"
    return None


if __name__ == "__main__":
    try:
        print(resolve_base_model(SMOLLM2))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
