"""A real OpenVINO model that hangs: it loops for ever, uncancellable, when it is shown a white picture. And other
applications, for Gunicorn, that get into trouble."""
import contextlib
import dataclasses
import os
import resource
import shutil

import numpy as np

from app import create_app, model_loader
from app.api import rate_limits
from app.config import StartError
from app.engine import bundle
from app.engine.preprocess import Preprocessing, self_test_input
from app.prepare import bundles

SIZE = [1, 3, 224, 224]


def build():
    import openvino
    from openvino import opset13 as ops
    picture = ops.parameter(SIZE, np.float32)
    brightness = ops.reduce_mean(picture, np.array([0, 1, 2, 3]), keep_dims=False)
    turns = ops.select(ops.greater(brightness, np.float32(0.9)), np.int64(10**12), np.int64(1))
    y = ops.parameter(SIZE, np.float32)
    body = openvino.Model([ops.result(ops.constant(True)), ops.result(ops.multiply(y, np.float32(1)))], [y])
    loop = ops.loop(turns, ops.constant(True))
    loop.set_function(body)
    loop.set_special_body_ports([-1, 0])
    loop.set_merged_input(y, picture.output(0), body.get_results()[1].output(0))
    mean = ops.reduce_mean(loop.get_iter_value(body.get_results()[1].output(0), -1), np.array([1, 2, 3]), False)
    ramp = ops.constant(np.linspace(0, 1, 1000, dtype=np.float32)[None])
    logits = ops.multiply(ops.reshape(mean, [1, 1], False), ramp)
    return openvino.Model([ops.result(logits)], [picture])


def replace_model(model_dir):
    """Put the hanging model into the only bundle of a MODEL_DIR, with a manifest that is right about it."""
    import openvino
    (path,) = model_dir.glob("bundles/*/manifest.json")
    folder, manifest = path.parent, bundle.read(path.parent)
    model = build()
    for file in manifest.files:
        (folder / file).unlink()
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    shown = self_test_input(Preprocessing(**manifest.preprocessing))
    outputs = openvino.Core().compile_model(model, "CPU")(shown)[0][0]
    bundles.save_manifest(folder, dataclasses.replace(
        manifest, self_test={"outputs": outputs.tolist()},
        features={"kind": None, "size": 0, "reason": "it has one output"},
        files={f: bundles.sha256(folder / f) for f in ("model.xml", "model.bin")}))


def copy_model_dir(source, target):
    """A MODEL_DIR of its own with the export of efficientnet_lite0 alone."""
    (found,) = source.glob("bundles/efficientnet_lite0-*-openvino")
    shutil.copytree(found, target / "bundles" / found.name)
    return target


def create_impatient():
    """The application, for Gunicorn; a worker in which an inference hangs is replaced after two seconds."""
    model_loader.HUNG_AFTER_S = 2
    return create_app()


def create_patient():
    """The application; it waits for a Redis that has no time just now, as the machine is busy."""
    rate_limits.REDIS_TIMEOUT_S = 10
    return create_app()


def create_without_reserve():
    """The application; a worker that cannot load it can open no file any more."""
    try:
        return create_app()
    except StartError:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        with contextlib.suppress(OSError):
            while True:
                os.dup(0)
        raise
