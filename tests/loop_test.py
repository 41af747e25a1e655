"""The loop: order of dispatch, fetch, report and save; stop and resume. No device takes part."""

import itertools
import os
import signal
import types

import pytest

from raddino_jax import loop


class Trace:
    """A run whose state is the list of batches it took; `events` is what happened, in order."""

    def __init__(self, save_every=1000, stop_at=None, evaluate_every=None):
        self.events, self.save_every, self.stop_at = [], save_every, stop_at
        self.evaluate_every = evaluate_every
        self.meter = types.SimpleNamespace(steps=0, waited=0.0)

    def batches(self, start):
        for step in itertools.count(start + 1):
            self.events.append(f"fetch {step}")
            yield step

    def step(self, state, batch):
        self.events.append(f"step {batch}")
        return [*state, batch], {"seen": len(state) + 1}

    def report(self, step, metrics):
        self.events.append(f"report {step}")
        assert metrics["seen"] == step - self.start
        self.scores = {**getattr(self, "scores", {}), step: metrics.get("score")}

    def evaluate(self, step, state):
        assert state[-1] == step
        if self.evaluate_every and step % self.evaluate_every == 0:
            self.events.append(f"evaluate {step}")
            return {"score": step / 10}
        return {}

    def run(self, steps, start=0):
        self.start = start

        def save(step, state):
            assert state[-1] == step
            self.events.append(f"save {step}")

        return loop.run(
            [], self.step, self.batches(start), start=start, steps=steps, report=self.report,
            save=save, should_save=lambda step: step % self.save_every == 0, meter=self.meter,
            evaluate=self.evaluate,
            stop=lambda step: self.stop_at is not None and f"step {self.stop_at}" in self.events,
        )  # fmt: skip


def test_a_step_is_reported_after_the_next_one_is_dispatched_and_its_batch_fetched():
    trace = Trace()
    state, last = trace.run(3)
    assert (state, last) == ([1, 2, 3], 3)
    assert trace.events == [
        "fetch 1", "step 1", "fetch 2", "step 2", "fetch 3", "report 1", "step 3", "report 2",
        "report 3", "save 3",
    ]  # fmt: skip


def test_every_step_is_reported_once_and_before_the_save_that_holds_it():
    trace = Trace(save_every=3)
    trace.run(8)
    reports = [event for event in trace.events if event.startswith("report")]
    assert reports == [f"report {step}" for step in range(1, 9)]
    for step in (3, 6, 8):
        assert trace.events.index(f"report {step}") + 1 == trace.events.index(f"save {step}")
    assert [event for event in trace.events if event.startswith("save")] == ["save 3", "save 6", "save 8"]


def test_the_last_step_is_saved_once_even_where_it_is_due_anyway():
    trace = Trace(save_every=2)
    trace.run(4)
    assert trace.events.count("save 4") == 1


def test_a_resumed_run_goes_on_after_its_start():
    trace = Trace(save_every=2)
    state, last = trace.run(6, start=3)
    assert (state, last) == ([4, 5, 6], 6)
    assert [event for event in trace.events if event.startswith("report")] == [
        "report 4", "report 5", "report 6"
    ]  # fmt: skip
    assert [event for event in trace.events if event.startswith("save")] == ["save 4", "save 6"]


@pytest.mark.parametrize("steps", [3, 2])
def test_a_finished_run_fetches_and_saves_nothing(steps):
    trace = Trace()
    assert trace.run(steps, start=3) == ([], 3)
    assert trace.events == []


def test_a_run_that_is_asked_to_stop_reports_and_saves_the_step_it_is_in():
    trace = Trace(stop_at=4)
    _, last = trace.run(100)
    assert last == 4 and trace.events[-3:] == ["report 3", "report 4", "save 4"]
    assert "step 5" not in trace.events


def test_scores_of_an_evaluation_are_reported_with_their_step():
    trace = Trace(evaluate_every=2)
    trace.run(5)
    assert trace.scores == {1: None, 2: 0.2, 3: None, 4: 0.4, 5: None}
    assert trace.events.index("evaluate 2") < trace.events.index("report 2")


def test_an_error_in_a_report_ends_the_run_without_a_save():
    """A loss that is no number must not become the newest checkpoint."""
    trace = Trace(save_every=1)

    def report(step, metrics):
        if step == 2:
            raise FloatingPointError("nan")

    trace.report = report
    with pytest.raises(FloatingPointError):
        trace.run(5)
    assert [event for event in trace.events if event.startswith("save")] == ["save 1"]


def test_the_meter_counts_steps_and_the_time_spent_waiting(monkeypatch):
    trace, clock = Trace(), types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    fetch = trace.batches

    def slow(start):
        for batch in fetch(start):
            clock.now += 0.5
            yield batch

    trace.batches = slow
    trace.run(4)
    assert trace.meter.steps == 4 and trace.meter.waited == pytest.approx(2.0)


def test_sigterm_is_remembered_instead_of_ending_the_process():
    before = signal.getsignal(signal.SIGTERM)
    with loop.Terminated() as asked:
        assert not asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked
    assert signal.getsignal(signal.SIGTERM) is before, "what comes after the loop can be ended again"
