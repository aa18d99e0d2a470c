"""Questions and answers between rank 0 and the process that started the fit: shall it go on after this epoch?

Belongs here: both ends, by files in the job's folder, so that it works whoever started the ranks and whichever of them were killed.
Does not belong here: the decision (a study's pruner makes it).
"""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mlplatform.training.ddp.job import replace_file
from mlplatform.training.trainers.base import OnRound

_EVERY_S: Final = 0.02
_GO, _STOP = b"go", b"stop"


class ParentGoneError(RuntimeError):
    """Whoever asked for the fit is not there any more, so nobody can say whether to go on."""


def ask_parent(folder: Path) -> Callable[[int, float], bool]:
    """For rank 0: puts the question of an epoch and waits for the answer. Raises ParentGoneError where none can come."""
    parent = os.getppid()

    def ask(epoch: int, value: float) -> bool:
        answer = folder / f"epoch-{epoch:05d}.verdict"
        # A rank that was killed after the answer finds it, and does not ask again.
        if not answer.exists():
            replace_file(folder / f"epoch-{epoch:05d}.question", json.dumps(value).encode())
        while not answer.exists():
            if os.getppid() != parent:
                raise ParentGoneError("the process that started this fit has ended")
            time.sleep(_EVERY_S)
        return answer.read_bytes() == _GO

    return ask


class Answering:
    """In the process that started the fit: answers with `on_round` in a thread, for as long as the `with` block lasts.

    Where `on_round` raises, the answer is "stop", and `error` holds what it raised.
    """

    def __init__(self, folder: Path, on_round: OnRound) -> None:
        self.error: BaseException | None = None
        self._folder = folder
        self._on_round = on_round
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="verdicts", daemon=True)

    def __enter__(self) -> "Answering":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(_EVERY_S):
            for question in sorted(self._folder.glob("epoch-*.question")):
                answer = question.with_suffix(".verdict")
                if not answer.exists():
                    replace_file(answer, self._answer(int(question.stem.removeprefix("epoch-")), json.loads(question.read_bytes())))

    def _answer(self, epoch: int, value: float) -> bytes:
        if self.error is None:
            try:
                self._on_round(epoch, value)
            except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the caller of the fit, who gets it
                self.error = error
        return _GO if self.error is None else _STOP
