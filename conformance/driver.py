"""The protocol between the suite and an implementation.

A driver holds one model at a time. Every array that crosses the border is a NumPy array; floating point values travel
as float64 or float32, whatever dtype the model computes in, so bfloat16 needs no NumPy type. Tensor names are those
of the base model (`up.weight`) and PEFT's saved keys (`base_model.model.up.lora_A.weight`).

A method that a driver does not override raises `Unsupported`, which is reported as such and never as a failure.
"""

from __future__ import annotations

import contextlib
import signal
import threading

START = 60.0  # seconds that an implementation has at least, until it says what it is


class Hung(Exception):
    """A check took too long."""


class Unsupported(Exception):
    """The implementation does not claim to do this; the message says why."""


class Rejected(Exception):
    """The implementation refused its input on purpose, with a clear error. A crash is anything else."""


class Driver:
    """Base class of all drivers; each method is one operation of the protocol."""

    def info(self) -> dict:
        """`{"name", "version", "dtypes": [...]}`; `dtypes` out of float64, float32, bfloat16, float16."""
        raise NotImplementedError

    def build(self, base: dict, weights: dict, config: dict | None, dtype: str, case: str = "", seed: int = 0) -> None:
        """Make the base model of the description `base`, give it `weights`, adapt it by `config` as "default".

        The model is in evaluation mode. `config` None leaves the bare base model.
        """
        raise Unsupported("build")

    def full_config(self, config: dict) -> dict:
        """All that `adapter_config.json` would hold for a config, defaults filled in; there is no model."""
        raise Unsupported("configs without a model")

    def read_config(self, path: str, given: dict) -> dict:
        """As `full_config`, of the config in a folder; `given`: what is said beside it, which the file overrules."""
        raise Unsupported("configs of a folder without a model")

    def config_of(self, name: str | None = None) -> dict:
        """All that the model holds now as an adapter's config; None: that of the active one."""
        raise Unsupported("tell the config of an adapter")

    def build_from_data(self, base: dict, weights: dict, config: dict, dtype: str, data: dict, case: str = "",
                        seed: int = 0, batches: int = 1) -> None:
        """As `build`, for a config whose adapter begins by what layers see: the model is run on `data`, its inputs, in
        so many batches of one size, in their order.

        With a cotangent among `data`, the gradients of sum(cotangent * output) are what it begins by.
        """
        raise Unsupported("adapters that begin by data")

    def add(self, name: str, config: dict) -> None:
        """Add a second adapter; the active one stays."""
        raise Unsupported("more than one adapter")

    def delete(self, name: str) -> None:
        raise Unsupported("delete an adapter")

    def load(self, tensors: dict, name: str = "default") -> None:
        """Set an adapter's tensors, given under PEFT's saved keys."""
        raise Unsupported("load")

    def forward(self, inputs: dict, adapter_names: list | None = None):
        """The model's output; `adapter_names` names one adapter for each sample."""
        raise Unsupported("forward")

    def assign(self, tensors: dict) -> None:
        """Set parameters by their live names, where a checkpoint holds only what is computed from them."""
        raise Unsupported("set parameters by their live names")

    def live_gradients(self, inputs: dict, cotangent) -> dict:
        """As `gradients`, of the trained parameters by their live names."""
        raise Unsupported("gradients by live names")

    def gradients(self, inputs: dict, cotangent) -> dict:
        """d(sum(cotangent * output)) / d(tensor), by saved key; `input` for a floating point input."""
        raise Unsupported("gradients")

    def state_dict(self, name: str = "default") -> dict:
        """What a checkpoint of the adapter holds, by saved key."""
        raise Unsupported("state dict")

    def names(self) -> dict:
        """Live parameter name -> is it trainable, for the whole adapted model."""
        raise Unsupported("live parameter names")

    def held(self) -> list:
        """Live names of all that the adapted model holds: parameters and buffers."""
        raise Unsupported("live names of buffers")

    def count(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters."""
        raise Unsupported("parameter counts")

    def weights(self) -> dict:
        """The base model's parameters as they are now, under the base model's own names."""
        raise Unsupported("read base weights")

    def merge(self, names: list | None = None) -> None:
        raise Unsupported("merge")

    def unmerge(self) -> None:
        raise Unsupported("unmerge")

    def unload(self, merge: bool, names: list | None = None) -> None:
        """Take the adapters off for good, those that are active, or named, merged or not; afterwards the model is the
        bare base model."""
        raise Unsupported("unload")

    def switch(self, names: list, for_use: bool = False) -> None:
        """Make these adapters the active ones, in this order; `for_use`: nothing of them is trained."""
        raise Unsupported("switch adapters")

    def disable(self, off: bool) -> None:
        """Run without adapters while `off`. It nests: what was disabled twice is enabled twice."""
        raise Unsupported("disable adapters")

    def switch_off(self, off: bool) -> None:
        """Adapters are off until they are switched on again, whatever `disable` does meanwhile: PEFT's
        `disable_adapter_layers` and `enable_adapter_layers`."""
        raise Unsupported("switch adapters off")

    def active(self) -> list:
        """The names of the active adapters, in their order."""
        raise Unsupported("tell the active adapters")

    def status(self) -> dict:
        """What the library tells of its adapters: {"layers": {path: what}, "model": what}, with PEFT's names of
        `get_layer_status` and `get_model_status`."""
        raise Unsupported("tell of each layer")

    def train(self, on: bool) -> None:
        """Training mode, in which dropout acts, or evaluation mode, as after `build`. The mode stays until it is set
        again, whatever is added, switched or deleted."""
        raise Unsupported("training mode")

    def in_training(self) -> bool:
        """Is the model in training mode?"""
        raise Unsupported("tell the mode")

    def require_grad(self, names: list, on: bool) -> None:
        """Train these adapters, active or not, or train them no longer: PEFT's `set_requires_grad`."""
        raise Unsupported("choose what is trained by name")

    def step(self, inputs: dict, cotangent, rate: float) -> None:
        """One step of plain gradient descent on sum(cotangent * output), over all that is trained."""
        raise Unsupported("a step of training")

    def optimise(self, kind: str, options: dict, inputs: dict, cotangent, steps: int) -> None:
        """Steps on sum(cotangent * output) by an optimizer of LoRA's own: `kind` is loraplus or riemannian, both over
        plain gradient descent, or lorafa; `options` as of PEFT's function that makes it."""
        raise Unsupported("optimizers of LoRA's own")

    def reduce_intruders(self, options: dict) -> None:
        """Make an adapter of "default" with weaker intruder dimensions, and switch to it: PEFT's
        `reduce_intruder_dimension`."""
        raise Unsupported("intruder dimensions")

    def prepare_hotswap(self, rank: int) -> None:
        """Give all LoRA adapters this rank, filled up with zeros: PEFT's `prepare_model_for_compiled_hotswap`."""
        raise Unsupported("make the ranks of adapters equal")

    def base_state(self) -> dict:
        """The frozen base model's tensors under its own names, while an adapter is on it: PEFT's
        `get_base_model_state_dict`."""
        raise Unsupported("read the base model's state under an adapter")

    def set_base_state(self, tensors: dict) -> None:
        """The opposite of `base_state`, all of them at once: PEFT's `set_base_model_state_dict`."""
        raise Unsupported("set the base model's state under an adapter")

    def auto(self, kind: str, config: dict, words: int = 0) -> dict:
        """Save a small base model of transformers and an adapter of it, and load both by PEFT's `AutoPeftModel<kind>`,
        the adapter's folder being all that is given: the output on the same input `before` and `after`, the class
        of the model that was loaded (`task`), what is trained of it (`trained`), once more with is_trainable
        (`trainable`), and the `rows` of its embedding. `words`: beside the adapter lies a tokenizer of so many."""
        raise Unsupported("load the base model with its adapter")

    def adapted_like(self, base: dict, weights: dict, config: dict, tensors: dict, case: str = "") -> list:
        """The names, without PEFT's prefix, of the tensors of an adapter that is put into the bare base model where the
        names of `tensors` say: PEFT's `inject_adapter_in_model` with a `state_dict`."""
        raise Unsupported("put an adapter where a state dict says")

    def allocate(self, step: int) -> None:
        """AdaLoRA's allocator, after training step number `step` and with that step's gradients."""
        raise Unsupported("AdaLoRA's allocator")

    def scale(self, factor: float) -> None:
        """Multiply the strength of the active adapters."""
        raise Unsupported("scale adapters")

    def penalty(self) -> float:
        """The further term that the method wants added to the loss, as it is now."""
        raise Unsupported("further terms of the loss")

    def copy(self) -> None:
        """Go on with a deep copy of the model; the original is dropped."""
        raise Unsupported("deep copy")

    def save(self, path: str) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into the folder `path`, made where need be."""
        raise Unsupported("save")

    def save_converted(self, path: str, begun: str) -> None:
        """Save the adapter, which changed the base weights when it was made, as one for the weights as they were.

        That is a plain LoRA adapter of twice the rank. `begun`: the folder where it was saved as it began.
        """
        raise Unsupported("save an adapter as one for the unchanged base model")

    def save_as_lora(self, path: str, rank: float, name: str = "default") -> None:
        """Save an adapter as one of LoRA, of this rank, or of the fewest ranks that hold this share of its squares."""
        raise Unsupported("save an adapter as one of LoRA")

    def save_with(self, path: str, options: dict) -> None:
        """As `save`, with PEFT's own options of saving: `save_embedding_layers`, `safe_serialization`. Beside the files
        lies README.md, the model card."""
        raise Unsupported("options of saving")

    def save_given(self, path: str, factor: float) -> None:
        """Save not what the model holds but PEFT's `state_dict=`: all that is trained, `factor` times as large."""
        raise Unsupported("save another state than the model's")

    def hotswap(self, path: str, name: str) -> None:
        """Put the adapter saved in `path` in the place of the one called `name`, which keeps its name."""
        raise Unsupported("put an adapter in the place of another")

    def add_with(self, name: str, config: dict, options: dict) -> None:
        """As `add`, with PEFT's own options; what was added keeps the dtype that it got."""
        raise Unsupported("options of adding an adapter")

    def save_adapters(self, path: str, names: list | None = None) -> None:
        """Save these adapters, or all: "default" into the folder `path`, any other into the folder `path`/<name>."""
        raise Unsupported("save several adapters")

    def load_adapter(self, path: str, name: str) -> None:
        """Put the adapter saved in `path` on the model as `name`, for use; the active one stays."""
        raise Unsupported("load a saved adapter beside others")

    def load_adapter_with(self, path: str, name: str, options: dict):
        """As `load_adapter`, with PEFT's own options of loading; the model is in whatever mode PEFT leaves it in. Where
        the library tells them, the keys that the file lacked and those it had too many: {"missing", "unexpected"}."""
        raise Unsupported("options of loading an adapter beside others")

    def restore(self, path: str, base: dict, weights: dict, dtype: str) -> None:
        """Build the base model anew and put the saved adapter on it."""
        raise Unsupported("load a saved adapter")

    def build_with(self, base: dict, weights: dict, config: dict, dtype: str, options: dict, case: str = "") -> None:
        """As `build`, with PEFT's own options of putting an adapter on, such as `autocast_adapter_dtype`.

        What was put on keeps the dtype that it got. With `mixed`, a model that takes adapters of several methods.
        """
        raise Unsupported("options of putting an adapter on")

    def restore_with(self, path: str, base: dict, weights: dict, dtype: str, options: dict) -> None:
        """As `restore`, with PEFT's own options of loading: `is_trainable`, `low_cpu_mem_usage`,
        `autocast_adapter_dtype`, `subfolder`, `adapter_name`, `key_mapping`, and `config`, as a dictionary. With
        `mixed`, a model that takes adapters of several methods."""
        raise Unsupported("options of loading")

    def set_routing(self, options: dict) -> None:
        """Change X-LoRA's `top_k_lora`, `global_scaling_weight` or `scaling_pass_value`; None as the last of these is
        one by the number of adapters."""
        raise Unsupported("change how adapters are weighed")

    def log_routing(self, inputs: dict, runs: int):
        """What X-LoRA's classifier gave in so many runs on these inputs, as its log tells it, and nothing of the runs
        before or after: (runs, batch, tokens, layers, adapters)."""
        raise Unsupported("tell how adapters were weighed")

    def best_conditioned(self, base: dict, weights: dict, options: dict) -> dict:
        """KappaTune: which layers of the base model to adapt, {"target_modules": [...], "target_parameters": ...};
        `options` as of PEFT's `find_kappa_target_modules`."""
        raise Unsupported("choose layers by their condition")

    def restore_routed(self, paths: list, general: list, base: dict, weights: dict, options: dict) -> None:
        """Build the base model anew, and on it Arrow over the LoRA adapters saved in `paths`.

        `general`: those of general knowledge; `options`: the fields of PEFT's `ArrowConfig`.
        """
        raise Unsupported("route between adapters")

    def compose(self, paths: list, path: str) -> None:
        """Save into `path` one cartridge of those saved in `paths`, one after the other."""
        raise Unsupported("compose cartridges")

    def begin_as(self, cache: dict) -> None:
        """Begin the prompt, one of keys and values, as a cache: "<layer>.keys" and "<layer>.values", (1, heads, tokens,
        width of a head), which may have more tokens than the prompt."""
        raise Unsupported("begin a prompt as a cache")

    def casting(self, on: bool) -> None:
        """Bring a layer's input into the adapter's dtype, as ever, or leave it as it is: PEFT's
        `disable_input_dtype_casting`, which nests as `disable` does."""
        raise Unsupported("leave inputs in their dtype")

    def cast_mixed(self, dtype: str) -> None:
        """Bring what is trained to float32 and the rest to `dtype`: PEFT's `cast_mixed_precision_params`."""
        raise Unsupported("cast what is trained and what is not")

    def dtypes(self) -> dict:
        """Live parameter name -> the dtype that it has."""
        raise Unsupported("tell the dtypes of parameters")

    def safe_merge(self, names: list | None = None) -> None:
        """Merge, but refuse an adapter that would make a weight infinite or NaN."""
        raise Unsupported("merge and look for what is not finite")

    def set_scale(self, name: str, factor: float) -> None:
        """Make an adapter `factor` times as strong as its config says."""
        raise Unsupported("set an adapter's scale")

    def unscale(self, factor: float | None = None) -> None:
        """Divide the strength of the active adapters; None: what their configs say."""
        raise Unsupported("divide the scale of adapters")

    def rescale(self, factor: float | None, by_error: bool = False) -> None:
        """Make all LoRA adapters `factor` times as strong until it is called with None: PEFT's
        `rescale_adapter_scale`. `by_error`: it ends because what was done meanwhile failed."""
        raise Unsupported("rescale adapters for a while")

    def combine(self, names: list, weights: list, new: str, options: dict) -> None:
        """Make the adapter `new` of others; `options` as of PEFT's `add_weighted_adapter`. The active ones stay."""
        raise Unsupported("make an adapter of others")

    def generate(self, inputs: dict, count: int, names: list | None = None, beams: int = 1):
        """The ids of the input, and `count` more, each the likeliest next one; `names`: one adapter for each sample."""
        raise Unsupported("generate")

    def build_quantised(self, base: dict, weights: dict, config: dict | None, kind: str, case: str = "") -> None:
        """As `build` in float32, on linear layers that are stored in 4 bits: `kind` is nf4 or fp4, of bitsandbytes."""
        raise Unsupported("quantised layers")

    def close(self) -> None:
        """Let go of everything."""

    def _passes(self, task: str) -> str | None:
        """For a driver in a process that can run whole checks: "" if the check of this id passes there, else what is
        wrong. None: checks are run from here, operation by operation."""
        return None

    @contextlib.contextmanager
    def _within(self, seconds: float):
        """While it is open, whatever takes longer than `seconds` ends in `Hung`, as far as a signal can stop it."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
            yield
            return

        def ring(*_):
            raise Hung(f"no answer within {seconds:g} s")

        old = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)


OPERATIONS = tuple(k for k, v in vars(Driver).items() if callable(v) and not k.startswith("_"))
