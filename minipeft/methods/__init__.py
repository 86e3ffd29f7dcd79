"""The adapter methods: one file each, one line each."""

from . import ia3 as ia3
from . import lora as lora
