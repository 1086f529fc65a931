"""Signals interrupt a main thread that waits, and leave no lock behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SECONDS_MAX = 120.0
ROUNDS = 5000
CONTROL_ROUNDS_MAX = 100_000
"""The control ends at its first finding, which comes within some thousand rounds."""

# One signal a round, at a random moment of a loop of short waits, as commands wait for their workers.
SCRIPT = '''
import os, random, signal, sys, threading, time
from contextlib import nullcontext
from cloudsave.cli.interruption import signals_interrupt

class Hasty:
    """Each look is later than any echo."""
    now = 0.0
    def monotonic(self):
        self.now += 10.0
        return self.now

def plain(number, frame):
    raise KeyboardInterrupt

rounds, how = int(sys.argv[1]), sys.argv[2]
asked, ask = os.pipe()
if os.fork() == 0:
    # Another process: a thread of this one would only run while the main thread waits.
    os.close(ask)
    generator = random.Random(7)
    while os.read(asked, 1):
        time.sleep(generator.random() * 0.001)
        os.kill(os.getppid(), signal.SIGTERM)
    os._exit(0)
signal.signal(signal.SIGTERM, plain)
left = wrong = 0
with signals_interrupt(Hasty()) if how == "ours" else nullcontext():
    for number in range(rounds):
        if how == 'plain' and left + wrong:
            break
        event = threading.Event()
        try:
            os.write(ask, b'x')
            while True:
                event.wait(0.0003)
        except KeyboardInterrupt:
            pass
        except RuntimeError:
            wrong += 1
        left += event._cond._lock.locked()
os.close(ask)
os.wait()
print(left, wrong)
'''


def _run(how: str, rounds: int) -> tuple[int, int]:
    """(locks left behind, interruptions that became another error) in so many interruptions."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(rounds), how],
        check=True,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    left, wrong = done.stdout.split()
    return int(left), int(wrong)


def test_an_interruption_leaves_no_lock_behind() -> None:
    assert _run("ours", ROUNDS) == (0, 0)


def test_the_search_for_locks_left_behind_finds_those_of_a_plain_handler() -> None:
    left, wrong = _run("plain", CONTROL_ROUNDS_MAX)
    assert left + wrong > 0
