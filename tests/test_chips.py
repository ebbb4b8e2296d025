"""The chip table: every device kind means one chip, and its figures agree with each other."""

import pytest

from cdlm_jax.mesh.chips import CHIPS, GIB, find, is_hopper


def test_a_device_kind_means_one_chip():
    kinds = [kind for chip in CHIPS for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds) and len({chip.name for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        assert all(find(kind) is chip for kind in chip.kinds)


def test_an_unknown_device_is_none():
    assert find("cpu") is None and find("") is None


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_figures_are_plausible(chip):
    """In bytes and per second: a factor of 1000 or 1024 too many would show."""
    assert 1e14 < chip.flops < 1e16
    assert 15 * GIB < chip.hbm_bytes < 256 * GIB
    assert 5e11 < chip.bandwidth < 1e13
    assert 5 < chip.bandwidth / chip.link < 50
    assert 100 < chip.ridge < 1000
    assert chip.attainable(chip.ridge / 4) == pytest.approx(0.25) and chip.attainable(10 * chip.ridge) == 1


def test_a_device_of_tpu7x_is_half_a_chip():
    v7, v5p = find("TPU7x"), find("TPU v5")
    assert v7.per_chip == 2 and v5p.per_chip == 1
    assert v7.flops * 2 == 2307e12 and v7.bandwidth * 2 == 7.38e12


def test_the_published_ridge_of_an_a100():
    assert find("NVIDIA A100-SXM4-80GB").ridge == pytest.approx(153, abs=0.1)


@pytest.mark.parametrize(
    ("kind", "hopper"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H200", True),
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA B200", False),
        ("TPU v5 lite", False),
    ],
)
def test_hopper_by_name(kind, hopper):
    assert is_hopper(kind) == hopper
