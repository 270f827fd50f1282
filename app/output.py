"""What `predict` and `evaluate` print of each file: a table, JSON lines or CSV, to standard output or a file."""
import contextlib
import csv
import io
import json
import re
import sys

from tqdm import tqdm

from app.config import StartError
from app.errors import ServiceError

FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json"}  # by the ending of --output
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # with these, spreadsheets take a text for a formula


class CommandError(StartError):
    """A command that cannot run as given; the message is one line."""


class Output:
    """format: table, json or csv. A file is emptied with the first line: a model that does not load leaves it alone."""

    def __init__(self, arguments):
        """Raises CommandError if the file cannot be written."""
        self.path, self.file, self.is_begun = arguments.output, None, False
        self.format = "csv" if arguments.csv else "json" if arguments.json else FORMATS.get(
            self.path and self.path.suffix.lower(), "table")
        if self.path:
            self.is_new = not self.path.exists()
            try:
                self.file = open(self.path, "a", 1, encoding="utf-8", errors="replace")  # noqa: SIM115 - see __exit__
            except OSError as e:
                raise CommandError(f"{self.path} cannot be written: {e.strerror}") from e

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.file:
            self.file.close()
            if self.is_new and not self.is_begun:
                self.path.unlink(missing_ok=True)

    def begin(self, kind, options, paths, has_labels=False):
        """kind: of app/tasks/answers.py. Writes the header of a table or of CSV."""
        self.kind, self.has_labels = kind, has_labels
        self.width = max(4, *(len(shown(str(path))) for path in paths)) if paths else 4
        self.titles = kind.csv_titles(options)
        if self.format == "table":
            self.write_row("file", kind.columns())
        elif self.format == "csv":
            self.write_csv(["file", *(kind.csv_label_titles() if has_labels else []), *self.titles, "error"])

    def add(self, path, answer, label=None):
        """answer: of Model.answer, or a ServiceError."""
        error = answer if isinstance(answer, ServiceError) else None
        if self.format == "json":
            body = error.body() if error else {"status": "success", **answer}
            self.write(json.dumps({"file": str(path), **body}, ensure_ascii=False))
        elif self.format == "csv":
            number = len(self.titles)
            cells = ([] if error else self.kind.csv_cells(answer)) + [""] * number
            self.write_csv([safe_path(path), *(self.kind.csv_label_cells(label) if self.has_labels else []),
                            *cells[:number], f"{error.code}: {error.message}" if error else ""])
        elif error:
            self.say(f"{path}: {error.code}: {error.message}")
        else:
            self.write_row(path, self.kind.row(answer["predictions"]))

    def summary(self, lines):
        """What was measured: in the place of the rows, unless these are CSV."""
        for line in lines:
            if self.format != "csv":
                self.write(line)
            else:
                print(shown(line), file=sys.stdout if self.file else sys.stderr)

    def say(self, line):
        """On standard error."""
        tqdm.write(shown(line), file=sys.stderr)

    def write_row(self, path, columns):
        self.write(shown("  ".join([shown(str(path)).ljust(self.width), *columns])))

    def write_csv(self, cells):
        line = io.StringIO()
        csv.writer(line, quoting=csv.QUOTE_NONNUMERIC, lineterminator="").writerow(
            [safe_text(cell) if isinstance(cell, str) else cell for cell in cells])
        self.write(line.getvalue())

    def write(self, line):
        if self.file is None and sys.stdout.isatty():
            tqdm.write(printable(line))  # above the bar
        elif self.file is None:
            print(printable(line))
        else:
            if not self.is_begun:
                with contextlib.suppress(OSError):  # it is no regular file
                    self.file.truncate(0)
                self.is_begun = True
            self.file.write(line + "\n")


def printable(text):
    """Without halves of surrogate pairs."""
    return text.encode(errors="replace").decode()


def shown(text):
    """For a terminal: control characters, which might move its cursor or worse, and those that turn the direction of
    writing are escaped, as in \\x1b."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), printable(text))


def safe_path(path):
    """A path that no spreadsheet takes for a formula, and every program for the same file."""
    return f"./{path}" if str(path).startswith(FORMULA) else str(path)


def safe_text(text):
    return f"'{text}" if text.startswith(FORMULA) else text
