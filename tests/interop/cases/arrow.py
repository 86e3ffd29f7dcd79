"""Arrow: a router among LoRA adapters that are there already; what it does is in test_arrow.py."""

from .. import bases as B
from .case import Refused

CASES = []


def refused(id, base, **given):
    return Refused(f"arrow/refused/{id}", "LoraConfig", {"arrow_config": {}, **given}, base, "inject", "ValueError")


REFUSED = [
    refused("dora", B.MLP, target_modules=["wide"], use_dora=True),
    refused("kasa", B.MLP, target_modules=["wide"], kasa_config={}),
    refused("conv2d", B.CONV2D, target_modules=["first"]),
    refused("embedding", B.EMBEDDING, target_modules=["emb"]),
    refused("top_k", B.MLP, target_modules=["wide"], arrow_config={"top_k": 0}),
    refused("temperature", B.MLP, target_modules=["wide"], arrow_config={"router_temperature": 0.0}),
]
