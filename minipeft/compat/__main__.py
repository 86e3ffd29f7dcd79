"""Run a script that says `peft` on minipeft: python -m minipeft.compat SCRIPT [ARGUMENTS]"""

import runpy
import sys
from pathlib import Path

from .surface import install

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: python -m {__package__} SCRIPT [ARGUMENTS]")
    install()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
