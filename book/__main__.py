"""Build the book: `python -m book`, with the extra `book`. The pages are then in book/site/."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import chapters, html, method_pages, site, source, training
from .method_files import methods, path_of

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "site")
    parser.add_argument("--experiments", type=Path, metavar="FILE",
                        help="keep what training gave in this file, and take it from there if it is there: for writing")
    options = parser.parse_args()
    started = time.time()
    torch.set_num_threads(1)
    given = experiments(options.experiments)
    given |= {"method_files": methods(), "path_of": path_of, "line": html.line,
              "table": html.table}
    print(f"experiments: {time.time() - started:.0f} s", flush=True)
    pages = chapters.pages(given) + method_pages.pages(given["digits"]["rows"], given["texts"]["rows"]) + source.pages()
    site.write(pages, options.out)
    wrong = site.faults(options.out)
    size = sum(f.stat().st_size for f in options.out.rglob("*") if f.is_file())
    print(f"{options.out}: {len(pages)} pages, {size / 2**20:.1f} MiB, {time.time() - started:.0f} s")
    for fault in wrong:
        print(fault, file=sys.stderr)
    return bool(wrong)


def experiments(file: Path | None) -> dict[str, Any]:
    if file and file.exists():
        return torch.load(file, weights_only=False)
    given = training.everything()
    if file:
        torch.save(given, file)
    return given


if __name__ == "__main__":
    sys.exit(main())
