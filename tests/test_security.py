"""Nothing gets in by a file: what the package may call, and with what. Each rule is shown to catch an offence."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = list((ROOT / "spo_fast").rglob("*.py"))


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


def keywords(call: ast.Call) -> dict[str, str]:
    return {k.arg or "**": ast.unparse(k.value) for k in call.keywords}


def loads_pickles(call: ast.Call) -> bool:
    if name_of(call) == "torch.load":
        return keywords(call).get("weights_only") != "True"
    return name_of(call).split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib")


def loads_unsafe_yaml(call: ast.Call) -> bool:
    if name_of(call) in ("yaml.compose", "yaml.parse", "yaml.scan"):
        return keywords(call).get("Loader") not in ("yaml.SafeLoader", "SafeLoader")
    return name_of(call) in ("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load")


def trusts_remote_code(call: ast.Call) -> bool:
    return keywords(call).get("trust_remote_code", "False") != "False" or "custom_pipeline" in keywords(call)


def runs_text(call: ast.Call) -> bool:
    run_by_shell = name_of(call).startswith("subprocess.") and keywords(call).get("shell", "False") != "False"
    return name_of(call) in ("eval", "exec", "os.system", "os.popen") or run_by_shell


RULES: dict[Callable[[ast.Call], bool], list[str]] = {
    loads_pickles: ["torch.load(f)", "torch.load(f, weights_only=False)", "pickle.loads(b)"],
    loads_unsafe_yaml: ["yaml.load(t)", "yaml.unsafe_load(t)", "yaml.compose(t, Loader=yaml.Loader)"],
    trusts_remote_code: ["A.from_pretrained(p, trust_remote_code=True)", "load(p, custom_pipeline='x')"],
    runs_text: ["eval(t)", "os.system(t)", "subprocess.run(t, shell=True)"],
}


def offences(rule: Callable[[ast.Call], bool], text: str) -> list[str]:
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    return [f"line {call.lineno}: {ast.unparse(call)}" for call in calls if rule(call)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_call_lets_code_in(rule: Callable[[ast.Call], bool]) -> None:
    assert all(offences(rule, bad) for bad in RULES[rule])
    assert len(SOURCES) > 50
    found = {str(p.relative_to(ROOT)): offences(rule, p.read_text(encoding="utf-8")) for p in SOURCES}
    assert not {path: bad for path, bad in found.items() if bad}
