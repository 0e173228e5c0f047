"""Small networks gain nothing from a second thread, and lose much when a core is busy (design section 4)."""

import torch

torch.set_num_threads(1)
