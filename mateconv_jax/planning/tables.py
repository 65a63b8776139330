"""Print a plan as tables."""

from rich.console import Console
from rich.table import Table

from mateconv_jax.planning.roofline import LAUNCH


def print_plan(plan: dict, console: Console) -> None:
    training = plan["training"]
    console.print(
        f"[bold]{plan['devices']} x {plan['device']}[/] on {plan['hosts']} host(s): {plan['parameters']:,} parameters, "
        f"{plan['dtype']}, {plan['attention']} attention; {plan['rows_per_device']} rows per device, "
        f"{plan['tokens_per_step']:,} tokens per step"
    )
    for reason in plan["passed_over"]:
        console.print(f"auto did not choose {reason}")
    console.print(_memory(training))
    if "largest_rows_per_device" in plan:
        rows = plan["largest_rows_per_device"]
        console.print(
            f"largest batch that fits: {rows['none'] or 'no'} rows per device ({_times(rows['none'], plan)}), with full remat "
            f"{rows['full'] or 'none'} ({_times(rows['full'], plan)})"
        )
    console.print(_work(training))
    if training["collectives"]:
        console.print(_collectives(training))
    if "roofline" in training:
        console.print(_time(plan))
    if "expected" in training:
        console.print(_expected(training))
    if "expected_from" in plan:
        console.print(source_in_words(plan["expected_from"], training.get("expected")))
    for decoding in plan.get("decoding", []):
        console.print(_decoding(decoding))
    if "measured" in plan:
        measured = plan["measured"]
        mfu = f", MFU {measured['mfu']:.1%}" if "mfu" in measured else ""
        console.print(f"measured: {measured['seconds'] * 1e3:,.2f} ms/step, {measured['tokens_per_second']:,.0f} tokens/s{mfu}")
    if "reference" in plan:
        console.print(_reference(plan["reference"]))
    if "rollout" in plan:
        console.print(_rollout(plan["rollout"]))
    console.print(_run(plan))
    if plan["unknown"]:
        console.print("\nUnknown without running it:")
        for sentence in plan["unknown"]:
            console.print(f"- {sentence}")


def _run(plan: dict) -> str:
    """In words."""
    run = plan["run"]
    if "hours" not in run:
        return f"run: {run['length_from']}"

    def cost(prefix: str = "") -> str:
        dollars = f", {run[prefix + 'dollars']:,.2f} dollars" if prefix + "dollars" in run else ""
        return f"{run[prefix + 'hours']:,.2f} hours, {run[prefix + 'gpu_hours']:,.2f} GPU hours{dollars}"

    at_best = "" if "measured" in plan else " at best"
    expected = f"; expected {cost('expected_')}" if "expected_hours" in run else ""
    return f"run: {run['steps']:,} steps ({run['length_from']}), {run['tokens']:,} tokens: {cost()}{at_best}{expected}"


def source_in_words(source: str, expected: dict | None) -> str:
    """In words."""
    if expected is None:
        return source
    error = expected["error"]
    off = "" if error is None else f"; each predicted from the others, they are off by {error:.1%} (root mean square)"
    return f"expected from {source}{off}"


def _reference(reference: dict) -> str:
    """In words."""
    per_batch, seconds = reference["seconds_per_batch"], reference["seconds"]
    pairs = f"{reference['pairs']:,} pairs" if reference["pairs"] else "pairs"
    took = f", {per_batch * 1e3:,.2f} ms a batch" if per_batch else ""
    in_all = f", {seconds:,.1f} seconds" if seconds else ""
    return f"reference: {pairs} scored once before the first step{took}{in_all}; {reference['memory']['peak'] / 1e9:,.3f} GB"


def _rollout(rollout: dict) -> str:
    """In words."""
    memory, parts = rollout["memory"], rollout["memory"]["parts"]
    gb = ", ".join(f"{part} {size / 1e9:,.3f}" for part, size in parts.items() if size)
    seconds = rollout["seconds_per_step"]
    expected = rollout["expected_seconds_per_step"]
    likely = f", expected {expected:,.3g} s" if expected else ""
    took = f", at best {seconds:,.3g} s{likely} for each step, if all are of full length" if seconds else ""
    fits = "" if memory["fits"] else " [bold red](does not fit)[/]"
    return f"rollout: {rollout['rows']} answers at a time per device; {memory['peak'] / 1e9:,.3f} GB{fits} ({gb}){took}"


def _times(rows: int | None, plan: dict) -> str:
    return f"{(rows or 0) / plan['rows_per_device']:.3g} times the planned batch"


def _memory(program: dict) -> Table:
    memory = program["memory"]
    table = Table(title="memory per device, as planned by XLA", title_justify="left")
    table.add_column("")
    table.add_column("GB", justify="right")
    for part, size in memory["parts"].items():
        table.add_row(part, f"{size / 1e9:,.3f}")
    table.add_section()
    table.add_row("peak", f"{memory['peak'] / 1e9:,.3f}")
    table.add_row("available", f"{memory['available'] / 1e9:,.3f}")
    table.add_row("fits", "yes" if memory["fits"] else "[bold red]no[/]")
    table.add_row("donated (updated in place)", f"{memory['donated'] / 1e9:,.3f}")
    beside = (
        "fits beside the step" if memory["fits_with_copy"] else "does not fit: training waits while the state leaves the device"
    )
    table.add_row(f"copy for a checkpoint ({beside})", f"{memory['checkpoint_copy'] / 1e9:,.3f}")
    return table


def _work(program: dict) -> Table:
    table = Table(title="work per device and step", title_justify="left")
    table.add_column("")
    table.add_column("number", justify="right")
    table.add_column("TFLOP", justify="right")
    for dtypes, product in program["products"].items():
        table.add_row(f"matmuls {dtypes}", f"{product['count']:,}", f"{product['flops'] / 1e12:,.3f}")
    for direction, count in program["fused_attention"].items():
        table.add_row(f"cuDNN attention, {direction}", f"{count:,}" if count else "none", "")
    table.add_section()
    table.add_row("matmuls and attention", "", f"{program['flops'] / 1e12:,.3f}")
    table.add_row("model FLOPs", "", f"{program['flops_of_model'] / 1e12:,.3f}")
    table.add_row("ratio", "", f"{program['flops_ratio']:.3f}")
    table.add_section()
    kinds = ", ".join(f"{n} {kind}" for kind, n in list(program["launches_by_kind"].items())[:4])
    table.add_row(f"kernel launches ({kinds}, …)", f"{program['launches']:,}", "")
    return table


def _collectives(program: dict) -> Table:
    table = Table(title="collectives per step", title_justify="left")
    for name, justify in (("", "left"), ("dtype", "left"), ("times", "right"), ("MB each", "right"), ("devices", "right")):
        table.add_column(name, justify=justify)
    table.add_column("asynchronous")
    table.add_column("overlapping kernels", justify="right")
    for c in program["collectives"]:
        table.add_row(
            c["what"], c["dtype"], f"{c['times']:g}", f"{c['bytes'] / 1e6:,.3f}", str(c["devices"]),
            "yes" if c["asynchronous"] else "no", str(c["kernels_beside"]),
        )  # fmt: skip
    return table


def _time(plan: dict) -> Table:
    training = plan["training"]
    bounds = training["roofline"]
    table = Table(title="lower bound of a step, by the GPU's data sheet", title_justify="left")
    table.add_column("")
    table.add_column("ms", justify="right")
    names = {
        "arithmetic": "compute-bound kernels",
        "memory": "memory-bound kernels",
        "launches": "launch-bound kernels",
        "network": "communication not overlapped",
    }
    for key, name in names.items():
        table.add_row(f"[bold]{name}[/]" if key == bounds["bound"] else name, f"{bounds[key] * 1e3:,.3f}")
    table.add_section()
    table.add_row("total", f"{bounds['seconds'] * 1e3:,.3f}")
    table.add_row("overlapped communication", f"{bounds['network_hidden'] * 1e3:,.3f}")
    table.add_section()
    table.add_row("tokens/s, all devices", f"{training['tokens_per_second']:,.0f}")
    if "mfu" in training:
        table.add_row("MFU", f"{training['mfu']:.1%}")
    return table


def _expected(training: dict) -> Table:
    expected, bounds = training["expected"], training["roofline"]
    at_best = bounds["groups"] | {"launches": bounds["kernels"] * LAUNCH, "network": bounds["network"]}
    names = {
        "products": "matrix products",
        "attention": "attention",
        "elementwise": "elementwise and fused kernels",
        "copies": "copies",
        "launches": f"launches ({bounds['kernels']:,.0f} of {LAUNCH * 1e6:g} us)",
        "network": "communication not overlapped, at its bound",
    }
    table = Table(title="expected time of a step, by kernel group", title_justify="left")
    for name in ("", "ms at best", "efficiency", "ms expected"):
        table.add_column(name, justify="right" if name else "left")
    for key, name in names.items():
        best, seconds = at_best[key], expected["groups"][key]
        if seconds:
            table.add_row(name, f"{best * 1e3:,.3f}", f"{best / seconds:.0%}", f"{seconds * 1e3:,.3f}")
    table.add_section()
    table.add_row("total", "", f"{bounds['seconds'] / expected['seconds']:.0%}", f"{expected['seconds'] * 1e3:,.3f}")
    table.add_section()
    table.add_row("tokens/s, all devices", "", "", f"{expected['tokens_per_second']:,.0f}")
    if "mfu" in expected:
        table.add_row("MFU", "", "", f"{expected['mfu']:.1%}")
    return table


def _decoding(decoding: dict) -> Table:
    prefill, step, rows = decoding["prefill"], decoding["step"], decoding["rows"]
    table = Table(title=f"decoding on one device, {rows} row(s), full context", title_justify="left")
    is_expected = "expected" in step
    more = ("ms expected", "tokens/s expected") if is_expected else ()
    for name in ("", "peak GB", "donated GB", "launches", "ms at best", "tokens/s at best", *more):
        table.add_column(name, justify="right" if name else "left")
    for name, program in (("prefill", prefill), ("one token", step)):
        seconds = program.get("roofline", {}).get("seconds")
        row = [
            name, f"{program['memory']['peak'] / 1e9:,.3f}", f"{program['memory']['donated'] / 1e9:,.3f}",
            f"{program['launches']:,}", f"{seconds * 1e3:,.3f}" if seconds else "unknown",
            f"{rows / seconds:,.0f}" if seconds and program is step else "",
        ]  # fmt: skip
        if is_expected and program is step:
            row += [f"{step['expected']['seconds'] * 1e3:,.3f}", f"{step['expected']['tokens_per_second']:,.0f}"]
        table.add_row(*row)
    return table
