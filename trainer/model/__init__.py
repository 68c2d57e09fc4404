"""The one model: trained, evaluated, exported and served as the same transformers class.

Importing this package makes `transformers.AutoModelForCausalLM` know it.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from trainer.model.balance import expert_counts, expert_loads, forget_loads, rebalance
from trainer.model.build import build_model, config_of
from trainer.model.configuration_evolm import EvolmConfig
from trainer.model.modeling_evolm import EvolmForCausalLM, EvolmModel, Head

AutoConfig.register(EvolmConfig.model_type, EvolmConfig, exist_ok=True)
AutoModel.register(EvolmConfig, EvolmModel, exist_ok=True)
AutoModelForCausalLM.register(EvolmConfig, EvolmForCausalLM, exist_ok=True)

__all__ = [
    "EvolmConfig",
    "EvolmForCausalLM",
    "EvolmModel",
    "Head",
    "build_model",
    "config_of",
    "expert_counts",
    "expert_loads",
    "forget_loads",
    "rebalance",
]
