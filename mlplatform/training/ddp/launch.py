"""Starting the ranks of a fit on this machine: one in this process, several through torch's elastic agent.

Belongs here: processes and what becomes of them. Does not belong here: the training loop (`rank`), several machines (torchrun starts
`rank` there; a folder they share is all they need).
"""

import os
import sys
import uuid
from pathlib import Path
from typing import Final

from torch import Tensor

from mlplatform.training.ddp import checkpoint, rank
from mlplatform.training.ddp.checkpoint import Progress
from mlplatform.training.ddp.job import Arrays, Job, prepare
from mlplatform.training.ddp.verdicts import Answering
from mlplatform.training.trainers.base import OnRound

MAX_RESTARTS: Final = 3  # of all ranks together, each time one dies


class FitFailedError(RuntimeError):
    """The ranks did not come to an end, restarts included."""


def run(folder: Path, job: Job, arrays: Arrays, workers: int, on_round: OnRound | None) -> tuple[Progress, dict[str, Tensor]]:
    """Fits in `folder`, going on from what lies there of the same job; returns its progress and its best weights.

    Raises what `on_round` raised, FitFailedError where the ranks fail again and again.
    """
    prepare(folder, job, arrays)
    error: BaseException | None = None
    if workers == 1:
        rank.train(folder, None if on_round is None else _own_verdict(on_round))
    elif on_round is None:
        _launch(folder, workers)
    else:
        with Answering(folder, on_round) as answering:
            _launch(folder, workers)
        error = answering.error
    if error is not None:
        raise error
    found = checkpoint.newest(folder)
    if found is None or not found[0].done:
        raise FitFailedError(f"the fit in {folder} ended before its last epoch")
    return found


def _own_verdict(on_round: OnRound) -> rank.Verdict:
    def ask(epoch: int, value: float) -> bool:
        on_round(epoch, value)  # it raises to abandon the fit; here that ends it at once
        return True

    return ask


def _launch(folder: Path, workers: int) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if sys.platform == "linux":
        # All ranks are here: their traffic stays on the loopback interface.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=MAX_RESTARTS,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        elastic_launch(config, rank.run_rank)(os.fspath(folder))
    except ChildFailedError as failed:
        raise FitFailedError(f"a rank failed more than {MAX_RESTARTS} times: {failed.get_first_failure()[1].message}") from failed
