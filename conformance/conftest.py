"""In a checkout the plugin is found without `-p`."""

import sys

if "conformance.plugin" not in sys.modules:
    from conformance.plugin import (  # noqa: F401
        driver,
        pytest_addoption,
        pytest_generate_tests,
        pytest_ignore_collect,
    )

collect_ignore_glob = ["examples/*"]
