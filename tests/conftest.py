"""For all tests: the project's files are importable, and one thread is used, so that bits are the same."""
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(1)
