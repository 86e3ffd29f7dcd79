"""minipeft: every adapter method of Hugging Face PEFT, on plain nn.Modules, from one small theory (adapter.py)."""

from .checkpoint import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from .config import PeftConfig, PeftType, PromptLearningConfig, TaskType, get_peft_config
from .methods.ia3 import IA3Config, IA3Model
from .methods import dora as _dora
from .methods.ln_tuning import LNTuningConfig, LNTuningModel
from .methods.lora import LoraConfig, LoraModel
from .methods.oft import OFTConfig, OFTModel
from .methods.trainable_tokens import TrainableTokensConfig, TrainableTokensModel
from .factory import get_peft_model, inject_adapter_in_model
from .model import PeftModel
from .status import get_layer_status, get_model_status
