"""What all end-to-end tests need."""

import torch

# The servers' threads wait by spinning: a second thread here would fight them for the core and cost tenfold.
torch.set_num_threads(1)
