"""The paired comparison of a shadow: what it finds, and how sure it is."""

import numpy as np
import pytest

from mlplatform.deployment.shadow import Paired, Pairs, Row, pair, table


def batch(rng, n=2000, shift=0.0, noise=0.05, slower=1.0, carriers=("AA", "UA")) -> Pairs:
    truth = rng.random(n)
    label = (rng.random(n) < truth).astype(float)
    champion, shadow = truth, np.clip(truth + shift + noise * rng.standard_normal(n), 0, 1)
    latency = 5 * (1 + rng.pareto(1.1, n))
    times = (slower * latency * rng.uniform(0.9, 1.1, n), latency)
    return Pairs(shadow, champion, *times, (label - shadow) ** 2, (label - champion) ** 2, {"carrier": [carriers[i % 2] for i in range(n)]})


def rows(paired: Paired) -> dict[tuple[str, str], Row]:
    return {(row.slice[1], row.measure): row for row in table(paired, 0.01)}


def test_what_differs_is_found_and_what_does_not_is_not():
    found = rows(pair(batch(np.random.default_rng(0), shift=0.2, slower=3.0)))
    assert found["", "prediction"].low > 0
    assert found["", "loss"].low > 0
    assert found["", "slower"].low > 0
    same = rows(pair(batch(np.random.default_rng(0))))
    for measure in ("prediction", "loss", "slower"):
        assert same["", measure].low < 0 < same["", measure].high


def test_slices_add_up_to_the_whole():
    paired = pair(batch(np.random.default_rng(1), 300))
    for measure, sums in paired.sums["", ""].items():
        parts = paired.sums["carrier", "AA"][measure] + paired.sums["carrier", "UA"][measure]
        assert np.allclose(parts.to_list(), sums.to_list())


def test_what_has_no_label_yet_has_no_loss():
    nan = float("nan")
    paired = pair(
        Pairs(*(np.array(v) for v in ([0.2, 0.5], [0.1, 0.4], [3.0, 1.0], [1.0, 2.0])), np.array([nan, 0.3]), np.array([nan, 0.1]))
    )
    sums = paired.sums["", ""]
    assert sums["prediction"].to_list() == pytest.approx([2, 0.2, 0.02])
    assert sums["slower"].to_list() == [2, 0, 2]
    assert sums["loss"].to_list() == pytest.approx([1, 0.2, 0.04])


def test_losses_that_were_not_cut_are_an_error():
    with pytest.raises(ValueError, match="loss: values outside"):
        pair(Pairs(*(np.array([0.5]) for _ in range(4)), np.array([3.0]), np.array([0.1])))


def test_intervals_of_all_looks_hold_the_true_difference():
    rng, missed = np.random.default_rng(3), 0
    for _ in range(60):
        labels, outside = (rng.random(2000) < 0.55).astype(float), False
        for n in range(100, 2001, 100):
            label, took = labels[:n], np.ones(n)
            row = rows(pair(Pairs(label, 1 - label, took, took)))["", "prediction"]
            outside |= not row.low <= 0.1 <= row.high
        missed += outside
    assert missed <= 4
