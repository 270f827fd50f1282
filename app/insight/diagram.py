"""The reliability diagram: accuracy against confidence, as a PNG."""
import io

from PIL import Image, ImageDraw, ImageFont

SCALE = 2            # drawn larger and then reduced, for smooth lines
SIDE, GAP = 380, 84  # of a plot, and between two, in pixels
LEFT, TOP, HISTOGRAM, BOTTOM = 66, 84, 84, 62
INK, FAINT, GRID, PAPER = "#1f2933", "#66727f", "#e4e8ec", "#ffffff"
RIGHT_COLOUR, GAP_COLOUR, COUNT_COLOUR = "#3b6fb6", "#e8927c", "#a9b8c9"


def reliability_png(plots, title):
    """A PNG's bytes. plots: [(its title, [calibration.Bin], ECE, NLL)], side by side."""
    width = LEFT + len(plots) * SIDE + (len(plots) - 1) * GAP + 30
    height = TOP + SIDE + 14 + HISTOGRAM + BOTTOM
    image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    canvas = Canvas(image)
    canvas.text(LEFT, 16, title, 17)
    for i, (name, bins, ece, nll) in enumerate(plots):
        draw_plot(canvas, LEFT + i * (SIDE + GAP), name, bins, ece, nll, is_first=i == 0)
    buffer = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def before_and_after(title, fit):
    """A PNG's bytes for a calibration.Fit."""
    return reliability_png([("before, T = 1", fit.before.bins, fit.before.ece, fit.before.nll),
                            (f"after, T = {fit.temperature:.3f}", fit.after.bins, fit.after.ece, fit.after.nll)], title)


class Canvas:
    """Draws in pixels of the finished picture."""

    def __init__(self, image):
        self.draw = ImageDraw.Draw(image)

    def box(self, left, top, right, bottom, colour):
        if right > left and bottom > top:
            self.draw.rectangle([round(left * SCALE), round(top * SCALE), round(right * SCALE) - 1,
                                 round(bottom * SCALE) - 1], fill=colour)

    def line(self, *points, colour, width=1.0):
        self.draw.line([(x * SCALE, y * SCALE) for x, y in points], fill=colour, width=max(1, round(width * SCALE)))

    def text(self, x, y, text, size, colour=INK, anchor="la"):
        self.draw.text((x * SCALE, y * SCALE), text, colour, ImageFont.load_default(size * SCALE), anchor=anchor)


def draw_plot(canvas, left, name, bins, ece, nll, is_first):
    right, bottom, count = left + SIDE, TOP + SIDE, sum(one.count for one in bins)
    canvas.text(left, TOP - 32, name, 15)
    canvas.text(right, TOP - 31, f"ECE {ece:.1%}   NLL {nll:.3f}", 14, FAINT, "ra")
    for tick in range(6):
        x, y = left + SIDE * tick / 5, bottom - SIDE * tick / 5
        canvas.line((left, y), (right, y), colour=GRID)
        canvas.line((x, TOP), (x, bottom), colour=GRID)
        if is_first:
            canvas.text(left - 8, y, f"{tick * 20} %", 12, FAINT, "rm")
        canvas.text(x, bottom + 14 + HISTOGRAM + 6, f"{tick * 20} %", 12, FAINT, "ma")
    step, most = SIDE / len(bins), max(one.count for one in bins)
    for i, one in enumerate(bins):
        if not one.count:
            continue
        x, height = left + i * step, SIDE * one.accuracy
        canvas.box(x + 1, bottom - height, x + step - 1, bottom, RIGHT_COLOUR)
        should = SIDE * one.confidence
        canvas.box(x + 1, bottom - max(height, should), x + step - 1, bottom - min(height, should), GAP_COLOUR)
        canvas.line((x + 1, bottom - height), (x + step - 1, bottom - height), colour=INK, width=1.5)
        share, floor = one.count / most, bottom + 14 + HISTOGRAM
        canvas.box(x + 1, floor - max(1.5, share * (HISTOGRAM - 16)), x + step - 1, floor, COUNT_COLOUR)
        canvas.text(x + step / 2, floor - max(1.5, share * (HISTOGRAM - 16)) - 2, short(one.count), 9, FAINT, "mb")
    canvas.line((left, bottom), (right, TOP), colour=INK, width=1.2)
    canvas.line((left, TOP), (left, bottom), (right, bottom), colour=FAINT)
    canvas.line((left, bottom + 14 + HISTOGRAM), (right, bottom + 14 + HISTOGRAM), colour=FAINT)
    canvas.text(left + SIDE / 2, bottom + 14 + HISTOGRAM + 26, f"confidence of {count} files", 13, INK, "ma")
    if is_first:
        canvas.text(left - 8, bottom + 14 + HISTOGRAM - 8, "files", 12, FAINT, "rm")
        for i, (colour, words) in enumerate([(RIGHT_COLOUR, "share that is right"),
                                             (GAP_COLOUR, "gap to the confidence")]):
            canvas.box(right - 146, 9 + 18 * i, right - 134, 21 + 18 * i, colour)
            canvas.text(right - 127, 15 + 18 * i, words, 12, INK, "lm")


def short(count):
    """A count in at most four characters."""
    return str(count) if count < 1000 else f"{count / 1000:.{1 if count < 10_000 else 0}f}k"
