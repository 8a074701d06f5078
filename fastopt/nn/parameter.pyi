# For type checkers. At run time it is torch's own module.
from torch.nn.parameter import *
