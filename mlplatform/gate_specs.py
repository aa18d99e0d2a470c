"""What a version must reach before it may answer anybody: declared with the model.

Belongs here: which bounds a team may set, and that they make sense. Does not belong here: judging (`evaluation.gates`).
"""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Declared(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gate(_Declared):
    """A bound on a metric of the test rows. `blocking` gates stop promotion.

    `beyond_doubt`: only a version whose whole 95 % interval of the metric lies beyond the bound fails, as with `SliceGate`. The metric must
    be one with an interval.
    """

    metric: str
    minimum: float | None = None
    maximum: float | None = None
    reason: str
    blocking: bool = True
    beyond_doubt: bool = False


class SliceGate(_Declared):
    """A bound that every slice of `column` must not be proven to break: one whose whole 95 % interval lies beyond it fails.

    Slices are those of the evaluation, so rare values beyond the forty largest are judged together, as "(other)". A slice of fewer than
    `min_rows` rows is not judged, and the gate says how many were not. The metric is one that slices have an interval of: `auc`,
    `log_loss`; for quantiles `mae`, `pinball` or `coverage`.
    """

    column: str
    metric: str
    minimum: float | None = None
    maximum: float | None = None
    min_rows: int = Field(default=200, ge=1)
    reason: str
    blocking: bool = True

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if (self.minimum is None) == (self.maximum is None):
            raise ValueError(f"the slice gate of {self.metric} by {self.column} has a minimum or a maximum, and one of them only")
        return self


class ChampionGate(_Declared):
    """The challenger may be worse than the champion, on the same rows, by at most `tolerance`: with 95 % confidence where days allow."""

    metric: str = "log_loss"
    higher_is_better: bool = False
    tolerance: float = 0.002


class ServingBudget(_Declared):
    """What a version may cost whoever serves it: its file, and the processor time of one prediction on one thread, in milliseconds.

    Unless declared otherwise: twice the file that the widest search space gives (1,000 trees of depth 9 are 16 MB), and more than ten
    times the time of the flights' models, so that a slow machine stops nothing.
    """

    model_bytes: int = Field(default=32_000_000, gt=0)
    cpu_ms: _Positive = 5.0  # of a single row
    cpu_ms_100: _Positive = 25.0  # of 100 rows at once
