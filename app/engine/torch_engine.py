"""The torch engine: for GPUs, and on a CPU as the reference. The only module of a worker that imports torch."""
import functools

import numpy as np
import torch

from app.engine import EngineError, is_out_of_memory
from app.engine.batcher import Batcher


class TorchEngine:
    """torch in a fixed pool of threads: one inference per thread on a CPU; dynamic batches, channels last, on a GPU."""

    def __init__(self, manifest, folder, streams, settings, device, rebuild):
        self.device, self.rebuild = torch.device(device), rebuild
        self.on_gpu = self.device.type == "cuda"
        precision = settings.precision
        self.framework = f"torch {torch.__version__}"
        try:
            self.start(manifest, folder, streams, settings, precision)
        except (RuntimeError, MemoryError) as e:  # the driver is too old, or the GPU is taken or full
            if not self.on_gpu:
                raise
            raise EngineError(f"{device} cannot be used: {str(e).splitlines()[0]}; DEVICE=cpu serves without it") from e

    def start(self, manifest, folder, streams, settings, precision):
        if self.on_gpu:
            torch.cuda.set_device(self.device)
            # TF32 keeps 10 of the mantissa's 23 bits: not really fp32.
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        else:
            torch.set_num_threads(1)
        if precision == "auto":
            precision = "bf16" if self.on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        self.precision = precision
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        module, self.tap = self.rebuild(manifest)
        state = torch.load(folder / "model.pt", map_location="cpu", mmap=True, weights_only=True)
        module.load_state_dict(state, assign=True)  # on a CPU the workers share the file's pages
        self.module = module.to(self.device, self.dtype,
                                memory_format=torch.channels_last if self.on_gpu else torch.preserve_format)
        max_batch = settings.max_batch_size if self.on_gpu else 1
        if self.on_gpu:  # load kernels and allocate memory now, not at the first request of each size
            side, size = manifest.preprocessing["crop"], max_batch
            while size >= 1:
                self.run(np.zeros((size, 3, side, side), np.float32))
                size //= 2
        # Two threads on a GPU: while one waits for its batch, the other gathers and copies the next.
        self.batcher = Batcher(self.run, threads=2 if self.on_gpu else streams, max_batch=max_batch,
                               wait_s=settings.batch_timeout_ms / 1000 if self.on_gpu else 0)
        self.with_features = Batcher(functools.partial(self.run, features=True), threads=1, max_batch=max_batch,
                                     wait_s=0)

    def run(self, batch, features=False):
        """float32 (N, 3, H, W) → float32 (N, outputs), or N pairs of outputs and features. Raises MemoryError."""
        failure = None
        try:
            with torch.inference_mode():
                tensor = torch.from_numpy(batch)
                if self.on_gpu:  # copied as it is, converted there
                    tensor = tensor.pin_memory().to(self.device, non_blocking=True)
                tensor = tensor.to(self.dtype, memory_format=torch.channels_last if self.on_gpu
                                   else torch.preserve_format)
                outputs = self.module(tensor).float().cpu().numpy()
                if self.tap is None:
                    return outputs
                found = self.tap.take()
                return list(zip(outputs, found.float().cpu().numpy(), strict=True)) if features else outputs
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            failure = str(e)
        if self.on_gpu:  # outside the except block nothing holds the activations
            torch.cuda.empty_cache()
        raise MemoryError(failure)

    def infer(self, batch, deadline, alone=False, features=False):
        if not features:
            return self.batcher.run(batch, deadline)
        return tuple(map(np.stack, zip(*self.with_features.run(batch, deadline), strict=True)))

    def hung_seconds(self):
        return max(self.batcher.overdue_seconds(), self.with_features.overdue_seconds())

    def close(self):
        """Stop the threads and free the device's memory."""
        self.batcher.close()
        self.with_features.close()
        self.module = None
        if self.on_gpu:
            torch.cuda.empty_cache()
