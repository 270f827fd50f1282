"""The reliability diagram: accuracy against confidence, as a PNG."""
import io
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

SCALE = 2            # drawn larger and then reduced, for smooth lines
SIDE, GAP = 380, 84  # of a plot, and between two, in pixels
LEFT, TOP, HISTOGRAM, BOTTOM = 66, 112, 84, 62
GAP_WIDTH = 0.36     # of a bar's


class Palette(NamedTuple):
    """right: the bar, the share that is right; high, low: the gap to a confidence that is too high, or too low."""
    ink: str
    faint: str
    grid: str
    paper: str
    right: str
    high: str
    low: str
    count: str


LIGHT = Palette("#1f2933", "#66727f", "#e4e8ec", "#ffffff", "#6f9fd8", "#c8452b", "#1d3f6e", "#a9b8c9")
DARK = Palette("#e3e8ee", "#98a4b1", "#2d353e", "#14181d", "#4a78b5", "#f08a70", "#cfe2fa", "#5a6775")


def reliability_png(plots, title, palette=LIGHT):
    """A PNG's bytes. plots: [(its title, [calibration.Bin], ECE, NLL)], side by side."""
    width = LEFT + len(plots) * SIDE + (len(plots) - 1) * GAP + 30
    height = TOP + SIDE + 14 + HISTOGRAM + BOTTOM
    image = Image.new("RGB", (width * SCALE, height * SCALE), palette.paper)
    canvas = Canvas(image, palette)
    canvas.text(LEFT, 16, title, 17, palette.ink)
    draw_legend(canvas)
    for i, (name, bins, ece, nll) in enumerate(plots):
        draw_plot(canvas, LEFT + i * (SIDE + GAP), name, bins, ece, nll, is_first=i == 0)
    buffer = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def before_and_after(title, fit, palette=LIGHT):
    """A PNG's bytes for a calibration.Fit."""
    plots = [("before, T = 1", fit.before), (f"after, T = {fit.temperature:.3f}", fit.after)]
    return reliability_png([(name, one.bins, one.ece, one.nll) for name, one in plots], title, palette)


class Canvas:
    """Draws in pixels of the finished picture."""

    def __init__(self, image, palette):
        self.draw, self.palette = ImageDraw.Draw(image), palette

    def box(self, left, top, right, bottom, colour):
        if right > left and bottom > top:
            self.draw.rectangle([round(left * SCALE), round(top * SCALE), round(right * SCALE) - 1,
                                 round(bottom * SCALE) - 1], fill=colour)

    def line(self, *points, colour, width=1.0):
        self.draw.line([(x * SCALE, y * SCALE) for x, y in points], fill=colour, width=max(1, round(width * SCALE)))

    def text(self, x, y, text, size, colour, anchor="la"):
        self.draw.text((x * SCALE, y * SCALE), text, colour, ImageFont.load_default(size * SCALE), anchor=anchor)


def draw_legend(canvas):
    x = LEFT
    for colour, words, width in [(canvas.palette.right, "accuracy", 92),
                                 (canvas.palette.high, "confidence too high", 158),
                                 (canvas.palette.low, "confidence too low", 0)]:
        canvas.box(x, 49, x + 12, 61, colour)
        canvas.text(x + 18, 55, words, 12, canvas.palette.ink, "lm")
        x += width


def draw_plot(canvas, left, name, bins, ece, nll, is_first):
    palette, right, bottom, count = canvas.palette, left + SIDE, TOP + SIDE, sum(one.count for one in bins)
    canvas.text(left, TOP - 32, name, 15, palette.ink)
    canvas.text(right, TOP - 31, f"ECE {100 * ece:.1f} %   NLL {nll:.3f}", 14, palette.faint, "ra")
    for tick in range(6):
        x, y = left + SIDE * tick / 5, bottom - SIDE * tick / 5
        canvas.line((left, y), (right, y), colour=palette.grid)
        canvas.line((x, TOP), (x, bottom), colour=palette.grid)
        if is_first:
            canvas.text(left - 8, y, f"{tick * 20} %", 12, palette.faint, "rm")
        canvas.text(x, bottom + 14 + HISTOGRAM + 6, f"{tick * 20} %", 12, palette.faint, "ma")
    step, most = SIDE / len(bins), max(one.count for one in bins)
    for i, one in enumerate(bins):
        if not one.count:
            continue
        x, height = left + i * step, SIDE * one.accuracy
        canvas.box(x + 1, bottom - height, x + step - 1, bottom, palette.right)
        said, beside = SIDE * one.confidence, step * (1 - GAP_WIDTH) / 2
        canvas.box(x + beside, bottom - max(height, said), x + step - beside, bottom - min(height, said),
                   palette.high if said > height else palette.low)
        canvas.line((x + 1, bottom - height), (x + step - 1, bottom - height), colour=palette.ink, width=1.5)
        floor = bottom + 14 + HISTOGRAM
        top = floor - max(1.5, one.count / most * (HISTOGRAM - 16))
        canvas.box(x + 1, top, x + step - 1, floor, palette.count)
        canvas.text(x + step / 2, top - 2, short(one.count), 9, palette.faint, "mb")
    canvas.line((left, bottom), (right, TOP), colour=palette.ink, width=1.2)
    canvas.line((left, TOP), (left, bottom), (right, bottom), colour=palette.faint)
    canvas.line((left, bottom + 14 + HISTOGRAM), (right, bottom + 14 + HISTOGRAM), colour=palette.faint)
    canvas.text(left + SIDE / 2, bottom + 14 + HISTOGRAM + 26, f"confidence of {count} files", 13, palette.ink, "ma")
    if is_first:
        canvas.text(left - 8, bottom + 14 + HISTOGRAM - 8, "files", 12, palette.faint, "rm")


def short(count):
    """A count in at most four characters."""
    return str(count) if count < 1000 else f"{count / 1000:.{1 if count < 10_000 else 0}f}k"
