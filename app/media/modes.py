"""From pictures in any of Pillow's modes to RGB."""
from PIL import Image


def to_rgb(image):
    """Any of Pillow's modes → RGB: 16 and 32 bit scaled to 8, transparency composited over white."""
    if image.mode.startswith("I;16"):
        image = image.convert("I")  # converted straight to L or RGB, everything above 255 would be white
    if image.mode in ("I", "F"):
        top = image.getextrema()[1]
        full_scale = 1.0 if image.mode == "F" and top <= 1 else 255.0 if top <= 255 and image.mode == "F" else 65535.0
        image = image.convert("F").point(lambda value: value * (255 / full_scale) + 0.5).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
