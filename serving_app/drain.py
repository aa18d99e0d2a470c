"""Whether the service was told to end.

Belongs here: the one bit that readiness, answers and the process share. Does not belong here: what each of them does about it.
"""


class Drain:
    """Begun once, never taken back: the process ends after it."""

    __slots__ = ("begun",)

    def __init__(self) -> None:
        self.begun = False
