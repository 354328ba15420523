"""The Hugging Face form of the model; importing it registers the Auto classes.

The three files of SOURCE_FILES travel with an export, which then needs torch and transformers only.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megatron_sharedproj.layers.hf.cache_sharedproj import (
    BLOCK,
    SharedKVLayer,
    SharedKVStaticLayer,
    SharedProjCache,
)
from megatron_sharedproj.layers.hf.configuration_sharedproj import SharedProjConfig
from megatron_sharedproj.layers.hf.modeling_sharedproj import (
    SharedProjForCausalLM,
    SharedProjModel,
    SharedProjPreTrainedModel,
)

SOURCE_FILES: tuple[Path, ...] = tuple(
    Path(__file__).with_name(f"{name}_sharedproj.py") for name in ("configuration", "modeling", "cache")
)


def register() -> None:
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know model_type "sharedproj"; idempotent.

    save_pretrained then also copies SOURCE_FILES beside the weights.
    """
    AutoConfig.register(SharedProjConfig.model_type, SharedProjConfig, exist_ok=True)
    AutoModel.register(SharedProjConfig, SharedProjModel, exist_ok=True)
    AutoModelForCausalLM.register(SharedProjConfig, SharedProjForCausalLM, exist_ok=True)
    SharedProjConfig.register_for_auto_class()
    SharedProjModel.register_for_auto_class("AutoModel")
    SharedProjForCausalLM.register_for_auto_class("AutoModelForCausalLM")


register()

__all__ = [
    "BLOCK",
    "SOURCE_FILES",
    "SharedKVLayer",
    "SharedKVStaticLayer",
    "SharedProjCache",
    "SharedProjConfig",
    "SharedProjForCausalLM",
    "SharedProjModel",
    "SharedProjPreTrainedModel",
    "register",
]
