"""CIFAR-10 to 90 % with a ViT on two CPU cores: seconds of a core's work, n seeds.

    OMP_WAIT_POLICY=passive python bench/speedrun_cpu.py [--seeds 0,1,2] [-p epochs=28] [--record]

The model and recipe that the cpu preset calls `ours`, in the precision that training times to be the faster one; all
50,000 training images, the test images read once, at the end of each run. For the rest see bench/speedrun.py.
"""

import torch
from speedrun import main

if __name__ == "__main__":
    main(90, {}, torch.device("cpu"), "speedrun_cpu")
