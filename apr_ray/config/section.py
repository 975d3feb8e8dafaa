"""What all sections of the settings are, and the numbers that they are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]


def _part_of_one_or_whole(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("several GPUs are reserved whole")
    return gpus


Beta = Annotated[float, Field(ge=0, lt=1)]
Gpus = Annotated[Rate, AfterValidator(_part_of_one_or_whole)]


class Section(BaseModel):
    """A part of the tree: unknown keys are errors, values do not change, the text under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
