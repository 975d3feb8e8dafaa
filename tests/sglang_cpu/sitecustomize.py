"""Finds SGLang on a CPU; Python runs this file at its start in every process that has this folder on PYTHONPATH.

SGLang lies in a folder of its own (`make sglang`), which is put on the path when SGLang is first asked for: torch and
transformers import what else lies there, triton and torchvision, wherever they find it, for seconds in every process.

The torchvision that pip finds is compiled against CUDA, and its library does not load. Its Python part then fails at
the operators it wants to describe. Declaring those two before it is imported is enough: nothing here calls them.
"""

from __future__ import annotations

import gc
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SGLANG = str(Path(sys.prefix) / "sglang-cpu" / "site-packages")
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def add_the_folder() -> None:
    sys.path.append(SGLANG)
    gc.set_threshold(100_000)  # its imports make much and no garbage; looking for it takes a sixth of them


def declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for schema in OPERATORS:
        library.define(schema)
    sys._torchvision_operators = library  # type: ignore[attr-defined]  # the declarations live as long as it


class DoBefore(importlib.abc.MetaPathFinder):
    """Finds nothing itself; does something the first time that a package is asked for."""

    def __init__(self, todo: dict[str, Callable[[], None]]) -> None:
        self.todo = todo

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        if first := self.todo.pop(fullname, None):
            first()


if not any(type(finder).__name__ == DoBefore.__name__ for finder in sys.meta_path):  # pytest runs this file again
    sys.meta_path.insert(0, DoBefore({"sglang": add_the_folder, "torchvision": declare_operators}))
