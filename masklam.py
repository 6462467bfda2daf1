# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.15.0", "torchvision==0.29.2", "mujoco==4.0.0",
#     "gymnasium[mujoco]==1.4.0", "segment-anything==1.0", "numpy==2.4.6", "tqdm==4.70.1",
#     "matplotlib==3.11.2", "jupyter==1.1.1", "pytest==9.2.0"]
# ///
"""MaskLAM in one file: latent actions from video whose background moves too.

A latent action model (LAM) learns what an agent does from video without action labels. An inverse
dynamics model (IDM) reads what happened and emits a latent action z; a forward dynamics model
(FDM) must predict the next frame from the past and z:

    z_t      = IDM(o_{t-2..t}, o_{t+k-2..t+k})        k from 1..K in training, 1 when labelling
    o^_{t+1} = FDM(o_{t-2..t}, z_t)
    loss     = sum(w (o^_{t+1} - o_{t+1})^2) / (C sum(w)),      w = m + b (1 - m)

LAPO has b = 1: where the background moves, most of the error is background, and z describes the
background. MaskLAM (arXiv 2602.02259) changes one number: b = 0, with m the agent's mask.

    python masklam.py --task cheetah               record, train both, probe, act, compare
    python masklam.py --preset smoke               every stage in half a minute, to see it work
    python masklam.py --seeds 3                    seeds 0, 1, 2 and their summary.json
    python masklam.py --sweep latent               the probe against the size of the latent
    python masklam.py --task cheetah --train-expert      search the expert anew, print its literal

A run needs only a CPU and writes runs/<task>-<preset>-<distractor>-<seed>/: results.json, figures,
an animation, and a cache that a second run reuses. Every stage is a function of a Config and arrays
for notebooks and forks to call.

Shapes: E episodes, T steps, B batch, C H W image, A action, S state, Z latent, D velocities of the
background.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import csv
import functools
import hashlib
import importlib.metadata
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
import zlib
from concurrent import futures
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

SOURCE = Path(__file__).read_text("utf-8")  # read now: what is edited later is not what runs

import gymnasium as gym
import imageio.v3 as imageio  # comes with gymnasium[mujoco]
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout  # comes with torch, as Pillow does with matplotlib
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

# ==== 2. Config, errors, files ====================================================================
# Every setting of a run, once: its default, meaning, allowed range, and the stage that it belongs
# to. A change redoes that stage and those after it, as does an edit of a section that has the
# stage in its title. The command line is made from this class: a new field is a new flag.
STAGES = ("record", "mask", "lam", "probe", "policy", "decode", "evaluate", "report")
DISTRACTORS = ("none", "low", "hard")
METHODS = ("lapo", "masklam", "laom", "laom-labels")
LAOMS = ("laom", "laom-labels")  # methods that predict no pixels
REFERENCES = ("past-only", "supervised-idm")  # learn from true actions, to be probed
SUPERVISED = (*REFERENCES, "laom-labels")
CLONES = ("oracle", "labels-only")  # policies cloned from true actions: all, the labelled ones
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_FILES = {  # official checkpoints and their SHA-256 (what their names end in is of their MD5)
    "vit_b": ("sam_vit_b_01ec64.pth",
              "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "vit_l": ("sam_vit_l_0b3195.pth",
              "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_h": ("sam_vit_h_4b8939.pth",
              "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e")}

def option(stage, default, text, low=-math.inf, high=math.inf, choices=None):
    """A dataclass field that knows its stage, its help text and what values it allows."""
    metadata = dict(stage=stage, help=text, low=low, high=high, choices=choices)
    return field(default=default, metadata=metadata)

@dataclass(frozen=True)
class Config:
    """All settings of a run; the defaults suit two CPU cores. See `option` for the columns."""

    task: str = option("record", "cheetah", "cheetah, hopper, walker, swimmer, ant, humanoid, or "
                      "a Gymnasium environment's id")
    seed: int = option("record", 0, "of bodies, backgrounds, networks and batches", 0, 10**6)
    distractor: str = option("record", "low", "what else moves", choices=DISTRACTORS)
    correlation: float = option("record", 0.5, "of background and action (rho)", 0, 1)
    speed: float = option("record", 5.0, "of the background, pixels a step", 0, 100)
    zoom: float = option("record", 1.0, "the agent's size in the frame, times this", 0.1, 3)
    backgrounds: str = option("record", "", "folder of pictures and videos to show")
    episodes: int = option("record", 500, "recorded for training", 4, 250_000)
    heldout_episodes: int = option("record", 60, "recorded for probing only", 2, 250_000)
    steps: int = option("record", 100, "per recorded episode", 8, 1000)
    demonstration_noise: float = option("record", 0.1, "at most, in every other episode", 0, 9)
    exploration_noise: float = option("record", 1.2, "in the others; actions reach 1", 0, 9)
    frame_size: int = option("record", 64, "height and width in pixels", 16, 512)

    masks: str = option("mask", "auto", "their source; auto: sam if its checkpoint is on disk",
                        choices=("auto", "simulator", "student", "sam"))
    sam_model: str = option("mask", "vit_b", "which SAM", choices=tuple(SAM_FILES))
    sam_checkpoint: str = option("mask", "", "its file; default: the official one, downloaded")
    keyframes: int = option("mask", 64, "frames that SAM segments for the student", 4, 10**6)
    student_updates: int = option("mask", 600, "optimiser steps", 1, 10**8)
    erode: int = option("mask", 0, "pixels taken off the border of every mask", 0, 64)
    dilate: int = option("mask", 0, "pixels added to the border of every mask", 0, 64)
    shift: int = option("mask", 0, "pixels by which masks lie too far right", 0, 512)
    occlude: float = option("mask", 0.0, "fraction of the agent cut out of its mask", 0, 1)
    mask_input: bool = option("mask", False, "mask as a fourth channel of every frame seen")

    background_weight: float = option("lam", 0.0, "b of masklam's loss; lapo is b = 1", 0, 1)
    latent_dim: int = option("lam", 64, "numbers in a latent action", 1, 8192)
    offset: int = option("lam", 1, "K: how far ahead the future stack may lie", 1, 100)
    patch: int = option("lam", 4, "pixels folded into channels; 1: IMPALA", 1, 64)
    idm_widths: tuple[int, ...] = option("lam", (48, 96), "channels of its stages", 1, 4096)
    fdm_widths: tuple[int, ...] = option("lam", (48, 96), "channels of its stages", 1, 4096)
    blocks: int = option("lam", 0, "residual blocks a stage", 0, 16)
    hidden: int = option("lam", 256, "units between map and vector; 0: none", 0, 8192)
    lam_updates: int = option("lam", 2000, "optimiser steps", 1, 10**8)
    batch_size: int = option("lam", 64, "windows per step, LAM and policy", 2, 10**5)
    lam_lr: float = option("lam", 3e-3, "peak learning rate", 0, 1)

    probe_windows: int = option("probe", 10_000, "the probe is fitted on at most", 100, 10**8)

    policy_updates: int = option("policy", 2500, "optimiser steps", 1, 10**8)
    policy_lr: float = option("policy", 2e-3, "peak learning rate", 0, 1)
    labels: int = option("decode", 1000, "labelled transitions, about ten episodes", 10, 10**8)
    decoder_updates: int = option("decode", 1000, "at most, of the decoder", 1, 10**8)

    eval_episodes: int = option("evaluate", 20, "per policy, on unseen backgrounds", 1, 10**5)
    eval_steps: int = option("evaluate", 500, "per evaluation episode", 1, 10**5)
    methods: tuple[str, ...] = option("report", METHODS[:2], "what to train", choices=METHODS)

PAPER = dict(latent_dim=128, offset=10, patch=1, idm_widths=(64, 128, 128),
             fdm_widths=(96, 192, 192), blocks=2, hidden=0, batch_size=512, lam_lr=6e-4,
             policy_lr=4e-4, keyframes=512)  # the authors' networks
PRESETS = {
    "smoke": dict(episodes=8, heldout_episodes=4, steps=40, lam_updates=30, policy_updates=20,
                  decoder_updates=50, labels=80, eval_episodes=2, eval_steps=80, batch_size=32),
    "notebook": dict(episodes=120, heldout_episodes=20, steps=60, lam_updates=400, labels=100,
                     policy_updates=400, decoder_updates=300, eval_episodes=4, eval_steps=200),
    "laptop": {},  # Config's defaults
    "gpu": PAPER | dict(episodes=1000, steps=250, lam_updates=10_000, policy_updates=10_000,
                        decoder_updates=5000),
    "paper": PAPER | dict(episodes=5000, steps=1000, lam_updates=35_156, policy_updates=35_156,
                          decoder_updates=25_000, labels=128_000),
}

class UserError(Exception):
    """Something the user can mend: reported as one line, exit status 2."""

def require(ok, message: str):
    """UserError with this message, unless ok."""
    if not ok:
        raise UserError(message)

def first_line(error) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:100]

@contextlib.contextmanager
def written_whole(path):
    """A temporary path to write to; it takes path's place, on disk, only if nothing failed."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def save_array(path, array):
    """`np.save`. Opened for reading too, as NumPy then writes in pieces and names a full disk."""
    with written_whole(path) as temporary, open(temporary, "wb+") as file:
        np.save(file, array)

def save_torch(path, payload):
    """Write tensors and numbers, behind a checksum and the file's own name."""
    buffer = io.BytesIO()
    torch.save((path.name, payload), buffer)
    data = buffer.getvalue()
    with written_whole(path) as temporary:
        temporary.write_bytes(hashlib.sha256(data).digest() + data)

def load_torch(path):
    """What save_torch wrote; UserError for a file that is damaged or was another's."""
    data = path.read_bytes()
    intact = hashlib.sha256(data[32:]).digest() == data[:32]
    require(intact, f"{path} is damaged; delete it, or pass --fresh")
    name, payload = torch.load(io.BytesIO(data[32:]), "cpu", weights_only=True)
    require(name == path.name, f"{path} is a copy of {name}; delete it, or pass --fresh")
    return payload

# ==== 3. Video [record] ===========================================================================
# In: episodes in memory-mapped arrays. Out: index arithmetic that cuts training windows from them.
# Everything that learns learns from here, whether the video was recorded (section 11) or one's own.
def generator(*purpose) -> np.random.Generator:
    """Random numbers for (seed, purpose, ...): the same arguments give the same numbers."""
    words = [zlib.crc32(p.encode()) if isinstance(p, str) else p for p in purpose]
    return np.random.default_rng(words)

@dataclass
class Video:
    """Episodes: frames[e, t] is what the agent sees when it chooses actions[e, t].

    Recordings know all of these (f32 where nothing else is said), video of one's own the first
    three. Actions are for what learns or measures with labels alone. `valid` says which frames
    there are."""

    frames: np.ndarray  # (E, T, H, W, 3) u8
    masks: np.ndarray  # (E, T, H, W) u8, 255 = agent
    length: np.ndarray  # (E,) i64, frames until the episode ended
    actions: np.ndarray | None = None  # (E, T, A) as executed, scaled to [-1, 1]
    intended: np.ndarray | None = None  # (E, T, A) the expert's, before noise was added
    expected: np.ndarray | None = None  # (E, T, A) what is executed on average over the noise
    rewards: np.ndarray | None = None  # (E, T) for moving
    states: np.ndarray | None = None  # (E, T, S)
    distractor: np.ndarray | None = None  # (E, T, D), how the background moved from t to t + 1
    demonstration: np.ndarray | None = None  # (E,) bool, to be cloned; the others explore
    start: np.ndarray | None = None  # (E, T) i64, step of the agent's last start; None: all 0

    @classmethod
    def open(cls, folder, mode="c"):
        """Map the arrays of a folder; writes stay in memory unless mode is "r+"."""
        try:
            return cls(*(np.load(Path(folder) / f"{f.name}.npy", mode) for f in fields(cls)))
        except (ValueError, EOFError) as error:
            raise UserError(f"{folder} is damaged ({error}); pass --fresh") from error

    @classmethod
    def create(cls, folder, E, T, size, A, S, D):
        """Make files that take their room on disk at once. Length, which comes last, is 0 for what
        is still to be recorded."""
        shapes = dict(frames=(T, size, size, 3), masks=(T, size, size), actions=(T, A),
                      intended=(T, A), expected=(T, A), rewards=(T,), states=(T, S),
                      distractor=(T, D), demonstration=(), start=(T,), length=())
        kinds = dict(frames=np.uint8, masks=np.uint8, demonstration=bool, start=np.int64,
                     length=np.int64)
        folder.mkdir(parents=True, exist_ok=True)
        for name, shape in shapes.items():
            episode = np.zeros(shape, kinds.get(name, np.float32))
            save_array(folder / f"{name}.npy", np.broadcast_to(episode, (E, *shape)))

    @property
    def valid(self) -> np.ndarray:
        """(E, T) bool: which frames were recorded, before the end of their episode."""
        return np.arange(self.frames.shape[1]) < self.length[:, None]

class Windows:
    """Index arithmetic for training windows: every (e, t) whose episode goes on to t + 1.

    A window of offset k is the stack obs (t-2, t-1, t), the stack future_obs (t+k-2, t+k-1, t+k)
    and next_obs, t + 1. It never crosses an episode's end, nor a new start of the agent: the first
    frame stands for what was before it, and k is cut to what is left. masks: others than the
    video's, to learn with. With mask_input they are a frame's fourth channel."""

    def __init__(self, video: Video, device="cpu", mask_input=False, masks=None):
        self.video, self.device, self.mask_input = video, device, mask_input
        self.T = video.frames.shape[1]
        masks = video.masks if masks is None else masks
        require(video.frames.dtype == masks.dtype == np.uint8,
                "a Video has frames and masks of bytes")
        require(masks[:1].max(initial=0) != 1, "masks reach 255 where the agent is, not 1")
        require(masks.shape == video.frames.shape[:4] and max(video.length) <= self.T
                and video.length.shape == masks.shape[:1],
                "a Video has a mask for every frame, and no length above their number")
        start = np.zeros(masks.shape[:2], int) if video.start is None else video.start
        self.e, self.t = np.nonzero(video.valid[:, 1:] & (start[:, 1:] == start[:, :-1]))
        self.first = start[self.e, self.t]
        stretch = self.e * self.T + self.first  # ascends
        self.last = self.t[np.searchsorted(stretch, stretch, "right") - 1] + 1
        on_gpu = torch.device(device).type == "cuda"
        room = torch.cuda.mem_get_info(device)[0] if on_gpu else math.inf
        fits = 2 * (video.frames.nbytes + masks.nbytes) < room  # or batches travel
        home = device if fits else "cpu"
        self.frames = torch.from_numpy(video.frames).flatten(0, 1).to(home)  # (E T, H, W, 3) u8
        self.masks = torch.from_numpy(masks).flatten(0, 1).to(home)  # (E T, H, W) u8

    def __len__(self):
        return len(self.e)

    def index(self, chosen: np.ndarray, k) -> np.ndarray:
        """(B,) windows and offsets k (B,) or int -> (B, 7) flat frame indices: 3, 3, next."""
        e, t = self.e[chosen], self.t[chosen]
        k = np.minimum(k, self.last[chosen] - t)
        steps = [t - 2, t - 1, t, t + k - 2, t + k - 1, t + k, t + 1]
        return e[:, None] * self.T + np.stack(steps, 1).clip(self.first[chosen, None])

    def gather(self, index):
        """(B, n) flat frame indices -> (B, n, H, W, C) u8, C = 3 or, with mask_input, 4."""
        frames = self.frames[index]
        if self.mask_input:
            frames = torch.cat([frames, self.masks[index][..., None]], -1)
        return frames.to(self.device)

    def seen(self, chosen, frames=3):
        """-> (B, frames, H, W, C) u8: the stack obs, all that a policy sees, or with 6 frames also
        the stack future_obs of k = 1, newest frame last."""
        return self.gather(self.index(chosen, 1)[:, :frames])

    def batch(self, chosen, k=1):
        """-> obs and future_obs (B, 6, H, W, C) u8, next_obs (B, 3, H, W) in [-0.5, 0.5], and its
        mask (B, 1, H, W) f32 in [0, 1]."""
        index = self.index(chosen, k)
        frames = self.gather(index)
        mask = self.masks[index[:, 6:]].to(self.device) / 255
        return frames[:, :6], to_float(frames[:, 6:, ..., :3]), mask

    def actions(self, chosen=slice(None)):
        """Executed actions (B, A) f32: labels, which lapo, masklam and laom never see."""
        return self.video.actions[self.e[chosen], self.t[chosen]]

    def noise(self, chosen=slice(None)):
        """(B, A) f32: the part of the executed actions that no past frame tells."""
        return self.actions(chosen) - self.video.expected[self.e[chosen], self.t[chosen]]

    def demonstrations(self):
        """-> the windows (n,) of the episodes that policies are cloned from: of one's own all."""
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
# next frame, the policy three frames into a latent action. n frames are (B, n, H, W, C) u8; C is 4
# with --mask-input. One loop trains every network of this file.
def autocast(device):
    """bfloat16 where the device multiplies it natively; float32 elsewhere."""
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        native = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return torch.autocast(kind, torch.bfloat16, enabled=bool(native))

def conv(inputs, outputs, kernel=3, stride=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)

def mlp(inputs, outputs, hidden=256):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

class ResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = conv(width, width), conv(width, width)

    def forward(self, x):
        return x + self.second(F.relu(self.first(F.relu(x))))

def impala_encoder(channels, widths, blocks):
    """(B, channels, H, W) -> (B, widths[-1], H / 2^n, W / 2^n): n stages (arXiv 1802.01561)."""
    layers = []
    for width in widths:
        layers += [conv(channels, width), nn.MaxPool2d(3, 2, padding=1)]
        layers += [ResidualBlock(width) for _ in range(blocks)]
        channels = width
    return nn.Sequential(*layers, nn.ReLU())

def impala_decoder(widths, blocks):
    """The mirror image of `impala_encoder`: (B, widths[-1], h, w) -> (B, 3, H, W)."""
    layers = []
    for width, below in zip(widths[::-1], (*widths[-2::-1], widths[0])):
        layers += [ResidualBlock(width) for _ in range(blocks)] + [nn.ReLU()]
        layers += [nn.Upsample(scale_factor=2), conv(width, below)]
    return nn.Sequential(*layers, nn.ReLU(), conv(widths[0], 3))

def patch_encoder(channels, widths):
    """(B, channels, h, w), folded by `to_float` -> (B, widths[-1], h / 2^(n-1), w / 2^(n-1)).
    For CPUs: the first stage is a matrix product, each later one a convolution of stride two."""
    layers = [conv(channels, widths[0], 1)]
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.ReLU(), conv(inputs, outputs, stride=2)]
    return nn.Sequential(*layers, nn.ReLU())

def stride(config, widths):
    """How many pixels high and wide is what a place of an encoder's last map stands for."""
    return config.patch * 2 ** (len(widths) - (config.patch > 1))

class FrameEncoder(nn.Module):
    """(B, frames, H, W, C) u8 -> (B, outputs): the IDM (6 frames -> Z), the policy (3 -> Z or A)
    and LAOM's encoder (3 -> 256)."""

    def __init__(self, config, frames, outputs):
        super().__init__()
        self.frames, self.patch, widths = frames, config.patch, config.idm_widths
        self.shape = (frames, config.frame_size, config.frame_size, 3 + config.mask_input)
        channels = self.shape[-1] * frames * config.patch**2
        if config.patch == 1:
            self.encoder = impala_encoder(channels, widths, config.blocks)
        else:
            self.encoder = patch_encoder(channels, widths)
        inputs = widths[-1] * (config.frame_size // stride(config, widths)) ** 2
        hidden = config.hidden
        self.head = mlp(inputs, outputs, hidden) if hidden else nn.Linear(inputs, outputs)

    def forward(self, frames):
        require(frames.shape[1:] == self.shape, f"frames {tuple(frames.shape[1:])} do not fit the "
                f"network's {self.shape}, which frame_size and mask_input ask for")
        return self.head(self.encoder(to_float(frames, self.patch)).flatten(1))  # (B, outputs)

class ImpalaFDM(nn.Module):
    """Three frames (B, 3, H, W, C) u8 and a latent action (B, Z) -> the next frame (B, 3, H, W).
    The latent becomes a map that is concatenated with what the encoder has seen."""

    def __init__(self, config):
        super().__init__()
        width, side = config.fdm_widths[-1], config.frame_size // stride(config, config.fdm_widths)
        self.encoder = impala_encoder((3 + config.mask_input) * 3, config.fdm_widths, config.blocks)
        self.latent = nn.Linear(config.latent_dim, width * side**2)
        self.merge = conv(2 * width, width, 1)
        self.decoder = impala_decoder(config.fdm_widths, config.blocks)

    def forward(self, obs, z):
        seen = self.encoder(to_float(obs))
        action = self.latent(z).unflatten(1, seen.shape[1:])  # Z -> (width, h, w)
        merged = self.merge(torch.cat([seen, action], 1))  # (B, 2 width, h, w) -> (B, width, h, w)
        return torch.tanh(self.decoder(merged)) / 2

class UNet(nn.Module):
    """(B, inputs, h, w) and, if vector > 0, (B, vector) -> (B, outputs, h, w).
    Every width after the first is a level of half the size. With a vector, h and w must be `side`
    at the last."""

    def __init__(self, inputs, outputs, widths, kernel=1, vector=0, side=1):
        super().__init__()
        self.first = conv(inputs, widths[0], kernel)
        levels = list(zip(widths, widths[1:]))
        self.down = nn.ModuleList(conv(fine, coarse, stride=2) for fine, coarse in levels)
        self.up = nn.ModuleList(conv(coarse, 4 * fine, 1) for fine, coarse in levels)
        self.join = nn.ModuleList(conv(2 * fine, fine, kernel) for fine, coarse in levels)
        self.last = conv(widths[0], outputs, 1)
        if vector:
            self.vector = nn.Linear(vector, widths[-1] * side**2)
            self.merge = conv(2 * widths[-1], widths[-1], 1)

    def forward(self, x, vector=None):
        maps = [F.relu(self.first(x))]
        for down in self.down:
            maps.append(F.relu(down(maps[-1])))
        x = maps.pop()
        if vector is not None:
            spread = self.vector(vector).unflatten(1, x.shape[1:])  # a map of its own
            x = F.relu(self.merge(torch.cat([x, spread], 1)))
        for up, join, fine in reversed(list(zip(self.up, self.join, maps))):
            x = F.relu(F.pixel_shuffle(up(x), 2))
            x = F.relu(join(torch.cat([x, fine], 1)))
        return self.last(x)

class PatchFDM(nn.Module):
    """The same for CPUs: a U-Net on folded frames that predicts the change since the last frame."""

    def __init__(self, config):
        super().__init__()
        self.patch, side = config.patch, config.frame_size // stride(config, config.fdm_widths)
        inputs = (3 + config.mask_input) * 3 * self.patch**2
        self.unet = UNet(inputs, 3 * self.patch**2, config.fdm_widths, 1, config.latent_dim, side)

    def forward(self, obs, z):
        change = F.pixel_shuffle(self.unet(to_float(obs, self.patch), z), self.patch)
        return to_float(obs[:, -1:, ..., :3]) + change

def train(network, compute_loss, updates, lr, text, checkpoint=None, report=None, stop=None):
    """AdamW with 5 % warm-up and cosine decay to zero: the loop of every network in this file.

    compute_loss(step) -> scalar tensor; it draws its batch from `step` alone, so that a run that
    goes on from `checkpoint` (a path; written twice a minute) gives the numbers of one that never
    stopped. report(step) -> number. stop: end there, without the rest of the decay. Returns, for
    every tenth of `updates`, (step, mean loss since the last, report); UserError where a loss is
    not finite."""
    optimizer = torch.optim.AdamW(network.parameters(), lr, (0.9, 0.99))
    start, history = 0, []
    total = torch.zeros((), dtype=torch.float64, device=next(network.parameters()).device)
    if checkpoint and checkpoint.exists():
        saved = load_torch(checkpoint)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        start, history, total = saved["step"], saved["history"], saved["total"].to(total.device)
    every, saved_at = max(1, updates // 10), time.monotonic()

    steps = range(start, stop or updates)
    for step in tqdm(steps, text, stop or updates, initial=start, leave=False):
        warmup, cosine = (step + 1) / (0.05 * updates + 1), 1 + math.cos(math.pi * step / updates)
        optimizer.param_groups[0]["lr"] = lr * min(1, warmup) * 0.5 * cosine
        loss = compute_loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

        total += loss.detach()
        if (step + 1) % every == 0:
            mean = float(total) / every
            require(math.isfinite(mean), f"the loss of {text} is {mean} by update {step + 1}: "
                    "lower its learning rate")
            history.append((step + 1, mean, report(step + 1) if report else None))
            total.zero_()
        if checkpoint and time.monotonic() - saved_at > 30:
            save_torch(checkpoint, dict(network=network.state_dict(), step=step + 1, total=total,
                                        optimizer=optimizer.state_dict(), history=history))
            saved_at = time.monotonic()
    return history

# ==== 5. Latent action models [lam] ===============================================================
# In: windows of a Video. Out: an IDM whose latent actions explain what the loss asks for. One loop
# trains every method. LAPO and MaskLAM differ in the weight of the background alone; LAOM (arXiv
# 2502.00379) predicts no pixels but what a slow copy of its encoder makes of the next stack.
def masked_mse(prediction, target, mask, background_weight=0.0):
    """The squared error weighted by an agent mask: all that MaskLAM adds to a LAM.

    prediction, target (B, C, H, W); mask (B, 1, H, W) in [0, 1], 1 = agent. Every pixel weighs
    w = mask + background_weight (1 - mask), and the result is sum(w error^2) / (C sum(w)).
    background_weight 1 is F.mse_loss, bit for bit (LAPO); 0 is the authors' hard mask."""
    if background_weight == 1:
        return F.mse_loss(prediction, target)
    weight = mask + background_weight * (1 - mask)
    error = weight * (prediction - target) ** 2  # (B, C, H, W)
    return error.sum() / (prediction.shape[1] * weight.sum()).clamp(min=1e-6)  # or no agent: 0

class LaomIDM(nn.Module):
    """(B, 6, H, W, C) u8 -> (B, Z): one encoder (3 frames -> 256 numbers) for both stacks."""

    frames = 6

    def __init__(self, config):
        super().__init__()
        self.encoder = FrameEncoder(config, 3, 256)
        self.act = mlp(2 * 256, config.latent_dim)

    def forward(self, stacks):
        obs, future_obs = self.encoder(stacks[:, :3]), self.encoder(stacks[:, 3:])
        return self.act(torch.cat([obs, future_obs], 1))

def make_networks(config, method, actions=0):
    """Fresh networks of a method, "idm" and what its loss needs beside it.

    References bound a latent from both sides: the same network learns from true actions what a
    linear "head" can read. "supervised-idm" sees all that an IDM sees; "past-only" nothing after
    the action, so that it knows of the action what the past tells and no more."""
    torch.manual_seed(config.seed)
    networks = nn.ModuleDict()
    if method in LAOMS:
        networks["idm"] = LaomIDM(config)
        networks["fdm"] = mlp(256 + config.latent_dim, 256)
        networks["target"] = copy.deepcopy(networks["idm"].encoder).requires_grad_(False)
    else:
        frames = 3 if method == "past-only" else 6
        networks["idm"] = FrameEncoder(config, frames, config.latent_dim)
        if method not in REFERENCES:
            networks["fdm"] = ImpalaFDM(config) if config.patch == 1 else PatchFDM(config)
    if method in SUPERVISED:
        networks["head"] = nn.Linear(config.latent_dim, actions)
    return networks.to(memory_format=torch.channels_last)

def augment(stacks, seed: int):
    """Stacks (B, 3, H, W, C) in eight parts, each shifted, turned, seen askew or left as it is."""
    from torchvision.transforms import v2  # slow to import, for LAOM only
    choice = v2.RandomChoice([v2.RandomAffine(0, (0.1, 0.1)), v2.RandomAffine(15),
                              v2.RandomPerspective(0.3, p=1), v2.Identity()])
    torch.manual_seed(seed)
    return torch.cat([choice(part.movedim(-1, 2)) for part in stacks.chunk(8)]).movedim(2, -1)

def laom_loss(networks, stacks, next_stack, rng, tau):
    """Squared error of the next stack's embedding, predicted from this one's and the latent.
    Every stack (B, 3, H, W, C) u8 is augmented by itself, so that a latent cannot tell pixels; the
    target follows the encoder by tau a step, so that a constant does not become the answer."""
    idm, target = networks["idm"], networks["target"]
    seeds = rng.integers(2**62, size=3).tolist()
    with torch.no_grad():
        for slow, fast in zip(target.parameters(), idm.encoder.parameters()):
            slow.lerp_(fast, tau)
        wanted = target(augment(next_stack, seeds[0]))
    obs = idm.encoder(augment(stacks[:, :3], seeds[1]))
    future_obs = idm.encoder(augment(stacks[:, 3:], seeds[2]))
    z = idm.act(torch.cat([obs, future_obs], 1))
    prediction = networks["fdm"](torch.cat([obs, z], 1))
    return F.mse_loss(prediction.float(), wanted.float())

def labelled_windows(config, windows: Windows) -> np.ndarray:
    """Windows (n,) whose actions may be seen: whole demonstrations, drawn at random, and of the
    last as many as are missing."""
    demonstrations = windows.demonstrations()
    order = generator(config.seed, "labels").permutation(len(windows.video.length))
    place = np.argsort(order)[windows.e[demonstrations]]
    return demonstrations[np.argsort(place, kind="stable")][:config.labels]

def train_lam(config, windows, method, labelled=None, checkpoint=None):
    """Train a method's networks, or a reference's, on windows -> (networks, history of `train`).
    True actions are seen by references and, of the windows `labelled` (n,), by laom-labels."""
    require(method in (*METHODS, *REFERENCES), f"{method!r} is no method, nor a reference")
    require(len(windows), "no episode has two frames, so there is nothing to learn from")
    device = windows.device
    actions = windows.video.actions.shape[2] if method in SUPERVISED else 0
    networks = make_networks(config, method, actions).to(device)
    idm = networks["idm"]
    weight = 1.0 if method == "lapo" else config.background_weight

    def action_error(chosen):
        z = idm(windows.seen(chosen, idm.frames))
        true = torch.from_numpy(windows.actions(chosen)).to(device)
        return F.mse_loss(networks["head"](z).float(), true)

    def loss(step):
        rng = generator(config.seed, "lam", step)
        chosen = rng.integers(len(windows), size=config.batch_size)
        k = rng.integers(1, config.offset + 1, config.batch_size)
        with autocast(device):
            if method in REFERENCES:
                return action_error(chosen)
            if method in LAOMS:
                frames = windows.gather(windows.index(chosen, k))
                tau = min(1, 100 / config.lam_updates)  # 0.001 for 97k, as published
                error = laom_loss(networks, frames[:, :6], frames[:, [1, 2, 6]], rng, tau)
                if method == "laom-labels":
                    error = error + 1e-3 * action_error(rng.choice(labelled, config.batch_size))
                return error
            stacks, next_obs, mask = windows.batch(chosen, k)
            prediction = networks["fdm"](stacks[:, :3], idm(stacks))
            return masked_mse(prediction.float(), next_obs, mask, weight)

    # True actions are learnt sooner than pixels.
    updates = max(1, config.lam_updates // 2) if method in REFERENCES else config.lam_updates
    history = train(networks, loss, updates, config.lam_lr, method, checkpoint)
    return networks.eval(), history

@torch.no_grad()
def latents(network, windows: Windows, chosen: np.ndarray) -> np.ndarray:
    """What a network that sees `network.frames` frames makes of the chosen windows, k = 1: an IDM
    or a latent policy latent actions (n, Z) f32, a policy that acts actions (n, A)."""
    parts = np.array_split(chosen, math.ceil(len(chosen) / 500))
    with autocast(windows.device):
        z = [network(windows.seen(part, network.frames)).float().cpu() for part in parts]
    return torch.cat(z).numpy()

# ==== 6. Linear probe [probe] =====================================================================
# In: latent actions and true actions of training and held-out episodes. Out: how much of the action
# a linear map reads from the latent. Closed form, so nothing is tuned and nothing can diverge.
def ridge(inputs, targets, penalty=1e-4):
    """Ridge regression with intercept, closed form: (n, Z), (n, A) -> predict((m, Z)) -> (m, A)."""
    inputs, targets = np.asarray(inputs, np.float64), np.asarray(targets, np.float64)
    center, scale, mean = inputs.mean(0), inputs.std(0) + 1e-8, targets.mean(0)
    X = (inputs - center) / scale
    gram = X.T @ X + penalty * len(X) * np.eye(X.shape[1])
    weights = np.linalg.solve(gram, X.T @ (targets - mean))
    return lambda x: (np.asarray(x, np.float64) - center) / scale @ weights + mean

def nmse(prediction, target) -> np.ndarray:
    """Squared error over variance, per dimension (A,): 0 = perfect, 1 = knows only the mean."""
    variance = target.var(0)
    constant = np.flatnonzero(variance < 1e-12).tolist()
    require(not constant, f"dimensions {constant} of what is probed never change: no NMSE")
    return ((prediction - target) ** 2).mean(0) / variance

def r2(prediction, target) -> float:
    """1 - NMSE, averaged over the dimensions that vary at all; 0 where none does."""
    moves = target.var(0) > 1e-3
    return float(1 - nmse(prediction[:, moves], target[:, moves]).mean()) if moves.any() else 0.0

def next_background(windows: Windows, chosen: np.ndarray) -> np.ndarray:
    """Frame t + 1 without the agent and its outline, averaged in a 4x4 grid: (n, 48) f32. Whatever
    masks are learnt with, here they are the video's: else what leaks would be the agent."""
    masks, blocks = torch.from_numpy(windows.video.masks).flatten(0, 1), []
    for part in torch.from_numpy(windows.index(chosen, 1)[:, 6]).split(500):
        behind = (masks[part, None] < 26).float().to(windows.frames.device)  # (n, 1, H, W)
        frames = windows.frames[part].permute(0, 3, 1, 2) * behind
        weight = F.adaptive_avg_pool2d(behind, 4).clamp(min=1e-3)
        blocks.append(F.adaptive_avg_pool2d(frames, 4) / weight)
    return torch.cat(blocks).flatten(1).cpu().numpy()

def probe(encode, training: Windows, heldout: Windows, decorrelated: Windows, limit=10_000) -> dict:
    """Linear probes of encode(windows, chosen) -> (n, Z), fitted on at most `limit` windows of
    `training`, read on unseen episodes. NMSE of the action; of its noise, which no past frame
    tells, so that a latent that only knows the pose has 1; of the action where the background
    ignores it (rho = 0); and R2 of the next background, what a latent should not know."""
    chosen = generator(0, "probe").permutation(len(training))[:limit]
    unseen, others = np.arange(len(heldout)), np.arange(len(decorrelated))
    z = encode(training, chosen)
    z_unseen, z_others = encode(heldout, unseen), encode(decorrelated, others)
    action = ridge(z, training.actions(chosen))
    noise = ridge(z, training.noise(chosen))
    background = ridge(z, next_background(training, chosen))

    per_dimension = nmse(action(z_unseen), heldout.actions())
    return dict(
        probe_nmse=float(per_dimension.mean()),
        probe_nmse_per_dimension=per_dimension.tolist(),
        probe_nmse_noise=float(nmse(noise(z_unseen), heldout.noise()).mean()),
        probe_nmse_decorrelated=float(nmse(action(z_others), decorrelated.actions()).mean()),
        leakage_r2=r2(background(z_unseen), next_background(heldout, unseen)))

# ==== 7. Latent policy [policy] ===================================================================
# In: windows and a frozen IDM. Out: a policy from pixels to actions, in two steps: clone the latent
# actions of the demonstrations from frames alone, then decode the clone's latents to actions with a
# few labels. Both are regressions; so are oracle and labels-only, clones of true actions.
def regress(config, network, inputs, targets, rows, held=None, **how):
    """Fit network(inputs(batch)) to targets[batch] by squared error, batches (B,) drawn from rows.
    targets (n, D) f32; how: the other arguments of `train`. With rows `held` out, its history has
    the error on them."""
    device = next(network.parameters()).device
    targets = torch.from_numpy(targets).to(device)

    def error(batch):
        with autocast(device):
            return F.mse_loss(network(inputs(batch)).float(), targets[batch])

    def loss(step):
        rng = generator(config.seed, "regress", step)
        return error(rows[rng.integers(len(rows), size=config.batch_size)])

    @torch.no_grad()
    def report(step):
        parts = np.array_split(held, math.ceil(len(held) / 1000))
        return sum(float(error(part)) * len(part) for part in parts) / len(held)

    return train(network, loss, report=None if held is None else report, **how)

def regress_few(config, network, inputs, targets, rows, **how):
    """`regress` for few labels: the last fifth of the rows says after how many updates the network
    has learnt the most; then it starts again and learns from all rows for as long."""
    fresh = copy.deepcopy(network.state_dict())
    fit = functools.partial(regress, config, network, inputs, targets, **how)
    first, held = np.split(rows, [len(rows) * 2 // 5 * 2])  # even: the decoder's are pairs
    stop, _, _ = min(fit(rows=first, held=held), key=lambda row: row[2])
    network.load_state_dict(fresh)
    fit(rows=rows, stop=stop)

def make_policy(config, outputs):
    """A fresh network from the stack obs to `outputs` numbers, actions or latent actions."""
    torch.manual_seed(config.seed + 1)
    return FrameEncoder(config, 3, outputs).to(memory_format=torch.channels_last)

class LatentPolicy(nn.Sequential):
    """A policy from pixels to latent actions, and a decoder on to actions (B, A)."""

    frames = 3

    def __init__(self, config, actions):
        super().__init__()
        self.policy = make_policy(config, config.latent_dim)
        torch.manual_seed(config.seed + 2)
        self.decoder = mlp(config.latent_dim, actions)

def clone(config, windows, targets, text, checkpoint=None):
    """Behaviour cloning of targets (len(windows), D), latent or true actions -> policy."""
    policy = make_policy(config, targets.shape[1]).to(windows.device)
    regress(config, policy, windows.seen, targets, windows.demonstrations(), text=text,
            updates=config.policy_updates, lr=config.policy_lr, checkpoint=checkpoint)
    return policy.eval()

def latent_targets(idm, windows) -> np.ndarray:
    """What a frozen IDM says of the demonstrations (len(windows), Z), 0 elsewhere; scaled to unit
    variance, as a latent's scale is arbitrary."""
    rows = windows.demonstrations()
    z = latents(idm, windows, rows)
    targets = np.zeros((len(windows), z.shape[1]), np.float32)
    targets[rows] = (z - z.mean(0)) / (z.std(0) + 1e-6)
    return targets

def decode(config, policy, windows, targets, labelled, text):
    """Teach a policy that emits latent actions what they do -> one that emits actions.

    True actions are read of the windows `labelled` (n,) alone. The decoder learns each of them
    twice: from the policy's latent action, which it will be given, and from the one that the policy
    cloned, `targets` (len(windows), Z), which knows better what was done."""
    pairs = np.stack([latents(policy, windows, labelled), targets[labelled]], 1)  # (n, 2, Z)
    z = torch.from_numpy(pairs).flatten(0, 1).to(windows.device)
    actions = windows.actions(labelled).repeat(2, 0)  # (2 n, A)
    whole = LatentPolicy(config, actions.shape[1]).to(windows.device)
    whole.policy.load_state_dict(policy.state_dict())
    regress_few(config, whole.decoder, lambda batch: z[batch], actions,
                np.arange(len(actions)), text=f"{text} decoder", updates=config.decoder_updates,
                lr=1e-3)
    return whole.eval()

def clone_labels(config, windows, labelled):
    """Behaviour cloning of the labelled windows (n,) alone -> policy. It may learn for as long as
    other policies; where less serves it better, less."""
    policy = make_policy(config, windows.video.actions.shape[2]).to(windows.device)
    regress_few(config, policy, windows.seen, windows.actions(), labelled, text="labels-only",
                updates=config.policy_updates, lr=config.policy_lr)
    return policy.eval()

def action_nmse(policy, windows) -> float:
    """NMSE of a pixel policy's actions (n, A) on the demonstrations of windows."""
    rows = windows.demonstrations()
    return float(nmse(latents(policy, windows, rows), windows.actions(rows)).mean())

# ==== 8. Bodies [record] ==========================================================================
# A task is a Gymnasium MuJoCo environment, a camera that shows its agent whole, and an expert to
# record. All bodies but the humanoid are driven by position servos, as legged robots are: an action
# names an angle for every joint and a fast loop inside the simulator holds it. So an action can
# last long enough to be seen in two frames, and a policy that sees only frames can still balance.
@dataclass(frozen=True)
class Task:
    """A body, how it acts and is seen, and the search for its expert."""

    env_id: str
    camera: tuple[float, float, float] | None = None  # see AgentRenderer
    seconds: float | None = None  # that an action lasts; None: as the environment has it
    servo: dict | None = None  # arguments of `servo`; None: the environment's own motors
    options: dict = field(default_factory=dict)  # of gym.make
    search: dict = field(default_factory=dict)  # arguments of `train_expert`
    cycle: int = 0  # steps of a gait, for an expert that sees a clock; see `expert_input`

FREE = {"ctrl_cost_weight": 0}  # an angle costs nothing
TASKS = {
    "cheetah": Task("HalfCheetah-v5", (2.6, -8, 0), 0.1, dict(reach=0.8),
                    search=dict(size=0.03, step=0.02, persistence=0.7, budget=1_500_000)),
    "hopper": Task("Hopper-v5", (2.4, -8, 0.3), 0.1, dict(reach=0.6),
                   FREE | dict(healthy_angle_range=(-1, 1), healthy_z_range=(0.5, 10)),
                   dict(size=0.1, horizon=100, budget=1_200_000)),
    "walker": Task("Walker2d-v5", (2.6, -8, 0.1), 0.1, dict(reach=0.6), FREE,
                   dict(horizon=100, budget=1_200_000)),
    "swimmer": Task("Swimmer-v5", (4.4, -90, 0), 0.1, dict(reach=0.6),
                    search=dict(directions=8, top=4, size=0.03, step=0.02, budget=600_000)),
    "ant": Task("Ant-v5", (3.5, -40, -0.1), 0.1, dict(reach=0.6),
                FREE | dict(include_cfrc_ext_in_observation=False),
                dict(directions=32, top=16, size=0.03, step=0.02, noise=0.2, horizon=100,
                     budget=1_200_000)),
    "humanoid": Task("Humanoid-v5", (2.8, -8, -0.15), cycle=60, options=dict.fromkeys(
        [f"include_{name}_in_observation" for name in ("cinert", "cvel", "qfrc_actuator",
                                                       "cfrc_ext")], False)),
}

def get_task(name: str) -> Task:
    """The task of this name; any other name is taken for an environment id, with no expert yet."""
    return TASKS.get(name, Task(name))

def servo(model, reach, stiffness=2.0, damping=0.05):
    """Make the motors of a loaded MuJoCo model position servos, in place.

    Action a in [-high, high] asks a joint for the angle middle + reach a / high (radians): the
    initial pose's, moved where need be so that the joint can take every angle that is asked for.
    force = kp (angle - q) - damping kp dq, with kp = stiffness x the motor's torque per radian, and
    limited to that torque; the implicit integrator keeps stiff servos stable.
    Returns the action (A,) that asks for the initial pose."""
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
    return np.clip((pose - middle) / reach, -1, 1) * high

def bare_env(task: str):
    """A task's environment without wrappers and time limit; it observes the state."""
    mujoco.set_mju_user_warning(lambda _: None)  # models' deprecations, also to ./MUJOCO_LOG.TXT
    gym.logger.min_level = gym.logger.ERROR  # and environments'
    entry = get_task(task)
    env = gym.make(entry.env_id, disable_env_checker=True, **entry.options).unwrapped
    # The action that asks for the initial pose.
    env.rest = servo(env.model, **entry.servo) if entry.servo else np.zeros(env.action_space.shape)
    if entry.seconds:
        env.frame_skip = round(entry.seconds / env.model.opt.timestep)
    return env

state_env = functools.cache(bare_env)  # a process needs only one of each

def load_expert(task: str) -> np.ndarray:
    """A task's linear policy (A, 1 + S) f64: bias and weights, from its literal in section 16."""
    return from_literal(EXPERTS[task], state_env(task).action_space.shape[0])

def expert_input(task: str, state: np.ndarray, t: int) -> np.ndarray:
    """What an expert sees of an observation at step t; a task without `cycle` shows it as it is.

    The humanoid has motors, and feet that are points on which nothing can stand: its expert steps
    to a clock, and also sees sine and cosine of the gait's phase, and their products with the
    trunk's attitude and velocity, as a leg that swings must answer them otherwise than one that
    stands."""
    cycle = get_task(task).cycle
    if not cycle:
        return state
    phase = 2 * math.pi * t / cycle
    clock = np.array([math.sin(phase), math.cos(phase)])
    trunk = state[np.r_[0:5, 22:28]]  # height, attitude, velocities
    return np.concatenate([state, clock, np.outer(clock, trunk).ravel()])

def expert_action(expert: np.ndarray, seen: np.ndarray, high: np.ndarray) -> np.ndarray:
    """A linear policy (A, 1 + S) at its input (S,): an action (A,) within +-high."""
    return np.clip(expert[:, 0] + expert[:, 1:] @ seen, -high, high)

def moving_reward(reward: float, info: dict) -> float:
    """What the environment pays for moving: its reward without the bonus for being alive."""
    return reward - info.get("reward_survive", 0.0)

def state_rollout(task, expert, seed, steps, noise=0.0, persistence=0.0, restart=False):
    """One episode of an expert, or of random actions (None), until it falls; with restart, so many
    steps, as it starts anew.

    The expert's clipped actions are disturbed by Gaussian noise of scale `noise`, correlated from
    step to step by `persistence`. Returns states (n, S), actions (n, A) as executed, scaled to
    [-1, 1], and rewards (n,); states are what the expert sees."""
    env, rng = state_env(task), generator(seed, "rollout")
    high = env.action_space.high
    state, _ = env.reset(seed=seed)
    disturbance, start, trajectory = np.zeros(len(high)), 0, []

    for t in range(steps):
        seen = expert_input(task, state, t - start)
        fresh = rng.standard_normal(len(high))
        disturbance = persistence * disturbance + math.sqrt(1 - persistence**2) * fresh
        if expert is None:
            action = rng.uniform(-high, high)
        else:
            action = expert_action(expert, seen, high) + noise * high * disturbance
        action = np.clip(action, -high, high)
        state, reward, terminated, _, info = env.step(action)
        trajectory.append((seen, action / high, moving_reward(reward, info)))
        if terminated and not restart:
            break
        if terminated:
            start, (state, _) = t + 1, env.reset()
    return tuple(map(np.stack, zip(*trajectory)))

# ==== 9. Renderer [record] ========================================================================
# In: joint positions. Out: the agent alone, as premultiplied colour and soft alpha, which is at
# once what the distractors are composed behind and the simulator's own mask. Casting rays, one a
# pixel and five at its outline, is fast, needs no OpenGL and looks the same anywhere.
NO_VIEW = (0.0, 0.0, 0.0, 1.0)  # azimuth, elevation, roll (degrees) and distance factor

class AgentRenderer:
    """Draws a Gymnasium MuJoCo agent from its joint positions, with a camera that follows it.

    model: the environment's MjModel. It is drawn with an MjData of its own: live frames would lag
        a physics substep behind, and syncing the environment's data changes it.
    camera: distance (metres), elevation (degrees) and how far above the initial centre of mass it
        aims (metres); None: -20 degrees, and the agent spans two thirds of the frame. It follows
        along the ground but keeps its height: with no floor in sight, jumps would be invisible.
    size: height and width of the images, pixels."""

    def __init__(self, model, camera=None, size=64):
        self.model, self.camera, self.size = model, camera, size
        self.data, self.colors = mujoco.MjData(self.model), model.geom_rgba[:, :3].copy()
        mujoco.mj_forward(self.model, self.data)
        moved = model.body_rootid[model.jnt_bodyid[model.actuator_trnid[:, 0]]]  # by motors
        self.agent = np.isin(model.body_rootid[model.geom_bodyid], moved)  # no ground, no goals
        slope = math.tan(math.radians(model.vis.global_.fovy) / 2)
        center = self.data.subtree_com[1]
        if camera is None:
            reach = np.linalg.norm(self.data.geom_xpos - center, axis=1) + model.geom_rbound
            self.camera = (1.5 * reach[model.geom_bodyid > 0].max() / slope, -20, 0)
        self.height = center[2] + self.camera[2]

        # Five rays a pixel, no two of them in a row or column; the first is in the middle.
        inside = np.array([(0, 0), (-2, -1), (-1, 2), (1, -2), (2, 1)]) / 5
        places = np.indices((size, size)).reshape(2, -1, 1) + 0.5 - size / 2 + inside.T[:, None]
        pixel = 2 * slope / size  # width of one, 1 m away
        rays = np.stack([*pixel * places[::-1], np.ones_like(places[0])], -1)
        self.rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)  # (size^2, 5, 3)

    def __call__(self, qpos, view=NO_VIEW, tint=None):
        """Draw one state.

        qpos: (nq,) joint positions. view: see NO_VIEW. tint: (ngeom, 3) added to the colours.
        Returns rgb (size, size, 3) u8, premultiplied by alpha, alpha (size, size) u8, and the
        agent's part of alpha: all of it, but for objects and goals that no motor moves."""
        n = self.size
        colors = self.colors if tint is None else (self.colors + tint).clip(0, 1)
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)

        degrees = (90 + view[0], self.camera[1] + view[1], view[2])
        (ca, ce, cr), (sa, se, sr) = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        ahead, side = np.array([ca * ce, sa * ce, se]), np.array([sa, -ca, 0])
        up = np.array([-ca * se, -sa * se, ce])
        rays = self.rays @ np.stack([cr * side - sr * up, -cr * up - sr * side, ahead])
        eye = [*self.data.subtree_com[1, :2], self.height] - self.camera[0] * view[3] * ahead

        layers = self._cast(eye, rays[:, 0], colors)  # red, green, blue, alpha, agent
        alpha = torch.from_numpy(layers[:, 3].reshape(1, n, n))
        border = F.max_pool2d(alpha, 3, 1, 1) > -F.max_pool2d(-alpha, 3, 1, 1)  # on either side
        pixels = np.flatnonzero(border.numpy())
        around = self._cast(eye, rays[pixels, 1:].reshape(-1, 3), colors)
        layers[pixels] = (layers[pixels] + around.reshape(-1, 4, 5).sum(1)) / 5
        layers = (layers + 0.5).astype(np.uint8).reshape(n, n, 5)
        return layers[..., :3], layers[..., 3], layers[..., 4]

    def _cast(self, eye, rays, colors):
        """Rays (n, 3) from the eye (3,) -> layers (n, 5) f32 up to 255."""
        n = len(rays)
        geom, distance, normal = np.zeros(n, np.int32), np.zeros(n), np.zeros((n, 3))
        mujoco.mj_multiRay(self.model, self.data, eye, rays.ravel(), None, False, -1, geom,
                           distance, normal.reshape(-1), n, mujoco.mjMAXVAL)
        hit, layers = np.flatnonzero(geom >= 0), np.zeros((n, 5), np.float32)
        facing = np.abs(np.einsum("ni,ni->n", normal[hit], rays[hit]))
        light = 0.4 + 0.4 * facing + normal[hit, 2].clip(0)
        layers[hit, :3] = (255 * colors[geom[hit]] * light[:, None]).clip(0, 255)
        layers[hit, 3] = 255
        layers[hit, 4] = 255 * self.agent[geom[hit]]
        return layers

# ==== 10. Distractors [record] ====================================================================
# In: a Gymnasium MuJoCo environment. Out: the same environment with pixel observations, in which
# everything but the agent moves too, partly following the agent's actions. Stationary or smooth
# backgrounds are easy: what ruins a latent action is many sharp edges that move independently.
class Backdrop:
    """What moves behind the agent: two scrolling textures and 12 two-coloured sprites.

    In pixels a step, v = speed * (rho * P (a - mean) + sqrt(1 - rho^2) * u), with a the executed
    action scaled to [-1, 1], P (D, A) and mean (A,) from `tie`, so that P (a - mean) has unit
    variance, and u unit-variance Ornstein-Uhlenbeck noise. rho changes how much the background
    follows the action, never how fast it moves. Every layer has a velocity of its own; colours,
    shapes, places and u change with `rng`."""

    TEXTURES, SPRITES, PERSISTENCE = 2, 12, 0.5
    D = 2 * (TEXTURES + SPRITES)  # velocities: of sprites down and right, of textures up and left
    BRIGHTEST = (128, 256, 256)  # upper ends of red, green, blue: cool, as the agents are warm

    def __init__(self, rng, tied, correlation=0.5, speed=5.0, size=64, files=()):
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
        """Random colours (*shape, 3) u8."""
        return self.rng.integers(0, self.BRIGHTEST, (*shape, 3)).astype(np.uint8)

    def _texture(self):
        """8x8 random blocks, tiled 2x2 so that any scroll is one slice: (2 period, 2 period, 3)."""
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
    """A video, or a picture, behind the agent: one of `files` an episode, from any frame forwards
    and backwards. It moves as a whole, and goes on as its mirror image."""

    D = 2

    def paint(self):
        path = self.files[self.rng.integers(len(self.files))]
        frames = read_film(path, self.size)
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
    """The class of what moves behind the agent: Footage if there are files to show."""
    return Footage if files else Backdrop

PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".mp4")

@functools.cache
def read_film(path, side, limit=100):
    """The first frames of a video, a picture or a folder of pictures (a video, as in DAVIS), cut to
    squares: (n, side, side, 3) u8, n <= limit."""
    def frames():
        for file in sorted(path.glob("*")) if path.is_dir() else [path]:
            if file.suffix.lower() == ".mp4":
                yield from imageio.imiter(file, plugin="pyav")
            elif file.suffix.lower() in PICTURES:
                yield from imageio.imiter(file, plugin="pillow", mode="RGB")

    try:
        film = [ImageOps.fit(Image.fromarray(frame), (side, side))
                for frame in itertools.islice(frames(), limit)]
    except Exception as error:  # a broken PNG is a SyntaxError
        raise UserError(f"--backgrounds: {path} cannot be read ({error})") from error
    require(film, f"--backgrounds: {path} has no picture")
    return np.stack(film)

def footage(folder: str, split: str) -> tuple:
    """What a split shows of a folder: half of its videos, pictures and folders are for training, a
    quarter for both ways of probing, a quarter for evaluation."""
    if not folder:
        return ()
    known = [p for p in sorted(Path(folder).glob("*"))
             if p.is_dir() or p.suffix.lower() in PICTURES]
    require(len(known) >= 4, f"--backgrounds is {folder!r}; allowed: a folder with four or more "
            f"videos or pictures ({' '.join(PICTURES)}), or folders of them")
    places = dict(training=(0, 1), heldout=(2,), decorrelated=(2,), evaluate=(3,))[split]
    return tuple(path for i, path in enumerate(known) if i % 4 in places)

class Distractors(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Pixel observations (size, size, 3) u8 of a MuJoCo environment, with moving distractors.

    level: "none" (a plain background), "low" (a Backdrop behind the agent, camera fixed) or "hard"
        (also camera and agent colours on random walks, within the ranges of the Distracting
        Control Suite, arXiv 2101.02722, at `SCALE`). correlation, speed: its rho, and pixels a
        step. camera, size: see AgentRenderer.
    tied: from `Backdrop.tie`, with actions of the policy at work; None: with uniform actions.
    files: paths of videos and pictures to show instead, see `Footage`, with its own `tie`.
    info: "state" the wrapped observation, "mask" (size, size) u8 alpha of the agent, "distractor"
        (D,) f32 velocities of the background, pixels a step, "action" (A,) f32 as executed, in
        the environment's units.
    reset(seed=s) seeds physics and distractors; equal seeds give equal frames."""

    SCALE = 0.1  # of the Distracting Control Suite; its "easy" level

    def __init__(self, env, level="low", correlation=0.5, speed=5.0, camera=None, size=64,
                 tied=None, files=()):
        gym.utils.RecordConstructorArgs.__init__(
            self, level=level, correlation=correlation, speed=speed, camera=camera, size=size,
            tied=tied, files=files)
        super().__init__(env)
        if level not in DISTRACTORS:
            raise ValueError(f"level is {level!r}; it must be one of {', '.join(DISTRACTORS)}")
        self.level, self.correlation, self.speed = level, correlation, speed
        self.size, self.files = size, tuple(map(Path, files))
        self.action_dim = self.action_space.shape[0]
        uniform = generator(0, "uniform").uniform(-1, 1, (1000, self.action_dim))
        self.tied = tied or backdrop(files).tie(uniform, 0)
        model = env.unwrapped.model
        self.renderer = AgentRenderer(model, camera, size)
        # How far "hard" goes from NO_VIEW, and from the colours (red, green, blue) of each geom.
        self.limit = self.SCALE * np.array([90, 90, 90, 0.5] + [1] * 3 * model.ngeom)
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.rng, self.frame = np.random.default_rng(), None
        self.plain = np.full((size, size, 3), (70, 105, 140), np.uint8)

    def reset(self, *, seed=None, options=None):
        state, info = self.env.reset(seed=seed, options=options)
        if seed is not None:
            self.rng = np.random.default_rng([seed, 1])
        self.backdrop = backdrop(self.files)(self.rng, self.tied, self.correlation, self.speed,
                                             self.size, self.files)
        self.pose = self.rng.uniform(-self.limit, self.limit)
        self.drift = np.zeros(len(self.pose))
        return self._observe(state, info, np.zeros(self.action_dim, np.float32))

    def step(self, action):
        box = self.action_space
        executed = np.clip(action, box.low, box.high).astype(np.float32)  # replays exactly
        state, reward, terminated, truncated, info = self.env.step(executed)
        if self.level != "none":
            self.backdrop.step(executed / box.high)
        if self.level == "hard":  # a random walk with inertia, inside limits
            drift = self.drift + 0.05 * self.limit * self.rng.standard_normal(len(self.drift))
            self.drift = np.clip(drift, -0.2 * self.limit, 0.2 * self.limit)
            self.pose = np.clip(self.pose + self.drift, -self.limit, self.limit)
        observation, info = self._observe(state, info, executed)
        return observation, reward, terminated, truncated, info

    def _observe(self, state, info, executed):
        view, tint = NO_VIEW, None
        if self.level == "hard":
            view, tint = self.pose[:4] + NO_VIEW, self.pose[4:].reshape(-1, 3)
        rgb, alpha, mask = self.renderer(self.unwrapped.data.qpos, view, tint)
        behind = self.plain if self.level == "none" else self.backdrop.draw()
        weighted = behind * (255 - alpha.astype(np.uint16))[..., None]
        self.frame = rgb + ((weighted + 128) // 255).astype(np.uint8)
        seen = {"state": state, "mask": mask, "action": executed}
        return self.frame, info | seen | {"distractor": self.backdrop.velocity.copy()}

    def render(self):
        return self.frame

# ==== 11. Recording [record] ======================================================================
# In: a body, its expert and its distractors. Out: three videos of episodes, see `explores`.
SPLITS = ("training", "heldout", "decorrelated", "evaluate")

def episode_seed(config, split, index):
    """Environment seed of an episode; splits never share one, nor do runs with other seeds."""
    return config.seed * 10**6 + SPLITS.index(split) * 250_000 + index

def explores(index: int) -> bool:
    """Every other episode is a demonstration, quiet enough to be cloned, that ends when the body
    falls; the others explore, and the body starts anew.

    A nearly deterministic expert's action is a function of what was seen, so that a latent that
    knows the pose alone would pass for an action; noise is what only the transition can tell."""
    return index % 2 == 1

def expected_action(intended, scale):
    """The mean of clip(intended + scale n, -1, 1) over standard normal n: all that the past can
    tell of an action. Near the ends it is not `intended`, as noise cannot lead out of [-1, 1]."""
    scale = max(scale, 1e-9)

    def above(limit):  # mean of max(0, intended + scale n - limit)
        x = torch.from_numpy(intended - limit) / scale
        density = torch.exp(-x**2 / 2) / math.sqrt(2 * math.pi)
        return scale * (x * torch.special.ndtr(x) + density)

    return (above(-1) - above(1) - 1).numpy()

def noise_scale(config, index, seed):
    """Scale of the noise added to the expert's clipped actions, which reach from -1 to 1."""
    if explores(index):
        return config.exploration_noise
    return generator(seed, "scale").uniform(0, config.demonstration_noise)

@functools.lru_cache(1)
def tied_background(config):
    """`Backdrop.tie` with twenty episodes of actions as they will be recorded, whatever rho is."""
    expert = load_expert(config.task)
    actions = [state_rollout(config.task, expert, i, config.steps, noise_scale(config, i, i),
                             restart=explores(i))[1] for i in range(20)]
    return backdrop(config.backgrounds).tie(np.concatenate(actions), config.seed)

def task_camera(config):
    """The task's camera, see AgentRenderer, as near as --zoom asks; None if it has none."""
    camera = get_task(config.task).camera
    return camera and (camera[0] / config.zoom, *camera[1:])

def make_env(config, split="training"):
    """The task's environment with the distractors of a split: footage of its own, and in
    "decorrelated" a background that no longer follows the action (rho = 0)."""
    rho = 0.0 if split == "decorrelated" else config.correlation
    return Distractors(bare_env(config.task), config.distractor, rho, config.speed,
                       task_camera(config), config.frame_size, tied_background(config),
                       footage(config.backgrounds, split))

cached_env = functools.lru_cache(1)(make_env)  # a worker process uses one environment for long

def record_episode(config, folder, split, index) -> int:
    """Record an episode into its place in folder/split -> how many frames it has."""
    env, video = cached_env(config, split), Video.open(folder / split, "r+")
    seed = episode_seed(config, split, index)
    rng = generator(seed, "act")
    expert, high = load_expert(config.task), env.action_space.high
    scale = noise_scale(config, index, seed)
    start, (frame, info) = 0, env.reset(seed=seed)
    for t in range(config.steps):
        video.start[index, t] = start
        video.frames[index, t], video.masks[index, t] = frame, info["mask"]
        video.states[index, t] = info["state"]
        intended = expert_action(expert, expert_input(config.task, info["state"], t - start), high)
        noise = scale * high * rng.standard_normal(len(high))
        frame, reward, terminated, _, info = env.step(intended + noise)
        video.intended[index, t] = intended / high
        video.actions[index, t] = info["action"] / high
        video.rewards[index, t] = moving_reward(reward, info)
        video.distractor[index, t] = info["distractor"]
        if terminated and not explores(index):
            break
        if terminated:
            start, (frame, info) = t + 1, env.reset()
    for known in (video.actions, video.states, video.rewards):
        require(np.isfinite(known[index]).all(),
                f"{config.task}: a recorded state, action or reward is not a number")
    video.expected[index] = expected_action(video.intended[index], scale)
    video.demonstration[index] = not explores(index)
    video.length[index] = t + 1
    return t + 1

def data_sizes(config):
    """-> A, S and D of what will be recorded."""
    env = state_env(config.task)
    return *env.action_space.shape, *env.observation_space.shape, backdrop(config.backgrounds).D

def check_room(config, folder, spare=0):
    """UserError where a folder's disk has no room for a recording and masks of its own, not even
    with `spare` bytes more."""
    A, S, D = data_sizes(config)
    frames = (config.episodes + 2 * config.heldout_episodes) * config.steps
    need = frames * (5 * config.frame_size**2 + 4 * (3 * A + S + D + 1))
    free = shutil.disk_usage(folder).free + spare
    require(need < free, f"a recording of {need / 1e9:.1f} GB does not fit into {folder}, "
            f"which has {free / 1e9:.1f}: fewer --episodes or --steps")

def record(config, folder, pmap=itertools.starmap):
    """Record three videos, going on where an earlier call was stopped; -> frames recorded.

    folder/training, folder/heldout for probing, and folder/decorrelated, as many episodes as
    heldout, see `make_env`. pmap: `starmap`, or one that works in parallel. UserError where the
    disk has no room, or the simulation goes astray."""
    if not folder.exists():
        check_room(config, folder.parent)
    jobs, sizes = [], (config.steps, config.frame_size, *data_sizes(config))
    for split in SPLITS[:3]:
        E = config.episodes if split == "training" else config.heldout_episodes
        if not (folder / split / "length.npy").exists():
            try:
                Video.create(folder / split, E, *sizes)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        missing = np.flatnonzero(Video.open(folder / split).length == 0).tolist()
        jobs += [(config, folder, split, index) for index in missing]

    return sum(tqdm(pmap(record_episode, jobs), "record", len(jobs), leave=False, unit=" frames",
                    unit_scale=config.steps))

# ==== 12. Masks [mask] ============================================================================
# In: frames. Out: where the agent is. The simulator's masks were drawn along with the frames. With
# --masks sam the segmentation model SAM (arXiv 2304.02643) is shown a point of the agent on a few
# keyframes, and finds it there; a student learns from those to mask every frame. With --masks
# student the simulator does SAM's part.
def sam_path(model: str, file: str = "") -> Path:
    """Where the checkpoint of a SAM is: `file`, or its place in torch's hub cache."""
    return Path(file or Path(torch.hub.get_dir()) / "checkpoints" / SAM_FILES[model][0])

def with_masks_named(config):
    """The config with the source that --masks auto stands for: sam if its checkpoint is at hand."""
    if config.masks != "auto":
        return config
    found = config.sam_checkpoint or os.path.exists(sam_path(config.sam_model))
    return replace(config, masks="sam" if found else "simulator")

def load_sam(model: str, file: str, device):
    """Official SamPredictor; without `file` its checkpoint is downloaded once, hash checked."""
    from segment_anything import SamPredictor, sam_model_registry  # slow to import, rarely needed
    path = sam_path(model, file)
    try:
        if not file and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(SAM_URL + path.name, str(path), SAM_FILES[model][1])
    except (OSError, RuntimeError) as error:
        raise UserError(f"{SAM_URL}{path.name} cannot be downloaded ({first_line(error)}); "
                        "pass its file as --sam-checkpoint, or --masks simulator") from error
    try:
        return SamPredictor(sam_model_registry[model](checkpoint=str(path)).to(device))
    except Exception as error:  # torch raises many kinds, IndexError among them
        raise UserError(f"--sam-checkpoint {path} is no checkpoint of {model} "
                        f"({first_line(error)})") from error

def clicks(masks: np.ndarray) -> np.ndarray:
    """Where one would click on the agents of masks (n, H, W) u8: in each the point farthest from
    the border, as SAM's authors prompt it -> (n, 1, 2), x and y in pixels."""
    x, W = torch.from_numpy(masks).float()[:, None], masks.shape[2]
    depth = sum(-F.max_pool2d(-x, 2 * reach + 1, 1, reach) for reach in range(W // 8))
    deepest = depth.flatten(1).argmax(1).numpy()
    return np.stack([deepest % W, deepest // W], 1)[:, None] + 0.5

@torch.no_grad()
def segment(predictor, frames: np.ndarray, points, labels=(1,), checkpoint=None):
    """SAM's candidates for frames (n, H, W, 3) u8: masks (n, 3, H, W) bool, its own IoUs (n, 3).

    points: x and y in pixels, (m, 2) the same for all frames or (n, m, 2), with labels (m,) 1 = on
    the agent, 0 = off it. `checkpoint` (a path) keeps what is done."""
    points = np.broadcast_to(points, (len(frames), *np.shape(points)[-2:]))
    found = load_torch(checkpoint) if checkpoint and checkpoint.exists() else []
    left = range(len(found), len(frames))
    for i in tqdm(left, "SAM", len(frames), initial=len(found), leave=False):
        with autocast(predictor.device):
            predictor.set_image(frames[i])
        predictor.features = predictor.features.float()
        mask, score, _ = predictor.predict(points[i], np.array(labels))
        found.append((torch.from_numpy(mask), torch.from_numpy(score)))
        if checkpoint:
            save_torch(checkpoint, found)
    masks, scores = map(torch.stack, zip(*found))
    return masks.numpy(), scores.numpy()

def choose_masks(candidates: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Which of SAM's candidates (n, 3, H, W) bool is the agent, for each keyframe -> (n,).

    A candidate scores SAM's predicted IoU (n, 3), plus one for a plausible area (0.5 to 40 % of the
    frame), plus how well it agrees in place and area with the masks chosen so far: the camera
    follows the agent, so right masks resemble each other."""
    each, area = np.arange(len(candidates)), candidates.mean((2, 3))
    alone = predicted + ((area > 0.005) & (area < 0.4))
    chosen = alone.argmax(1)
    for _ in range(5):
        average, typical = candidates[each, chosen].mean(0), np.median(area[each, chosen])
        overlap = (candidates * average).sum((2, 3)) / np.maximum(candidates, average).sum((2, 3))
        likeness = np.minimum(area, typical) / np.maximum(np.maximum(area, typical), 1e-9)
        chosen = (alone + overlap + likeness).argmax(1)
    return chosen

class Student(nn.Sequential):
    """Segments the agent: frames (B, 3, H, W) -> logits (B, 1, H, W), sides multiples of 16."""

    def __init__(self):
        unet = UNet(12, 4, (16, 32, 64, 64), kernel=3)
        super().__init__(nn.PixelUnshuffle(2), unet, nn.PixelShuffle(2))

def train_student(config, frames: np.ndarray, masks: np.ndarray, device):
    """Distil keyframes (n, H, W, 3) u8 and their masks (n, H, W) u8 into a small network.
    Mirrored, shifted by up to an eighth and stretched in colour, a few dozen are enough."""
    torch.manual_seed(config.seed + 3)
    student = Student().to(device, memory_format=torch.channels_last)
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

    train(student, loss, config.student_updates, 3e-3, "student")
    return student.eval()

@torch.no_grad()
def student_masks(student, frames: np.ndarray) -> np.ndarray:
    """The student's soft masks (n, H, W) u8 of frames (n, H, W, 3) u8."""
    device, masks = next(student.parameters()).device, []
    for part in tqdm(torch.from_numpy(frames).split(128), "masks", leave=False, delay=1):
        with autocast(device):
            logits = student(to_float(part[:, None].to(device)))
        masks.append((255 * logits.float().sigmoid()).round().byte()[:, 0].cpu().numpy())
    return np.concatenate(masks)

def check_masks(masks: np.ndarray, name: str):
    """UserError where masks leave nothing to weight the loss with."""
    area = float((masks >= 128).mean())
    require(area > 1e-3, f"the masks of {name} video are empty ({100 * area:.2f} % of the frame): "
            "less of --erode, --shift, --occlude, other --masks, more --keyframes, a larger --zoom")

def find_masks(config, videos, device, checkpoint=None):
    """Masks of {name: Video} as --masks says.

    Returns the student or None, {name: masks (E, T, H, W)}, {"keyframes": IoU of the teacher with
    the simulator} or {}, and of the student's keyframes (frames (n, H, W, 3), teacher's, student's
    and simulator's masks (n, H, W)) or None, all u8."""
    config = with_masks_named(config)
    if config.masks == "simulator":
        return None, {name: video.masks for name, video in videos.items()}, {}, None
    training = videos["training"]
    e, t = np.nonzero(training.valid)
    spread = np.linspace(0, len(e) - 1, config.keyframes).astype(int)
    frames, truth = training.frames[e[spread], t[spread]], training.masks[e[spread], t[spread]]
    shown = (truth >= 128).any((1, 2))  # nobody can click on an agent that is not there
    frames, truth = frames[shown], truth[shown]
    labels = truth
    if config.masks == "sam":
        predictor = load_sam(config.sam_model, config.sam_checkpoint, device)
        if torch.device(device).type == "cpu":  # 14 s each were measured on two cores
            print(f"{len(frames)} keyframes: vit_b takes ~{len(frames) * 14 // 60} minutes")
        found, scores = segment(predictor, frames, clicks(truth), checkpoint=checkpoint)
        labels = np.uint8(255) * found[np.arange(len(found)), choose_masks(found, scores)]
    student = train_student(config, frames, labels, device)

    masks = {}
    for name, video in videos.items():
        flat = video.frames.reshape(-1, *video.frames.shape[2:])
        masks[name] = student_masks(student, flat).reshape(video.masks.shape)
        check_masks(masks[name], f"the student's {name}")
    keyframes = frames, labels, student_masks(student, frames), truth
    return student, masks, {"keyframes": mask_iou(labels, truth)}, keyframes

def degrade(config, masks: np.ndarray, rng) -> np.ndarray:
    """Masks (n, H, W) u8 made worse as --erode, --dilate, --shift and --occlude say, in this order.
    Erosion and dilation are minima and maxima over squares; occlusion cuts rectangles centred on
    the agent, up to a quarter of the frame wide and high, until the fraction is reached."""
    x = torch.from_numpy(np.array(masks, np.float32))[:, None]
    for reach, sign in ((config.erode, -1), (config.dilate, 1)):
        x = sign * F.max_pool2d(sign * x, 2 * reach + 1, 1, reach)
    x = F.pad(x, (config.shift, 0))[..., :x.shape[-1]]
    worse = x[:, 0].byte().numpy()
    for mask in worse if config.occlude else ():
        rows, columns = np.nonzero(mask >= 128)
        while len(rows) and (mask[rows, columns] == 0).mean() < config.occlude:
            i, (h, w) = rng.integers(len(rows)), rng.integers(1, mask.shape[0] // 8 + 1, 2)
            y, x = rows[i], columns[i]
            mask[max(y - h, 0):y + h, max(x - w, 0):x + w] = 0
    return worse

def mask_iou(a: np.ndarray, b: np.ndarray, where=...) -> float:
    """Intersection over union of two u8 masks of one shape, agent = 128 and above, at `where`."""
    a, b = a[where] >= 128, b[where] >= 128
    return float((a & b).sum() / max((a | b).sum(), 1))

# ==== 13. Evaluation [evaluate] ===================================================================
# In: a policy. Out: its return in the real environment, on backgrounds that nothing was trained or
# probed on. A few episodes step together, so that the policy sees batches.
def evaluation_seeds(config):
    return [episode_seed(config, "evaluate", i) for i in range(config.eval_episodes)]

@torch.no_grad()
def rollout(config, policy, seeds, student=None, device="cpu"):
    """Run an episode a seed at once -> returns (n,), film (t, H, W, 3) u8 of the first, t <= 200.
    The policy maps obs (n, 3, H, W, C) u8 to actions (n, A) in [-1, 1]; with --mask-input the
    student, or else the simulator, masks what it sees."""
    envs = [make_env(config, "evaluate") for _ in seeds]
    rng, high = generator(seeds[0], "degrade"), envs[0].action_space.high
    frames, infos = map(list, zip(*[env.reset(seed=s) for env, s in zip(envs, seeds)]))

    def seen():
        """What a policy sees of the present frames: (n, H, W, C) u8."""
        rgb = np.stack(frames)
        if not config.mask_input:
            return rgb
        masks = student_masks(student, rgb) if student else np.stack([i["mask"] for i in infos])
        return np.concatenate([rgb, degrade(config, masks, rng)[..., None]], -1)

    stack = [seen()] * 3  # the first frame, repeated
    returns, alive, film = np.zeros(len(envs)), np.ones(len(envs), bool), []
    for _ in range(config.eval_steps):
        obs = torch.from_numpy(np.stack(stack, 1)).to(device)
        actions = policy(obs).cpu().numpy()
        if len(film) < 200 and alive[0]:
            film.append(frames[0])
        for i in np.flatnonzero(alive):
            frames[i], reward, terminated, _, infos[i] = envs[i].step(high * actions[i])
            returns[i] += moving_reward(reward, infos[i])
            alive[i] = not terminated
        if not alive.any():
            break
        stack = stack[1:] + [seen()]
    return returns, np.stack(film)

def evaluate(config, policy: nn.Module, text, student=None, device="cpu"):
    """Returns (eval_episodes,) of a pixel policy on `device`, and a film of the first episode."""
    seeds, parts = evaluation_seeds(config), []
    for start in tqdm(range(0, len(seeds), 5), f"evaluate {text}", leave=False):
        parts.append(rollout(config, policy, seeds[start:start + 5], student, device))
    return np.concatenate([returns for returns, _ in parts]), parts[0][1]

def evaluate_state_policy(config, name):
    """Returns (eval_episodes,) of "expert" or "random", which read states, not pixels."""
    expert = load_expert(config.task) if name == "expert" else None
    return np.array([state_rollout(config.task, expert, seed, config.eval_steps)[2].sum()
                     for seed in evaluation_seeds(config)])

# ==== 14. Report [report] =========================================================================
# In: the numbers of all stages. Out: a table, figures and an animation.
COLUMNS = {"probe_nmse": "NMSE", "probe_nmse_noise": "of noise",
           "probe_nmse_decorrelated": "rho = 0", "leakage_r2": "leakage",
           "return_mean": "return", "return_std": "+-", "normalized_return": "normalised",
           "labels": "labels"}
TITLES = {"probe_nmse": "NMSE of the action (lower is better)",
          "probe_nmse_noise": "NMSE of its noise (1: a pose at most)",
          "probe_nmse_decorrelated": "NMSE of the action, rho = 0",
          "leakage_r2": "leakage: R2 of the next background",
          "return_mean": "return (higher is better)",
          "normalized_return": "return: 0 = random, 1 = expert",
          "action_nmse": "NMSE of the policy's actions (lower is better)"}
COLORS = {"lapo": "tab:red", "masklam": "tab:green", "laom": "tab:orange",
          "laom-labels": "tab:brown", "oracle": "tab:gray",
          "labels-only": "silver", "supervised-idm": "tab:blue", "past-only": "tab:olive"}

def normalized(value, chance, expert):
    """A return on the scale of 0 = random and 1 = expert."""
    require(expert > chance, f"the expert earns {expert:.0f} and random actions {chance:.0f}: "
            "search the task's expert again, or evaluate longer")
    return (value - chance) / (expert - chance)

def brief(value) -> str:
    """A number as tables show it; nothing for None."""
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 10 else f"{round(value, 2) + 0:.2f}"  # no -0.00

def table(results: dict) -> str:
    """The results' methods and references as lines of text."""
    ends = {name: dict(return_mean=results[name + "_return"]) for name in ("expert", "random")}
    lines = [" " * 16 + "".join(f"{title:>11}" for title in COLUMNS.values())]
    for name, row in (results["methods"] | ends).items():
        lines.append(f"{name:16}" + "".join(f"{brief(row.get(key)):>11}" for key in COLUMNS))
    lines.append(f"noise is {results['noise_share']:.2f} of the actions' variance")
    return "\n".join(lines)

def show(ax, picture, title, left=""):
    ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
    ax.set(xticks=[], yticks=[], ylabel=left)
    ax.set_title(title, fontsize=8)

def save_figure(figure, path):
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png", bbox_inches="tight")

def picture(image: torch.Tensor) -> np.ndarray:
    """The first of (B, C, H, W) in [-0.5, 0.5] -> (H, W, C) u8."""
    pixels = (255 * (image[0].float().cpu() + 0.5)).clamp(0, 255)
    return pixels.round().byte().permute(1, 2, 0).numpy()

@torch.no_grad()
def predict_one(windows, networks):
    """(true next frame, predicted, mask), u8, of one window: the same for all networks."""
    stacks, next_obs, mask = windows.batch(np.array([len(windows) // 3]))
    predicted = networks["fdm"](stacks[:, :3], networks["idm"](stacks))
    return picture(next_obs), picture(predicted), picture(mask - 0.5)[..., 0]

def plot_summary(results, predictions, path):
    """Bars of NMSEs, leakage and returns, and what each FDM predicted: {method: (true, predicted,
    mask)}, each (H, W, 3) or (H, W) u8."""
    heights = [3] + [2.5] * len(predictions)
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    axes, *grid = figure.subplots(len(heights), 4, height_ratios=heights, squeeze=False)
    for ax, key in zip(axes, ("probe_nmse", "probe_nmse_noise", "leakage_r2", "return_mean")):
        rows = {name: row for name, row in results["methods"].items() if key in row}
        spread = [row["return_std"] for row in rows.values()] if key == "return_mean" else None
        bars = ax.bar(list(rows), [row[key] for row in rows.values()], yerr=spread,
                      color=[COLORS.get(name, "black") for name in rows])
        ax.bar_label(bars, fmt=brief, fontsize=8, padding=1)
        ax.margins(y=0.12)
        ax.tick_params(axis="x", labelrotation=30, labelsize=8)
        ax.set_title(TITLES[key], fontsize=9)
    for (name, (true, predicted, mask)), row in zip(predictions.items(), grid):
        error = np.abs(true - predicted.astype(int)).mean(-1)
        show(row[0], true, "next frame")
        show(row[1], predicted, f"{name}: prediction")
        show(row[2], 2 * error, "absolute error, doubled")
        show(row[3], mask, "mask")
    save_figure(figure, path)

def plot_masks(frames, labels, students, truth, path):
    """Keyframes whose label (or else student) is best, median and worst, against the simulator."""
    of_labels = [mask_iou(found, true) for found, true in zip(labels, truth)]
    of_students = [mask_iou(found, true) for found, true in zip(students, truth)]
    order = np.lexsort([of_students, of_labels])  # by the last, the worst first
    ranks = dict(best=order[-1], median=order[(len(order) - 1) // 2], worst=order[0])
    figure = Figure(figsize=(8, 6), layout="constrained")
    for row, (rank, i) in zip(figure.subplots(3, 4), ranks.items()):
        show(row[0], frames[i], "frame", rank)
        show(row[1], labels[i], f"label, IoU {of_labels[i]:.2f}")
        show(row[2], students[i], f"student, IoU {of_students[i]:.2f}")
        show(row[3], truth[i], "simulator")
    save_figure(figure, path)

def plot_sweep(rows: list[dict], path, title, what):
    """A panel for every number in the rows: a line for every method over values of the flag `what`,
    or dots beside words; a method that has one point only is a line across."""
    keys = [key for key in rows[0] if key in TITLES]
    places = sorted({float(row["point"]) for row in rows}) if what else [0]
    figure = Figure(figsize=(4 * len(keys), 3.5), layout="constrained")
    axes = figure.subplots(1, len(keys), sharey=not what, squeeze=False)[0]
    for ax, key in zip(axes, keys):
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method]
            points, values = [row["point"] for row in mine], [row[key] for row in mine]
            look = dict(color=COLORS.get(method, "black"), label=method)
            if len(mine) == 1:
                across = ax.axhline if what else ax.axvline
                across(values[0], linestyle="--", **look)
            elif what:
                ax.plot(list(map(float, points)), values, "o-", **look)
            else:
                ax.plot(values, points, "o", **look)
        ax.set_title(TITLES[key], fontsize=9)
        ax.set_xlabel(what)
        if 0 < 30 * places[0] < places[-1]:
            ax.set_xscale("log")
            ax.set_xticks(places, [f"{place:g}" for place in places], fontsize=8)
            ax.minorticks_off()
    if not what:
        ax.invert_yaxis()  # the first point on top, in all panels
    ax.legend(fontsize=8)
    figure.suptitle(title)
    save_figure(figure, path)

def save_animation(films, path, seconds, scale=3):
    """Side-by-side GIF of films (t, H, W, 3) u8, `seconds` a frame; what has ended stands still."""
    longest = max(len(film) for film in films)
    lasting = [film[np.arange(longest).clip(max=len(film) - 1)] for film in films]
    columns = [np.pad(film, ((0, 0), (0, 0), (0, 2), (0, 0))) for film in lasting]
    frames = np.concatenate(columns, 2).repeat(scale, 1).repeat(scale, 2)
    images = [Image.fromarray(frame).quantize(64) for frame in frames]
    with written_whole(path) as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:],
                       duration=round(1000 * seconds), loop=0)

def summarize(results: list[dict]) -> dict:
    """Mean, standard deviation, median and half-width of the 95 % t-interval over the seeds'
    results (of more than ten seeds a little too wide)."""
    n, methods = len(results), {}
    t95 = (0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)[min(n - 1, 9)]
    for name, row in results[0]["methods"].items():
        methods[name] = {}
        for key in [k for k, v in row.items() if isinstance(v, (int, float))]:
            values = np.array([r["methods"][name][key] for r in results], float)
            std = float(values.std(ddof=1)) if n > 1 else 0.0
            methods[name][key] = dict(mean=float(values.mean()), std=std,
                                      median=float(np.median(values)), interval=t95 * std / n**0.5)
    return dict(task=results[0]["task"], config=results[0]["config"],
                seeds=[r["seed"] for r in results], methods=methods)

# ==== 15. Pipeline ================================================================================
# In: the command line. Out: a run's folder. A stage's results are cached under a key made of the
# config fields and the source text that they depend on, written whole or not at all, and taken up
# again where a killed run stopped.
VERSIONS = {name: importlib.metadata.version(name) for name in (
    "torch", "torchvision", "mujoco", "gymnasium", "segment-anything", "numpy", "pillow")}

def save_json(path, value):
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{path} would have a number that is not finite") from error
    with written_whole(path) as temporary:
        temporary.write_text(text + "\n")

def checksums(folder) -> dict:
    """{path in the folder: SHA-256} of all its arrays."""
    sums = {}
    for path in sorted(folder.rglob("*.npy")):
        with open(path, "rb") as file:
            sums[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums

def check_arrays(folder, known: dict):
    """UserError unless a folder's arrays have the checksums known of them."""
    found = checksums(folder)
    for name in known:
        require(known[name] == found.get(name), f"{folder / name} is damaged; pass --fresh")

@functools.cache
def source_text(stage: str) -> str:
    """The source of the sections whose banner names this stage or an earlier one."""
    banner = r"^# ==== .*\[(\w+)\] =+\n([\s\S]*?)(?=^# ==== )"
    sections = re.findall(banner, SOURCE, re.MULTILINE)
    return "".join(body for name, body in sections if STAGES.index(name) <= STAGES.index(stage))

@functools.cache
def file_stamps(path: str) -> list:
    """(path, size, time of the last change) of a file, or of all files in a folder."""
    root = Path(path)  # rglob would not look into links to folders
    files = [p for p in sorted((root, *root.glob("*"), *root.glob("*/*"))) if p.is_file()]
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]

def cache_key(config, stage, name) -> str:
    """Twelve hex digits that change with a library and any field, file or line of code up to a
    stage."""
    chosen = {f.name: getattr(config, f.name) for f in fields(config)
              if STAGES.index(f.metadata["stage"]) <= STAGES.index(stage)}
    if name.removesuffix("-targets") in {*SUPERVISED} - {*REFERENCES}:  # labels before decoding
        chosen["labels"] = config.labels
    files = [file_stamps(chosen[path]) for path in ("backgrounds", "sam_checkpoint")
             if chosen.get(path)]
    task = asdict(get_task(config.task)), EXPERTS.get(config.task)
    text = json.dumps([name, chosen, files, task, source_text(stage), VERSIONS], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

def start_worker():
    """Prepare a worker process: one thread, and no life without its parent."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed worker would leave
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

@contextlib.contextmanager
def worker_pool():
    """One single-thread process a core, up to 16, as each takes .6 GB; none outlives the block."""
    context = multiprocessing.get_context("spawn")  # fork does not mix with threads
    others = multiprocessing.active_children()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    with futures.ProcessPoolExecutor(min(len(cores), 16), context, start_worker) as pool:
        try:
            yield pool
        except BaseException as error:
            workers = set(multiprocessing.active_children()).difference(others)
            for process in workers:
                process.terminate()
                process.join()
            if workers or isinstance(error, futures.BrokenExecutor):  # a dead one may be counted
                print(file=sys.stderr)  # what is said next must not stand behind a bar of theirs
            raise

def map_in(pool, function, jobs):
    """`starmap` by a pool's workers. A thread hands over the jobs, for only the main thread is
    interrupted, and no worker is left half started. It is deaf to Ctrl-C, which workers inherit.
    `pool.map` would cancel what is left when interrupted, and then stumble over that."""
    deaf = signal.SIG_BLOCK, [signal.SIGINT]
    with futures.ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=deaf) as thread:
        handed_over = list(thread.map(lambda job: pool.submit(function, *job), jobs))
    for future in handed_over:
        yield future.result()

class Run:
    """One seed's folder: its cache, its clock and its results. A stage is a method that computes a
    named result, or takes it from the cache."""

    def __init__(self, config: Config, folder: Path, device, pool=None):
        self.config, self.folder, self.device = with_masks_named(config), folder, device
        self.pool, self.cache = pool, folder / "cache"
        self.seconds = {stage: {} for stage in STAGES[:-1]}
        self.cache.mkdir(parents=True, exist_ok=True)

    def path(self, stage, name) -> Path:
        return self.cache / f"{stage}-{name}-{cache_key(self.config, stage, name)}.pt"

    def cached(self, stage, name, compute, fresh=None):
        """compute(checkpoint path) -> tensors and numbers, or what it once returned, from the
        cache. A network is kept as its weights, which are loaded into `fresh`, one of its kind.
        Arrays lie in a folder beside, and are checked when they are used again."""
        path = self.path(stage, name)
        partial, folder = path.with_suffix(".partial"), path.with_suffix("")
        if path.exists():
            payload, seconds, sums = load_torch(path)
            check_arrays(folder, sums)
        else:
            start = time.monotonic()
            result = compute(partial)
            payload = result if fresh is None else result.state_dict()
            seconds = time.monotonic() - start
            save_torch(path, (payload, seconds, checksums(folder)))
        partial.unlink(missing_ok=True)
        self.seconds[stage][name] = seconds
        if fresh is None:
            return payload
        fresh.load_state_dict(payload)
        return fresh.to(self.device).eval()

    @functools.cached_property
    def videos(self):
        """{"training", "heldout", "decorrelated": Video}; records them where need be."""
        folder = self.path("record", "video").with_suffix("")
        pmap = functools.partial(map_in, self.pool) if self.pool else itertools.starmap

        def compute(_):
            for path in footage(self.config.backgrounds, "evaluate"):  # now, not when all is done
                read_film(path, self.config.frame_size)
            return record(self.config, folder, pmap)

        self.recorded = self.cached("record", "video", compute)  # how many frames
        return {name: Video.open(folder / name) for name in SPLITS[:3]}

    @property
    def undegraded(self):
        """The run whose masks are their source's own: found once, however they are used."""
        config = replace(self.config, erode=0, dilate=0, shift=0, occlude=0.0, mask_input=False)
        return self if config == self.config else Run(config, self.folder, self.device, self.pool)

    @functools.cached_property
    def masks(self):
        """-> (student or None, {video's name: masks}, {video's name, or "keyframes": IoU with the
        simulator's})."""
        config, videos, source = self.config, self.videos, self.undegraded
        folder = self.path("mask", "masks").with_suffix("")

        def compute(partial):
            folder.mkdir(exist_ok=True)
            if source is not self:
                student, masks, iou = source.masks
            else:
                student, masks, iou, keyframes = find_masks(config, videos, self.device, partial)
                if keyframes:
                    plot_masks(*keyframes, folder / "masks.png")
            for name, video in videos.items():
                worse = np.empty(video.masks.shape, np.uint8)  # a list would tear up the heap
                for i, episode in enumerate(masks[name]):
                    worse[i] = degrade(config, episode, generator(config.seed, name, i))
                check_masks(worse, name)
                iou[name] = mask_iou(worse, video.masks, video.valid)
                save_array(folder / f"{name}.npy", worse)
            return student and student.state_dict(), iou

        state, iou = self.cached("mask", "masks", compute)
        student = Student().to(self.device) if state else None
        if student:
            student.load_state_dict(state)
        return student, {name: np.load(folder / f"{name}.npy", "c") for name in videos}, iou

    @functools.cached_property
    def windows(self):
        """Training, held-out and decorrelated video with their masks."""
        _, masks, _ = self.masks
        return [Windows(video, self.device, self.config.mask_input, masks[name])
                for name, video in self.videos.items()]

    @property
    def actions(self):
        """How many numbers an action has."""
        return self.videos["training"].actions.shape[2]

    def lam(self, name):
        """-> the networks of a method or a reference, see `make_networks`."""
        config, training = self.config, self.windows[0]

        def compute(partial):
            labelled = labelled_windows(config, training)
            return train_lam(config, training, name, labelled, partial)[0]

        return self.cached("lam", name, compute, make_networks(config, name, self.actions))

    def probe(self, name):
        """-> the probe's numbers of a method's frozen IDM, or of a reference."""
        def compute(_):
            encode = functools.partial(latents, self.lam(name)["idm"])
            return probe(encode, *self.windows, self.config.probe_windows)

        return self.cached("probe", name, compute)

    def targets(self, name):
        """-> what a method's policy clones, see `latent_targets`; the oracle's: true actions."""
        training = self.windows[0]
        if name == "oracle":
            return training.actions()

        def compute(_):
            return torch.from_numpy(latent_targets(self.lam(name)["idm"], training))

        return self.cached("policy", f"{name}-targets", compute).numpy()

    def policy(self, name):
        """-> a policy that emits a method's latent actions, or the oracle's, that emits actions."""
        config, targets = self.config, self.targets(name)

        def compute(partial):
            return clone(config, self.windows[0], targets, f"{name} policy", partial)

        return self.cached("policy", name, compute, make_policy(config, targets.shape[1]))

    def decode(self, name):
        """-> (policy from pixels to actions, how many labels it used)."""
        config, training = self.config, self.windows[0]
        if name == "oracle":
            return self.policy(name), len(training.demonstrations())
        labelled = labelled_windows(config, training)

        def compute(_):
            if name == "labels-only":
                return clone_labels(config, training, labelled)
            policy, targets = self.policy(name), self.targets(name)
            return decode(config, policy, training, targets, labelled, name)

        make = make_policy if name == "labels-only" else LatentPolicy
        return self.cached("decode", name, compute, make(config, self.actions)), len(labelled)

    def evaluate(self, name):
        """-> (returns, film, held-out error of the actions, see `action_nmse`) of a pixel policy,
        or (returns, None, None) of "expert" and "random"."""
        def compute(_):
            if name in ("expert", "random"):
                return torch.from_numpy(evaluate_state_policy(self.config, name)), None, None
            policy, _ = self.decode(name)
            found = evaluate(self.config, policy, name, self.masks[0], self.device)
            return *map(torch.from_numpy, found), action_nmse(policy, self.windows[1])

        returns, film, error = self.cached("evaluate", name, compute)
        return returns.numpy(), None if film is None else film.numpy(), error

    def scale(self):
        """-> mean returns of random actions and of the expert; UserError unless that is better."""
        chance, expert = (self.evaluate(name)[0].mean() for name in ("random", "expert"))
        normalized(0, chance, expert)
        return chance, expert

    def returns(self, name) -> dict:
        """The numbers of a policy's evaluation."""
        returns, _, error = self.evaluate(name)
        chance, expert = self.scale()
        return dict(return_mean=float(returns.mean()), return_std=float(returns.std()),
                    return_n=len(returns), action_nmse=error, labels=self.decode(name)[1],
                    normalized_return=float(normalized(returns.mean(), chance, expert)))

    def plan(self):
        """{stage: the names of its results}."""
        methods = self.config.methods
        probed = (*methods, *REFERENCES)
        return dict(lam=probed, probe=probed, policy=(*methods, "oracle"),
                    decode=(*methods, "labels-only"),
                    evaluate=(*methods, *CLONES, "expert", "random"))

    def show_masks(self):
        """Put the picture of the present setting's keyframes, if it has any, into the folder."""
        drawn = self.undegraded.path("mask", "masks").with_suffix("") / "masks.png"
        shown = self.folder / "masks.png"
        shown.unlink(missing_ok=True)  # another setting's
        if drawn.exists():
            shutil.copy(drawn, shown)

    def execute(self, until="report"):
        """Every stage up to and including `until`; -> results.json's content if that is report."""
        stages = STAGES[:STAGES.index(until) + 1]
        _ = self.masks if "mask" in stages else self.videos
        if "evaluate" in stages:
            self.scale()  # now, not when all is done
        self.show_masks()
        for stage, names in self.plan().items():
            if stage not in stages:
                break
            wanted = [(self, stage, name) for name in names]
            if stage == "lam" and "decode" in stages:  # these need no latents; longest first
                wanted = [(self, "decode", "labels-only"), (self, "policy", "oracle"), *wanted]
            compute_missing(wanted)
            for name in names:
                found = getattr(self, stage)(name)
                if stage == "probe":
                    print(f"{name:16} probe NMSE {found['probe_nmse']:.2f}, of the noise "
                          f"{found['probe_nmse_noise']:.2f}")
        return self.report() if until == "report" else None

    def report(self) -> dict:
        """Write results.json, the figures and the animation; -> results.json's content."""
        config = self.config
        rows = {name: self.returns(name) for name in (*config.methods, *CLONES)}
        for name in (*config.methods, *REFERENCES):
            rows[name] = self.probe(name) | rows.get(name, {})

        training, heldout, _ = self.windows
        share = training.noise().var(0) / training.actions().var(0)
        results = dict(
            task=config.task, seed=config.seed, config=asdict(config), device=str(self.device),
            versions=VERSIONS | {"python": sys.version.split()[0]},
            mask_source=config.masks, mask_iou=self.masks[2],
            seconds={stage: round(sum(spent.values()), 1) for stage, spent in self.seconds.items()},
            rates=self.rates(), noise_share=float(share.mean()), methods=rows)
        results["random_return"], results["expert_return"] = map(float, self.scale())

        predictions = {name: predict_one(heldout, self.lam(name)) for name in config.methods
                       if name not in LAOMS}
        plot_summary(results, predictions, self.folder / "summary.png")
        films = [self.evaluate(name)[1] for name in config.methods]
        save_animation(films, self.folder / "rollouts.gif", state_env(config.task).dt)
        save_json(self.folder / "results.json", results)
        return results

    def rates(self) -> dict:
        """Samples a second of the stages that take long, each by itself on its core or device. A
        training that was stopped and taken up again seems faster than it was."""
        config, rates = self.config, {}
        for stage, updates in (("lam", config.lam_updates), ("policy", config.policy_updates)):
            seconds = 0
            for name in config.methods:
                getattr(self, stage)(name)  # with its seconds, from the cache
                seconds += self.seconds[stage][name]
            rates[stage] = round(config.batch_size * updates * len(config.methods) / seconds)
        return rates | dict(frames=round(self.recorded / self.seconds["record"]["video"]))

def compute_in_worker(config, folder, stage, name):
    """Compute one result, which leaves it in the run's cache."""
    getattr(Run(config, folder, torch.device("cpu")), stage)(name)

def compute_missing(wanted):
    """Fill the caches of runs with wanted results [(Run, stage, name)], side by side in workers: on
    a CPU, where two threads on two busy cores wait for each other. On a GPU nothing is done ahead:
    each result is computed when it is asked for."""
    missing = {run.path(stage, name): (run.config, run.folder, stage, name)
               for run, stage, name in wanted if not run.path(stage, name).exists()}
    run, _, _ = wanted[0]
    if run.pool and run.device.type == "cpu":
        list(map_in(run.pool, compute_in_worker, missing.values()))

SWEEPS = {  # changes of the config, point by point
    "labels": [dict(labels=n) for n in (25, 50, 100, 200, 800, 3200)],
    "latent": [dict(latent_dim=n) for n in (4, 16, 32, 64, 128, 256, 512)],
    "correlation": [dict(correlation=r) for r in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)],
    "speed": [dict(speed=v) for v in (0.0, 1.0, 2.0, 3.5, 5.0, 7.0)],
    "zoom": [dict(zoom=z) for z in (0.5, 0.7, 1.0, 1.2)],
    "offset": [dict(offset=k) for k in (1, 2, 3, 5, 10)],
    "weight": [dict(background_weight=b) for b in (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)],
    "masks": [{}, *(dict(occlude=f) for f in (0.25, 0.5, 0.75)), dict(erode=1),
              *(dict(dilate=r) for r in (1, 2, 3)), *(dict(shift=s) for s in (2, 4, 8)),
              dict(mask_input=True), dict(mask_input=True, background_weight=1.0)],
}
ONE_METHOD = ("weight", "masks")  # sweeps of what only masklam has

def sweep_points(config, name) -> list[dict]:
    """The changes of a sweep; of labels those that there are, and all of them."""
    if name != "labels":
        return SWEEPS[name]
    most = demonstrated(config)
    return [point for point in SWEEPS[name] if point["labels"] < most] + [dict(labels=most)]

def run_sweep(config, name, folder, device, pool):
    """Run the points of a sweep, with what is in the cache; write their numbers and a figure."""
    points, runs, rows = sweep_points(config, name), [], []
    for changes in points:
        methods = ("masklam",) if name in ONE_METHOD and runs else config.methods
        runs.append(Run(replace(config, **changes, methods=methods), folder, device, pool))
        _ = runs[-1].masks  # recorded here, or every worker would

    acts = name == "labels"  # the other sweeps end with the probe
    if acts:
        runs[0].scale()  # alike at all points
    for stage in ("lam", "policy", "decode", "evaluate") if acts else ("lam", "probe"):
        compute_missing([(run, stage, result) for run in runs for result in run.plan()[stage]
                         if result not in (*REFERENCES, "oracle")])

    for changes, run in zip(points, runs):
        point = " ".join(map(str, changes.values()))
        if name == "masks":
            words = ", ".join(f"{key} {value}" for key, value in changes.items()) or "as it is"
            point = f"{words} (IoU {run.masks[2]['training']:.2f})"
        for method in (*run.config.methods, "labels-only") if acts else run.config.methods:
            found = run.returns(method) if acts else run.probe(method)
            used = found.get("labels", point)  # where bodies fell fewer than were asked for
            numbers = {key: found[key] for key in TITLES if key in found and key != "return_mean"}
            rows.append(dict(point=used, method=method) | numbers)
            print(f"{used!s:32} {method:12}", *(f"{key} {x:.2f}" for key, x in numbers.items()))
    written, figure = folder / f"sweep-{name}.csv", folder / f"sweep-{name}.png"
    with written_whole(written) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    label = "" if name == "masks" else flag(*points[0])  # of the axis; masks change by many flags
    plot_sweep(rows, figure, f"--task {config.task} --sweep {name}", label)
    print("files:", written, figure)

def flag(name: str) -> str:
    return "--" + name.replace("_", "-")

def demonstrated(config) -> int:
    """How many transitions the demonstrations have, if none ends early."""
    return (config.episodes + 1) // 2 * (config.steps - 1)

def check_config(config: Config, given):
    """UserError unless all fields are allowed, fit together, and those given by name matter."""
    def allow(ok, name, allowed):
        value = getattr(config, name)
        value = " ".join(map(str, value)) if isinstance(value, tuple) else value
        require(ok, f"{flag(name)} is {value!r}; allowed: {allowed}")

    for f in fields(config):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        for v in value if isinstance(value, tuple) else (value,):
            allow(isinstance(v, str) or low <= v <= high, f.name, f"{low} to {high}")

    size, masks, methods = config.frame_size, config.masks, config.methods
    useless = dict(blocks=config.patch > 1, background_weight={*methods} <= {"lapo", *LAOMS},
                   zoom=not get_task(config.task).camera)
    useless |= dict.fromkeys(("sam_model", "sam_checkpoint"), masks != "sam")
    useless |= dict.fromkeys(("keyframes", "student_updates"), masks == "simulator")
    useless |= dict.fromkeys(("correlation", "speed", "backgrounds"), config.distractor == "none")
    for name in given:
        require(not useless.get(name),
                f"{flag(name)} has no effect with the other settings; leave it out")
    noise = max(config.demonstration_noise, config.exploration_noise)
    require(noise >= 1e-3, "--demonstration-noise and --exploration-noise are below 0.001; the "
            "probe of the noise needs one of them")

    frames, most = config.episodes * config.steps, demonstrated(config)
    for name in ("idm_widths", "fdm_widths"):
        step = stride(config, getattr(config, name))
        allow(size % step == 0, "frame_size",
              f"multiples of {step} (--patch, and a halving for each of {flag(name)})")
    if masks != "simulator":
        allow(size % 16 == 0, "frame_size", f"with --masks {masks}, multiples of 16")
        allow(config.keyframes <= frames, "keyframes", f"4 to {frames}, all frames")
    allow(len(set(methods)) == len(methods), "methods", "each of them once")
    allow(config.labels <= most, "labels",
          f"10 to {most}, all transitions of demonstrations (half of --episodes, and --steps)")

def check_task(config, points, train_expert):
    """UserError unless the task is an environment and, to be recorded, has an expert, an agent that
    the masks would show, pictures that can be read behind it, and SAM's checkpoint is at hand."""
    try:
        env = Distractors(state_env(config.task), "none", camera=task_camera(config),
                          size=config.frame_size)
    except (gym.error.Error, ImportError, AttributeError, IndexError, ValueError,
            TypeError) as error:
        raise UserError(f"--task is {config.task!r}; allowed: {', '.join(TASKS)}, or the id of one "
                        f"of Gymnasium's MuJoCo environments ({first_line(error)})") from error
    if train_expert:
        return
    require(config.task in EXPERTS, f"--task {config.task} has no expert: search one with "
            "--train-expert, and put the entries that it prints into TASKS and EXPERTS")
    for path in [path for split in SPLITS for path in footage(config.backgrounds, split)]:
        read_film(path, 8, limit=1)
    _, info = env.reset(seed=0)
    for point in points:
        mask = degrade(replace(config, **point), info["mask"][None], generator(0, "check"))
        check_masks(mask, f"a first {point or 'plain'}")
    if config.masks == "sam":
        load_sam(config.sam_model, config.sam_checkpoint, "cpu")

OPTIONS = dict(preset="laptop", seeds=None, out="runs", fresh=False, until="report", sweep=None,
               train_expert=False)  # defaults of the flags that are no fields of Config

def parse(argv):
    """Command line -> (config, OPTIONS as given). Presets yield to flags given by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     argument_default=argparse.SUPPRESS)  # so: not given, not there
    parser.error = functools.partial(require, False)  # a UserError
    seeds = parser.add_mutually_exclusive_group()
    for f in fields(Config):
        kind, shown = dict(type=type(f.default), choices=f.metadata["choices"]), str(f.default)
        if isinstance(f.default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(f.default, tuple):
            kind |= dict(type=type(f.default[0]), nargs="+")
            shown = " ".join(map(str, f.default))
        group = seeds if f.name == "seed" else parser
        text = f"{f.metadata['help']} (default {shown or 'none'})"
        group.add_argument(flag(f.name), **kind, help=text.replace("%", "%%"))
    seeds.add_argument("--seeds", type=int, help="run seeds 0 .. N-1, summarise")
    parser.add_argument("--preset", choices=PRESETS,
                        help="sizes of everything (default laptop); gpu, paper: not yet run")
    parser.add_argument("--out", help="folder for run folders (default runs)")
    parser.add_argument("--fresh", action="store_true", help="empty the cache first")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--until", choices=STAGES, help="the last stage (default report)")
    goal.add_argument("--sweep", choices=SWEEPS,
                      help="run the points of SWEEPS with this name: a CSV file and a figure")
    goal.add_argument("--train-expert", action="store_true",
                      help="search the task's expert and print its literal")
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items()}
    options = argparse.Namespace(**OPTIONS | given)
    settings = {name: value for name, value in given.items() if name not in OPTIONS}

    config = with_masks_named(Config(**PRESETS[options.preset] | settings))
    points = sweep_points(config, options.sweep) if options.sweep else [{}]
    for point in points:
        for name in point:
            require(name not in given, f"{flag(name)} is what --sweep {options.sweep} changes")
        check_config(replace(config, **point), given | point)
    require(options.seeds is None or 1 <= options.seeds <= 1000,
            f"--seeds is {options.seeds}; allowed: 1 to 1000")
    if options.train_expert:
        useless = sorted(given.keys() - {"train_expert", "task", "seed"})
        require(not useless, f"{' '.join(map(flag, useless))} has no effect with --train-expert")
    check_task(config, points, options.train_expert)
    return config, options

@contextlib.contextmanager
def own_folder(folder, config, fresh):
    """Make a run's folder, emptied if `fresh`, and hold it: no two runs write to one."""
    cache = folder / "cache"
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            if fresh:
                files = [p for p in cache.rglob("*") if p.is_file()]
                check_room(config, cache, sum(p.stat().st_size for p in files))
                cache.rename(folder / f"cache.{time.time_ns()}.tmp")
                cache.mkdir()
            for left in [*folder.rglob("*.tmp")]:  # of killed runs
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
            save_json(cache / "config.json", asdict(config))
            yield
    except Timeout:
        raise UserError(f"another run is at work in {folder}: wait, or pass --out") from None
    except UserError:
        if made and not any(cache.glob("*-*")):  # nothing was done: leave nothing
            shutil.rmtree(folder)
            with contextlib.suppress(OSError):  # not empty: another run's
                for parent in made[1:]:
                    parent.rmdir()
        raise

def run_seeds(config, options, pool):
    """Run one seed, or --seeds of them, and print their tables."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results, tag = [], f"{config.task}-{options.preset}-{config.distractor}"
    sources = dict(simulator="the simulator's own; for SAM's: --masks sam, or its checkpoint",
                   student="a student of the simulator's own",
                   sam=f"sam, from {sam_path(config.sam_model, config.sam_checkpoint)}")
    print("masks:", sources[config.masks])
    for seed in range(options.seeds) if options.seeds else [config.seed]:
        folder = Path(options.out) / f"{tag}-{seed}"
        config = replace(config, seed=seed)
        print("seed", seed)
        with own_folder(folder, config, options.fresh):
            if options.sweep:
                result = run_sweep(config, options.sweep, folder, device, pool)
            else:
                result = Run(config, folder, device, pool).execute(options.until)
        if result:
            results.append(result)
            print(table(result))
            print("files:", *sorted(map(str, folder.glob("*.*"))))
    if options.seeds and results:
        path = Path(options.out) / f"{tag}-summary.json"
        save_json(path, summarize(results))
        print("summary over seeds:", path)

def main(argv=None):
    """The program; returns its exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        config, options = parse(argv)
        if options.train_expert:
            search_expert(config.task, config.seed)
        else:
            with worker_pool() as pool:
                run_seeds(config, options, pool)
        print(end="", flush=True)  # where nobody reads, at once
        return 0
    except KeyboardInterrupt:
        print("\nmasklam: stopped; a run (but no --train-expert) goes on from here, with the same "
              "flags but --fresh", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, futures.BrokenExecutor))
        if not known and "alloc" not in str(error):  # as PyTorch says that no memory is left
            raise
        message = f"out of memory ({first_line(error)}): smaller sizes, or fewer --episodes"
    print("masklam:", " ".join(message.split()), file=sys.stderr)
    return 2

# ==== 16. Appendix: experts =======================================================================
# How the experts were found, and the experts themselves. Augmented random search (ARS V2-t, arXiv
# 1803.07055) needs no gradients and ends in one small matrix: a linear policy, which a servo makes
# enough to walk, and which fits into this file. Nothing else here is trained on states. The
# humanoid, which has no servo, took a longer search: mirrored, and held up by springs at first.
def fold_whitening(weights, mean, std):
    """Policy (A, 1 + S) on (state - mean) / std -> the same policy on the state."""
    scaled = weights[:, 1:] / std
    return np.c_[weights[:, 0] - scaled @ mean, scaled]

def train_expert(task, directions=24, top=12, size=0.06, step=0.03, noise=0.3, persistence=0.8,
                 budget=2_000_000, horizon=200, seed=0) -> str:
    """Augmented random search for a linear policy that survives being imitated -> its literal.

    It starts from holding the initial pose. Each iteration tries `directions` random directions,
    normal of scale `size`, both ways in episodes of `horizon` steps, and moves by `step` (decaying
    to a fifth) along the `top` best. States are whitened by running statistics. Clones err, and err
    again in the same state: so `size` is large, which makes gaits that stand errors of the policy,
    and actions are disturbed by noise of scale 0 to `noise`, much the same from one step to the
    next. Every 20 iterations six fixed episodes, half of them disturbed, decide whether this is the
    best policy so far. Stops after `budget` steps."""
    rest, rng = state_env(task).rest, generator(seed, "expert")
    A, S = len(rest), state_rollout(task, None, 0, 1)[0].shape[1]
    weights, mean, std = np.c_[rest, np.zeros((A, S))], np.zeros(S), np.ones(S)
    count, sums, squares, best = 0, np.zeros(S), np.zeros(S), (-np.inf, "")

    with worker_pool() as pool, tqdm(total=budget, desc="expert", unit_scale=True) as bar:
        for iteration in itertools.count(1):
            tried = rng.standard_normal((directions, A, 1 + S))
            seeds = rng.integers(2**31, size=directions).tolist()
            scales = rng.uniform(0, noise, directions)
            jobs = [(task, fold_whitening(weights + way * tried[i], mean, std), seeds[i], horizon,
                     scales[i], persistence) for way in (size, -size) for i in range(directions)]
            states, _, rewards = zip(*map_in(pool, state_rollout, jobs))
            states = np.concatenate(states)
            returns = np.array([r.sum() for r in rewards]).reshape(2, directions)
            chosen = np.argsort(-returns.max(0))[:top]
            move = np.tensordot((returns[0] - returns[1])[chosen], tried[chosen], 1)  # (A, 1 + S)
            decay = 1 - 0.8 * min(1, count / budget)
            weights = weights + decay * step / (top * returns[:, chosen].std() + 1e-9) * move

            count, sums = count + len(states), sums + states.sum(0)
            squares = squares + np.square(states).sum(0)
            mean = sums / count
            variance = squares / count - mean**2
            std = np.where(variance > 1e-8, np.sqrt(abs(variance)), np.inf)  # or it never changes
            bar.update(len(states))
            if iteration % 20 == 0 or count >= budget:
                literal = to_literal(fold_whitening(weights, mean, std))
                jobs = [(task, from_literal(literal, A), 10**5 + i, 400, noise * (i % 2),
                         persistence) for i in range(6)]
                score = sum(rewards.sum() for _, _, rewards in map_in(pool, state_rollout, jobs))
                best = max(best, (score / 6, literal))
                bar.set_postfix(best=f"{best[0]:.0f}")
            if count >= budget:
                return best[1]

def search_expert(name, seed):
    """Train a task's expert anew and print its entries for TASKS and EXPERTS."""
    task, env = get_task(name), state_env(name)
    if name not in TASKS:
        camera = AgentRenderer(env.model).camera
        task = replace(task, camera=tuple(round(float(x), 2) for x in camera))
        print(f"{name} is new: assumed camera {task.camera}, default search")
        print(f'    "{name}": {task},')
    literal = train_expert(name, **task.search, seed=seed)
    expert = from_literal(literal, len(env.rest))
    returns, chance = ([state_rollout(name, policy, 10**6 + i, 500)[2].sum() for i in range(10)]
                       for policy in (expert, None))
    print(f'    "{name}": "{literal}",')
    print(f"return on ten unseen seeds: {np.mean(returns):.0f} +- {np.std(returns):.0f}, of random "
          f"actions {np.mean(chance):.0f}")

def to_literal(expert) -> str:
    """A linear policy (A, 1 + S) as text: float16, low bytes before high, deflated, in base 85."""
    pairs = np.ravel(expert).astype(np.float16).view(np.uint8).reshape(-1, 2)
    return base64.b85encode(zlib.compress(pairs.T.tobytes(), 9)).decode()

def from_literal(literal, actions) -> np.ndarray:
    """What `to_literal` wrote, (A, 1 + S) f64."""
    planes = np.frombuffer(zlib.decompress(base64.b85decode(literal)), np.uint8).reshape(2, -1)
    return planes.T.copy().view(np.float16).reshape(actions, -1).astype(float)

EXPERTS = {  # see `to_literal`; cheetah's, swimmer's and ant's were rounded to eight bits a weight
    "cheetah": "c-l>j%?g4*6ouz8T(n3?v#=B@`hlQFyN}^=2(6hMC$;%8gJ{!xrA~;4yExyuhXVizHD}a-!8ZL<XIk4ugCg"
        "{{7xZN_0)sCg{b8c43w5N@rWU_oSH4x?vQXBGoKL;U*g310|0s8|*hYCc%d^;u_190Ujd}{MR%DruV!{;GYgyGNT6)"
        "=?UCAvx%tclSy-y3<32>B<ACL}A2L",
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
    "humanoid": "c-nQ;dsGuw9>DRd9xY0h)(Qv-kc7OSGm{4dA{q>>t+v+oXe+vEwbkyTE9dxVX?@iCXmP7nJqUz|33*MDnP"
        "f7PNdgiiDA4tBd}7xJurA`RWvjAaZME8+`~m+lbM86w&)j>zpFe($U$MYa0QLi_x@33H^{smm^WXG0kD%ZQm;k^|us"
        "rnzXIJUNaX<OnpOXIr%)<g^K!H|J2*B&$FQ5s02PP!}fPk(yKyT87l)ib3^ZQFL-(NlDF_42=(4PWK$G6@BS9}-lJ<"
        "l#p&E3QK?9F}PBACnk{RVh+6%e2YTm{QODF7Dm{sK^|;O=oOUuSns>PDuf6@Z7}AW#f}{>O@s4B4v|XU+bxY|-t#!_"
        "GgQ1M|Q$a1P7__nqJxco|$_HvDw;+Opr?*}k{3@8#8d9w+@P_qDAzH}4qMPyF7^ty;1u^l4t&yJ_i?e^&H%97%esA6"
        "@r(adi6!NyYQG-_P1`dGMF=q+m5Zyo}4w`=V#}cuDdxSHpPKN4EyL_t>I42Jd`bto={&k6FGy*WNB&mwcciB{ubD6{"
        "qPE^{c~ZoBq4N%BGfEF86+>yqdJ;rL&b;D}TwAuX(mA^s~ArdAR88j&fW1fML@e=^t?Cmwog6H4i2Yy)ys7!~#{v`&"
        "G-r<QCKMN3pblyTS57)6`k#&BViM=<ey1NGogYcN~7@1k=;={GJEBJs-SwrR(XPlnwf9W$k;LJwLqqBuRXK-V~$dQ2"
        "Qdd?3>CD2XD0uPq>nvUB2bywAFL}dwR`^5tp-_G&f_#!F?Ny|7Kx#MqTdR(TqF1Jz4wpL{a74p|M;(9&u^!&AU<Db<"
        "0`%^`@ao2S!~WS(@w0(SxUc@A~rF>HiqZrESE;MqDj4r@X4GGxc3-t{8RcB6HTP@85qdy{%yU<P~GN{4nCuzH4&#TV"
        "3js_wIH+$+$P_GC-%#E{~m{R5j(#7l_7k*_E@fVwJx8f(aaI^le^HG*0}Y`lX|Lrg>m^{h~*qcP2yxfwz0*+37K>bL"
        "G*Uo&_1pe(M$(Dq7~?+dg@vMg<paJp1<Y%g&sE{jHsJ>*P*4vTyiw8~@T!*~Lw>c7E{{J4;VHPMeRN{OOw+$?e$6ZI"
        "^a0>D*@PUOxZH#U&}O2ai5ns7oy<+${z9!G(&$>zc2xAAD?>TE;FdO>I4S$o}GL2GL|K*!W4o&!?w!-dg-_(vDqQZc"
        "KV}_5t3s89C_E2W82;+vjIodtT5tRQ!~@-oJ6AsPGy455<KW__(#(6|i-*C^uN3m;XBRNY%2x3gaDP6`dL>T2gCi&7"
        "0iU^s#lFeEhS~qQB3{k`8oMnm3$Z+7<YGtfJ6J(L=6ex@;@7;duMGj%PKaMR0Pe`R>A4+n`DGeZ}xtMFwLW&;XnPp%"
        "4pCES-!9`-lKg04D%JAjoN`PArbtZbj{hDP;r(5Mm~a6@WJ84Kee{?+2h5Xj(w@WEiO})R7skK)s8|26?~>GQEJuvh"
        "mDy+=h$>VUAsRLQLZx5N9?=00~GnvmXqi%wi5K0fZhzVzeVTOUsADN@rLlV2;oMxdb?!Hd~#L%Vlx19o%fbMvUp0%f"
        "KKEWWXI{KD0o?OsctxwiYC+ZVJ(eUlOHtFy)8nfD92+>Ku$Kw`a)&*>1F|8nxML(0Uvt6(xlRzZZfUd=$S!uOlFZU3"
        "{!<j-kM)48?+Elp^yol^96`GfBV9g{Wbl140jD89Wy+!zSifBrZNIB|LM_6k(A(L?ux84YTqIN{LBTZAxRvM3Ne5*c"
        "(A~0m3H}c?1f=kJ6Z0WP!LDSzfNCUS_jNgm$OJts%8%j0DV5yQHYvUDOhWX<Ftsmo&EfqmAKave`*t!Nw?|R$_9<3y"
        "~2FmkRI<%*}S7-gK^0kR`DRL<ppXiVz%<z>WZ-i#6)Cbe@>!V_b@me5y$k4e8)8W205c)Jh0JDJn;9ljpkJRW%8lnc"
        "{je*RBvFc*#kF(n~-*pW4yUsDmKfjwW21jDAfF)@3jzjEx!bBXCeAL?~Fshr|h!gbga>qgG4M3rXghisX?95)j}@Lo"
        "6Sn{Fpc4qA?+e#;fxazOXNfIB~+~_V~rLT<vB<wmQZnVUsJc@H|3M2%*o!i6Dz|c~MGKR1^-<TA3)}qKxWw%}Bx|VS"
        "@#{Q~-mJh#dDi@me=ylCbe`1p;T5n<Qwc1yMjAm>(d+F}<FqBjN^Myl9RgUx&vca7gU&lR-SHmFT$|1%e}7Hp|a*Nx"
        "jE1E#`Vma?IipYNco}RHCuM9$P@6;=LYkgTh(@lbKrL#%3qZmnowD`o<<4ijZs%tO`&V2`Ohdc*i*nxndD&N4-{zUl"
        "(>m8g)F5Yo%d{8=_{n&OwQw-$%5Dio-3U5S<sa;E)EAA()7UTymM84k~bwI~5gi1cExAS&pKd6C91e;)`esF^*0paJ"
        "h(LV^q>asmu~%ORFKO!)Ha5Ff0#hP$nl7)p>A4f!NqACC|*x%ocj3X%>$QlcXhzG$kQx(8CSjDqcst7}9AW%y*{9Xf"
        "!x+hfH6fAaK1h+XDw8lto3!NkTb;&qLkf+$<~4j`3Njmy;->;zpd7>LenFI@Q{WLP4buVv2MvZVeq#Gc_brMF{0`H!"
        "V}rutMQ>S0!o^RVQ*dm>3N?*|JEeP|gXfoGu|$9FKaM)T&I${{isX8qN",
}

if __name__ == "__main__":
    sys.exit(main())
