"""The log line of a step: what people watch, aligned, with units. Everything else is in metrics.jsonl and TensorBoard."""

from collections.abc import Mapping


def step_line(step: int, total_steps: int, scalars: Mapping[str, float]) -> str:
    """A step, `step 340/500  loss 0.7301  lr 1.07e-3  grad 0.24  7.0k tok/s  eta 1:02`, or an evaluation,
    `step 340/500  val/loss 0.8127  ema 0.8011  1.204 bits/byte`. Numbers that `scalars` lacks are left out; preferences have
    `margin  0.214  accuracy  71.9%` behind the loss, answers `reward 0.4120  length 8.1`, named validation sets
    `wiki 0.8127  code 1.2031`, benchmark questions `ceval  26.4%`.
    """
    fields = [f"step {step:{len(str(total_steps))}}/{total_steps}"]
    for name, text in (("train/loss", "loss {}"), ("val/loss", "val/loss {}"), ("val/ema_loss", "ema {}")):
        if name in scalars:
            fields.append(text.format(_fixed(scalars[name], 6)))
    for name in ("dpo/margin", "val/margin"):
        if name in scalars:
            fields.append(f"margin {scalars[name]:6.3f}")
    for name in ("dpo/accuracy", "val/accuracy"):
        if name in scalars:
            fields.append(f"accuracy {scalars[name]:6.1%}")
    for name in ("grpo/reward", "val/reward"):
        if name in scalars:
            fields.append(f"reward {_fixed(scalars[name], 6)}")
    if "grpo/length" in scalars:
        fields.append(f"length {_fixed(scalars['grpo/length'], 4)}")
    if "val/bits_per_byte" in scalars:
        fields.append(f"{scalars['val/bits_per_byte']:.3f} bits/byte")
    for name in scalars:
        if name.startswith("val/") and name.count("/") == 2 and name.endswith("/loss"):
            fields.append(f"{name.split('/')[1]} {_fixed(scalars[name], 6)}")
    for name in scalars:  # the first number of a task is the one that counts
        if name.startswith("tasks/") and not name.endswith(("_macro", "_norm", "_bytes", "/perplexity", "/chance")):
            fields.append(f"{name.split('/')[1]} {scalars[name]:6.1%}")
    if "lr" in scalars:
        fields.append(f"lr {_scientific(scalars['lr']):>7}")
    if "grad_norm" in scalars:
        fields.append(f"grad {_fixed(scalars['grad_norm'], 4)}")
    if "tokens/s" in scalars:
        fields.append(f"{_short(scalars['tokens/s']):>4} tok/s")
        fields.append(f"eta {_duration((total_steps - step) * scalars['step_time_s'])}")
    return "  ".join(fields)


def _fixed(value: float, width: int) -> str:
    """As many decimals as fit `width`: 0.7301, 10.433, 217.28 in six characters. Large numbers exceed it."""
    for decimals in range(width - 2, 0, -1):
        if len(text := f"{value:{width}.{decimals}f}") <= width:
            return text
    return f"{value:{width}.0f}"


def _scientific(value: float) -> str:
    """1.07e-3, not Python's 1.07e-03."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _short(value: float) -> str:
    """At most four characters: 850, 7.0k, 70k, 1.2M."""
    for unit in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.1f}{unit}" if unit and value < 9.95 else f"{value:.0f}{unit}"
        value /= 1000
    return f"{value:.1f}G"


def _duration(seconds: float) -> str:
    """1:02 or 26:03:09."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
