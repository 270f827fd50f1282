"""What somebody who misspelt a name probably meant. Import it only where something is wrong, as it imports difflib."""
import difflib


def plain(word):
    """The word as it is compared: ResNet-50, resnet_50 and RESNET50 are the same."""
    return word.lower().replace("_", "").replace("-", "").replace(" ", "")


def nearest(word, known):
    """The name in `known` that is most like the word, or None if none is near."""
    by_plain = {plain(name): name for name in sorted(known, reverse=True)}
    found = difflib.get_close_matches(plain(word), by_plain, n=1, cutoff=0.76) or [
        name for name in by_plain if len(name) > 2 and sorted(name) == sorted(plain(word))]  # short, in another order
    return by_plain[found[0]] if found else None


def did_you_mean(word, known):
    """The end of a message about an unknown word, such as "; did you mean top_k?", or "" if no known one is near."""
    name = nearest(word, known)
    return f"; did you mean {name}?" if name else ""
