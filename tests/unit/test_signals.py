"""A stop that is asked for arrives, wherever Python happens to be."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from stages.config import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of Unix")

BEGIN = """
import signal, sys, time, weakref
from stages.workflow import signals
for number in (signal.SIGINT, signal.SIGTERM):  # whoever runs the tests may ignore them: nohup, a shell's background
    signal.signal(number, signal.SIG_DFL)
signals.listen()

class Thing: pass

def lose(_):  # what a weak reference's callback raises is dropped
    signal.raise_signal(signal.SIGINT)
    for _ in range(10): pass

thing = Thing()
kept = weakref.ref(thing, lose)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BEGIN + textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)


def test_a_stop_that_python_dropped_is_raised_again() -> None:
    done = python("""
        try:
            del thing
            assert signals.asked().code == 130
            time.sleep(20)
        except signals.Stopped as stop:
            print("stopped", stop.code, stop)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped 130 SIGINT\n", "")


def test_other_errors_that_python_drops_are_said_as_before() -> None:
    done = python("""
        class Broken:
            def __del__(self): raise ValueError("broken")
        assert signals.asked() is None
        Broken()
        time.sleep(0.2)
        print("goes on")
    """)
    assert (done.returncode, done.stdout) == (0, "goes on\n")
    assert "ValueError: broken" in done.stderr


def test_a_second_signal_changes_nothing() -> None:
    done = python("""
        try:
            signal.raise_signal(signal.SIGTERM)
        except signals.Stopped as stop:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)
            print(stop.code, signals.asked().code)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "143 143\n", "")
