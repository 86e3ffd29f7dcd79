"""A vision transformer: its attention, its convolution over patches, and the head that is trained in full."""

from .. import bases as B
from .case import rows

HEAD = {"modules_to_save": ["classifier"], "second": None}  # one adapter at a time trains the head
ATTENTION = ["q_proj", "v_proj"]

lora = rows("lora", "LoraConfig", r=4, lora_alpha=6, **HEAD)

fourier = rows("fourierft", "FourierFTConfig", n_frequency=12, tolerance=2e-6, fresh=False, own_buffers=True, **HEAD)

CASES = [
    lora("vit/head", B.VIT, target_modules=ATTENTION),
    lora("vit/patches", B.VIT, target_modules=["projection", "fc1", "fc2"], r=2),
    lora("vit/all_linear", B.VIT, target_modules="all-linear"),
    rows("dora", "LoraConfig", use_dora=True, r=4, **HEAD)("vit/head", B.VIT, target_modules=[*ATTENTION, "projection"]),
    rows("loha", "LoHaConfig", r=3, fresh=True, **HEAD)("vit/head", B.VIT, target_modules=[*ATTENTION, "projection"]),
    rows("boft", "BOFTConfig", boft_block_size=4, own_buffers=True, **HEAD)("vit/head", B.VIT, target_modules=ATTENTION),
    rows("ia3", "IA3Config", **HEAD)("vit/head", B.VIT, target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
    fourier("vit/head", B.VIT, target_modules=ATTENTION),
]
