"""Programs as tutorials have them, written for torch. Each leaves `losses` and `model` behind.

Their import lines are all that changes for fastopt.
"""

from __future__ import annotations

import re

REGRESSION = """
import torch
import torch.nn as nn
import torch.optim as optim

torch.manual_seed(0)
x, y = torch.randn(100, 10), torch.randn(100, 1)
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 1))
criterion = nn.MSELoss()
optimizer = optim.SGD(model.parameters(), lr=0.01)
losses = []
for epoch in range(100):
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""

FOUR_POINTS = """
import torch
from torch import nn, optim


class LinearModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x):
        return self.linear(x)


torch.manual_seed(0)
x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
model = LinearModel()
criterion = nn.MSELoss()
optimizer = optim.SGD(model.parameters(), lr=0.05)
losses = []
for epoch in range(500):
    loss = criterion(model(x), 2 * x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert abs(model(torch.tensor([[5.0]])).item() - 10) < 0.05
"""

ABSOLUTE_ERROR = """
import torch
from torch.nn import L1Loss, Linear, ReLU, Sequential
from torch.optim import SGD

torch.manual_seed(0)
x, y = torch.randn(100, 10), torch.randn(100, 1)
model = Sequential(Linear(10, 20), ReLU(), Linear(20, 1))
criterion, optimizer = L1Loss(), SGD(model.parameters(), lr=0.05, momentum=0.9)
torch.testing.assert_close(criterion(model(x), y), (model(x) - y).abs().mean())
losses = []
for _ in range(50):
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""

RMSPROP = """
import torch
from torch.nn import *
from torch.optim import *

torch.manual_seed(0)
x = torch.randn(64, 4)
y = x.sum(1, keepdim=True).sin()
model = Sequential(Linear(4, 16), ReLU(), Linear(16, 1))
criterion = MSELoss()
optimizer = RMSprop(model.parameters(), lr=1e-3, alpha=0.9, momentum=0.5)
losses = []
for _ in range(60):
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""

CLASSIFIER = """
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(128, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.fc(self.dropout(torch.flatten(x, 1)))


torch.manual_seed(0)
labels = torch.randint(0, 10, (320,))
images = torch.randn(320, 1, 8, 8) + torch.randn(10, 1, 8, 8)[labels]
train_loader = DataLoader(TensorDataset(images[:256], labels[:256]), 32, shuffle=True)
val_loader = DataLoader(TensorDataset(images[256:], labels[256:]), 32)
model = Net()
criterion = nn.CrossEntropyLoss()
optimizer = optim.Adam(model.parameters(), lr=2e-3)
losses = []
for epoch in range(5):
    model.train()
    running, correct = 0.0, 0
    for x, y in tqdm(train_loader, desc=f"epoch {epoch}", leave=False):
        optimizer.zero_grad()
        outputs = model(x)
        loss = criterion(outputs, y)
        loss.backward()
        optimizer.step()
        running += loss.item() * len(y)
        correct += (outputs.argmax(1) == y).sum().item()
    losses += [running / 256, correct / 256]
    model.eval()
    total, correct = 0.0, 0
    with torch.no_grad():
        for x, y in val_loader:
            outputs = model(x)
            total += criterion(outputs, y).item() * len(y)
            correct += (outputs.argmax(1) == y).sum().item()
    losses += [total / 64, correct / 64]
assert losses[-1] > 0.5, "it learns"
"""

TAGGER = """
import torch
import torch.nn as nn
import torch.optim as optim

torch.manual_seed(0)
tokens = torch.where(torch.rand(16, 12) < 0.1, 2, torch.randint(0, 2, (16, 12)))
x = torch.randn(16, 12, 6) + tokens[..., None]
tags = torch.where(torch.rand(16, 12) < 0.3, -1, tokens)  # padding
model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
criterion = nn.CrossEntropyLoss(
    weight=torch.tensor([1.0, 1.0, 8.0]), ignore_index=-1, label_smoothing=0.05
)
optimizer = optim.Adam(model.parameters(), lr=1e-2, amsgrad=True)
losses = []
for _ in range(40):
    optimizer.zero_grad()
    loss = criterion(model(x).transpose(1, 2), tags)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""

OWN_LOSS = """
import torch
import torch.nn as nn
import torch.optim as optim


class LogCosh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target):
        ctx.save_for_backward(input - target)
        return (input - target).cosh().log().mean()

    @staticmethod
    def backward(ctx, grad_output):
        (difference,) = ctx.saved_tensors
        return grad_output * difference.tanh() / difference.numel(), None


class LogCoshLoss(nn.Module):
    def forward(self, input, target):
        return {call}


torch.manual_seed(0)
x, y = torch.randn(50, 5), torch.randn(50, 1)
model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1))
criterion = LogCoshLoss()
optimizer = optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for _ in range(40):
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""

OWN_OPTIMIZER = """
import torch
import torch.nn as nn
from torch.optim import Optimizer


class SignDescent(Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 0.1)
                p.sub_(average / (average.abs() + 1e-3), alpha=group["lr"])


torch.manual_seed(0)
x, y = torch.randn(50, 5), torch.randint(0, 3, (50,))
model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
criterion, optimizer = nn.CrossEntropyLoss(), SignDescent(model.parameters(), 0.01)
losses = []
for _ in range(40):
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""

LANGUAGE_MODEL = """
import torch
import torch.nn as nn
import torch.nn.utils.rnn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR


class RNNModel(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16)
        self.rnn = nn.LSTM(16, 24, batch_first=True)
        self.decoder = nn.Linear(24, vocabulary)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, tokens, hidden):
        output, hidden = self.rnn(self.embedding(tokens), hidden)
        return self.decoder(output), hidden


torch.manual_seed(0)
text = pad_sequence([torch.randint(1, 29, (n,)) for n in (60, 41, 52)], batch_first=True)
model = RNNModel(29)
optimizer = SGD(model.parameters(), lr=1.0, momentum=0.5)
scheduler = StepLR(optimizer, step_size=2, gamma=0.5)
losses = []
for epoch in range(4):
    hidden = None
    for begin in range(0, text.shape[1] - 1, 10):
        inputs, targets = text[:, begin : begin + 10], text[:, begin + 1 : begin + 11]
        inputs = inputs[:, : targets.shape[1]]
        if hidden is not None:
            hidden = tuple(state.detach() for state in hidden)
        output, hidden = model(inputs, hidden)
        loss = cross_entropy(output.reshape(-1, 29), targets.reshape(-1), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        losses += [loss.item(), clip_grad_norm_(model.parameters(), 0.25).item()]
        optimizer.step()
    scheduler.step()
    losses.append(scheduler.get_last_lr()[0])
"""

GAN = """
import torch
import torch.nn as nn
import torch.optim as optim


def weights_init(m):
    if isinstance(m, nn.ConvTranspose2d):
        nn.init.normal_(m.weight.data, 0.0, 0.02)


torch.manual_seed(0)
real = torch.randn(16, 1, 8, 8)
netG = nn.Sequential(
    nn.ConvTranspose2d(6, 8, 4, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
    nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Tanh(),
)
netG.apply(weights_init)
netD = nn.Sequential(
    nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4), nn.Flatten(){sigmoid}
)
model = nn.ModuleList([netG, netD])
criterion = nn.{loss}()
optimizerD = optim.Adam(netD.parameters(), lr=2e-4, betas=(0.5, 0.999))
optimizerG = optim.Adam(netG.parameters(), lr=2e-4, betas=(0.5, 0.999))
losses = []
for step in range(8):
    netD.zero_grad()
    label = torch.full((16,), 1.0)
    errD_real = criterion(netD(real).view(-1), label)
    errD_real.backward()
    fake = netG(torch.randn(16, 6, 1, 1))
    label.fill_(0.0)
    errD_fake = criterion(netD(fake.detach()).view(-1), label)
    errD_fake.backward()
    optimizerD.step()
    netG.zero_grad()
    label.fill_(1.0)
    errG = criterion(netD(fake).view(-1), label)
    errG.backward()
    optimizerG.step()
    losses += [errD_real.item(), errD_fake.item(), errG.item()]
"""

AUTOENCODER = """
import torch
from torch import nn, optim
from torch.nn import functional as F


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 24)
        self.mean = nn.Linear(24, 4)
        self.logvar = nn.Linear(24, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 64), nn.Sigmoid())

    def forward(self, x):
        hidden = F.relu(self.fc1(x))
        mean, logvar = self.mean(hidden), self.logvar(hidden)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        return self.decoder(z), mean, logvar


def loss_function(recon_x, x, mean, logvar):
    BCE = F.binary_cross_entropy(recon_x, x, reduction="sum")
    KLD = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
    return BCE + KLD


torch.manual_seed(0)
x = torch.rand(32, 64)
model = VAE()
optimizer = optim.Adam(model.parameters(), lr=1e-3)
losses = []
for _ in range(15):
    optimizer.zero_grad()
    loss = loss_function(*model(x)[:1], x, *model(x)[1:])
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""

EMBEDDING = """
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from torch.optim.swa_utils import AveragedModel

torch.manual_seed(0)
anchor, positive, negative = torch.randn(3, 24, 12)
same = torch.randint(0, 2, (24,)) * 2 - 1
model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
average = AveragedModel(model)
triplet, cosine = nn.TripletMarginLoss(margin=1.0), nn.CosineEmbeddingLoss(margin=0.2)
ranking = nn.MarginRankingLoss(margin=0.5)
optimizer = optim.Adagrad(model.parameters(), lr=0.02)
losses = []
for _ in range(20):
    a, p, n = model(anchor), model(positive), model(negative)
    near, far = F.pairwise_distance(a, p), F.pairwise_distance(a, n)
    loss = triplet(a, p, n) + cosine(a, p, same) + ranking(far, near, torch.ones(24))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update_parameters(model)
    losses.append(loss.item())
"""

DISTILLATION = """
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim

torch.manual_seed(0)
x, labels = torch.randn(48, 10), torch.randint(0, 5, (48,))
teacher = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 5)).eval()
model = nn.Linear(10, 5)
soft, hard = nn.KLDivLoss(reduction="batchmean"), nn.CrossEntropyLoss()
optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
losses = []
for _ in range(30):
    with torch.no_grad():
        target = F.softmax(teacher(x) / 2, dim=-1)
    logits = model(x)
    loss = 4 * soft(F.log_softmax(logits / 2, dim=-1), target) + 0.5 * hard(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""

CLOSURE = """
import torch
import torch.nn as nn
import torch.optim as optim

torch.manual_seed(0)
x, y = torch.randn(30, 10), torch.randn(30, 1)
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 1))
criterion = nn.MSELoss()
optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def closure():
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    return loss


losses = [optimizer.step(closure).item() for _ in range(50)]
"""

SCHEDULED = """
import torch
import torch.nn as nn
import torch.optim as optim
import torch.optim.lr_scheduler as sched

torch.manual_seed(0)
x, y = torch.randn(40, 4, 8), torch.randint(0, 4, (40, 4))
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
criterion = nn.CrossEntropyLoss()
optimizer = optim.{optimizer}
scheduler = sched.{scheduler}
losses = []
for step in range(40):
    loss = criterion(model(x[step]), y[step]) / 2
    loss.backward()
    losses += [loss.item(), scheduler.get_last_lr()[0]]
    if step % 2:  # batches are accumulated, two at a time
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
"""

_OPTIMIZERS = {
    "SGD": "SGD(model.parameters(), lr=1e-2, momentum=0.9)",
    "AdamW": "AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)",
}
_SCHEDULERS = {
    "step": "StepLR(optimizer, step_size=5, gamma=0.5)",
    "cosine": "CosineAnnealingLR(optimizer, T_max=20)",
    "one-cycle": "OneCycleLR(optimizer, max_lr=0.05, total_steps=21)",
}

#: The programs, and which of their objects fastopt's classes make, by variable.
PROGRAMS: dict[str, tuple[str, dict[str, str]]] = {
    "regression": (REGRESSION, {"criterion": "MSELoss", "optimizer": "SGD"}),
    "four-points": (FOUR_POINTS, {"criterion": "MSELoss", "optimizer": "SGD"}),
    "absolute-error": (ABSOLUTE_ERROR, {"criterion": "L1Loss", "optimizer": "SGD"}),
    "rmsprop": (RMSPROP, {"criterion": "MSELoss", "optimizer": "RMSprop"}),
    "classifier": (CLASSIFIER, {"criterion": "CrossEntropyLoss", "optimizer": "Adam"}),
    "tagger": (TAGGER, {"criterion": "CrossEntropyLoss", "optimizer": "Adam"}),
    "own-loss-function": (
        OWN_LOSS.format(call="LogCosh.apply(input, target)"),
        {"optimizer": "AdamW"},
    ),
    "own-loss-module": (
        OWN_LOSS.format(call="(input - target).cosh().log().mean()"),
        {"optimizer": "AdamW"},
    ),
    "own-optimizer": (OWN_OPTIMIZER, {"criterion": "CrossEntropyLoss"}),
    "language-model": (LANGUAGE_MODEL, {"optimizer": "SGD"}),
    "gan-probabilities": (
        GAN.format(sigmoid=", nn.Sigmoid()", loss="BCELoss"),
        {"criterion": "BCELoss", "optimizerD": "Adam", "optimizerG": "Adam"},
    ),
    "gan-logits": (
        GAN.format(sigmoid="", loss="BCEWithLogitsLoss"),
        {"criterion": "BCEWithLogitsLoss", "optimizerD": "Adam", "optimizerG": "Adam"},
    ),
    "autoencoder": (AUTOENCODER, {"optimizer": "Adam"}),
    "embedding": (
        EMBEDDING,
        {
            "triplet": "TripletMarginLoss",
            "cosine": "CosineEmbeddingLoss",
            "ranking": "MarginRankingLoss",
        },
    ),
    "distillation": (DISTILLATION, {"soft": "KLDivLoss", "hard": "CrossEntropyLoss"}),
    "closure": (CLOSURE, {"criterion": "MSELoss", "optimizer": "SGD"}),
    **{
        f"{kind}-{name}": (
            SCHEDULED.format(optimizer=optimizer, scheduler=scheduler),
            {"criterion": "CrossEntropyLoss", "optimizer": kind},
        )
        for kind, optimizer in _OPTIMIZERS.items()
        for name, scheduler in _SCHEDULERS.items()
    },
}

_IMPORT = re.compile(r"^(import|from) torch(\.nn|\.optim| import nn)\b.*$", re.MULTILINE)


def with_imports_changed(program: str) -> str:
    """The program for fastopt: what it imports of torch.nn and torch.optim is fastopt's."""
    return _IMPORT.sub(lambda line: line[0].replace("torch", "fastopt", 1), program)
