"""Any in-process driver as a program: JSON lines on stdin and stdout, tensors by safetensors path.

`python -m conformance.serve peft` speaks the protocol that `drivers/process.py` describes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

from .driver import OPERATIONS, Rejected, Unsupported
from .drivers import open_driver
from .drivers.process import pack, unpack


def answer(driver, request: dict, folder: Path, number: int) -> dict:
    """Do one operation; what it raised is told in one word and a message."""
    try:
        if request["op"] not in OPERATIONS:
            raise Unsupported(f"no operation {request['op']!r}")
        arguments = unpack(request.get("args", {}))
        result = getattr(driver, request["op"])(**arguments)
        return {"ok": pack(result, folder / f"answer-{number}.safetensors")}
    except Unsupported as e:
        return {"unsupported": str(e)}
    except Rejected as e:
        return {"rejected": str(e)}
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        return {"error": f"{type(e).__name__}: {e} ({Path(where.filename).name}:{where.lineno})"}


def main(name: str) -> None:
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not get between the lines
    with tempfile.TemporaryDirectory() as folder:
        driver = open_driver(name)
        for number, line in enumerate(sys.stdin):
            reply = answer(driver, json.loads(line), Path(folder), number)
            lines.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
