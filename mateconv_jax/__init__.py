"""Pretrain a small Chinese language model in JAX and talk to it."""

import os

# Said before the libraries are imported: TensorFlow only writes TensorBoard's files here, and PyTorch is not missing.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__all__ = ["DataProcessor", "GenerationConfig", "TextGenerator"]


def __getattr__(name):
    # Imported when used: `python -m mateconv_jax.prepare` should not wait for the model's libraries.
    if name == "DataProcessor":
        from mateconv_jax.data.processor import DataProcessor

        return DataProcessor
    if name == "GenerationConfig":
        from mateconv_jax.inference.generation_config import GenerationConfig

        return GenerationConfig
    if name == "TextGenerator":
        from mateconv_jax.inference.text_generator import TextGenerator

        return TextGenerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
