"""Assemble the notebook from kaggle_cells/, check that it is up to date, or run it.

    python build_notebook.py                 build notebooks/deepfake_detection.ipynb
    python build_notebook.py check           exit 1 and show the difference if it is stale
    python build_notebook.py run demo        run it on the demo set, in minutes on a laptop's CPU
    python build_notebook.py run t4x2 -p DATA_DIR /data/ff-c23 -p SEED 1 --output runs/seed1

`run` takes the name of a set in notebooks/params/ or any YAML file of parameters. The executed notebook and
everything that it wrote are left in one folder.
"""

import argparse
import difflib
import os
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import yaml

ROOT = Path(__file__).resolve().parent
CELLS = ROOT / "kaggle_cells"
NOTEBOOK = ROOT / "notebooks" / "deepfake_detection.ipynb"
PARAMETER_SETS = ROOT / "notebooks" / "params"
SOURCE_KEY = "deepfake_source"  # metadata of a notebook cell: the file that it came from


class Failure(Exception):
    """Ends the command with exit status 1 and this message."""


def assemble() -> nbformat.NotebookNode:
    """The notebook of the fourteen scripts: no outputs, and the same bytes for the same sources."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for file in sorted(CELLS.glob("cell_*.py")):
        script = jupytext.reads(file.read_text(encoding="utf-8"), fmt="py:percent")
        for number, cell in enumerate(script.cells, 1):
            cell.id = f"{file.stem[:7].replace('_', '-')}-{number:02}"
            cell.metadata.pop("lines_to_next_cell", None)
            cell.metadata = {**cell.metadata, SOURCE_KEY: f"kaggle_cells/{file.name}"}
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
        committed.splitlines(), fresh.splitlines(), "committed notebook", "kaggle_cells", lineterm=""
    )
    raise Failure("\n".join([*lines, "", "The notebook is stale: run python build_notebook.py and commit it."]))


def known_parameters(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """The names that the cell tagged `parameters` assigns, with their types."""
    tagged = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    return dict(re.findall(r"^([A-Z_]+): (\w+) =", tagged.source, flags=re.M))


def read_parameters(source: str, overrides: list[list[str]], known: dict[str, str]) -> dict[str, object]:
    """The parameters of a set or file, with overrides as (NAME, VALUE) texts. Raises Failure for unknown names."""
    file = PARAMETER_SETS / f"{source}.yaml"
    if not file.exists():
        file = Path(source)
    if not file.is_file():
        sets = ", ".join(sorted(path.stem for path in PARAMETER_SETS.glob("*.yaml")))
        raise Failure(f"{source!r} is neither a parameter set ({sets}) nor a file")
    try:
        parameters = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        parameters |= {name: v if known.get(name) == "str" else yaml.safe_load(v) for name, v in overrides}
    except (yaml.YAMLError, TypeError) as error:
        raise Failure(f"{file} and -p must give NAME: VALUE pairs: {error}") from error
    for name in parameters:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            guess = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise Failure(f"{name} is no parameter; {guess}")
    return parameters


def run(source: str, overrides: list[list[str]], output: Path | None) -> None:
    """Execute the notebook with papermill in one run folder. Raises Failure with the failing cell's file."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a warning about frozen modules, in every kernel
    os.environ.setdefault("TQDM_DISABLE", "1")  # a saved notebook keeps every bar as it first appeared, at 0 %
    import papermill
    from nbclient.exceptions import DeadKernelError

    notebook = assemble()
    parameters = read_parameters(source, overrides, known_parameters(notebook))
    if output and parameters.get("WORK_DIR"):
        raise Failure(f"--output {output} and WORK_DIR {parameters['WORK_DIR']} both name the run's folder: give one")
    name = f"{Path(source).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = (output or Path(parameters.get("WORK_DIR") or ROOT / "runs" / name)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parameters["WORK_DIR"] = str(folder)
    assembled, executed = folder / ".assembled.ipynb", folder / NOTEBOOK.name
    written = executed.with_suffix(".unfinished.ipynb") if executed.exists() else executed  # the old one is kept so far
    again = f"To go on with it, run the same again with --output {folder}"
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
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns that its own loopback traffic is plain
        )
    except papermill.PapermillExecutionError as error:
        failed = nbformat.read(written, as_version=4)
        cell = next(c for c in failed.cells if any(o.output_type == "error" for o in c.get("outputs", [])))
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
    print(f"\nFinished in {time.time() - started:.0f} s. Look at\n  {executed}  (the notebook with all figures)")
    for name in ("results/experiment_report.txt", "results/predictions.csv", "models/best_model.pth"):
        if (folder / name).exists():
            print(f"  {folder / name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="build | check | run")
    commands.add_parser("build", help="assemble the notebook (the default)")
    commands.add_parser("check", help="fail if the committed notebook is stale")
    runner = commands.add_parser("run", help="execute the notebook")
    runner.add_argument("parameters", help="a set in notebooks/params/, or a YAML file")
    runner.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    runner.add_argument("--output", type=Path, help="the run's folder (default: runs/NAME-TIME)")
    arguments = parser.parse_args()
    try:
        if arguments.command == "check":
            check()
        elif arguments.command == "run":
            run(arguments.parameters, arguments.p, arguments.output)
        else:
            build()
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
