"""The house as docs/ARCHITECTURE.md draws it: imports go one way, functions fit a screen, the map knows every file."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mateconv_jax"

# What each room may import; commands (train, prepare, …) may import everything but each other, the leaves nothing.
LEAVES = {"common_prefix", "cores", "disk", "errors", "files", "intervals", "plotting", "rewards", "terminal"}
ROOMS = {
    "errors": "terminal",
    "disk": "errors",
    "weighted_paths": "errors",
    "files": "disk",
    "config_keys": "intervals",
    "generation_config": "errors",
    "config": "config_keys errors weighted_paths",
    "run_folder": "config disk errors files",
    "runtime": "errors",
    "model": "cores errors",
    "data": "common_prefix cores disk errors files plotting",
    "losses": "data model",
    "interop": "config data errors files generation_config model run_folder",
    "inference": "common_prefix config data errors files generation_config interop model runtime terminal",
    "tasks": "data errors model runtime",
    "training": "config config_keys data disk errors files inference generation_config interop intervals losses model run_folder runtime tasks terminal weighted_paths",
    "serving": "cores data errors generation_config inference",
    "evaluation": "config cores data errors files inference generation_config interop losses model plotting runtime tasks training weighted_paths",
    "planning": "config config_keys data errors files inference generation_config model runtime training weighted_paths",
    "reporting": "errors plotting",
}
# Only preparing needs these: training must start without them, and without what they import.
PREPARING = ("data.build", "data.text", "data.tokenizer.bpe", "data.tokenizer.report", "plotting")
# Files, flags and logging.
NOT_FOR_THE_MODEL = set("absl argparse clu io json logging orbax pathlib pickle shutil sys tempfile tqdm".split())
TEXT_MODES = {"r", "w", "a", "x", "r+", "w+"}
LONGEST_FUNCTION = 60  # lines, its docstring among them


def sources() -> dict[str, ast.Module]:
    """Module names without the package's, to what is in them. The package's own __init__ imports nothing until it is asked."""
    paths = [path for path in (ROOT / PACKAGE).rglob("*.py") if "configs" not in path.parts]
    names = {path: ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts) for path in paths}
    return {
        name.removesuffix(".__init__"): ast.parse(path.read_text(encoding="utf-8"))
        for path, name in names.items()
        if name != "__init__"
    }


def imports(tree: ast.Module) -> set[str]:
    """Full names of all that a module imports, at its top or in a function; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import (write the whole name)"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def import_graph(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Which of our modules each imports, but for a room's empty __init__."""
    ours = {
        name: {found.removeprefix(f"{PACKAGE}.") for found in imports(tree) if found.startswith(f"{PACKAGE}.")}
        for name, tree in modules.items()
    }
    return {name: {other for other in found if other in modules and modules[other].body} for name, found in ours.items()}


MODULES = sources()
GRAPH = import_graph(MODULES)


def room(module: str) -> str:
    return module if module in ROOMS else module.partition(".")[0]


def wrong_arrows(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go where the table does not let them."""
    commands = {room(module) for module in graph} - LEAVES - set(ROOMS)
    wrong = []
    for module, imported in sorted(graph.items()):
        here = room(module)
        allowed = LEAVES | set(ROOMS) if here in commands else set(ROOMS.get(here, "").split())
        wrong += [f"{module} imports {other}" for other in sorted(imported) if room(other) not in allowed | {here}]
    return wrong


def paths_to(graph: dict[str, set[str]], start: str, forbidden: tuple[str, ...]) -> list[str]:
    """How modules of a room come to import something forbidden: "a → b → c", one for each that is reached."""
    came_from: dict[str, str | None] = {module: None for module in graph if room(module) == start}
    waiting = list(came_from)
    found = []
    while waiting:
        module = waiting.pop(0)
        if any(module == name or module.startswith(f"{name}.") for name in forbidden):
            path = [module]
            while (before := came_from[path[0]]) is not None:
                path.insert(0, before)
            found.append(" → ".join(path))
            continue
        for other in sorted(graph[module] - set(came_from)):
            came_from[other] = module
            waiting.append(other)
    return found


def test_imports_go_one_way():
    assert wrong_arrows(GRAPH) == []


def test_no_imports_go_round_in_circles():
    """CycleError's message has the circle."""
    graphlib.TopologicalSorter(GRAPH).prepare()
    graphlib.TopologicalSorter({name: allowed.split() for name, allowed in ROOMS.items()}).prepare()


@pytest.mark.parametrize(
    "start, forbidden",
    [
        ("training", PREPARING),
        ("inference", ("training", "data.build", "evaluation", "planning")),
        ("interop", ("training", "data.build")),
        ("model", ("config", "data", "files", "run_folder")),
        ("losses", ("training", "inference")),
        ("tasks", ("training", "inference", "data.build", "data.text")),
    ],
)
def test_a_room_does_not_reach(start, forbidden):
    """Directly or through others."""
    assert paths_to(GRAPH, start, forbidden) == []


def test_the_model_knows_nothing_of_files_flags_or_logging():
    for name in (name for name in MODULES if room(name) == "model"):
        libraries = {found.partition(".")[0] for found in imports(MODULES[name])}
        assert not libraries & NOT_FOR_THE_MODEL, f"{name} imports {libraries & NOT_FOR_THE_MODEL}"
        calls = {
            node.func.id for node in ast.walk(MODULES[name]) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"open", "print"}, f"{name} calls {calls & {'open', 'print'}}"


def test_text_files_are_opened_with_their_encoding():
    """Elsewhere the default is not UTF-8. Ruff's PLW1514 does not know the type of `folder / "name"`."""
    without = []
    for name, tree in MODULES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            called = ast.unparse(call.func).split(".")
            given = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            is_text = called[-1] == "open" and (TEXT_MODES.intersection(given) or len(called) > 1 and not call.args)
            is_text = is_text or called[-1] in ("read_text", "write_text") and called[0] != "files"
            if is_text and not any(keyword.arg == "encoding" for keyword in call.keywords):
                without.append(f"{name}:{call.lineno}")
    assert without == []


def test_functions_fit_a_screen():
    too_long = []
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = node.end_lineno - node.lineno + 1
            where = f"{name.replace('.', '/')}.py:{node.name}"
            if lines > LONGEST_FUNCTION:
                too_long.append(f"{where} has {lines} lines")
    assert too_long == []


def test_the_map_knows_every_file():
    """Each file has its line in docs/ARCHITECTURE.md, and no line is of a file that is gone."""
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    drawn = set(re.findall(r"^\| `([\w/]+\.py)` \|", text, re.M))
    empty = {name for name, tree in MODULES.items() if not tree.body}  # __init__ of a room
    there = {f"{name.replace('.', '/')}.py" for name in MODULES if name not in empty} | {"__init__.py"}
    assert drawn == there, f"missing: {sorted(there - drawn)}, gone: {sorted(drawn - there)}"


def test_what_is_wrong_is_named():
    graph = {"train": {"training.a"}, "training.a": {"data.c"}, "data.c": {"data.text.d"}, "data.text.d": {"training.a"}}
    assert wrong_arrows(graph) == ["data.text.d imports training.a"]
    assert paths_to(graph, "training", PREPARING) == ["training.a → data.c → data.text.d"]
    assert imports(ast.parse("def f():\n    from a.b import c")) == {"a.b", "a.b.c"}
    with pytest.raises(graphlib.CycleError, match="data.c"):
        graphlib.TopologicalSorter(graph).prepare()
