"""Are the answers right, bit by bit? Before a service is measured, and on their own with `--check`.

Belongs here: asking many questions at once, so that they share batches, and comparing. Does not belong here: speed.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from redis import Redis

from mlplatform.contracts import read_records
from mlplatform.local.bench_serving import prediction_log, server
from mlplatform.local.bench_serving.racer import Questions, Racer
from mlplatform.local.bench_serving.world import Question, Subject

_AT_ONCE = 32


def wrong_answers(racer: Racer, questions: Questions, subject: Subject, redis: Redis, count: int) -> int:
    """Of `count` requests of each size: predictions that are not what `Booster.predict` says.

    Where the answers are not known beforehand (a home's model), each logged record's features are predicted again: record and answer
    must both say the same.
    """
    asked = [question for rows in sorted(racer.bodies) for question in questions[rows][:count]]
    if not asked:
        return 0
    if asked[0].answers is None:
        prediction_log.drained(racer.port)
        prediction_log.trim(redis, subject.model)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        said = np.concatenate(list(pool.map(lambda question: _predictions(racer, question), asked)))
    if asked[0].answers is not None:
        return unlike(said, np.concatenate([q.answers for q in asked if q.answers is not None]), subject.tolerance)
    prediction_log.drained(racer.port)
    records = [record for line in prediction_log.lines(redis, subject.model) for record in read_records(line)]
    logged = np.array([record.prediction for record in records], np.float32)
    features = np.array([record.features for record in records], np.float64)  # None becomes NaN
    return unlike(logged, subject.predict(features), subject.tolerance) + unlike(np.sort(said), np.sort(logged), 0.0)


def unlike(said: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32], tolerance: float) -> int:
    """How many of the wanted were not said in their places; a longer or shorter answer is wrong as a whole."""
    if said.shape != wanted.shape:
        return max(len(said), len(wanted))
    if tolerance:
        return int((~(np.abs(said - wanted) <= tolerance)).sum())
    return int((said.view(np.uint32) != wanted.view(np.uint32)).sum())


def _predictions(racer: Racer, question: Question) -> npt.NDArray[np.float32]:
    ask, read = racer.contender.ask, racer.contender.read
    assert ask is not None, "who has bodies asks"
    assert read is not None, "and has predictions"
    found: Sequence[float] = read(server.ask(racer.port, racer.path, ask(question)))
    return np.array(found, np.float32)
