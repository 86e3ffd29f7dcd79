"""What README.md says is true: its table of methods, its commands, and its ten lines."""

import re
import runpy
import subprocess
import sys

from tests.methods_table import README, with_table

TEXT = README.read_text(encoding="utf-8")


def test_table_of_methods_is_up_to_date():
    assert with_table(TEXT) == TEXT, "run `python -m tests.methods_table`"


def test_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    (tmp_path / "example.py").write_text(code)
    runpy.run_path(str(tmp_path / "example.py"))
    assert "trainable params:" in capsys.readouterr().out


def test_commands_name_sessions_that_exist():
    sessions = set(re.findall(r"^def (\w+)\(session", (README.parent / "noxfile.py").read_text(), re.M))
    named = set(re.findall(r"nox -s ([\w-]+)", TEXT))
    assert {"tests", "conformance"} <= named and {name.replace("-", "_") for name in named} <= sessions


LACKING = """
import sys

sys.modules |= dict.fromkeys(("transformers", "bitsandbytes", "peft"))  # as where only the report's command was run
from conformance.run import cli

sys.exit(cli.main(sys.argv[1:]))
"""


def test_no_check_of_the_report_fails_for_what_its_command_does_not_install():
    options = ["--in-process", "--checks", "usage", "--methods", "lora,prompt_tuning,p_tuning,prefix_tuning"]
    done = subprocess.run([sys.executable, "-c", LACKING, *options], cwd=README.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "unsupported" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
