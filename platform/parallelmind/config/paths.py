"""Types of the fields that name a place: `~` is the home folder in all of them.

`data_path`, `base_model` and `output_dir` are not among them. They identify a run or are recorded with it, so
they keep the text that the user wrote, and their readers expand it.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from parallelmind.adapter_location import locate_adapter
from parallelmind.storage import expand_home

_HUB_REPO = re.compile(r"(?!.*(--|\.\.|\.git$))\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b", re.ASCII)
_SCHEMES_OF_FILES = ("sqlite:///", "file://")


def _expand_uri(uri: str) -> str:
    scheme = next((scheme for scheme in _SCHEMES_OF_FILES if uri.startswith(f"{scheme}~")), "")
    return scheme + expand_home(uri.removeprefix(scheme))


def _refuse_uri(path: str, info: ValidationInfo) -> str:
    if "://" in path:
        raise ValueError(
            f"{info.field_name}={path}: is a URI, and output files are written to this machine; "
            "give a local path, and copy the file there"
        )
    return path


def _check_hub_repo(name: str, info: ValidationInfo) -> str:
    if not _HUB_REPO.fullmatch(name):
        raise ValueError(
            f"{info.field_name}={name}: is no name of a repository on the hub; give USER/NAME, of letters, "
            "digits, '-', '_' and '.'"
        )
    return name


HomePath = Annotated[str, AfterValidator(expand_home)]
"""A local path, or a name or URI, which has no `~`."""

AdapterPath = Annotated[str, AfterValidator(locate_adapter)]
"""An adapter: its folder, that of its run, the newest of `runs/NAME-*`, or a name or URI."""

OutputPath = Annotated[str, AfterValidator(_refuse_uri), AfterValidator(expand_home)]
"""A local path to write to. As a path, a URI would become a folder named after its scheme."""

TrackingUri = Annotated[str, AfterValidator(_expand_uri)]
"""A URI, whose path may start with `~` if it is that of a SQLite file: `sqlite:///~/mlflow.db`."""

HubRepo = Annotated[str, AfterValidator(_check_hub_repo)]
"""A repository on the Hugging Face hub: USER/NAME."""
