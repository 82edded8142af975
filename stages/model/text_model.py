"""What a model's configuration says of its text model, as plain data."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class TextModel:
    """Facts that folding needs.

    heads: query heads of attention, None where there is none. activation: between an MLP's up and down
    projections, by transformers' name.
    """

    model_type: str
    heads: int | None
    activation: str | None

    @classmethod
    def of(cls, config: "PretrainedConfig") -> "TextModel":
        """The facts of a configuration, or of its text model's part."""
        text = config.get_text_config()
        activation = getattr(text, "mlp_hidden_act", None) or getattr(text, "hidden_act", None)
        return cls(text.model_type, getattr(text, "num_attention_heads", None), activation)
