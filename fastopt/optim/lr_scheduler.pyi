# For type checkers. At run time it is torch's own module.
from torch.optim.lr_scheduler import *
from torch.optim.lr_scheduler import _LRScheduler as _LRScheduler
