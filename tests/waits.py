"""Every wait of the code for another process, found by reading the code, and whether it has a deadline.

Strict on purpose: an `await` counts as a wait for another process unless it is known not to be one (a coroutine of
ours, which is read itself; a sleep; local work in a thread). What is left over needs a deadline or a reason.

A wait has a deadline inside `answer(...)`, in the body of `asyncio.timeout(...)`, in a call that is given a time-out,
or in a function that is used in such places and nowhere else. `asyncio.wait_for(...)` does not count: in Python 3.11 it
loses a cancellation that comes in the same turn of the loop as what it waits for, and who cancelled waits for ever.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

ANSWERING = {"answer", "_answer", "answer_in_time"}  # contracts.waiting.answer, and those of the engine's calls
TIMEOUTS = {"timeout", "timeout_s", "deadline_s"}
# Of ray and ray.serve: what returns at once, and what only describes. Everything else there asks another process.
RETURNS_AT_ONCE = {
    *("ray.remote", "ray.method", "ray.put", "ray.kill", "ray.cancel", "ray.get_gpu_ids"),
    *("ray.util.get_node_ip_address", "ray.get_runtime_context", "serve.deployment", "serve.batch", "serve.RunTarget"),
    *("serve.get_replica_context", "serve.ingress"),
}
OTHERS = {"ray", "serve", "llm", "_llm", "handle", "_handle", "remote"}  # whoever is asked by way of these
NETWORK = {"subprocess", "socket", "requests", "httpx", "urllib", "urlopen"}
NO_REQUEST = {"subprocess.TimeoutExpired", "socket.socket", "socket.create_server"}
BLOCKING = {"communicate", "recv", "accept", "shutdown"}  # of anything
JOINS = {"init_process_group", "new_group", "TCPStore"}  # whose time-out is that of each later collective


@dataclass(frozen=True)
class Wait:
    """One place of the code. `key` does not change when lines move."""

    file: str
    function: str
    line: int
    code: str
    has_deadline: bool

    @property
    def key(self) -> str:
        return f"{self.file} {self.function}: {self.code}"


@dataclass
class _File:
    """A parsed file; `parents` of every node."""

    name: str
    tree: ast.Module
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for parent in ast.walk(self.tree):
            for child in ast.iter_child_nodes(parent):
                self.parents[child] = parent

    def above(self, node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
        """(ancestor, its child on the way to `node`), innermost first, up to the function that `node` runs in."""
        while (parent := self.parents.get(node)) is not None:
            yield parent, node
            if isinstance(parent, (FunctionNode, ast.Lambda)):
                return
            node = parent

    def function(self, node: ast.AST) -> FunctionNode | None:
        while (node := self.parents.get(node)) is not None:  # type: ignore[assignment]
            if isinstance(node, FunctionNode):
                return node
        return None


class Reading:
    """All waits of `sources` (path to text)."""

    def __init__(self, sources: dict[str, str]) -> None:
        self._files = [_File(name, ast.parse(text)) for name, text in sorted(sources.items())]
        self._coroutines = {
            node.name for file in self._files for node in ast.walk(file.tree) if isinstance(node, ast.AsyncFunctionDef)
        }
        self._functions = {
            node: file for file in self._files for node in ast.walk(file.tree) if isinstance(node, FunctionNode)
        }
        self._bounded = self._always_bounded()

    def waits(self) -> list[Wait]:
        return [self._wait(file, node) for file in self._files for node in self._waiting(file)]

    def _wait(self, file: _File, node: ast.expr) -> Wait:
        function = file.function(node)
        has_deadline = self._timed(node) or self._in_deadline(file, node) or function in self._bounded
        return Wait(file.name, function.name if function else "", node.lineno, ast.unparse(node), has_deadline)

    def _waiting(self, file: _File) -> Iterator[ast.expr]:
        """Expressions that wait for another process, for all that can be told."""
        for node in ast.walk(file.tree):
            match node:
                case ast.Await(value=value):
                    yield from self._awaited(value)
                case ast.AsyncFor(iter=value):
                    yield from self._awaited(value)
                case ast.AsyncWith(items=items):
                    for item in items:
                        if not _name(item.context_expr).endswith(
                            ("_lock", "asyncio.timeout", "TaskGroup", "ExitStack")
                        ):
                            yield from self._awaited(item.context_expr)
                case ast.Call() if not isinstance(file.parents[node], ast.Await) and self._blocks(node):
                    yield node

    def _blocks(self, call: ast.Call) -> bool:
        """Whether a call that is not awaited may wait for another process before it returns."""
        name = _name(call)
        parts = name.split(".")
        if parts[0] in ("ray", "serve"):
            return name not in RETURNS_AT_ONCE and not name.endswith(".options")
        if set(parts) & NETWORK and len(parts) > 1:
            return name not in NO_REQUEST
        if parts[-1] in ("join", "wait"):  # with arguments it is that of a string or a path, or has a time-out
            return parts[0] != "asyncio" and not call.args and not call.keywords
        if parts[-1] == "result" and isinstance(call.func, ast.Attribute):
            return isinstance(call.func.value, ast.Call)  # asyncio's, which never wait, are held by a name
        ours = not set(parts) & OTHERS and parts[-1] in {function.name for function in self._functions}
        return parts[-1] in BLOCKING | JOINS | {"urlopen", "from_engine_args"} and not ours

    def _awaited(self, value: ast.expr) -> Iterator[ast.expr]:
        if not isinstance(value, ast.Call):
            yield value
            return
        name = _name(value)
        last = name.split(".")[-1]
        if name in ("asyncio.gather", "asyncio.shield") or last == "enter_async_context":
            for argument in value.args:
                match argument:
                    case ast.Starred(value=ast.GeneratorExp(elt=each) | ast.ListComp(elt=each)):
                        yield from self._awaited(each)
                    case ast.Starred(value=many):
                        yield many
                    case _:
                        yield from self._awaited(argument)
        elif name == "asyncio.to_thread":
            if set(_name(value.args[0]).split(".")) & OTHERS:
                yield value
        elif name == "asyncio.sleep":
            pass
        elif set(name.split(".")) & OTHERS or last in (*ANSWERING, "wait_for") or last not in self._coroutines:
            yield value

    def _timed(self, node: ast.expr) -> bool:
        """Whether the call itself is one with a deadline."""
        if not isinstance(node, ast.Call):
            return False
        last = _name(node).split(".")[-1]
        given = [keyword.value for keyword in node.keywords if keyword.arg in TIMEOUTS and last != "wait_for"]
        return last in ANSWERING or any(not _is_none(value) for value in given)

    def _in_deadline(self, file: _File, node: ast.AST, *, follow: bool = True) -> bool:
        """Whether `node` stands in a place with a deadline, or is assigned to a name that stands in such places."""
        for parent, child in file.above(node):
            match parent:
                case ast.Call() if _name(parent).split(".")[-1] in ANSWERING:
                    if child is not parent.func and self._timed(parent):
                        return True
                case ast.AsyncWith(items=items) if child in parent.body:
                    timeouts = [item.context_expr for item in items if _name(item.context_expr) == "asyncio.timeout"]
                    if any(isinstance(call, ast.Call) and not _is_none(call.args[0]) for call in timeouts):
                        return True
                case ast.Assign(targets=[target], value=value) if follow:
                    if any(self._only_answered(file, node, name) for name in _assigned(target, value, node)):
                        return True
        return False

    def _only_answered(self, file: _File, node: ast.AST, name: str) -> bool:
        """Whether what is assigned to `name` is used for nothing but to wait for it with a deadline."""
        function = file.function(node)
        uses = [
            use
            for use in ast.walk(function or file.tree)
            if isinstance(use, ast.Name) and use.id == name and isinstance(use.ctx, ast.Load)
        ]
        answered = [use for use in uses if self._in_deadline(file, use, follow=False)]
        cancelled = [use for use in uses if _name(file.parents[use]) == "ray.cancel"]
        return bool(answered) and len(answered) + len(cancelled) == len(uses)

    def _places(
        self, function: FunctionNode, uses: dict[str, list[tuple[_File, ast.AST]]]
    ) -> list[tuple[_File, ast.AST]]:
        """Where a function is used, as far as its name tells: a private one in its own file alone."""
        private = function.name.startswith("_")
        return [place for place in uses[function.name] if not private or place[0] is self._functions[function]]

    def _always_bounded(self) -> set[FunctionNode | None]:
        """Functions that are used in places with a deadline alone; a use in another process is none of these."""
        names = {function.name for function in self._functions}
        uses: dict[str, list[tuple[_File, ast.AST]]] = {name: [] for name in names}
        for file in self._files:
            for node in ast.walk(file.tree):
                name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
                if name in names:
                    uses[name].append((file, node))
        bounded: set[FunctionNode | None] = set()
        while True:
            more = {
                function
                for function in self._functions.keys() - bounded
                if (places := self._places(function, uses))
                and all(
                    _name(file.parents[use]).split(".")[-1] != "remote"
                    and (self._in_deadline(file, use) or file.function(use) in bounded)
                    for file, use in places
                )
            }
            if not more:
                return bounded
            bounded |= more


def read(folders: Iterable[Path]) -> Reading:
    """The Python files below `folders`, named from their parent folder on."""
    return Reading(
        {
            str(path.relative_to(folder.parent)): path.read_text(encoding="utf-8")
            for folder in folders
            for path in folder.rglob("*.py")
        }
    )


def _name(node: ast.AST) -> str:
    """`a.b.c` of an attribute or of the function of a call; calls and subscripts within are passed over."""
    match node:
        case ast.Call(func=function):
            return _name(function)
        case ast.Attribute(value=value, attr=attr):
            return f"{_name(value)}.{attr}"
        case ast.Subscript(value=value):
            return _name(value)
        case ast.Name(id=name):
            return name
        case _:
            return ""


def _assigned(target: ast.expr, value: ast.expr, node: ast.AST) -> list[str]:
    """The name that the part of `value` that holds `node` is assigned to."""
    match target, value:
        case ast.Name(id=name), _:
            return [name]
        case ast.Tuple(elts=names), ast.Tuple(elts=values) if len(names) == len(values):
            return [
                name.id
                for name, part in zip(names, values, strict=True)
                if isinstance(name, ast.Name) and any(inner is node for inner in ast.walk(part))
            ]
        case _:
            return []


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
