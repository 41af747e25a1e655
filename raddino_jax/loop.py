"""The only training loop in the house: dispatch, prefetch, report one step late, save."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any


class Terminated:
    """True once the process was asked to end (SIGTERM) inside `with`; the loop then saves and returns."""

    def __init__(self):
        self.asked, self.before = False, None

    def __enter__(self) -> "Terminated":
        with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
            self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def _ask(self, *_):
        self.asked = True

    def __bool__(self) -> bool:
        return self.asked


def run(
    state: Any,
    step_fn: Callable[[Any, Any], tuple[Any, dict]],
    batches: Iterator,
    *,
    start: int,
    steps: int,
    report: Callable[[int, dict], None],
    save: Callable[[int, Any], None],
    should_save: Callable[[int], bool],
    meter,
    evaluate: Callable[[int, Any], dict] = lambda step, state: {},
    stop: Callable[[int], bool] = lambda step: False,
    beat: Callable[[int, str], None] = lambda step, doing: None,
    rescue: Callable[[int, Any], None] = lambda step, state: None,
) -> tuple[Any, int]:
    """Run steps start + 1 .. steps and return (state, last finished step).

    step_fn(state, batch) -> (state, metrics) is asynchronous: the metrics of step t - 1 are reported after step t is
    dispatched, and the next batch is fetched meanwhile. evaluate(step, state) may add to a step's metrics. Before a
    save every metric up to it has been reported, so a run resumed from there has lost no line. stop(step) true ends
    the run after a save. beat(step, what is done now) is called at every change. Where a report raises
    FloatingPointError, rescue(the step it was of, state) comes before the raise.
    """
    step, pending = start, None

    def fetch():
        beat(step, "data")
        return _next(batches, meter) if step < steps else None

    def tell(reported: int, metrics: dict) -> None:
        beat(step, "devices")
        try:
            report(reported, metrics)
        except FloatingPointError:
            rescue(reported, state)
            raise

    batch = fetch()
    while step < steps:
        beat(step + 1, "step")
        state, metrics = step_fn(state, batch)
        step += 1
        meter.steps += 1
        batch = fetch()
        if pending is not None:
            tell(*pending)
        beat(step, "evaluation")
        pending = (step, metrics | evaluate(step, state))
        ending = step == steps or stop(step)
        if ending or should_save(step):
            tell(*pending)
            pending = None
            beat(step, "saving")
            save(step, state)
        if ending:
            break
    return state, step


def _next(batches: Iterator, meter):
    began = time.perf_counter()
    batch = next(batches)
    meter.waited += time.perf_counter() - began
    return batch
