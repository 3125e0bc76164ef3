"""Replace our layers by PyTorch's for TorchScript and ONNX."""

from __future__ import annotations

import copy
from typing import Any

import torch

from fusedrnn.torch import paths

OPTIONS = ("recurrent_dropout", "zoneout_h", "zoneout_c", "layer_norm", "recompute")  # of a layer, only ours
ALWAYS = ("layer_norm", "zoneout_h", "zoneout_c")  # those that also change results in evaluation
# Attributes that only our layers have.
OWN = ("last_path", "forget_bias", *OPTIONS)


def check_torch_has(layer: Any, path: str) -> None:
    """Raise an error if ``torch.nn`` has no layer that computes the same."""
    for name in ALWAYS:
        if getattr(layer, name, False):
            raise ValueError(f"{path}: torch.nn has no {name}")
    if layer.__dict__.get("_fusedrnn_frozen") is not None:
        raise RuntimeError(f"{path}: it is frozen; fusedrnn.torch.unfreeze(model) first")


class Scriptable(torch.nn.Module):
    """A layer that TorchScript replaces by ``torch_class`` of ``torch.nn``, with the same parameters."""

    torch_class: type[torch.nn.Module]

    def _only_ours(self) -> str | None:
        """The name of the first option that is set and that PyTorch's implementation does not have."""
        names = (*ALWAYS, "recurrent_dropout") if self.training else ALWAYS
        return next((name for name in names if getattr(self, name, False)), None)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        kind = type(self)
        theirs = self.torch_class.__name__
        if kind.__name__ != theirs or not kind.__module__.startswith("fusedrnn."):
            raise RuntimeError(
                f"TorchScript cannot take {kind.__name__}, a class derived from fusedrnn.torch.{theirs}; "
                f"derive it from torch.nn.{theirs} for that"
            )
        check_torch_has(self, kind.__name__)
        paths.tell(self, "TorchScript replaces our layer by it, in the model too; see to_torch")
        plain: torch.nn.Module = copy.copy(self)
        for name in OWN:
            plain.__dict__.pop(name, None)
        plain.__class__ = self.torch_class
        return plain
