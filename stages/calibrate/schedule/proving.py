"""Proves where scales may be folded in a decoder layer, once for each kind of layer."""

from collections import defaultdict
from collections.abc import Callable, Mapping

from torch import nn

from stages.calibrate.forward.layer_step import LayerStep
from stages.calibrate.schedule.copied_layer import CopiedLayer, places_for
from stages.fold.candidates import NOTHING, Attempt, LayerParts, attempts
from stages.fold.proof import LayerProof
from stages.fold.trial import TrialLayer, Verdict, try_all
from stages.model.skeleton import Skeleton
from state.errors import HoldfastError
from state.identity import digest_json
from state.names import split_name
from state.reasons import reason


class Prover:
    """Proofs of layers, each while its weights are loaded.

    Args:
        parts: layer → its parts. known: proofs of earlier processes.
        tell: called with lines for people, each once.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        parts: Mapping[int, LayerParts],
        known: list[LayerProof],
        tell: Callable[[str], None],
    ) -> None:
        self.skeleton, self.parts, self.tell = skeleton, parts, tell
        self.known = {proof.kind: proof for proof in known}
        self._told: set[str] = set()

    def prove(self, step: LayerStep) -> LayerProof:
        """The proof of a layer: that of its kind, or a new one."""
        parts = self.parts.get(step.layer, LayerParts({}))
        kind = kind_of(step.layer, step.module, parts)
        if kind not in self.known:
            self.known[kind] = self._new(kind, step, parts)
        return self.known[kind]

    def _new(self, kind: str, step: LayerStep, parts: LayerParts) -> LayerProof:
        verdict = self._verdict(step, attempts(parts))
        folded = {part.module for site in verdict.sites for part in site.consumers}
        others = {module: NOTHING for module in parts.operands if module not in folded}
        proof = LayerProof.of(kind, verdict.sites, others | verdict.failed)
        for line in told(proof):
            if line not in self._told:
                self._told.add(line)
                self.tell(line)
        return proof

    def _verdict(self, step: LayerStep, tried: list[Attempt]) -> Verdict:
        """What the layer's copy shows. Where none can be run, nothing is proven."""
        assert step.rehearsal is not None  # whoever has a solver has layers rehearsed
        failure: Exception | None = None
        for device in places_for(step.module):
            try:
                copied = CopiedLayer(self.skeleton, step.name, step.module, step.rehearsal, device)
                return try_all(tried, TrialLayer(copied.part, copied.run))
            except HoldfastError:
                raise
            except Exception as error:  # the model's own code, which may not be made for float32
                failure = error
        assert failure is not None
        why = f"a copy of the layer in float32 can't be run ({reason(failure)})"
        return Verdict((), {module: why for attempt in tried for module in attempt.consumers})


def kind_of(number: int, layer: nn.Module, parts: LayerParts) -> str:
    """Digest of a layer's classes, shapes, plain attributes (but for its own number) and parts."""
    modules = [
        (
            name,
            f"{type(module).__module__}.{type(module).__qualname__}",
            sorted(
                (key, value)
                for key, value in vars(module).items()
                if type(value) in (bool, float, str) or (type(value) is int and value != number)
            ),
            [
                (key, list(value.shape), str(value.dtype))
                for key, value in module.named_parameters(recurse=False)
            ],
        )
        for name, module in layer.named_modules()
    ]
    operands = {
        (split_name(part.module)[0], split_name(part.tensor)[0], part.shape, part.transposed, part.period)
        for part in parts.operands.values()
    }
    norms = {
        (split_name(norm)[0], *dict.fromkeys(split_name(module)[0] for module in consumers))
        for norm, consumers in parts.norms.items()
    }
    values = {(split_name(name)[0], *shape) for name, shape in parts.values.items()}
    return digest_json([modules, sorted(operands), sorted(norms), sorted(values)])


def told(proof: LayerProof) -> list[str]:
    """Lines about what keeps scale 1."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for module, why in proof.failed.items():
        reasons[why].append(module.partition("L.")[2])
    return [f"no input scale for {', '.join(modules)}: {why}" for why, modules in reasons.items()]
