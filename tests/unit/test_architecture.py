"""The rules of the tree: core is free of frameworks, and errors are documented.

Run: python -m pytest tests/unit/test_architecture.py
"""

import re
import subprocess
import sys

from core.errors import CODES, PippinError
from core.paths import PROJECT_ROOT


def test_importing_all_of_core_and_the_entry_points_imports_no_framework():
    code = (
        "import sys, pkgutil, importlib\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import core, backends, train, convert, generate, pippin.__main__\n"
        "for m in pkgutil.walk_packages(core.__path__, 'core.'): importlib.import_module(m.name)\n"
        "bad = {'torch', 'mlx', 'matplotlib', 'tensorboard', 'datasets'} & set(sys.modules)\n"
        "print(sorted(bad))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(PROJECT_ROOT)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_core_names_no_framework_even_inside_a_function():
    found = []
    for path in (PROJECT_ROOT / "core").rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.match(r"\s*(import|from)\s+(torch|mlx)\b", line):
                found.append(f"{path}:{number}")
    assert not found


def test_every_error_code_has_an_entry_in_the_troubleshooting_page():
    page = (PROJECT_ROOT / "docs" / "troubleshooting.md").read_text()
    missing = [code for code in CODES if f"### {code} " not in page]
    assert not missing


def test_the_troubleshooting_page_explains_as_pippin_explain_does():
    page = (PROJECT_ROOT / "docs" / "troubleshooting.md").read_text()
    entries = re.findall(r"^### (P\d{3}) (.*)\n\n(.*)\n\n\*\*What to do\.\*\* ", page, re.MULTILINE)
    assert {code: (title, text) for code, title, text in entries} == CODES


def test_every_code_that_is_raised_exists_and_every_code_is_raised():
    used = set()
    for folder in ("core", "backends", "tools"):
        for path in (PROJECT_ROOT / folder).rglob("*.py"):
            if path.name != "errors.py":
                used |= set(re.findall(r'"(P\d{3})"', path.read_text()))
    for name in ("train.py", "convert.py", "generate.py"):
        used |= set(re.findall(r'"(P\d{3})', (PROJECT_ROOT / name).read_text()))
    assert used == set(CODES)


def test_an_error_renders_all_its_parts_in_order():
    error = PippinError(
        "P201", "no text.", found="a\nb", choices=("c", "d"), remedy="do it", kept="kept."
    )
    assert error.render().splitlines() == [
        "P201 no text.",
        "  a",
        "  b",
        "  available: c, d",
        "  try: do it",
        "  kept.",
    ]
