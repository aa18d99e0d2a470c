"""Answers that say more: the features used, and what each of them added to the prediction.

Belongs here: requests with `?explain=true` or `?features=true`. Does not belong here: how contributions are computed (`model_handle`).

Contributions cost far more than predictions (every path through every tree), so they are computed in one thread beside the event
loop, one request at a time, and for fewer inputs than are predicted.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from serving_app.model_handle import ModelHandle
from serving_app.predictor import Answer, Exchange, Predictor, answer_body, inputs_of
from serving_app.problems import FieldError, invalid_input

UNIT = "log-odds"


class Explainer:
    """Used from one event loop."""

    def __init__(self, predictor: Predictor, rows_limit: int) -> None:
        self._predictor = predictor
        self._rows_limit = rows_limit
        self._one = asyncio.Lock()

    async def respond(self, exchange: Exchange, read: Callable[[], Awaitable[bytes]], explain: bool, features: bool) -> bytes:
        """The body of the answer to a body of our own protocol. Raises ProblemError."""
        chosen = self._predictor.choose(exchange).handle.contract
        inputs = inputs_of(await read())
        if explain and chosen.framework != "xgboost":
            raise invalid_input(
                [FieldError(f"the model '{chosen.model}' has no trees to explain; `features` tells what it was asked with")]
            )
        if explain and isinstance(inputs, list) and len(inputs) > self._rows_limit:
            detail = f"at most {self._rows_limit} inputs are explained in one request, got {len(inputs)}"
            raise invalid_input([FieldError(detail, field="inputs")])
        answer = await self._predictor.answer(exchange, inputs)
        used = _used(answer)
        more: list[dict[str, Any]] = [{"features": values} for values in used] if features else [{} for _ in used]
        if explain:
            async with self._one:
                handle = answer.choice.handle
                contributions = await asyncio.to_thread(handle.explain, answer.scored.matrix)
            if contributions is None:  # the traffic rules chose a version of another family
                raise invalid_input([FieldError(f"version {handle.version} has no trees to explain")])
            for added, told in zip(more, explanations(handle, contributions, used), strict=True):
                added["explanation"] = told
        return answer_body(answer, exchange.request_id, more)


def explanations(handle: ModelHandle, contributions: npt.NDArray[np.float32], used: list[dict[str, float | None]]) -> list[dict[str, Any]]:
    """One for each row of `contributions`, as `ModelHandle.explain` gives them."""
    names = [f.name for f in handle.contract.features]
    return [
        {"base": base, "contributions": dict(zip(names, added, strict=True)), "features": values, "unit": UNIT}
        for (*added, base), values in zip(contributions.tolist(), used, strict=True)
    ]


def _used(answer: Answer) -> list[dict[str, float | None]]:
    names = [f.name for f in answer.choice.handle.contract.features]
    rows = answer.scored.matrix.tolist()
    return [{name: None if math.isnan(v) else v for name, v in zip(names, row, strict=True)} for row in rows]
