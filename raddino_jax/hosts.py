"""Several processes as one run: joining them, telling all what one knows, ending them at the same step.

Alone, every function here is trivial. Words between processes go through the key-value store of jax's coordination
service, which lives in process 0 and, unlike a collective on devices, waits for nobody.
"""

import collections
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the key-value store has no public name (jax 0.10 to 0.12); only this file knows

from raddino_jax import logs

PATIENCE = 24 * 3600 * 1000  # ms that a word is waited for: a peer that dies meanwhile is the heartbeat's business
_turns: collections.Counter = collections.Counter()


class ClusterError(ValueError):
    """Processes that cannot be joined to one run; the message says what to give."""


def join(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Make this process one of several, where flags or the cluster (SLURM, Open MPI, TPU, Kubernetes) say so.

    coordinator: "address:port" of process 0. Raises ClusterError. Before the first use of a device.
    """
    given = (bool(coordinator), processes > 0, process >= 0)
    if any(given) and not all(given):
        raise ClusterError("give --coordinator=HOST:PORT, --processes=N and --process=I together, or none of them")
    if all(given) and not (process < processes and coordinator.rpartition(":")[2].isdigit()):
        raise ClusterError(
            f"expected --process below --processes and HOST:PORT, found --coordinator={coordinator} "
            f"--processes={processes} --process={process}"
        )
    if all(given) and processes == 1:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM, which the loop waits for
    words = dict(coordinator_address=coordinator, num_processes=processes, process_id=process) if all(given) else {}
    try:
        jax.distributed.initialize(**words)
    except ValueError as error:
        if words or "should be defined" not in str(error):
            raise ClusterError(f"the processes cannot be joined: {error}") from error
        return  # no cluster: this process is alone
    except RuntimeError as error:
        raise ClusterError(
            f"process {process if words else os.environ.get('SLURM_PROCID', '?')} on {socket.gethostname()} cannot "
            f"reach the others: {str(error).splitlines()[0]}. All must start within five minutes and reach process 0 "
            "at its address and port"
        ) from error
    if count() > 1:
        logs.speak_as(index(), count())
        _write_obituary()


def count() -> int:
    """Number of processes of this run."""
    return distributed.global_state.num_processes or 1


def index() -> int:
    """This process among them; process 0 writes what is written once."""
    return distributed.global_state.process_id or 0


def client() -> Any:
    """The key-value store; None where this process is alone."""
    return distributed.global_state.client


def leave() -> None:
    """Part in peace: waits for the others, after which no process hears of another. Process 0 may go on alone."""
    if count() > 1 and client() is not None:
        jax.distributed.shutdown()
        _say_goodbye()


def quit_now(code: int) -> None:
    """End this process at once, whatever its other threads wait for."""
    _say_goodbye()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gather(topic: str, value: Any) -> list:
    """JSON values of all processes, in their order. All must call it, as often as each other."""
    if count() == 1:
        return [json.loads(json.dumps(value))]
    _turns[topic] += 1
    key = f"raddino/{topic}/{_turns[topic]}"
    client().key_value_set(f"{key}/{index()}", json.dumps(value))
    return [json.loads(client().blocking_key_value_get(f"{key}/{i}", PATIENCE)) for i in range(count())]


def share(topic: str, value: Any) -> Any:
    """Process 0's JSON value, for all; what the others bring is not looked at. All must call it."""
    if count() == 1:
        return value
    _turns[topic] += 1
    key = f"raddino/{topic}/{_turns[topic]}"
    if index() == 0:
        client().key_value_set(key, json.dumps(value))
    return json.loads(client().blocking_key_value_get(key, PATIENCE))


def first(topic: str, act: Callable[[], Any], *errors: type[Exception]) -> Any:
    """What act() gives on process 0, for all; one of `errors` raised there is raised by all."""
    if count() == 1:
        return act()
    outcome: dict = {}
    if index() == 0:
        try:
            outcome = {"value": act()}
        except errors as error:
            outcome = {"error": type(error).__name__, "message": str(error)}
    outcome = share(topic, outcome)
    if "error" in outcome:
        raise next(kind for kind in errors if kind.__name__ == outcome["error"])(outcome["message"])
    return outcome["value"]


def ends_at(step: int, asked: bool) -> bool:
    """Whether all end after this step, since one was asked to.

    Called after step `step` is dispatched, when step - 1 is known to be finished on all processes. Who is asked at its
    step s says s + 2 before it dispatches s + 1. Who gets to s + 2 has seen s + 1 finish, so it reads that word.
    """
    if count() == 1:
        return asked
    last = _read("raddino/end")
    if last is None and asked:
        try:
            client().key_value_set("raddino/end", str(step + 2))
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
        last = _read("raddino/end")
    return last is not None and step >= int(last)


def _read(key: str) -> str | None:
    try:
        return client().key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


# When process 0 dies, jax aborts the others in C++, where Python has no last word: this child has it.
_OBITUARY = """
import signal, socket, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if not sys.stdin.readline():
    me, address = sys.argv[1:]
    host, _, port = address.rpartition(":")
    why = "killed, or out of memory"
    try:
        socket.create_connection((host.strip("[]"), int(port)), 5).close()
    except OSError:
        if not me.startswith("host 0 "):
            why = f"host 0 at {address}, which coordinates the run, is gone"
    print(f"raddino_jax: {me} has died: {why}", file=sys.stderr, flush=True)
"""
_obituary: subprocess.Popen | None = None


def _write_obituary() -> None:
    global _obituary
    me, address = f"host {index()} ({socket.gethostname()})", distributed.global_state.coordinator_address
    _obituary = subprocess.Popen([sys.executable, "-S", "-c", _OBITUARY, me, address], stdin=subprocess.PIPE)


def _say_goodbye() -> None:
    if count() > 1 and _obituary and not _obituary.stdin.closed:
        _obituary.stdin.write(b"bye\n")
        _obituary.stdin.close()
