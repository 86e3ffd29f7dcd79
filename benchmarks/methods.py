"""The methods that are measured: on a stack of square linear layers, each as small as it is commonly used."""

from typing import Any

LAYERS = 4
TARGETS = [str(i) for i in range(LAYERS)]

METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # method: (its configuration, the fields of it)
    "lora": ("LoraConfig", {"r": 8}),
    "lora+dropout": ("LoraConfig", {"r": 8, "lora_dropout": 0.1}),
    "dora": ("LoraConfig", {"r": 8, "use_dora": True}),
    "bdlora": ("LoraConfig", {"r": 8, "use_bdlora": ("BdLoraConfig", {"target_modules_bd_a": TARGETS, "nblocks": 4})}),
    "kasa": ("LoraConfig", {"r": 8, "kasa_config": ("KasaConfig", {})}),
    "velora": ("LoraConfig", {"r": 8, "velora_config": ("VeloraConfig", {"num_groups": 16})}),
    "monteclora": ("LoraConfig", {"r": 8, "monteclora_config": ("MontecloraConfig", {"num_samples": 4})}),
    "adalora": ("AdaLoraConfig", {"init_r": 12, "total_step": 100}),
    "adamss": ("AdamssConfig", {}),
    "beft": ("BeftConfig", {}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "c3a": ("C3AConfig", {"block_size": 64}),
    "deft": ("DeftConfig", {"r": 8}),
    "delora": ("DeloraConfig", {"r": 8}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 1000}),
    "frod": ("FrodConfig", {}),
    "glora": ("GloraConfig", {}),
    "gralora": ("GraloraConfig", {"r": 32}),
    "hira": ("HiraConfig", {"r": 32}),
    "hra": ("HRAConfig", {"r": 8}),
    "ia3": ("IA3Config", {"feedforward_modules": TARGETS[::2]}),
    "lily": ("LilyConfig", {}),
    "loha": ("LoHaConfig", {"r": 8}),
    "lokr": ("LoKrConfig", {"r": 8}),
    "miss": ("MissConfig", {"r": 64}),
    "bat": ("MissConfig", {"r": 64, "init_weights": "bat"}),
    "oft": ("OFTConfig", {"oft_block_size": 32}),
    "osf": ("OSFConfig", {}),
    "peanut": ("PeanutConfig", {}),
    "psoft": ("PsoftConfig", {"r": 32}),
    "pvera": ("PveraConfig", {"r": 256}),
    "randlora": ("RandLoraConfig", {"r": 32}),
    "road": ("RoadConfig", {}),
    "shira": ("ShiraConfig", {"r": 8}),
    "supertuning": ("SupertuningConfig", {}),
    "tinylora": ("TinyLoraConfig", {}),
    "unilora": ("UniLoraConfig", {}),
    "vblora": ("VBLoRAConfig", {"r": 4}),
    "vera": ("VeraConfig", {"r": 256}),
    "waveft": ("WaveFTConfig", {"n_frequency": 1000}),
}
UNMERGEABLE = {"lily"}  # it depends on the input


def config(library: Any, method: str, **fields: Any) -> Any:
    """The configuration of a method in a library."""
    name, given = METHODS[method]
    made = {
        key: getattr(library, value[0])(**value[1]) if isinstance(value, tuple) else value
        for key, value in given.items()
    }
    return getattr(library, name)(**{"target_modules": TARGETS, **made, **fields})
