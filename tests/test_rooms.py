"""The rooms of the package: which module may import which, drawn from the sources (README, "What each room is")."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import medsa_nets

PACKAGE = Path(medsa_nets.__file__).parent
README = PACKAGE.parent / "README.md"

# From the ground up; a room (a folder, or a module beside the folders) calls rooms of lower floors and itself.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "checksums", "machine", "runtime", "losses", "metrics"),
    ("prompts", "data", "commands"),
    ("measurements", "anatomy", "visualize"),
    ("layers", "converted", "transforms"),
    ("networks", "precision"),
    ("weights", "backends", "embeddings"),
    ("adaptations", "bundles"),
    ("build", "inferers"),
    ("interaction",),
    ("training",),
    ("exchange",),
    ("engines", "handlers", "session_training", "stages"),  # names of before, which configurations of users hold
    ("medsa_nets",),  # what the package offers by name
    ("precomputed",),
    ("cluster", "demo", "deploy", "label", "label_app", "server", "__main__"),
    ("sweep",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_MONAI = ("layers", "networks")


def modules() -> dict[str, Path]:
    """Files of the package by module name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("medsa_nets", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Names that a module imports, anywhere but for types alone: ``a.b`` and, for ``from a import b``, ``a.b`` too."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return
    if isinstance(tree, ast.Import):
        yield from (name.name for name in tree.names)
    elif isinstance(tree, ast.ImportFrom):
        yield from (f"{'.' * tree.level}{tree.module or ''}.{name.name}" for name in tree.names)
    for child in ast.iter_child_nodes(tree):
        yield from imports(child)


def draw(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """The import graph: modules by name to the modules of the package that each imports."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        graph[module] = set()
        for name in imports(ast.parse(source)):
            while name and name not in sources:
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    return graph


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Modules that import each other in a circle, each circle once as a way through it."""
    state: dict[str, int] = {}  # 1: on the way, 2: done
    found: list[list[str]] = []

    def visit(module: str, way: list[str]) -> None:
        state[module] = 1
        for other in sorted(graph[module]):
            if state.get(other) == 1:
                found.append([*way[way.index(other) :], other])
            elif other not in state:
                visit(other, [*way, other])
        state[module] = 2

    for module in sorted(graph):
        if module not in state:
            visit(module, [module])
    return found


def room_of(module: str) -> str:
    """The folder of a module, or its name; each ``__main__`` is a command, which may call everything."""
    parts = module.split(".")
    return "__main__" if parts[-1] == "__main__" else parts[1] if len(parts) > 1 else parts[0]


def upwards(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Imports of a room that is not below."""
    return [
        f"{module} -> {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if room_of(module) not in (room_of(other), "__main__") and FLOOR[room_of(module)] <= FLOOR[room_of(other)]
    ]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return draw({module: path.read_text(encoding="utf-8") for module, path in modules().items()})


def test_the_graph_holds_what_the_sources_import():
    sources = {
        "medsa_nets": "",
        "medsa_nets.a": "import torch\nfrom medsa_nets.b import c\n",
        "medsa_nets.b": "def f():\n    from medsa_nets import a\n",
        "medsa_nets.b.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from medsa_nets.a import name\n",
        "medsa_nets.d": "import medsa_nets.b.c\nfrom medsa_nets.a import name\n",
    }
    drawn = draw(sources)
    assert drawn == {
        "medsa_nets": set(),
        "medsa_nets.a": {"medsa_nets.b.c"},
        "medsa_nets.b": {"medsa_nets.a"},
        "medsa_nets.b.c": set(),
        "medsa_nets.d": {"medsa_nets.b.c", "medsa_nets.a"},
    }
    assert circles(drawn) == []
    assert circles({**drawn, "medsa_nets.b.c": {"medsa_nets.b"}}) == [
        ["medsa_nets.a", "medsa_nets.b.c", "medsa_nets.b", "medsa_nets.a"]
    ]
    assert upwards({"medsa_nets.layers.linear": {"medsa_nets.networks.medsa", "medsa_nets.measurements"}}) == [
        "medsa_nets.layers.linear -> medsa_nets.networks.medsa"
    ]


def test_no_modules_import_each_other_in_a_circle(graph):
    assert circles(graph) == []


def test_every_room_has_one_floor(graph):
    listed = [room for rooms in FLOORS for room in rooms]
    assert {room_of(module) for module in graph} ^ set(listed) == set(), "say in FLOORS where they stand"
    assert [room for room in FLOOR if listed.count(room) > 1] == [], "a room stands on one floor"


def test_rooms_call_rooms_below_them_only(graph):
    assert upwards(graph) == []


@pytest.mark.parametrize("room", WITHOUT_MONAI)
def test_networks_know_nothing_of_monai(room):
    for module, path in modules().items():
        if room_of(module) == room:
            names = {name.split(".")[0] for name in imports(ast.parse(path.read_text(encoding="utf-8")))}
            assert not names & {"monai", "ignite"}, module


def test_the_readme_names_every_room_that_there_is(graph):
    text = README.read_text(encoding="utf-8").split("## What each room is", 1)[1].split("\n## ", 1)[0]
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {folder for folder in folders if f"`{folder}/`" not in text} == set()
