"""How a model's canaries are judged and led through their steps: declared with the model.

Belongs here: what a team may set, and that it adds up. Does not belong here: judging (`deployment.judge`).
"""

from datetime import timedelta
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Level = Annotated[float, Field(gt=0, lt=0.5)]


class Tolerance(BaseModel):
    """Of one measure, as canary less champion: above `harm` a canary is worse, below `margin` it is not worse.

    In units of the measure, which lies in [0, 1]. Between the two nothing has to be decided.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    harm: float = Field(ge=0, lt=1)
    margin: float = Field(gt=0, lt=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.harm >= self.margin:
            raise ValueError(f"what counts as harm ({self.harm:g}) lies below what is tolerated ({self.margin:g})")
        return self


class CanaryPolicy(BaseModel):
    """`alpha`: probability, over a canary's whole life and all measures together, that one like the champion is called worse. `beta`: that
    one which is worse by a measure's margin is called not worse.

    Measures, each a share or a mean in [0, 1]: `errors` (requests that failed or timed out), `slow` (answers slower than the champion's
    `slow_quantile` so far by more than `slow_slack_ms`), `prediction` (mean of the predictions, in their range), `loss` (Brier score; for
    quantiles the pinball loss as a share of the label's range), `calibration` (label less prediction, as a share of their range).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # What a version that passed its gates becomes, where another serves: canary at the first step, or what serves, at once.
    rollout: Literal["canary", "direct"] = "canary"
    alpha: _Level = 0.01
    beta: _Level = 0.05
    steps: tuple[Annotated[float, Field(gt=0, lt=100)], ...] = (1, 5, 25, 50)  # percent of the entities; then it is promoted
    window: timedelta = timedelta(minutes=5)  # of one look
    min_requests: int = Field(default=100, ge=1)  # of the canary, at each step
    min_step: timedelta = timedelta(minutes=10)
    max_duration: timedelta = timedelta(days=7)
    at_the_end: Literal["end", "hold"] = "end"  # of a canary about which nothing can be told by then
    labels: bool = True  # whether a promotion waits until loss and calibration are known to be not worse
    errors: Tolerance = Tolerance(harm=0.0, margin=0.01)
    slow: Tolerance = Tolerance(harm=0.02, margin=0.08)
    prediction: Tolerance = Tolerance(harm=0.05, margin=0.12)
    loss: Tolerance = Tolerance(harm=0.0, margin=0.03)
    calibration: Tolerance = Tolerance(harm=0.05, margin=0.12)
    slow_quantile: Annotated[float, Field(ge=0.5, le=0.999)] = 0.95
    # Beyond the quantile: a canary is asked less often, so its model lies in no cache, which costs tenths of a millisecond.
    slow_slack_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    # The guard rail: a canary that is proven to fail in this share of requests more than the champion beside it ends at once.
    max_error_excess: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _steps_rise(self) -> Self:
        if not self.steps or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"a canary's steps rise from one to the next, not {self.steps}")
        if self.min_step > self.max_duration:
            raise ValueError("a canary's step takes no longer than the whole canary may")
        return self
