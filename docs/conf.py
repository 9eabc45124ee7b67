"""How Sphinx builds the documentation: `nox -s docs`.

What can be read from the source is not written again: the tables of settings and codes are made here,
into docs/_build/generated, and included by the pages; sphinx-click and autodoc make the rest.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx

from broker.config.described import TABLES, described
from broker.errors import CloseCode, ErrorCode, UnsubscribeCode, clients_stay_away
from broker.version import VERSION

project = "trio-broker"
author = copyright = "the trio-broker authors"
release = version = VERSION

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"trio-broker {VERSION}"

# Docstrings write code in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "undoc-members": True}  # every public field
# What a terminal shows before a command is not copied, nor what the command prints.
copybutton_prompt_text = "$ "
nitpicky = True
# References that we write name what is public, `broker.Broker`. Signatures also name where a thing
# is defined, and other projects' types: those have no pages here, and no network is needed.
nitpick_ignore_regex = [(r"py:.*", r"(?!broker\.[A-Za-z]+$).*")]

HERE = Path(__file__).parent
GENERATED = HERE / "_build" / "generated"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines) + "\n"


def _default(value: object) -> str:
    if value is None:
        return "unset"
    if value == "":
        return "unset"
    if isinstance(value, tuple):
        return f"`[{', '.join(repr(item) for item in value)}]`".replace("'", '"')
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int) and value >= 10_000:
        return f"`{value:_}`"
    return f"`{value}`"


def _settings() -> str:
    text = []
    for table in TABLES:
        prefix = f"{table}." if table else ""
        rows: list[list[str]] = []
        if prefix:
            text.append(f"\n## {table.capitalize()}\n")
        for each in described(table):
            if each.field is not None:
                rows.append([f"`{prefix}{each.field.name}`", _default(each.default), each.words])
                continue
            if rows:
                text.append(_table(["setting", "default", "why"], rows))
                rows = []
            text.append(f"\n## {each.words[:1].upper()}{each.words[1:]}\n")
        text.append(_table(["setting", "default", "why"], rows))
    return "\n".join(text)


def _words(name: str) -> str:
    return name.lower().replace("_", " ")


def _codes() -> str:
    errors = [[f"`{e:d}`", e.message, "yes" if e.temporary else ""] for e in ErrorCode]
    unsubscribes = [
        [f"`{u:d}`", _words(u.name), "yes" if u >= 2500 else ""] for u in UnsubscribeCode
    ]
    closes = [
        [
            f"`{c:d}`",
            _words(c.name),
            "" if clients_stay_away(c) else "yes",
        ]
        for c in sorted(CloseCode)
    ]
    return "\n".join(
        [
            "## Error replies\n",
            _table(["code", "message", "asking again may help"], errors),
            "## Ends of a subscription\n",
            _table(["code", "meaning", "official clients subscribe again"], unsubscribes),
            "## Close codes\n",
            _table(["code", "meaning", "official clients come back"], closes),
        ]
    )


def _generate(_: Sphinx) -> None:
    GENERATED.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("settings.md", _settings()),
        ("codes.md", _codes()),
    ):
        (GENERATED / name).write_text(text, encoding="utf-8")


def _escape(app: Sphinx, ctx: object, lines: list[str]) -> None:
    """Help is text for a terminal, in which `BROKER_*` is no markup."""
    lines[:] = [re.sub(r"(?<=\w)_(?!\w)|[*|]", r"\\\g<0>", line) for line in lines]


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", _generate)
    app.connect("sphinx-click-process-description", _escape)
