"""Python code that comes with a model and computes its numbers (`--trust-remote-code`)."""

import inspect
from pathlib import Path

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from stages.model.build import OWN_CODE
from stages.model.folder import ELSEWHERE
from state.errors import InputError
from state.identity import digest


def refuse_own_code(folder: Path, error: Exception) -> None:
    """Raise InputError where an error of transformers is that nobody allowed a model's own code."""
    if "trust_remote_code" in str(error):
        raise InputError(
            f"{folder} brings Python code of its own; look at it, then allow it with --trust-remote-code"
        ) from error


def code_digests(model: PreTrainedModel) -> dict[str, str]:
    """Digest of every file that the classes of a model and its configuration were made from, by its name in
    the model's folder, or `org/name--file.py` in another repository. Empty for transformers' own classes.
    """
    named = getattr(model.config, "auto_map", None) or {}
    found = {}
    built = next((entry for entry in OWN_CODE if entry in named), "")
    for kind, entry in ((type(model), built), (type(model.config), "AutoConfig")):
        if kind.__module__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME:
            repository, separator, _ = named.get(entry, "").rpartition(ELSEWHERE)
            main = Path(inspect.getfile(kind))
            for path in (main, *map(Path, get_relative_import_files(main))):
                found[f"{repository}{separator}{path.relative_to(main.parent)}"] = digest(path.read_bytes())
    return dict(sorted(found.items()))
