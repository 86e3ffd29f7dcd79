"""PeftMixedModel."""
from torch import nn
class PeftMixedModel(nn.Module):
    pass
