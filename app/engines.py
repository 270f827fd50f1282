"""Run a batch through the network: OpenVINO on a CPU, torch on a GPU (or on a CPU, as the reference).

An engine is made from a bundle and has three calls:
    infer(batch, deadline, alone): float32 (N, 3, H, W) → float32 (N, outputs); alone: nothing else wants the processor;
        raises DeadlineExceeded, MemoryError
    hung_seconds(): how long an inference has gone on past the deadline of everyone who waited for it
    close()
"""
import collections
import contextlib
import ctypes
import os
import queue
import sys
import time

import numpy as np

from app import bundle, metrics
from app.config import StartError
from app.scheduler import Batcher, DeadlineExceeded

# OpenVINO's package reports its use to a statistics server when it is imported. A service that its user did not ask
# to call anyone does not; without the reporting package OpenVINO does without.
sys.modules.setdefault("openvino_telemetry", None)

POLL_S = 0.05
# The streams keep every core busy. A thread that accepts, reads or refuses a request must not wait for its time slice
# behind them, least of all while it holds Python's lock, for which all others wait then.
STREAMS_NICE = 19
ALL_CORES_MAX_BYTES = 128 * 2**20  # of weights, whose second copy is what a lone request on all cores costs


class EngineError(StartError):
    """An engine that cannot run here as asked; one line."""


def self_test_input(preprocessing):
    """A smooth coloured pattern as the model's input: float32 (1, 3, crop, crop), the same on every machine."""
    y, x = np.mgrid[0:preprocessing.crop, 0:preprocessing.crop].astype(np.float32) / preprocessing.crop
    return np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y - 2 * x), np.sin(9 * x * y)])[None].astype(np.float32)


def export(network, engine, folder, settings):
    """Write a loaded Network into a bundle's folder for this engine.

    Returns (the names of the files, what the network answers to self_test_input, as a list, the manifest's
    `quantization`). Raises StartError.
    """
    import torch
    test_input = self_test_input(network.preprocessing)
    with torch.inference_mode():
        reference = network.module(torch.from_numpy(test_input))[0].tolist()
    if engine == "torch":
        torch.save(network.module.state_dict(), folder / "model.pt")
        return ["model.pt"], reference, None
    import openvino
    crop = network.preprocessing.crop
    with torch.inference_mode():
        model = openvino.convert_model(network.module, example_input=torch.zeros(1, 3, crop, crop),
                                       input=[1, 3, crop, crop])
    quantization = None
    if settings.precision == "int8":
        from app import quantize
        model, agreement = quantize.quantized(model, network.preprocessing, settings)
        quantization = {"calibration_sha256": bundle.calibration_sha256(settings), "agreement": agreement}
        reference = quantize.outputs(model, test_input)[0].tolist()
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return ["model.xml", "model.bin"], reference, quantization


def create(manifest, folder, plan, settings, device):
    """The engine of a bundle on a device ("cpu", "cuda:0"). Raises EngineError."""
    if manifest.engine == "openvino":
        return OpenVINOEngine(folder, plan.streams, settings.precision)
    return TorchEngine(manifest, folder, plan, settings, device)


class OpenVINOEngine:
    """`streams` inferences at once, each on one thread, which share one copy of the weights; and, where the weights are
    small enough for a second copy, one inference on as many threads for a request that is alone."""

    def __init__(self, folder, streams, precision):
        import openvino
        core = openvino.Core()
        native_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "auto":
            precision = "bf16" if native_bf16 else "fp32"
        if precision == "bf16" and not native_bf16:
            raise EngineError("PRECISION is bf16, but this processor does not calculate in bf16; use fp32 or auto")
        if precision == "fp16":
            raise EngineError("PRECISION is fp16, which is for GPUs; a CPU takes fp32, bf16 or auto")
        self.precision, self.framework = precision, f"openvino {openvino.__version__.split('-')[0]}"

        others = own_threads()

        def requests(streams, count):
            compiled = core.compile_model(folder / "model.xml", "CPU", {
                "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": self.threads,
                # Pinned streams of two processes would share the first core and leave the others idle.
                "ENABLE_CPU_PINNING": False,
                "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"})
            idle = queue.LifoQueue()
            for _ in range(count):
                idle.put(compiled.create_infer_request())
            return idle
        self.threads = streams
        self.idle = requests(streams, streams)
        self.on_all_cores = requests(1, 1) \
            if streams > 1 and (folder / "model.bin").stat().st_size <= ALL_CORES_MAX_BYTES else None
        unload_pages(folder / "model.bin")
        for thread in own_threads() - others:
            with contextlib.suppress(ProcessLookupError):  # it only helped to compile
                os.setpriority(os.PRIO_PROCESS, thread, STREAMS_NICE)
        self.overdue = collections.deque()  # inferences whose caller has left; their requests come back when they end

    def infer(self, batch, deadline, alone=False):
        """Images one after the other, on as many idle streams as there are: larger batches gain nothing on a CPU.
        A single one that is alone has all cores."""
        pool = self.idle
        if alone and len(batch) == 1 and self.on_all_cores and not self.on_all_cores.empty():
            pool = self.on_all_cores
        outputs, running = [None] * len(batch), collections.deque()
        idle = [self.take(pool, deadline)]
        try:
            for i in range(len(batch)):
                if not idle and len(running) < len(batch):
                    try:
                        idle.append(pool.get_nowait())
                    except queue.Empty:
                        self.finish(*running[0], outputs, deadline)
                        idle.append(running.popleft()[1])
                request = idle.pop()
                request.start_async({0: batch[i:i + 1]}, share_inputs=True)
                running.append((i, request))
                metrics.observe("batch_size", 1)
            while running:
                self.finish(*running[0], outputs, deadline)
                idle.append(running.popleft()[1])
        finally:
            for request in idle:
                pool.put(request)
            for _, request in running:
                request.cancel()
                self.overdue.append((request, pool, time.monotonic()))
        return np.concatenate(outputs)

    def finish(self, i, request, outputs, deadline):
        try:
            if not request.wait_for(max(1, int(1000 * deadline.remaining()))):
                raise DeadlineExceeded("inference")
        except RuntimeError as e:
            raise (MemoryError(str(e)) if is_out_of_memory(e) else e) from e
        outputs[i] = request.get_output_tensor(0).data.copy()

    def take(self, pool, deadline):
        """An idle request, waiting for one until the deadline."""
        while True:
            for _ in range(len(self.overdue)):
                request, its_pool, since = self.overdue.popleft()
                if has_ended(request):
                    its_pool.put(request)
                else:
                    self.overdue.append((request, its_pool, since))
            try:
                return pool.get(timeout=max(0.0, min(POLL_S, deadline.remaining())))
            except queue.Empty:
                if deadline.remaining() <= 0:
                    raise DeadlineExceeded("queue") from None

    def hung_seconds(self):
        """How long the oldest inference runs on after its caller has left."""
        return max((time.monotonic() - since for request, _, since in list(self.overdue) if not has_ended(request)),
                   default=0.0)

    def close(self):
        self.idle = self.on_all_cores = None


def own_threads():
    """Ids of this process' threads on Linux; elsewhere none."""
    return {int(name) for name in os.listdir("/proc/self/task")} if os.path.isdir("/proc/self/task") else set()


def unload_pages(path):
    """Give back the memory of a mapped file's pages: OpenVINO has repacked the weights and keeps the mapping, of whose
    100 MB (ResNet-50) it reads 3 MB again. Linux only; elsewhere nothing happens."""
    try:
        with open("/proc/self/maps") as maps:
            ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(f" {path.resolve()}")]
    except OSError:
        return
    libc, dontneed = ctypes.CDLL(None), 4  # MADV_DONTNEED
    for start, end in ranges:
        libc.madvise(ctypes.c_void_p(int(start, 16)), ctypes.c_size_t(int(end, 16) - int(start, 16)), dontneed)


def is_out_of_memory(e):
    """Whether an engine's RuntimeError is about memory: OpenVINO and torch (CUDA and CPU) say it in these words."""
    return any(words in str(e) for words in ("bad_alloc", "out of memory", "can't allocate memory", "allocate",
                                             "ALLOC_FAILED"))


def has_ended(request):
    """Whether an inference that was cancelled is over; its outcome interests nobody."""
    try:
        return request.wait_for(0)
    except RuntimeError:  # OpenVINO's word for «cancelled» or «failed»
        return True


class TorchEngine:
    """torch in a fixed pool of threads: one inference a thread on a CPU; dynamic batches, channels last, on a GPU."""

    def __init__(self, manifest, folder, plan, settings, device):
        import torch
        self.torch, self.device = torch, torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        precision = settings.precision
        if precision == "int8":
            raise EngineError("PRECISION is int8, which needs ENGINE=openvino on a CPU")
        if precision == "fp16" and not self.on_gpu:
            raise EngineError("PRECISION is fp16, which is for GPUs; a CPU takes fp32, bf16 or auto")
        self.framework = f"torch {torch.__version__}"
        try:
            self.start(manifest, folder, plan, settings, precision)
        except (RuntimeError, MemoryError) as e:  # the driver is too old, the GPU another program's, its memory full
            if not self.on_gpu:
                raise
            raise EngineError(f"{device} cannot be used: {str(e).splitlines()[0]}; DEVICE=cpu serves without it") from e

    def start(self, manifest, folder, plan, settings, precision):
        from app import networks
        torch = self.torch
        if self.on_gpu:
            torch.cuda.set_device(self.device)
            # TF32 has 10 bits of 23: an fp32 that is not what it says.
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        else:
            torch.set_num_threads(1)
        if precision == "auto":
            precision = "bf16" if self.on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        self.precision = precision
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        with torch.device("meta"):
            module = networks.rebuild(**manifest.network)
        state = torch.load(folder / "model.pt", map_location="cpu", mmap=True, weights_only=True)
        module.load_state_dict(state, assign=True)  # on a CPU the workers share the file's pages
        self.module = module.to(self.device, self.dtype,
                                memory_format=torch.channels_last if self.on_gpu else torch.preserve_format)
        max_batch = settings.max_batch_size if self.on_gpu else 1
        if self.on_gpu:  # kernels are loaded and memory is taken now, not by the first requests of each size
            side, size = manifest.preprocessing["crop"], max_batch
            while size >= 1:
                self.run(np.zeros((size, 3, side, side), np.float32))
                size //= 2
        # Two threads on a GPU: while one waits for its batch, the other gathers and copies the next.
        self.batcher = Batcher(self.run, threads=2 if self.on_gpu else plan.streams, max_batch=max_batch,
                               wait_s=settings.batch_timeout_ms / 1000 if self.on_gpu else 0)

    def run(self, batch):
        """float32 (N, 3, H, W) → float32 (N, outputs). Raises MemoryError."""
        failure = None
        try:
            with self.torch.inference_mode():
                tensor = self.torch.from_numpy(batch)
                if self.on_gpu:  # sent as it is, and converted there
                    tensor = tensor.pin_memory().to(self.device, non_blocking=True)
                tensor = tensor.to(self.dtype, memory_format=self.torch.channels_last if self.on_gpu
                                   else self.torch.preserve_format)
                return self.module(tensor).float().cpu().numpy()
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            failure = str(e)
        if self.on_gpu:  # out here nothing holds the activations any more
            self.torch.cuda.empty_cache()
        raise MemoryError(failure)

    def infer(self, batch, deadline, alone=False):
        return self.batcher.run(batch, deadline)

    def hung_seconds(self):
        return self.batcher.overdue_seconds()

    def close(self):
        """End the threads and give the device's memory back."""
        self.batcher.close()
        self.module = None
        if self.on_gpu:
            self.torch.cuda.empty_cache()
