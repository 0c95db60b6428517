"""Tutorials: scripts in ``docs/tutorials`` that become pages of the site, with what they printed and drew.

A tutorial is a jupytext script in the percent format. When mkdocs builds the site, `on_files` adds a page for each. The
site runs nothing: this file, run as a script, runs the tutorials and stores their outputs, with the date and machine:

    make tutorials                                   # all
    python docs/hooks/tutorials.py train_and_search  # one

Outputs are shown only beside the code that made them. If code changes, they are not shown, and the build warns.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import platform
import re
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import jupytext

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = ("pretrain_on_gpu",)  # tutorials that are also stored as notebooks
log = logging.getLogger("mkdocs.hooks.tutorials")  # mkdocs counts the warnings of its loggers


def cells_of(script: Path) -> list[Any]:
    """Cells of a tutorial, with ``cell_type`` and ``source``."""
    cells: list[Any] = jupytext.read(script).cells
    return cells


def code_hash(cells: list[Any]) -> str:
    """Changes with the code of a tutorial, and not with its text."""
    code = "\0".join(cell.source for cell in cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def notebook(script: Path) -> str:
    """The tutorial as a notebook without outputs; the same script gives the same text."""
    document = jupytext.read(script)
    for number, cell in enumerate(document.cells):
        cell["id"] = f"cell-{number}"  # else random
    return str(jupytext.writes(document, fmt="ipynb"))


def page(script: Path) -> str:
    """The tutorial as Markdown: its text, its code and, if the code has not changed since, the outputs of its run."""
    cells = cells_of(script)
    stored = FOLDER / "outputs" / f"{script.stem}.json"
    run = json.loads(stored.read_text()) if stored.exists() else None
    if run is not None and run["code"] != code_hash(cells):
        log.warning(f"tutorials/{script.name}: its stored outputs are of other code; run docs/hooks/tutorials.py")
        run = None
    heading, _, text = cells[0].source.partition("\n")
    parts = [heading, _how_to_run(script, run), text.strip()]
    for number, cell in enumerate(cells[1:], start=1):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        output = {} if run is None else run["outputs"].get(str(number), {})
        if output.get("text"):
            parts.append(f'```text title="Output"\n{output["text"]}```')
        parts += [f"![Figure of the code above]({figure})" for figure in output.get("figures", [])]
    return "\n\n".join(parts) + "\n"


def _how_to_run(script: Path, run: dict[str, Any] | None) -> str:
    lines = [f"This page is the script [{script.name}]({script.name}). In a checkout, run it with"]
    lines.append(f"```\npython docs/tutorials/{script.name}\n```")
    if script.stem in NOTEBOOKS:
        lines.append(f"or open it as a notebook: [{script.stem}.ipynb]({script.stem}.ipynb).")
    if run is not None:
        lines.append(f"The outputs are those of a run on {run['date']}: {run['machine']}, {run['seconds']} s.")
    return "\n\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs with the files of the site; adds the pages."""
    from mkdocs.structure.files import File

    for script in sorted(FOLDER.glob("*.py")):
        files.append(File.generated(config, f"tutorials/{script.stem}.md", content=page(script)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the source of each page; the list links to scripts, which GitHub has, as to pages."""
    if page.file.src_uri != "tutorials/index.md":
        return markdown
    return re.sub(r"\]\((\w+)\.py\)", r"](\1.md)", markdown)


def store_outputs(script: Path) -> None:
    """Run a tutorial cell by cell, and store what every cell prints and draws."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells, names, outputs = cells_of(script), {"__name__": "__main__"}, {}
    started = time.perf_counter()
    for number, cell in enumerate(cells):
        if cell.cell_type != "code" or cell.source.startswith("%"):  # magics of notebooks
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(cell.source, f"{script.name}, cell {number}", "exec"), names)
        figures = []
        for shown in pyplot.get_fignums():
            name = f"figures/{script.stem}-{number}-{shown}.png"
            (FOLDER / name).parent.mkdir(exist_ok=True)
            pyplot.figure(shown).savefig(FOLDER / name, dpi=80)
            figures.append(name)
        pyplot.close("all")
        if printed.getvalue() or figures:
            outputs[str(number)] = {"text": printed.getvalue(), "figures": figures}
    run = {
        "code": code_hash(cells),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}",
        "seconds": round(time.perf_counter() - started),
        "outputs": outputs,
    }
    stored = FOLDER / "outputs" / f"{script.stem}.json"
    stored.parent.mkdir(exist_ok=True)
    stored.write_text(json.dumps(run, indent=1) + "\n")


def main(names: list[str]) -> None:
    """Run the named tutorials, or all; write the notebooks."""
    for name in NOTEBOOKS:
        (FOLDER / f"{name}.ipynb").write_text(notebook(FOLDER / f"{name}.py"))
    for script in sorted(FOLDER.glob("*.py")):
        if not names or script.stem in names:
            print(script.stem, flush=True)
            store_outputs(script)


if __name__ == "__main__":
    main(sys.argv[1:])
