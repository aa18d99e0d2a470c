"""The reference page of every setting: `python -m mlplatform.local.docs_settings > docs/settings.md`.

Belongs here: from the two settings classes to Markdown. Does not belong here: what a setting means (its description says).
The service's settings are read from its source, without importing it: the platform knows the service as a process only.
"""

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from mlplatform.settings import Settings

PREFIX = "MLPLATFORM_"
SERVING = "serving_app.settings"


@dataclass(frozen=True)
class Setting:
    """One environment variable. `default` as a person would write it; empty where there is none."""

    variable: str
    default: str
    description: str


def platform_settings() -> list[Setting]:
    """The settings of pipelines and CLI, in declared order."""
    found = []
    for name, field in Settings.model_fields.items():
        value = field.default
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        default = "" if value is PydanticUndefined else str(value)
        found.append(Setting(f"{PREFIX}{name.upper()}", default, field.description or ""))
    return found


def serving_settings() -> list[Setting]:
    """The settings of the prediction service, in declared order, read from its source. Raises LookupError where it is not there."""
    spec = importlib.util.find_spec(SERVING)
    if spec is None or spec.origin is None:
        raise LookupError(f"{SERVING} is not installed: run `make install` in the repository")
    tree = ast.parse(Path(spec.origin).read_text())
    return [
        _setting(node)
        for body in (c.body for c in tree.body if isinstance(c, ast.ClassDef))
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "Field"
    ]


def _setting(node: ast.AnnAssign) -> Setting:
    call = node.value
    assert isinstance(call, ast.Call)
    described = next((k.value for k in call.keywords if k.arg == "description"), None)
    description = ast.literal_eval(described) if described is not None else ""
    return Setting(f"{PREFIX}{ast.unparse(node.target).upper()}", _text(call.args[0]), str(description))


def _text(node: ast.expr) -> str:
    """A default's text; what wraps it (`Path(…)`, `SecretStr(…)`) is left away."""
    if isinstance(node, ast.Call) and len(node.args) == 1:
        return _text(node.args[0])
    return str(ast.literal_eval(node))


def page() -> str:
    """The whole page, as it is committed."""
    shared = {s.variable for s in platform_settings()}
    own = [s for s in serving_settings() if s.variable not in shared]
    both = [s.variable for s in serving_settings() if s.variable in shared]
    return "\n".join(
        [
            "# Settings",
            "",
            "<!-- made by `python -m mlplatform.local.docs_settings > docs/settings.md`; a test compares -->",
            "",
            "Every setting is an environment variable. The production profile refuses local defaults that are unsafe there.",
            "",
            "## Platform",
            "",
            *_table(platform_settings()),
            "",
            "## Prediction service",
            "",
            f"It reads these of the above too: {', '.join(f'`{name}`' for name in both)}.",
            "",
            *_table(own),
            "",
        ]
    )


def _table(settings: list[Setting]) -> list[str]:
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for s in settings:
        default = f"`{s.default}`" if s.default else "none"
        lines.append(f"| `{s.variable}` | {default} | {s.description.replace('|', chr(92) + '|')} |")
    return lines


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201  # the command's answer
