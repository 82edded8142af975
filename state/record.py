"""What a run was asked to do and from what: `run.json`, written once, its digest in every head."""

import json

from pydantic import JsonValue

from state.frozen import Frozen
from state.identity import Environment, Identity


class SourceDescription(Frozen):
    """Where the model came from. For people: identity is the content."""

    model: str
    revision: str | None = None


class RunRecord(Frozen):
    """The content of `run.json`.

    Attributes:
        settings: as given by the person, resolved.
        generator: versions of what wrote the run, such as {"holdfast": "0.1.0", "zarr": "3.1.6"}.
    """

    settings: dict[str, JsonValue]
    identity: Identity
    environment: Environment
    source: SourceDescription
    generator: dict[str, str]

    def encode(self) -> bytes:
        """The bytes of `run.json`."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes) -> "RunRecord":
        """Inverse of `encode`.

        Raises:
            pydantic.ValidationError: not the content of a `run.json`.
        """
        return cls.model_validate_json(data)
