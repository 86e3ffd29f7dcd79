import sys
from importlib.util import find_spec

NEEDED = ("numpy", "safetensors", "hypothesis", "rich", "tqdm")

if lacking := [name for name in NEEDED if find_spec(name) is None]:
    sys.exit(
        f"python -m conformance needs {', '.join(lacking)}: pip install 'minipeft[conformance]', "
        "in a checkout pip install -e '.[conformance]', or for the suite alone pip install ./conformance."
    )

from .commands import main  # noqa: E402

raise SystemExit(main())
