"""Loops timed in turn, so that a busy machine is busy for all of them, and their medians and ratios as text."""
import statistics
import time


def time_in_turn(loops, repeats):
    """{name: seconds of each timed epoch} of {name: object with epoch()}, after one epoch each that is not timed."""
    seconds = {name: [] for name in loops}
    for turn in range(repeats + 1):
        for name, loop in loops.items():
            start = time.perf_counter()
            loop.epoch()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def print_turns(seconds, count, unit, reference_goal):
    """Medians with `unit` per second (count of them an epoch), then script / bare and reference / script."""
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:10} median {median:7.2f} s   {count / median:7.2f} {unit}/s")
    for over, under, goal in (("script", "bare", "<= 1.05"), ("reference", "script", f">= {reference_goal}")):
        ratios = [a / b for a, b in zip(seconds[over], seconds[under])]
        median = statistics.median(seconds[over]) / statistics.median(seconds[under])
        print(f"{over} / {under}: {median:.2f} (range {min(ratios):.2f} to {max(ratios):.2f}; goal {goal})")
