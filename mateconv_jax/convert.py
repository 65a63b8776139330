"""Export or import a model:

python -m mateconv_jax.convert --from out --to exported                  # a run, for transformers, vLLM, lm_eval …
python -m mateconv_jax.convert --from out --to model.gguf --dtype q8_0   # for llama.cpp
python -m mateconv_jax.convert --from pretrain.pth --to imported --to_kind run --tokenizer DIR
"""

import argparse
import os
import sys

from mateconv_jax.errors import exit_code, program


def main(args):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a training run may be using the GPU's memory
    from mateconv_jax.interop import formats  # the 3 s of imports come after checking the command line

    model = formats.convert(args.source, args.target, args.to_kind, args.dtype, args.ema, args.tokenizer, args.n_heads)
    from_format, to_format = formats.detect_format(args.source, "--from"), formats.detect_format(args.target, "--to")
    print(f"{args.target}: {formats.FORMATS[to_format].description}, converted from {args.source}")
    if "pth" in (from_format, to_format):
        unspecified = [f"{key} {model.config.model[key]}" for key in formats.pytorch.unspecified(model.config.model)]
        print(f"not stored in a .pth file: {', '.join(unspecified)}")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog=program("convert"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--from", type=os.path.expanduser, dest="source", required=True, metavar="MODEL",
        help="a run folder or one of its checkpoints (RUN/best, RUN/checkpoints/STEP), a Hugging Face folder (config.json and "
        "safetensors), a .pth file from PyTorch MateConv or MiniMind, or a .gguf file")  # fmt: skip
    add("--to", type=os.path.expanduser, dest="target", required=True, metavar="PATH",
        help="output, which must not exist: NAME.pth for a PyTorch state dict, NAME.gguf for llama.cpp, any other "
        "name for a folder")  # fmt: skip
    add("--to_kind", choices=("run", "hf", "pth", "gguf"), help="output format (default for folders: run -> hf, hf -> run)")
    add("--dtype", choices=("float32", "float16", "bfloat16", "q8_0"), default="float32", help="dtype of the written weights "
        "(default: float32); q8_0, 8 bits and a scale per 32 weights, only for .gguf files")  # fmt: skip
    add("--ema", action=argparse.BooleanOptionalAction, help="EMA weights or the raw ones (default: EMA if available)")
    add("--tokenizer", type=os.path.expanduser, metavar="DIR",
        help="tokenizer to save with the weights (default: the model's own; a .pth file has none)")  # fmt: skip
    add("--n_heads", type=int, metavar="N", help="number of query heads in a .pth file, which does not store it (default: 16, "
        "as in MateConv, or 8 with the tensor names of MiniMind 2 and later)")  # fmt: skip
    return parser.parse_args(argv)


def command() -> int:
    """Entry point of `mateconv-convert`."""
    return exit_code(lambda: main(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(command())
