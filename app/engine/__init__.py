"""Run batches through a network: OpenVINO on a CPU, torch on a GPU (or on a CPU, as the reference).

An engine is created from a bundle and has three methods, which native threads call concurrently:
    infer(batch, deadline, alone, features): float32 (N, 3, H, W) → float32 (N, outputs); alone: nothing else needs the
        processor; features: return also the second output, see bundle.Manifest; raises DeadlineExceeded, MemoryError
    hung_seconds(): how long an inference has been running after everyone who waited for it has left
    close(): release threads and memory; no inference may follow
"""
import sys

from app.config import StartError

# When imported, OpenVINO reports its use to a statistics server, from a forked child. The service must not contact
# anyone unasked; without its telemetry package, OpenVINO does not.
sys.modules.setdefault("openvino_telemetry", None)


class EngineError(StartError):
    """An engine that cannot run here as configured; the message is one line."""


def create(manifest, folder, streams, settings, device, rebuild):
    """Create the engine for a bundle on a device ("cpu", "cuda:0"). Raises EngineError.

    streams: concurrent inferences; rebuild: creates the torch module of a manifest, if torch is the engine.
    """
    if manifest.engine == "openvino":
        from app.engine.openvino_engine import OpenVINOEngine
        return OpenVINOEngine(folder, streams, settings.precision, (manifest.quantization or {}).get("chosen", "fp32"))
    from app.engine.torch_engine import TorchEngine
    return TorchEngine(manifest, folder, streams, settings, device, rebuild)


def is_out_of_memory(e):
    """Whether an engine's RuntimeError means out of memory, as OpenVINO and torch (CUDA and CPU) word it."""
    return any(words in str(e) for words in ("bad_alloc", "out of memory", "can't allocate memory", "allocate",
                                             "ALLOC_FAILED"))
