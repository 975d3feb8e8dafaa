"""Lets torchvision be imported beside a CPU build of torch; Python runs this file at its start in every process.

The torchvision that pip finds is compiled against CUDA, and its library does not load. Its Python part then fails at
the operators it wants to describe. Declaring those two before it is imported is enough: nothing here calls them.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from typing import Any

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareBeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing itself; the first time that torchvision is asked for, it declares the operators."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        if fullname == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for schema in OPERATORS:
                library.define(schema)
            sys._torchvision_operators = library  # type: ignore[attr-defined]  # the declarations live as long as it


if not hasattr(sys, "_torchvision_operators"):  # pytest loads this file again, for its own process
    sys._torchvision_operators = None  # type: ignore[attr-defined]
    sys.meta_path.insert(0, DeclareBeforeTorchvision())
