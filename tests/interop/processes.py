"""Python processes for what cannot be tested in this one, and the comparison of what they print."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"


def run(*arguments, check=True, timeout=300, **env):
    """A Python process in the repository; the environment is this one's and `env`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=timeout)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def here(script, *arguments):
    """What a script that leaves nothing behind prints last, read as JSON: in this process, that has the libraries."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = [str(script), *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(printed), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before
    return json.loads(printed.getvalue().splitlines()[-1])


def last_line(done):
    """What a process printed last, read as JSON."""
    return json.loads(done.stdout.splitlines()[-1])


def close(ours, theirs):
    """Equal, numbers to rounding."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for key in b:
            if isinstance(b[key], float) or (isinstance(b[key], list) and {type(x) for x in b[key]} == {float}):
                assert a[key] == pytest.approx(b[key], rel=2e-5, abs=2e-6), (b["label"], key)
            else:
                assert a[key] == b[key], (b["label"], key)
