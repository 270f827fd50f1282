"""A bundle's calibration.json: the temperature of a classifier, and what fitting it has shown."""
import json

from app.config import StartError
from app.engine import bundle

FILE = "calibration.json"
LOWEST, HIGHEST = 0.05, 20.0  # temperatures; networks have 0.5 to 3
SHOWN = ("temperature", "precision", "pictures", "ece_before", "ece_after", "nll_before", "nll_after", "created")


def read(folder):
    """{"temperature": by which logits are divided, and others of SHOWN} of a bundle's folder; None if it has no such
    file. Raises StartError."""
    try:
        found = json.loads((folder / FILE).read_bytes())
        temperature = found["temperature"]
        if isinstance(temperature, bool) or not LOWEST <= temperature <= HIGHEST:
            why = f"its temperature is {str(temperature)[:20]}, not from {LOWEST} to {HIGHEST}"
        elif found.get("weights_sha256") != bundle.read(folder).weights["sha256"]:
            why = "it is of other weights"
        else:
            return {name: found[name] for name in SHOWN if name in found}
    except FileNotFoundError:
        return None
    except OSError as e:
        why = e.strerror
    except (ValueError, TypeError, KeyError):
        why = "it is damaged"
    raise StartError(f"{folder / FILE} cannot be used: {why}; remove it, or calibrate again")


def of_another(folder, found, asked):
    """In words, if the temperature `found` of this bundle, or, if there is none, that of another bundle of the same
    model was fitted with another engine or precision; else None. asked: PRECISION."""
    if found:
        fitted = found.get("precision", asked)
        return None if asked in (fitted, "auto", "int8") else (
            f"its temperature was fitted with PRECISION={fitted}, not {asked}; to be exact, calibrate again")
    manifest = bundle.read(folder)
    for path in sorted(folder.parent.glob(f"*/{FILE}")):
        other = bundle.read(path.parent)
        if other and ([other.name, other.labels, other.preprocessing, other.weights["sha256"]] == [
                manifest.name, manifest.labels, manifest.preprocessing, manifest.weights["sha256"]]):
            return (f"it has no temperature: {path} was fitted with another engine or PRECISION; calibrate again "
                    "(python -m app evaluate --calibrate)")
    return None
