"""One measurement in this process: `python -m benchmarks.measure '{"name": ..., "libraries": [...], ...}'` prints JSON.

A measurement is a function of a `Run` that yields `(quantity, unit, {library: [one value a round]})`, and of what
fails `(quantity, the error, {})`. The libraries
take turns, so that a busy spell hits them all. On a CPU time is that of this process alone, whoever else uses the
machine; on a GPU it ends when the GPU has finished.
"""

import copy
import gc
import importlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .methods import LAYERS, UNMERGEABLE, config

Values = dict[str, list[float]]
MEASUREMENTS: dict[str, Callable[[Any], Iterator[tuple[str, str, Values]]]] = {}
APART = {"imports"}  # each library in a fresh process
MIXED = (4, 16, 64)  # adapters in one batch
COMPILED = ("lora", "dora", "ia3", "vera")
WIDE = {"layers": 32, "width": 4096, "inner": 11008}  # a 7B model
DEEP = {"layers": 24, "width": 256, "inner": 704}  # 168 linear layers


@dataclass
class Run:
    """What is measured, and on what."""

    name: str
    libraries: list[str]  # the one under test first
    device: str
    width: int
    tokens: int
    rounds: int
    adapters: int
    methods: list[str]
    backend: str

    def imported(self) -> dict[str, Any]:
        return {library: importlib.import_module(library) for library in self.libraries}

    def net(self) -> Any:
        """Linear layers one after the other, drawn at seed 0: in float32 on a CPU, in bfloat16 on a GPU."""
        import torch

        torch.manual_seed(0)
        layers = [torch.nn.Linear(self.width, self.width) for _ in range(LAYERS)]
        return torch.nn.Sequential(*layers).to(self.device, torch.bfloat16 if self.device == "cuda" else torch.float32)

    def inputs(self, rows: int = 1) -> Any:
        import torch

        x = torch.randn(rows, max(self.tokens // rows, 1), self.width, generator=torch.Generator().manual_seed(2))
        return x.to(self.device, torch.bfloat16 if self.device == "cuda" else torch.float32)

    def adapted(self, library: Any, method: str, adapters: int = 1) -> Any:
        """A model with adapters that do something: the trained tensors are moved away from where they start."""
        import torch

        model = library.get_peft_model(self.net(), config(library, method), "adapter0")
        for i in range(1, adapters):
            model.add_adapter(f"adapter{i}", config(library, method))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
        return model

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long a call takes."""
        import torch

        clock = time.perf_counter if self.device == "cuda" else time.process_time
        wait = torch.cuda.synchronize if self.device == "cuda" else tuple
        wait()
        start = clock()
        work()
        wait()
        return clock() - start

    def in_turn(self, works: Mapping[Any, Callable[..., Any]], setup: Callable[[Any], tuple] | None = None) -> Any:
        """Seconds of works[name](*setup(name)), in each round all of them; one round before is for warming up."""
        found: dict[Any, list[float]] = {library: [] for library in works}
        for _ in range(self.rounds + 1):
            for library, work in works.items():
                given = setup(library) if setup else ()
                found[library].append(self.seconds(partial(work, *given)))
        return {library: values[1:] for library, values in found.items()}

    def peak(self, work: Callable[[], Any]) -> float:
        """The most memory in MiB that a call has at once, beyond what was there before."""
        import torch

        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        now = most = 0
        events: Any = profiler.profiler.kineto_results.events()
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most / 2**20


def measurement(function: Any) -> Any:
    MEASUREMENTS[function.__name__] = function
    return function


def resident() -> float:
    """This process' memory in MiB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return next(int(line.split()[1]) for line in status.open() if line.startswith("VmRSS:")) / 2**10


@measurement
def imports(run: Run) -> Iterator[tuple[str, str, Values]]:
    """Import, from a bare interpreter, as far as LoRA needs it: minipeft imports names when they are asked for."""
    (library,), before, start = run.libraries, resident(), time.perf_counter()
    module = importlib.import_module(library)
    if library != "torch":
        module.LoraConfig, module.get_peft_model, module.PeftModel  # noqa: B018
    yield "import", "seconds", {library: [time.perf_counter() - start]}
    yield "import memory", "MiB", {library: [resident() - before]}


@measurement
def inject(run: Run) -> Iterator[tuple[str, str, Values]]:
    """LoRA into 168 linear layers, and into the 224 of a 7B shape on the meta device."""
    from .llama import LINEARS, stack

    def put_in(library: Any, base: Any) -> None:
        library.get_peft_model(base, config(library, "lora", target_modules=LINEARS))

    works = {name: partial(put_in, library) for name, library in run.imported().items()}
    yield "inject", "seconds", run.in_turn(works, lambda _: (stack(**DEEP, device=run.device),))
    yield "inject 7B on meta", "seconds", run.in_turn(works, lambda _: (stack(**WIDE, device="meta"),))


@measurement
def checkpoint(run: Run) -> Iterator[tuple[str, str, Values]]:
    """save_pretrained, and from_pretrained onto a fresh base model: 168 linear layers."""
    from .llama import LINEARS, stack

    base = lambda *of: (stack(**DEEP, device=run.device),)
    save, load = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, library in run.imported().items():
            model = library.get_peft_model(*base(), config(library, "lora", target_modules=LINEARS))
            save[name] = partial(model.save_pretrained, folder)
            load[name] = lambda base, library=library: library.PeftModel.from_pretrained(base, folder)
        yield "save_pretrained", "seconds", run.in_turn(save)
        yield "from_pretrained", "seconds", run.in_turn(load, base)


@measurement
def methods(run: Run) -> Iterator[tuple[str, str, Values]]:
    """Of every method: a forward pass without gradients, a training step, merge_and_unload, and their peak memory."""
    import torch

    x = run.inputs()

    def forward(model: Any) -> None:
        with torch.no_grad():
            model(x)

    def copied_of(models: dict[str, Any], name: str) -> tuple:
        return (copy.deepcopy(models[name]),)

    def step(model: Any) -> None:
        model(x).square().mean().backward()
        model.zero_grad()

    for method in run.methods:
        try:
            models = {name: run.adapted(library, method).train() for name, library in run.imported().items()}
            fresh = copy.deepcopy(models)  # some methods keep what cannot be copied after a pass
            for what, function in (("forward", forward), ("step", step)):
                works = {name: partial(function, model) for name, model in models.items()}
                yield f"{method}: {what}", "seconds", run.in_turn(works)
            yield f"{method}: step, peak", "MiB", {n: [run.peak(partial(step, m))] for n, m in models.items()}
            if method not in UNMERGEABLE:
                merge = dict.fromkeys(models, lambda model: model.merge_and_unload())
                yield f"{method}: merge", "seconds", run.in_turn(merge, partial(copied_of, fresh))
                peaks = {name: [run.peak(model.merge_and_unload)] for name, model in fresh.items()}
                yield f"{method}: merge, peak", "MiB", peaks
        except Exception as error:
            yield method, f"{type(error).__name__}: {error}", {}


@measurement
def mixed(run: Run) -> Iterator[tuple[str, str, Values]]:
    """A batch whose samples take turns among 4, 16 and 64 LoRA adapters, and how much longer than one adapter's."""
    import torch

    def forward(model: Any, x: Any, **told: Any) -> None:
        with torch.no_grad():
            model(x, **told)

    for n in MIXED:
        x, names, works = run.inputs(n), [f"adapter{i}" for i in range(n)], {}
        for name, library in run.imported().items():
            model = run.adapted(library, "lora", n).eval()
            works[name, "one"] = partial(forward, model, x)
            works[name, "mixed"] = partial(forward, model, x, adapter_names=names)
        found = run.in_turn(works)
        yield f"mixed batch of {n}", "seconds", {name: found[name, "mixed"] for name in run.libraries}
        pairs = {name: zip(found[name, "mixed"], found[name, "one"]) for name in run.libraries}
        times = {name: [mixed / one for mixed, one in pair] for name, pair in pairs.items()}
        yield f"mixed batch of {n}, to one adapter's", "times", times


@measurement
def many(run: Run) -> Iterator[tuple[str, str, Values]]:
    """Loading the 10th and the last of many LoRA adapters, switching among them, and what they take of memory.

    Each library has a process of its own: what one has freed would not be counted when another uses it again.
    """
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = {name: pool.apply(many_of_one, (run, name)) for name in run.libraries}
    for what, unit in rows[run.libraries[0]]:
        yield what, unit, {name: found[what, unit] for name, found in rows.items() if (what, unit) in found}


def many_of_one(run: Run, name: str) -> dict[tuple[str, str], list[float]]:
    import torch

    torch.set_num_threads(1)
    library = importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        run.adapted(library, "lora").save_pretrained(folder, selected_adapters=["adapter0"])
        model = library.PeftModel.from_pretrained(run.net(), f"{folder}/adapter0", adapter_name="adapter0")
        loads, before, counted = [], resident(), 0
        for i in range(1, run.adapters):
            if i == 10:
                gc.collect()
                before, counted = resident(), i
            loads.append(run.seconds(partial(model.load_adapter, f"{folder}/adapter0", f"adapter{i}")))
        gc.collect()
        size = sum(p.nbytes for key, p in model.named_parameters() if ".adapter1." in key) / 2**20
        tenth, last = loads[7:12], loads[-5:]
        rows = {
            ("load the 10th adapter", "seconds"): tenth,
            (f"load adapter {run.adapters}", "seconds"): last,
            ("load the last adapter, to the 10th", "times"): [statistics.median(last) / statistics.median(tenth)],
            (f"set_adapter among {run.adapters}", "seconds"):
                [run.seconds(partial(model.set_adapter, f"adapter{i}")) for i in range(1, run.rounds + 1)],
        }
        if run.device == "cpu" and counted:
            grown = (resident() - before) / ((run.adapters - counted) * size)
            rows["memory of adapters, to that of their tensors", "times"] = [grown]
        return rows


@measurement
def compiled(run: Run) -> Iterator[tuple[str, str, Values]]:
    """torch.compile with dynamic=True: a training step, graphs for it, and graphs for what changes after a warm-up."""
    import torch
    from torch._dynamo.utils import counters

    graphs = lambda: float(counters["stats"]["unique_graphs"])
    train_on = lambda call, x: call(x).square().mean().backward()
    for method in [m for m in COMPILED if m in run.methods]:
        taken: dict[str, Values] = {"seconds": {}, "graphs": {}, "later": {}}
        for name, library in run.imported().items():
            torch._dynamo.reset()
            counters.clear()
            model = run.adapted(library, method, 2)
            call = torch.compile(model, dynamic=True, backend=run.backend)
            train = partial(train_on, call)
            model.set_adapter("adapter0")
            train(run.inputs(2))
            taken["graphs"][name] = [graphs()]
            x = run.inputs(2)
            taken["seconds"][name] = [run.seconds(partial(train, x)) for _ in range(run.rounds)]
            model.set_adapter("adapter1")
            train(run.inputs(2))
            warm = graphs()
            for adapter, scale, rows in (("adapter0", 0.5, 2), ("adapter1", 2.0, 4), ("adapter0", 3.0, 8)):
                model.set_adapter(adapter)
                for layer in model.modules():
                    if hasattr(layer, "set_scale") and adapter in getattr(layer, "scaling", ()):
                        layer.set_scale(adapter, scale)
                train(run.inputs(rows))
            taken["later"][name] = [graphs() - warm]
        yield f"{method}: compiled step", "seconds", taken["seconds"]
        yield f"{method}: graphs", "graphs", taken["graphs"]
        yield f"{method}: graphs after the warm-up", "graphs", taken["later"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    asked = Run(**json.loads(sys.argv[1]))
    if asked.name not in APART:
        import torch

        torch.set_num_threads(1)
    for what, unit, values in MEASUREMENTS[asked.name](asked):
        print(json.dumps({"quantity": what, "unit": unit, "values": values}), flush=True)
