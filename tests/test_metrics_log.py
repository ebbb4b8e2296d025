"""Metrics: lines of the steps that count, written by one process, in TensorBoard too."""

import contextlib
import json
import struct

import jax
import pytest

from cdlm_jax.training import metrics_log
from cdlm_jax.training.metrics_log import MetricsLog


class Speed:
    """In place of a stopwatch: figures that do not change."""

    def __init__(self, **more):
        self.tokens, self.figures = 0, {"tokens_per_second": 1234.5, **more}

    def step(self, tokens):
        self.tokens += tokens

    def read(self):
        return self.figures | {"tokens": self.tokens}


@pytest.fixture
def open_log():
    """open_log(folder) -> a log that ends a line at every second step, closed with the test."""
    with contextlib.ExitStack() as stack:

        def opened(folder, start=0, **more):
            log = MetricsLog(folder, start, lambda step: step % 2 == 0, Speed(**more))
            return stack.enter_context(contextlib.closing(log))

        yield opened


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_a_mean(open_log, tmp_path):
    log = open_log(tmp_path)
    for step, loss in enumerate([1.0, 2.0, 5.0, 6.0], 1):
        log.step(step, {"loss": loss}, 10)
    log.close()
    assert lines(tmp_path) == [
        {"step": 2, "loss": 1.5, "tokens_per_second": 1234.5, "tokens": 20},
        {"step": 4, "loss": 5.5, "tokens_per_second": 1234.5, "tokens": 40},
    ]


@pytest.mark.parametrize(
    ("more", "status"),
    [({}, "loss 1.5000  1,234 tokens/s"), ({"mfu": 0.4567}, "loss 1.5000  1,234 tokens/s  MFU 45.7 %")],
)
def test_the_status(open_log, tmp_path, more, status):
    log = open_log(tmp_path, **more)
    assert log.status == ""
    log.step(1, {"loss": 1.0}, 1)
    assert log.status == "loss 1.0000"
    log.step(2, {"loss": 2.0}, 1)
    assert log.status == status
    log.step(3, {"loss": 9.0}, 1)
    assert log.status == status


def test_steps_that_are_run_again_are_dropped(open_log, tmp_path):
    log = open_log(tmp_path)
    for step in (2, 4, 6):
        log.write(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a process was killed as it wrote
    open_log(tmp_path, start=4)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]


def test_one_process_writes(open_log, tmp_path, monkeypatch):
    open_log(tmp_path).write(2, {"loss": 1.0})
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    other = open_log(tmp_path)  # would drop the line
    other.write(4, {"loss": 1.0})
    other.step(6, {"loss": 3.0}, 1)
    assert other.status.startswith("loss 3.0000")
    other.close()
    assert [line["step"] for line in lines(tmp_path)] == [2]


def test_without_tensorboardx_there_is_no_board(open_log, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_log.importlib.util, "find_spec", lambda name: None)
    log = open_log(tmp_path)
    log.write(2, {"loss": 1.0})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard(open_log, tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    def events(file):
        """Of a file of records: length uint64, its checksum uint32, the record, its checksum."""
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack_from("<Q", data)
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]

    log = open_log(tmp_path, start=4)
    log.write(6, {"loss": 1.5, "heldout/accuracy": 0.25})
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = list(events(file))
    assert {(value.tag, value.simple_value) for event in found for value in event.summary.value} == {
        ("loss", 1.5),
        ("heldout/accuracy", 0.25),
    }
    (begun,) = (event for event in found if event.session_log.status == SessionLog.START)
    assert begun.step == 5  # what an earlier run wrote from this step on is hidden
