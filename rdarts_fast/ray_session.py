"""A Ray to run on (an extra): the one at an address, or one of our own for this user alone."""

from __future__ import annotations

import os
import resource
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rdarts_fast.errors import UserError

_OBJECT_STORE_BYTES = 80 * 2**20  # close to Ray's least: what goes through it are lines of text
_RAY_FAILS_WITH = (OSError, RuntimeError, ValueError)


@contextmanager
def connected_ray(address: str | None, cpus: int | None) -> Iterator[Any]:
    """Yield Ray's module, connected: to what this process was connected to before, else to the
    cluster at `address` (auto or HOST:PORT), which is left running, else to a Ray of our own with
    `cpus` cores [all that this process may use], which ends with the block.

    Inside, SIGTERM is as Ctrl-C. Raises UserError (no extra, no such cluster, Ray does not start).
    """
    with _imported() as ray, ExitStack() as stack:
        if ray.is_initialized():
            if address is not None or cpus is not None:
                flags = "--ray-address and --ray-cpus"
                raise UserError(f"this process is connected to a Ray already: leave out {flags}")
        else:
            _silence(ray, stack)
            place = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
            scratch = Path(stack.enter_context(place))
            stack.callback(ray.shutdown)
            if address is not None:
                _connect(ray, address)
            else:
                _start(ray, cpus, scratch / "r")  # Ray opens its own folder to all users
        if threading.current_thread() is threading.main_thread():
            # Ray's own handler ends the process after three seconds.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield ray


@contextmanager
def _imported() -> Iterator[Any]:
    """Yield Ray's module, and put back in the end what Ray changes in this process: environment
    variables, the handler of SIGTERM, the limit of open files. Raises UserError without the extra.
    """
    variables, files = dict(os.environ), resource.getrlimit(resource.RLIMIT_NOFILE)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        import ray
    except ImportError as error:
        raise UserError("--fleet ray needs the extra: pip install 'rdarts-fast[ray]'") from error
    try:
        yield ray
    finally:
        for name in set(os.environ) - set(variables):
            del os.environ[name]
        os.environ.update(variables)
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
        _read_authentication(ray)


def _connect(ray: Any, address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        if address != "auto":  # Ray would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (*_RAY_FAILS_WITH, ray.exceptions.RayError) as error:
        raise UserError(f"--ray-address {address}: {_line(error)}") from error


def _start(ray: Any, cpus: int | None, scratch: Path) -> None:
    """Start a Ray that only this user on this machine can talk to. `scratch` is for its files:
    left in Ray's usual place, other programs would find and use this Ray.
    """
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    token = secrets.token_hex(32)  # Ray's own would stay in the home folder
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    # Workers that it starts before there is work do not fit ours.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0"}
    _read_authentication(ray)
    try:
        # Otherwise Ray takes 127.0.0.1 for "find out this machine's address", and listens on all.
        constants.ENABLE_RAY_CLUSTER = False
        ray.init(
            "local",
            num_cpus=cpus or len(os.sched_getaffinity(0)),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
            _temp_dir=str(scratch),
        )
    except (*_RAY_FAILS_WITH, ray.exceptions.RayError) as error:
        raise UserError(f"Ray did not start: {_line(error)}") from error
    finally:
        constants.ENABLE_RAY_CLUSTER = before
    address = ray.util.get_node_ip_address()
    if address != "127.0.0.1":
        raise UserError(f"Ray {ray.__version__} listens on {address}: use another version of it")


def _silence(ray: Any, stack: ExitStack) -> None:
    """Until the stack unwinds, drop the screenful that Ray prints at a death: a line of ours says
    it.
    """
    worker = ray._private.worker
    stack.callback(setattr, worker, "print_to_stdstream", worker.print_to_stdstream)
    worker.print_to_stdstream = lambda data, ignore_prefix: None


def _read_authentication(ray: Any) -> None:
    """Let Ray read again what it reads once, when it is imported."""
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
