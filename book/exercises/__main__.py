"""Check your work: `python -m book.exercises rslora`, or all without a name; `--answers` checks the answers instead."""

import argparse
import importlib

from . import checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(checks.CHECKS))
    parser.add_argument("--answers", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.names) - set(checks.CHECKS):
        parser.error(f"there is no exercise {sorted(unknown)}; there are {', '.join(checks.CHECKS)}")
    failed = 0
    for name in options.names or checks.CHECKS:
        module = importlib.import_module(f"{__package__}.{'answers.' * options.answers}{name}")
        try:
            checks.CHECKS[name](module)
        except (AssertionError, NotImplementedError) as error:
            failed += 1
            print(f"{name}: not yet. {error}")
        else:
            print(f"{name}: right")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
