"""Parsers of settings that are rarely set, and what is said of bad values; see config.py."""
import contextlib
import re
import urllib.parse

UNITS = {"": 1, "b": 1, "k": 2**10, "kb": 2**10, "kib": 2**10, "m": 2**20, "mb": 2**20, "mib": 2**20,
         "g": 2**30, "gb": 2**30, "gib": 2**30}

# For suggestions: besides our own two, torchvision's classifiers, which itself would take seconds to list.
MODEL_NAMES = """ocean efficientnet_lite0 alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121
    densenet161 densenet169 densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4
    efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet
    inception_v3 maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large
    mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf
    regnet_x_8gf regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf
    regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50 resnext101_32x8d resnext101_64x4d resnext50_32x4d
    shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b
    swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16
    vit_b_32 vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2 wide_resnet50_2"""


def refusal(variable, error, text, secret):
    """What is wrong with a setting's text. error: a parser's, whose arguments are what the variable takes, in words,
    and the choices, if there are some; secret: whether the text must not be shown."""
    takes, *choices = error.args
    if secret:
        return f"{variable} must be {takes}, got something else"
    from app.suggestions import did_you_mean
    of_models = variable.endswith(("MODEL_NAME", "MODEL_FALLBACK", "MODELS"))
    names = choices[0] if choices else MODEL_NAMES.split() if of_models else ()
    return f"{variable} must be {takes}, got {text!r}{did_you_mean(text, names)}"


def listed(text, part, takes):
    """Comma-separated texts, each of which must match the pattern `part`."""
    parts = tuple(p.strip() for p in text.split(",") if p.strip())
    if not parts or not all(re.fullmatch(part, p) for p in parts):
        raise ValueError(takes)
    return parts


def keys(text):
    return listed(text, r"[!-+\--~]+", "comma-separated keys of visible ASCII characters")


def origins(text):
    return listed(text, r"\*|https?://[A-Za-z0-9.\-]+(:\d{1,5})?",
                  "* or comma-separated origins such as https://example.org")


def byte_size(text):
    match = re.fullmatch(r"(\d{1,15})\s*([a-z]*)", text.lower())
    if not match or match[2] not in UNITS or int(match[1]) == 0:
        raise ValueError("a number of bytes, or one followed by KiB, MiB or GiB")
    return int(match[1]) * UNITS[match[2]]


def store_url(text, *schemes):
    parts = urllib.parse.urlsplit(text)
    where = parts.path if parts.scheme == "unix" else parts.netloc
    if text != "memory://" and (parts.scheme not in schemes or not where):
        raise ValueError("memory:// or the URL of a Redis server such as redis://127.0.0.1:6379/0")
    return text


def rate_limit(text):
    import limits
    with contextlib.suppress(ValueError):
        if all(limit.amount for limit in limits.parse_many(text)):
            return text
    raise ValueError("a limit such as 60/minute, or several separated by ;")


def preprocessing(text):
    three = ",".join([r"[0-9](\.[0-9]{1,9})?"] * 3)
    pair = rf"(resize|crop)=[1-9][0-9]{{1,3}}|interpolation=(bilinear|bicubic)|(mean|std)={three}"
    names = [part.partition("=")[0] for part in text.split()]
    if not all(re.fullmatch(pair, part) for part in text.split()) or len(set(names)) < len(names):
        raise ValueError("pairs such as resize=256 crop=224 interpolation=bilinear mean=0.485,0.456,0.406 std=1,1,1")
    return text
