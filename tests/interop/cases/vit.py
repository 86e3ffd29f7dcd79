"""A vision transformer: its attention, its convolution over patches, and the head that is trained in full."""

from .. import bases as B
from .case import rows

HEAD = {"modules_to_save": ["classifier"], "second": None}  # one adapter at a time trains the head
ATTENTION = ["q_proj", "v_proj"]

lora = rows("lora", "LoraConfig", r=4, lora_alpha=6, **HEAD)

dora = rows("dora", "LoraConfig", use_dora=True, r=4, **HEAD)
loha = rows("loha", "LoHaConfig", r=3, **HEAD)
boft = rows("boft", "BOFTConfig", boft_block_size=4, own_buffers=True, **HEAD)
ia3 = rows("ia3", "IA3Config", **HEAD)
fourier = rows("fourierft", "FourierFTConfig", n_frequency=12, tolerance=2e-6, fresh=False, own_buffers=True, **HEAD)

CASES = [
    lora("vit/head", B.VIT, target_modules=ATTENTION),
    lora("vit/patches", B.VIT, target_modules=["projection", "fc1", "fc2"], r=2),
    lora("vit/all_linear", B.VIT, target_modules="all-linear"),
    dora("vit/head", B.VIT, target_modules=[*ATTENTION, "projection"]),
    loha("vit/head", B.VIT, target_modules=[*ATTENTION, "projection"]),
    boft("vit/head", B.VIT, target_modules=ATTENTION),
    ia3("vit/head", B.VIT, target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
    fourier("vit/head", B.VIT, target_modules=ATTENTION),
]
