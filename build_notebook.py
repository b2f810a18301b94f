"""Assemble the notebook from kaggle_cells/, check that it is up to date, run it, or take edits back from it.

    python build_notebook.py                 build notebooks/deepfake_detection.ipynb
    python build_notebook.py check           exit 1 and show the difference if it is stale
    python build_notebook.py run demo        run it on the demo set, in minutes on a laptop's CPU
    python build_notebook.py run t4x2 -p DATA_DIR /data/ff-c23 -p SEED 1 --output runs/seed1
    python build_notebook.py import EDITED.ipynb --dry-run    show what edits made on Kaggle would change here
    python build_notebook.py import EDITED.ipynb              change it

`run` takes the name of a set in notebooks/params/ or any YAML file of parameters. The executed notebook and
everything that it wrote are left in one folder.

`import` takes changed, new and deleted cells; outputs, magics and parameters that papermill injected are left out.
"""

import argparse
import ast
import difflib
import hashlib
import os
import re
import sys
import time
from itertools import zip_longest
from pathlib import Path

import jupytext
import nbformat
import yaml

ROOT = Path(__file__).resolve().parent
CELLS = ROOT / "kaggle_cells"
NOTEBOOK = ROOT / "notebooks" / "deepfake_detection.ipynb"
PARAMETER_SETS = ROOT / "notebooks" / "params"
FORMAT = {
    "extension": ".py",
    "format_name": "percent",
    "comment_magics": False,
}  # a comment stays one: # %matplotlib
SOURCE_KEY = "deepfake_source"  # metadata of a notebook cell: the file that it came from
BASE_KEY = "deepfake_base"  # metadata of a notebook: a digest of the scripts that it was built from


class Failure(Exception):
    """Ends the command with exit status 1 and this message."""


def script_texts() -> dict[str, str]:
    """The scripts, in order, by the name of their file."""
    return {file.name: file.read_text(encoding="utf-8") for file in sorted(CELLS.glob("cell_*.py"))}


def assemble() -> nbformat.NotebookNode:
    """The notebook of the fourteen scripts: no outputs, and the same bytes for the same sources."""
    texts, notebook = script_texts(), nbformat.v4.new_notebook()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        BASE_KEY: hashlib.sha256("\n".join(texts.values()).encode()).hexdigest()[:16],
    }
    for name, text in texts.items():
        for number, cell in enumerate(jupytext.reads(text, fmt=FORMAT).cells, 1):
            cell.id = f"{name[:7].replace('_', '-')}-{number:02}"
            cell.metadata.pop("lines_to_next_cell", None)
            cell.metadata = {**cell.metadata, SOURCE_KEY: f"kaggle_cells/{name}"}
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            notebook.cells.append(cell)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    return notebook


def as_text(notebook: nbformat.NotebookNode) -> str:
    return nbformat.writes(notebook, version=4, indent=1) + "\n"


def build() -> None:
    notebook = assemble()
    NOTEBOOK.write_text(as_text(notebook), encoding="utf-8", newline="\n")
    print(f"{NOTEBOOK.relative_to(ROOT)}: {len(notebook.cells)} cells")


def check() -> None:
    """Raises Failure with a diff if the committed notebook is not what the scripts give."""
    if not NOTEBOOK.exists():
        raise Failure(f"{NOTEBOOK} is missing: run python build_notebook.py")
    committed, fresh = NOTEBOOK.read_text(encoding="utf-8"), as_text(assemble())
    if committed == fresh:
        print(f"{NOTEBOOK.relative_to(ROOT)} is up to date")
        return
    lines = difflib.unified_diff(
        committed.splitlines(),
        fresh.splitlines(),
        "committed notebook",
        "kaggle_cells",
        lineterm="",
    )
    raise Failure(
        "\n".join(
            [*lines, "", "The notebook is stale: run python build_notebook.py and commit it."]
        )
    )


# Edits come back


def without_magics(source: str) -> str:
    """Python alone: no lines for IPython or the shell (`%`, `!`, `?`), nothing of a cell in another language."""
    if not why_no_python(source):
        return source
    cell_magic = re.match(r"\s*%%(\w*)", source)
    if cell_magic and cell_magic[1] not in ("time", "timeit", "capture", "prun"):
        return ""
    return re.sub(r"^\s*(?:[%!?](?:.*\\\n)*.*|[\w.]+\?{1,2}\s*)(?:\n|\Z)", "", source, flags=re.M)


def why_no_python(source: str) -> str:
    """What a script may not hold of this, empty if nothing; `await` outside functions is for notebooks alone."""
    try:
        compile(source, "cell", "exec")
    except SyntaxError as error:
        return f"{source.splitlines()[(error.lineno or 1) - 1].strip()!r}: {error.msg}"
    return ""


def is_injected(cell: nbformat.NotebookNode, known: dict[str, str]) -> bool:
    """Whether papermill added this cell: parameters, or the notice of an error."""
    if {"injected-parameters", "papermill-error-cell-tag"} & {*(cell.metadata.get("tags") or [])}:
        return True
    if not cell.source.startswith("# Parameters\n") or why_no_python(cell.source):
        return False
    lines = ast.parse(cell.source).body
    return all(
        isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") in known
        for line in lines
    )


def in_short(number: int, cell: nbformat.NotebookNode) -> str:
    """How a person finds this cell of a notebook."""
    return f"notebook cell {number} ({cell.source.strip().splitlines()[0][:60]!r})"


def read_edited(
    path: Path, known: dict[str, str]
) -> tuple[list[nbformat.NotebookNode], list[str], str]:
    """The cells of a notebook that belong into scripts, what was left out, and the digest of what it was built from.

    A file that was pasted into one cell becomes its cells again. Raises Failure for what is no notebook or no Python.
    """
    try:
        notebook = nbformat.convert(nbformat.reader.reads(path.read_text(encoding="utf-8")), 4)
        found = list(notebook.cells)
    except (OSError, ValueError, AttributeError, nbformat.ValidationError) as error:
        raise Failure(f"{path} cannot be read as a notebook: {error}") from error
    cells, left_out = [], []
    for number, cell in enumerate(found, 1):
        cell.source = cell.source.replace("\r\n", "\n").rstrip()
        parts = [cell]
        if cell.cell_type == "code" and re.search(r"^# %%", cell.source, flags=re.M):
            parts = jupytext.reads(cell.source, fmt=FORMAT).cells
        for part in parts:
            part.metadata = {**part.metadata, **cell.metadata, "number": number}
            if not part.source.strip():
                continue
            if is_injected(part, known):
                left_out.append(f"{in_short(number, part)}: as papermill adds them")
                continue
            if part.get("attachments"):
                raise Failure(
                    f"{in_short(number, part)} holds pictures, which scripts cannot: link to them instead"
                )
            python = (
                without_magics(part.source).rstrip() if part.cell_type == "code" else part.source
            )
            if part.cell_type == "code" and (reason := why_no_python(python)):
                raise Failure(
                    f"{in_short(number, part)} is no Python, even without magics: {reason}. Mend it there"
                )
            if python != part.source:
                left_out.append(
                    f"{in_short(number, part)}: {'all of it' if not python else 'lines'} for IPython"
                )
                part.source = python
            if part.source.strip():
                cells.append(part)
    return cells, left_out, notebook.metadata.get(BASE_KEY, "")


def likeness(first: str, second: str) -> float:
    """From 0, no word in common, to 1."""
    matcher = difflib.SequenceMatcher(None, first.split(), second.split(), autojunk=False)
    return (
        matcher.ratio() if matcher.real_quick_ratio() > 0.6 and matcher.quick_ratio() > 0.6 else 0.0
    )


def match(
    cells: list[nbformat.NotebookNode], originals: list[nbformat.NotebookNode]
) -> dict[int, int]:
    """Which original each cell is, by their places in the lists: by text, by id, else the most alike; each only once.

    A cell that names its file is matched within that file; without, the original must be the only one or stand out.
    """
    of: dict[int, int] = {}

    def free(cell: nbformat.NotebookNode) -> list[int]:
        file = cell.metadata.get(SOURCE_KEY)
        return [
            place
            for place, original in enumerate(originals)
            if place not in of.values()
            and original.cell_type == cell.cell_type
            and file in (None, original.metadata[SOURCE_KEY])
        ]

    def files(places: list[int]) -> set[str]:
        return {originals[place].metadata[SOURCE_KEY] for place in places}

    for number, cell in enumerate(cells):
        same = [place for place in free(cell) if originals[place].source == cell.source]
        if len(files(same)) == 1:
            of[number] = same[0]
    for number, cell in enumerate(cells):
        if number not in of and SOURCE_KEY in cell.metadata:
            by_id = [place for place in free(cell) if originals[place].id == cell.get("id")]
            of |= {number: by_id[0]} if by_id else {}
    alike = []
    for number, cell in enumerate(cells):
        if number not in of:
            scores = {place: likeness(cell.source, originals[place].source) for place in free(cell)}
            best = max(scores.values(), default=0)
            rivals = [place for place, score in scores.items() if score > max(0.6, best - 0.1)]
            if len(files(rivals)) == 1:
                alike += [(scores[place], number, place) for place in rivals]
    for _, number, place in sorted(alike, reverse=True):
        if number not in of and place not in of.values():
            of[number] = place
    return of


def in_order(numbers: list[int]) -> set[int]:
    """The places of as many numbers as can stay so that none is smaller than one before it."""
    longest: set[int] = set()
    runs: list[list[int]] = [[]]
    for place, number in enumerate(numbers):
        runs.append(
            [*max((run for run in runs if not run or numbers[run[-1]] <= number), key=len), place]
        )
        longest = max(longest, {*runs[-1]}, key=len)
    return longest


def place_cells(
    cells: list[nbformat.NotebookNode], originals: list[nbformat.NotebookNode], of: dict[int, int]
) -> list[str]:
    """The file of each cell: the one it comes from, or for new and moved cells that of the cell before.

    Raises Failure where that is not clear, or where a file would be left without cells.
    """
    files = list(dict.fromkeys(original.metadata[SOURCE_KEY] for original in originals))
    home: list[str | None] = []
    for number, cell in enumerate(cells):
        file = cell.metadata.get(SOURCE_KEY) or (
            originals[of[number]].metadata[SOURCE_KEY] if number in of else None
        )
        if file and file not in files:
            raise Failure(
                f"{in_short(cell.metadata['number'], cell)} comes from {file}, which is not here"
            )
        home.append(file)
    known = [number for number, file in enumerate(home) if file]
    if not known:
        raise Failure("No cell of this notebook is known here: it was not made from these scripts")
    steady = {known[place] for place in in_order([files.index(home[number]) for number in known])}
    homes: list[str] = []
    file = home[min(steady)] or ""
    for number, cell in enumerate(cells):
        if number in steady:
            file = home[number] or ""
        elif home[number] is None:
            after = min((other for other in steady if other > number), default=number)
            started = (
                after in of
                and of[after]
                and originals[of[after] - 1].metadata[SOURCE_KEY] == home[after]
            )
            if SOURCE_KEY not in cells[after].metadata and home[after] != file and started:
                raise Failure(
                    f"{in_short(cell.metadata['number'], cell)} may be new at the end of {file}, or stand for the "
                    f"beginning of {home[after]}, which is gone: put that beginning back, or edit the scripts"
                )
        homes.append(file)
    if lost := [file for file in files if file not in homes]:
        raise Failure(
            f"Nothing is left of {', '.join(lost)}: each script needs a cell. Import the whole notebook"
        )
    return homes


def import_edits(path: Path, dry_run: bool) -> None:
    """Make the scripts those of an edited notebook, and show what changes. Raises Failure, or writes all of it."""
    before, base = script_texts(), assemble()
    cells, left_out, built_from = read_edited(path, known_parameters(base))
    of = match(cells, base.cells)
    homes = place_cells(cells, base.cells, of)
    if not any("parameters" in base.cells[place].metadata.get("tags", []) for place in of.values()):
        raise Failure(
            "The cell of parameters, in section 2, is gone or not to be recognised: papermill needs it"
        )
    texts: dict[str, str] = {}
    difference: list[str] = []
    summary: list[str] = []
    for name in before:
        script = jupytext.reads(before[name], fmt=FORMAT)
        here = [number for number, home in enumerate(homes) if home == f"kaggle_cells/{name}"]
        mine = [
            place
            for place, cell in enumerate(base.cells)
            if cell.metadata[SOURCE_KEY] == f"kaggle_cells/{name}"
        ]
        own, script.cells = dict(zip(mine, script.cells, strict=True)), []
        for number in here:
            tags = cells[number].metadata.get("tags")
            metadata = (
                own[of[number]].metadata
                if of.get(number) in own
                else {"tags": tags}
                if tags
                else {}
            )
            create = getattr(nbformat.v4, f"new_{cells[number].cell_type}_cell")
            script.cells.append(create(cells[number].source, metadata=metadata))
        texts[name] = jupytext.writes(script, fmt=FORMAT)
        wanted = [(cells[number].cell_type, cells[number].source) for number in here]
        kept = [
            (cell.cell_type, cell.source) for cell in jupytext.reads(texts[name], fmt=FORMAT).cells
        ]
        if wanted != kept:
            odd = next(
                n
                for n, pair in zip(here, zip_longest(wanted, kept), strict=False)
                if pair[0] != pair[1]
            )
            raise Failure(
                f"{in_short(cells[odd].metadata['number'], cells[odd])} would not be the same after a build"
            )
        if texts[name] == before[name]:
            continue
        counts = {
            "changed": sum(
                of.get(n) in own and cells[n].source != base.cells[of[n]].source for n in here
            ),
            "new": sum(n not in of for n in here),
            "moved here": sum(n in of and of[n] not in own for n in here),
            "moved away": sum(place in mine and n not in here for n, place in of.items()),
            "deleted": sum(place not in of.values() for place in mine),
        }
        words = [f"{count} {what}" for what, count in counts.items() if count] or [
            "in another order"
        ]
        summary.append(f"kaggle_cells/{name}: {', '.join(words)}")
        old, new = f"a/kaggle_cells/{name}", f"b/kaggle_cells/{name}"
        difference += difflib.unified_diff(
            before[name].splitlines(), texts[name].splitlines(), old, new, lineterm=""
        )
    for line in [*difference, *(f"Left out: {line}" for line in left_out), *summary]:
        print(line)
    if not summary:
        print(f"Nothing to do: the scripts are those of {path}")
        return
    if built_from != base.metadata[BASE_KEY]:
        made_from = "other scripts than these" if built_from else "scripts that it does not name"
        print(
            f"Note: the notebook was made from {made_from}. What the diff takes away may be newer work: look at it."
        )
    if dry_run:
        print("A dry run: nothing was written.")
        return
    for name, text in texts.items():
        (CELLS / name).write_text(text, encoding="utf-8", newline="\n")
    print(
        "Written. Now: ruff check . && ruff format . && python build_notebook.py && python -m pytest"
    )


# Runs


def known_parameters(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """The names that the cell tagged `parameters` assigns, with their types."""
    tagged = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    return dict(re.findall(r"^([A-Z_]+): (\w+) =", tagged.source, flags=re.M))


def read_parameters(source: str, overrides: list[list[str]], known: dict[str, str]) -> dict:
    """The parameters of a set or file, with overrides as (NAME, VALUE) texts. Raises Failure for unknown names."""
    file = PARAMETER_SETS / f"{source}.yaml"
    if not file.exists():
        file = Path(source)
    if not file.is_file():
        sets = ", ".join(sorted(path.stem for path in PARAMETER_SETS.glob("*.yaml")))
        raise Failure(f"{source!r} is neither a parameter set ({sets}) nor a file")
    try:
        parameters = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        parameters |= {
            name: v if known.get(name) == "str" else yaml.safe_load(v) for name, v in overrides
        }
    except (yaml.YAMLError, TypeError) as error:
        raise Failure(f"{file} and -p must give NAME: VALUE pairs: {error}") from error
    for name in parameters:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            guess = f"is it {near[0]}?" if near else f"there are {', '.join(known)}"
            raise Failure(f"{name} is no parameter; {guess}")
    return parameters


def run(source: str, overrides: list[list[str]], output: Path | None) -> None:
    """Execute the notebook with papermill in one run folder. Raises Failure with the failing cell's file."""
    os.environ.setdefault(
        "PYDEVD_DISABLE_FILE_VALIDATION", "1"
    )  # a warning about frozen modules, in every kernel
    import papermill
    from nbclient.exceptions import DeadKernelError

    notebook = assemble()
    parameters = read_parameters(source, overrides, known_parameters(notebook))
    if output and parameters.get("WORK_DIR"):
        raise Failure(
            f"--output {output} and WORK_DIR {parameters['WORK_DIR']} both name the run's folder: give one"
        )
    name = f"{Path(source).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = (output or Path(parameters.get("WORK_DIR") or ROOT / "runs" / name)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parameters["WORK_DIR"] = str(folder)
    assembled, executed = folder / ".assembled.ipynb", folder / NOTEBOOK.name
    written = (
        executed.with_suffix(".unfinished.ipynb") if executed.exists() else executed
    )  # the old one is kept so far
    again = f"To go on, with what was wrong put right, run the same again with --output {folder}"
    assembled.write_text(as_text(notebook), encoding="utf-8")
    print(f"Running {len(notebook.cells)} cells in {folder}", flush=True)
    started = time.time()
    try:
        papermill.execute_notebook(
            str(assembled),
            str(written),
            parameters,
            kernel_name="python3",
            stdout_file=sys.stdout,
            progress_bar=sys.stderr.isatty(),
            extra_arguments=[
                "--IPKernelApp.log_level=ERROR"
            ],  # it warns that its own loopback traffic is plain
        )
    except papermill.PapermillExecutionError as error:
        failed = nbformat.read(written, as_version=4)
        cell = next(
            c for c in failed.cells if any(o.output_type == "error" for o in c.get("outputs", []))
        )
        raise Failure(
            f"{error.ename}: {error.evalue}\n\nThe cell that failed is in "
            f"{cell.metadata.get(SOURCE_KEY, 'the parameters given')}. "
            f"The notebook up to it, with the whole traceback: {written}\n{again}"
        ) from error
    except KeyboardInterrupt as error:
        raise Failure(f"\nStopped. {again}") from error
    except DeadKernelError as error:
        raise Failure(
            f"The notebook's process died, most likely for lack of memory. As far as it came: {written}\n{again}"
        ) from error
    finally:
        assembled.unlink(missing_ok=True)
    os.replace(written, executed)
    print(
        f"\nFinished in {time.time() - started:.0f} s. Look at\n  {executed}  (the notebook with all figures)"
    )
    for name in (
        "results/experiment_report.txt",
        "results/predictions.csv",
        "models/best_model.pth",
    ):
        if (folder / name).exists():
            print(f"  {folder / name}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="build | check | run | import")
    commands.add_parser("build", help="assemble the notebook (the default)")
    commands.add_parser("check", help="fail if the committed notebook is stale")
    runner = commands.add_parser("run", help="execute the notebook")
    runner.add_argument("parameters", help="a set in notebooks/params/, or a YAML file")
    runner.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter",
    )
    runner.add_argument("--output", type=Path, help="the run's folder (default: runs/NAME-TIME)")
    importer = commands.add_parser(
        "import", help="take the edits in a notebook back into the scripts"
    )
    importer.add_argument(
        "notebook",
        type=Path,
        help="the edited notebook, as downloaded from Kaggle or saved by Jupyter",
    )
    importer.add_argument(
        "--dry-run", action="store_true", help="show what would change, and write nothing"
    )
    arguments = parser.parse_args()
    try:
        if arguments.command == "check":
            check()
        elif arguments.command == "run":
            run(arguments.parameters, arguments.p, arguments.output)
        elif arguments.command == "import":
            import_edits(arguments.notebook, arguments.dry_run)
        else:
            build()
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
