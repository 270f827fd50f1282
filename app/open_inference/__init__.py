"""The Open Inference Protocol V2 over HTTP, which KServe's and Triton's clients speak. Imported with the first request
under /v2.

The specification: https://github.com/kserve/open-inference-protocol; the extensions classification and
binary_tensor_data: Triton's docs/protocol.
"""
