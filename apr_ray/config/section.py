"""The base class of all settings, and the types of their numbers."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from apr_ray.core.engine import LEAST_TEMPERATURE


def _user_path(path: str) -> str:
    if not path:
        raise ValueError("a path is empty")
    return os.path.expanduser(path)


Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]


def _zero_or_not_tiny(temperature: float) -> float:
    if temperature != 0 and not temperature >= LEAST_TEMPERATURE:
        raise ValueError(f"use 0 (greedy) or at least {LEAST_TEMPERATURE:g}")
    return temperature


def _part_of_one_or_whole(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("several GPUs are reserved whole")
    return gpus


PathText = Annotated[str, AfterValidator(_user_path)]
"""A path; `~` is the user's home."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Temperature = Annotated[float, AfterValidator(_zero_or_not_tiny)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Gpus = Annotated[Rate, AfterValidator(_part_of_one_or_whole)]


class Section(BaseModel):
    """A part of the tree: unknown keys are errors, values do not change, the text under a field is its description."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_true(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` is no 1, for the numbers that lists hold neither."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if kind is not bool and (value is True or (isinstance(value, list) and any(v is True for v in value))):
            raise ValueError("true is no value for it")
        return value

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
