"""Types of the fields that name a place: `~` is the home folder in all of them.

`data_path`, `base_model` and `output_dir` are not among them. They identify a run or are recorded with it, so
they keep the text that the user wrote, and their readers expand it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from parallelmind.adapter_location import locate_adapter
from parallelmind.storage import expand_home

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


HomePath = Annotated[str, AfterValidator(expand_home)]
"""A local path, or a name or URI, which has no `~`."""

AdapterPath = Annotated[str, AfterValidator(locate_adapter)]
"""An adapter: its folder, that of its run, the newest of `runs/NAME-*`, or a name or URI."""

OutputPath = Annotated[str, AfterValidator(_refuse_uri), AfterValidator(expand_home)]
"""A local path to write to. As a path, a URI would become a folder named after its scheme."""

TrackingUri = Annotated[str, AfterValidator(_expand_uri)]
"""A URI, whose path may start with `~` if it is that of a SQLite file: `sqlite:///~/mlflow.db`."""
