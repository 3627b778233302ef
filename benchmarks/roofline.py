"""Bytes and multiplications of each part of a step on a GPU, and the time that they allow.

    python benchmarks/roofline.py

What a part must read and write at least is counted from its shapes: rows gathered from a table that
does not fit into the L2 cache once per entry, everything else once. The time is the larger of bytes
over bandwidth and operations over rate, by NVIDIA's data sheets: a kernel is not faster than this.
`gpu_check.py` puts what was measured beside it.
"""

from typing import NamedTuple

SHAPES = ((16384, 4096, 131072, 32), (16384, 4096, 131072, 192), (8192, 2304, 65536, 64))
"""N, D, L, k: Llama-3-8B's width, with few and with many active latents, and Gemma 2 2B's."""


class Gpu(NamedTuple):
    """Peaks of a data sheet: dense bfloat16, and memory."""

    name: str
    flops: float
    bytes_per_second: float
    l2_bytes: float


GPUS = (Gpu("H100 SXM", 989e12, 3.35e12, 50e6), Gpu("A100 SXM 80 GB", 312e12, 2.039e12, 40e6))


class Part(NamedTuple):
    """What one part of a step moves and computes."""

    name: str
    bytes: float
    flops: float
    per_step: bool
    """Whether it is done once per optimizer step, however many rows there are."""

    def seconds(self, gpu: Gpu) -> float:
        """The least that it takes."""
        return max(self.bytes / gpu.bytes_per_second, self.flops / gpu.flops)


def parts(n: int, d: int, latents: int, k: int, gpu: Gpu = GPUS[0]) -> list[Part]:
    """The parts of a TopK SAE's step in bfloat16 with signum; weights and sums are float32."""
    weights, rows, entries = 4.0 * latents * d, 4.0 * n * d, float(n * k)

    def gathered(table: float, per_entry: float) -> float:
        return table if table < gpu.l2_bytes else entries * per_entry

    return [
        Part("product", rows / 2 + weights / 2 + 2 * n * latents, 2.0 * n * latents * d, False),
        Part("weights to bfloat16", 1.5 * weights, 0, True),
        Part("top k", 2.0 * n * latents + 12 * entries, 0, False),
        Part(
            "sum, error, their gradient",
            gathered(weights, 4 * d) + 3 * rows,
            4 * entries * d,
            False,
        ),
        Part("sort by latent", 4 * 12 * entries, 0, False),
        Part("gradient of W_dec", weights + rows, 2 * entries * d, False),
        Part("gradient of W_enc", weights + rows / 2, 2 * entries * d, False),
        Part("gradient of b_dec through W_enc", weights, 2 * latents * d, False),
        Part("moments", 2 * rows, 0, False),
        Part("gradients finished", 5 * weights, 0, True),
        Part("update", 10 * weights, 0, True),
    ]


def enough_rows(shape: tuple[int, int, int, int], gpu: Gpu) -> int:
    """The rows of a step from which its parts of fixed size cost less than its product."""
    fixed = sum(part.seconds(gpu) for part in parts(*shape, gpu) if part.per_step)
    product = parts(*shape, gpu)[0].seconds(gpu) / shape[0]
    return round(fixed / product)


def table(steps: dict[str, dict[str, float]]) -> str:
    """What gpu_check.py measured of steps, beside what is possible, in Markdown."""
    lines = ["| shape | product | step | step / product | on paper | AuxK | peak memory |"]
    lines.append("|---|---|---|---|---|---|---|")
    for shape, found in steps.items():
        product, step, least = found["product_ms"], found["step_ms"], found["roofline_ms"]
        lines.append(
            f"| {shape} | {product:.1f} | {step:.1f} | {found['ratio']:.2f} | {least:.1f} | "
            f"{found['auxk_ratio']:.2f} times | {found['peak_gb']:.1f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    for gpu in GPUS:
        for shape in SHAPES:
            found = parts(*shape, gpu)
            print(f"{gpu.name}, N = {shape[0]}, D = {shape[1]}, L = {shape[2]}, k = {shape[3]}")
            print(f"    {'':32} {'GB':>8} {'TFLOP':>8} {'ms':>8}")
            for name, moved, flops, _ in found:
                ms = 1e3 * Part(name, moved, flops, False).seconds(gpu)
                print(f"    {name:32} {moved / 1e9:8.2f} {flops / 1e12:8.2f} {ms:8.2f}")
            seconds = [part.seconds(gpu) for part in found]
            print(f"    {'sum':32} {'':17} {1e3 * sum(seconds):8.2f}")
            print(f"    {'sum / product':32} {'':17} {sum(seconds) / seconds[0]:8.2f}")
            print(f"    update below the product from {enough_rows(shape, gpu)} rows on")


if __name__ == "__main__":
    main()
