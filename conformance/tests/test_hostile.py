"""Programs that die, hang, lie and shout: each is reported, and the suite goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from conformance.drivers import process
from conformance.drivers.process import Process
from conformance.run import cli, plan, runner

TASKS = [t for t in plan.tasks("core", ["ia3"], dtypes=["float32"]) if t.check == "forward"][:2]
INFO = {"name": "hostile", "version": "1", "dtypes": ["float32"]}
LOOP = """
import json, os, sys, time
for line in sys.stdin:
    op = json.loads(line)["op"]
    if op == "info": reply = {"ok": {info}}
    else: {act}
    print(json.dumps(reply) if isinstance(reply, dict) else reply, flush=True)
"""


def program(act, info=INFO):
    return [sys.executable, "-c", LOOP.replace("{info}", repr(info)).replace("{act}", act)]


HOSTILE = {  # what a program does with every operation but info: what the report says of it
    "reply = 'loading model ...'": "no JSON object: 'loading model ...'",
    "reply = '[' * 100000": "no JSON object",
    "reply = '9' * 5000": "no JSON object",
    "reply = {'fine': 1}": "of no known kind",
    "reply = 'x' * 3 * 2**20": "more than 1 MiB",
    "time.sleep(60)": "hung: no answer within",
    "sys.stderr.write('out of memory'); os.abort()": "SIGABRT. Its stderr ends: out of memory",
    "os._exit(7)": "ended with status 7",
    "os.close(1); time.sleep(60)": "closed its stdout",
    "import subprocess; subprocess.Popen(['sleep', '30'], start_new_session=True); os._exit(7)": "ended with status 7",
    "reply = {'error': '\\x1b[31m\\ud800\\0 ' + 'y' * 10**6}": "\\x1b[31m\\ud800\\x00 yyy",
    "reply = {'ok': {'array': '/dev/zero'}}": "not in the folder",
    "reply = {'ok': {'array': '/no/where'}}": "cannot be read",
    "reply = {'ok': {'array': 'a\\0b'}}": "cannot be read",
    "p = os.environ['TMPDIR'] + '/pipe%d' % os.getpid(); os.path.exists(p) or os.mkfifo(p); "
    "reply = {'ok': {'array': p}}": "no regular file",
}


@pytest.mark.parametrize("act", HOSTILE)
def test_is_reported(act, monkeypatch):
    monkeypatch.setattr(process, "LONGEST_LINE", 2**20)
    driver = Process(program(act))
    results = runner.run(driver, TASKS, seconds=1.0 if "60" in act else 20.0)
    driver.close()
    for result in results:
        assert result.outcome == "error" and HOSTILE[act] in result.message, result.message
        assert len(result.message) < 2200 and result.message.isprintable()


def test_nothing_outside_the_exchange_folder_is_deleted(tmp_path):
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"kept")
    link = f"os.path.lexists(p) or os.symlink({str(mine)!r}, p)"
    for answer in (repr(str(mine)), "p"):
        act = f"p = os.environ['TMPDIR'] + '/link'; {link}; reply = {{'ok': {{'array': {answer}}}}}"
        driver = Process(program(act))
        assert "not in the folder" in runner.run_one(driver, TASKS[0]).message
        driver.close()
    assert mine.read_bytes() == b"kept"


def test_what_a_program_started_ends_with_it(tmp_path):
    note = tmp_path / "pid"
    act = f"import subprocess; c = subprocess.Popen(['sleep', '60']); open({str(note)!r}, 'w').write(str(c.pid)); " \
          "time.sleep(60)"
    driver = Process(program(act))
    assert "hung" in runner.run_one(driver, TASKS[0], 1.0).message
    driver.close()
    for _ in range(50):
        if not Path(f"/proc/{note.read_text()}/cmdline").exists() or not \
                Path(f"/proc/{note.read_text()}/cmdline").read_bytes():
            return
        time.sleep(0.1)
    raise AssertionError("it still runs")


def test_a_suite_that_is_ended_ends_the_program(tmp_path):
    script, note = tmp_path / "driver.py", tmp_path / "pid"
    script.write_text(f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "conformance", "--impl", f"cmd:{sys.executable} {script}", "--methods", "ia3"]
    path = str(Path(cli.__file__).parents[2])
    suite = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    for _ in range(300):
        if note.exists() and note.read_text():
            break
        time.sleep(0.1)
    suite.terminate()
    assert suite.wait(20) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{note.read_text()}").exists()


def test_a_program_that_never_answers_is_not_started_for_ever(tmp_path):
    note = tmp_path / "starts"
    driver = Process(program(f"open({str(note)!r}, 'a').write('x'); os._exit(7)"))
    results = runner.run(driver, TASKS * 4)
    driver.close()
    assert {r.outcome for r in results} == {"error"} and "not started again" in results[-1].message
    assert len(note.read_text()) == process.STARTS
    assert not Path(driver.exchange.name).exists() and not Path(driver.own.name).exists()


INFOS = {"time.sleep(60)": "Hung", "os._exit(3)": "status 3", "None": "must give a name", "1": "must give a name",
         "{'name': 'a'}": "must give",
         "{'name': 'a', 'version': '1', 'dtypes': ['int4']}": "must give"}


@pytest.mark.parametrize("info", INFOS)
def test_a_start_that_fails_is_a_report_too(info, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "START", 1.0)
    script = tmp_path / "driver.py"
    script.write_text(LOOP.replace("{info}", info).replace("{act}", "reply = {}"))
    paths = {k: tmp_path / f"r.{k}" for k in ("html", "json", "junit", "badge")}
    command = f"cmd:{sys.executable} {script}"
    given = ["--impl", command, "--methods", "ia3", "--timeout", "1"]
    assert cli.main([*given, *(f"--{k}={p}" for k, p in paths.items())]) == 1
    assert INFOS[info] in capsys.readouterr().out
    assert json.loads(paths["json"].read_text().splitlines()[1])["outcome"] == "error"
    ElementTree.parse(paths["junit"]), ElementTree.parse(paths["badge"])


def test_control_characters_reach_no_report(tmp_path, capsys):
    script = tmp_path / "driver.py"
    name = {"name": "\x1b]0;x\x07\ud800<b>", "version": "\0", "dtypes": ["float32"]}
    script.write_text(LOOP.replace("{info}", repr(name)).replace(
        "{act}", "reply = {'error': '\\x1b[2J\\ud800\\0<script>'}"))
    paths = {k: tmp_path / f"r.{k}" for k in ("html", "json", "junit", "badge")}
    command = f"cmd:{sys.executable} {script}"
    cli.main(["--impl", command, "--methods", "ia3", "--checks", "forward", "--profile", "core",
              *(f"--{k}={p}" for k, p in paths.items())])
    shown = capsys.readouterr().out + "".join(p.read_text(encoding="utf-8") for p in paths.values())
    assert "\x1b" not in shown and "\0" not in shown and "\\x1b[2J" in shown
    assert "\\x00&lt;script&gt;" in paths["html"].read_text(encoding="utf-8")
    ElementTree.parse(paths["junit"]), ElementTree.parse(paths["badge"])


def test_a_crash_in_an_import_is_told(tmp_path):
    (tmp_path / "crashing.py").write_text("import os\nos.abort()\n")
    command = [sys.executable, "-m", "conformance", "--impl", "crashing", "--methods", "ia3"]
    path = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[1])])
    seen = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": path})
    assert seen.returncode == 1 and "SIGABRT" in seen.stdout and "FAILED" in seen.stdout


@pytest.mark.parametrize("option, said", [
    (["--methods", "lora,ia4"], "no method is called 'ia4'; did you mean 'ia3'?"),
    (["--methods", "ia3", "--checks", "foward"], "did you mean 'forward'?"),
    (["--methods", "lora", "--cases", "linear/rslorra"], "the nearest is 'lora/linear/rslora'"),
    (["--timeout", "0"], "'0' is no time to wait"), (["--timeout", "nan"], "'nan' is no time to wait"),
    (["--timeout", "-1"], "'-1' is no time to wait"), (["--timeout", "soon"], "invalid seconds value: 'soon'"),
    (["--impl", "cmd:"], "needs the command line of a program"),
    (["--in-process", "--impl", "no_such_module"], "No module named 'no_such_module'"),
    (["--in-process", "--impl", "conformance:NoDriver"], "no attribute 'NoDriver'"),
])
def test_mistyped_names(option, said, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["--impl", "oracle", *option])
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_nothing_is_left_in_the_current_folder(tmp_path):
    command = [sys.executable, "-m", "conformance", "--impl", "oracle", "--methods", "ia3", "--profile", "core"]
    path = str(Path(cli.__file__).parents[1])
    subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=tmp_path,
                   env={**os.environ, "PYTHONPATH": path})
    assert not list(tmp_path.iterdir())
