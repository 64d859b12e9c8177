"""Benchmarks run alone on the machine, on as many threads as it has cores; they print ratios and hold their limits."""

import time

import pytest


@pytest.fixture
def ratio(capsys):
    """Time two functions in turn and print how many times as long the first takes (medians)."""

    def measure(name, ours, peer, rounds=9):
        for function in (ours, peer, ours, peer):
            function()
        times = {ours: [], peer: []}
        for _ in range(rounds):
            for function in (ours, peer):
                started = time.perf_counter()
                function()
                times[function].append(time.perf_counter() - started)
        a, b = (sorted(times[f])[rounds // 2] for f in (ours, peer))
        with capsys.disabled():
            print(f"\n  {name}: {a * 1e3:.1f} ms against {b * 1e3:.1f} ms, ratio {a / b:.2f}")
        return a / b

    return measure
