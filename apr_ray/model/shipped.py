"""The policies that come with the package: a name stands for one wherever a path to a policy does."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

SHIPPED = Path(str(files("apr_ray") / "policies"))
"""Each folder is made by `apr-ray export`: `config.yaml`, a card, and the policy in `final/`."""


def shipped_names() -> list[str]:
    """Names of the policies in the package."""
    return sorted(folder.name for folder in SHIPPED.glob("*") if (folder / "final" / "config.json").is_file())


def resolve_policy(name_or_path: str | Path) -> Path:
    """The folder that a shipped policy's name stands for; any other text is a path, and what lies there comes first."""
    path = Path(os.path.expanduser(name_or_path))
    if not path.exists() and str(name_or_path) in shipped_names():
        return SHIPPED / str(name_or_path)
    return path
