"""The adapter methods: one file each, one line each."""

from . import beft as beft
from . import c3a as c3a
from . import cartridge as cartridge
from . import cpt as cpt
from . import delora as delora
from . import dora as dora
from . import fourierft as fourierft
from . import glora as glora
from . import gralora as gralora
from . import hira as hira
from . import hra as hra
from . import ia3 as ia3
from . import ln_tuning as ln_tuning
from . import loha as loha
from . import lokr as lokr
from . import lora as lora
from . import miss as miss
from . import multitask_prompt_tuning as multitask_prompt_tuning
from . import oft as oft
from . import p_tuning as p_tuning
from . import prefix_tuning as prefix_tuning
from . import prompt_tuning as prompt_tuning
from . import road as road
from . import shira as shira
from . import trainable_tokens as trainable_tokens
from . import vera as vera
