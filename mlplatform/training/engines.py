"""Where fits run: in processes of this machine, or as tasks of Ray.

Belongs here: the choice, and its one way to call a fit. Does not belong here: Ray itself (`on_ray`, imported only once it is chosen),
what a fit does.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from mlplatform.training.on_ray import Tasks
    from mlplatform.training.trainers.base import Resources

Name = Literal["local", "ray"]


@dataclass(frozen=True)
class Engine:
    """`address`: HOST:PORT of a Ray cluster that this machine is part of; empty: a Ray of this machine, for as long as the work lasts."""

    name: Name = "local"
    address: str = ""


LOCAL: Final = Engine()


class EngineError(RuntimeError):
    """The engine cannot run what it was asked to; the message says the mend."""


class TaskLostError(RuntimeError):
    """The process or the machine that ran a task was lost, each time that it was tried."""


def tasks(resources: "Resources", at_once: int, data_bytes: int) -> "Tasks":
    """Ray's, started with the first task. Raises EngineError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise EngineError("MLPLATFORM_ENGINE=ray needs Ray, which is not installed: pip install 'mlplatform[ray]'")
    from mlplatform.training.on_ray import Tasks

    return Tasks(resources, at_once, data_bytes)


@contextmanager
def caller(resources: "Resources", data_bytes: int) -> Iterator[Callable[..., Any]]:
    """Yields `call(function, *args, **kwargs)`: here and now, or as a task of the engine, which may begin it again where a process dies.

    Raises what the function raises; EngineError; TaskLostError.
    """
    if resources.engine.name == "local":
        yield lambda function, *args, **kwargs: function(*args, **kwargs)
        return
    with tasks(resources, 1, data_bytes) as running:
        yield lambda function, *args, **kwargs: _only(running.run(_call, [(function, args, kwargs)]))


def here(resources: "Resources") -> "Resources":
    """The same for the process that the engine has chosen: what runs there starts no engine of its own."""
    return replace(resources, engine=LOCAL)


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _only(results: list[Any]) -> Any:
    (result,) = results
    if isinstance(result, TaskLostError):
        raise result
    return result
