"""The house: rooms one above the other, no circle anywhere, no module too long or tied to too many others.

Imports count wherever they stand, inside functions too; those under TYPE_CHECKING do not.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "spo_fast"
FLOORS = (  # a room imports from the floors below it and from itself, never from beside it
    ("config", "ops"),
    ("method",),
    ("data",),
    ("models", "scorers"),
    ("evaluation",),
    ("training",),
    ("train", "train_spm", "evaluate", "compare", "report"),
    ("toy", "__main__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MOST_LINES, MOST_LINES_OF_A_KERNEL, MOST_IMPORTS = 500, 600, 15
TOO_LONG: set[str] = set()
TOO_TIED: set[str] = set()


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports_of(file: Path) -> set[str]:
    """Our modules that a file imports, itself and the package's own __init__ left out."""
    tree = ast.parse(file.read_text())
    typed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typed:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in FILES else str(node.module))
    return (found & FILES.keys()) - {name_of(file), "spo_fast"}


IMPORTS = {module: imports_of(file) for module, file in FILES.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Nodes of one circle, or none: what is left when everything without an edge goes, again and again."""
    left = {node: set(to) for node, to in edges.items()}
    while ends := {node for node, to in left.items() if not to}:
        left = {node: to - ends for node, to in left.items() if node not in ends}
    if not left:
        return []
    path = [next(iter(sorted(left)))]
    while (after := min(left[path[-1]])) not in path:
        path.append(after)
    return [*path[path.index(after) :], after]


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_every_module_has_a_room():
    rooms = {room_of(module) for module in FILES if module != "spo_fast"}
    assert rooms == FLOOR.keys()


def test_imports_go_down():
    upward = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in sorted(others)
        if room_of(module) != room_of(other) and FLOOR[room_of(other)] >= FLOOR[room_of(module)]
    ]
    assert upward == []
    assert sum(map(len, IMPORTS.values())) > 100


def test_no_modules_stand_in_a_circle():
    assert circle(IMPORTS) == []


def test_no_rooms_stand_in_a_circle():
    """The rooms within rooms too: training and training.plan are two."""
    inner = {module: module.rpartition(".")[0] for module in FILES}
    rooms: dict[str, set[str]] = {}
    for module, others in IMPORTS.items():
        if inner[module].count("."):
            rooms.setdefault(inner[module], set()).update(
                inner[other] for other in others if inner[other].count(".") and inner[other] != inner[module]
            )
    own = lambda a, b: (a + ".").startswith(b + ".") or (b + ".").startswith(a + ".")  # noqa: E731
    # a room may use its own inner rooms, and they what stands beside them
    assert circle({room: {o for o in others if not own(o, room)} for room, others in rooms.items()}) == []


@pytest.mark.parametrize("module", FILES)
def test_a_module_is_read_in_one_sitting(module):
    most = MOST_LINES_OF_A_KERNEL if room_of(module + ".") == "ops" else MOST_LINES
    lines = len(FILES[module].read_text().splitlines())
    assert (lines > most) == (module in TOO_LONG), f"{lines} lines"


@pytest.mark.parametrize("module", FILES)
def test_a_module_is_tied_to_few(module):
    assert (len(IMPORTS[module]) > MOST_IMPORTS) == (module in TOO_TIED), sorted(IMPORTS[module])
