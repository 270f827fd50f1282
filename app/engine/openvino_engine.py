"""The OpenVINO engine: single images, one stream per core."""
import ctypes
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from app.engine import EngineError, is_out_of_memory
from app.errors import DeadlineExceeded
from app.server import counters

POLL_S = 0.05
ALL_CORES_MAX_BYTES = 128 * 2**20  # of weights: to run a lone request on all cores takes a second copy


class OpenVINOEngine:
    """`streams` single-threaded inferences at once, which share one copy of the weights; and, if the weights are small
    enough for a second copy, one inference on as many threads for a lone request."""

    def __init__(self, folder, streams, precision, chosen="fp32"):
        import openvino
        core = openvino.Core()
        native_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "auto":  # the image may have been made on another processor
            precision = "fp32" if chosen == "bf16" and not native_bf16 else chosen
        if precision == "bf16" and not native_bf16:
            raise EngineError("PRECISION is bf16, but this processor does not support bf16; use fp32 or auto")
        self.precision, self.framework = precision, f"openvino {openvino.__version__.split('-')[0]}"
        self.tensor, self.threads, self.folder, self.core = openvino.Tensor, streams, folder, core
        self.overdue, self.lock = [], threading.Lock()  # [(request, pool, since)] whose callers have left
        has_second = streams > 1 and (folder / "model.bin").stat().st_size <= ALL_CORES_MAX_BYTES
        with ThreadPoolExecutor(2) as threads:  # one compilation occupies one core
            compiled = list(threads.map(self.compiled, (streams, 1) if has_second else (streams,)))
        self.idle = self.requests(compiled[0], streams)
        self.on_all_cores = self.requests(compiled[1], 1) if has_second else None
        unload_pages(folder / "model.bin")

    def compiled(self, streams):
        return self.core.compile_model(self.folder / "model.xml", "CPU", {
            "NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": self.threads,
            # Pinned streams of two processes would share the first core and leave the others idle.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32"})

    def requests(self, compiled, streams):
        """A pool of `streams` idle inference requests, each of which has run once; a single one will, in the self-test.
        First runs in a process must not come from several threads at once: with OpenVINO 2026.4 they can deadlock."""
        idle, blank = queue.LifoQueue(), np.zeros(tuple(compiled.input(0).shape), np.float32)
        requests = [compiled.create_infer_request() for _ in range(streams)]
        if streams > 1:
            for request in requests:
                self.begin(request, blank)
        for request in requests:
            request.wait()
            idle.put(request)
        return idle

    def begin(self, request, image):
        """Start an inference on (1, 3, H, W). The array is kept with the request: OpenVINO reads it in place."""
        request.image = np.ascontiguousarray(image)
        request.set_input_tensor(0, self.tensor(request.image, shared_memory=True))
        request.start_async()

    def infer(self, batch, deadline, alone=False, features=False):
        """Infer images one by one on all idle streams (batches gain nothing on a CPU); a lone image gets all cores."""
        pool = self.idle
        if alone and len(batch) == 1 and self.on_all_cores and not self.on_all_cores.empty():
            pool = self.on_all_cores
        outputs, running, idle = [[None] * len(batch) for _ in range(1 + features)], [], [self.take(pool, deadline)]
        try:
            for i in range(len(batch)):
                if not idle:
                    try:
                        idle.append(pool.get_nowait())
                    except queue.Empty:
                        self.finish(running, idle, outputs, deadline)
                self.begin(idle[-1], batch[i:i + 1])  # if this fails, the request is still idle
                running.append((i, idle.pop()))
                counters.observe("batch_size", 1)
            while running:
                self.finish(running, idle, outputs, deadline)
        finally:
            for request in idle:
                pool.put(request)
            with self.lock:
                for _, request in running:
                    request.cancel()
                    self.overdue.append((request, pool, time.monotonic()))
        return tuple(map(np.concatenate, outputs)) if features else np.concatenate(outputs[0])

    def finish(self, running, idle, outputs, deadline):
        """Wait for the oldest running inference."""
        i, request = running[0]
        try:
            if not request.wait_for(max(1, int(1000 * deadline.remaining()))):
                raise DeadlineExceeded("inference")
        except RuntimeError as e:
            raise (MemoryError(str(e)) if is_out_of_memory(e) else e) from e
        for number, of_output in enumerate(outputs):
            of_output[i] = request.get_output_tensor(number).data.copy()
        idle.append(running.pop(0)[1])

    def take(self, pool, deadline):
        """An idle request, waiting for one until the deadline."""
        while True:
            self.take_back()
            try:
                return pool.get(timeout=max(0.0, min(POLL_S, deadline.remaining())))
            except queue.Empty:
                if deadline.remaining() <= 0:
                    raise DeadlineExceeded("queue") from None

    def take_back(self):
        """Return requests to their pools whose inference has ended after its caller left."""
        with self.lock:
            ended = [one for one in self.overdue if has_ended(one[0])]
            self.overdue = [one for one in self.overdue if one not in ended]
        for request, pool, _ in ended:
            pool.put(request)

    def hung_seconds(self):
        """How long the oldest inference has been running since its caller left."""
        self.take_back()
        with self.lock:
            return max((time.monotonic() - since for _, _, since in self.overdue), default=0.0)

    def close(self):
        self.idle = self.on_all_cores = self.core = None


def unload_pages(weights):
    """Release the mapped pages that only loading needs: of the weights, which OpenVINO has repacked (of ResNet-50's 100
    MB it reads 3 MB again), and 22 MB of its own code. Does nothing except on Linux."""
    its_name = f" {weights.resolve()}"
    try:
        with open("/proc/self/maps") as maps:
            ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(its_name)
                      or " r-xp " in line and "/openvino/libs/" in line]
    except OSError:
        return
    libc, dontneed = ctypes.CDLL(None), 4  # MADV_DONTNEED
    for start, end in ranges:
        libc.madvise(ctypes.c_void_p(int(start, 16)), ctypes.c_size_t(int(end, 16) - int(start, 16)), dontneed)


def has_ended(request):
    """Whether a cancelled inference is over; its outcome does not matter."""
    try:
        return request.wait_for(0)
    except RuntimeError:  # it was cancelled or failed
        return True
