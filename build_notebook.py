"""Build the notebook from kaggle_cells/, check that it is current, run it, or import edits from it.

    python build_notebook.py                 build notebooks/deepfake_detection.ipynb
    python build_notebook.py check           exit 1 and show the difference if it is stale
    python build_notebook.py run demo        run it on the demo set, in minutes on a laptop's CPU
    python build_notebook.py run t4x2 -p DATA_DIR /data/ff-c23 -p SEED 1 --output runs/seed1
    python build_notebook.py score PATH...   real or fake? Videos, folders, lists; into runs/scores
    python build_notebook.py app             the same in the browser, for one video at a time
    python build_notebook.py import EDITED.ipynb --dry-run    show what its edits would change here
    python build_notebook.py import EDITED.ipynb              apply them to the scripts

`run` takes the name of a set in notebooks/params/ or any YAML file of parameters. The executed
notebook and everything it wrote are left in one folder.

`import` takes changed, new and deleted cells from a notebook edited on Kaggle or in Jupyter;
outputs, magics and parameters that papermill injected are left out.
"""

import argparse
import ast
import difflib
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import yaml

ROOT = Path(__file__).resolve().parent
CELLS = ROOT / "kaggle_cells"
NOTEBOOK = ROOT / "notebooks" / "deepfake_detection.ipynb"
PARAMETER_SETS = ROOT / "notebooks" / "params"
PRETRAINED = ROOT / "pretrained" / "deepfake_detector.pth"
SCORES = ROOT / "runs" / "scores"
DAY = (86400, 86400)  # uploads are looked for and deleted once a day
MANY_FILES = """<p>{} files at once are too many: drop one at a time. For many videos there is
<code>python build_notebook.py score FOLDER</code>.</p>"""
# comment_magics: a comment such as "# %matplotlib inline" stays a comment
FORMAT = {"extension": ".py", "format_name": "percent", "comment_magics": False}
SOURCE_KEY = "deepfake_source"  # notebook cell metadata: the file the cell came from
BASE_KEY = "deepfake_base"  # notebook metadata: a digest of the scripts it was built from
Cell = nbformat.NotebookNode


class Failure(Exception):
    """Ends the command with this message and exit status 1."""

    status = 1


class Stopped(Failure):
    """The same after Ctrl-C."""

    status = 130


def script_texts() -> dict[str, str]:
    """The scripts in order, by file name."""
    return {file.name: file.read_text(encoding="utf-8") for file in sorted(CELLS.glob("cell_*.py"))}


def assemble() -> nbformat.NotebookNode:
    """The notebook without outputs; the same scripts always give the same bytes."""
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
    """Raises Failure with a diff if the committed notebook differs from the scripts."""
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


# Importing edits


def without_magics(source: str) -> str:
    """Python only: no lines for IPython or the shell (`%`, `!`, `?`), no other languages."""
    if not python_error(source):
        return source
    cell_magic = re.match(r"\s*%%(\w*)", source)
    if cell_magic and cell_magic[1] not in ("time", "timeit", "capture", "prun"):
        return ""
    return re.sub(r"^\s*(?:[%!?](?:.*\\\n)*.*|[\w.]+\?{1,2}\s*)(?:\n|\Z)", "", source, flags=re.M)


def python_error(source: str) -> str:
    """Why this cannot be part of a script, or ""; top-level `await` only works in notebooks."""
    try:
        compile(source, "cell", "exec")
    except SyntaxError as error:
        return f"{source.splitlines()[(error.lineno or 1) - 1].strip()!r}: {error.msg}"
    return ""


def is_injected(cell: Cell, known: dict[str, str]) -> bool:
    """Whether papermill added this cell: parameters, or the notice of an error."""
    if {"injected-parameters", "papermill-error-cell-tag"} & {*(cell.metadata.get("tags") or [])}:
        return True
    if not cell.source.startswith("# Parameters\n") or python_error(cell.source):
        return False
    return all(
        isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") in known
        for line in ast.parse(cell.source).body
    )


def describe(cell: Cell) -> str:
    """A notebook cell by its number and first line."""
    first_line = cell.source.strip().splitlines()[0][:60]
    return f"notebook cell {cell.metadata['number']} ({first_line!r})"


def read_notebook(path: Path) -> tuple[list[Cell], str]:
    """The cells of a notebook, numbered, and the digest of the scripts it was built from.

    A file pasted into one cell becomes its cells again. Raises Failure if it is not a notebook.
    """
    try:
        notebook = nbformat.convert(nbformat.reader.reads(path.read_text(encoding="utf-8")), 4)
        found = list(notebook.cells)
    except (OSError, ValueError, AttributeError, nbformat.ValidationError) as error:
        raise Failure(f"{path} cannot be read as a notebook: {error}") from error
    cells = []
    for number, cell in enumerate(found, 1):
        cell.source = cell.source.replace("\r\n", "\n").rstrip()
        parts = [cell]
        if cell.cell_type == "code" and re.search(r"^# %%", cell.source, flags=re.M):
            parts = jupytext.reads(cell.source, fmt=FORMAT).cells
        for part in parts:
            part.metadata = {**part.metadata, **cell.metadata, "number": number}
            cells.append(part)
    return cells, notebook.metadata.get(BASE_KEY, "")


def script_cells(cells: list[Cell], known: dict[str, str]) -> tuple[list[Cell], list[str]]:
    """The cells that belong in scripts, and descriptions of what was left out.

    Raises Failure for pictures and for code that is not Python.
    """
    kept, left_out = [], []
    for cell in (cell for cell in cells if cell.source.strip()):
        if is_injected(cell, known):
            left_out.append(f"{describe(cell)}: added by papermill")
            continue
        if cell.get("attachments"):
            raise Failure(f"{describe(cell)} contains pictures, which scripts cannot: link to them")
        if cell.cell_type == "code":
            python = without_magics(cell.source).rstrip()
            if error := python_error(python):
                name = describe(cell)
                raise Failure(
                    f"{name} is not valid Python, even without magics: {error}. Fix it there"
                )
            if python != cell.source:
                lines = "some lines are" if python else "everything is"
                left_out.append(f"{describe(cell)}: {lines} for IPython")
                cell.source = python
        if cell.source.strip():
            kept.append(cell)
    return kept, left_out


def similarity(first: str, second: str) -> float:
    """How many words two texts share, from 0 to 1; 0 if fewer than 60 %."""
    matcher = difflib.SequenceMatcher(None, first.split(), second.split(), autojunk=False)
    is_close = matcher.real_quick_ratio() > 0.6 and matcher.quick_ratio() > 0.6
    return matcher.ratio() if is_close else 0.0


def match_similar(
    cells: list[Cell], originals: list[Cell], free: Callable[[Cell], list[int]]
) -> list[tuple[float, int, int]]:
    """(similarity, cell, original), best first, if the similar originals are all in one file."""
    found = []
    for number, cell in enumerate(cells):
        scores = {place: similarity(cell.source, originals[place].source) for place in free(cell)}
        best = max(scores.values(), default=0)
        rivals = [place for place, score in scores.items() if score > max(0.6, best - 0.1)]
        if len({originals[place].metadata[SOURCE_KEY] for place in rivals}) == 1:
            found += [(scores[place], number, place) for place in rivals]
    return sorted(found, reverse=True)


def match(cells: list[Cell], originals: list[Cell]) -> dict[int, int]:
    """Index of the original of each cell: the same text, else the same id, else the most similar.

    Cells that name their file are matched within it. Others need an original that stands out.
    """
    of: dict[int, int] = {}

    def free(cell: Cell) -> list[int]:
        file, taken = cell.metadata.get(SOURCE_KEY), set(of.values())
        return [
            place
            for place, original in enumerate(originals)
            if place not in taken
            and original.cell_type == cell.cell_type
            and file in (None, original.metadata[SOURCE_KEY])
        ]

    for number, cell in enumerate(cells):
        same = [place for place in free(cell) if originals[place].source == cell.source]
        if len({originals[place].metadata[SOURCE_KEY] for place in same}) == 1:
            of[number] = same[0]
    for number, cell in enumerate(cells):
        if number not in of and SOURCE_KEY in cell.metadata:
            by_id = [place for place in free(cell) if originals[place].id == cell.get("id")]
            of |= {number: by_id[0]} if by_id else {}
    unmatched = [number for number in range(len(cells)) if number not in of]
    for _, index, place in match_similar([cells[n] for n in unmatched], originals, free):
        if unmatched[index] not in of and place not in of.values():
            of[unmatched[index]] = place
    return of


def in_order(numbers: list[int]) -> set[int]:
    """Positions of the longest subsequence that never decreases."""
    longest: set[int] = set()
    runs: list[list[int]] = [[]]
    for place, number in enumerate(numbers):
        earlier = [run for run in runs if not run or numbers[run[-1]] <= number]
        runs.append([*max(earlier, key=len), place])
        longest = max(longest, {*runs[-1]}, key=len)
    return longest


def known_files(cells: list[Cell], originals: list[Cell], of: dict[int, int]) -> list[str | None]:
    """The file each cell comes from, where known. Raises Failure if it is none of the scripts."""
    files = {original.metadata[SOURCE_KEY] for original in originals}
    found: list[str | None] = []
    for number, cell in enumerate(cells):
        original = originals[of[number]].metadata[SOURCE_KEY] if number in of else None
        file = cell.metadata.get(SOURCE_KEY) or original
        if file and file not in files:
            raise Failure(f"{describe(cell)} comes from {file}, which does not exist here")
        found.append(file)
    return found


def place_cells(cells: list[Cell], originals: list[Cell], of: dict[int, int]) -> list[str]:
    """The file each cell goes to: its own, or for new and moved cells that of the cell before.

    Raises Failure where that is ambiguous, or where a file would be left without cells.
    """
    files = list(dict.fromkeys(original.metadata[SOURCE_KEY] for original in originals))
    origins = known_files(cells, originals, of)
    known = [number for number, file in enumerate(origins) if file]
    if not known:
        raise Failure("No cell of this notebook is known here: it was built from other scripts")
    steady = {known[place] for place in in_order([files.index(origins[n] or "") for n in known])}
    homes: list[str] = []
    file = origins[min(steady)] or ""
    for number, cell in enumerate(cells):
        if number in steady:
            file = origins[number] or ""
        elif origins[number] is None:
            after = min((other for other in steady if other > number), default=number)
            place = of.get(after, 0)
            is_late = place and originals[place - 1].metadata[SOURCE_KEY] == origins[after]
            if SOURCE_KEY not in cells[after].metadata and origins[after] != file and is_late:
                raise Failure(
                    f"{describe(cell)} may be new at the end of {file}, or replace the start of "
                    f"{origins[after]}, which is gone: restore that start, or edit the scripts"
                )
        homes.append(file)
    if lost := [file for file in files if file not in homes]:
        raise Failure(f"Nothing is left of {', '.join(lost)}: import the whole notebook")
    return homes


def script_text(before: str, cells: list[Cell], own: dict[int, Cell]) -> str:
    """The script `before` with these cells instead; `own` are its cells that some of them replace.

    Raises Failure for a cell that would not survive a build.
    """
    script = jupytext.reads(before, fmt=FORMAT)
    script.cells = []
    for number, cell in enumerate(cells):
        tags = cell.metadata.get("tags")
        metadata = own[number].metadata if number in own else {"tags": tags} if tags else {}
        create = getattr(nbformat.v4, f"new_{cell.cell_type}_cell")
        script.cells.append(create(cell.source, metadata=metadata))
    text = jupytext.writes(script, fmt=FORMAT)
    built = jupytext.reads(text, fmt=FORMAT).cells
    for cell, kept in zip_longest(cells, built):
        if not cell or not kept or (cell.cell_type, cell.source) != (kept.cell_type, kept.source):
            raise Failure(f"{describe(cell or cells[-1])} would not be the same after a build")
    return text


def summarize(
    name: str, cells: list[Cell], homes: list[str], originals: list[Cell], of: dict[int, int]
) -> str:
    """One line that counts the changes to one script."""
    here = [number for number, home in enumerate(homes) if home == name]
    mine = {n for n, original in enumerate(originals) if original.metadata[SOURCE_KEY] == name}
    kept = [number for number in here if of.get(number) in mine]
    counts = {
        "changed": sum(cells[n].source != originals[of[n]].source for n in kept),
        "new": sum(number not in of for number in here),
        "moved here": sum(number in of for number in here) - len(kept),
        "moved away": sum(place in mine and homes[n] != name for n, place in of.items()),
        "deleted": len(mine - set(of.values())),
    }
    words = [f"{count} {what}" for what, count in counts.items() if count]
    return f"{name}: {', '.join(words) or 'in another order'}"


def edited_scripts(
    before: dict[str, str], cells: list[Cell], originals: list[Cell]
) -> tuple[dict[str, str], list[str]]:
    """The scripts after the edits, and a summary of the changes to each."""
    of = match(cells, originals)
    homes = place_cells(cells, originals, of)
    if not any("parameters" in originals[place].metadata.get("tags", []) for place in of.values()):
        raise Failure("The parameters cell of section 2 is missing or unrecognisable")
    texts, summary = {}, []
    for name, text in before.items():
        file = f"kaggle_cells/{name}"
        here = [number for number, home in enumerate(homes) if home == file]
        mine = [n for n, cell in enumerate(originals) if cell.metadata[SOURCE_KEY] == file]
        is_same = [cells[n].source for n in here] == [originals[n].source for n in mine]
        if is_same and [of.get(number) for number in here] == mine:
            texts[name] = text
            continue
        script = dict(zip(mine, jupytext.reads(text, fmt=FORMAT).cells, strict=True))
        own = {n: script[of[number]] for n, number in enumerate(here) if of.get(number) in script}
        texts[name] = script_text(text, [cells[number] for number in here], own)
        if texts[name] != text:
            summary.append(summarize(file, cells, homes, originals, of))
    return texts, summary


def import_edits(path: Path, dry_run: bool) -> None:
    """Make the scripts match an edited notebook; show what changes. Writes all or nothing."""
    before, base = script_texts(), assemble()
    found, built_from = read_notebook(path)
    cells, left_out = script_cells(found, known_parameters(base))
    texts, summary = edited_scripts(before, cells, base.cells)
    for name, text in texts.items():
        lines = (before[name].splitlines(), text.splitlines())
        names = (f"a/kaggle_cells/{name}", f"b/kaggle_cells/{name}")
        for line in difflib.unified_diff(*lines, *names, lineterm=""):
            print(line)
    for line in [*(f"Left out: {line}" for line in left_out), *summary]:
        print(line)
    if not summary:
        print(f"Nothing to do: the scripts already match {path}")
        return
    if built_from != base.metadata[BASE_KEY]:
        source = "a different version of the scripts" if built_from else "unknown scripts"
        print(
            f"Note: the notebook was built from {source}. Removed lines may be newer: check them."
        )
    if dry_run:
        print("Dry run: nothing was written.")
        return
    for name, text in texts.items():
        (CELLS / name).write_text(text, encoding="utf-8", newline="\n")
    print("Written. Next: ruff check . && ruff format . && python build_notebook.py && pytest")


# Running


def known_parameters(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """The names that the cell tagged `parameters` assigns, with their types."""
    tagged = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    return dict(re.findall(r"^([A-Z_]+): (\w+) =", tagged.source, flags=re.M))


def read_parameters(source: str, overrides: list[list[str]], known: dict[str, str]) -> dict:
    """Parameters of a set or file, with (NAME, VALUE) overrides; Failure for unknown names."""
    file = PARAMETER_SETS / f"{source}.yaml"
    if not file.exists():
        file = Path(source)
    if not file.is_file():
        sets = ", ".join(sorted(path.stem for path in PARAMETER_SETS.glob("*.yaml")))
        raise Failure(f"{source!r} is neither a parameter set ({sets}) nor a file")
    try:
        parameters = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        parameters |= {
            name: text if known.get(name) == "str" else yaml.safe_load(text)
            for name, text in overrides
        }
    except (yaml.YAMLError, TypeError) as error:
        raise Failure(f"{file} and -p must give NAME: VALUE pairs: {error}") from error
    for name in parameters:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise Failure(f"{name} is not a parameter; {advice}")
    return parameters


def register_engine() -> str:
    """The name of papermill's usual engine, saving the notebook at most every five seconds.

    Saving before and after each of 280 cells takes a third of a short run.
    """
    from papermill.engines import NBClientEngine, papermill_engines

    class SeldomSaving(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, *args, **kwargs):
            save = nb_man.save

            def save_if_due(**ignored):
                if (nb_man.now() - nb_man.last_save_time).total_seconds() > 5:
                    save()

            nb_man.save = save_if_due
            try:
                super().execute_managed_notebook(nb_man, *args, **kwargs)
            finally:
                nb_man.save = save  # for the end, however it comes

    papermill_engines.register("seldom_saving", SeldomSaving)
    return "seldom_saving"


def execute(notebook: Path, executed: Path, parameters: dict, resume: str) -> None:
    """Run a notebook with papermill. Raises Failure with the failing cell's file and `resume`."""
    # a warning about frozen modules, in every kernel
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    import papermill
    from nbclient.exceptions import DeadKernelError

    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters,
            engine_name=register_engine(),
            kernel_name="python3",
            stdout_file=sys.stdout,
            progress_bar=sys.stderr.isatty(),
            # it warns that its loopback traffic is not encrypted
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
    except papermill.PapermillExecutionError as error:
        cells = nbformat.read(executed, as_version=4).cells
        failed = next(
            c for c in cells if any(o.output_type == "error" for o in c.get("outputs", []))
        )
        file = failed.metadata.get(SOURCE_KEY, "the parameters given")
        raise Failure(
            f"{error.ename}: {error.evalue}\n\nThe cell that failed is in {file}. "
            f"The notebook so far, with the full traceback: {executed}\n{resume}"
        ) from error
    except KeyboardInterrupt as error:
        raise Failure(f"\nStopped. {resume}") from error
    except DeadKernelError as error:
        message = f"The kernel died, probably out of memory. The notebook so far: {executed}"
        raise Failure(f"{message}\n{resume}") from error


def run(source: str, overrides: list[list[str]], output: Path | None) -> None:
    """Execute the notebook in one run folder. Raises Failure with advice on how to resume."""
    notebook = assemble()
    parameters = read_parameters(source, overrides, known_parameters(notebook))
    work_dir = parameters.get("WORK_DIR")
    if output and work_dir:
        raise Failure(
            f"--output {output} and WORK_DIR {work_dir} both name the run's folder: give one"
        )
    name = f"{Path(source).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = (output or Path(work_dir or ROOT / "runs" / name)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parameters["WORK_DIR"] = str(folder)
    for name in ("CHECKPOINT", "INITIAL_MODEL"):
        if parameters.get(name) == "pretrained":
            parameters[name] = str(PRETRAINED)
    assembled, executed = folder / ".assembled.ipynb", folder / NOTEBOOK.name
    # the notebook of an earlier run is kept until this one has finished
    written = executed.with_suffix(".unfinished.ipynb") if executed.exists() else executed
    assembled.write_text(as_text(notebook), encoding="utf-8")
    print(f"Running {len(notebook.cells)} cells in {folder}", flush=True)
    started = time.time()
    resume = f"To resume, run the same command with --output {folder}"
    try:
        execute(assembled, written, parameters, resume)
    finally:
        assembled.unlink(missing_ok=True)
    os.replace(written, executed)
    print(f"\nFinished in {time.time() - started:.0f} s. Look at")
    print(f"  {executed}  (the notebook with all figures)")
    for name in (
        "results/experiment_report.txt",
        "results/predictions.csv",
        "models/best_model.pth",
    ):
        if (folder / name).exists():
            print(f"  {folder / name}")


def load_predictor(model: Path) -> Any:
    """The detector in a model file. Raises Failure, with advice, if it is none."""
    if not model.is_file():
        advice = (
            "python build_notebook.py run trains one: give its models/best_model.pth as --model"
        )
        raise Failure(f"{model} does not exist. {advice}")
    from cell_01_imports_and_setup import ENVIRONMENT
    from cell_08_evaluation_functions import Predictor, describe_limits

    try:
        predictor = Predictor.load(model, ENVIRONMENT.device)
    except ValueError as error:
        raise Failure(error) from error
    print(f"{predictor.about} {describe_limits(predictor)}\n")
    return predictor


def videos_in(places: list[Path]) -> list[Path]:
    """The videos and pictures that are named, lie below folders, or are listed, each once.

    Paths listed in a text file are relative to it. Raises Failure if there is nothing to score.
    """
    if missing := [str(place) for place in places if not place.exists()]:
        raise Failure(f"{', '.join(missing)} does not exist")
    from cell_03_data_processing import media_below

    found: list[Path] = []
    for place in places:
        if place.suffix.lower() == ".txt":
            lines = place.read_text(encoding="utf-8-sig").splitlines()
            found += [place.parent / line.strip() for line in lines if line.strip()]
        else:
            found += media_below(place) if place.is_dir() else [place]
    if not found:
        raise Failure(f"no videos or pictures in {', '.join(map(str, places))}")
    return list(dict.fromkeys(found))


def print_verdict(judgement: Any) -> None:
    """A line for a video, above the progress bar if there is one."""
    from tqdm.auto import tqdm

    from cell_01_imports_and_setup import ENVIRONMENT

    verdict, stretch = judgement.verdict or "error", ""
    if judgement.face:
        verdict = f"{judgement.probability:.3f}  {verdict}"
        stretch = f", face {judgement.face}, {judgement.start:.0f} to {judgement.end:.0f} s"
    problem = f" ({judgement.problem})" if judgement.problem else ""
    line = f"{verdict:<17}  {judgement.path}{stretch}{problem}"
    tqdm.write(line) if ENVIRONMENT.interactive else print(line, flush=True)


def score(given: argparse.Namespace) -> None:
    """Judge videos into a folder. Raises Failure if there is no model or no video."""
    videos, options = videos_in(given.places), (given.stride, given.max_windows)
    predictor = load_predictor(given.model)
    from cell_08_evaluation_functions import judge_videos, verdict_counts

    print("P(fake), verdict, video, its most suspicious face and stretch")
    try:
        table = judge_videos(predictor, videos, given.output, options, print_verdict)
    except KeyboardInterrupt as error:
        done = f"What is done is in {given.output / 'report.html'}"
        raise Stopped(f"\nStopped. {done}; the same command goes on.") from error
    print(f"\n{verdict_counts(table)}. To look at: {given.output / 'report.html'}")


def make_app(predictor: Any, gradio: Any) -> Any:
    """A page that takes a video and shows its card; what goes wrong is a sentence."""
    from cell_03_data_processing import VideoError
    from cell_08_evaluation_functions import inline_html

    def judge(files: list[str], progress: Any = gradio.Progress()) -> str:  # noqa: B008
        if len(files) > 1:
            return MANY_FILES.format(len(files))
        name = Path(files[0]).name
        try:
            found = predictor.judge(files[0], progress=partial(progress, desc="judging"))
        except VideoError as error:
            problem = str(error).removeprefix(f"{files[0]}: ")
            return f"<p><b>{escape(name)}</b> cannot be judged: {escape(problem)}.</p>"
        return inline_html(replace(found, path=name), predictor)

    with gradio.Blocks(
        title="Deepfake detector", analytics_enabled=False, delete_cache=DAY
    ) as page:
        gradio.Markdown("# Is this video fake?\nIt stays on this machine.")
        video = gradio.File(label="Drop a video here", file_count="multiple", height=160)
        shown = gradio.HTML()
        judged = video.upload(judge, video, shown)
        judged.then(lambda: None, None, video)  # makes room for the next one
    return page


def app(given: argparse.Namespace) -> None:
    """Serve the app until Ctrl-C. Raises Failure if gradio is missing."""
    try:
        import gradio
    except ImportError as error:
        command = "pip install -r requirements-app.txt"
        raise Failure(f"The app needs gradio: {command} ({error})") from error
    page = make_app(load_predictor(given.model), gradio)
    fonts = ["system-ui", "sans-serif"]  # the default ones come from the internet
    page.queue().launch(
        server_name=given.host,
        server_port=given.port,
        share=given.share,
        max_file_size=f"{given.max_size}mb",
        theme=gradio.themes.Default(font=fonts, font_mono=["monospace"]),
    )


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    if not 0 < float(text) < float("inf"):
        raise ValueError
    return float(text)


def whole(text: str) -> int:
    """A whole number, 1 or more, for argparse."""
    positive(text)
    return int(text)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(
        dest="command", metavar="build | check | run | score | app | import"
    )
    commands.add_parser("build", help="build the notebook (the default)")
    commands.add_parser("check", help="fail if the committed notebook is stale")
    runner = commands.add_parser("run", help="execute the notebook")
    runner.add_argument("parameters", help="a set in notebooks/params/, or a YAML file")
    pair: Any = dict(nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    runner.add_argument("-p", **pair, help="set a parameter")
    runner.add_argument("--output", type=Path, help="the run's folder (default: runs/NAME-TIME)")
    scorer = commands.add_parser("score", help="say of videos whether they are fake")
    places: Any = dict(nargs="+", type=Path, metavar="PATH")
    scorer.add_argument("places", **places, help="videos, folders, text files with paths")
    scorer.add_argument("--model", type=Path, default=PRETRAINED, help="a best_model.pth")
    scorer.add_argument("--output", type=Path, default=SCORES, help="default: runs/scores")
    seconds: Any = dict(type=positive, default=0.0, metavar="SECONDS")
    scorer.add_argument("--stride", **seconds, help="from window to window; default: side by side")
    most: Any = dict(type=whole, default=0, metavar="N")
    scorer.add_argument("--max-windows", **most, help="per video, spread evenly; default: all")
    server = commands.add_parser("app", help="a page in the browser, to drop videos on")
    server.add_argument("--model", type=Path, default=PRETRAINED, help="a best_model.pth")
    server.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines connect")
    server.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    server.add_argument("--share", action="store_true", help="a public link, through gradio.live")
    size: Any = dict(type=int, default=4000, metavar="MB", help="the largest file (default: 4000)")
    server.add_argument("--max-size", **size)
    importer = commands.add_parser("import", help="apply the edits in a notebook to the scripts")
    importer.add_argument(
        "notebook", type=Path, help="as downloaded from Kaggle or saved by Jupyter"
    )
    importer.add_argument("--dry-run", action="store_true", help="only show what would change")
    return parser.parse_args()


def main() -> int:
    arguments = read_arguments()
    sys.path.insert(0, str(CELLS))
    try:
        if arguments.command == "check":
            check()
        elif arguments.command == "score":
            score(arguments)
        elif arguments.command == "app":
            app(arguments)
        elif arguments.command == "run":
            run(arguments.parameters, arguments.p, arguments.output)
        elif arguments.command == "import":
            import_edits(arguments.notebook, arguments.dry_run)
        else:
            build()
    except Failure as failure:
        print(failure, file=sys.stderr)
        return failure.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
