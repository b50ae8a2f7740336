"""The limit a training step is measured against: peak matrix-multiplication FLOPs per second."""

import time

# Dense peaks (no structured sparsity) of one device as JAX counts devices, in TFLOP/s, for
# bfloat16 (float16 is the same) and for float32 inputs at JAX's default precision. That default
# multiplies float32 in one bfloat16 pass on TPUs and in TF32 on NVIDIA GPUs since Ampere.
# Sources: Google Cloud's TPU pages (v4 275, v5e 197, v5p 459, v6e 918 per chip); NVIDIA's data
# sheets of A100, H100 (SXM5, PCIe, NVL) and H200 (SXM, NVL), whose headline numbers for H100 and
# H200 are with sparsity and therefore halved here.
# The first key contained in the lower-case device kind is used, so special forms come first.
_PEAK_TFLOPS: tuple[tuple[str, float, float], ...] = (
    ("tpu v6", 918.0, 918.0),
    ("tpu v5 lite", 197.0, 197.0),
    ("tpu v5e", 197.0, 197.0),
    ("tpu v5", 459.0, 459.0),  # JAX calls v5p "TPU v5" or "TPU v5p"
    ("tpu v4 lite", 138.0, 138.0),
    ("tpu v4", 275.0, 275.0),
    ("h200 nvl", 835.5, 417.5),
    ("h200", 989.5, 494.5),
    ("h100 nvl", 835.5, 417.5),
    ("h100 pcie", 756.0, 378.0),
    ("h100", 989.5, 494.5),
    ("a100", 312.0, 156.0),
)


def device_peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the dense peak FLOPs per second of one device, None where it is not known.

    For a CPU it is never known: measure it with `measure_matmul_peak`.

    Args:
        device_kind: `jax.devices()[0].device_kind`, e.g. "TPU v5p" or "NVIDIA H100 80GB HBM3".
        dtype: type the matrices are multiplied in: "bfloat16", "float16" or "float32".

    >>> device_peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16")
    312000000000000.0
    >>> device_peak_flops("cpu", "float32") is None
    True
    """
    kind = device_kind.lower()
    for name, half, single in _PEAK_TFLOPS:
        if name in kind:
            peaks = {"bfloat16": half, "float16": half, "float32": single}
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


def measure_matmul_peak(dtype: str, seconds: float = 0.3) -> float:
    """Returns the FLOPs per second that JAX reaches on one large square matrix product.

    The stand-in for a data sheet where there is none: on a CPU this is the rate of all its cores
    together, whatever number of virtual devices JAX divides them into.

    Args:
        dtype: type of the matrices, e.g. "float32".
        seconds: how long to measure, after compiling; the fastest product counts, because
            whatever else the machine does can only slow one down.
    """
    import jax
    import jax.numpy as jnp

    size = 1024 if jax.default_backend() == "cpu" else 8192
    device = jax.local_devices()[0]
    # Not all zeros: power-limited devices multiply zeros faster.
    matrix = jax.device_put(jnp.sin(jnp.arange(size * size, dtype=jnp.float32)), device)
    matrix = matrix.reshape(size, size).astype(dtype)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    best, until = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= until:
            return 2.0 * size**3 / best
