"""Accounting: figures of a stopwatch whose clock the test turns, against numbers worked out by hand."""

from types import SimpleNamespace

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from cdlm_jax.mesh.sharding import AXES
from cdlm_jax.training import throughput
from cdlm_jax.training.throughput import Throughput

H100 = "NVIDIA H100 80GB HBM3"


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(throughput, "time", clock := Clock())
    return clock


def devices(monkeypatch, kind, *peaks):
    """This process has a device for each peak; None is one that keeps no account."""
    accounts = [None if peak is None else {"peak_bytes_in_use": peak} for peak in peaks]
    found = [SimpleNamespace(device_kind=kind, memory_stats=lambda account=account: account) for account in accounts]
    monkeypatch.setattr(jax, "local_devices", lambda: found)


def two_steps(speed, clock):
    """8 seconds of training, 1 of them waiting for input; 2 more apart."""
    with speed.waiting():
        clock.now += 1
    clock.now += 3
    speed.step(30)
    with speed.apart():
        clock.now += 2
    clock.now += 4
    speed.step(50)


def test_figures(clock, monkeypatch):
    devices(monkeypatch, H100, 7, 9)
    speed = Throughput(flops_per_step=3e14)
    two_steps(speed, clock)
    assert speed.read() == {
        "seconds_per_step": 4.0,
        "tokens_per_second": 10.0,
        "input_wait": 0.5,
        "model_flops_per_second": 7.5e13,
        "mfu": pytest.approx(7.5e13 / 989.4e12),
        "peak_memory_bytes": 9,
    }
    clock.now += 5
    speed.step(10)
    again = speed.read()
    assert (again["seconds_per_step"], again["tokens_per_second"], again["input_wait"]) == (5.0, 2.0, 0.0)


def test_the_peak_is_that_of_the_whole_mesh(clock, monkeypatch):
    devices(monkeypatch, H100, 1)
    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 2, 2), AXES, (AxisType.Explicit,) * 3)):
        speed = Throughput(flops_per_step=3e14)
    two_steps(speed, clock)
    assert speed.read()["mfu"] == pytest.approx(7.5e13 / (8 * 989.4e12))


def test_what_is_not_known_is_left_out(clock, monkeypatch):
    devices(monkeypatch, "cpu", None)
    known = {"seconds_per_step", "tokens_per_second", "input_wait"}
    for flops, more in ((None, set()), (3e14, {"model_flops_per_second"})):
        speed = Throughput(flops)
        two_steps(speed, clock)
        assert speed.read().keys() == known | more
