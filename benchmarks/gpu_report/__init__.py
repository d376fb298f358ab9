"""What a machine with GPUs is asked once: is it right, and how fast beside theory.

    python -m benchmarks.gpu_report --out=DIR [--allow-cpu]

equality   layer, model and attention's kernels against the CPU of the same machine
exchanges  the model over all GPUs, by both exchanges of tokens, against one device
layer      a MoE++ layer beside a vanilla one and its bare products, forward and backward
paper      the paper's table of expert throughput, row by row
attention  forward and backward, by each kernel, with documents and without
step       training steps beside the bounds of the compiled program

Each is a module with `measure(sizes, rounds) -> rows`. They need nothing from the internet.
"""
