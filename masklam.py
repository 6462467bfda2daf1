"""MaskLAM in one file: latent actions from video whose background moves too.

A latent action model (LAM) learns what an agent does from video without action labels. An inverse
dynamics model (IDM) reads what happened and emits a latent action z; a forward dynamics model
(FDM) must predict the next frame from the past and z:

    z_t      = IDM(o_{t-2..t}, o_{t+k-2..t+k})        k from 1..K in training, 1 when labelling
    o^_{t+1} = FDM(o_{t-2..t}, z_t)
    loss     = sum(w (o^_{t+1} - o_{t+1})^2) / (C sum(w)),      w = m + b (1 - m)

LAPO has b = 1: where the background moves, most of the error is background, and z describes the
background. MaskLAM (arXiv 2602.02259) changes one number: b = 0, with m the agent's mask.

    python masklam.py --task cheetah          record, train both, probe, act, compare
    python masklam.py --preset smoke          every stage in seconds, to see it work
    for z in 16 64 256; do python masklam.py --latent-dim $z --until probe; done

A run needs only a CPU. It writes results.json and pictures to runs/<task>..., and keeps what each
stage made in runs/cache, so that another run redoes only what has changed. The file reads as the
data flows: video, networks, the loss (section 5), probes, policy; then where the video comes from.
A title names in brackets the first stage of a run that an edit of its section redoes (section 16).

Shapes: E episodes, T steps, B batch, C H W image, A action, S state, Z latent, D velocities of the
background, n any number of things; u8, i64 and f32 are types of numbers.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import datetime
import functools
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from concurrent import futures
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import av
import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps, ImageSequence  # comes with matplotlib
from torch import nn
from tqdm import tqdm

# ==== 2. Config ===================================================================================
# Every setting of a run, and flag of the command line: the stage that it belongs to, its default,
# meaning and range. A change redoes that stage and those after it.
STAGES = ("record", "mask", "lam", "probe", "policy", "decode", "evaluate", "scale", "report")

class UserError(Exception):
    """Something the user can mend: reported as one line, exit status 2."""

def require(ok, message: str):
    if not ok:
        raise UserError(message)

def option(stage, default, text, *allowed):
    """A dataclass field; allowed: from and to, or all words that may stand there, or anything."""
    return field(default=default, metadata=dict(stage=stage, help=text, allowed=allowed))

@dataclass(frozen=True)
class Config:
    """All settings of a run; the defaults suit two CPU cores."""

    task: str = option("record", "cheetah", "cheetah, hopper, walker, swimmer, ant or humanoid")
    seed: int = option("record", 0, "of bodies, backgrounds, networks and batches", 0, 10**6)
    distractor: str = option("record", "low", "what else moves", "none", "low", "hard")
    correlation: float = option("record", 0.5, "of background and action (rho)", 0, 1)
    speed: float = option("record", 10.0, "of the background, pixels a step", 0, 100)
    backgrounds: str = option("record", "", "folder of pictures and videos to show")
    episodes: int = option("record", 1000, "recorded for training", 4, 250_000)
    heldout_episodes: int = option("record", 120, "held out to probe and test on", 2, 250_000)
    steps: int = option("record", 50, "per recorded episode", 8, 1000)
    demonstration_noise: float = option("record", 0.1, "at most, in every other episode", 0, 9)
    exploration_noise: float = option("record", 1.2, "in the others; actions reach 1", 0, 9)
    frame_size: int = option("record", 64, "height and width in pixels", 16, 512)

    masks: str = option("mask", "simulator", "their source", "simulator", "student", "sam")
    sam_model: str = option("mask", "vit_b", "which SAM", "vit_b", "vit_l", "vit_h")
    sam_checkpoint: str = option("mask", "", "its file; default: the official one, downloaded")
    keyframes: int = option("mask", 64, "frames that SAM segments for the student", 4, 10**6)
    student_updates: int = option("mask", 600, "optimiser steps", 1, 10**8)

    background_weight: float = option("lam", 0.0, "b of masklam's loss; lapo is b = 1", 0, 1)
    latent_dim: int = option("lam", 128, "numbers in a latent action", 1, 8192)
    offset: int = option("lam", 1, "K: how far ahead the future stack may lie", 1, 100)
    patch: int = option("lam", 4, "pixels folded into channels; 1, with blocks: IMPALA", 1, 64)
    idm_widths: tuple[int, ...] = option("lam", (48, 96), "channels, also of policies", 1, 4096)
    fdm_widths: tuple[int, ...] = option("lam", (48, 96), "channels of its stages", 1, 4096)
    blocks: int = option("lam", 0, "residual blocks a stage, where patch is 1", 0, 16)
    hidden: int = option("lam", 256, "units between map and vector; 0: none", 0, 8192)
    lam_updates: int = option("lam", 2000, "optimiser steps", 1, 10**8)
    batch_size: int = option("lam", 64, "windows per optimiser step", 2, 10**5)
    lam_lr: float = option("lam", 3e-3, "peak learning rate", 0, 1)

    probe_windows: int = option("probe", 50_000, "at most, to fit a probe on", 100, 10**7)
    probe_updates: int = option("probe", 2500, "optimiser steps of the MLP probe", 1, 10**8)
    policy_updates: int = option("policy", 2500, "optimiser steps", 1, 10**8)
    policy_lr: float = option("policy", 2e-3, "peak learning rate", 0, 1)
    labels: int = option("decode", 1000, "labelled transitions, episode by episode", 10, 10**8)
    decoder_updates: int = option("decode", 1000, "at most, of the decoder", 1, 10**8)
    eval_episodes: int = option("evaluate", 20, "per policy, on unseen backgrounds", 1, 10**5)
    eval_steps: int = option("evaluate", 500, "per evaluation episode", 1, 10**5)
    methods: tuple[str, ...] = option("report", ("lapo", "masklam"), "of METHODS, to compare")

    def __post_init__(self):
        for f in fields(self):
            if isinstance(f.default, tuple):  # results.json and the command line have lists
                object.__setattr__(self, f.name, tuple(getattr(self, f.name)))
        for f in [f for f in fields(self) if f.metadata["allowed"]]:
            value, (low, *words) = getattr(self, f.name), f.metadata["allowed"]
            for v in value if isinstance(value, tuple) else (value,):
                ok = v in (low, *words) if isinstance(low, str) else low <= v <= words[0]
                require(ok, f"{f.name} is {v!r}; allowed: {f.metadata['allowed']}")
        step = math.lcm(map_stride(self, self.idm_widths), map_stride(self, self.fdm_widths),
                        1 if self.masks == "simulator" else 16)  # of the student
        require(self.frame_size % step == 0, f"frame_size is {self.frame_size}; allowed: "
                f"multiples of {step}, which patch, the number of widths and the student ask for")

PRESETS = {
    "smoke": dict(episodes=8, heldout_episodes=4, steps=40, lam_updates=30, probe_updates=50,
                  policy_updates=20, decoder_updates=50, labels=80, eval_episodes=2, eval_steps=80,
                  batch_size=32),
    "notebook": dict(episodes=120, heldout_episodes=20, steps=60, lam_updates=400, labels=100,
                     probe_updates=500, policy_updates=400, decoder_updates=300, eval_episodes=4,
                     eval_steps=200, batch_size=32),
    "laptop": {},  # Config's defaults
    "paper": dict(offset=9, patch=1, idm_widths=(64, 128, 128), blocks=2, hidden=0,
                  fdm_widths=(96, 192, 192), batch_size=512, lam_lr=6e-4, policy_lr=4e-4,
                  episodes=5000, steps=1000, keyframes=512, lam_updates=35_156,
                  policy_updates=35_156, decoder_updates=25_000, labels=128_000),
}

@contextlib.contextmanager
def written_whole(path):
    """A temporary path, for a file or a folder, that takes path's place only if nothing failed."""
    temporary = Path(f"{path}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        if not path.is_dir():  # of another run, which was faster: it holds the same
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)

def save(path, value):
    buffer = io.BytesIO()  # where a disk is full, torch itself does not say so
    torch.save(value, buffer)
    with written_whole(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())

def load(path, device="cpu"):
    """What `save` wrote: networks, arrays, numbers. They are unpickled, so trust the file."""
    return torch.load(path, device, weights_only=False)

def generator(*purpose) -> np.random.Generator:
    """Random numbers for (seed, purpose, ...): the same arguments give the same numbers."""
    words = [zlib.crc32(p.encode()) if isinstance(p, str) else p for p in purpose]
    return np.random.default_rng(words)

def ranks():
    """The rank of this process, and how many torchrun has started to train together; else 0, 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """x as it is on average in all processes that train together."""
    if dist.is_initialized():
        dist.all_reduce(x := x.detach().clone())
    return x / ranks()[1]

def share(batch: np.ndarray) -> np.ndarray:
    """What of a batch (B, ...) this process trains on."""
    return batch[ranks()[0]::ranks()[1]]

def progress(items, text, total, done=0):
    """A bar over items: each worker has a line of its own, and a log file has none."""
    number = re.search(r"\d*$", multiprocessing.current_process().name)[0] or 1  # SpawnProcess-2
    return tqdm(items, text, total, False, initial=done, disable=True if ranks()[0] else None,
                position=int(number) - 1)

# ==== 3. Video [record] ===========================================================================
# In: episodes in arrays, recorded (section 12) or read from films of one's own (section 10). Out:
# index arithmetic that cuts training windows from them, for everything that learns.
@dataclass
class Video:
    """Episodes of an agent on film: frames[e, t] is what it sees when it chooses actions[e, t].

    Recordings know all of these, f32 where nothing else is said, video of one's own the first
    three. Nothing but probes, references, decoders and clones of actions may read actions."""

    frames: np.ndarray  # (E, T, H, W, 3) u8
    masks: np.ndarray  # (E, T, H, W) u8, 255 = agent
    length: np.ndarray  # (E,) i64, frames until the episode ended
    actions: np.ndarray | None = None  # (E, T or T - 1, A) as executed, scaled to [-1, 1]
    expected: np.ndarray | None = None  # (E, T, A) what is executed on average over the noise
    rewards: np.ndarray | None = None  # (E, T) for moving
    states: np.ndarray | None = None  # (E, T, S)
    demonstration: np.ndarray | None = None  # (E,) bool, to be cloned; the others explore
    start: np.ndarray | None = None  # (E, T) i64, step of the agent's last start; None: all 0

    def __post_init__(self):
        kinds = [getattr(x, "dtype", type(x)) for x in (self.frames, self.masks)]
        require(kinds == [np.uint8] * 2, f"frames and masks are {kinds}, not arrays of uint8")
        shape, self.length = self.frames.shape, np.asarray(self.length)
        require(len(shape) == 5 and shape[4] == 3, f"frames are {shape}, not (E, T, H, W, 3)")
        E, T = shape[:2]
        require(self.masks.shape == shape[:4], f"masks are {self.masks.shape}, not {shape[:4]}")
        longest = self.length.max(initial=0)
        require(self.length.shape == (E,) and longest <= T, f"length is {self.length.shape}, up to "
                f"{longest}, not ({E},) and {T} at most")
        shown = self.masks[:1][self.valid[:1]]
        require(shown.max(initial=0) != 1, "masks are 255 where the agent is, not 1")
        require(self.actions is None or np.shape(self.actions)[:2] in ((E, T), (E, T - 1)),
                f"actions are {np.shape(self.actions)}, not ({E}, {T} or {T - 1}, A)")

    @classmethod
    def open(cls, folder, mode="r"):
        """Map the arrays of a folder, to be read alone unless mode is "r+"."""
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # torch's
        return cls(*(np.load(Path(folder) / f"{f.name}.npy", mode) for f in fields(cls)))

    @property
    def valid(self) -> np.ndarray:
        """(E, T) bool: which frames were recorded, before the end of their episode."""
        return np.arange(self.frames.shape[1]) < self.length[:, None]

class Windows:
    """The training examples of a video: every (e, t) whose episode goes on to t + 1.

    A window of offset k is the stack obs (t-2, t-1, t), the stack future_obs (t+k-2, t+k-1, t+k)
    and next_obs, t + 1. It never crosses an episode's end, nor a new start of the agent: the first
    frame stands for what was before it, and k is cut."""

    def __init__(self, video: Video, device="cpu"):
        self.video, self.device, self.T = video, device, video.frames.shape[1]
        start = np.zeros(video.masks.shape[:2], int) if video.start is None else video.start
        self.e, self.t = np.nonzero(video.valid[:, 1:] & (start[:, 1:] == start[:, :-1]))
        require(len(self.e), "no episode has two frames, so there is nothing to learn from")
        shown = video.masks[:50][video.valid[:50]]
        require((shown >= 128).mean() > 1e-3, "the masks are empty: not a pixel of a thousand is "
                "of an agent (with --masks sam or student: try more --keyframes)")
        self.first = start[self.e, self.t]
        stretch = self.e * self.T + self.first  # a number for each, ascending
        self.last = self.t[np.searchsorted(stretch, stretch, "right") - 1] + 1

        on_gpu = torch.device(device).type == "cuda"
        room = torch.cuda.mem_get_info(device)[0] if on_gpu else math.inf
        home = device if 2 * (video.frames.nbytes + video.masks.nbytes) < room else "cpu"
        self.frames = torch.from_numpy(video.frames).flatten(0, 1).to(home)  # (E T, H, W, 3) u8
        self.masks = torch.from_numpy(video.masks).flatten(0, 1).to(home)  # (E T, H, W) u8

    def __len__(self):
        return len(self.e)

    def index(self, chosen: np.ndarray, k) -> np.ndarray:
        """(B,) windows and offsets k (B,) or int -> (B, 7) flat frame indices: 3, 3, next."""
        e, t = self.e[chosen], self.t[chosen]
        k = np.minimum(k, self.last[chosen] - t)
        steps = [t - 2, t - 1, t, t + k - 2, t + k - 1, t + k, t + 1]
        return e[:, None] * self.T + np.stack(steps, 1).clip(self.first[chosen, None])

    def seen(self, chosen, frames=3):
        """The stack obs (B, 3, H, W, 3) u8, all that a policy sees, newest frame last; with 6
        frames also the stack future_obs of k = 1."""
        return self.frames[self.index(chosen, 1)[:, :frames]].to(self.device)

    def batch(self, chosen, k=1):
        """-> obs and future_obs (B, 6, H, W, 3) u8, next_obs (B, 3, H, W) in [-0.5, 0.5], bfloat16
        under autocast, and its mask (B, 1, H, W) f32 in [0, 1]."""
        index = self.index(chosen, k)
        frames = self.frames[index].to(self.device)
        mask = self.masks[index[:, 6:]].to(self.device) / 255
        return frames[:, :6], to_float(frames[:, 6:]), mask

    def actions(self, chosen=slice(None)):
        """Executed actions (B, A) f32: labels, which lapo and masklam never see."""
        return self.video.actions[self.e[chosen], self.t[chosen]]

    def actions_and_noise(self, chosen=slice(None)):
        """(B, 2 A) f32: executed actions, and the part of them that no past frame tells."""
        actions, expected = self.actions(chosen), self.video.expected
        require(expected is not None, "noise is known of recordings alone: see Video.expected")
        return np.concatenate([actions, actions - expected[self.e[chosen], self.t[chosen]]], 1)

    def demonstrations(self):
        """The windows (n,) of the episodes that policies are cloned from; of one's own all."""
        if self.video.demonstration is None:
            return np.arange(len(self))
        return np.flatnonzero(self.video.demonstration[self.e])

def to_float(frames: torch.Tensor, patch=1) -> torch.Tensor:
    """(B, n, H, W, C) u8 -> (B, n patch^2 C, H / patch, W / patch) in [-0.5, 0.5], which lie in
    memory as the frames do; bfloat16 under autocast. Bytes are moved before they grow to floats."""
    B, n, H, W, C = frames.shape
    h, w = H // patch, W // patch
    tiles = frames.reshape(B, n, h, patch, w, patch, C).permute(0, 2, 4, 1, 3, 5, 6)
    tiles = tiles.reshape(B, h, w, n * patch**2 * C)
    lower = torch.is_autocast_enabled(frames.device.type)
    floats = tiles.to(torch.bfloat16 if lower else torch.float32)
    return floats.sub_(127.5).div_(255).permute(0, 3, 1, 2)  # x - 127.5 is exact in bfloat16 too

# ==== 4. Networks [mask] ==========================================================================
# The IDM turns six frames into a latent action, the FDM three frames and a latent action into the
# next frame, the policy three frames into a latent action. All are made of one encoder and one
# decoder and trained by one loop.
def autocast(device):
    """bfloat16 where the device multiplies it natively; float32 elsewhere."""
    kind, cpu = torch.device(device).type, torch.cpu.get_capabilities()
    native = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(kind, torch.bfloat16, enabled=bool(native))

def conv(inputs, outputs, kernel=3, stride=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)

def mlp(*widths):
    """Linear layers of these widths with a ReLU between any two."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])

class ResidualBlock(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))

    def forward(self, x):
        return x + super().forward(x)

class Encoder(nn.Module):
    """Folded frames (B, channels, h, w) -> a map for every width, finest first. Patch 1 with blocks
    is IMPALA's (arXiv 1802.01561). Larger patches are for CPUs: with kernel 1 the first stage is a
    mere matrix product."""

    def __init__(self, channels, widths, patch, blocks=0, kernel=1):
        super().__init__()
        self.stages = nn.ModuleList()
        for i, width in enumerate(widths):
            if patch == 1:
                stage = [conv(channels, width), nn.MaxPool2d(3, 2, padding=1)]
                stage += [ResidualBlock(width) for _ in range(blocks)]
            else:
                stage = [conv(channels, width, stride=2) if i else conv(channels, width, kernel)]
            if patch > 1 or i == len(widths) - 1:
                stage.append(nn.ReLU())
            self.stages.append(nn.Sequential(*stage))
            channels = width

    def forward(self, x):
        maps = []
        for stage in self.stages:
            maps.append(x := stage(x))
        return maps

class Decoder(nn.Module):
    """The mirror image: the encoder's maps, the last one changed -> (B, outputs, h, w).
    With larger patches it is a U-Net, whose stages also see the encoder's map of their size."""

    def __init__(self, outputs, widths, patch, blocks=0, kernel=1):
        super().__init__()
        self.patch, levels = patch, list(zip(widths, widths[1:]))
        if patch == 1:
            layers = []
            for below, width in reversed([(widths[0], widths[0]), *levels]):
                layers += [ResidualBlock(width) for _ in range(blocks)]
                layers += [nn.ReLU(), nn.Upsample(scale_factor=2), conv(width, below)]
            self.up = nn.Sequential(*layers, nn.ReLU(), conv(widths[0], outputs))
        else:
            self.up = nn.ModuleList(conv(coarse, 4 * fine, 1) for fine, coarse in levels)
            self.join = nn.ModuleList(conv(2 * fine, fine, kernel) for fine, _ in levels)
            self.last = conv(widths[0], outputs, 1)

    def forward(self, maps):
        *maps, x = maps
        if self.patch == 1:
            return self.up(x)
        for up, join, fine in reversed(list(zip(self.up, self.join, maps))):
            x = F.relu(F.pixel_shuffle(up(x), 2))
            x = F.relu(join(torch.cat([x, fine], 1)))
        return self.last(x)

def map_stride(config, widths):
    """How many pixels high and wide is what a place of an encoder's last map stands for."""
    return config.patch * 2 ** (len(widths) - (config.patch > 1))

class FrameEncoder(nn.Module):
    """Reads frames, (B, n, H, W, 3) u8 -> (B, outputs): the IDM, of n = 6, and policies, of 3."""

    def __init__(self, config, frames, outputs):
        super().__init__()
        self.patch, widths, hidden = config.patch, config.idm_widths, config.hidden
        self.encoder = Encoder(frames * 3 * self.patch**2, widths, self.patch, config.blocks)
        inputs = widths[-1] * (config.frame_size // map_stride(config, widths)) ** 2
        self.head = mlp(inputs, hidden, outputs) if hidden else nn.Linear(inputs, outputs)

    def forward(self, frames):
        last = self.encoder(to_float(frames, self.patch))[-1]  # (B, widths[-1], h, w)
        return self.head(last.flatten(1))

class FDM(nn.Module):
    """Predicts the next frame: obs (B, 3, H, W, 3) u8, z (B, Z) -> (B, 3, H, W) in [-0.5, 0.5]."""

    def __init__(self, config):
        super().__init__()
        self.patch, widths, width = config.patch, config.fdm_widths, config.fdm_widths[-1]
        side = config.frame_size // map_stride(config, widths)
        self.encoder = Encoder(9 * self.patch**2, widths, self.patch, config.blocks)
        self.decoder = Decoder(3 * self.patch**2, widths, self.patch, config.blocks)
        self.latent = nn.Linear(config.latent_dim, width * side**2)
        self.merge = conv(2 * width, width, 1)

    def forward(self, obs, z):
        *maps, last = self.encoder(to_float(obs, self.patch))
        action = self.latent(z).unflatten(1, last.shape[1:])  # Z -> (width, h, w)
        merged = self.merge(torch.cat([last, action], 1))  # (B, 2 width, h, w) -> (B, width, h, w)
        decoded = self.decoder([*maps, F.relu(merged)])  # (B, 3 patch^2, H / patch, W / patch)
        return torch.tanh(F.pixel_shuffle(decoded, self.patch)) / 2

def train(network, compute_loss, updates, lr, text, checkpoint=None):
    """AdamW (weight decay .01), 5 % warm-up, cosine decay: the loop of every network in this file.

    compute_loss(step) draws its batch from `step` alone, so that a run that goes on from
    `checkpoint` (a path; written twice a minute) gives the numbers of one that never stopped. Where
    several ranks train together, each computes it on its share of the batch.
    Yields (step, mean loss since the last) ten times or less, the last of them at the end;
    UserError where a loss is not finite."""
    optimizer = torch.optim.AdamW(network.parameters(), lr, (0.9, 0.99), fused=True)
    start, history, every, saved_at = 0, [], math.ceil(updates / 10), time.monotonic()
    total = torch.zeros((), dtype=torch.float64, device=next(network.parameters()).device)
    if checkpoint and checkpoint.exists():
        weights, moments, start, history, total = load(checkpoint, total.device)
        network.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    yield from history

    bar = progress(range(start, updates), text, updates, start)
    for step in bar:
        warmup, cosine = (step + 1) / (0.05 * updates + 1), 1 + math.cos(math.pi * step / updates)
        optimizer.param_groups[0]["lr"] = lr * min(1, warmup) * 0.5 * cosine
        loss = compute_loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in network.parameters():
            if ranks()[1] > 1 and parameter.grad is not None:  # a frozen one has none
                parameter.grad = mean_over_ranks(parameter.grad)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

        total += mean_over_ranks(loss.detach())
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {float(loss.detach()):.4f}")
        if (step + 1) % every == 0 or step + 1 == updates:
            mean = float(total) / (step % every + 1)
            require(math.isfinite(mean), f"the loss of {text} is {mean} by update {step + 1}: "
                    "lower its learning rate")
            total.zero_()
            history.append((step + 1, mean))
            yield history[-1]
        due = checkpoint and ranks()[0] == 0 and time.monotonic() - saved_at > 30
        if due and math.isfinite(total):  # what has diverged is not gone on from
            weights, moments = network.state_dict(), optimizer.state_dict()
            save(checkpoint, (weights, moments, step + 1, history, total))
            saved_at = time.monotonic()

# ==== 5. Latent action models [lam] ===============================================================
# In: windows of a Video. Out: an IDM whose latent actions explain what the loss asks for. LAPO and
# MaskLAM differ in one number, the weight of the background. Another method is a class with an idm
# and a loss of its own, and an entry in METHODS. If it has an fdm, that predicts pixels from obs
# and z, and a background_weight says which of them count.
def masked_mse(prediction, target, mask, background_weight=0.0, count=torch.sum):
    """The squared error weighted by an agent mask: all that MaskLAM adds to a LAM.

    prediction, target (B, C, H, W); mask (B, 1, H, W) in [0, 1], 1 = agent. Every pixel weighs
    w = mask + background_weight (1 - mask), and the result is sum(w error^2) / (C sum(w)).
    background_weight 1 is F.mse_loss, bit for bit (LAPO); 0 is the authors' hard mask. count(w) is
    the sum of w, or where several GPUs share a batch the mean of their sums, so that all divide by
    the same number."""
    if background_weight == 1:
        return F.mse_loss(prediction, target)
    weight = mask + background_weight * (1 - mask)
    error = weight * (prediction - target) ** 2  # (B, C, H, W)
    return error.sum() / (prediction.shape[1] * count(weight)).clamp(min=1e-6)  # or no agent: 0

class LAM(nn.Module):
    """A latent action model: an IDM that names what happened, an FDM that must make use of it."""

    def __init__(self, config, background_weight):
        super().__init__()
        self.background_weight = background_weight
        self.idm = FrameEncoder(config, 6, config.latent_dim)
        self.fdm = FDM(config)

    def loss(self, windows, chosen, k, rng):
        """The loss of windows (B,) with offsets k (B,). rng, the same on every rank, is there for
        methods that augment."""
        stacks, next_obs, mask = windows.batch(chosen, k)
        prediction = self.fdm(stacks[:, :3], self.idm(stacks))
        return masked_mse(prediction.float(), next_obs, mask, self.background_weight,
                          count=lambda weight: mean_over_ranks(weight.sum()))

METHODS = {
    "lapo": lambda config: LAM(config, background_weight=1.0),
    "masklam": lambda config: LAM(config, config.background_weight),
}

def train_lam(config, windows, method, checkpoint=None):
    """Train a method on windows -> a LAM, with `losses`, its training curve in tenths."""
    sides, side = tuple(windows.frames.shape[1:3]), config.frame_size
    require(sides == (side, side), f"frames are {sides}, frame_size is {side}")
    torch.manual_seed(config.seed)
    lam = METHODS[method](config).to(windows.device, memory_format=torch.channels_last)

    def loss(step):
        rng = generator(config.seed, "lam", step)
        chosen = rng.integers(len(windows), size=config.batch_size)
        k = rng.integers(1, config.offset + 1, config.batch_size)
        with autocast(windows.device):
            return lam.loss(windows, share(chosen), share(k), rng)

    steps = train(lam, loss, config.lam_updates, config.lam_lr, method, checkpoint)
    lam.losses = [mean for _, mean in steps]
    return lam.eval()

@torch.no_grad()
def encode(network, windows: Windows, chosen: np.ndarray, frames=6) -> np.ndarray:
    """What a network says of the chosen windows, k = 1: an IDM, which sees 6 frames, latent actions
    (n, Z) f32; a policy, which sees 3, latent actions or actions (n, A)."""
    z = None  # one array, as small ones kept between large ones that go would hold their memory
    with autocast(windows.device):
        for part in np.array_split(np.arange(len(chosen)), math.ceil(len(chosen) / 100)):
            said = network(windows.seen(chosen[part], frames)).float().cpu().numpy()
            z = np.empty((len(chosen), said.shape[1]), np.float32) if z is None else z
            z[part] = said
    return z

@torch.no_grad()
def latent_use(lam, windows) -> float:
    """How much a forward model relies on the latent: 0 when it is ignored, towards 1 when it tells
    all that changes. 1 - error with the right z / error with another window's, both weighted as in
    the loss; needs no action."""
    chosen = generator(0, "use").permutation(len(windows))[:500]
    stacks, next_obs, mask = windows.batch(chosen)
    with autocast(windows.device):
        z = lam.idm(stacks)
        right, wrong = (masked_mse(lam.fdm(stacks[:, :3], latent).float(), next_obs, mask,
                                   lam.background_weight) for latent in (z, z.roll(1, 0)))
    return float((wrong - right) / wrong.clamp(min=1e-9))

# ==== 6. Probes [probe] ===========================================================================
# In: latent actions and true actions of training and held-out episodes. Out: how much of the action
# can be read from the latent, by a line and by a small network.

# References are there to compare a latent with. Both learn true actions: one from all frames that
# an IDM sees, one from those before the action, which tell no noise.
REFERENCES = {"past-only": 3, "supervised-idm": 6}  # frames

def ridge(inputs, targets, penalty=1e-4):
    """The best linear map, in closed form: (n, Z), (n, A) -> predict((m, Z)) -> (m, A)."""
    inputs, targets = np.asarray(inputs, np.float64), np.asarray(targets, np.float64)
    center, scale, mean = inputs.mean(0), inputs.std(0) + 1e-8, targets.mean(0)
    X = (inputs - center) / scale
    gram = X.T @ X + penalty * len(X) * np.eye(X.shape[1])
    weights = np.linalg.solve(gram, X.T @ (targets - mean))
    return lambda x: (np.asarray(x, np.float64) - center) / scale @ weights + mean

def regress(config, network, inputs, targets, rows, few=False, batch_size=None, **how):
    """Fit network(inputs(batch)) to targets[batch], of (n, D) f32, with batches of `rows`: every
    network that sees true actions learns here. few: so as not to learn by heart, a fifth of the
    rows says after how many updates the network knows most; then it starts again and learns from
    all rows for as long. batch_size: None is config's. how: other arguments of `train`."""
    device, size = next(network.parameters()).device, batch_size or config.batch_size
    targets, fresh = torch.from_numpy(targets).to(device), copy.deepcopy(network.state_dict())

    def error(batch):
        with autocast(device):
            return F.mse_loss(network(inputs(batch)).float(), targets[batch])

    def fit(rows):
        def loss(step):
            rng = generator(config.seed, "regress", step)
            return error(share(rows[rng.integers(len(rows), size=size)]))
        return train(network, loss, **how)

    @torch.no_grad()
    def unseen(held):
        parts = np.array_split(held, math.ceil(len(held) / 1000))
        return float(mean_over_ranks(sum(error(part) * len(part) for part in parts)))

    stop = how["updates"]
    if few:
        first, held = np.split(rows, [len(rows) * 2 // 5 * 2])  # even: the decoder's are pairs
        _, stop = min((unseen(held), step) for step, _ in fit(first))
        network.load_state_dict(fresh)
    for step, _ in fit(rows):
        if step == stop:  # one of the ten steps that `train` yields
            break
    return network.eval()

def clone(config, windows, targets, rows, text, frames=3, **how):
    """Behaviour cloning: a policy learns what was done from what was seen, in the windows `rows`.
    targets (len(windows), D): latent actions, or true ones. With 6 frames it sees what an IDM sees.
    how: for `regress`."""
    torch.manual_seed(config.seed + 1)
    policy = FrameEncoder(config, frames, targets.shape[1])
    policy.to(windows.device, memory_format=torch.channels_last)
    how = dict(updates=config.policy_updates, lr=config.policy_lr) | how
    return regress(config, policy, lambda batch: windows.seen(batch, frames), targets, rows,
                   text=text, **how)

def mlp_probe(config, inputs, targets, device):
    """Like `ridge`, but a network of two hidden layers, which reads what lies on no line."""
    center, scale = inputs.mean(0), inputs.std(0) + 1e-6
    scale[scale < 1e-5] = np.inf  # a number that never changes is not looked at
    x = torch.from_numpy((inputs - center) / scale).to(device)
    torch.manual_seed(config.seed)
    network = mlp(x.shape[1], 512, 512, targets.shape[1]).to(device)
    regress(config, network, lambda batch: x[batch], targets, np.arange(len(x)), few=True,
            batch_size=4 * config.batch_size, text="MLP probe", lr=3e-3,
            updates=config.probe_updates)

    @torch.no_grad()
    def predict(new):
        return network(torch.from_numpy((new - center) / scale).to(device)).cpu().numpy()
    return predict

def nmse(prediction, target) -> np.ndarray:
    """Squared error over variance, per dimension (A,): 0 = perfect, 1 = knows only the mean."""
    variance = target.var(0)
    constant = np.flatnonzero(variance < 1e-12).tolist()
    require(not constant, f"dimensions {constant} of what is probed never change: no NMSE")
    return ((prediction - target) ** 2).mean(0) / variance

def next_background(windows: Windows, chosen: np.ndarray) -> np.ndarray:
    """Frame t + 1 without the agent and its outline, averaged in a 4x4 grid: (n, 48) f32."""
    blocks = torch.empty(len(chosen), 3, 4, 4)
    following = torch.from_numpy(windows.index(chosen, 1)[:, 6])
    for part in torch.arange(len(chosen)).split(500):
        behind = (windows.masks[following[part], None] < 26).float()  # (n, 1, H, W)
        frames = windows.frames[following[part]].permute(0, 3, 1, 2) * behind
        weight = F.adaptive_avg_pool2d(behind, 4).clamp(min=1e-3)
        blocks[part] = (F.adaptive_avg_pool2d(frames, 4) / weight).cpu()
    return blocks.flatten(1).numpy()

def probe(config, read, training: Windows, heldout: Windows, decorrelated: Windows) -> dict:
    """How much of the action do latents tell? Probes of read(windows, chosen) -> (n, Z), fitted on
    `training`, tested on unseen episodes: NMSE of the action; of its noise, which no past frame
    tells (a latent that knows the pose alone has 1); both by an MLP; of the action where the
    background ignores it (rho = 0); and R2 of the next background."""
    chosen = generator(0, "probe").permutation(len(training))[:config.probe_windows]
    z, known = read(training, chosen), training.actions_and_noise(chosen)  # (n, Z), (n, 2 A)
    every, elsewhere = np.arange(len(heldout)), np.arange(len(decorrelated))
    z_unseen, unseen = read(heldout, every), heldout.actions_and_noise()
    line, network = ridge(z, known), mlp_probe(config, z, known, training.device)
    by_line, by_mlp = (np.split(nmse(told(z_unseen), unseen), 2) for told in (line, network))
    action, _ = np.split(line(read(decorrelated, elsewhere)), 2, axis=1)

    behind, shown = next_background(training, chosen), next_background(heldout, every)
    moves = shown.var(0) > 1e-3
    unexplained = nmse(ridge(z, behind)(z_unseen)[:, moves], shown[:, moves])
    return dict(
        probe_nmse=float(by_line[0].mean()), probe_nmse_per_dimension=by_line[0].tolist(),
        probe_nmse_noise=float(by_line[1].mean()), probe_nmse_mlp=float(by_mlp[0].mean()),
        probe_nmse_noise_mlp=float(by_mlp[1].mean()),
        probe_nmse_decorrelated=float(nmse(action, decorrelated.actions()).mean()),
        leakage_r2=float(1 - unexplained.mean()) if moves.any() else 0.0)

# ==== 7. Latent policy [policy] ===================================================================
# In: windows and a frozen IDM. Out: a policy from pixels to actions, in two steps: clone the latent
# actions of the demonstrations from frames alone, then decode the clone's latents to actions with a
# few labels. Both are regressions; so are oracle and labels-only, clones of true actions.
CLONES = ("labels-only", "oracle")  # policies cloned from true actions: the labelled ones, all

def labelled_windows(config, windows: Windows) -> np.ndarray:
    """The windows (n,) whose actions may be seen: of demonstrations drawn at random, one by one."""
    demonstrations = windows.demonstrations()
    order = generator(config.seed, "labels").permutation(len(windows.video.length))
    place = np.argsort(order)[windows.e[demonstrations]]  # of each one's episode in that order
    return demonstrations[np.argsort(place, kind="stable")][:config.labels]

def latent_targets(idm, windows) -> np.ndarray:
    """What a frozen IDM says of the demonstrations, at unit variance: (len(windows), Z), else 0."""
    rows = windows.demonstrations()
    z = encode(idm, windows, rows)
    targets = np.zeros((len(windows), z.shape[1]), np.float32)
    targets[rows] = (z - z.mean(0)) / (z.std(0) + 1e-6)
    return targets

def decode(config, policy, windows, targets, labelled, text):
    """Teach a policy that emits latent actions what they do -> one that emits actions. True ones
    are read of the windows `labelled` (n,) alone. The decoder learns each from the policy's latent
    action, which it will be given, and from that which the policy cloned, `targets`
    (len(windows), Z), which knows better what was done."""
    pairs = np.stack([encode(policy, windows, labelled, 3), targets[labelled]], 1)  # (n, 2, Z)
    z = torch.from_numpy(pairs).flatten(0, 1).to(windows.device)
    actions = windows.actions(labelled).repeat(2, 0)  # (2 n, A)
    torch.manual_seed(config.seed + 2)
    decoder = mlp(z.shape[1], 256, actions.shape[1]).to(windows.device)
    regress(config, decoder, lambda batch: z[batch], actions, np.arange(len(actions)), few=True,
            text=text, updates=config.decoder_updates, lr=1e-3)
    return nn.Sequential(policy, decoder).eval()

def action_nmse(policy, windows) -> float:
    """NMSE of a pixel policy's actions on the demonstrations of windows."""
    rows = windows.demonstrations()
    return float(nmse(encode(policy, windows, rows, 3), windows.actions(rows)).mean())

# ==== 8. Bodies [record] ==========================================================================
# A task is a Gymnasium MuJoCo environment and a camera. Bodies are driven by position servos, as
# legged robots are: an action names an angle for every joint and a fast loop inside the simulator
# holds it. So an action can be seen in two frames, and a policy that sees only frames can balance.
@dataclass(frozen=True)
class Task:
    env_id: str
    camera: tuple[float, float, float] | None = None  # see AgentRenderer
    seconds: float | None = None  # that an action lasts; None: as the environment has it
    reach: float | None = None  # of `servo`, rad; None: the environment's own motors
    options: dict = field(default_factory=dict)  # of gym.make
    cycle: float = 0.0  # steps of a gait, for an expert that sees a clock; see `expert_input`
    feet: tuple[str, ...] = ()  # geoms that are made flat boxes

FREE = {"ctrl_cost_weight": 0}  # an angle costs nothing
BLIND = {f"include_{name}_in_observation": False
         for name in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")}
TASKS = {
    "cheetah": Task("HalfCheetah-v5", (2.6, -8, 0), 0.1, 0.8),
    "hopper": Task("Hopper-v5", (2.4, -8, 0.3), 0.1, 0.6,
                   FREE | dict(healthy_angle_range=(-1, 1), healthy_z_range=(0.5, 10))),
    "walker": Task("Walker2d-v5", (2.6, -8, 0.1), 0.1, 0.6, FREE),
    "swimmer": Task("Swimmer-v5", (4.4, -90, 0), 0.1, 0.6),
    "ant": Task("Ant-v5", (3.5, -40, -0.1), 0.1, 0.6,
                FREE | dict(include_cfrc_ext_in_observation=False)),
    "humanoid": Task("Humanoid-v5", (2.8, -8, -0.15), 0.05, 0.5, FREE | BLIND, 14.4,
                     ("right_foot", "left_foot")),  # are spheres, on which nothing can stand
}

def servo(model, reach, stiffness=2.0, damping=0.05):
    """Make the motors of a loaded MuJoCo model position servos, in place.

    Action a in [-high, high] asks a joint for the angle middle + reach a / high (radians), where
    middle is the initial pose, or so near to it that the joint can take all of these.
    force = kp (angle - q) - damping kp dq, with kp = stiffness x the motor's torque per radian, and
    limited to that torque; the implicit integrator keeps stiff servos stable."""
    high = model.actuator_ctrlrange[:, 1]
    torque = model.actuator_gear[:, 0] * high
    joints = model.actuator_trnid[:, 0]
    pose = model.qpos0[model.jnt_qposadr[joints]]
    limited = model.jnt_limited[joints, None]
    lowest, highest = np.where(limited, model.jnt_range[joints], (-np.inf, np.inf)).T
    reach = np.minimum(reach, (highest - lowest) / 2)
    middle = np.clip(pose, lowest + reach, highest - reach)
    kp = stiffness * torque

    model.actuator_gear[:, 0] = 1
    model.actuator_gainprm[:, 0] = kp * reach / high
    model.actuator_biastype[:] = mujoco.mjtBias.mjBIAS_AFFINE
    model.actuator_biasprm[:, :3] = np.stack([kp * middle, -kp, -damping * kp], 1)
    model.actuator_forcelimited[:] = 1
    model.actuator_forcerange[:] = np.stack([-torque, torque], 1)
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    model.opt.timestep = 0.005  # seconds

def bare_env(name: str):
    """A task's environment, or the one of this id, without time limit. It observes the state, and
    its actions reach from -1 to 1."""
    mujoco.set_mju_user_warning(lambda _: None)  # models' deprecations, also to ./MUJOCO_LOG.TXT
    gym.logger.min_level = gym.logger.ERROR  # and environments'
    task = TASKS.get(name, Task(name))
    try:
        env = gym.make(task.env_id, -1, disable_env_checker=True, **task.options)
        model = env.unwrapped.model
    except (gym.error.Error, ImportError, AttributeError) as error:
        raise UserError(f"--task is {name!r}; allowed: {', '.join(TASKS)} ({error})") from error
    for geom in map(model.geom, task.feet):
        geom.type, geom.size = mujoco.mjtGeom.mjGEOM_BOX, (0.14, 0.08, 0.06)  # half sizes, metres
        geom.rbound, model.geom_aabb[geom.id, 3:] = np.linalg.norm(geom.size), geom.size
        model.bvh_aabb[model.body_bvhadr[model.geom_bodyid[geom.id]], 3:] = geom.size  # for rays
    if task.reach:
        servo(model, task.reach)
    if task.seconds:
        env.unwrapped.frame_skip = round(task.seconds / model.opt.timestep)
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))

state_env = functools.cache(bare_env)  # a process needs only one of each

def load_expert(task: str) -> np.ndarray:
    """A task's linear policy (A, 1 + S) f64, bias and weights, from its literal."""
    require(task in EXPERTS, f"--task {task} has no expert: see notebooks/07_experts.ipynb")
    planes = np.frombuffer(zlib.decompress(base64.b85decode(EXPERTS[task])), np.uint8)
    numbers = planes.reshape(2, -1).T.copy().view(np.float16).astype(float)  # low bytes came first
    return numbers.reshape(*state_env(task).action_space.shape, -1)

def expert_input(task: str, state: np.ndarray, t: int) -> np.ndarray:
    """What an expert sees of an observation at step t: the state and, of a body that steps to a
    clock, sine and cosine of its gait's phase."""
    cycle = TASKS[task].cycle if task in TASKS else 0
    if not cycle:
        return state
    phase = 2 * math.pi * t / cycle
    return np.append(state, (math.sin(phase), math.cos(phase)))

def expert_action(expert: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """What a linear policy (A, 1 + S) does at its input (S,)."""
    return np.clip(expert[:, 0] + expert[:, 1:] @ seen, -1, 1)

def moving_reward(reward: float, info: dict) -> float:
    """What the environment pays for moving: its reward without the bonus for being alive, as
    Gymnasium's v5 environments name it."""
    return reward - info.get("reward_survive", 0.0)

def play(env, task, expert, seed, purpose, steps, noise=0.0, restart=False):
    """Drive an environment by an expert, disturbed by Gaussian noise, or at random (None), until
    the body falls; with restart it starts anew. Yields of every step (start, observation, info,
    the expert's action (A,), what it saw, the executed action (A,), the reward for moving)."""
    rng, start, A = generator(seed, purpose), 0, len(env.action_space.low)
    observation, info = env.reset(seed=seed)
    for t in range(steps):
        seen = expert_input(task, info.get("state", observation), t - start)
        disturbance = noise * rng.standard_normal(A)
        intended = rng.uniform(-1, 1, A) if expert is None else expert_action(expert, seen)
        action = np.float32((intended + disturbance).clip(-1, 1))
        following, reward, terminated, _, after = env.step(action)
        yield start, observation, info, intended, seen, action, moving_reward(reward, after)
        if terminated and not restart:
            break
        observation, info = following, after
        if terminated:
            start, (observation, info) = t + 1, env.reset()

def state_rollout(task, expert, seed, steps, noise=0.0, restart=False):
    """`play` without pixels -> what the expert saw (n, S), actions (n, A) and rewards (n,)."""
    episode = play(state_env(task), task, expert, seed, "rollout", steps, noise, restart)
    return tuple(map(np.stack, zip(*(step[-3:] for step in episode))))

# ==== 9. Renderer [record] ========================================================================
# In: joint positions. Out: the agent alone (all bodies but the world) as premultiplied colour and
# soft alpha, which is the simulator's own mask. Casting rays, one a pixel and five at its outline,
# is fast, needs no OpenGL and looks the same anywhere.
class AgentRenderer:
    """Draws a Gymnasium MuJoCo agent from its joint positions, with a camera that follows it.

    camera: distance (metres), elevation (degrees), metres above the initial centre of mass that it
    aims at; None: -20 degrees, and the agent spans two thirds of the frame. It follows along the
    ground but keeps its height: with no floor in sight, jumps would be invisible."""

    def __init__(self, model, camera=None, size=64):
        self.model, self.camera, self.size = model, camera, size
        self.data, self.colors = mujoco.MjData(model), model.geom_rgba[:, :3]
        mujoco.mj_forward(model, self.data)
        slope = math.tan(math.radians(model.vis.global_.fovy) / 2)
        center = self.data.subtree_com[1]
        if camera is None:
            reach = np.linalg.norm(self.data.geom_xpos - center, axis=1) + model.geom_rbound
            self.camera = (float(1.5 * reach[model.geom_bodyid > 0].max() / slope), -20, 0)
        self.height = center[2] + self.camera[2]

        # Five rays a pixel, no two of them in a row or column; the first is in the middle.
        inside = np.array([(0, 0), (-2, -1), (-1, 2), (1, -2), (2, 1)]) / 5
        places = np.indices((size, size)).reshape(2, -1, 1) + 0.5 - size / 2 + inside.T[:, None]
        pixel = 2 * slope / size  # width of one, 1 m away
        rays = np.stack([*pixel * places[::-1], np.ones_like(places[0])], -1)
        self.rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)  # (size^2, 5, 3)

    def __call__(self, qpos, view=(0, 0, 0, 0)):
        """Draw joint positions (nq,) -> rgb (size, size, 3) u8, premultiplied by alpha, and alpha
        (size, size) u8, which is the agent's mask. view: how much the camera's azimuth, elevation,
        roll (degrees) and distance (as a fraction) are off."""
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)

        degrees = (90 + view[0], self.camera[1] + view[1], view[2])
        (ca, ce, cr), (sa, se, sr) = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        ahead, side = np.array([ca * ce, sa * ce, se]), np.array([sa, -ca, 0])
        up = np.array([-ca * se, -sa * se, ce])
        rays = self.rays @ np.stack([cr * side - sr * up, -cr * up - sr * side, ahead])
        eye = [*self.data.subtree_com[1, :2], self.height] - self.camera[0] * (1 + view[3]) * ahead

        layers = self._cast(eye, rays[:, 0])  # red, green, blue, alpha
        alpha = torch.from_numpy(layers[:, 3].reshape(1, self.size, self.size))
        border = F.max_pool2d(alpha, 3, 1, 1) > -F.max_pool2d(-alpha, 3, 1, 1)  # on either side
        pixels = np.flatnonzero(border.numpy())
        around = self._cast(eye, rays[pixels, 1:].reshape(-1, 3))
        layers[pixels] = (layers[pixels] + around.reshape(-1, 4, 4).sum(1)) / 5
        layers = (layers + 0.5).astype(np.uint8).reshape(self.size, self.size, 4)
        return layers[..., :3], layers[..., 3]

    def _cast(self, eye, rays):
        """Rays (n, 3) from the eye (3,) -> layers (n, 4) f32 up to 255."""
        n = len(rays)
        geom, distance, normal = np.zeros(n, np.int32), np.zeros(n), np.zeros((n, 3))
        mujoco.mj_multiRay(self.model, self.data, eye, rays.ravel(), None, False, -1, geom,
                           distance, normal.reshape(-1), n, mujoco.mjMAXVAL)
        hit, layers = np.flatnonzero(geom >= 0), np.zeros((n, 4), np.float32)
        facing = np.abs(np.einsum("ni,ni->n", normal[hit], rays[hit]))
        light = 0.4 + 0.4 * facing + normal[hit, 2].clip(0)
        layers[hit, :3] = (255 * self.colors[geom[hit]] * light[:, None]).clip(0, 255)
        layers[hit, 3] = 255
        return layers

# ==== 10. Films [record] ==========================================================================
# In: files, of one's own or to show behind an agent. Out: frames as a viewer shows them, cut to
# squares; or a Video of clips.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FILMS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", *PICTURES)

def list_films(folder) -> list:
    """The pictures, films and folders in a folder, 2 before 10; nothing hidden."""
    require(Path(folder).is_dir(), f"{folder} is not a folder")
    shown = [p for p in Path(folder).iterdir()
             if not p.name.startswith(".") and (p.is_dir() or p.suffix.lower() in FILMS)]
    return sorted(shown, key=lambda p: [(text, int(number or 0)) for text, number in
                                        re.findall(r"(\D*)(\d*)", p.name.lower())])

def read_pictures(file):
    """The pictures of a file, one by one, as a viewer shows them: PIL images, RGB."""
    if file.suffix.lower() not in PICTURES:
        with av.open(file) as film:
            for frame in film.decode(video=0):
                yield frame.to_image().rotate(frame.rotation, expand=True)
        return
    with Image.open(file) as film:
        for image in [film] if film.format == "MPO" else ImageSequence.Iterator(film):
            image = ImageOps.exif_transpose(image)
            require(image.mode != "F", "it is of floats, whose black and white nobody knows")
            if image.mode.startswith("I"):  # 16 bits
                image = Image.fromarray(np.uint8(np.asarray(image).clip(0, 65535) // 257))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            yield image.convert("RGB")

def read_film(path, side, limit=None):
    """Frames of a video, a picture or a folder of pictures, cut to squares: (n, side, side, 3) u8,
    n <= limit. UserError names a file that cannot be read."""
    film = []
    for file in list_films(path) if path.is_dir() else [path]:
        try:
            for image in itertools.islice(read_pictures(file), limit and limit - len(film)):
                film.append(np.asarray(ImageOps.fit(image, (side, side))))
        except Exception as error:  # a broken PNG is a SyntaxError
            raise UserError(f"{file} cannot be read ({error})") from error
    require(film, f"{path} has no picture")
    return np.stack(film)

def read_clips(folder, side) -> Video:
    """Video of one's own: every film, or folder of pictures, in a folder is a clip. Pictures in
    masks/<its name>, black but for the agent, are its masks; without them it is agent all over."""
    clips = [p for p in list_films(folder) if p.name != "masks"]
    require(clips, f"{folder} has no clips: films, or folders of pictures")
    names = [path.name if path.is_dir() else path.stem for path in clips]
    given = Path(folder) / "masks"
    for shapes in list_films(given) if given.is_dir() else ():
        require(shapes.name in names, f"{shapes} is named as none of the clips: {', '.join(names)}")
    films = [read_film(path, side) for path in clips]
    length = np.array([len(film) for film in films])
    frames = np.zeros((len(films), max(length), side, side, 3), np.uint8)
    masks = np.full(frames.shape[:4], 255, np.uint8)
    for e, (name, film) in enumerate(zip(names, films)):
        frames[e, :len(film)] = film
        if (given / name).is_dir():
            found = read_film(given / name, side).max(-1)
            require(len(found) == len(film), f"{given / name} has {len(found)} pictures for the "
                    f"{len(film)} frames of {name}")
            require(not 0 < found.max() < 128, f"{given / name} is {found.max()} where the agent "
                    "is, not 255")
            masks[e, :len(film)] = found
    return Video(frames, masks, length)

# ==== 11. Distractors [record] ====================================================================
# In: a Gymnasium MuJoCo environment. Out: the same with pixel observations, in which everything but
# the agent moves too, partly following its actions. Stationary or smooth backgrounds are easy: what
# ruins a latent action is many sharp edges that move independently.
class Backdrop:
    """What moves behind an agent: two textures that scroll and twelve two-coloured sprites.

    In pixels a step, v = speed * (rho * P (a - mean) + sqrt(1 - rho^2) * u), with a the executed
    action scaled to [-1, 1], P (D, A) and mean (A,) from `tie`, so that P (a - mean) has unit
    variance, and u unit-variance Ornstein-Uhlenbeck noise: rho does not change the speed."""

    TEXTURES, SPRITES, PERSISTENCE = 2, 12, 0.5
    D = 2 * (TEXTURES + SPRITES)  # velocities: of sprites down and right, of textures up and left
    BRIGHTEST = (128, 256, 256)  # upper ends of red, green, blue: cool, as the agents are warm

    def __init__(self, rng, tied, correlation=0.5, speed=10.0, size=64, files=()):
        self.rng, self.correlation, self.speed = rng, correlation, speed
        self.projection, self.mean = tied
        self.size, self.files = size, files
        self.margin = size // 2  # sprites wrap around out of sight
        self.period = size + 2 * self.margin
        self.noise = rng.standard_normal(self.D)
        self.velocity = np.zeros(self.D, np.float32)
        self.position = rng.uniform(0, self.period, (self.D // 2, 2))
        self.paint()

    @classmethod
    def tie(cls, actions: np.ndarray, seed: int):
        """How backgrounds follow actions like these (n, A): -> projection (D, A), mean (A,)."""
        rows = generator(seed, "projection").standard_normal((cls.D, actions.shape[1]))
        spread = (rows @ (actions - actions.mean(0)).T).std(1, keepdims=True)
        return rows / spread, actions.mean(0)

    def paint(self):
        """What an episode shows."""
        self.horizon = self.margin + int(self.rng.integers(self.size // 3, 2 * self.size // 3))
        self.textures = [self._texture() for _ in range(self.TEXTURES)]
        self.sprites = [self._sprite() for _ in range(self.SPRITES)]

    def _colors(self, *shape):
        return self.rng.integers(0, self.BRIGHTEST, (*shape, 3)).astype(np.uint8)

    def _texture(self):
        """8x8 random blocks, tiled 2x2 so that any scroll is one slice."""
        block = math.ceil(self.period / 8)
        tile = self._colors(8, 8).repeat(block, 0).repeat(block, 1)[:self.period, :self.period]
        return np.tile(tile, (2, 2, 1))

    def _sprite(self):
        """A disc, box or diamond, half and half -> colours (s, s, 3), outline (s, s) bool."""
        s = int(self.rng.integers(self.size // 3, self.margin + 1))
        y, x = np.mgrid[:s, :s] - (s - 1) / 2
        reach = (np.hypot(x, y), 1.2 * np.maximum(abs(x), abs(y)), abs(x) + abs(y))
        inside = reach[self.rng.integers(3)] <= s / 2
        angle = self.rng.uniform(0, np.pi)
        side = (np.cos(angle) * x + np.sin(angle) * y > 0).astype(int)
        return self._colors(2)[side], inside

    def step(self, action):
        """Move everything; action: (A,) as executed, scaled to [-1, 1]."""
        keep, rho = self.PERSISTENCE, self.correlation
        self.noise = keep * self.noise + math.sqrt(1 - keep**2) * self.rng.standard_normal(self.D)
        follow = self.projection @ (action - self.mean)
        drive = rho * follow + math.sqrt(1 - rho**2) * self.noise
        self.velocity = (self.speed * drive).astype(np.float32)
        self.position = (self.position + self.velocity.reshape(-1, 2)) % self.period

    def draw(self) -> np.ndarray:
        """-> (size, size, 3) u8."""
        places = self.position.astype(int)
        above, below = (texture[y:y + self.period, x:x + self.period]
                        for texture, (y, x) in zip(self.textures, places))
        canvas = np.concatenate([above[:self.horizon], below[self.horizon:]])
        for (colors, inside), (y, x) in zip(self.sprites, places[self.TEXTURES:]):
            spot = canvas[y:y + len(colors), x:x + len(colors)]  # clipped at the canvas's edge
            h, w, _ = spot.shape
            np.copyto(spot, colors[:h, :w], where=inside[:h, :w, None])
        visible = slice(self.margin, self.margin + self.size)
        return canvas[visible, visible]

class Footage(Backdrop):
    """A video or picture behind the agent, from any frame forwards and backwards. It moves as a
    whole, and goes on as its mirror image."""

    D = 2
    read = staticmethod(functools.lru_cache(100)(read_film))

    def paint(self):
        path = self.files[self.rng.integers(len(self.files))]
        frames = self.read(path, self.size, limit=100)
        self.film = np.concatenate([frames, frames[::-1]])  # there and back again
        self.period = 2 * self.size  # the picture and its mirror image
        self.time = int(self.rng.integers(len(self.film)))

    def step(self, action):
        super().step(action)
        self.time += 1

    def draw(self):
        frame = self.film[self.time % len(self.film)]
        mirrored = np.pad(frame, ((0, self.size), (0, self.size), (0, 0)), "symmetric")
        return np.roll(mirrored, -self.position[0].astype(int), (0, 1))[:self.size, :self.size]

def backdrop(files):
    """The class of what moves behind the agent."""
    return Footage if files else Backdrop

def footage(folder: str, split: str) -> tuple:
    """What a split shows of a folder: half of its films are for training, a quarter for both ways
    of probing, a quarter for evaluation."""
    films = list_films(folder) if folder else []
    require(not folder or len(films) >= 4, f"--backgrounds is {folder!r}; allowed: a folder with "
            "four or more videos, pictures or folders of pictures")
    places = dict(training=(0, 1), heldout=(2,), decorrelated=(2,), evaluate=(3,))[split]
    return tuple(path for i, path in enumerate(films) if i % 4 in places)

class Distractors(gym.Wrapper):
    """Pixel observations (size, size, 3) u8 of a MuJoCo environment, with moving distractors.

    level: "none" (a plain background), "low" (a Backdrop, or Footage of files) or "hard" (also the
        camera on a random walk, within a tenth of the Distracting Control Suite's ranges, arXiv
        2101.02722). tied: from `Backdrop.tie`; None: with uniform actions.
    info: "state" the wrapped observation, "mask" (size, size) u8 the alpha of the agent (and of an
        object or goal), "distractor" (D,) f32 the background's velocities, pixels a step, "action"
        (A,) f32 as executed."""

    def __init__(self, env, level="low", correlation=0.5, speed=10.0, camera=None, size=64,
                 tied=None, files=()):
        super().__init__(env)
        require(level in ("none", "low", "hard"), f"level is {level!r}, not none, low or hard")
        self.level = level
        uniform = generator(0, "uniform").uniform(-1, 1, (1000, *self.action_space.shape))
        tied = tied or backdrop(files).tie(uniform, 0)
        self.new_backdrop = lambda rng: backdrop(files)(rng, tied, correlation, speed, size, files)
        self.renderer = AgentRenderer(env.unwrapped.model, camera, size)
        self.limit = np.array([9, 9, 9, 0.05]) * (level == "hard")  # of the camera's walk
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.rng, self.frame = np.random.default_rng(), None

    def reset(self, *, seed=None, options=None):
        state, info = self.env.reset(seed=seed, options=options)
        if seed is not None:
            self.rng = np.random.default_rng([seed, 1])
        self.backdrop = self.new_backdrop(self.rng)
        self.pose = self.rng.uniform(-self.limit, self.limit)
        self.drift = np.zeros(4)
        return self._observe(state, info, np.zeros(self.action_space.shape, np.float32))

    def step(self, action):
        box = self.action_space
        executed = np.clip(action, box.low, box.high).astype(np.float32)  # replays exactly
        state, reward, terminated, truncated, info = self.env.step(executed)
        if self.level != "none":
            self.backdrop.step((2 * executed - box.low - box.high) / (box.high - box.low))
        self.drift += 0.05 * self.limit * self.rng.standard_normal(4)
        self.drift = self.drift.clip(-0.2 * self.limit, 0.2 * self.limit)
        self.pose = (self.pose + self.drift).clip(-self.limit, self.limit)
        observation, info = self._observe(state, info, executed)
        return observation, reward, terminated, truncated, info

    def _observe(self, state, info, executed):
        rgb, alpha = self.renderer(self.unwrapped.data.qpos, self.pose)
        behind = np.uint8((70, 105, 140)) if self.level == "none" else self.backdrop.draw()
        weighted = behind * (255 - alpha.astype(np.uint16))[..., None]
        self.frame = rgb + ((weighted + 128) // 255).astype(np.uint8)
        return self.frame, info | dict(state=state, mask=alpha, action=executed,
                                       distractor=self.backdrop.velocity.copy())

    def render(self):
        return self.frame

# ==== 12. Recording [record] ======================================================================
# In: a body, its expert and its distractors. Out: videos of episodes. The even ones are
# demonstrations, quiet enough to be cloned, that end when the body falls. The odd ones explore, and
# there it starts anew: a nearly deterministic expert's action is a function of what was seen, so
# that a latent of the pose would pass for an action; noise is what only the transition can tell.
SPLITS = ("training", "heldout", "decorrelated", "evaluate")

def episode_seed(config, split, index):
    """Environment seed of an episode; splits never share one, nor do runs with other seeds."""
    return config.seed * 10**6 + SPLITS.index(split) * 250_000 + index

def noise_scale(config, index, seed):
    """Scale of the noise added to the expert's clipped actions, which reach from -1 to 1."""
    if index % 2:
        return config.exploration_noise
    return generator(seed, "scale").uniform(0, config.demonstration_noise)

def expected_action(intended, scale):
    """The mean of clip(intended + scale n, -1, 1) over standard normal n, by 1,000 quantiles: all
    that the past can tell of an action."""
    quantiles = torch.special.ndtri((torch.arange(1000) + 0.5) / 1000).numpy()
    return np.clip(intended[..., None] + scale * quantiles, -1, 1).mean(-1)

@functools.lru_cache(1)
def tied_background(config):
    """`Backdrop.tie` with twenty episodes of actions as they will be recorded, whatever rho is."""
    expert = load_expert(config.task)
    actions = [state_rollout(config.task, expert, i, config.steps, noise_scale(config, i, i),
                             restart=i % 2)[1] for i in range(20)]
    return backdrop(config.backgrounds).tie(np.concatenate(actions), config.seed)

def make_env(config, split="training"):
    """The task's environment with the distractors of a split: footage of its own, and in
    "decorrelated" a background that no longer follows the action (rho = 0)."""
    rho = 0.0 if split == "decorrelated" else config.correlation
    camera = TASKS[config.task].camera if config.task in TASKS else None
    return Distractors(bare_env(config.task), config.distractor, rho, config.speed, camera,
                       config.frame_size, tied_background(config),
                       footage(config.backgrounds, split))

cached_env = functools.lru_cache(1)(make_env)  # a worker process uses one environment for long

def record_episode(config, folder, split, index):
    """Record an episode into its place in folder/split."""
    env, video = cached_env(config, split), Video.open(folder / split, "r+")
    seed, expert = episode_seed(config, split, index), load_expert(config.task)
    scale, means = noise_scale(config, index, seed), np.zeros(video.actions.shape[1:])
    episode = play(env, config.task, expert, seed, "act", config.steps, scale, index % 2)
    for t, (start, frame, info, intended, _, action, reward) in enumerate(episode):
        video.frames[index, t], video.masks[index, t] = frame, info["mask"]
        video.states[index, t], video.start[index, t] = info["state"], start
        video.actions[index, t], video.rewards[index, t], means[t] = action, reward, intended
    video.expected[index] = expected_action(means, scale)
    video.demonstration[index] = index % 2 == 0
    video.length[index] = t + 1  # comes last: where it is 0, the episode is still to be recorded

def create_array(path, shape, kind):
    """Zeros on disk, mapped. They take their room now, as later a full disk could not be told."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.broadcast_to(np.zeros(shape[1:], kind), shape))
    return np.load(path, "r+")

def record(config, folder, pmap=itertools.starmap):
    """Record folder/training and, to probe with, folder/heldout and folder/decorrelated, going on
    where an earlier call was stopped. pmap: `starmap`, or one that works in parallel."""
    env, T, H = state_env(config.task), config.steps, config.frame_size
    A, S = len(load_expert(config.task)), *env.observation_space.shape
    arrays = dict(frames=("uint8", T, H, H, 3), masks=("uint8", T, H, H), length=("int64",),
                  actions=("float32", T, A), expected=("float32", T, A), rewards=("float32", T),
                  states=("float32", T, S), demonstration=("bool",), start=("int64", T))
    sizes = dict.fromkeys(SPLITS[:3], config.heldout_episodes) | dict(training=config.episodes)
    if not folder.exists():
        with written_whole(folder) as temporary:
            for split, (name, (kind, *shape)) in itertools.product(sizes, arrays.items()):
                create_array(temporary / split / f"{name}.npy", (sizes[split], *shape), kind)

    jobs = [(config, folder, split, index) for split in sizes
            for index in np.flatnonzero(Video.open(folder / split).length == 0).tolist()]
    list(progress(pmap(record_episode, jobs), "episodes recorded", len(jobs)))

# ==== 13. Masks [mask] ============================================================================
# In: frames. Out: where the agent is. The simulator's masks were drawn along with the frames. With
# --masks sam the segmentation model SAM (arXiv 2304.02643) is clicked on the agent in a few
# keyframes, by the simulator, which tells it nothing else; a student learns from what it finds to
# mask every frame.
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_FILES = {  # official checkpoints and their SHA-256 (what their names end in is of their MD5)
    "vit_b": ("sam_vit_b_01ec64.pth",
              "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "vit_l": ("sam_vit_l_0b3195.pth",
              "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_h": ("sam_vit_h_4b8939.pth",
              "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e")}

def load_sam(model: str, file: str, device):
    """The official SamPredictor of a checkpoint; without `file` of the official one, which is
    downloaded once, to torch's hub cache, and its hash checked."""
    from segment_anything import SamPredictor, sam_model_registry  # slow to import, rarely needed
    name, digest = SAM_FILES[model]
    path = Path(file or Path(torch.hub.get_dir()) / "checkpoints" / name)
    try:
        if not file and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(SAM_URL + name, str(path), digest)
        sam = sam_model_registry[model](checkpoint=str(path))
    except Exception as error:  # torch raises many kinds, IndexError among them
        raise UserError(f"no checkpoint of {model} in {path}, which comes from {SAM_URL}{name} "
                        f"({error}): pass its file as --sam-checkpoint") from error
    return SamPredictor(sam.to(device))

def clicks(masks: np.ndarray) -> np.ndarray:
    """Where one would click on the agents of masks (n, H, W) u8: the points farthest from the
    border, as SAM's authors prompt it -> (n, 2), x and y in pixels."""
    x, W = torch.from_numpy(masks).float()[:, None], masks.shape[2]
    depth = sum(-F.max_pool2d(-x, 2 * reach + 1, 1, reach) for reach in range(W // 8))
    deepest = depth.flatten(1).argmax(1).numpy()
    return np.stack([deepest % W, deepest // W], 1) + 0.5

@torch.no_grad()
def segment(predictor, frames: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Where SAM sees an agent in frames (n, H, W, 3) u8 that it is clicked on at points (n, 2), x
    and y in pixels -> masks (n, H, W) u8. Of its three answers that is taken which scores best:
    its predicted IoU, plus one for a plausible area, plus how well it agrees in place and area with
    those taken of other frames, as the camera follows the agent."""
    found = []
    for frame, point in progress(zip(frames, points), "SAM", len(frames)):
        with autocast(predictor.device):
            predictor.set_image(frame)
        predictor.features = predictor.features.float()
        found.append(predictor.predict(point[None], np.array([1]))[:2])  # 1: on the agent
    candidates, predicted = map(np.stack, zip(*found))  # (n, 3, H, W) bool, (n, 3)

    each, area = np.arange(len(frames)), candidates.mean((2, 3))
    alone = predicted + ((area > 0.005) & (area < 0.4))
    chosen = alone.argmax(1)
    for _ in range(5):
        average, typical = candidates[each, chosen].mean(0), np.median(area[each, chosen])
        overlap = (candidates * average).sum((2, 3)) / np.maximum(candidates, average).sum((2, 3))
        likeness = np.minimum(area, typical) / np.maximum(np.maximum(area, typical), 1e-9)
        chosen = (alone + overlap + likeness).argmax(1)
    return np.uint8(255) * candidates[each, chosen]

def train_student(config, frames: np.ndarray, masks: np.ndarray, device):
    """Distil keyframes (n, H, W, 3) u8 and their masks (n, H, W) u8 into a small network, frames
    (B, 3, H, W) -> logits (B, 1, H, W). Mirrored, shifted and recoloured, a few dozen suffice."""
    torch.manual_seed(config.seed + 3)
    widths = (16, 32, 64, 64)
    student = nn.Sequential(nn.PixelUnshuffle(2), Encoder(12, widths, 2, kernel=3),
                            Decoder(4, widths, 2, kernel=3), nn.PixelShuffle(2))
    student.to(device, memory_format=torch.channels_last)
    frames = np.concatenate([frames, masks[..., None]], -1)
    inputs = to_float(torch.from_numpy(frames)[:, None]).to(device)  # (n, 4, H, W)

    def loss(step):
        rng = generator(config.seed, "student", step)
        batch = inputs[rng.integers(len(inputs), size=32)]
        reach = batch.shape[-1] // 8
        batch = batch.roll(rng.integers(-reach, reach + 1, 2).tolist(), (2, 3))
        batch = batch.flip(3) if step % 2 else batch
        stretch = rng.uniform((0.7, -0.1), (1.3, 0.1), (32, 3, 1, 1, 2)).astype(np.float32)
        gain, shift = torch.from_numpy(stretch).to(device).unbind(-1)
        with autocast(device):
            logits = student(batch[:, :3] * gain + shift)
        logits, true = logits.float(), batch[:, 3:] + 0.5
        found = logits.sigmoid()
        soft_iou = (found * true).sum() / (found + true - found * true).sum()
        # Without the cross entropy a student may find nothing anywhere, where gradients vanish.
        return F.binary_cross_entropy_with_logits(logits, true) + 1 - soft_iou

    list(train(student, loss, config.student_updates, 3e-3, "student"))
    return student.eval()

def teach_student(config, training: Video, device):
    """-> a student of SAM's masks of keyframes, or with --masks student of the simulator's; and the
    IoU of its teacher's masks with the simulator's."""
    e, t = np.nonzero(training.valid)
    spread = np.linspace(0, len(e) - 1, config.keyframes).astype(int)
    frames, masks = training.frames[e[spread], t[spread]], training.masks[e[spread], t[spread]]
    shown = (masks >= 128).any((1, 2))  # nobody can click on an agent that is not there
    frames, masks, truth = frames[shown], masks[shown], masks[shown]
    if config.masks == "sam":
        predictor = load_sam(config.sam_model, config.sam_checkpoint, device)
        masks = segment(predictor, frames, clicks(truth))
    return train_student(config, frames, masks, device), mask_iou(masks, truth)

@torch.no_grad()
def student_masks(student, frames: np.ndarray) -> np.ndarray:
    """The student's soft masks (n, H, W) u8 of frames (n, H, W, 3) u8."""
    device, parts = next(student.parameters()).device, torch.from_numpy(frames).split(128)
    with autocast(device):
        logits = [student(to_float(part[:, None].to(device)))[:, 0].float() for part in parts]
    return (255 * torch.cat(logits).sigmoid()).round().byte().cpu().numpy()

def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of u8 masks (n, ...) of one shape, agent = 128 and above."""
    shared, either = 0, 0
    for x, y in zip(a, b, strict=True):  # of a long video, piece by piece
        shared += np.count_nonzero((x >= 128) & (y >= 128))
        either += np.count_nonzero((x >= 128) | (y >= 128))
    return shared / max(either, 1)

# ==== 14. Evaluation [evaluate] ===================================================================
# In: a policy. Out: its return in the real environment, on backgrounds that nothing was trained or
# probed on. All episodes step together, so that the policy sees batches.
def evaluation_seeds(config):
    return [episode_seed(config, "evaluate", i) for i in range(config.eval_episodes)]

@torch.no_grad()
def rollout(config, policy, device, text):
    """Let a policy act -> returns (eval_episodes,), film (t, H, W, 3) u8 of the first, t <= 200.
    The policy maps obs (n, 3, H, W, 3) u8 to actions (n, A) in [-1, 1]."""
    seeds = evaluation_seeds(config)
    envs = [make_env(config, "evaluate") for _ in seeds]
    frames = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)]
    stack, film = [np.stack(frames)] * 3, []  # the first frame, repeated
    returns, alive = np.zeros(len(envs)), np.ones(len(envs), bool)
    for _ in progress(range(config.eval_steps), text, config.eval_steps):
        actions = policy(torch.from_numpy(np.stack(stack, 1)).to(device)).cpu().numpy()
        if len(film) < 200 and alive[0]:
            film.append(frames[0])
        for i in np.flatnonzero(alive):
            frames[i], reward, terminated, _, info = envs[i].step(actions[i])
            returns[i] += moving_reward(reward, info)
            alive[i] = not terminated
        if not alive.any():
            break
        stack = [*stack[1:], np.stack(frames)]
    return returns, np.stack(film)

# ==== 15. Report [report] =========================================================================
# In: the numbers of all stages. Out: a table, a figure and an animation.
COLUMNS = {  # keys of results.json: their titles in the table and, where it has a panel, the figure
    "probe_nmse": ("NMSE", "NMSE of the action, by a line"),
    "probe_nmse_noise": ("of noise", "NMSE of its noise, by a line"),
    "probe_nmse_mlp": ("by MLP", "NMSE of the action, by an MLP"),
    "probe_nmse_noise_mlp": ("of noise", "NMSE of its noise, by an MLP"),
    "probe_nmse_decorrelated": ("rho = 0", ""),
    "leakage_r2": ("leakage", "leakage: R2 of the next background"),
    "latent_use": ("use of z", "use of the latent by the FDM"),
    "return_mean": ("return", "return (higher is better)"),
    "return_std": ("+-", ""), "normalized_return": ("0 to 1", ""), "labels": ("labels", "")}
COLORS = {"lapo": "tab:red", "masklam": "tab:green", "oracle": "tab:gray", "labels-only": "silver",
          "supervised-idm": "tab:blue", "past-only": "tab:olive"}

def brief(value) -> str:
    """A number as tables show it; nothing for None."""
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:z.2f}"  # z: no -0.00

def table(results: dict) -> str:
    """The results as lines of text."""
    rows = results["methods"] | {name: dict(return_mean=results[f"{name}_return"])
                                 for name in ("expert", "random") if f"{name}_return" in results}
    lines = [" " * 15 + "".join(f"{title:>9}" for title, _ in COLUMNS.values())]
    for name, row in rows.items():
        lines.append(f"{name:15}" + "".join(f"{brief(row.get(key)):>9}" for key in COLUMNS))
    return "\n".join([*lines, f"noise is {results['noise_share']:.2f} of the actions' variance: "
                      "no guess from the past alone has a lower NMSE"])

def plot_summary(results, path):
    """Bars of the numbers, and training curves."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    *panels, curves = figure.subplots(2, 4).flat
    for ax, (key, title) in zip(panels, [(key, t) for key, (_, t) in COLUMNS.items() if t]):
        rows = {name: row for name, row in results["methods"].items() if key in row}
        spread = [row["return_std"] for row in rows.values()] if key == "return_mean" else None
        bars = ax.bar(list(rows), [row[key] for row in rows.values()], yerr=spread,
                      color=[COLORS.get(name, "black") for name in rows])
        ax.bar_label(bars, fmt=brief, fontsize=8, padding=1)
        ax.margins(y=0.12)
        ax.tick_params(axis="x", labelrotation=30, labelsize=8)
        ax.set_title(title, fontsize=9)
    curves.set_title("loss, by tenths of the training", fontsize=9)
    for name, row in results["methods"].items():
        curves.semilogy(row.get("losses", []), color=COLORS.get(name, "black"))
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png", bbox_inches="tight")

def save_animation(films, path, seconds, scale=3):
    """A GIF of films (t, H, W, 3) u8, side by side, `seconds` a frame; what ended stands still."""
    longest = max(len(film) for film in films)
    lasting = [film[np.arange(longest).clip(max=len(film) - 1)] for film in films]
    columns = [np.pad(film, ((0, 0), (0, 0), (0, 2), (0, 0))) for film in lasting]
    frames = np.concatenate(columns, 2).repeat(scale, 1).repeat(scale, 2)
    with written_whole(path) as temporary:
        first, *others = map(Image.fromarray, frames)
        first.save(temporary, "GIF", save_all=True, append_images=others, duration=1000 * seconds,
                   loop=0)

# ==== 16. A run ===================================================================================
# In: the command line. Out: a folder of results. A `Run` is a lazy chain: each stage is a method
# that keeps its result on disk, and asks the stages before it for what it needs. The name of its
# file holds a digest of what it depends on: the config fields of this stage and those before it,
# the source of the sections and of the methods of `Run` that bear these stages' names, the task and
# its expert, the files that were named, and the libraries. So nothing stale is reused, unless what
# it does not see has changed: helpers of section 2, `Run.windows`, methods and bodies elsewhere,
# or the device and the number of processes, which round differently.
VERSIONS = {name: importlib.metadata.version(name) for name in (
    "torch", "torchvision", "mujoco", "gymnasium", "segment-anything", "numpy", "pillow", "av")}
SECTION = r"^# ==== .*\[(\w+)\] =+\n([\s\S]*?)(?=^# ==== |\Z)"
CODE = re.findall(SECTION, Path(__file__).read_text("utf-8"), re.MULTILINE)  # (stage, source)

def stage(compute):
    """Make a method of Run, named as a stage, keep what it returns. It gets a name and a path where
    a long training may keep a checkpoint; who calls it gives the name alone."""
    title = compute.__name__
    CODE.append((title, inspect.getsource(compute)))

    @functools.wraps(compute)
    def kept(self, name="all"):
        path, start = self.path(title, name), time.monotonic()
        partial = path.with_suffix(".partial")
        if mean_over_ranks(torch.tensor(float(path.exists()))) < 1:  # unless all ranks see it
            result = compute(self, name, partial)
            if ranks()[0] == 0:
                save(path, (result, time.monotonic() - start))
                partial.unlink(missing_ok=True)
            mean_over_ranks(torch.zeros(1))  # wait until it is written
        result, self.seconds[f"{title}-{name}"] = load(path, self.device)
        return result

    return kept

class Run:
    """The stages of a setting, each for a method, reference or clone: run.evaluate("masklam")."""

    def __init__(self, config: Config, out="runs", device="cpu", pmap=itertools.starmap):
        self.config, self.cache, self.device = config, Path(out) / "cache", torch.device(device)
        self.pmap, self.seconds = pmap, {}
        for name in config.methods:
            require(name in METHODS, f"{name!r} is not one of METHODS: {', '.join(METHODS)}")
        self.cache.mkdir(parents=True, exist_ok=True)

    def __reduce__(self):
        """A worker gets a run as it was made, without what it has in memory."""
        return Run, (self.config, self.cache.parent, self.device)

    def path(self, title, name="all") -> Path:
        """The file of a result; arrays lie in a folder of the same name."""
        stages, task = STAGES[:STAGES.index(title) + 1], self.config.task
        chosen = {f.name: getattr(self.config, f.name) for f in fields(Config)
                  if f.metadata["stage"] in stages}
        named = [Path(chosen[f]) for f in ("backgrounds", "sam_checkpoint") if chosen.get(f)]
        files = [p for root in named for p in (root, *root.glob("*"), *root.glob("*/*"))]
        stamps = sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
        code = [source for bearer, source in CODE if bearer in stages]
        known = [__name__, chosen, stamps, code, repr(TASKS.get(task)), EXPERTS.get(task), VERSIONS]
        digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        return self.cache / f"{title}-{name}-{digest[:12]}.pt"

    @stage
    def record(self, name, partial):
        if ranks()[0] == 0:
            for path in {p for split in SPLITS for p in footage(self.config.backgrounds, split)}:
                read_film(path, 8, limit=100)  # what fails shall fail now, not after hours
            record(self.config, partial.with_suffix(""), self.pmap)

    @functools.cached_property
    def videos(self):
        """{"training", "heldout", "decorrelated": Video}."""
        self.record()
        folder = self.path("record").with_suffix("")
        return {split: Video.open(folder / split) for split in SPLITS[:3]}

    @stage
    def mask(self, name, partial):
        """-> IoU of the masks to learn with, and of the student's teacher, with the simulator's."""
        if self.config.masks == "simulator":
            return {split: 1.0 for split in self.videos}
        student, iou = teach_student(self.config, self.videos["training"], self.device)
        if ranks()[0]:
            return None  # rank 0 does the rest
        ious = {"keyframes": iou}
        with written_whole(partial.with_suffix("")) as folder:
            for split, video in self.videos.items():
                masks = create_array(folder / f"{split}.npy", video.masks.shape, np.uint8)
                for e, steps in enumerate(video.length):
                    masks[e, :steps] = student_masks(student, video.frames[e, :steps])
                ious[split] = mask_iou(masks, video.masks)
        return ious

    @functools.cached_property
    def windows(self):
        """Training, held-out and decorrelated windows, with the masks to learn with."""
        windows = []
        for split, video in self.videos.items():
            if self.config.masks != "simulator":
                self.mask()
                folder = self.path("mask").with_suffix("")
                video = replace(video, masks=np.load(folder / f"{split}.npy", "r"))
            windows.append(Windows(video, self.device))
        return windows

    @stage
    def lam(self, name, partial):
        return train_lam(self.config, self.windows[0], name, partial)

    @stage
    def probe(self, name, partial):
        """-> numbers of results.json."""
        config, training = self.config, self.windows[0]
        if name not in REFERENCES:
            lam = self.lam(name)
            found = probe(config, functools.partial(encode, lam.idm), *self.windows)
            use = {"latent_use": latent_use(lam, self.windows[1])} if hasattr(lam, "fdm") else {}
            return found | use  # of methods that predict pixels
        frames, every = REFERENCES[name], np.arange(len(training))
        updates = max(1, config.lam_updates * frames // 6)  # 3 frames are sooner known by heart
        network = clone(config, training, training.actions(), every, name, frames,
                        updates=updates, lr=config.lam_lr, checkpoint=partial)
        return probe(config, functools.partial(encode, network, frames=frames), *self.windows)

    @stage
    def policy(self, name, partial):
        """-> a policy that emits a method's latents, or the oracle's actions; and its targets."""
        training = self.windows[0]
        targets = training.actions()
        if name != "oracle":
            targets = latent_targets(self.lam(name).idm, training)
        return clone(self.config, training, targets, training.demonstrations(), f"{name} policy",
                     checkpoint=partial), targets

    @stage
    def decode(self, name, partial):
        """-> a policy from pixels to actions."""
        training = self.windows[0]
        labelled = labelled_windows(self.config, training)
        if name == "labels-only":
            return clone(self.config, training, training.actions(), labelled, name, few=True)
        policy, targets = self.policy(name)
        if name == "oracle":
            return policy
        return decode(self.config, policy, training, targets, labelled, f"{name} decoder")

    @stage
    def evaluate(self, name, partial):
        """-> returns (eval_episodes,), a film, and the NMSE of actions on unseen demonstrations."""
        policy, heldout = self.decode(name), self.windows[1]
        if ranks()[0]:
            return None  # rank 0 does the rest
        acts = rollout(self.config, policy, self.device, f"{name} acts")
        return *acts, action_nmse(policy, heldout)

    @stage
    def scale(self, name, partial):
        """-> mean returns of random actions and of the expert, which must be better."""
        task, steps, seeds = self.config.task, self.config.eval_steps, evaluation_seeds(self.config)
        chance, expert = (
            float(np.mean([state_rollout(task, expert, seed, steps)[2].sum() for seed in seeds]))
            for expert in (None, load_expert(task)))
        require(expert > chance, f"the expert earns {expert:.0f}, random actions {chance:.0f}: "
                "evaluate longer, or search the expert again")
        return chance, expert

    def row(self, name, until="report") -> dict:
        """A method's, reference's or clone's numbers, from its whole life, or up to a stage."""
        row, labels = {}, len(self.windows[0].demonstrations())
        if name not in (*CLONES, *REFERENCES):
            row["losses"] = self.lam(name).losses
        if name not in CLONES and until != "lam":
            row |= self.probe(name)
        if name not in REFERENCES and until == "report":
            if name != "labels-only":
                self.policy(name)  # before it is decoded, for the time of each
            self.decode(name)
            (returns, _, error), (chance, expert) = self.evaluate(name), self.scale()
            row |= dict(return_mean=float(returns.mean()), return_std=float(returns.std()),
                        normalized_return=float((returns.mean() - chance) / (expert - chance)),
                        return_n=len(returns), action_nmse=error,
                        labels=labels if name == "oracle" else min(labels, self.config.labels))
        return row

    def execute(self, folder, until="report") -> dict:
        """Everything up to a stage; results.json and pictures of it into a folder."""
        config = self.config
        results = dict(task=config.task, seed=config.seed, config=asdict(config), versions=VERSIONS,
                       device=str(self.device), mask_source=config.masks)
        self.record()
        if until != "record":
            results["mask_iou"] = self.mask()
        actions, noise = np.split(Windows(self.videos["training"]).actions_and_noise().var(0), 2)
        results["noise_share"] = float((noise / actions).mean())
        if until == "report":
            results["random_return"], results["expert_return"] = self.scale()

        names = dict(lam=config.methods, probe=(*config.methods, *REFERENCES),
                     report=(*config.methods, *CLONES, *REFERENCES)).get(until, ())
        if self.device.type == "cpu" and ranks()[1] == 1:  # side by side, into the cache
            jobs = sorted(names, key=CLONES.__contains__)  # in this order all workers end together
            list(self.pmap(Run.row, [(self, name, until) for name in jobs]))
        results["methods"] = {name: self.row(name, until) for name in names}
        results["seconds"] = {key: round(seconds, 1) for key, seconds in self.seconds.items()}
        films = [self.evaluate(name)[1] for name in config.methods] if until == "report" else []
        if ranks()[0]:
            return results  # rank 0 writes them

        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / "results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        if names:
            plot_summary(results, folder / "summary.png")
        if films:
            save_animation(films, folder / "rollouts.gif", state_env(config.task).unwrapped.dt)
        return results

def start_worker(lock):
    """Prepare a worker process: one thread, and no life without its parent."""
    torch.set_num_threads(1)
    tqdm.set_lock(lock)  # of the terminal that all write to
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

@contextlib.contextmanager
def workers():
    """A parallel `starmap`: one single-thread process a core, as two threads on busy cores wait for
    each other, and up to 16, as each takes 1 GB. None outlives the block."""
    context = multiprocessing.get_context("spawn")  # fork does not mix with threads
    others = set(multiprocessing.active_children())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with futures.ProcessPoolExecutor(min(cores, 16), context, start_worker,
                                     (context.RLock(),)) as pool:
        try:
            yield lambda function, jobs: pool.map(function, *zip(*jobs))
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise

def parse(argv):
    """Command line -> (config, out, name of the run's folder, until)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = functools.partial(require, False)  # a UserError
    for f in fields(Config):
        example, nargs = (f.default[0], "+") if isinstance(f.default, tuple) else (f.default, None)
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS,
                            type=type(example), nargs=nargs, help=f"{f.metadata['help']} "
                            f"{f.metadata['allowed'] or ''} (default {f.default!r})")
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="sizes of everything")
    parser.add_argument("--out", default="runs", type=Path, help="folder of all runs")
    parser.add_argument("--until", choices=("record", "mask", "lam", "probe", "report"),
                        default="report", help="the last stage")
    given = vars(parser.parse_args(argv))
    preset, out, until = given.pop("preset"), given.pop("out"), given.pop("until")
    base = Config(**PRESETS[preset])
    config = replace(base, **given)

    usual = asdict(base) | dict(preset="laptop", task=config.task, until="report")
    chosen = dict(preset=preset) | asdict(config) | dict(until=until)
    words = [f"{name.replace('_', '-')}={value}" for name, value in chosen.items()
             if value != usual[name]]
    name = "_".join([config.task, *words]).translate(str.maketrans("/", "-", "()' "))
    if len(name) > 200:  # file systems end at 255
        name = f"{name[:190]}_{zlib.crc32(name.encode()):08x}"
    return config, out, name, until

def main(argv=None):
    """The program; returns its exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        config, out, name, until = parse(argv)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if "LOCAL_RANK" in os.environ:  # of torchrun
            dist.init_process_group(timeout=datetime.timedelta(days=7))
            require(config.batch_size % ranks()[1] == 0, f"batch_size is {config.batch_size}; "
                    f"allowed: multiples of {ranks()[1]}, the number of processes")
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        with workers() as pmap:
            results = Run(config, out, device, pmap).execute(out / name, until)
        if ranks()[0] == 0:
            print(table(results))
            print("files:", *sorted(map(str, (out / name).glob("*.*"))))
        return 0
    except KeyboardInterrupt:
        print("\nmasklam: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (UserError, OSError, futures.BrokenExecutor) as error:
        sys.stderr.write(f"masklam: {' '.join(str(error).split())}\n")  # one write, a whole line
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

# ==== 17. Experts =================================================================================
# Found by augmented random search (arXiv 1803.07055, notebook 7), the humanoid's from a gait: a
# small matrix each, a linear policy, which a servo makes enough to walk. Nothing else here is
# trained on states.
EXPERTS = {
    "cheetah": "c-jHj04M*IjfJ`eLviMiHr3i#a=Kt)&)&8NJ#fBcmvw;!xJMBZ`ee3>G|be?_W=+FCiX5%6EA4Rrp>qdm*D"
        "J`mM^s94j3JfTpRGXlsh)o6Dz9LX-D<&%Wq;tDxDE3{9?^0A*|~pP3s(q1-3)DKR~xOwy?9Is<bGqF{`ShAhyKBH@Y"
        "%3vAZa?v!Jl5prI$W#67e)wzjr9rLr?Gtgow~pt!?6D>W^tx3;RbHlr`C9iSj8!ZW%zHM_aEtG6Yrps%Q>t}Z~pxwp"
        "Bpx2vSAE-Nc3pQI$WK5Wz",
    "hopper": "c-jF-0Jr}kt8YbM2|~8md)K+A>0J(4nN29k2RHKa7T4MA-oxooA(1)2K)boCGcUCzt)e2pLA<dzJhrr}rz|e"
        "VNWVKWw7ah*Dk(53z9UW",
    "walker": "c-jHj04M(h3<o0)hMjh>ny9{5lLXQP+ZOl~qJuf-px+N0u~sHxWDmElTIG5|q1JYlkC6d<pCa{X0I=VCmBP9"
        "aP0JMVVdSw8r&4|dY3a!*wcJxzP?&l3VuVZ=svY?qL7xg3&{jsP1`%q&$|54gMZ2{)C%nG6ursc#DyA(ku*XNiKr}r"
        "#KDoFvp0X$}FD@m=N4zvRJG;KJxjV5qH8ixUvA;s4JUuuspRu+yDKf7bDW@z$z&o_IGPk}hurw$xAuO`6Ft$BBwKh6"
        "IJ3O~JFR-z(D=aB*(_a|",
    "swimmer": "c-m`VU|?u~;0A^U5Hhm0-nY|Yi=p=V%{JT23^(iP0syR03o`",
    "ant": "c-l=)YmS025biPd7g1i@qG%OdT8)XxUaZI19~(kcK#=EBSBa91H(Lb}JLyd3d&~@A3;=LT&$#t>2(;x6)+hkap4"
        "AULa_i|t>_x?1ybaYbp!KrO$hzOKkD<+iR^FV{UD$e_qGmwN{H@59@Z6j(j)kCt%p8O}TayQGfn)R4@B9FZR7X0+xs"
        "FEu2)lj&6>*Q~rKo5bb7Gy2V{8U#G_*bVZ99@}UzfO=$7o`Z;>_n`6+3I!Lz`gdsqgd>q@M@mE%;<+%#u9wU?Oe(V2"
        "d{DS5B&o$2m8!e9UDv4B=2vTo3eISS?LLr#j8ZaQ&fah6wu+)MBx(D^Yp2D9MaewN7P9@csviiO`cB3CQ6;wQPxH",
    "humanoid": "c-rlhF-XHu6h$vW2Q#=8M5xfJu_X-&HH~JA;8Jjqf{Ps-T-;S$oD{kUj^d&qXd08INioJk7eUZj5H|<Gs"
        "p#(L-*4<L^alQL?#t)!Alaw^Dkx1{Vjt-VAv4^8hB{GcR~!LyJpYAvWQe|m<LAhgrm6UzT3PSc2-mHqjl;$p6{mh"
        "<`)Dsk{!_x>_<-<Qes%eElkm@2W(yw!i3&OYXrDb1o_zlA{upIwtOV#XR>d>-$180tF)ZT(3engQhlv@U??Q*i^P"
        "1g<?)9h$t~&EdK-dnf9uo783PpE{zMCR{Uquq%5;o+@L^fm}ebItxRH<;=g+Sv4m1N-`dAy%sw$oDhzx1FAf79gq"
        "mB?}ZV!FQ>FR;H;Imv2_BjKMIydSq*P_=8qH_qsb7@l7{)?~Q",
}

if __name__ == "__main__":  # as a module, so that notebooks can load the networks that a run keeps
    sys.exit(importlib.import_module(Path(__file__).stem).main())
