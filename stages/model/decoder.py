"""Where a model keeps its decoder layers, and which other modules a text forward needs beside them."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from state.errors import InputError


class LayerwiseUnsupported(InputError):
    """The layerwise schedule can't run this model; the message ends with the way out. reason: without it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}. Give --schedule whole to calibrate with the whole model in memory")


@dataclass(frozen=True)
class Decoder:
    """The stack of decoder layers of a model.

    path: memory name of `layers` (`model.layers`). layers: the ModuleList itself.
    """

    model: PreTrainedModel
    path: str
    layers: nn.ModuleList

    @property
    def model_name(self) -> str:
        """The model's class, for messages."""
        return type(self.model).__name__

    def name(self, layer: int) -> str:
        """Memory name of a layer (`model.layers.3`)."""
        return f"{self.path}.{layer}"

    def layer_of(self, name: str) -> int | None:
        """The layer that a memory name belongs to; None outside the layers."""
        if not name.startswith(self.path + "."):
            return None
        return int(name[len(self.path) + 1 :].partition(".")[0])

    def unused_by_text(self) -> tuple[str, ...]:
        """Memory names of modules that are never loaded: the output head, whose product is not computed, and
        towers for other modalities (models of their own that do not hold the layers)."""
        head = self.model.get_output_embeddings()
        return tuple(
            name
            for name, module in self.model.named_modules()
            if module is head
            or (isinstance(module, PreTrainedModel) and name and not self.path.startswith(name + "."))
        )


def find_decoder(model: PreTrainedModel) -> Decoder:
    """The one submodule whose `layers` are as many as the text config's `num_hidden_layers` and whose config
    is the text config.

    Raises:
        LayerwiseUnsupported: there is none, or more than one, or the model has no output head.
    """
    text = model.config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    found = {
        f"{name}.layers" if name else "layers": layers
        for name, module in model.named_modules()
        if isinstance(layers := module._modules.get("layers"), nn.ModuleList)
        and getattr(module, "config", None) is text
        and len(layers) == count
    }
    if len(found) != 1:
        places = ", ".join(found) or "nowhere"
        raise LayerwiseUnsupported(
            f"{type(model).__name__} does not keep its {count} decoder layers in one place (found: {places})"
        )
    if model.get_output_embeddings() is None:
        raise LayerwiseUnsupported(f"{type(model).__name__} has no output head")
    ((path, layers),) = found.items()
    return Decoder(model, path, layers)
