"""Pictures a second and peak memory of the full-size VinVL detector with random weights.

    OMP_NUM_THREADS=2 python -m tests.bench.bench_vinvl [--pictures 3] [--device cpu] [--dtype float32]

The pictures are 640 x 480, which become 800 x 600. Random weights do the same convolutions on the same 300 proposals as
trained ones. Memory is the process's largest resident size (on CUDA also what was allocated there).
"""

import argparse
import resource
import time

import numpy as np
import torch

from pyramidclip_hf.vinvl import VinVLConfig, VinVLForObjectAttributeDetection, VinVLImageProcessor


def peak_mib():
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def parse_arguments():
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_vinvl", description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=3, help="measured one by one, after one to warm up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


def make_pictures(count):
    """Smooth noise, so that the pictures have regions."""
    coarse = torch.rand(count, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(480, 640), mode="bicubic").clamp(0, 1)
    return list((smooth * 255).byte().permute(0, 2, 3, 1).numpy())


def build(device, dtype):
    torch.manual_seed(0)
    model = VinVLForObjectAttributeDetection(VinVLConfig()).eval()
    return model.to(device, getattr(torch, dtype))


def measure(model, pictures, device):
    """For each picture: seconds of preparation, seconds and processor seconds of the model, number of proposals."""
    processor, rows = VinVLImageProcessor(), []
    for picture in pictures:
        start = time.perf_counter()
        inputs = processor(picture, return_tensors="pt").to(device)
        middle, busy = time.perf_counter(), time.process_time()
        output = model(**inputs)
        # Names of the labels have been looked up, so the device has finished.
        end, busy = time.perf_counter(), time.process_time() - busy
        rows.append((middle - start, end - middle, busy, len(output.proposals[0])))
    return np.array(rows).T


def main():
    arguments = parse_arguments()
    base = peak_mib()
    model = build(arguments.device, arguments.dtype)
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 2**20
    columns = measure(model, make_pictures(arguments.pictures + 1), arguments.device)
    prepared, detected, busy, proposals = columns[:, 1:]
    middle = np.median(detected)
    threads = torch.get_num_threads()
    print(f"{arguments.device}, {arguments.dtype}, {threads} threads, {len(detected)} pictures of 800 x 600")
    print(f"proposals a picture: {proposals.min():.0f} to {proposals.max():.0f}")
    print(f"preparation: {1e3 * np.median(prepared):.0f} ms a picture (median)")
    print(
        f"model: {middle:.2f} s a picture (median; {detected.min():.2f} to {detected.max():.2f}), "
        f"{1 / middle:.3f} pictures/s"
    )
    if arguments.device == "cpu":
        share = np.median(busy / detected)
        print(
            f"processor time: {np.median(busy):.1f} s a picture (median); the process had {share:.2f} of its {threads} "
            f"cores, with all of them it does about {threads / np.median(busy):.3f} pictures/s"
        )
    print(f"peak memory: {peak_mib():.0f} MiB, of which {base:.0f} before the model; weights {weights:.0f} MiB")
    if arguments.device.startswith("cuda"):
        print(f"peak on the device: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
