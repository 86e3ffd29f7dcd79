#!/usr/bin/env python
"""Run Hugging Face PEFT's own test suite, offline, against peft itself or against minipeft.

    python run.py --impl peft      --out peft.json                        # the installed peft
    python run.py --impl minipeft  --minipeft-path DIR --out mini.json    # DIR holds minipeft/
    python run.py --impl minipeft  --minipeft-path DIR --sample 800       # a quick look
    python score.py mini.json                                             # compare with baseline.json.gz

The suite comes from the sdist of the pinned version (pip download, or --sdist / PEER_SDIST); models come
from offline_zoo.py.  With --impl minipeft the tests that are run are those which the baseline passes
(--all: every test).  Each chunk of tests runs in its own pytest process; a process that
dies or hangs is restarted after the test it was at.

Result: {"meta": {...}, "files": {file: {outcome: n}}, "outcomes": {test id: outcome}, "messages": {id: text},
"collect_errors": {file: text}, "missing": [names asked for that minipeft lacks, modules of it that do not import]}.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import importlib.metadata
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
VERSION = "0.21.2"
sys.path.insert(0, str(HERE))

# Files that are not run, and why.
SKIPPED = {
    "tests/test_gpu_examples.py": "needs a GPU, large pretrained models and data sets",
    "tests/test_common_gpu.py": "needs a GPU",
    "tests/test_gptqmodel.py": "needs gptqmodel and a GPU",
    "tests/test_lora_megatron.py": "needs megatron-core",
    "tests/test_hub_features.py": "tests the Hub itself",
}


def log(*parts):
    print(time.strftime("%H:%M:%S"), *parts, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# preparing the work folder
# --------------------------------------------------------------------------------------------------


def get_sdist(work: Path, given: str | None) -> Path:
    given = given or os.environ.get("PEER_SDIST")
    if given:
        return Path(given)
    folder = work / "dl"
    name = folder / f"peft-{VERSION}.tar.gz"
    if not name.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        log("downloading the sdist of peft", VERSION)
        cmd = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*cmd, "--no-build-isolation", "-d", str(folder), f"peft=={VERSION}"], check=True)
    return name


def prepare(work: Path, sdist: str | None) -> dict:
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs may share the work folder
        return _prepare(work, sdist)


def _prepare(work: Path, sdist: str | None) -> dict:
    """Unpack the tests, index the real package's names, build the models; returns the paths."""
    import offline_zoo
    import peft_shim

    suite, src, index = work / "suite", work / "src", work / "index.json"
    if not (suite / "tests" / "testing_common.py").is_file() or not index.is_file():
        archive = get_sdist(work, sdist)
        with tempfile.TemporaryDirectory(dir=work) as tmp, tarfile.open(archive) as tar:
            tar.extractall(tmp, filter="data")
            root = next(p for p in Path(tmp).iterdir() if p.is_dir())
            for target in (suite, src):
                shutil.rmtree(target, ignore_errors=True)
            suite.mkdir()
            shutil.copytree(root / "tests", suite / "tests")
            shutil.copytree(root / "src" / "peft", src)
        (suite / "tests" / "__init__.py").touch()
        (suite / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
        index.write_text(json.dumps(peft_shim.make_index(src)))
    zoo = work / "zoo"
    zoo.mkdir(exist_ok=True)
    mark = zoo / "built.json"
    if not mark.is_file() or json.loads(mark.read_text()).get("stamp") != offline_zoo.stamp():
        log("building the offline models")
        env = {k: v for k, v in os.environ.items() if k != "PEER_ZOO"}
        code = subprocess.run(
            [sys.executable, str(HERE / "offline_zoo.py"), "--build", str(zoo)],
            env={**env, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        log(code.stderr.strip().splitlines()[-1] if code.stderr.strip() else "done")
    return {"suite": suite, "index": index, "zoo": zoo, "src": src}


def environment(paths: dict, args) -> dict:
    env = dict(os.environ)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_TOKEN", "PYTEST_ADDOPTS", "IS_GITHUB_CI"):
        env.pop(name, None)
    home = paths["zoo"] / "home"
    home.mkdir(parents=True, exist_ok=True)
    pythonpath = [str(HERE)]
    if args.impl == "minipeft" and args.minipeft_path:
        pythonpath.append(str(Path(args.minipeft_path).resolve()))
    if env.get("PYTHONPATH"):
        pythonpath.append(env["PYTHONPATH"])
    env.update(
        PYTHONPATH=os.pathsep.join(pythonpath),
        PYTHONHASHSEED="0",
        PEER_ZOO=str(paths["zoo"]),
        HF_HOME=str(home),
        HF_HUB_CACHE=str(paths["zoo"] / "hub"),
        HF_DATASETS_CACHE=str(home / "datasets"),
        CUDA_VISIBLE_DEVICES="",
        TOKENIZERS_PARALLELISM="false",
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        PEER_TORCH_THREADS="1",
        WANDB_DISABLED="true",
    )
    env.pop("PEER_INDEX", None)
    if args.impl == "minipeft":
        env.update(PEER_INDEX=str(paths["index"]), PEER_TARGET=args.target)
        if args.aliases:
            env["PEER_ALIASES"] = str(Path(args.aliases).resolve())
    return env


def pytest_command(args, extra) -> list:
    plugins = (["-p", "peft_shim"] if args.impl == "minipeft" else []) + ["-p", "offline_zoo", "-p", "peer_plugin"]
    return [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "pytest.ini",
        "--rootdir=.",
        "-q",
        "--tb=short",
        "--no-header",
        "-W",
        "ignore::DeprecationWarning",
        "--continue-on-collection-errors",
        *plugins,
        *extra,
    ]


# --------------------------------------------------------------------------------------------------
# choosing tests
# --------------------------------------------------------------------------------------------------


def file_of(test_id: str) -> str:
    return test_id.split("::", 1)[0]


def function_of(test_id: str) -> str:
    """The test function: the id without its parameters (also parameterized.expand's numbering)."""
    return re.sub(r"_\d+(_.*)?$", "", test_id.split("[", 1)[0])


def half_of(test_id: str) -> str:
    """"open" or "held": by the hash of the test function, so that all its parameters are in one half."""
    return ("open", "held")[hashlib.sha256(function_of(test_id).encode()).digest()[0] % 2]


def stratified(ids, rate: float, seed: int) -> list:
    """The same share of every test function (at least one test), by the hash of seed and id."""
    groups = defaultdict(list)
    for i in ids:
        groups[function_of(i)].append(i)
    chosen = set()
    for members in groups.values():
        members.sort(key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).hexdigest())
        chosen.update(members[: max(1, round(rate * len(members)))])
    return [i for i in ids if i in chosen]


def sample_total(ids, total: int, seed: int) -> list:
    """About ``total`` tests over all files, stratified by function; never more than total."""
    if total >= len(ids):
        return list(ids)
    chosen = stratified(ids, total / len(ids), seed)
    if len(chosen) > total:  # more functions than places
        chosen.sort(key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).hexdigest())
        chosen = set(chosen[:total])
        return [i for i in ids if i in chosen]
    return chosen


def collect(paths, args, env, files) -> tuple:
    out = paths["suite"].parent / f"collect-{args.impl}-{os.getpid()}.json"
    cmd = pytest_command(args, ["--collect-only", f"--peer-collect={out}", *files])
    if args.names:
        cmd.append(f"--peer-names={Path(args.names).resolve()}")
    proc = subprocess.run(cmd, cwd=paths["suite"], env=env, capture_output=True, text=True)
    if not out.is_file():
        raise SystemExit("collection failed:\n" + proc.stdout[-3000:] + proc.stderr[-3000:])
    data = json.loads(out.read_text())
    out.unlink()
    return data["ids"], data["errors"]


def load_json(path) -> dict:
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as f:
        return json.load(f)


# --------------------------------------------------------------------------------------------------
# running
# --------------------------------------------------------------------------------------------------


class Runner:
    def __init__(self, paths, args, env):
        self.paths, self.args, self.env = paths, args, env
        self.lock = threading.Lock()
        self.outcomes, self.messages, self.durations, self.collect_errors = {}, {}, {}, {}
        self.tmp = Path(tempfile.mkdtemp(prefix="run-", dir=paths["suite"].parent))
        self.missing = []
        self.done = 0
        self.total = 0

    def chunks(self, ids):
        """Chunks of one or several whole files, giants split; largest first."""
        by_file = defaultdict(list)
        for i in ids:
            by_file[file_of(i)].append(i)
        size, out, small = max(20, min(self.args.chunk, -(-len(ids) // self.args.jobs))), [], []
        for _, members in sorted(by_file.items(), key=lambda kv: -len(kv[1])):
            if len(members) > size:
                n = -(-len(members) // size)
                out += [members[k * len(members) // n : (k + 1) * len(members) // n] for k in range(n)]
            elif small and len(small[-1]) + len(members) <= size:
                small[-1] += members
            else:
                small.append(list(members))
        return out + small

    def run(self, ids):
        self.total = len(ids)
        todo = queue.Queue()
        for n, chunk in enumerate(self.chunks(ids)):
            todo.put((n, chunk))

        def worker():
            while True:
                try:
                    n, chunk = todo.get_nowait()
                except queue.Empty:
                    return
                self.run_chunk(n, chunk)

        threads = [threading.Thread(target=worker) for _ in range(self.args.jobs)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        missing = self.tmp / "missing.txt"
        if missing.is_file():
            self.missing = sorted(set(missing.read_text(encoding="utf-8").splitlines()))
        if not self.args.keep:
            shutil.rmtree(self.tmp, ignore_errors=True)

    def run_chunk(self, n, chunk):
        left, attempt, barren = list(chunk), 0, 0
        while left:
            before = len(left)
            left, how = self.one_process(f"{n}.{attempt}", left)
            attempt += 1
            barren = barren + 1 if len(left) == before else 0
            if left and how == "finished":
                # the process ended well without these: their file did not collect or has no such test
                for i in left:
                    self.record(i, "not collected", self.collect_errors.get(file_of(i), ""))
                return
            if barren >= 2:
                text = (self.tmp / f"{n}.{attempt - 1}.log").read_text(errors="replace").strip()[-1500:]
                log(f"pytest does not get anywhere ({how}):\n" + text)
                for i in left:
                    self.record(i, "crashed", f"{how}: {text[-300:]}")
                return

    def record(self, test_id, outcome, msg="", dur=0.0):
        with self.lock:
            self.outcomes[test_id] = outcome
            self.durations[test_id] = dur
            if outcome not in ("passed", "xfailed") and msg:
                self.messages[test_id] = msg
            self.done += 1
            if self.done % 500 == 0:
                log(f"{self.done} / {self.total}", dict(Counter(self.outcomes.values())))

    def one_process(self, label, ids):
        """Run ids in one pytest process; returns the ids still to run and how the process ended."""
        id_file, out_file = self.tmp / f"{label}.ids", self.tmp / f"{label}.jsonl"
        id_file.write_text("\n".join(ids) + "\n", encoding="utf-8")
        files = list(dict.fromkeys(file_of(i) for i in ids))
        limit = self.args.timeout
        extra = [f"--peer-ids={id_file}", f"--peer-out={out_file}", f"--peer-timeout={limit}"]
        env = {**self.env, "TMPDIR": str(self.tmp), "PEER_MISSING": str(self.tmp / "missing.txt")}
        scratch = self.tmp / f"{label}.base"
        with open(self.tmp / f"{label}.log", "w") as log_file:
            proc = subprocess.Popen(
                pytest_command(self.args, [*extra, f"--basetemp={scratch}", *files]),
                cwd=self.paths["suite"],
                env=env,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            seen, running, last, how = set(), None, time.time(), "finished"
            position = 0

            def read():
                nonlocal position, running, last
                if not out_file.is_file():
                    return
                with open(out_file, encoding="utf-8") as f:
                    f.seek(position)
                    while True:
                        line = f.readline()
                        if not line.endswith("\n"):
                            break
                        position = f.tell()
                        last = time.time()
                        row = json.loads(line)
                        if "start" in row:
                            running = row["start"]
                        elif "id" in row:
                            running = None
                            if row["id"] not in seen:
                                seen.add(row["id"])
                                self.record(row["id"], row["outcome"], row["msg"], row["dur"])
                        elif "errors" in row:
                            with self.lock:
                                self.collect_errors.update(row["errors"])

            while proc.poll() is None:
                time.sleep(0.5)
                read()
                idle = time.time() - last
                if (running and idle > 2 * limit + 30) or idle > 900:
                    how = "hung"
                    os.killpg(proc.pid, signal.SIGKILL)
                    proc.wait()
            read()
        if how == "finished" and proc.returncode not in (0, 1, 2, 5, 70):
            how = f"died ({proc.returncode})"
        if proc.returncode == 70:
            raise SystemExit("the real peft was imported while minipeft was to be measured")
        shutil.rmtree(scratch, ignore_errors=True)
        if running and how != "finished":
            seen.add(running)
            self.record(running, "timeout" if how == "hung" else "crashed", how)
        return [i for i in ids if i not in seen], how


def table(outcomes: dict) -> str:
    rows = defaultdict(Counter)
    for i, o in outcomes.items():
        rows[file_of(i)][o] += 1
    kinds = ["passed", "failed", "error", "skipped", "xfailed", "xpassed", "timeout", "crashed", "not collected"]
    kinds = [k for k in kinds if any(c[k] for c in rows.values())]
    lines = [f"{'file':<48} {'tests':>7} " + " ".join(f"{k:>9}" for k in kinds)]
    total = Counter()
    for name in sorted(rows):
        c = rows[name]
        total.update(c)
        lines.append(f"{name:<48} {sum(c.values()):>7} " + " ".join(f"{c[k]:>{max(9, len(k))}}" for k in kinds))
    lines.append(f"{'all':<48} {sum(total.values()):>7} " + " ".join(f"{total[k]:>{max(9, len(k))}}" for k in kinds))
    return "\n".join(lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--impl", choices=["peft", "minipeft"], required=True)
    p.add_argument("--minipeft-path", help="folder that holds the package (else it must be importable)")
    p.add_argument("--target", default="minipeft", help="import name of the package under test")
    p.add_argument("--aliases", help="JSON file of names the package offers under another name (see peft_shim.py)")
    p.add_argument("--sample", type=int, help="run about N of the chosen tests, stratified by test function")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--half", choices=["open", "held"], help="only this half of the test functions, split by hash")
    p.add_argument("--files", nargs="+", help="only these test files (names or tests/NAME.py)")
    p.add_argument("--match", help="only ids that contain this text")
    p.add_argument("--ids", help="only the ids listed in this file")
    p.add_argument("--all", action="store_true", help="minipeft: every test, not only what the baseline passes")
    p.add_argument("--with-skipped", action="store_true", help="also the files listed in SKIPPED")
    p.add_argument("--baseline", default=str(HERE / "baseline.json.gz"))
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--timeout", type=int, default=60, help="seconds a test may take")
    p.add_argument("--chunk", type=int, default=2000, help="most tests one pytest process runs")
    p.add_argument("--work", default=os.environ.get("PEER_WORK") or str(Path(tempfile.gettempdir()) / "peer_suite"))
    p.add_argument("--sdist", help="path of the sdist (else pip downloads it)")
    p.add_argument("--names", help="write which internal names every collected test reaches (JSON), then stop")
    p.add_argument("--collect-only", action="store_true", help="report what collects, then stop")
    p.add_argument("--keep", action="store_true", help="keep the logs of the pytest processes")
    p.add_argument("--out", default="result.json")
    args = p.parse_args(argv)

    started = time.time()
    work = Path(args.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    if args.impl == "peft":
        have = importlib.metadata.version("peft")
        if have != VERSION:
            raise SystemExit(f"peft {VERSION} is needed, found {have}")
    paths = prepare(work, args.sdist)
    env = environment(paths, args)

    names = [f"tests/{Path(f).name}" for f in args.files or []]
    errors, use_baseline = {}, args.impl == "minipeft" and not args.all and not args.names
    if use_baseline and not args.collect_only:
        base = load_json(args.baseline)
        ids = [i for i, o in base["outcomes"].items() if o == "passed"]
        if names:
            ids = [i for i in ids if file_of(i) in names]
    else:
        found = sorted("tests/" + f.name for f in (paths["suite"] / "tests").glob("test_*.py"))
        files = [f for f in found if (f in names if names else args.with_skipped or f not in SKIPPED)]
        ids, errors = collect(paths, args, env, files)
        log(f"collected {len(ids)} tests in {len(files)} files, {len(errors)} files with errors")
        for f, text in errors.items():
            log("  ", f, text.strip().splitlines()[-1] if text.strip() else "")
        if args.names or args.collect_only:
            Path(args.out).write_text(json.dumps({"ids": ids, "errors": errors}))
            return
    if args.ids:
        listed = set(Path(args.ids).read_text().split("\n"))
        ids = [i for i in ids if i in listed]
    if args.match:
        ids = [i for i in ids if args.match in i]
    if args.half:
        ids = [i for i in ids if half_of(i) == args.half]
    if args.sample:
        ids = sample_total(ids, args.sample, args.seed)
    log(f"running {len(ids)} tests with {args.jobs} jobs")
    runner = Runner(paths, args, env)
    runner.collect_errors.update(errors)
    runner.run(ids)

    order = {i: n for n, i in enumerate(ids)}
    outcomes = dict(sorted(runner.outcomes.items(), key=lambda kv: order.get(kv[0], 0)))
    files = defaultdict(Counter)
    for i, o in outcomes.items():
        files[file_of(i)][o] += 1
    seconds = defaultdict(float)
    for i, d in runner.durations.items():
        seconds[file_of(i)] += d
    versions = {}
    for lib in ("torch", "transformers", "accelerate", "diffusers", "datasets", "huggingface_hub", "safetensors"):
        try:
            versions[lib] = importlib.metadata.version(lib)
        except importlib.metadata.PackageNotFoundError:
            versions[lib] = None
    result = {
        "meta": {
            "impl": args.impl,
            "suite": f"peft {VERSION}",
            "seed": args.seed,
            "sample": args.sample,
            "restricted": bool(args.sample or args.files or args.match or args.ids or args.half),
            "skipped_files": {} if args.with_skipped else SKIPPED,
            "timeout": args.timeout,
            "jobs": args.jobs,
            "wall_s": round(time.time() - started, 1),
            "versions": versions,
            "python": sys.version.split()[0],
        },
        "files": {f: {**c, "seconds": round(seconds[f], 1)} for f, c in sorted(files.items())},
        "outcomes": outcomes,
        "messages": {i: m[:160] if outcomes[i] == "skipped" else m for i, m in runner.messages.items()},
        "slow": {i: round(d, 1) for i, d in runner.durations.items() if d > 5},
        "collect_errors": runner.collect_errors,
        "missing": runner.missing,
    }
    opener = gzip.open if args.out.endswith(".gz") else open
    with opener(args.out, "wt", encoding="utf-8") as f:
        json.dump(result, f, indent=0)
    print(table(outcomes))
    log(f"wrote {args.out} after {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
