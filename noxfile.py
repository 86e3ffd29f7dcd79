"""Every check of the project, each in an environment that it sets up itself: `python -m nox -l` lists them.

By default they run on this interpreter and on the torch that constraints.txt pins. For a wider matrix:

    MINIPEFT_PYTHON="3.10 3.13" MINIPEFT_TORCH="2.12.0 2.13.0" python -m nox -s tests
"""

import os
import re
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True  # a matrix that leaves one out has not passed
nox.options.sessions = ["tests", "conformance", "lint", "types"]

CONSTRAINTS = Path(__file__).with_name("constraints.txt").read_text()
PYTHONS = os.environ.get("MINIPEFT_PYTHON", "").split() or None
TORCHS = os.environ.get("MINIPEFT_TORCH", "").split() or re.findall(r"^torch==(\S+)", CONSTRAINTS, re.M)
TORCHTUNE = ["torchtune==0.6.1", "torchao==0.16.0"]  # a later torchao lacks what the last torchtune imports
OLD = ["transformers<5", "huggingface_hub<1"]  # what older releases of peft import, and AdapterHub's adapters ask for
IMPLEMENTATIONS = {  # --impl NAME: what to install for it
    "peft": ["peft", "scikit-learn"],  # its AdaMSS imports that
    "loralib": ["loralib"],
    "lycoris": ["lycoris-lora"],
    "torchtune": TORCHTUNE,
    "adapters": ["adapters", *OLD],
}
REPORTS = {  # a row of docs/implementations.html: options for the suite, and what to install
    "minipeft": (["--impl", "minipeft"], ["-e", ".[conformance]"]),
    "minipeft-core": (["--impl", "minipeft-core"], ["-e", ".[conformance]"]),
    **{f"peft-{release}": (["--impl", "peft"], ["./conformance[torch]", "scikit-learn", f"peft=={release}", *more])
       for release, more in {"0.15.2": OLD, "0.17.1": OLD, "0.18.1": OLD, "0.19.1": OLD, "0.21.2": []}.items()},
    "loralib": (["--impl", "loralib"], ["./conformance[torch]", "loralib"]),
    "lycoris": (["--impl", "lycoris"], ["./conformance[torch]", "lycoris-lora"]),
    "torchtune": (["--impl", "torchtune"], ["./conformance[torch]", *TORCHTUNE]),
    "adapters": (["--impl", "adapters"], ["./conformance[torch]", "adapters", *OLD]),
    "numpy": (["--impl", "cmd:python conformance/examples/numpy_lora.py"], ["./conformance"]),
    "node": (["--impl", "cmd:node conformance/examples/node_adapters.mjs"], ["./conformance"]),
    "jax": (["--impl", "cmd:python conformance/examples/jax_lora.py"], ["./conformance", "jax"]),
    "mlx": (["--impl", "cmd:python conformance/examples/mlx_lora.py"], ["./conformance", "mlx[cpu]"]),
}
PORTS = ("minipeft-core", "loralib", "lycoris", "torchtune", "adapters", "numpy", "node", "jax", "mlx")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def matrix(session_function):
    """A session that runs once for each Python and each torch asked for."""
    if len(TORCHS) > 1:
        session_function = nox.parametrize("torch", TORCHS)(session_function)
    return nox.session(python=PYTHONS)(session_function)


def install(session, torch, *requirements):
    """Install the requirements under constraints.txt, but for the torch asked for and what they pin themselves."""
    constraints = Path(session.create_tmp(), "constraints.txt")
    pinned = "|".join(re.findall(r"\b([\w-]+)(?=[=<>])", " ".join(requirements))) or "torch"
    text = re.sub(rf"^({pinned})==.*\n", "", CONSTRAINTS, flags=re.M)
    constraints.write_text(re.sub(r"^torch==\S+", "", text, flags=re.M) + f"torch=={torch}\n")
    session.install("-q", "-c", str(constraints), *requirements)


@matrix
def tests(session, torch=TORCHS[0]):
    """The whole test suite, examples and interop with peft included."""
    install(session, torch, "-e", ".[test,pretrained]")
    session.run("pytest", "-n", "2", "--dist", "worksteal", *session.posargs, env=ONE_THREAD)


@matrix
def conformance(session, torch=TORCHS[0]):
    """The conformance suite on minipeft; options after `--` go to it, such as `--impl peft`."""
    implementations = [name for word in session.posargs for name in IMPLEMENTATIONS.get(word, ())]
    install(session, torch, "-e", ".[conformance]", *implementations)
    session.run("python", "-m", "conformance", *session.posargs, env=ONE_THREAD)


@nox.session(python=PYTHONS)
@nox.parametrize("name", [nox.param(name, id=name) for name in REPORTS])
def reports(session, name):
    """The core profile on every implementation, each in its own environment, and the page of all: docs/."""
    options, requirements = REPORTS[name]
    install(session, TORCHS[0], *requirements)
    Path("report").mkdir(exist_ok=True)
    session.run("python", "-m", "conformance", "--profile", "core", *options, "--json", f"report/{name}.jsonl",
                *session.posargs, env=ONE_THREAD, success_codes=[0, 1])
    session.notify("page", posargs=[])


@nox.session(python=PYTHONS)
@nox.parametrize("name", [nox.param(name, id=name) for name in REPORTS if name.startswith("peft-")])
def releases(session, name):
    """The core profile on a release of peft in its own environment: no failure that the known issues do not explain."""
    options, requirements = REPORTS[name]
    install(session, TORCHS[0], *requirements)
    session.run("python", "-m", "conformance", "--profile", "core", *options, *session.posargs, env=ONE_THREAD)


@nox.session(python=PYTHONS)
@nox.parametrize("name", [nox.param(name, id=name) for name in PORTS])
def ports(session, name):
    """The full profile on another library, or on an example in another language: nothing that is not a known issue."""
    options, requirements = REPORTS[name]
    install(session, TORCHS[0], *requirements)
    session.run("python", "-m", "conformance", *options, *session.posargs, env=ONE_THREAD)


@nox.session(python=PYTHONS)
def page(session):
    """docs/implementations.html out of the reports that are there."""
    install(session, TORCHS[0], "./conformance")
    Path("docs").mkdir(exist_ok=True)
    there = [str(p) for p in (Path("report", f"{name}.jsonl") for name in REPORTS) if p.exists()]
    session.run("python", "-m", "conformance", "compare", *there, "--html", "docs/implementations.html")


@nox.session(python=PYTHONS)
def oldest(session):
    """The core profile, and the tests that need no peft, on the oldest versions that are allowed."""
    session.install("-q", "-c", "constraints-oldest.txt", "-e", ".[conformance]")
    session.run("python", "-m", "conformance", "--profile", "core", env=ONE_THREAD)
    tests = session.posargs or ["tests", "conformance/tests", "--ignore=tests/interop"]
    session.run("pytest", *tests, env=ONE_THREAD)


@matrix
def interop(session, torch=TORCHS[0]):
    """Checkpoints, numbers and names exchanged with peft and transformers."""
    install(session, torch, "-e", ".[test,pretrained]")
    session.run("pytest", "tests/interop", *session.posargs, env=ONE_THREAD)


@matrix
def peer(session, torch=TORCHS[0]):
    """peft's own tests, on minipeft in its place; options after `--` go to tests/peer/run.py, such as `--sample 500`.

    Of its test functions the open half; docs/peer.md explains each failure, or else this fails.
    """
    install(session, torch, "-e", ".[test]", "pip", "datasets", "scipy", "parameterized")
    Path("report").mkdir(exist_ok=True)
    options = ["--impl", "minipeft", "--minipeft-path", ".", "--half", "open", "--timeout", "180"]
    session.run("python", "tests/peer/run.py", *options, "--out", "report/peer.json", *session.posargs)
    session.run("python", "tests/peer/table.py", "report/peer.json")


@matrix
def bnb(session, torch=TORCHS[0]):
    """Base layers quantised by bitsandbytes."""
    install(session, torch, "-e", ".[test]")
    session.run("pytest", "-m", "bnb", *session.posargs, env=ONE_THREAD)


@matrix
def gpu(session, torch=TORCHS[0]):
    """The tests that need CUDA: skipped on a machine without it, an error there if REQUIRE_GPU=1."""
    absent = session.error if os.environ.get("REQUIRE_GPU") == "1" else session.skip
    if not shutil.which("nvidia-smi"):
        absent("no NVIDIA driver on this machine")
    install(session, torch, "-e", ".[test]")
    if "True" not in session.run("python", "-c", "import torch; print(torch.cuda.is_available())", silent=True):
        absent(f"torch {torch} finds no CUDA device")
    session.run("pytest", "-m", "gpu", *session.posargs)


@matrix
def bench(session, torch=TORCHS[0]):
    """Side by side with peft; options after `--` go to `python -m benchmarks`."""
    install(session, torch, "-e", ".[bench]")
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session(python=PYTHONS)
def book(session):
    """The book in book/site/: every method trained, every block of its pages run, every link followed."""
    install(session, TORCHS[0], "-e", ".[book]")
    session.run("python", "-m", "book", *session.posargs, env=ONE_THREAD)


@nox.session(python=PYTHONS)
def lint(session):
    """ruff's rules."""
    install(session, TORCHS[0], "ruff")
    session.run("ruff", "check", *session.posargs)


@matrix
def types(session, torch=TORCHS[0]):
    """mypy's types."""
    install(session, torch, "-e", ".", "mypy")
    session.run("mypy", *session.posargs)


@nox.session(name="fixtures-check")
def fixtures_check(session):
    """Record the golden data from peft anew and compare it with what is in fixtures/."""
    install(session, TORCHS[0], "-e", ".[test]")
    session.run("python", "-m", "conformance", "record", "--check", *session.posargs, env=ONE_THREAD)
