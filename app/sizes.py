"""Sizes in words, as all messages say them: in decimal units, as file managers count. Imported with the first one."""


def words(size):
    """A number of bytes, such as "999 bytes", "12.3 kB" or "10.5 MB"."""
    for unit, length in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= length:
            return f"{size / length:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size:,} byte{'s' * (size != 1)}"


def apart(*sizes):
    """The words of several sizes; whole bytes, if they would be the same."""
    said = [words(size) for size in sizes]
    return said if len(set(said)) == len(said) else [f"{size:,} bytes" for size in sizes]


def too_many(size, most, setting=None):
    """A size and the limit that it exceeds: "12.3 MB; the limit is 10.5 MB (MAX_FILE_SIZE)"."""
    said, limit = apart(size, most)
    return f"{said}; the limit is {limit}{f' ({setting})' if setting else ''}"
