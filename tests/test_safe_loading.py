"""Nothing from outside is unpickled or run: read from the code itself, so that a new way in cannot be forgotten.

Configurations, prompts, votes, models and checkpoints come from people; they are parsed with pydantic, JSON, Arrow,
safetensors and YAML's safe loader. What actors send each other inside a cluster Ray pickles itself: that is what its
token and the firewall guard (docs/cluster.md).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("contracts", "models", "feedback", "actors", "learner", "serving", "cluster", "examples", "benchmarks")

# Modules that rebuild any object from bytes, running what the bytes say.
UNPICKLING = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
# Functions that unpickle, or run text, whatever their arguments.
UNSAFE = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "pandas.read_pickle",
    "ray.cloudpickle.load",
    "ray.cloudpickle.loads",
    "shutil.unpack_archive",
    "torch.distributed.checkpoint.load",
    "torch.distributed.checkpoint.FileSystemReader",
    "torch.distributed.checkpoint.DefaultLoadPlanner",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
}
# Functions that are safe with one keyword only, given as this very constant.
SAFE_WITH = {"torch.load": ("weights_only", True)}
# Keywords that make a safe function unsafe, with any value but these.
SAFE_VALUES = {"trust_remote_code": False, "allow_pickle": False, "shell": False, "weights_only": True}
# What is used all the same, and why that is right.
WITHIN_LIMITS = {
    "learner/plain_state.py import pickle": "an Unpickler that builds records of checkpoints only",
    "learner/plain_state.py torch.distributed.checkpoint.DefaultLoadPlanner": "it looks at each value before",
    "learner/plain_state.py torch.distributed.checkpoint.FileSystemReader": "with that Unpickler",
    "learner/rank_state.py torch.distributed.checkpoint.load": "with that reader and planner",
}
YAML_SAFE = {"safe_load", "safe_load_all", "safe_dump", "safe_dump_all", "YAMLError", "SafeLoader"}


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of everything in a module that can run what a file says."""
    tree = ast.parse(source)
    names = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in modules_of(node):
                if UNPICKLING & set(module.split(".")):
                    yield node.lineno, f"import {module}"
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = dotted(node, names)
            module, _, member = name.rpartition(".")
            if name in UNSAFE or (module == "yaml" and member not in YAML_SAFE):
                yield node.lineno, name
        if isinstance(node, ast.Call):
            yield from dangers_of_call(node, dotted(node.func, names))


def dangers_of_call(call: ast.Call, name: str) -> Iterator[tuple[int, str]]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    for keyword, safe in SAFE_VALUES.items():
        value = given.get(keyword)
        if value is not None and not (isinstance(value, ast.Constant) and value.value is safe):
            yield call.lineno, f"{name}({keyword}={ast.unparse(value)})"
    if name in SAFE_WITH and SAFE_WITH[name][0] not in given:
        yield call.lineno, f"{name} without {SAFE_WITH[name][0]}"
    if name.endswith(".extractall") and "filter" not in given:  # an archive may write outside of its folder
        yield call.lineno, f"{name} without filter"


def modules_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    inside = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
    return [inside + alias.name for alias in node.names]


def imported(tree: ast.AST) -> dict[str, str]:
    """What each name that an import binds stands for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`torch.load` of the expression, imports resolved; "" at the front where it begins with another expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    parts.insert(0, names.get(node.id, node.id) if isinstance(node, ast.Name) else "")
    return ".".join(parts)


def sources() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def test_nothing_from_outside_is_unpickled_or_run() -> None:
    """Nor is an exception kept that the code no longer needs: it would excuse the next."""
    found = {
        f"{path.relative_to(ROOT)} {what}"
        for path in sources()
        for _, what in dangers(path.read_text(encoding="utf-8"))
    }
    assert found == WITHIN_LIMITS.keys()


def test_a_sharded_checkpoint_is_only_read_within_limits() -> None:
    source = (ROOT / "learner" / "rank_state.py").read_text(encoding="utf-8")
    loads = [
        call
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "dcp.load"
    ]
    given = [{keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords} for call in loads]
    assert given == [{"storage_reader": "PlainReader(folder / 'learner')", "planner": "PlainPlanner()"}]


def test_the_parsers_that_are_known_to_be_there_are_read() -> None:
    """What the test reads is not nothing."""
    text = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sources()}
    assert "yaml.safe_load" in text["contracts/loading.py"]
    assert any("safetensors" in source for name, source in text.items() if name.startswith("models/"))
    assert any("from_pretrained" in source for name, source in text.items() if name.startswith("models/"))
    assert any("pyarrow" in source for name, source in text.items() if name.startswith("cluster/"))
    assert len(text) > 80


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "from ray import cloudpickle",
        "import multiprocessing, dill as d",
        "import ray.cloudpickle as p",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "from torch import load as read\nread(path)",
        "import torch\ntorch.jit.load(path)",
        "import torch.distributed.checkpoint as dcp\ndcp.load(state, checkpoint_id=folder)",
        "from torch.distributed.checkpoint import FileSystemReader\nFileSystemReader(folder).read_metadata()",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nyaml.unsafe_load(text)",
        "from yaml import full_load\nfull_load(text)",
        "from yaml import Loader as L\nread(text, L)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import pandas as pd\npd.read_pickle(path)",
        "eval(text)",
        "exec(compile(text, 'x', 'exec'))",
        "list(map(eval, texts))",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=config.trust)",
        "subprocess.run(text, shell=True, timeout=5)",
        "import os\nos.system(text)",
        "tarfile.open(path).extractall(folder)",
    ],
)
def test_a_way_in_is_found(code: str) -> None:
    assert list(dangers(code))


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import yaml\nyaml.safe_load(text)",
        "import numpy as np\nnp.load(path)",
        "model.eval()",
        "self.policy.eval().to(device)",
        "import json\njson.loads(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
        "subprocess.run(['ls'], timeout=5)",
    ],
)
def test_what_is_safe_is_left_alone(code: str) -> None:
    assert list(dangers(code)) == []
