"""The base class of the sections of a recipe. Imports no torch."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """The base class of the sections of a recipe."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
