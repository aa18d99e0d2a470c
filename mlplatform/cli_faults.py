"""What a person is told of a fault: what is away or which file is wrong, and the mend. One way for every command.

Belongs here: from an exception to lines, reading a file that was handed over. Does not belong here: raising, exit codes (`cli`),
looking at connections (`doctor_platform`, which finds out by name which one is away). Classes go by their names: naming them would
import their libraries.
"""

import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    from mlplatform.doctor_platform import Finding

    Document = TypeVar("Document", bound=BaseModel)

# The checks of `doctor_platform` that tell of each connection, by the name that their findings have.
_CHECKS: Mapping[str, str] = {
    "redis": "redis",
    "online store": "redis",
    "mlflow": "mlflow",
    "serving": "serving",
    "feast": "feast",
    "lake": "lake",
    **dict.fromkeys(("source reference", "source weather", "source events"), "sources"),
}
_REDIS = ("redis", "online store")
_EVERYWHERE = tuple(name for name in _CHECKS if name != "lake")  # which libraries of its own tell of

# A connection failed: which may be meant, by the class of the fault or a base class.
_LOOKS: Mapping[str, tuple[str, ...]] = {
    "mlplatform.clients.registry.RegistryUnreachableError": ("mlflow",),
    "mlplatform.queries.RedisDownError": ("redis",),
    "mlplatform.client.ServiceUnreachableError": ("serving",),
    "redis.exceptions.ConnectionError": _REDIS,
    "redis.exceptions.TimeoutError": _REDIS,
    "redis.exceptions.RedisClusterException": _REDIS,
    "deltalake.exceptions.DeltaError": ("lake",),
    "sqlalchemy.exc.OperationalError": ("feast", "source reference", "mlflow"),
    "httpx.TransportError": _EVERYWHERE,
    "requests.exceptions.ConnectionError": _EVERYWHERE,
    "builtins.ConnectionError": _EVERYWHERE,
    "builtins.TimeoutError": _EVERYWHERE,
}

# What to do about a fault whose message says what is wrong, by class or base class. Empty: the message says that too.
_MENDS: Mapping[str, str] = {
    "UnknownModelError": "`mlplatform models` lists what is registered",
    "NoPreviousGenerationError": "`mlplatform online status` shows the generations there are",
    "TakenOverError": "`mlplatform online status` shows what is read; nothing else is to be done",
    "VerificationError": "readers are not affected; `mlplatform doctor`, then try again",
    "NoServerError": "`mlplatform up` starts it; or name one with MLPLATFORM_MLFLOW_URL",
    "RebuildError": "`mlplatform history MODEL` and MLflow's page of the version tell what is recorded of it",
    "UnpinnedError": "Feast's registry names other addresses than the lake's: materialize `feature_registry`, as after a move",
    "Failure": "",
    "RunFailedError": "the run's page in the Dagster UI tells why; materialize what it names again once that is mended",
    "NothingToRollBackToError": "`mlplatform history MODEL` shows what served",
    "HomeInUseError": "`mlplatform down` ends it, or take another --home",
    "ServiceFailedError": "the log named above tells why; `mlplatform doctor` looks at the rest",
    "MissingTableError": "nothing is built yet: `mlplatform demo`, or materialize the asset in the Dagster UI",
    "NothingBuiltError": "`mlplatform demo` or `mlplatform up` builds one there; or name the --home that is meant",
    "NothingToServeError": "",
    "PortTakenError": "take another --metrics-port, or end what listens there; `mlplatform status` shows a worker that runs",
    "QuestionError": "",
    "EngineError": "",
    "TaskLostError": "its machine's log tells why, most often too little memory; run it again",
    "StateFileError": "",
    "ClockFileError": "",
    "UnreadableStoreError": "restore it from a copy, or name another with MLPLATFORM_MLFLOW_URL",
    "DeltaError": "restore the table's `_delta_log`, or move the table away and materialize its asset again",
    "DocumentError": "mend that file, or name another",
    "KeysFileError": "restore it, or name another with --file",
    "ModuleNotFoundError": "`make install`",
    "SourceDownError": "is the platform running? `mlplatform up`, or look with `mlplatform doctor`",
    "StreamDownError": "is the platform running? `mlplatform up`, or look with `mlplatform doctor`",
    "ReleaseRefusedError": "`mlplatform deployment MODEL` shows the states of its versions",
    "LedgerBusyError": "try again; `mlplatform history MODEL` shows who writes",
    "ResponseError": "Redis answered so: `mlplatform doctor` looks at it, and its log tells more",
    "MlflowException": "`mlplatform doctor` looks at MLflow; its log tells why",
}
_FILES = {
    errno.ENOENT: "it is not there: name another, or make it",
    errno.EACCES: "this user may not: mend its owner or its mode",
    errno.EPERM: "this user may not: mend its owner or its mode",
    errno.EROFS: "name another place: that one cannot be written",
    errno.ENOSPC: "make room on that disk",
    errno.EISDIR: "a folder lies where a file belongs: move it away",
    errno.ENOTDIR: "a file lies where a folder belongs: move it away, or name another --home",
    errno.EEXIST: "a file lies where a folder belongs: move it away, or name another --home",
}
_NAMES = {
    "redis": "Redis",
    "online store": "the online store",
    "mlflow": "MLflow",
    "serving": "the prediction service",
    "feast": "Feast's registry",
    "lake": "the lake",
}
_FOLLOWS = "default_factory_not_called"  # of a field whose default follows from one that is wrong
_OURS = "`mlplatform doctor` looks at everything the platform stands on"
_FOREIGN = "MLPLATFORM_DEBUG=1 shows where it comes from"


class DocumentError(ValueError):
    """A file that was handed over is not what it should be; the message names the file and the place."""


class AwayError(Exception):
    """Something that a command needs does not answer. `needs`: the connections that it may be, as `_CHECKS` names them."""

    def __init__(self, why: str, *needs: str) -> None:
        super().__init__(why)
        self.needs = needs


@dataclass(frozen=True)
class Told:
    """`errors`, each a thing that is wrong; `details` of them; `mends`, each once."""

    errors: tuple[str, ...]
    mends: tuple[str, ...] = ()
    details: tuple[str, ...] = ()


def explain(fault: BaseException) -> Told:
    """Of the fault, or of what caused it where that is the one that is known. Never a password."""
    for one in _chain(fault):
        if (told := _known(one)) is not None:
            return told
    ours = type(fault).__module__.startswith("mlplatform.")
    return Told(_first_line(fault), (_OURS if ours else _FOREIGN,))


def document(path: Path, kind: "type[Document]") -> "Document":
    """What a file holds, as JSON of `kind`. Raises DocumentError, OSError."""
    from pydantic import ValidationError

    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as refused:
        raise DocumentError(f"{path}: {places(refused)}") from refused


def places(refused: "ValidationError", prefix: str = "") -> str:
    """A validation error in one line: where, and what is wrong there. Values stay out, they may be secrets."""
    told = (e for e in refused.errors(include_input=False, include_url=False) if e["type"] != _FOLLOWS)
    found = ((".".join(map(str, e["loc"])), str(e["msg"])) for e in told)
    found = ((name, message.removeprefix("Value error, ")) for name, message in found)
    return "; ".join(f"{prefix + name.upper() if prefix else name}: {message}" if name else message for name, message in found)


def _chain(fault: BaseException | None) -> Iterator[BaseException]:
    """The fault and what caused it, outermost first."""
    while fault is not None:
        yield fault
        fault = fault.__cause__ or (None if fault.__suppress_context__ else fault.__context__)


def _known(fault: BaseException) -> Told | None:
    if isinstance(fault, AwayError):
        return _away(fault, fault.needs)
    names = [f"{kind.__module__}.{kind.__name__}" for kind in type(fault).__mro__]
    short = [kind.__name__ for kind in type(fault).__mro__]
    mend = next((_MENDS[name] for name in short if name in _MENDS), None)
    needs = next((_LOOKS[name] for name in names if name in _LOOKS), None)
    if needs is None and isinstance(fault, OSError) and fault.errno is None and fault.filename is None:
        needs = ("lake",)  # an object store's, of which the Rust libraries keep neither address nor cause
    if needs is not None and (mend is None or _down(needs)):
        return _away(fault, needs)
    if "pydantic_core._pydantic_core.ValidationError" in names:
        return _refused(fault)
    if mend is not None:
        # The end of a service's log is the cause; anything else in further lines is for the trace.
        details = tuple(str(fault).strip().splitlines()[1:]) if "ServiceFailedError" in short else ()
        return Told(_first_line(fault), (mend,) if mend else (), details)
    if isinstance(fault, OSError) and fault.errno in _FILES:
        where = f"{fault.filename}: " if fault.filename else ""
        return Told((f"{where}{fault.strerror}",), (_FILES[fault.errno],))
    return None


def require(*needs: str) -> None:
    """Raises AwayError where one of the connections does not answer: for what would tell it in a trace of its own."""
    if down := _down(needs):
        raise AwayError(down[0].detail, *needs)


def _away(fault: BaseException, needs: Sequence[str]) -> Told:
    """What does not answer now, of what the fault may come from: an exception seldom says whose address it names."""
    down = _down(needs)
    if not down:
        return Told(_first_line(fault), ("it answers again: try once more; `mlplatform doctor` looks at everything",))
    errors = tuple(f"{_NAMES.get(one.check, one.check)}: {one.detail}" for one in down)
    return Told(errors, tuple(dict.fromkeys(one.mend for one in down)))


def _down(needs: Sequence[str]) -> list["Finding"]:
    """What doctor finds away of these connections."""
    from mlplatform import doctor_platform
    from mlplatform.local.service_state import read_state
    from mlplatform.settings import load_settings

    settings = load_settings()
    patient = doctor_platform.Patient(settings.home, settings, read_state(settings.home))
    found = [one for check in dict.fromkeys(_CHECKS[need] for need in needs) for one in getattr(doctor_platform, check)(patient)]
    return [one for one in found if one.away and one.check in needs]


def _refused(fault: BaseException) -> Told:
    from pydantic import ValidationError

    assert isinstance(fault, ValidationError)
    if fault.title.endswith("Settings"):
        return Told((places(fault, "MLPLATFORM_"),), ("mend the MLPLATFORM_* variables named; `mlplatform doctor` lists them all",))
    return Told((places(fault),), ("mend what is named",))


def _first_line(fault: BaseException) -> tuple[str]:
    return ((str(fault).strip() or type(fault).__name__).splitlines()[0],)
