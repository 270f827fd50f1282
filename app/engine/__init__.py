"""Run batches through a network: OpenVINO on a CPU, torch on a GPU (or on a CPU, as the reference).

An engine is made from a bundle and has three calls:
    infer(batch, deadline, alone): float32 (N, 3, H, W) → float32 (N, outputs); alone: nothing else wants the processor;
        raises DeadlineExceeded, MemoryError
    hung_seconds(): how long an inference has gone on past the deadline of everyone who waited for it
    close(): give threads and memory back; nothing is inferred any more
It is called in native threads, several at a time.
"""
import sys

from app.config import StartError

# OpenVINO's package reports its use to a statistics server when it is imported, from a forked child. A service that its
# user did not ask to call anyone does not; without the reporting package OpenVINO does without.
sys.modules.setdefault("openvino_telemetry", None)


class EngineError(StartError):
    """An engine that cannot run here as asked; one line."""


def create(manifest, folder, streams, settings, device, rebuild):
    """The engine of a bundle on a device ("cpu", "cuda:0"). Raises EngineError.

    streams: inferences at once; rebuild: makes the bare torch module of manifest.network, where torch is the engine.
    """
    if manifest.engine == "openvino":
        from app.engine.openvino_engine import OpenVINOEngine
        return OpenVINOEngine(folder, streams, settings.precision)
    from app.engine.torch_engine import TorchEngine
    return TorchEngine(manifest, folder, streams, settings, device, rebuild)


def is_out_of_memory(e):
    """Whether an engine's RuntimeError is about memory: OpenVINO and torch (CUDA and CPU) say it in these words."""
    return any(words in str(e) for words in ("bad_alloc", "out of memory", "can't allocate memory", "allocate",
                                             "ALLOC_FAILED"))
