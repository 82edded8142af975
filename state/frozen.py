"""The one base of everything that is stored as JSON."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Pydantic settings of everything that is stored: immutable, and nothing unknown is accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")
