"""A bundle's calibration.json: the temperature of a classifier, and what fitting it has shown."""
import json

from app.config import StartError
from app.engine import bundle

FILE = "calibration.json"
LOWEST, HIGHEST = 0.05, 20  # temperatures; beyond them something else is wrong
SHOWN = ("temperature", "pictures", "ece_before", "ece_after", "nll_before", "nll_after", "created")


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
