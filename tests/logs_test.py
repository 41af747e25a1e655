"""metrics.jsonl keeps every step once whatever kills the run; rates and the progress line."""

import json
import math

import pytest

from raddino_jax import logs


def _lines(path) -> list[str]:
    return (path / "metrics.jsonl").read_text().splitlines()


def test_a_written_line_is_on_disk_at_once_and_holds_the_step_first(tmp_path):
    metrics = logs.Metrics(tmp_path)
    metrics.write(1, {"loss": 2.5, "mfu": None, "collapse": "a sentence"})
    assert _lines(tmp_path) == ['{"step": 1, "loss": 2.5, "mfu": null, "collapse": "a sentence"}']
    metrics.write(2, {"loss": 2.0})
    assert logs.read_metrics(tmp_path)[1] == {"step": 2, "loss": 2.0}
    metrics.close()


def test_a_resumed_run_takes_out_what_was_logged_after_its_checkpoint(tmp_path):
    first = logs.Metrics(tmp_path)
    for step in range(1, 8):
        first.write(step, {"loss": float(step)})
    first.close()
    before = _lines(tmp_path)
    resumed = logs.Metrics(tmp_path, start=4)
    assert _lines(tmp_path) == before[:4]
    resumed.write(5, {"loss": 5.0})
    resumed.close()
    assert [row["step"] for row in logs.read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_run_that_starts_anew_in_an_old_workdir_starts_with_no_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    logs.Metrics(tmp_path).close()
    assert _lines(tmp_path) == []


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step": 3}', ""])
def test_a_line_that_was_cut_off_is_left_out_and_the_next_one_starts_on_its_own(tmp_path, rest):
    """A whole object without its line break is a line; the file then ends in one again."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n' + rest)
    whole = [1, 2] + ([3] if rest.endswith("}") else [])
    assert [row["step"] for row in logs.read_metrics(tmp_path)] == whole
    metrics = logs.Metrics(tmp_path, start=len(whole))
    metrics.write(len(whole) + 1, {})
    metrics.close()
    assert [json.loads(line)["step"] for line in _lines(tmp_path)] == [*whole, len(whole) + 1]


def test_a_workdir_without_metrics_has_no_rows(tmp_path):
    assert logs.read_metrics(tmp_path) == []


def test_numbers_reach_tensorboard_and_words_do_not(tmp_path):
    metrics = logs.Metrics(tmp_path)
    metrics.write(1, {"loss": 2.5, "mfu": None, "collapse": "a sentence"})
    metrics.close()
    (events,) = tmp_path.glob("events.*")
    content = events.read_bytes()
    assert b"loss" in content and b"mfu" not in content and b"collapse" not in content


def test_a_whole_file_replaces_another_and_leaves_no_temporary_name(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old and longer")
    logs.write_whole(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("old")
    monkeypatch.setattr(type(path), "replace", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        logs.write_whole(path, "new")
    assert path.read_text() == "old"


def _interrupted(*_):
    raise KeyboardInterrupt


class _Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


def test_rates_are_those_since_the_last_call(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(logs, "time", clock)
    meter = logs.Meter(batch_size=32, flops_per_image=1e12, peak=1e15)
    meter.steps, meter.waited = 5, 0.5
    clock.now += 2
    assert meter.rates() == {
        "images_per_second": 80.0, "step_seconds": 0.4, "data_wait_fraction": 0.25, "mfu": 0.08
    }  # fmt: skip
    meter.steps = 1
    clock.now += 4
    again = meter.rates()
    assert again["images_per_second"] == 8 and again["data_wait_fraction"] == 0
    assert again.keys() <= set(logs.TIMINGS)


def test_a_device_of_unknown_peak_has_no_mfu_and_no_step_makes_no_division_by_zero():
    rates = logs.Meter(32, 1e12, None).rates()
    assert rates["mfu"] is None and math.isfinite(rates["step_seconds"])


ROW = dict(
    loss=11.98, dino_global=2.0, dino_local=4.0, ibot=5.5, images_per_second=143.2,
    step_seconds=0.25, data_wait_fraction=0.03, mfu=None,
)  # fmt: skip


def test_the_progress_line_says_where_how_well_how_fast_and_how_long():
    line = logs.progress(400, 1000, ROW)
    for words in ("step  400/1000", "loss 11.9800", "dino  6.000", "ibot  5.500", "143.2 images/s",
                  "data wait   3%", "eta 2:30"):  # fmt: skip
        assert words in line, words
    assert "mfu" not in line and "\n" not in line
    assert "mfu 41.2%" in logs.progress(400, 1000, ROW | {"mfu": 0.412})


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (59.6, "1:00"), (150, "2:30"), (3600, "1:00:00"), (90061, "25:01:01")]
)
def test_a_duration_reads_as_a_clock(seconds, text):
    assert logs.duration(seconds) == text


def test_what_is_said_goes_to_stderr(capsys):
    logs.say("data: SYNTHETIC")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "data: SYNTHETIC\n"
