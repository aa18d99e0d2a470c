"""What one fit of a network is, as files in a folder: any process that is shown the folder can take part in it, or go on with it.

Belongs here: the job, its arrays, and whether a folder holds the same job. Does not belong here: training (`rank`), starting
processes (`launch`), checkpoints.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt
import safetensors.numpy

_JOB: Final = "job.json"
_DATA: Final = "data.safetensors"
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Job:
    """`architecture` as JSON; `epochs`: the length of the learning-rate schedule; `last`: epochs to run, at most.

    `patience`: epochs without a better `metric` on the validation rows before it ends. `batch`: rows of a step, over all ranks
    together. `asks`: whether the process that started the fit is asked after each epoch if it shall go on. `threads`: of each rank.
    """

    architecture: str
    seed: int
    metric: str
    epochs: int
    last: int
    patience: int
    batch: int
    learning_rate: float
    weight_decay: float
    device: str
    threads: int
    asks: bool


def prepare(folder: Path, job: Job, arrays: Arrays) -> None:
    """Lays the job down in `folder`. Where the very same one lies there, with its checkpoints, they are kept: the fit goes on.
    Anything else in the folder is removed."""
    data = safetensors.numpy.save(dict(sorted(arrays.items())))
    # Not by what may change between two starts of one job: the size of the world, the threads, who asks.
    same = asdict(job) | {"threads": 0, "asks": False, "data": hashlib.sha256(data).hexdigest()}
    identity = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
    if _read(folder).get("identity") != identity:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / _DATA, data)
    # Last: a folder without it is no job.
    replace_file(folder / _JOB, json.dumps({"identity": identity, "job": asdict(job)}).encode())


def read(folder: Path) -> tuple[Job, dict[str, npt.NDArray[Any]]]:
    """The job in a folder and its arrays. Raises FileNotFoundError where there is none."""
    told = json.loads((folder / _JOB).read_text())
    return Job(**told["job"]), safetensors.numpy.load_file(folder / _DATA)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file so that it appears whole or not at all, and outlives the machine."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _read(folder: Path) -> dict[str, Any]:
    try:
        told = json.loads((folder / _JOB).read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
