"""What a run says: metrics.jsonl, TensorBoard and one progress line, with throughput, data wait and MFU."""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

TIMINGS = ("images_per_second", "step_seconds", "data_wait_fraction", "mfu", "seconds")


_speaker = (0, 1)  # this process, and how many there are


def speak_as(process: int, processes: int) -> None:
    """One of several processes: all but 0 are silent, except where each has to be heard."""
    global _speaker
    _speaker = (process, processes)


def say(message: str, each: bool = False) -> None:
    """One line for the person at the terminal; each: from every process, with its number."""
    process, processes = _speaker
    if each and processes > 1:
        message = f"[host {process}] {message}"
    if each or process == 0:
        print(message, file=sys.stderr, flush=True)


class Silent:
    """The Metrics of processes that write none."""

    def write(self, step: int, values: dict) -> None:
        """Nothing: process 0 writes it."""

    def close(self) -> None:
        """Nothing is open."""


class Metrics:
    """metrics.jsonl (one object per line, each step once) and TensorBoard events of one workdir."""

    def __init__(self, workdir: Path, start: int = 0):
        """start: steps already finished; later lines, of a run that was killed, are taken out."""
        # Not its SummaryWriter: that writes in a thread, whose death on a full disk leaves this one waiting for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self.path = Path(workdir) / "metrics.jsonl"
        _keep_until(self.path, start)
        self.file = self.path.open("a")
        self.events, self.event = EventsWriter(str(self.path.with_name("events"))), event_pb2.Event
        if start:
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # viewers drop later steps of before
            self.events.write_event(self.event(wall_time=time.time(), step=start + 1, session_log=restart))

    def write(self, step: int, values: dict) -> None:
        """Append one line; it is on disk when this returns."""
        self.file.write(json.dumps({"step": step} | values) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        event = self.event(wall_time=time.time(), step=step)
        for name, value in values.items():
            if isinstance(value, (int, float)):
                event.summary.value.add(tag=name, simple_value=value)
        self.events.write_event(event)
        self.events.flush()

    def close(self) -> None:
        self.file.close()
        self.events.close()


def read_metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl; an unfinished last line is left out."""
    path = Path(workdir) / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the writer was killed inside this line
    return rows


def _keep_until(path: Path, step: int) -> None:
    rows = [row for row in read_metrics(path.parent) if row["step"] <= step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename: nobody sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


class Meter:
    """Rates between two log lines: images/s, share of time spent waiting for data, MFU."""

    def __init__(self, batch_size: int, flops_per_image: float, peak: float | None):
        """peak: FLOP/s of all devices together, None where it is unknown."""
        self.batch_size, self.flops, self.peak = batch_size, flops_per_image, peak
        self.last = dict(images_per_second=0.0, step_seconds=0.0, data_wait_fraction=0.0, mfu=None)
        self.reset()

    def reset(self) -> None:
        self.began, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def leave_out(self, seconds: float) -> None:
        """Time that is neither training nor waiting, such as an evaluation."""
        self.began += seconds

    def rates(self) -> dict:
        """The rates since the last call, then start anew; the last ones again where no step lies between."""
        if not self.steps:
            return self.last
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        images = self.steps * self.batch_size / elapsed
        self.last = {
            "images_per_second": images,
            "step_seconds": elapsed / max(self.steps, 1),
            "data_wait_fraction": self.waited / elapsed,
            "mfu": None if self.peak is None else images * self.flops / self.peak,
        }
        self.reset()
        return self.last


def tell_step(
    metrics: Metrics | None, meter: Meter, step: int, steps: int, values: dict, every: int, shown: Sequence[str],
    unit: str = "images",
) -> None:  # fmt: skip
    """Write a step's values and say those of `shown`: the first step, the last, each `every`-th, and a validated one.

    For the trainings of evaluations, whose validation loss is "val_loss". metrics: None in processes that only check.
    Raises FloatingPointError where a loss, a gradient or a rate is no number: nothing is saved after it.
    """
    values = {name: float(value) for name, value in values.items()}
    learned = {name: value for name, value in values.items() if name != "val_loss"}
    if wrong := [f"{name} {value}" for name, value in learned.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"step {step}: {', '.join(wrong)}: lower config.lr")
    if metrics is None or (step not in (1, steps) and step % every and "val_loss" not in values):
        return
    rates = meter.rates()
    metrics.write(step, values | {"images_per_second": rates["images_per_second"]})
    told = "".join(f"  {name.replace('_', ' ')} {values[name]:.4f}" for name in (*shown, "val_loss") if name in values)
    left = duration((steps - step) * rates["step_seconds"])
    say(
        f"step {step:{len(str(steps))}d}/{steps}{told}  {rates['images_per_second']:.1f} {unit}/s  "
        f"data wait {rates['data_wait_fraction']:.0%}  eta {left}"
    )


def progress(step: int, steps: int, row: dict) -> str:
    """One line: where the run is, what it loses, how fast it goes, when it ends."""
    left = (steps - step) * row["step_seconds"]
    mfu = "" if row["mfu"] is None else f"  mfu {row['mfu']:.1%}"
    width = len(str(steps))
    return (
        f"step {step:{width}d}/{steps}  loss {row['loss']:7.4f}  dino {row['dino_global'] + row['dino_local']:6.3f}  "
        f"ibot {row['ibot']:6.3f}  {row['images_per_second']:7.1f} images/s  "
        f"data wait {row['data_wait_fraction']:4.0%}{mfu}  eta {duration(left)}"
    )


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
