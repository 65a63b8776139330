"""Pretrain a small Chinese language model in JAX and talk to it."""

import logging
import os
import sys
from importlib.util import find_spec

# Set before the libraries are imported: XLA logs only errors (the variable is named after TensorFlow), and transformers does
# not warn that PyTorch is missing.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# XLA's CUDA compiler may be installed without the other CUDA libraries, for `plan`. JAX would try to use it as a device and
# print a traceback.
if find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda13"):
    if not any(map(find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if "jax" in sys.modules:  # too late for the environment variable
            sys.modules["jax"].config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
        logging.getLogger("jax_plugins.xla_cuda13").setLevel(logging.ERROR)  # it warns about the missing libraries

__all__ = ["DataProcessor", "GenerationConfig", "TextGenerator"]


def __getattr__(name):
    # Imported on use, so that `python -m mateconv_jax.prepare` does not wait for the model's libraries.
    if name == "DataProcessor":
        from mateconv_jax.data.build.processor import DataProcessor

        return DataProcessor
    if name == "GenerationConfig":
        from mateconv_jax.generation_config import GenerationConfig

        return GenerationConfig
    if name == "TextGenerator":
        from mateconv_jax.inference.text_generator import TextGenerator

        return TextGenerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
