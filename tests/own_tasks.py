"""Models of one's own, for tests of what is made from their declarations."""
import io
import math
import struct
import wave

from app.tasks.own import InvalidInput, Media, OwnTask, choice, file, integer, number, text, yes_or_no

HTML = """<img src="x" onerror="document.title='hacked'"><b>bold</b> & 'so' on"""
RATE = 8000


class Sum(OwnTask):
    """Adds numbers up, and answers in the shape that is asked for, with <b>no tags</b>."""
    takes = "json"
    field = "numbers"
    example = [1, 2.5, 3]
    options = (integer("times", 1, 9, default=2, meaning=f"What the sum is multiplied by. {HTML}"),
               choice("shape", ("Members", "scores", "probabilities", "classes", "text", "list"), default="Members",
                      meaning="What the answer looks like."),
               yes_or_no("is_rounded", default=True, meaning="Whether the sum is rounded."),
               yes_or_no("is_negative", meaning="Whether the sum is negative; as it is, if nothing is chosen."),
               number("add", -10, 10, meaning="What is added to the sum."),
               text("note", most=99),
               file("more", meaning="A file whose bytes are added to the sum."))

    def decode(self, value, options):
        if not isinstance(value, list) or not all(isinstance(one, int | float) for one in value):
            raise InvalidInput(f"must be a list of numbers, got {value!r}")
        return value

    def predict(self, batch):
        return [math.fsum(numbers) for numbers in batch]

    def encode(self, total, options):
        total = total * options["times"] + (options["add"] or 0) + sum(options["more"] or b"")
        if options["is_negative"] is not None:
            total = abs(total) * (-1 if options["is_negative"] else 1)
        total, note = round(total) if options["is_rounded"] else total, options["note"] or "none"
        return {"Members": {"sum": total, "note": note, "of": {"times": options["times"], note: None}},
                "scores": {"sum": total, note: 0.25, "tiny": 0.00012},
                "probabilities": {"class": note, "probabilities": {"other": 0.25, note: 0.75}},
                "classes": [{"class": note, "confidence": 0.9}, {"class": "other", "confidence": 0.1}],
                "text": note, "list": [total, note, []]}[options["shape"]]


class Long(OwnTask):
    """A megabyte of the text."""
    takes = "text"

    def predict(self, batch):
        return [text * (2**20 // len(text)) for text in batch]


class Tone(OwnTask):
    """Plays a tone for 50 ms per character."""
    takes = "text"
    example = "la la la la"
    media_types = ("audio/wav",)
    options = (integer("pitch", 100, 2000, default=440, meaning="In hertz."),
               file("voice", meaning="A file whose bytes come before the tone."))

    def predict(self, batch):
        return [len(text) / 20 for text in batch]

    def encode(self, seconds, options):
        tone = [round(9000 * math.sin(2 * math.pi * options["pitch"] * i / RATE)) for i in range(int(seconds * RATE))]
        samples, result = [*(options["voice"] or b""), *tone], io.BytesIO()
        with wave.open(result, "wb") as to:
            to.setparams((1, 2, RATE, 0, "NONE", ""))
            to.writeframes(struct.pack(f"<{len(samples)}h", *samples))
        return Media(result.getvalue(), "audio/wav")


class Length(OwnTask):
    """Says how long a recording is."""
    takes = "audio"
    options = (text("prefix", most=99, default="Seconds:"),)

    def decode(self, value, options):
        with wave.open(io.BytesIO(value)) as sound:
            return sound.getnframes() / sound.getframerate()

    def predict(self, batch):
        return batch

    def encode(self, seconds, options):
        return f"{options['prefix']} {seconds}"


class Voices(OwnTask):
    """Has an option that only loading it makes."""
    takes = "text"
    options = (integer("times", 1, 9, default=1),)

    def load(self):
        self.options += (choice("voice", ("joe", "ann"), default="joe"),)

    def decode(self, value, options):
        return f"{options['voice']}: {value * options['times']}"

    def predict(self, batch):
        return batch


class Members(OwnTask):
    """Says which members its input has: all of the body but the options."""
    takes = "json"
    example = {"a": 1}
    options = (integer("times", 1, 9, default=2),)

    def predict(self, batch):
        return [sorted(members) for members in batch]
