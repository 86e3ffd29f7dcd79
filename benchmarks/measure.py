"""One measurement of one library in this process: `python -m benchmarks.measure NAME LIBRARY DEVICE` prints JSON.

A measurement is a function of the library and the device. It returns what it measured as {quantity: value}, in seconds
or in MiB by the quantity's name, already the median of a few repeats after a warm-up.
"""

import gc
import importlib
import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MEASUREMENTS = {}
ADAPTERS = 50  # for set_adapter
MIXED = (4, 16, 64)  # adapters in one batch
PASSES = {"forward": 41, "forward+backward": 15}  # how often each is timed; what a forward pass adds is little
METHODS: dict[str, tuple[str, dict]] = {  # method: (config class, its arguments), as small as each is commonly used
    "lora": ("LoraConfig", {"r": 8}),
    "dora": ("LoraConfig", {"r": 8, "use_dora": True}),
    "oft": ("OFTConfig", {"oft_block_size": 32}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "vera": ("VeraConfig", {"r": 64}),
}


@dataclass(frozen=True)
class Size:
    """What a device is given to do."""

    layers: int  # of the stack that is run, trained and merged
    width: int
    inner: int
    batch: int
    time: int
    train: int  # the batch of the step whose memory is taken


SIZES = {"cpu": Size(4, 512, 1408, 2, 64, 32), "cuda": Size(16, 2048, 5632, 8, 512, 8)}
WIDE = {"layers": 32, "width": 4096, "inner": 11008}  # a 7B model
DEEP = {"layers": 24, "width": 256, "inner": 704}  # 168 linear layers


def measurement(function):
    MEASUREMENTS[function.__name__] = function
    return function


def resident(peak: bool = False) -> float:
    """This process' memory in MiB, now or at its peak."""
    status = Path("/proc/self/status")
    if status.exists():
        field = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) for line in status.open() if line.startswith(field)) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit  # only the peak is known here


def forget_peak():
    """Start the peak again from what is resident now, where the system can (Linux)."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")


@measurement
def imports(library, device):
    """Import, from a bare interpreter, as far as LoRA needs it: minipeft imports names when they are asked for."""
    before, start = resident(), time.perf_counter()
    module = importlib.import_module(library)
    if library != "torch":
        module.LoraConfig, module.get_peft_model, module.PeftModel  # noqa: B018
    return {"import seconds": time.perf_counter() - start, "import MiB": resident() - before}


def seconds(device, function, *arguments):
    """Seconds of one call, its work on the device included."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else tuple
    wait()
    start = time.perf_counter()
    function(*arguments)
    wait()
    return time.perf_counter() - start


def clock(device, function, repeats=5, setup=tuple):
    """Median seconds of function(*setup()) after one warm-up."""
    return statistics.median([seconds(device, function, *setup()) for _ in range(repeats + 1)][1:])


def config(library, method="lora", **more):
    from .llama import LINEARS

    name, arguments = METHODS[method]
    return getattr(library, name)(target_modules=LINEARS, **arguments, **more)


def adapted(library, base, method="lora"):
    return library.get_peft_model(base, config(library, method))


def deep(device):
    from .llama import stack

    return stack(**DEEP, device=device)


def sized(device):
    from .llama import stack

    size = SIZES[device]
    return stack(size.layers, size.width, size.inner, device)


def inputs(device, batch):
    import torch

    size = SIZES[device]
    return torch.randn(batch, size.time, size.width, generator=torch.Generator().manual_seed(1)).to(device)


@measurement
def inject(library, device):
    """LoRA into 168 linear layers."""
    return {"inject seconds": clock(device, lambda base: adapted(library, base), setup=lambda: (deep(device),))}


@measurement
def inject_meta(library, device):
    """LoRA into the 224 linear layers of a 7B shape, on the meta device."""
    from .llama import stack

    work = clock("meta", lambda base: adapted(library, base), setup=lambda: (stack(**WIDE, device="meta"),))
    return {"inject 7B meta seconds": work}


@measurement
def checkpoint(library, device):
    """save_pretrained, and from_pretrained onto a fresh base model."""
    model, from_pretrained = adapted(library, deep(device)), library.PeftModel.from_pretrained
    with tempfile.TemporaryDirectory() as folder:
        save = clock(device, lambda: model.save_pretrained(folder))
        load = clock(device, lambda base: from_pretrained(base, folder), setup=lambda: (deep(device),))
    return {"save_pretrained seconds": save, "from_pretrained seconds": load}


@measurement
def set_adapter(library, device):
    """Switch between 50 adapters on 168 linear layers."""
    model = adapted(library, deep(device))
    for i in range(1, ADAPTERS):
        model.add_adapter(f"adapter{i}", config(library))
    turn = iter(range(1, ADAPTERS))
    return {"set_adapter seconds": clock(device, lambda: model.set_adapter(f"adapter{next(turn)}"), repeats=9)}


@measurement
def mixed(library, device):
    """Forward of a batch whose samples all take one LoRA adapter, and of one where they take turns among several."""
    import torch

    x, model = inputs(device, MIXED[-1])[:, :4], adapted(library, sized(device))
    for i in range(1, MIXED[-1]):
        model.add_adapter(f"adapter{i}", config(library))
    names = ["default", *(f"adapter{i}" for i in range(1, MIXED[-1]))]
    model.eval()

    def forward(adapter_names=None):
        with torch.no_grad():
            model(x, adapter_names=adapter_names)

    taken = {"batch with one adapter seconds": clock(device, forward)}
    for n in MIXED:
        turns = [names[i % n] for i in range(len(x))]
        taken[f"batch with {n} adapters seconds"] = clock(device, forward, setup=lambda turns=turns: (turns,))
    return taken


@measurement
def merge(library, device):
    """merge_and_unload of LoRA."""
    work = clock(device, lambda model: model.merge_and_unload(), setup=lambda: (adapted(library, sized(device)),))
    return {"merge_and_unload seconds": work}


def overhead(method):
    def run(library, device):
        import torch

        x, base = inputs(device, SIZES[device].batch), sized(device)
        model = adapted(library, sized(device), method)

        def forward(module):
            with torch.no_grad():
                module(x)

        def train(module):
            module(x).square().mean().backward()
            module.zero_grad()

        # The bare base model trains on an input that wants a gradient, so that both walk back through every layer.
        x.requires_grad_()
        base.requires_grad_(False)
        added = {}
        for name, work in (("forward", forward), ("forward+backward", train)):
            pairs = [(seconds(device, work, base), seconds(device, work, model)) for _ in range(PASSES[name] + 2)]
            added[f"{method} {name} added seconds"] = statistics.median(b - a for a, b in pairs[2:])
        return added

    run.__doc__ = f"{method}: time of a pass less that of the bare base model."
    return run


for _method in METHODS:
    MEASUREMENTS[f"pass_{_method}"] = overhead(_method)


@measurement
def memory(library, device):
    """Peak memory of one training step of LoRA with AdamW, over what the adapted model itself takes."""
    import torch

    x, model = inputs(device, SIZES[device].train), adapted(library, sized(device))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    def step(x):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(x[:1, :1])  # what is loaded once, and AdamW's state
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        at_rest = torch.cuda.memory_allocated()
        step(x)
        return {"training step peak MiB": (torch.cuda.max_memory_allocated() - at_rest) / 2**20}
    before = resident()
    forget_peak()
    step(x)
    return {"training step peak MiB": resident(peak=True) - before}


if __name__ == "__main__":
    name, library, device = sys.argv[1:]
    measured = MEASUREMENTS[name](library if name == "imports" else importlib.import_module(library), device)
    print(json.dumps(measured))
