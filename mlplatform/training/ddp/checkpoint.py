"""Where a fit stands after an epoch: one file, plain tensors and JSON, there whole or not at all.

Belongs here: writing, finding and reading checkpoints. Does not belong here: what is trained.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor, nn

from mlplatform.training.ddp.job import replace_file

_KEPT: Final = 2
_NOTES: Final = "notes"


@dataclass
class Progress:
    """`epoch`: epochs done; `best_epoch` of them had the best score; `curves` have a value for each; `worlds`: the ranks that ran each.

    `done`: nothing is left to do; `stopped`: because whoever asked for the fit said so.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_score: float | None = None
    curves: dict[str, list[float]] = field(default_factory=dict)
    worlds: list[int] = field(default_factory=list)
    done: bool = False
    stopped: bool = False


def save(folder: Path, progress: Progress, network: nn.Module, optimizer: torch.optim.Optimizer, best: Mapping[str, Tensor]) -> None:
    """Writes the checkpoint of `progress.epoch` and removes those before the last two."""
    state = optimizer.state_dict()
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for number, values in state["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
    # The groups hold numbers and None only; the schedule is computed from the epoch, so nothing else is needed.
    notes = {"progress": asdict(progress), "groups": state["param_groups"]}
    content = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {_NOTES: json.dumps(notes)})
    replace_file(folder / f"epoch-{progress.epoch:05d}.safetensors", content)
    for old in _files(folder)[:-_KEPT]:
        old.unlink(missing_ok=True)


def restore(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Progress, dict[str, Tensor]]:
    """Puts network and optimizer where the newest readable checkpoint left them; returns its progress and the best weights.
    Without a checkpoint nothing is changed, and the best weights are those that are there."""
    for path in reversed(_files(folder)):
        try:
            tensors = safetensors.torch.load_file(path)
            with safetensors.safe_open(path, framework="pt") as opened:
                notes: dict[str, Any] = json.loads(opened.metadata()[_NOTES])
        except (OSError, safetensors.SafetensorError, KeyError, ValueError):
            continue  # a file system without atomic renames left half of it; the one before is whole
        network.load_state_dict(_part(tensors, "network."))
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in _part(tensors, "optimizer.").items():
            number, _, key = name.partition(".")
            states.setdefault(int(number), {})[key] = value
        optimizer.load_state_dict({"state": states, "param_groups": notes["groups"]})
        return Progress(**notes["progress"]), _part(tensors, "best.")
    return Progress(), {name: value.clone() for name, value in network.state_dict().items()}


def newest(folder: Path) -> tuple[Progress, dict[str, Tensor]] | None:
    """What the newest checkpoint says, and its best weights; None without one."""
    files = _files(folder)
    if not files:
        return None
    with safetensors.safe_open(files[-1], framework="pt") as opened:
        progress = Progress(**json.loads(opened.metadata()[_NOTES])["progress"])
    return progress, _part(safetensors.torch.load_file(files[-1]), "best.")


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*.safetensors"))


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
