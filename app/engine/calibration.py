"""A bundle's calibration.json: the temperature of a classifier, and what fitting it has shown."""
import json

from app.config import StartError

FILE = "calibration.json"


def read(folder):
    """{"temperature": above 0, by which logits are divided, …} of a bundle's folder. Raises StartError."""
    try:
        found = json.loads((folder / FILE).read_bytes())
        if 0 < found["temperature"] < float("inf"):
            return found
        why = f"its temperature is {found['temperature']}"
    except OSError as e:
        why = e.strerror
    except (ValueError, TypeError, KeyError):
        why = "it is damaged"
    raise StartError(f"{folder / FILE} cannot be used: {why}; remove it, or calibrate again")
