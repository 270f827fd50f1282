"""`python3 -m app embed` and `similar`: the embeddings of many files, in a file, and what is like a picture."""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from app import cli
from app.errors import ServiceError
from app.insight import vectors
from app.insight.files import replacing

REQUIREMENTS = "app/insight/requirements.txt"


@dataclass(frozen=True)
class Embeddings:
    """paths: list of N texts; vectors: float32 (N, F); model, weights_sha256: which made them; normalized: whether each
    vector has length 1."""
    paths: list
    vectors: np.ndarray
    model: str
    weights_sha256: str
    normalized: bool


def embed(arguments):
    suffix = arguments.out.suffix.lower()
    if suffix not in (".npz", ".parquet"):
        raise cli.CommandError(f"--out must end in .npz or .parquet, got {arguments.out.name}")
    if suffix == ".parquet":
        pyarrow()
    with replacing(arguments.out, only_try=True):
        pass
    loader, options = load(arguments, arguments.normalize)
    paths = find(arguments.paths, loader.current)
    found, failed = calculate(loader, options, paths)
    if not found.paths:
        raise cli.CommandError(f"none of the {len(paths)} files could be embedded")
    (write_npz if suffix == ".npz" else write_parquet)(arguments.out, found)
    print(cli.printable(f"{len(found.paths)} embeddings of {found.vectors.shape[1]} numbers: {arguments.out}"))
    return 1 if failed else 0


def similar(arguments):
    if arguments.top < 1:
        raise cli.CommandError(f"--top must be at least 1, got {arguments.top}")
    if arguments.picture.is_dir():
        raise cli.CommandError(f"{arguments.picture} is a folder: the picture comes first, then what to search")
    known = None if arguments.among.is_dir() else read(arguments.among)  # before the model is loaded
    loader, options = load(arguments, True)
    model = loader.current
    picture, failed = calculate(loader, options, [arguments.picture])
    if failed:
        return 1
    size = picture.vectors.shape[1]
    if known is None:
        of_picture = arguments.picture.resolve()
        paths = [path for path in find([arguments.among], model) if path.resolve() != of_picture]
        known, failed = calculate(loader, options, paths)
    elif (known.model, known.weights_sha256) != (picture.model, picture.weights_sha256):
        raise cli.CommandError(f"{arguments.among} has embeddings of {known.model} with weights "
                               f"{known.weights_sha256[:12]}, but the model is {picture.model} with weights "
                               f"{picture.weights_sha256[:12]}: make them again with embed")
    elif known.vectors.shape[1] != size:
        raise cli.CommandError(f"{arguments.among} has embeddings of {known.vectors.shape[1]} numbers, but those of "
                               f"{picture.model} have {size}: make them again with embed")
    cosines = cosine(known.vectors, picture.vectors[0])
    for i in np.argsort(-cosines, kind="stable")[:arguments.top]:
        path, value = known.paths[i], float(cosines[i])
        print(cli.printable(json.dumps({"file": path, "similarity": round(value, 6)}, ensure_ascii=False)
                            if arguments.json else f"{value:7.4f}  {path}"))
    return 1 if failed else 0


def load(arguments, normalize):
    """(loader, options). Raises StartError or ServiceError if the model has no embeddings."""
    loader, model, options = cli.load(arguments)
    return loader, {**vectors.options_for(model.task, options), "normalize": normalize}


def find(paths, model):
    found = list(cli.find_files(paths, model.task.takes))
    if not found:
        raise cli.CommandError(f"there is nothing to embed in {', '.join(map(str, paths))}: {model.name} takes "
                               f"{' or '.join(model.task.takes)}")
    return found


def calculate(loader, options, paths):
    """(Embeddings, how many files failed); says which, on standard error."""
    model, names, failed = loader.current, [], 0
    rows = np.empty((len(paths), model.task.manifest.features["size"]), np.float32)
    for path, answer in cli.answers(loader, options, paths, how=vectors.how(model.task)):
        if isinstance(answer, ServiceError):
            failed += 1
            tqdm.write(cli.printable(f"{path}: {answer.code}: {answer.message}"), file=sys.stderr)
        else:
            rows[len(names)] = answer["predictions"]
            names.append(str(path))
    if failed and len(paths) > 1:
        print(f"{failed} of {len(paths)} files failed", file=sys.stderr)
    return Embeddings(names, rows[:len(names)], model.name, model.task.manifest.weights["sha256"],
                      options["normalize"]), failed


def cosine(rows, vector):
    """The cosines of the angles between rows, (N, F), and a vector, (F,): (N,), 0 for a row of zeros."""
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(vector)
    return rows @ vector / np.maximum(lengths, np.finfo(np.float32).tiny)


# --- files ---

def write_npz(path, found):
    with replacing(path) as temporary, open(temporary, "wb") as file:  # to a path, NumPy would append .npz
        np.savez(file, paths=np.array(found.paths, str), embeddings=found.vectors, model=found.model,
                 weights_sha256=found.weights_sha256, normalized=found.normalized)


def write_parquet(path, found):
    arrow, parquet = pyarrow()
    size = found.vectors.shape[1]
    column = arrow.FixedSizeListArray.from_arrays(arrow.array(found.vectors.reshape(-1)), size)
    table = arrow.table({"path": [cli.printable(name) for name in found.paths], "embedding": column})
    table = table.replace_schema_metadata({"model": found.model, "weights_sha256": found.weights_sha256,
                                           "normalized": str(found.normalized).lower()})
    with replacing(path) as temporary:
        parquet.write_table(table, temporary)


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
        return checked([str(name) for name in file["paths"]], file["embeddings"], str(file["model"]),
                       str(file["weights_sha256"]), bool(file["normalized"]))


def read_parquet(path):
    _, parquet = pyarrow()
    table = parquet.read_table(path)
    about = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    column = table["embedding"].combine_chunks()
    return checked(table["path"].to_pylist(), column.flatten().to_numpy().reshape(len(column), -1), about["model"],
                   about["weights_sha256"], about["normalized"] == "true")


def checked(paths, rows, *about):
    if rows.ndim != 2 or rows.dtype != np.float32 or len(paths) != len(rows) or not np.isfinite(rows).all() or \
            not all(isinstance(path, str) for path in paths):
        raise ValueError
    return Embeddings(paths, rows, *about)


def pyarrow():
    """(pyarrow, pyarrow.parquet). Raises CommandError if it is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as e:
        raise cli.CommandError(f".parquet needs pyarrow: {Path(sys.executable).parent / 'pip'} install -r "
                               f"{REQUIREMENTS}, or choose .npz") from e
    return pyarrow, parquet
