"""LOG_FORMAT=text."""
import logging


class TextFormatter(logging.Formatter):
    """Time, level, message, then the extra fields as key=value, stages as decode=6.6ms; control characters escaped."""
    standard = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}

    def __init__(self):
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatMessage(self, record):
        extra = {k: v for k, v in record.__dict__.items() if k not in self.standard and v is not None}
        extra |= {stage: f"{ms:g}ms" for stage, ms in extra.pop("timings_ms", {}).items()}
        return printable(" ".join([super().formatMessage(record), *(f"{k}={v}" for k, v in extra.items())]))


def printable(text):
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
