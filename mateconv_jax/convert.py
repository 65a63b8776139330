"""Take a model elsewhere, or bring one in:

python -m mateconv_jax.convert --from out --to exported           # a run folder, for transformers, vLLM, lm_eval …
python -m mateconv_jax.convert --from out --to model.gguf --dtype q8_0   # for llama.cpp
python -m mateconv_jax.convert --from pretrain.pth --to imported --to_kind run --tokenizer DIR
"""

import argparse
import os
import sys

from mateconv_jax.errors import exit_code, program


def main(args):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a training may have the GPU's memory
    from mateconv_jax.interop import formats  # 3 s of imports from here on, after the command line is right

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
    add("--from", dest="source", required=True, metavar="MODEL", help="a run folder, a Hugging Face folder (config.json and "
        "safetensors), a .pth file of PyTorch MateConv or MiniMind, or a .gguf file")  # fmt: skip
    add("--to", dest="target", required=True, metavar="PATH", help="what to write; it must not exist. NAME.pth: a state dict; "
        "NAME.gguf: llama.cpp's; else a folder")  # fmt: skip
    add("--to_kind", choices=("run", "hf", "pth", "gguf"), help="of what (default: of a folder, hf from a run, run from hf)")
    add("--dtype", choices=("float32", "float16", "bfloat16", "q8_0"), default="float32", help="of the weights written; q8_0, "
        "8 bits and a scale for 32 of them, is a .gguf file's (default: float32)")  # fmt: skip
    add("--ema", action=argparse.BooleanOptionalAction, help="EMA weights (default: where there are some)")
    add("--tokenizer", metavar="DIR", help="the tokenizer to put beside the weights (default: the model's own; a .pth file "
        "has none)")  # fmt: skip
    add("--n_heads", type=int, metavar="N", help="query heads of a .pth file, which does not say it (default: 16, as MateConv "
        "has; 8 where the names are those of MiniMind from version 2 on)")  # fmt: skip
    return parser.parse_args(argv)


def command() -> int:
    """What `mateconv-convert` runs."""
    return exit_code(main, parse_args(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(command())
