"""Tasks of Ray: the one module that knows it.

Belongs here: connecting to a cluster, a Ray of this machine for as long as some work lasts, running functions as tasks. Does not belong
here: what the functions do.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any, Final

from mlplatform.training.engines import EngineError, TaskLostError
from mlplatform.training.trainers.base import Resources

# Of a task, each time its process or machine dies; an exception of its own is no reason.
MAX_RETRIES: Final = 3
_LEAST_STORE_BYTES: Final = 128 * 2**20
_LONGEST_WAIT_S: Final = 10.0
# A process whose input ends when this one does, whatever ended it. A handle goes on meaning its process, where a number is given again.
_AFTER_US: Final = """
import signal, sys
sys.stdin.read()
for handle in sys.argv[1:]:
    try:
        signal.pidfd_send_signal(int(handle), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


class Tasks:
    """Within a `with` block: runs functions as tasks with the processors and devices that a fit may use.

    Connects with the first task, so that a study that is complete starts nothing. `at_once`: tasks a Ray of this machine runs side by
    side; a cluster runs as many as it has room for. `data_bytes`: what the tasks are shown.
    """

    def __init__(self, resources: Resources, at_once: int, data_bytes: int) -> None:
        self._engine = resources.engine
        self._cpus = max(resources.threads, resources.workers)
        self._gpus = resources.workers if resources.device.startswith("cuda") else 0
        self._at_once = at_once
        self._data_bytes = data_bytes
        self._stack = ExitStack()
        self._connected = False

    def __enter__(self) -> "Tasks":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def share(self, value: Any) -> Any:
        """Puts what every task is shown into Ray's store once; an argument of a task in place of the value."""
        self._connect()
        import ray

        return ray.put(value)

    def run(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The results in the order of `calls`, once all have ended; TaskLostError in the place of a task that was lost.

        Raises what the function raised, EngineError where no machine can run it.
        """
        self._connect()
        import ray

        remote = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=MAX_RETRIES)(function)
        return [_result(task) for task in [remote.remote(*call) for call in calls]]

    def _connect(self) -> None:
        if self._connected:
            return
        if self._engine.address:
            self._stack.enter_context(_cluster(self._engine.address))
        else:
            store = max(_LEAST_STORE_BYTES, 2 * self._data_bytes)
            self._stack.enter_context(_this_machine(max(os.cpu_count() or 1, self._cpus * self._at_once), store))
        self._connected = True
        self._refuse_what_would_wait_forever()

    def _refuse_what_would_wait_forever(self) -> None:
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(m.get("CPU", 0) >= self._cpus and m.get("GPU", 0) >= self._gpus for m in machines):
            there = "; ".join(f"{m.get('CPU', 0):g} processors and {m.get('GPU', 0):g} GPUs" for m in machines)
            raise EngineError(
                f"a fit asks for {self._cpus} processors and {self._gpus} GPUs of one machine, and none in the Ray cluster has them "
                f"({there}): lower MLPLATFORM_TRAINING_WORKERS, or add larger machines"
            )


def _result(task: Any) -> Any:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(task)
    except RayTaskError as failed:
        raise failed.cause from failed
    except RayError as lost:
        return TaskLostError(f"a task was lost {MAX_RETRIES + 1} times, the last time so: {' '.join(str(lost).split())}")


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    host, _, port = address.rpartition(":")
    try:
        # Ray itself would try for a quarter of an hour.
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LONGEST_WAIT_S).close()
    except OSError as away:
        raise EngineError(
            f"MLPLATFORM_RAY_ADDRESS={address}: no Ray answers there ({away}); `ray status` on its machine shows it"
        ) from away
    from ray.exceptions import RayError

    try:
        _start(address)
    except (ConnectionError, RuntimeError, RayError) as refused:
        why = "its token (RAY_AUTH_TOKEN) and the versions of Ray and Python must be those of the cluster"
        raise EngineError(f"MLPLATFORM_RAY_ADDRESS={address}: Ray does not take this process ({refused}); {why}") from refused
    with _ending():
        yield


@contextmanager
def _this_machine(cpus: int, store_bytes: int) -> Iterator[None]:
    """A Ray of its own, which ends with the block, and by the kernel's doing with this process."""
    # Ray's sockets lie there, whose paths may have 107 bytes: too few for most homes.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        with _environment(_of_this_machine()):
            _start("local", num_cpus=cpus, object_store_memory=store_bytes, include_dashboard=False, _temp_dir=folder)
        with _none_outlives_this_process(folder), _ending():
            yield


@contextmanager
def _none_outlives_this_process(folder: str) -> Iterator[None]:
    """The kernel ends Ray's first processes with this one; what those started takes another minute to give up (2.60), if nobody ends it."""
    if sys.platform != "linux":
        yield
        return
    import psutil  # Ray brings it

    handles = []
    for child in psutil.Process().children():
        with suppress(psutil.Error, OSError):  # it has ended
            # Ray's alone, which name its folder: the platform's services may be children of this process too.
            if any(folder in part for part in child.cmdline()):
                handles += [os.pidfd_open(process.pid) for process in (child, *child.children(recursive=True))]
    command = [sys.executable, "-I", "-S", "-c", _AFTER_US, *map(str, handles)]
    # In a session of its own: Ctrl-C in the terminal is not meant for it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=handles, start_new_session=True):
        for handle in handles:
            os.close(handle)
        yield


def _start(address: str, **options: Any) -> None:
    import ray

    try:
        with _signals_kept():
            ray.init(address, log_to_driver=False, configure_logging=False, **options)
    except BaseException:  # Ctrl-C, for one, when half of it has started
        ray.shutdown()
        raise


@contextmanager
def _ending() -> Iterator[None]:
    try:
        yield
    finally:
        import ray

        ray.shutdown()


@cache
def _of_this_machine() -> dict[str, str]:
    """Read when Ray is imported and by the processes it starts."""
    return {
        # Ray's name for "this machine alone", taken for granted elsewhere than on Linux: all ports are on the loopback interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Other users of the machine reach its loopback interface. Ray's own token lies in the home directory, for all to read.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Threads that spin while they wait take the cores from the other tasks.
        "OMP_WAIT_POLICY": "passive",
    }


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts a handler for SIGTERM in the place of ours, which would end a Dagster run without its own goodbye."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
