"""Which class of transformers loads a model: a language model, or one that reads images and has one inside."""

from __future__ import annotations

from typing import Any

from data.base.errors import UserError


def model_class(config: Any, name: str) -> Any:
    """Choose the class that loads the model `name` with its head; UserError where there is none for its config."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    # Some that read images (Gemma 3, Llama 4) are in both tables; the first one loads what text alone needs.
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise UserError(
        f"model {name!r} of architecture {config.model_type!r} is none that transformers loads as a language model: "
        "save the language model inside it to a folder of its own and name that folder"
    )
