"""One rank's part of a fit: `torchrun … -m mlplatform.training.ddp.rank FOLDER`, a process of `launch`, or the caller's own.

Belongs here: the training loop, which is the same whatever the size of the world. Does not belong here: what is trained, who starts it.

Each step's rows are drawn for the whole world and cut among the ranks, so every world size sees the same rows in the same steps;
gradients are summed in another order and dropout is drawn by rank, so the bits depend on the size of the world and nothing else.
Rank 0 alone validates, asks, decides and writes; the others wait for its word, so no rank can go another way.
"""

import ctypes
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # torch exports them without saying so
from torch.nn.parallel import DistributedDataParallel

from mlplatform.networks import Architecture, TabularNetwork, predict, with_threads
from mlplatform.training.ddp import checkpoint
from mlplatform.training.ddp.job import Job, read
from mlplatform.training.ddp.losses import measure, row_losses
from mlplatform.training.ddp.verdicts import ask_parent
from mlplatform.training.trainers.base import METRICS

_WARM_UP = 0.1  # of the schedule
# For the other ranks, or for rank 0 while it validates and asks. After it a rank gives up, and the agent starts all of them anew.
_LONGEST_WAIT = timedelta(minutes=5)
_VALIDATE_ROWS = 16_384
# (epoch, the metric on the validation rows) -> whether to go on
Verdict = Callable[[int, float], bool]


def run_rank(folder: str) -> None:
    """In a process that an elastic agent started. It ends with its parent, so that a killed fit leaves nothing running."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    job, _ = read(Path(folder))
    cuda = job.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # The agent keeps one store through all its restarts (torch 2.13, dynamic_rendezvous.py), and a rank that reads there where a dead
    # one listened waits for it until the time limit: each attempt gets keys of its own.
    store, number, world = next(iter(rendezvous("env://")))
    attempt = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-of-{world}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=attempt, rank=number, world_size=world, timeout=_LONGEST_WAIT)
    try:
        train(Path(folder), ask_parent(Path(folder)) if job.asks else None)
    finally:
        dist.destroy_process_group()


def train(folder: Path, verdict: Verdict | None) -> None:
    """Trains from the newest checkpoint in `folder` to the end, a checkpoint after each epoch."""
    job, arrays = read(folder)
    with with_threads(job.threads):
        _Fit(folder, job, arrays).run(verdict)


class _Fit:
    def __init__(self, folder: Path, job: Job, arrays: dict[str, Any]) -> None:
        self.folder, self.job = folder, job
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = f"cuda:{torch.cuda.current_device()}" if job.device == "cuda" and self.world > 1 else job.device
        self.values, self.label = (torch.from_numpy(arrays[name]).to(self.device) for name in ("values", "label"))
        self.validation = (arrays["validate_values"], arrays["validate_label"]) if "validate_values" in arrays else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            self.network = TabularNetwork(Architecture.from_json(job.architecture))
        self.network.mean.copy_(torch.from_numpy(arrays["mean"]))
        self.network.scale.copy_(torch.from_numpy(arrays["scale"]))
        self.network.to(self.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=job.learning_rate, weight_decay=job.weight_decay)
        self.progress, self.best = checkpoint.restore(folder, self.network, self.optimizer)
        self.steps = max(1, len(self.label) // job.batch)

    def run(self, verdict: Verdict | None) -> None:
        self._agree_on_the_start()
        model = DistributedDataParallel(self.network) if self.world > 1 else self.network
        while not self.progress.done:
            loss = self._epoch(model)
            if self.rank == 0:
                self._judge(loss, verdict)
            self.progress.done = self._broadcast(int(self.progress.done)) == 1
            self.progress.epoch += self.rank != 0  # rank 0 has counted it

    def _agree_on_the_start(self) -> None:
        if self._broadcast(self.progress.epoch) != self.progress.epoch:
            raise RuntimeError(
                f"rank {self.rank} sees another newest checkpoint in {self.folder} than rank 0: the ranks must share the folder"
            )

    def _broadcast(self, value: int) -> int:
        if self.world == 1:
            return value
        told = torch.tensor([value], device=self.device)
        dist.broadcast(told, 0)
        return int(told.item())

    def _epoch(self, model: torch.nn.Module) -> float:
        """One pass over the rows; returns this rank's mean loss."""
        job, epoch = self.job, self.progress.epoch
        order = torch.from_numpy(np.random.Generator(np.random.PCG64([job.seed, epoch])).permutation(len(self.label))).to(self.device)
        size = min(job.batch, len(order))
        total = torch.zeros((), device=self.device)
        model.train()
        # The caller's own random numbers are not ours to move; a rank's process has none.
        with torch.random.fork_rng(devices=[]) if self.world == 1 else nullcontext():
            torch.manual_seed(int(np.random.SeedSequence([job.seed, epoch, self.rank]).generate_state(1)[0]))
            for step in range(self.steps):
                rows = order[step * size : (step + 1) * size].tensor_split(self.world)[self.rank]
                for group in self.optimizer.param_groups:
                    group["lr"] = job.learning_rate * self._rate(epoch * self.steps + step)
                architecture = self.network.architecture
                losses = row_losses(model(self.values[rows]), self.label[rows], architecture.quantiles, architecture.label_scale)
                # DDP takes the mean over ranks: with this divisor that is the mean over the whole batch, however unevenly it was cut.
                loss = losses.sum() / (size / self.world)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
                self.optimizer.step()
                total += loss.detach()
        return float(total / self.steps)

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero at the end of the schedule."""
        whole = self.steps * self.job.epochs
        if step < _WARM_UP * whole:
            return (step + 1) / (_WARM_UP * whole + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - _WARM_UP * whole) / ((1 - _WARM_UP) * whole)))

    def _judge(self, loss: float, verdict: Verdict | None) -> None:
        """After an epoch, on rank 0: scores, keeps the best, decides whether to go on, and writes it all down."""
        progress, job, architecture = self.progress, self.job, self.network.architecture
        unit, kind = (architecture.label_scale, "pinball") if architecture.quantiles else (1.0, "log_loss")
        progress.curves.setdefault(f"train_{kind}", []).append(loss * unit)
        progress.worlds.append(self.world)
        go_on = True
        if self.validation is None:
            progress.best_epoch, self.best = progress.epoch, self._weights()
        else:
            score = self._validate(*self.validation)
            progress.curves.setdefault(f"validate_{job.metric}", []).append(score)
            better = progress.best_score is None or ((score > progress.best_score) == METRICS[job.metric] and score != progress.best_score)
            if better:
                progress.best_epoch, progress.best_score, self.best = progress.epoch, score, self._weights()
            go_on = verdict is None or verdict(progress.epoch, score)
            progress.stopped = not go_on
        progress.done = not go_on or progress.epoch + 1 >= job.last or progress.epoch - progress.best_epoch >= job.patience
        progress.epoch += 1
        checkpoint.save(self.folder, progress, self.network, self.optimizer, self.best)

    def _validate(self, values: Any, label: Any) -> float:
        self.network.eval()
        parts = [predict(self.network, values[at : at + _VALIDATE_ROWS], self.device) for at in range(0, len(values), _VALIDATE_ROWS)]
        return measure(
            self.job.metric, np.concatenate(parts).astype(np.float64), label.astype(np.float64), self.network.architecture.quantiles
        )

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.network.state_dict().items()}


if __name__ == "__main__":
    run_rank(sys.argv[1])
