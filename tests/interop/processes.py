"""Python processes for what cannot be tested in this one, and the comparison of what they print."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"


def run(*arguments, check=True, timeout=300, **env):
    """A Python process in the repository; the environment is this one's and `env`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=timeout)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


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
