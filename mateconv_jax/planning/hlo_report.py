"""Analyse a compiled program's optimised HLO: its kernels, matmuls, fused attention and collectives.

Everything is per device, and the content of a loop counts once per iteration.
"""

import collections
import dataclasses
import math
import re

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*)$")
_COLLECTIVES = {
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
}  # fmt: skip
# Opcodes that launch nothing: names for memory, and control flow.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "copy-done",
    "opt-barrier", "add-dependency",
}  # fmt: skip
# Opcodes looked through when tracing where an array comes from.
_SAME = {"bitcast", "reshape", "copy", "convert", "transpose"}
# Of kernels: matrix products, cuDNN's attention, everything that XLA fuses, and plain copies.
GROUPS = ("products", "attention", "elementwise", "copies")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      shape: as text, such as "bf16[8,512]{1,0}".
      operands: their names.
      rest: operands and attributes, as text.
      is_root: it gives its computation's result.
    """

    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.rest)
        return match[1] if match else None

    def required_attribute(self, pattern: str) -> str:
        """An attribute that every instruction of this opcode has. Raises ValueError if it is missing."""
        value = self.attribute(pattern)
        if value is None:
            raise ValueError(f"{self.name}: nothing matches {pattern!r} in {self.rest[:300]!r}")
        return value


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel launch.

    Attributes:
      kind: its opcode, fusion kind or library call.
      times: launches per run of the program.
      flops: of its matmuls, per launch, by operand dtypes such as "bf16 x bf16".
      bytes: read and written, per launch.
    """

    name: str
    kind: str
    times: float
    flops: dict[str, float]
    bytes: float

    @property
    def group(self) -> str:
        """One of GROUPS."""
        if "fmha" in self.kind:
            return "attention"
        if self.flops:
            return "products"
        return "copies" if self.kind in ("copy", "copy-start", "transpose") else "elementwise"


@dataclasses.dataclass(frozen=True)
class Matmul:
    """A matrix multiplication.

    Attributes:
      dtypes: such as "bf16 x bf16 -> f32".
      times: per run of the program.
      flops: of one.
    """

    name: str
    dtypes: str
    times: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Attention:
    """A call of cuDNN's fused attention.

    Attributes:
      direction: "forward" or "backward".
      times: per run of the program.
      flops: of one; half of the S x T square if causal.
    """

    direction: str
    times: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      bytes: of its operands, per execution.
      times: per run of the program.
      devices: in each group.
      is_async: other kernels may run between its start and its end.
      overlapping: those kernels.
    """

    opcode: str
    dtypes: tuple[str, ...]
    bytes: float
    times: float
    devices: int
    is_async: bool
    overlapping: list[Kernel]


@dataclasses.dataclass
class HloReport:
    """Everything one run of a program launches on a device.

    Attributes:
      unknown_loops: names of loops without a known trip count; they count once.
    """

    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    matmuls: list[Matmul] = dataclasses.field(default_factory=list)
    attention: list[Attention] = dataclasses.field(default_factory=list)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)

    def launches(self) -> int:
        return round(sum(kernel.times for kernel in self.kernels) + sum(c.times for c in self.collectives))

    def launches_by_kind(self) -> dict[str, int]:
        counts: dict[str, float] = collections.defaultdict(float)
        for kernel in self.kernels:
            counts[kernel.kind] += kernel.times
        for collective in self.collectives:
            counts[collective.opcode] += collective.times
        return {kind: round(n) for kind, n in sorted(counts.items(), key=lambda item: -item[1])}

    def flops(self) -> float:
        """Of all matmuls and attention."""
        return sum(m.times * m.flops for m in self.matmuls) + sum(a.times * a.flops for a in self.attention)

    def matmuls_by_dtype(self) -> dict[str, tuple[int, float]]:
        """{dtypes: (number, FLOPs) of the matmuls}."""
        by_dtype: dict[str, tuple[int, float]] = {}
        for m in self.matmuls:
            n, flops = by_dtype.get(m.dtypes, (0, 0.0))
            by_dtype[m.dtypes] = n + round(m.times), flops + m.times * m.flops
        return by_dtype


def read(text: str) -> HloReport:
    """Analyse a compiled program, given as `compiled.as_text()`."""
    computations, entry = parse(text)
    report = HloReport()
    _walk(computations, entry, 1, report)
    return report


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, in execution order, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            operands = re.findall(r"%([\w.\-]+)", _up_to_closing(match[5]))
            current.append(Instruction(match[2], match[3], match[4], operands, match[5], bool(match[1])))
    return computations, entry


def shapes(text: str) -> list[tuple[str, list[int]]]:
    """Each (dtype, dimensions) in a shape, which may be a tuple's."""
    return [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in _SHAPE.findall(text)]


def n_bytes(text: str) -> float:
    """Bytes of a shape, which may be a tuple's."""
    return sum(_BYTES[dtype] * math.prod(dims) for dtype, dims in shapes(text))


def _up_to_closing(text: str) -> str:
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return text[:i]
    return text


def _walk(computations, name: str, times: float, report: HloReport) -> None:
    """Add to `report` what a computation launches when it runs `times` times."""
    instructions = computations[name]
    shape_of = {i.name: i.shape for i in instructions}
    running: dict[str, tuple[Instruction, int]] = {}  # started collectives, and the number of kernels before
    for i in instructions:
        base = i.opcode.removesuffix("-start").removesuffix("-done")
        if i.opcode in ("async-start", "async-update", "async-done"):
            called = i.attribute(r"calls=%?([\w.\-]+)")
            inner = computations.get(called, []) if i.opcode == "async-start" else []
            wrapped = next((j for j in inner if j.opcode in _COLLECTIVES), None)
            if wrapped is not None:
                shape_of |= {j.name: j.shape for j in inner}
                running[i.name] = wrapped, len(report.kernels)
            elif inner:
                _walk(computations, called, times, report)
            elif i.opcode == "async-done" and i.operands[0] in running:
                started, before = running.pop(i.operands[0])
                report.collectives.append(_collective(started, shape_of, times, report.kernels[before:]))
        elif base in _COLLECTIVES:
            if i.opcode.endswith("-start"):
                running[i.name] = i, len(report.kernels)
            elif i.opcode.endswith("-done"):
                started, before = running.pop(i.operands[0])
                report.collectives.append(_collective(started, shape_of, times, report.kernels[before:]))
            else:
                report.collectives.append(_collective(i, shape_of, times, None))
        elif i.opcode == "while":
            trip_count = i.attribute(r'"known_trip_count":\{"n":"(\d+)"')
            if trip_count is None:
                report.unknown_loops.append(i.name)
            _walk(computations, i.attribute(r"condition=%?([\w.\-]+)"), times * int(trip_count or 1), report)
            _walk(computations, i.attribute(r"body=%?([\w.\-]+)"), times * int(trip_count or 1), report)
        elif i.opcode == "conditional":
            branches = i.attribute(r"branch_computations=\{([^}]*)\}")
            for branch in re.findall(r"[\w.\-]+", branches) if branches else re.findall(r"_computation=%?([\w.\-]+)", i.rest):
                _walk(computations, branch, times, report)
        elif i.opcode == "call":
            _walk(computations, i.attribute(r"to_apply=%?([\w.\-]+)"), times, report)
        elif i.opcode not in _FREE:
            report.kernels.append(_kernel(computations, i, shape_of, times, report))


def _kernel(computations, i: Instruction, shape_of, times: float, report: HloReport) -> Kernel:
    flops: dict[str, float] = {}

    def add(matmul: Matmul):
        report.matmuls.append(matmul)
        operands = matmul.dtypes.split(" -> ")[0]
        flops[operands] = flops.get(operands, 0.0) + matmul.flops

    kind, traffic = i.opcode, n_bytes(i.shape) + sum(n_bytes(shape_of.get(o, "")) for o in i.operands)
    if i.opcode == "fusion":
        called = i.required_attribute(r"calls=%?([\w.\-]+)")
        kind = i.attribute(r'"fusion_backend_config":\{"kind":"([^"]+)"') or i.required_attribute(r"kind=k(\w+)")
        for matmul in _dots(computations, called, times):
            add(matmul)
        traffic = _fusion_bytes(computations, called, i)
    elif i.opcode == "dot":
        add(_dot(i, shape_of, times))
    elif i.opcode == "custom-call":
        kind = i.required_attribute(r'custom_call_target="([^"]+)"')
        if kind.startswith("__cublas$"):
            add(_cublas(i, shape_of, times))
        elif "cudnn$fmha" in kind:
            attention = _fused_attention(i, kind, times)
            report.attention.append(attention)
            flops[" x ".join([shapes(i.shape)[0][0]] * 2)] = attention.flops
    elif i.opcode == "dynamic-update-slice":
        traffic = 2 * n_bytes(shape_of.get(i.operands[1], ""))
    return Kernel(i.name, kind, times, flops, traffic)


def _dots(computations, name: str, times: float) -> list[Matmul]:
    """The matmuls in a fused computation and in those nested in it."""
    found = []
    shape_of = {i.name: i.shape for i in computations.get(name, [])}
    for i in computations.get(name, []):
        if i.opcode == "dot":
            found.append(_dot(i, shape_of, times))
        elif called := i.attribute(r"calls=%?([\w.\-]+)"):
            found += _dots(computations, called, times)
    return found


def _dot(i: Instruction, shape_of, times: float) -> Matmul:
    (left, left_dims), (right, _) = (shapes(shape_of[o])[0] for o in i.operands[:2])
    out, out_dims = shapes(i.shape)[0]
    contracted = i.required_attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    inner = math.prod(left_dims[int(axis)] for axis in contracted.split(",") if axis)
    return Matmul(i.name, f"{left} x {right} -> {out}", times, 2.0 * math.prod(out_dims) * inner)


def _cublas(i: Instruction, shape_of, times: float) -> Matmul:
    (left, left_dims), (right, _) = (shapes(shape_of[o])[0] for o in i.operands[:2])
    out, out_dims = shapes(i.shape)[0]
    contracted = i.required_attribute(r'"lhs_contracting_dimensions": ?\[([^\]]*)\]')
    inner = math.prod(left_dims[int(axis)] for axis in re.findall(r"\d+", contracted))
    return Matmul(i.name, f"{left} x {right} -> {out}", times, 2.0 * math.prod(out_dims) * inner)


def _fused_attention(i: Instruction, target: str, times: float) -> Attention:
    dimensions = i.required_attribute(r'"intermediate_tensor_shape": ?\{[^}]*?"dimensions": ?\[([^\]]*)\]')
    B, H, S, T = map(int, re.findall(r"\d+", dimensions))
    N = shapes(i.shape)[0][1][-1]
    is_causal = "CAUSAL" in (i.attribute(r'"mask_type": ?"([^"]*)"') or "")
    backward = "Backward" in target
    # Two matmuls of S x T x N forward; four backward, plus recomputing the scores.
    flops = (5 if backward else 2) * 2.0 * B * H * S * T * N * (0.5 if is_causal else 1)
    return Attention("backward" if backward else "forward", times, flops)


def _collective(i: Instruction, shape_of, times: float, overlapping: list[Kernel] | None) -> Collective:
    operands = [shape_of.get(o, "") for o in i.operands]
    dtypes = tuple(sorted({dtype for shape in operands for dtype, _ in shapes(shape)}))
    is_async = overlapping is not None and '"is_sync":true' not in i.rest
    opcode = i.opcode.removesuffix("-start")
    return Collective(opcode, dtypes, sum(map(n_bytes, operands)), times, _group(i), is_async, overlapping or [])


def _group(i: Instruction) -> int:
    """The size of its device groups, written as {{0,1},{2,3}}, [4,2]<=[8] or mesh['a'=4,'b'=2] {'b'}."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", i.rest):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", i.rest):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\)[^)]*\))? \{([^}]*)\}", i.rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return 2  # a permutation: one sends to one


def _fusion_bytes(computations, name: str, fusion: Instruction) -> float:
    """Bytes that a fusion reads and writes. Of an operand that is only sliced or gathered from, the slices count; of a result
    that updates part of an operand in place, the part.
    """
    instructions = computations.get(name, [])
    by_name = {i.name: i for i in instructions}
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for i in instructions:
        for operand in i.operands:
            users[operand].append(i)

    def read(i: Instruction) -> float:
        total = 0.0
        for user in users[i.name]:
            if user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == i.name:
                total += n_bytes(user.shape)
            elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == i.name:
                total += 0.0  # updated in place, not read
            elif user.opcode in _SAME and not user.is_root:
                total += read(user)
            else:
                return n_bytes(i.shape)
        return min(total, n_bytes(i.shape))

    def written(root: Instruction) -> float:
        if root.opcode == "tuple":
            return sum(written(by_name[o]) for o in root.operands if o in by_name)
        inner = root
        while inner.opcode in _SAME and inner.operands and inner.operands[0] in by_name:
            inner = by_name[inner.operands[0]]
        if inner.opcode == "dynamic-update-slice":
            return n_bytes(by_name[inner.operands[1]].shape)
        if inner.opcode == "scatter":
            return 2 * n_bytes(by_name[inner.operands[-1]].shape)
        return n_bytes(root.shape)

    parameters = [i for i in instructions if i.opcode == "parameter"]
    root = next((i for i in instructions if i.is_root), None)
    return sum(map(read, parameters)) + (written(root) if root else n_bytes(fusion.shape))
