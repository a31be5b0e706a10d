"""Uploads to the Hugging Face hub: a folder that parallelmind saved becomes a repository there."""

from __future__ import annotations

import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # of its documentation

from parallelmind.adapter_location import locate_adapter
from parallelmind.errors import UserError, UserNotice, first_line
from parallelmind.model.base_name import SMOLLM2, is_hub_id
from parallelmind.model.hub import hub_problem
from parallelmind.model.manifest import CARD, MANIFEST, Manifest, read_manifest
from parallelmind.remote import fetch_cached


def check_push(push_to: str) -> None:
    """Raise UserError for an upload that is known to fail: no token, one that may not write, or no hub."""
    if (token := get_token()) is None:
        raise UserError(
            f"push_to={push_to}: there is no token of the hub; run hf auth login, or set HF_TOKEN"
        )
    if problem := hub_problem():
        raise UserError(
            f"push_to={push_to}: the hub cannot be reached ({problem}); connect this machine to it"
        )
    remedy = f"give one that may write, of {constants.ENDPOINT}/settings/tokens"
    try:
        account = HfApi().whoami(token)
    except HfHubHTTPError as error:
        reason = f"the hub does not take the token ({error.response.status_code})"
        raise UserError(f"push_to={push_to}: {reason}; {remedy}") from error
    if _role(account) == "read":
        raise UserError(f"push_to={push_to}: the token of {account['name']} may only read; {remedy}")


def _role(account: dict[str, Any]) -> str | None:
    """What the token may do: read, write, or fineGrained."""
    role: str | None = account.get("auth", {}).get("accessToken", {}).get("role")
    return role


def push(folder: str | Path, push_to: str, private: bool = False) -> str:
    """Upload an adapter, a model or an export, as one commit; returns the URL of the repository.

    folder: its own, that of its run, or a URI. push_to: USER/NAME, which is created if it does not exist.
    private: whether it is created as private. Files that the repository has already are not sent again.
    Raises UserError, with the command that repeats the upload.
    """
    local = fetch_cached(locate_adapter(str(folder)), MANIFEST, "folder")
    manifest = read_manifest(local, "folder")
    _tell_about_base(manifest)
    names = [name for name in (*manifest.files, MANIFEST, CARD) if (local / name).is_file()]
    if not sys.stderr.isatty():
        disable_progress_bars()
    print(f"uploading {len(names)} files to {constants.ENDPOINT}/{push_to}", flush=True)
    try:
        api = HfApi()
        url = api.create_repo(push_to, private=private or None, exist_ok=True)
        files = [CommitOperationAdd(name, local / name) for name in names]
        api.create_commit(push_to, files, commit_message=f"Upload {manifest.kind} with parallelmind")
    except Exception as error:  # huggingface_hub does not say which libraries it calls
        command = ["python", "-m", "workloads.push", f"folder={folder}", f"push_to={push_to}"]
        raise UserError(
            f"push_to={push_to}: the upload failed ({first_line(error)}); {folder} is complete, and "
            f"{shlex.join([*command, *(['push_private=true'] if private else [])])} repeats the upload"
        ) from error
    return str(url)


def _tell_about_base(manifest: Manifest) -> None:
    """Say that adapter_config.json names the base model of an adapter by a path, which others lack."""
    base = manifest.base_model
    if manifest.kind != "adapter" or (base != SMOLLM2 and is_hub_id(base)):
        return
    consequence = (
        f"load_model_with_lora finds {SMOLLM2} by itself, peft does not"
        if base == SMOLLM2
        else "others need a base_model of their own"
    )
    text = f"adapter_config.json names the base model by its folder on this machine; {consequence}"
    warnings.warn(UserNotice(text), stacklevel=3)
