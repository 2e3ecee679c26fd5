"""One thread per test process: pytest runs a process per core, and more threads than cores slow each other down."""

import torch

torch.set_num_threads(1)
