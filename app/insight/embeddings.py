"""`python3 -m app embed` and `similar`: the embeddings of many files, in a file, and what is like a picture."""
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from app import cli
from app.errors import ServiceError
from app.insight import vectors
from app.insight.files import replacing
from app.output import printable, shown

REQUIREMENTS = "app/insight/requirements.txt"
ORIGIN = ("model", "weights_sha256", "normalized", "precision", "preprocessing")
ROW_GROUP = 4096  # rows of a Parquet file that are in memory at once


@dataclass(frozen=True)
class Embeddings:
    """paths: list of N texts; vectors: float32 (N, F); model, weights_sha256, precision and preprocessing (JSON): what
    made them, the last two None in files of earlier versions; normalized: whether each vector has length 1."""
    paths: list
    vectors: np.ndarray
    model: str
    weights_sha256: str
    normalized: bool
    precision: str | None = None
    preprocessing: str | None = None

    def origin(self):
        """The members besides paths and vectors that are known."""
        found = {name: getattr(self, name) for name in ORIGIN}
        return {name: value for name, value in found.items() if value is not None}


def embed(arguments):
    suffix = arguments.out.suffix.lower()
    if suffix not in (".npz", ".parquet"):
        raise cli.CommandError(f"--out must end in .npz or .parquet, got {arguments.out.name}")
    if suffix == ".parquet":
        pyarrow()
    with replacing(arguments.out, only_try=True):
        pass
    loader, options = load(arguments, arguments.normalize)
    paths, names = find(arguments.paths, loader.current), []
    try:  # on disk, as there may be more than memory holds; this file has no name, and so ends with the process
        with tempfile.TemporaryFile(dir=arguments.out.parent) as rows:
            for path, vector in calculate(loader, options, paths):
                names.append(str(path))
                rows.write(vector.tobytes())
            rows.flush()
            if not names:
                raise cli.CommandError(f"none of the {len(paths)} files could be embedded")
            found = Embeddings(names, np.memmap(rows, np.float32, "r").reshape(len(names), -1),
                               **origin_of(loader.current, options))
            (write_npz if suffix == ".npz" else write_parquet)(arguments.out, found)
    except OSError as e:
        e.filename = str(arguments.out)
        raise
    print(shown(f"{cli.counted(len(names), 'embedding')} of {found.vectors.shape[1]} numbers: {arguments.out}"))
    return 1 if len(names) < len(paths) else 0


def similar(arguments):
    if arguments.top < 1:
        raise cli.CommandError(f"--top must be at least 1, got {arguments.top}")
    if arguments.picture.is_dir():
        raise cli.CommandError(f"{arguments.picture} is a folder: the picture comes first, then what to search")
    known = None if arguments.among.is_dir() else read(arguments.among)  # before the model is loaded
    loader, options = load(arguments, True)
    picture = [vector for _, vector in calculate(loader, options, [arguments.picture])]
    if not picture:
        return 1
    if known is None:
        of_picture = arguments.picture.resolve()
        among = [path for path in find([arguments.among], loader.current) if path.resolve() != of_picture]
        found = [(str(path), float(cosine(vector[None], picture[0])[0]))
                 for path, vector in calculate(loader, options, among)]
        failed = len(found) < len(among)
    else:
        check_origin(arguments.among, known, origin_of(loader.current, options), len(picture[0]))
        found, failed = list(zip(known.paths, cosine(known.vectors, picture[0]).tolist(), strict=True)), False
    for path, value in sorted(found, key=lambda one: -one[1])[:arguments.top]:
        print(printable(json.dumps({"file": path, "similarity": round(value, 6)}, ensure_ascii=False)
                        if arguments.json else shown(f"{value:7.4f}  {path}")))
    return 1 if failed else 0


def check_origin(path, known, model, size):
    """Raises CommandError if embeddings in a file cannot be compared with those of the model, which has the origin
    `model`; says so if they are of another precision."""
    if (known.model, known.weights_sha256) != (model["model"], model["weights_sha256"]):
        raise cli.CommandError(f"{path} has embeddings of {known.model} with weights {known.weights_sha256[:12]}, but "
                               f"the model is {model['model']} with weights {model['weights_sha256'][:12]}: make them "
                               "again with embed")
    if known.preprocessing not in (None, model["preprocessing"]):
        raise cli.CommandError(f"{path} has embeddings of pictures with other preprocessing, {known.preprocessing}: "
                               "make them again with embed")
    if known.vectors.shape[1] != size:
        raise cli.CommandError(f"{path} has embeddings of {known.vectors.shape[1]} numbers, but those of "
                               f"{model['model']} have {size}: make them again with embed")
    if known.precision not in (None, model["precision"]):
        print(f"note: these embeddings were made with {known.precision}, the picture's with {model['precision']}: "
              "similarities are a little lower", file=sys.stderr)


def load(arguments, normalize):
    """(loader, options). Raises StartError or ServiceError if the model has no embeddings."""
    loader, model, options = cli.load(arguments)
    return loader, {**vectors.options_for(model.task, options), "normalize": normalize}


def origin_of(model, options):
    """Members of Embeddings that this model makes."""
    manifest = model.task.manifest
    return {"model": model.name, "weights_sha256": manifest.weights["sha256"], "normalized": options["normalize"],
            "precision": model.task.engine.precision,
            "preprocessing": json.dumps(manifest.preprocessing, sort_keys=True)}


def find(paths, model):
    found = list(dict.fromkeys(cli.find_files(paths, model.task.takes)))  # folders may overlap
    if not found:
        raise cli.CommandError(f"there is nothing to embed in {', '.join(map(str, paths))}: {model.name} takes "
                               f"{' or '.join(model.task.takes)}")
    return found


def calculate(loader, options, paths):
    """Yield (path, float32 (F,)) of each file; says, on standard error, which cannot be embedded."""
    failed = 0
    for path, answer in cli.answers(loader, options, paths, how=vectors.how(loader.current.task)):
        if isinstance(answer, ServiceError):
            failed += 1
            tqdm.write(shown(f"{path}: {answer.code}: {answer.message}"), file=sys.stderr)
        else:
            yield path, answer["predictions"]
    if failed and len(paths) > 1:
        print(f"{failed} of {len(paths)} files failed", file=sys.stderr)


def cosine(rows, vector):
    """The cosines of the angles between rows, (N, F), and a vector, (F,): (N,), 0 for a row of zeros."""
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(vector)
    return rows @ vector / np.maximum(lengths, np.finfo(np.float32).tiny)


# --- files ---

def write_npz(path, found):
    with replacing(path) as temporary, open(temporary, "wb") as file:  # to a path, NumPy would append .npz
        np.savez(file, paths=np.array(found.paths, str), embeddings=found.vectors, **found.origin())


def write_parquet(path, found):
    arrow, parquet = pyarrow()
    size = found.vectors.shape[1]
    column = arrow.FixedSizeListArray.from_arrays(arrow.array(found.vectors.reshape(-1)), size)
    table = arrow.table({"path": [printable(name) for name in found.paths], "embedding": column})
    table = table.replace_schema_metadata({
        name: str(value).lower() if name == "normalized" else value for name, value in found.origin().items()})
    with replacing(path) as temporary:
        parquet.write_table(table, temporary, row_group_size=ROW_GROUP, use_dictionary=["path"])


def read(path):
    """The Embeddings in a file that embed has written. Raises CommandError."""
    try:
        return read_parquet(path) if path.suffix.lower() == ".parquet" else read_npz(path)
    except FileNotFoundError as e:
        raise cli.CommandError(f"{path} does not exist") from e
    except PermissionError as e:
        raise cli.CommandError(f"{path} cannot be read: {e.strerror}") from e
    except cli.CommandError:
        raise
    except Exception as e:  # of zipfile, zlib, NumPy or pyarrow, which raise many on what others have written
        raise cli.CommandError(f"{path} is neither a folder nor a file that embed has written (the picture comes first)"
                               ) from e


def read_npz(path):
    with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:  # NumPy leaves damaged ones open
        return checked([str(name) for name in file["paths"]], file["embeddings"], {
            name: file[name].item() for name in ORIGIN if name in file})


def read_parquet(path):
    _, parquet = pyarrow()
    table = parquet.read_table(path)
    about = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    column = table["embedding"].combine_chunks()
    about["normalized"] = about["normalized"] == "true"
    return checked(table["path"].to_pylist(), column.flatten().to_numpy().reshape(len(column), -1),
                   {name: about[name] for name in ORIGIN if name in about})


def checked(paths, rows, origin):
    if rows.ndim != 2 or rows.dtype != np.float32 or len(paths) != len(rows) or not np.isfinite(rows).all() or \
            not all(isinstance(path, str) for path in paths):
        raise ValueError
    return Embeddings(paths, rows, **origin)


def pyarrow():
    """(pyarrow, pyarrow.parquet). Raises CommandError if it is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as e:
        raise cli.CommandError(f".parquet needs pyarrow: {Path(sys.executable).parent / 'pip'} install -r "
                               f"{REQUIREMENTS}, or choose .npz") from e
    return pyarrow, parquet
