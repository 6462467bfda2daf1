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
    python masklam.py --preset smoke               every stage in a minute, to see that it works
    python masklam.py --seeds 3                    seeds 0, 1, 2 and their summary.json
    python masklam.py --task cheetah --train-expert      search the expert anew, print its literal

A run needs only a CPU and writes runs/<task>-<preset>-<distractor>-<seed>/: results.json, figures,
an animation, and a cache that a second run reuses. Every stage is a function of a Config and arrays
for notebooks and forks to call; only section 14 knows where files live.

Shapes: E episodes, T steps, B batch, C H W image, A action, Z latent, D distractor velocities.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pickle
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

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from tqdm import tqdm

# ==== 2. Config ===================================================================================
# Every number that shapes a run, once: its type, default, meaning and allowed range. The command
# line is made from this class, so a new field is a new flag. Presets are plain overrides.
DISTRACTORS = ("none", "low", "hard")
METHODS = {"lapo": 1.0, "masklam": 0.0}  # name -> weight of the background in the loss
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_FILES = {"vit_b": "sam_vit_b_01ec64.pth", "vit_l": "sam_vit_l_0b3195.pth",
             "vit_h": "sam_vit_h_4b8939.pth"}  # official names end in the start of their SHA-256

def option(default, text, low=None, high=None, choices=None):
    """A dataclass field that knows its help text and what values it allows."""
    return field(default=default, metadata=dict(help=text, low=low, high=high, choices=choices))

@dataclass(frozen=True)
class Config:
    """All settings of a run; see `option` for what each one means."""
    task: str = option("cheetah", "which agent: a name, or the id of a Gymnasium environment")
    seed: int = option(0, "of everything random in the run", 0, 10**6)
    methods: tuple[str, ...] = option(("lapo", "masklam"), "what to train", choices=tuple(METHODS))
    # Recording
    distractor: str = option("low", "what moves besides the agent", choices=DISTRACTORS)
    correlation: float = option(0.5, "of background motion with the action (rho)", 0, 1)
    episodes: int = option(500, "recorded for training", 4, 10**6)
    heldout_episodes: int = option(100, "recorded for probing only", 2, 10**6)
    steps: int = option(100, "per recorded episode", 8, 1000)
    action_noise: float = option(1.0, "times the task's noise; an episode draws from 0 to it", 0, 9)
    frame_size: int = option(64, "pixels; the paper's 64", 16, 512)
    # Masks
    masks: str = option("auto", "their source; auto: sam if its checkpoint is on disk",
                        choices=("auto", "simulator", "student", "sam"))
    sam_model: str = option("vit_b", "which SAM", choices=tuple(SAM_FILES))
    sam_checkpoint: str = option("", "its file; default: the official one, downloaded once")
    prompt: tuple[str, ...] = option((), "points for SAM, pixels: x,y on the agent, -x,y off it")
    keyframes: int = option(64, "frames that SAM segments and the student learns from", 4, 10**6)
    student_updates: int = option(600, "optimiser steps", 1, 10**8)
    erode: int = option(0, "pixels taken off the border of every mask", 0, 64)
    dilate: int = option(0, "pixels added to the border of every mask", 0, 64)
    shift: int = option(0, "pixels by which masks lie too far right", 0, 512)
    occlude: float = option(0.0, "fraction of the agent that rectangles cut out of its mask", 0, 1)
    mask_input: bool = option(False, "mask as a fourth channel of what IDM, FDM and policy see")
    # Latent action model
    image_size: int = option(64, "pixels that the networks see; divides frame_size", 8, 512)
    background_weight: float = option(0.0, "b of masklam's loss; lapo is b = 1", 0, 1)
    latent_dim: int = option(128, "numbers in a latent action", 1, 8192)
    offset: int = option(10, "largest K of the future stack", 1, 100)
    patch: int = option(1, "pixels folded into channels before the first convolution", 1, 64)
    idm_widths: tuple[int, ...] = option((64, 128, 128), "channels of the IDM's stages", 1, 4096)
    fdm_widths: tuple[int, ...] = option((96, 192, 192), "channels of the FDM's stages", 1, 4096)
    blocks: int = option(2, "residual blocks a stage", 0, 16)
    hidden: int = option(0, "units between the last map and a vector; 0: none", 0, 8192)
    gate: bool = option(False, "FDM also multiplies its features by the latent's map")
    lam_updates: int = option(35156, "optimiser steps", 1, 10**8)
    batch_size: int = option(512, "windows per step, LAM and policy", 2, 10**5)
    lam_lr: float = option(6e-4, "peak learning rate", 0, 1)
    # Latent policy
    policy_updates: int = option(35156, "optimiser steps", 1, 10**8)
    policy_lr: float = option(4e-4, "peak learning rate", 0, 1)
    labels: int = option(1000, "labelled transitions that the action decoder may see", 1, 10**8)
    decoder_updates: int = option(25000, "optimiser steps", 1, 10**8)
    # Evaluation
    eval_episodes: int = option(20, "per policy, on unseen backgrounds", 1, 10**5)
    eval_steps: int = option(500, "per evaluation episode; 25 s of a cheetah", 1, 10**5)

LAPTOP = dict(image_size=32, latent_dim=32, offset=1, patch=4, idm_widths=(64,), fdm_widths=(64,),
              blocks=0, hidden=256, gate=True, lam_updates=1000, batch_size=128, lam_lr=2e-3,
              policy_updates=4000, policy_lr=2e-3, decoder_updates=1000)
PRESETS = {
    "smoke": LAPTOP | dict(episodes=8, heldout_episodes=2, steps=40, lam_updates=30,
                           policy_updates=20, decoder_updates=50, labels=80, eval_episodes=2,
                           eval_steps=40, batch_size=32),
    "laptop": LAPTOP,  # two CPU cores, a quarter of an hour
    "gpu": dict(episodes=1000, steps=250, keyframes=512, lam_updates=10000,
                policy_updates=10000, decoder_updates=5000),
    "paper": dict(episodes=5000, steps=1000, keyframes=512, labels=128_000),  # the authors' sizes
}

class UserError(Exception):
    """Something the user can mend: reported as one line, exit status 2."""

def first_line(error) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:100]

def check_config(config: Config):
    """Raise UserError unless every field is allowed and they fit together."""
    for f in fields(config):
        value, limits = getattr(config, f.name), f.metadata
        flag = "--" + f.name.replace("_", "-")
        for v in value if isinstance(value, tuple) else (value,):
            if limits["choices"] and v not in limits["choices"]:
                raise UserError(f"{flag} is {v!r}; allowed: {', '.join(limits['choices'])}")
            low, high = limits["low"], limits["high"]
            if low is not None and not (math.isfinite(v) and low <= v <= high):
                raise UserError(f"{flag} is {v}; allowed: {low} to {high}")
    for point in config.prompt:
        if not re.fullmatch(r"-?\d+,\d+", point):
            raise UserError(f"--prompt is {point!r}; allowed: x,y or -x,y in pixels, like 32,28")
    try:
        state_env(config.task).model
    except (gym.error.Error, AttributeError) as error:
        raise UserError(f"--task is {config.task!r}; allowed: {', '.join(TASKS)}, or the id of one "
                        f"of Gymnasium's MuJoCo environments ({first_line(error)})") from error
    stride = encoder_stride(config.patch, config.idm_widths)
    if config.frame_size % config.image_size or config.image_size % stride:
        raise UserError(f"--image-size is {config.image_size}; allowed: multiples of {stride} "
                        f"(--patch, one halving a stage) dividing --frame-size {config.frame_size}")
    if len(config.idm_widths) != len(config.fdm_widths):
        raise UserError("--fdm-widths and --idm-widths must have the same number of stages")
    if config.labels > config.episodes * config.steps:
        raise UserError(f"--labels is {config.labels}; allowed: 1 to --episodes times --steps, "
                        f"{config.episodes * config.steps}")

def random(*purpose) -> np.random.Generator:
    """A generator for (seed, purpose, ...): the same arguments give the same numbers."""
    return np.random.default_rng([p if isinstance(p, int) else zlib.crc32(p.encode())
                                  for p in purpose])

# ==== 3. Tasks and experts ========================================================================
# A task is a Gymnasium MuJoCo environment, a camera that shows its agent whole, on a twentieth
# of the frame, and an expert to record: one small matrix, found by augmented random search (ARS
# V2-t, arXiv 1803.07055) with the trainer below. Linear policies run well, and fit in this file.
@dataclass(frozen=True)
class Task:
    """An environment, its camera, the search that found its expert, and the expert itself."""
    env_id: str
    camera: tuple[float, float, float] | None = None  # see AgentRenderer
    noise: float = 0.1  # largest action noise of a recording, of actions scaled to [-1, 1]
    search: dict = field(default_factory=dict)  # arguments of `train_expert`
    expert: str = ""  # linear policy: bias and weights (A, 1 + S), float16, deflated, base 85
    options: dict = field(default_factory=dict)  # of gym.make
    cycle: int = 0  # steps of a gait, for an expert that sees a clock; see expert_input

TASKS = {
    "cheetah": Task(  # --train-expert, 9 minutes; returns 4714 on average of 100 seeds, falls in 6
        "HalfCheetah-v5", (2.6, -8, 0), 0.45,
        dict(directions=32, top=8, size=0.1, noise=0.4, gain=0.8, budget=10_000_000, horizon=500),
        "c-jHj04M*ct64Eyv#Kr;Jv6-gG{-&4H9av=DN?Z)Bub?-oKYobnsX~TwPd?TsZYH6EX^>UDY&w|sZ=lQwaqZQtRf<"
        ")rko?kC!-HdvskTNtEM~;v+cN6FAS{`H6Ac2E|0G|ChMqWnL#B+pG~1+xmm@WHOsuHGsrAJG<dnStJSYmwlOm%ru8"
        "I6qtB%`C*G%zEC)I3rpB`~H3m7VyVtp*oXDyiv<E9*s?jImsF<Grr}U)4HUYdHGWfbuw9T}hvEC*WIvBLoE~6|%q7"
        "4}4AdrzPD8{SRGi8n"),
    "hopper": Task(  # --train-expert, 30 minutes (beside the ant's); 3264 +- 5 on ten unseen seeds
        "Hopper-v5", (2.4, -8, 0.3), 0.1, dict(step=0.015, horizon=500),
        "c-jF-0Js0w!U{j>z@EL$sRuITH7~7+wg0b|C?ShoyM;V$#4J6_xo5ONwWKVRwzo2Erg<gtz#Btiy#7FAKrOWfxWlf"
        "cqoFXYq>U+Dyd>N", dict(frame_skip=10)),
    "walker": Task(  # --train-expert, 23 minutes; returns 4526 +- 55 on ten unseen seeds
        "Walker2d-v5", (2.4, -8, 0), 0.1, dict(directions=24, top=12, shift=0.5, horizon=500),
        "c-jHj04M)-ylOdhv9-M2H2$@&ulckgvo<k$v?;7AA-b6MB=aBwrsJvcyA!-8I3hK^ywf%Ww7;AvFrO}Mxyv7$9=5K"
        "Psih?TCX6P~y^20Ly>c%~DkHPpxCc0-s7tUwvo@l*EZizRBu1<Yq4_0VG7P*$HlVygu0%Q5xk@oYu@*3`uE(l~s7b"
        "3`sp%CeAvz?8!bvr0yihhSy!ST>o{qPmxZ1AIxdyA-Brd5x8G@g;t!l4)y?{XRxoEUfDljv&HM=;zFiW!$Ea9TKAg"
        "iDYBlV__rEjT$?q|j", dict(frame_skip=10)),
    "swimmer": Task(  # --train-expert, 9 minutes; returns 358 +- 2 on ten unseen seeds
        "Swimmer-v5", (4.4, -90, 0), 0.3, dict(directions=4, top=2, noise=0.2, budget=3_000_000),
        "c-jFZ0Neiztmrn_E0nu9E~GdHtyV0ounj5dl&?3~xLB_0Hd(U@G#@T64-ex"),
    "ant": Task(  # --train-expert, 34 minutes (beside the hopper's); 3405 on 40 seeds, falls in 13
        "Ant-v5", (4.2, -35, -0.1), 0.1,
        dict(directions=32, top=16, size=0.05, noise=0.1, shift=0, horizon=150),
        "c-jHL0YCmRz!*a`JbpGQz}_?!F1aucun{u$EJ-NcxemP&B(W_GFikDit4gW6DCL}(sV^sFCBd!Ls|2YaLn^_dy&*W"
        "ZFIG2Jl(@H$v=Opsupqd4HsHE8t!6Q<DbguxE4CaMAk!hrBNi-&qpPQJo(-`=HL<#2wuUXSxvs7Yw|_NYuk0z1I9{"
        "&Yw<<C`um&$bq`f4jF7q&ivDJ_tBjKKwC5WAoB|aWrHl{jSxI4cxJh!qmE+n)yIcz17H4(JExR<irtiB_CspF_jD0"
        "vg~kG8J0Aq%Uxq~<4loeC&PK~ltBwk9+{JsUL~vqZX-xzV{BF}1RVrUW-3ufQ#zEJUFkF>o!aCuE*fs#P5GBi0~zq"
        "dqFzwgf6&I@CQZsm`siFO-yZG;Xz7G<i4fur{}?EQl$ltRN>#s2U}QCEKSBA(66`sGJ<oBqpD;vr0TqIs(1YJV-v;"
        "wH&rICQuxzxsy4gCWo(&D*G)uE~1~nCSokmA2S@Q9W$A%vGXZqAqShvyIv%}Jxw^gJYOp^u|6&0sQNS(tpYKPG$pg"
        "ZEfpTYq{o-7q>YuQqL?2RAxWrTsl&3)B50rkmBcv",
        dict(include_cfrc_ext_in_observation=False)),
    "humanoid": Task(  # not by --train-expert alone, see README; 6469 +- 32 on ten unseen seeds
        "Humanoid-v5", (2.8, -8, -0.15), 0.1, {},
        "c-lSE3s4hx9>DRxIx31vYXyvukc5OJ<h8qbV0dW|T3fBwcC-~ZwOXZD<YdN2we?Y-J-n(_hgXP5AdgM5n`|~u5D-w"
        "H=VN?g&j)y(;+^HHa$;?@+WU!}?o4)P{<E|H-#_0^W9C=Jgm#1$2N7I*Pa@<GR0i@AcG7);D}fCOyJ<pilK+h{gs!"
        ";{F{BrvCrX4y*<QZA&4*B-I5z1;J->3hI6vt@{fNpR_#SCz!_zvJ{9gn5{Yo$*WXgQ`WrW%ogfi-0uD;oU&}Z;#g4"
        "J&bgvNNHJTKRY9E5tbZ?z(HGZJ-dR49hHT|GNvp?*5s&&ju6@ZPIkZXeG)<{_j=L#Wz?Q2(?TxaSIwBy6x;7b4Te8"
        "n@tV{aw!UdR|I?QfxzV%C4h)>F2?>={-(_&cSJC!Q`L8o^P=TJ!CIw5Mp4yJ{+M-5rhihnLm6&a~?t;FmnyCPgvO^"
        "2=204eT7*?x(1OQ9~0_T5w?k;ICZ)hp$Bk^{d$Cyibpb-$oAN#w0vyItl_0B6D$;P6J`j$=M`HQ2yXCpi-xo|>7S_"
        "6@b+x@XP&`sr$Y!$l_PY|VS~vo!^#95LKn3#;RJ*}owZ!Ks-w8|7h+yyi)MFIS>SeX0<qk)OZGSt75tYz8GpmS!E+"
        "5;7u@O{k{gK8(r^6^jUcI<S|nJY2sC`kO_Rro-{ZwO;z?QgKPxwpH!WQahpM8;cWV1-k}P63Ds%E88Cx<x^hCLGus"
        "PV4`g?A!zeIGQYtZnMzLbf=e9FoOS~^rw&>@&9%1lfD!q}(U85r3j^F^~25xc*h9hs({_Oa?ZHNf^VyL^^u5q7I*P"
        "=3q4gUHe7@c+1@t>0r@(tYsHR5j;@FyCGzjOOgKY?8+CTg($>*X-pYKHijip7A?>o@G60%(hUI!@s79i8^(n*sm<~"
        "m@_YA-JJe8qw-%;MNunK$Er_tl&QGJrGcMvlUW73Li;RrSt#K8F{~l_^wHiSCfj{VzEx7{w1`WU15Bo8EqN=LO8ut"
        "6CEeyPvD<>#91pk3bzd;X{HXRd`5eoA%V=48in^i8_JO(FQJ@X6tZx0uT;mbuA>NV@rx~!{N%fJXnn6cy_Qck#&>7"
        "qmWP%Uml@82wC+|dKOlR2B7D;Ga75b)`&x)GMY@__S)KlM?Mp2}Xxv#mY>Z3kXyn$VG^<YogTj3b0gf^t|#45U)^F"
        "FoC;Y|F_`a1c<6%{WP+_TLVkLMa?X3GI_r(^+vW5v3!v9j!sh(Y=~)+!sqM_Dg=;|ZR=v}JwcF~cO?^5Cqr|4L5?S"
        "GbqF@{$c+rf>0s7wxG?cOa-2;GEDBV!vmPtVCy2|687*p;Wgp@IrzYKX_3rvVfQ5yY^cSZTX0*gWN6hXt9pBW9n$B"
        "q_#|YNARejUr9=fh>bLOIR;)-;DrG%Lhzy~v4WRI@PdIC8oZE06`#EF(ga>SJGI~i@6_Mqq^Yh_Ic!hly5GiDn|2U"
        "uJ&%Yn_&y(aNdYf@@FI^Effp%emkZ-KcFV<shpGLX<HBFbo|G>|e<df^{lm=nHM!1Xei?Yl1uqKl5(Y0`@In`=z)K"
        "5w!N7|Lytu}yJ6?Iwf)_$TfESlV&v-5|8E#W3#{GIkPt@3Q>D$a@ce7)Y6TC>livqkjx)Z^RrKg6iO_Hy$tmgD{_q"
        "r|%;*&eX>E@Bban2<v<&uIxh+u=@r5(KZz>6QexWJ2lPy$}E!HW;P=)j8vGky2Uiwe9LR_VbD(dpaXI4;u5ywluc)"
        "A;kK_o+MHZr2k($9tCoF9di|fEO3f241QM96?un{0u=U)#5ms=(nn!Rf1CSbMai8gxl#@z~W4C5WKX47bSRcf)^2Z"
        "VR<3&VgN5e@Dc_u^()-l+mo{A&)k%`Y`Q_;OP_7Y4I}(Opi$~}uJg=gvwb6IY2<~jQa09bSg=bwN$DhT8Yfl@79>7"
        "Q2zcfRN7=)vVwbn#-Dx+?3KOq3o@$ZRRoKi+orhDl>71!^Nsg}|@Jn8=R$P~fZ*sO;W_oGmX7x(pYj0Myt2=NkJ+w"
        "x5ig}kRlwZiTwI;O>822`}*}CbVs7*dj*&PXb!nJ!Ehnh~%9hfM5o_&;9>^z6BRcCp(`M;pPViPg0$}lBpwF*xhG4"
        "U(vk0t*g{aP}GjBe;8Dc91v&D43(&YDG`ZpUWKqV3fbw$EvQLZ8zuN{tEGW%nHqv5)-oXXx8vXQq=G%uZjb2f3#+z"
        "P9-RWzNA+QERj0N?>(xFzvA~(>#$b#uBypSiU@#Xrqov4g?#p7xqgEj-2r{1?zn2$~E*#NxI|5*c0S<NjLwxc%k^c"
        "nkeB`({{yr@+vuo|Mt-t{C!%Xc#?UFJ1I<R7iZk3iuuucq56jSjD3pzGV?qq-FQ3lNS4#|)X%D~nEGXFj7hEY+n`Z"
        "oxKUPaI79UePsD#yD1B$OS4mnn!mvuPC7_Jp`a0(%8X75~k!84%YMwCJ<V#GSX5cAOes)bwJrq}NE^z+Eo<g<Dy5j"
        "z5q=iNSXyk)N0%$}JH|l~$InYQCjWB5BK7P`con(YYnZu2&ZSqBi>U6WRjY*@&8E&hZc%L}y@FK4wJktNnoTY|F3T"
        "VU(HxgNee<x=;xYE?*0d99)nb6cwLY)yUPUs=Mu8sUZ8u_7-5gG-dkscaJh8rD+Ms3gtgGMT7gauwT(nBN16)iLhK"
        "hOv;nS3%KXE&HJx&%AIbf%nEbSa)Ws)Eo+1&wfMq+IEMM&-CTx+Yd=GTkBPOIr9H;=!Z2NfQ3I)F$Z=xi28JO-h_1"
        "heiQtq<}^tXk>#%DVH&5)DDfD&`1M~ruEDI4;$th&H",
        dict.fromkeys([f"include_{name}_in_observation" for name in
                       ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")], False), 60),
}

def get_task(name: str) -> Task:
    """The task of this name; any other name is taken for an environment id, with no expert yet."""
    return TASKS.get(name, Task(name))

def load_expert(task: str) -> np.ndarray:
    """A task's linear policy (A, 1 + S) f64, from its literal."""
    weights = np.frombuffer(zlib.decompress(base64.b85decode(get_task(task).expert)), np.float16)
    return weights.reshape(len(state_env(task).action_space.low), -1).astype(float)

def expert_action(expert: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Linear policy (A, 1 + S) at its input (S,) -> action (A,), not yet clipped."""
    return expert[:, 0] + expert[:, 1:] @ seen

def expert_input(task: str, state: np.ndarray, t: int) -> np.ndarray:
    """What an expert sees of an observation at step t; a task without `cycle` shows it as it is.

    A humanoid's feet are points on which nothing can stand, so its expert steps to a clock: it
    also sees sine and cosine of the gait's phase, and their products with the trunk's attitude
    and velocity, as a leg that swings must answer them otherwise than one that stands."""
    cycle = get_task(task).cycle
    if not cycle:
        return state
    clock = np.array([np.sin(2 * np.pi * t / cycle), np.cos(2 * np.pi * t / cycle)])
    trunk = state[np.r_[0:5, 22:28]]  # height, attitude, velocities
    return np.concatenate([state, clock, np.outer(clock, trunk).ravel()])

def bare_env(task: str):
    """A task's environment without wrappers and time limit; it observes the state."""
    mujoco.set_mju_user_warning(lambda _: None)  # models' deprecations, also to ./MUJOCO_LOG.TXT
    entry = get_task(task)
    return gym.make(entry.env_id, disable_env_checker=True, **entry.options).unwrapped

state_env = functools.cache(bare_env)  # a process needs only one of each

def state_rollout(job) -> tuple[float, int, np.ndarray, np.ndarray]:
    """One episode of (task, expert or None for random actions, seed, steps, noise, gain).
    Clipped actions are multiplied by gain and disturbed by Gaussian noise.
    Returns the return, the number of steps, and sum and sum of squares of the expert's inputs."""
    task, expert, seed, steps, noise, gain = job
    env, rng = state_env(task), random(seed, "rollout")
    low, high = env.action_space.low, env.action_space.high
    state, _ = env.reset(seed=seed)
    total, inputs = 0.0, []
    for t in range(steps):
        inputs.append(expert_input(task, state, t))
        action = rng.uniform(low, high) if expert is None else expert_action(expert, inputs[-1])
        action = gain * np.clip(action, low, high) + noise * high * rng.standard_normal(len(low))
        state, reward, terminated, _, _ = env.step(np.clip(action, low, high))
        total += reward
        if terminated:
            break
    return total, len(inputs), np.sum(inputs, 0), np.square(inputs).sum(0)

def search_pair(job):
    """Rollouts of (task, weights, mean, std, size, seed, steps, noise, gain), both ways."""
    task, weights, mean, std, size, seed, steps, noise, gain = job
    delta = size * random(seed, "direction").standard_normal(weights.shape)
    noise, gain = random(seed, "disturbance").uniform((0, gain), (noise, 1))
    return [state_rollout((task, fold_whitening(weights + d, mean, std), seed, steps, noise, gain))
            for d in (delta, -delta)]

def fold_whitening(weights, mean, std):
    """Policy on (state - mean) / std -> the same policy on the state, (A, 1 + S)."""
    return np.c_[-(weights / std) @ mean, weights / std]

def train_expert(task, directions=16, top=8, size=0.03, step=0.02, noise=0.15, gain=0.9,
                 shift=1.0, budget=4_000_000, horizon=1000, seed=0):
    """Augmented random search for a linear policy that survives being imitated.

    Each iteration tries `directions` random directions, normal of scale `size`, both ways and
    moves by `step` (decaying to a fifth) along the `top` best. Observations are whitened by running
    statistics. What a step pays for being upright is subtracted, so that standing still earns
    nothing; with `shift` < 1 only that part of it at first, so that a body stands before it walks.
    Clones err and regress to the mean, and plain ARS finds gaits that topple over that: so `size`
    is large, and actions are shrunk by a factor from `gain` to 1 and disturbed by noise of a scale
    from 0 to `noise`. Every 320 directions ten fixed episodes, half of them disturbed, decide
    whether this is the best policy so far. Stops after `budget` steps.
    Returns the literal for TASKS, and its returns on ten seeds never used in the search."""
    env = state_env(task)
    A, state = env.action_space.shape[0], np.zeros(env.observation_space.shape)
    S = len(expert_input(task, state, 0))
    upright = getattr(env, "_healthy_reward", 0)
    weights, mean, std = np.zeros((A, S)), np.zeros(S), np.ones(S)
    count, sums, squares, rng = 0, np.zeros(S), np.zeros(S), random(seed, "expert")
    best, best_return, iteration = None, -np.inf, 0
    with worker_pool() as pool, tqdm(total=budget, desc="expert", unit_scale=True) as bar:
        while count < budget:
            seeds = [int(s) for s in rng.integers(2**31, size=directions)]
            jobs = [(task, weights, mean, std, size, s, horizon, noise, gain) for s in seeds]
            pairs = list(pool.map(search_pair, jobs, chunksize=4))
            paid = upright * np.clip(count / (0.15 * budget), shift, 1)
            returns = np.array([[total - paid * n for total, n, *_ in pair] for pair in pairs])
            chosen = np.argsort(-returns.max(1))[:top]
            moves = sum((returns[i, 0] - returns[i, 1])
                        * random(seeds[i], "direction").standard_normal((A, S)) for i in chosen)
            decay = 1 - 0.8 * min(1, count / budget)
            weights = weights + decay * step / (top * returns[chosen].std() + 1e-9) * moves
            for _, n, total, square in (episode for pair in pairs for episode in pair):
                count, sums, squares = count + n, sums + total, squares + square
            mean = sums / count
            std = np.sqrt(np.maximum(squares / count - mean**2, 1e-8))
            bar.update(count - bar.n)
            iteration += 1
            if iteration % max(1, 320 // directions) == 0 or best is None:
                expert = fold_whitening(weights, mean, std).astype(np.float16)
                disturbed = ((0, 1), (noise / 2, (1 + gain) / 2))
                jobs = [(task, expert.astype(float), 10**5 + i, 1000, *disturbed[i % 2])
                        for i in range(10)]
                mean_return = np.mean([r[0] for r in pool.map(state_rollout, jobs)])
                if mean_return > best_return:
                    best, best_return = expert, mean_return
                bar.set_postfix(best=f"{best_return:.0f}")
        jobs = [(task, best.astype(float), 10**6 + i, 1000, 0, 1) for i in range(10)]
        unseen = [r[0] for r in pool.map(state_rollout, jobs)]
    return base64.b85encode(zlib.compress(best.tobytes())).decode(), unseen

# ==== 4. Renderer =================================================================================
# In: joint positions. Out: the agent alone, as premultiplied colour and soft alpha, which is at
# once what the distractors are composed behind and the simulator's own mask. Casting rays, where it
# may be and five at its outline, is fast, needs no OpenGL and looks the same anywhere.
NO_VIEW = (0.0, 0.0, 0.0, 1.0)  # azimuth, elevation, roll (degrees) and distance factor

def box_average(image: np.ndarray, factor: int) -> np.ndarray:
    """(..., H, W, C) u8 -> (..., H / factor, W / factor, C) u8; five times faster than mean()."""
    wide = np.uint16 if factor <= 16 else np.uint32
    rows = sum(image[..., i::factor, :, :].astype(wide) for i in range(factor))
    boxes = sum(rows[..., i::factor, :] for i in range(factor))
    return ((boxes + factor**2 // 2) // factor**2).astype(np.uint8)

class AgentRenderer:
    """Draws a Gymnasium MuJoCo agent from its joint positions, with a camera that follows it.

    model: the environment's MjModel. It is copied, and drawn with an MjData of its own: live
        frames would lag a physics substep behind, and syncing the environment's data changes it.
    camera: distance (metres), elevation (degrees) and how far above the initial centre of mass it
        aims (metres); None: -20 degrees, and the agent spans two thirds of the frame. It follows
        along the ground but keeps its height: with no floor in sight, jumps would be invisible.
    size: height and width of the images, pixels."""
    def __init__(self, model, camera=None, size=64):
        self.model, self.camera, self.size = copy.copy(model), camera, size
        self.data, self.colors = mujoco.MjData(self.model), model.geom_rgba[:, :3].copy()
        view_angle = math.radians(model.vis.global_.fovy)
        mujoco.mj_forward(self.model, self.data)
        self.agent, middle = np.flatnonzero(model.geom_bodyid > 0), self.data.subtree_com[1]
        if camera is None:
            reach = np.linalg.norm(self.data.geom_xpos - middle, axis=1) + model.geom_rbound
            self.camera = (1.5 * reach[self.agent].max() / math.tan(view_angle / 2), -20, 0)
        self.height = middle[2] + self.camera[2]
        middle, half = np.split(model.geom_aabb[self.agent, None], 2, axis=2)
        self.corners = middle + half * (np.indices((2, 2, 2)).reshape(3, 8).T * 2 - 1)  # (G, 8, 3)
        self.pixel = 2 * math.tan(view_angle / 2) / size  # at 1 m
        # Five rays a pixel, no two of them in a row or column; the first is in the middle.
        inside = np.array([(0, 0), (-2, -1), (-1, 2), (1, -2), (2, 1)]) / 5
        places = np.indices((size, size)).reshape(2, -1, 1) + 0.5 - size / 2 + inside.T[:, None]
        rays = np.stack([*self.pixel * places[::-1], np.ones_like(places[0])], -1)
        self.rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)  # (size^2, 5, 3)
        self.view = None

    def __call__(self, qpos, view=NO_VIEW, tint=None):
        """Draw one state.
        qpos: (nq,) joint positions. view: see NO_VIEW. tint: (ngeom, 3) added to the colours.
        Returns rgb (size, size, 3) u8, premultiplied by alpha, and alpha (size, size) u8."""
        n, colors = self.size, self.colors if tint is None else (self.colors + tint).clip(0, 1)
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        if self.view is None or (self.view != view).any():
            self._turn(np.array(view))
        middle = np.array([*self.data.subtree_com[1, :2], self.height])
        self.eye = middle - self.camera[0] * view[3] * self.axes[2]
        # The projected corners of a geom's box say which pixels it may cover.
        turned = self.corners @ self.data.geom_xmat[self.agent].reshape(-1, 3, 3).transpose(0, 2, 1)
        seen = (turned + self.data.geom_xpos[self.agent, None] - self.eye) @ self.axes.T
        plane = seen[..., :2] / np.maximum(seen[..., 2:], 0.1) / self.pixel + n / 2
        covered, rgba = np.zeros((n, n), bool), np.zeros((n * n, 4), np.float32)
        boxes = np.c_[plane.min(1), plane.max(1) + 1].clip(0, n).astype(int)
        for left, top, right, bottom in boxes.tolist():
            covered[top:bottom, left:right] = True
        pixels = np.flatnonzero(covered)
        rgba[pixels] = self._cast(self.turned[pixels, 0], colors)
        agent, outline = rgba[:, 3].reshape(n, n) > 0, np.zeros((n, n), bool)
        for a, edge in ((agent, outline), (agent.T, outline.T)):
            differs = a[1:] != a[:-1]
            edge[1:] |= differs
            edge[:-1] |= differs
        pixels = np.flatnonzero(outline)
        around = self._cast(self.turned[pixels, 1:].reshape(-1, 3), colors).reshape(-1, 4, 4)
        rgba[pixels] = (rgba[pixels] + around.sum(1)) / 5
        rgba = (rgba + 0.5).astype(np.uint8).reshape(n, n, 4)
        return rgba[..., :3], rgba[..., 3]

    def _turn(self, view):
        """Turn the camera: `axes` (3, 3), right, down and ahead, and `turned`, all rays."""
        degrees = (90 + view[0], self.camera[1] + view[1], view[2])
        (ca, ce, cr), (sa, se, sr) = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        ahead, side = np.array([ca * ce, sa * ce, se]), np.array([sa, -ca, 0])
        up = np.array([-ca * se, -sa * se, ce])
        self.axes = np.stack([cr * side - sr * up, -cr * up - sr * side, ahead])
        self.view, self.turned = view, self.rays @ self.axes

    def _cast(self, rays, colors):
        """Rays (n, 3) from the eye -> colours (n, 4) f32 up to 255, lit from the eye and above."""
        n = len(rays)
        geom, distance, normal = np.zeros(n, np.int32), np.zeros(n), np.zeros((n, 3))
        mujoco.mj_multiRay(self.model, self.data, self.eye, rays.ravel(), None, False, -1, geom,
                           distance, normal.reshape(-1), n, mujoco.mjMAXVAL)
        hit, rgba = np.flatnonzero(geom >= 0), np.zeros((n, 4), np.float32)
        facing = np.abs(np.einsum("ni,ni->n", normal[hit], rays[hit]))
        light = 0.4 + 0.4 * facing + normal[hit, 2].clip(0)
        rgba[hit, :3] = (255 * colors[geom[hit]] * light[:, None]).clip(0, 255)
        rgba[hit, 3] = 255
        return rgba

# ==== 5. Distractors ==============================================================================
# In: a Gymnasium MuJoCo environment. Out: the same environment with 64x64 pixel observations in
# which everything but the agent moves too, partly following the agent's actions. Stationary or
# smooth backgrounds are easy: what ruins a latent action is many sharp edges moving independently.
class Backdrop:
    """Two scrolling textures and 12 two-coloured sprites, each with a velocity of its own.

    In pixels a step, v = SPEED * (rho * P a + sqrt(1 - rho^2) * u), with a the executed action
    scaled to [-1, 1], P a random projection that is the same for every episode (P a has unit
    variance when actions are uniformly random), and u unit-variance Ornstein-Uhlenbeck noise.
    Colours, shapes, places and u change with `rng`."""
    TEXTURES, SPRITES, SPEED, PERSISTENCE = 2, 12, 3.5, 0.5
    COLORS = (128, 256, 256)  # upper ends of red, green, blue: cool, as the agents are warm

    def __init__(self, rng, action_dim, correlation=0.5, size=64):
        self.rng, self.correlation, self.size = rng, correlation, size
        self.margin = size // 2  # sprites wrap around out of sight
        self.period = size + 2 * self.margin
        D = 2 * (self.TEXTURES + self.SPRITES)
        rows = np.random.default_rng(0).standard_normal((D, action_dim))
        self.projection = rows * np.sqrt(3) / np.linalg.norm(rows, axis=1, keepdims=True)
        self.noise = rng.standard_normal(D)
        self.velocity = np.zeros(D, np.float32)
        self.position = rng.uniform(0, self.period, (D // 2, 2))
        self.horizon = self.margin + int(rng.integers(size // 3, 2 * size // 3))
        # Each texture is 8x8 random blocks, tiled twice so that any scroll is one slice.
        blocks = self._colors(self.TEXTURES, 8, 8)
        tiles = blocks.repeat(self.period // 8, axis=1).repeat(self.period // 8, axis=2)
        self.textures = np.tile(tiles, (1, 2, 2))
        self.sprites = [self._sprite() for _ in range(self.SPRITES)]

    def _colors(self, *shape):
        """Random colours, RGB and nothing in the four bytes of a u32: they copy as one number."""
        rgb = np.zeros((*shape, 4), np.uint8)
        rgb[..., :3] = self.rng.integers(0, self.COLORS, (*shape, 3))
        return rgb.view(np.uint32)[..., 0]

    def _sprite(self):
        """A disc, box or diamond, half and half -> colours (s, s) u32, outline (s, s) bool."""
        s = int(self.rng.integers(self.size // 3, self.margin + 1))
        y, x = np.mgrid[:s, :s] - (s - 1) / 2
        shape = self.rng.integers(3)
        reach = (np.hypot(x, y), np.maximum(abs(x), abs(y)) * 1.2, abs(x) + abs(y))[shape]
        angle = self.rng.uniform(0, np.pi)
        side = (np.cos(angle) * x + np.sin(angle) * y > 0).astype(int)
        return self._colors(2)[side], reach <= s / 2

    def step(self, action):
        """Move everything; action: (A,) as executed, scaled to [-1, 1]."""
        keep, rho = self.PERSISTENCE, self.correlation
        fresh = self.rng.standard_normal(self.noise.shape)
        self.noise = keep * self.noise + np.sqrt(1 - keep**2) * fresh
        drive = rho * self.projection @ action + np.sqrt(1 - rho**2) * self.noise
        self.velocity = (self.SPEED * drive).astype(np.float32)
        self.position = (self.position + self.velocity.reshape(-1, 2)) % self.period

    def draw(self) -> np.ndarray:
        """-> (size, size, 3) u8."""
        canvas = np.empty((self.period, self.period), np.uint32)
        places = self.position.astype(int)
        bands = (slice(0, self.horizon), slice(self.horizon, self.period))
        for texture, (y, x), band in zip(self.textures, places, bands):
            canvas[band] = texture[y:y + self.period, x:x + self.period][band]
        for (colors, outline), (y, x) in zip(self.sprites, places[self.TEXTURES:]):
            spot = canvas[y:y + len(colors), x:x + len(colors)]  # clipped at the canvas's edge
            h, w = spot.shape[:2]
            np.copyto(spot, colors[:h, :w], where=outline[:h, :w])
        inside = slice(self.margin, self.margin + self.size)
        return canvas[inside, inside, None].view(np.uint8)[..., :3]

class Distractors(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Pixel observations (size, size, 3) u8 of a MuJoCo environment, with moving distractors.

    level: "none" (a plain background), "low" (a Backdrop behind the agent, camera fixed) or "hard"
        (also camera and agent colours on the random walks of the Distracting Control Suite,
        arXiv 2101.02722, at `SCALE`). correlation: its rho. camera, size: see AgentRenderer.
    info: "state" the wrapped observation, "mask" (size, size) u8 alpha of the agent, "distractor"
        (D,) f32 velocities of the background, pixels a step, "action" (A,) f32 as executed.
    reset(seed=s) seeds physics and distractors; equal seeds give equal frames."""
    SCALE = 0.1  # of the Distracting Control Suite; its "easy" level

    def __init__(self, env, level="low", correlation=0.5, camera=None, size=64):
        gym.utils.RecordConstructorArgs.__init__(
            self, level=level, correlation=correlation, camera=camera, size=size)
        super().__init__(env)
        if level not in DISTRACTORS:
            raise ValueError(f"level is {level!r}; it must be one of {', '.join(DISTRACTORS)}")
        self.level, self.correlation, self.size = level, correlation, size
        self.renderer = AgentRenderer(env.unwrapped.model, camera, size)
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.rng, self.frame = np.random.default_rng(), None
        self.plain = np.full((size, size, 3), (70, 105, 140), np.uint8)

    def reset(self, *, seed=None, options=None):
        state, info = self.env.reset(seed=seed, options=options)
        if seed is not None:
            self.rng = np.random.default_rng([seed, 1])
        action_dim, geoms = self.action_space.shape[0], self.unwrapped.model.ngeom
        self.backdrop = Backdrop(self.rng, action_dim, self.correlation, self.size)
        self.limit = self.SCALE * np.array([90, 90, 90, 0.5] + [1] * 3 * geoms)
        self.pose = self.rng.uniform(-self.limit, self.limit)  # view, then a tint of every geom
        self.drift = np.zeros(len(self.pose))
        return self._observe(state, info, np.zeros(action_dim, np.float32))

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
        hard = (self.pose[:4] + NO_VIEW, self.pose[4:].reshape(-1, 3))
        rgb, mask = self.renderer(self.unwrapped.data.qpos, *hard if self.level == "hard" else ())
        behind = self.plain if self.level == "none" else self.backdrop.draw()
        weighted = behind * (255 - mask.astype(np.uint16))[..., None]
        self.frame = rgb + ((weighted + 128) // 255).astype(np.uint8)
        return self.frame, info | {"state": state, "mask": mask, "action": executed,
                                   "distractor": self.backdrop.velocity.copy()}

    def render(self):
        return self.frame

# ==== 6. Video ====================================================================================
# In: a task, its expert and a distractor level. Out: episodes in memory-mapped arrays, and index
# arithmetic that cuts training windows from them. Everything after this section is off-line.
@dataclass
class Video:
    """Recorded episodes; frames[e, t] is what the agent sees when it chooses actions[e, t].

    frames (E, T, H, W, 3) u8; masks (E, T, H, W) u8, 255 = agent; actions (E, T, A), executed, only
    for probe, decoder and references; rewards (E, T); states (E, T, S); distractor (E, T, D), how
    the background moved from t to t + 1, all f32; length (E,) i64, steps until an episode ended."""
    frames: np.ndarray
    masks: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    states: np.ndarray
    distractor: np.ndarray
    length: np.ndarray

    @classmethod
    def open(cls, folder, mode="r"):
        """Map the arrays of a folder; UserError if one is damaged or missing."""
        try:
            return cls(*(np.load(Path(folder) / f"{f.name}.npy", mode) for f in fields(cls)))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is damaged ({first_line(error)}); pass --fresh") from error

    @classmethod
    def create(cls, folder, E, T, size, A, S, D):
        """Make empty files, length last; length 0 marks an episode still to be recorded."""
        shapes = dict(frames=(E, T, size, size, 3), masks=(E, T, size, size), actions=(E, T, A),
                      rewards=(E, T), states=(E, T, S), distractor=(E, T, D), length=(E,))
        types = dict(frames=np.uint8, masks=np.uint8, length=np.int64)
        folder.mkdir(parents=True, exist_ok=True)
        for name, shape in shapes.items():
            path = folder / f"{name}.npy"
            np.lib.format.open_memmap(path, "w+", types.get(name, np.float32), shape).flush()

    @property
    def valid(self) -> np.ndarray:
        """(E, T) bool: which frames were recorded, before the end of their episode."""
        return np.arange(self.frames.shape[1]) < self.length[:, None]

    def shrink(self, size):
        """Frames and masks box-averaged down to size x size pixels, in memory."""
        factor = self.frames.shape[2] // size
        frames, masks = (np.stack([box_average(episode, factor) for episode in x])
                         for x in (self.frames, self.masks[..., None]))
        return replace(self, frames=frames, masks=masks[..., 0])

def start_worker():
    """Prepare a worker process: one thread, and no life without its parent."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

@contextlib.contextmanager
def worker_pool():
    """One process a core; what has not started when the block is left, Ctrl-C too, never will."""
    context = multiprocessing.get_context("spawn")  # fork does not mix with threads
    pool = futures.ProcessPoolExecutor(os.cpu_count(), context, start_worker)
    try:
        # Workers inherit a blocked SIGINT; this process acts on it when all have started.
        caught, held = [], signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        previous = signal.signal(signal.SIGINT, lambda *_: caught.append(True))
        try:
            for _ in range(os.cpu_count()):
                pool.submit(os.getpid)  # each starts a process
        finally:
            signal.signal(signal.SIGINT, previous)
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        if caught:  # by another thread
            raise KeyboardInterrupt
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)

def episode_seed(config, split, index):
    """Environment seed of an episode; splits never share one, nor do runs with other seeds."""
    block = ("training", "heldout", "decorrelated", "evaluate").index(split)
    return config.seed * 10**6 + block * 250_000 + index

def make_env(config):
    """The task's environment with the config's distractors."""
    return Distractors(bare_env(config.task), config.distractor, config.correlation,
                       get_task(config.task).camera, config.frame_size)

cached_env = functools.lru_cache(1)(make_env)  # a worker process uses one environment for long

def record_episode(job) -> int:
    """Record episode `index` of (config, folder, index, seed) into its files."""
    config, folder, index, seed = job
    env, video, rng = cached_env(config), Video.open(folder, "r+"), random(seed, "act")
    frame, info = env.reset(seed=seed)
    expert = load_expert(config.task)
    noise_scale = rng.uniform(0, config.action_noise * get_task(config.task).noise)
    for t in range(config.steps):
        video.frames[index, t], video.masks[index, t] = frame, info["mask"]
        video.states[index, t] = info["state"]
        noise = noise_scale * env.action_space.high * rng.standard_normal(len(expert))
        action = expert_action(expert, expert_input(config.task, info["state"], t)) + noise
        frame, video.rewards[index, t], terminated, _, info = env.step(action)
        video.actions[index, t], video.distractor[index, t] = info["action"], info["distractor"]
        if terminated:
            break
    video.length[index] = t + 1
    return t + 1

def record(config, folder):
    """Record three videos, going on where an earlier call was stopped; -> frames recorded.
    folder/training, folder/heldout for probing, and folder/decorrelated, as many episodes as
    heldout whose background no longer follows the action (rho = 0)."""
    env = make_env(config)
    _, info = env.reset(seed=0)
    sizes = (config.steps, config.frame_size, env.action_space.shape[0], len(info["state"]),
             len(info["distractor"]))
    H, jobs = config.heldout_episodes, []
    for name, E, rho in (("training", config.episodes, config.correlation),
                         ("heldout", H, config.correlation), ("decorrelated", H, 0.0)):
        if not (folder / name / "length.npy").exists():
            Video.create(folder / name, E, *sizes)
        jobs += [(replace(config, correlation=rho), folder / name, i, episode_seed(config, name, i))
                 for i in np.flatnonzero(Video.open(folder / name).length == 0).tolist()]
    with worker_pool() as pool, tqdm(desc="record", unit=" frames", leave=False,
                                     total=len(jobs) * config.steps) as bar:
        start, frames = time.monotonic(), 0
        for count in pool.map(record_episode, jobs):
            bar.update(count)
            frames += count
    print(f"recorded {frames} frames, {frames / (time.monotonic() - start):.0f} a second")
    return frames

class Windows:
    """Index arithmetic for training windows: every (e, t) whose episode goes on to t + 1.

    A window of offset k is the stack before (t-2, t-1, t), the stack after (t+k-2, t+k-1, t+k) and
    the next frame t + 1. It never crosses an episode's end: the first frame stands for what was
    before it, and k is cut to what is left. With mask_input masks are a frame's fourth channel."""
    def __init__(self, video: Video, device="cpu", mask_input=False):
        self.video, self.T, self.device = video, video.frames.shape[1], device
        self.frames = torch.from_numpy(np.ascontiguousarray(video.frames)).flatten(0, 1).to(device)
        self.masks = torch.from_numpy(np.ascontiguousarray(video.masks)).flatten(0, 1).to(device)
        if mask_input:
            self.frames = torch.cat([self.frames, self.masks[..., None]], -1)  # (N, H, W, 4)
        self.e, self.t = np.nonzero(video.valid[:, 1:])

    def __len__(self):
        return len(self.e)

    def index(self, windows: np.ndarray, k) -> np.ndarray:
        """(B,) windows and offsets k (B,) or int -> (B, 7) flat frame indices: 3, 3, next."""
        e, t = self.e[windows], self.t[windows]
        k = np.minimum(k, self.video.length[e] - 1 - t)
        offsets = [t - 2, t - 1, t, t + k - 2, t + k - 1, t + k, t + 1]
        return e[:, None] * self.T + np.stack(offsets, 1).clip(0)

    def batch(self, windows, k=1):
        """-> before and after (B, 3 C, H, W), newest frame last, next frame (B, 3, H, W), all in
        [-0.5, 0.5], and its mask (B, 1, H, W) in [0, 1]. C is 3, or 4 with mask_input."""
        index = torch.from_numpy(self.index(windows, k)).to(self.device)
        frames = to_float(self.frames[index])  # one gather: (B, 7, H, W, C) u8 -> (B, 7 C, H, W)
        C = self.frames.shape[-1]
        return (frames[:, :3 * C], frames[:, 3 * C:6 * C], frames[:, 6 * C:6 * C + 3],
                self.masks[index[:, 6:]] / 255.0)

    def before(self, windows):
        """-> only the stack before, (B, 3 C, H, W): all that a policy sees."""
        index = torch.from_numpy(self.index(windows, 1)[:, :3]).to(self.device)
        return to_float(self.frames[index])  # (B, 3, H, W, C) u8 -> (B, 3 C, H, W)

    def actions(self, windows=slice(None)):
        """Executed actions (B, A) f32: for the probe, the decoder and the references only."""
        return self.video.actions[self.e[windows], self.t[windows]]

def to_float(frames: torch.Tensor) -> torch.Tensor:
    """(B, n, H, W, C) u8 -> (B, n C, H, W) in [-0.5, 0.5], channels last in memory."""
    stacked = frames.permute(0, 1, 4, 2, 3).flatten(1, 2)
    return stacked.contiguous(memory_format=torch.channels_last).float() / 255 - 0.5

# ==== 7. Masks ====================================================================================
# In: frames. Out: where the agent is. The simulator's masks were drawn along with the frames. With
# --masks sam the segmentation model SAM (arXiv 2304.02643) finds the agent on a few keyframes and a
# student learns from those to mask every frame; with --masks student the simulator does SAM's part.
def sam_path(model: str, file: str = "") -> Path:
    """Where the checkpoint of a SAM is: `file`, or its place in torch's hub cache."""
    return Path(file or Path(torch.hub.get_dir()) / "checkpoints" / SAM_FILES[model])

def load_sam(model: str, file: str, device):
    """Official SamPredictor; without `file` its checkpoint is downloaded once, hash checked."""
    from segment_anything import SamPredictor, sam_model_registry  # slow to import, rarely needed
    path = sam_path(model, file)
    try:
        if not file and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(SAM_URL + path.name, str(path), path.stem[-6:])
    except (OSError, RuntimeError) as error:
        raise UserError(f"{SAM_URL}{path.name} cannot be downloaded ({first_line(error)}); "
                        "pass its file as --sam-checkpoint, or --masks simulator") from error
    try:
        return SamPredictor(sam_model_registry[model](checkpoint=str(path)).to(device))
    except (OSError, EOFError, RuntimeError, ValueError, AttributeError, TypeError, KeyError,
            pickle.UnpicklingError) as error:
        raise UserError(f"--sam-checkpoint {path} is no checkpoint of {model} "
                        f"({first_line(error)})") from error

@torch.no_grad()
def segment(predictor, frames: np.ndarray, prompt=(), checkpoint=None):
    """SAM's candidates for frames (n, H, W, 3) u8: masks (n, 3, H, W) bool, its own IoUs (n, 3).
    prompt: as --prompt has it; without one, a box and a point where a camera that follows the agent
    shows it. On a GPU embeddings are computed in batches; `checkpoint` keeps what is done."""
    points = np.array([[abs(float(x)) for x in point.split(",")] for point in prompt])
    labels, box = np.array([not point.startswith("-") for point in prompt], int), None
    if not prompt:
        points, labels = np.array([[0.5, 0.42]]) * frames.shape[1], np.ones(1, int)
        box = np.array([0.05, 0.1, 0.95, 0.9]) * frames.shape[1]
    masks, scores = load_torch(checkpoint) if checkpoint and checkpoint.exists() else ([], [])
    device = predictor.device
    batch = 1 if device.type == "cpu" else 16
    for start in tqdm(range(len(masks), len(frames), batch), "SAM", leave=False):
        part = [predictor.transform.apply_image(f) for f in frames[start:start + batch]]
        pixels = torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2).to(device)
        with autocast(device):
            predictor.set_torch_image(pixels, frames.shape[1:3])
        for embedding in predictor.features.float().split(1):
            predictor.features = embedding
            mask, score, _ = predictor.predict(points, labels, box)
            masks.append(torch.from_numpy(mask))
            scores.append(torch.from_numpy(score))
        if checkpoint:
            save_torch(checkpoint, (masks, scores))
    return torch.stack(masks).numpy(), torch.stack(scores).numpy()

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

def train_student(config, frames: np.ndarray, masks: np.ndarray, device):
    """Distil keyframes (n, H, W, 3) u8 and their masks (n, H, W) u8 into a small network.
    Mirrored, shifted by up to an eighth and stretched in colour, a few dozen are enough."""
    torch.manual_seed(config.seed + 3)
    student = Student().to(device, memory_format=torch.channels_last)
    frames = np.concatenate([frames, masks[..., None]], -1)
    inputs = to_float(torch.from_numpy(frames)[:, None]).to(device)  # (n, 4, H, W)

    def loss(step):
        rng = random(config.seed, "student", step)
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

    train([student], loss, config.student_updates, 3e-3, "student")
    return student.eval()

@torch.no_grad()
def student_masks(student, frames: np.ndarray) -> np.ndarray:
    """The student's soft masks (n, H, W) u8 of frames (n, H, W, 3) u8."""
    device, masks = next(student.parameters()).device, []
    for start in tqdm(range(0, len(frames), 128), "masks", leave=False, disable=len(frames) < 999):
        part = torch.from_numpy(frames[start:start + 128, None].copy())
        with autocast(device):
            logits = student(to_float(part.to(device)))
        masks.append((255 * logits.float().sigmoid()).round().byte()[:, 0].cpu().numpy())
    return np.concatenate(masks)

def segment_videos(config, videos, device, checkpoint=None):
    """Masks of {name: Video} from a student of SAM, or of the simulator with --masks student.
    Returns the student, (keyframes (n, H, W, 3), teacher's, student's and simulator's masks of them
    (n, H, W)), {name: the student's masks (E, T, H, W)}, all u8, and {name: IoU with simulator}."""
    training = videos["training"]
    e, t = np.nonzero(training.valid)
    spread = np.linspace(0, len(e) - 1, config.keyframes).astype(int)
    frames, truth = training.frames[e[spread], t[spread]], training.masks[e[spread], t[spread]]
    labels = truth
    if config.masks == "sam":
        predictor = load_sam(config.sam_model, config.sam_checkpoint, device)
        if device.type == "cpu":  # 14 s each were measured on two cores
            print(f"{len(frames)} keyframes: vit_b takes ~{len(frames) * 14 // 60} minutes")
        found, scores = segment(predictor, frames, config.prompt, checkpoint)
        labels = np.uint8(255) * found[np.arange(len(found)), choose_masks(found, scores)]
    student = train_student(config, frames, labels, device)
    masks, iou = {}, {"keyframes": mask_iou(labels, truth)}
    for name, video in videos.items():
        flat = video.frames.reshape(-1, *video.frames.shape[2:])
        masks[name] = student_masks(student, flat).reshape(video.masks.shape)
        iou[name] = mask_iou(masks[name], video.masks, video.valid)
        if masks[name].max() < 128:
            raise UserError(f"the student of --masks {config.masks} sees no agent in {name} video")
    return student, (frames, labels, student_masks(student, frames), truth), masks, iou

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
        y, x = np.nonzero(mask >= 128)
        while len(y) and (mask[y, x] == 0).mean() < config.occlude:
            i, (h, w) = rng.integers(len(y)), rng.integers(1, mask.shape[0] // 8 + 1, 2)
            mask[max(y[i] - h, 0):y[i] + h, max(x[i] - w, 0):x[i] + w] = 0
    return worse

def mask_iou(a: np.ndarray, b: np.ndarray, where=...) -> float:
    """Intersection over union of two u8 masks of one shape, agent = 128 and above, at `where`."""
    a, b = a[where] >= 128, b[where] >= 128
    return float((a & b).sum() / max((a | b).sum(), 1))

# ==== 8. Networks =================================================================================
# The convolutional encoder of IMPALA (arXiv 1802.01561), three times: the IDM turns six frames into
# a latent action, the FDM three frames and a latent action into the next frame, the policy three
# frames into a latent action. n frames are (B, n C, H, W) in [-0.5, 0.5]; C is 4 with --mask-input.
class ResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.second(F.relu(self.first(F.relu(x))))

def encoder(channels, patch, widths, blocks):
    """(B, channels, H, W) -> (B, widths[-1], h, w) with H / h = `encoder_stride`.
    IMPALA: each stage is a convolution, a halving max-pool and residual blocks. With patch > 1
    the first stage folds patch x patch pixels into channels instead, which costs a CPU far less."""
    layers = []
    for stage, width in enumerate(widths):
        if patch > 1 and stage == 0:
            layers += [nn.PixelUnshuffle(patch), nn.Conv2d(channels * patch**2, width, 1)]
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(3, 2, padding=1)]
        layers += [ResidualBlock(width) for _ in range(blocks)]
        channels = width
    return nn.Sequential(*layers, nn.ReLU())

def encoder_stride(patch, widths):
    return patch * 2 ** (len(widths) - 1) if patch > 1 else 2 ** len(widths)

def decoder(patch, widths, blocks):
    """The mirror image of `encoder`: (B, widths[-1], h, w) -> (B, 3, H, W)."""
    layers = []
    for stage in reversed(range(len(widths))):
        width, below = widths[stage], widths[max(stage - 1, 0)]
        layers += [ResidualBlock(width) for _ in range(blocks)] + [nn.ReLU()]
        if patch > 1 and stage == 0:
            layers += [nn.Conv2d(width, 3 * patch**2, 1), nn.PixelShuffle(patch)]
        else:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, below, 3, padding=1)]
    if patch == 1:
        layers += [nn.ReLU(), nn.Conv2d(widths[0], 3, 3, padding=1)]
    return nn.Sequential(*layers)

class FrameEncoder(nn.Module):
    """`frames` stacked frames -> a vector: the IDM (6 -> Z), the policy (3 -> Z or A)."""
    def __init__(self, config, frames, outputs):
        super().__init__()
        side = config.image_size // encoder_stride(config.patch, config.idm_widths)
        channels = (3 + config.mask_input) * frames
        self.encoder = encoder(channels, config.patch, config.idm_widths, config.blocks)
        inputs, hidden = config.idm_widths[-1] * side**2, config.hidden
        self.head = nn.Linear(inputs, outputs) if hidden == 0 else nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def forward(self, *stacks):
        return self.head(self.encoder(torch.cat(stacks, 1)).flatten(1))  # (B, outputs)

class FDM(nn.Module):
    """Three frames (B, 3 C, H, W) and a latent action (B, Z) -> the next frame (B, 3, H, W).
    The latent becomes a map that is concatenated with what the encoder has seen. To first order
    a motion is velocity times image gradient: `gate` adds such a product."""
    def __init__(self, config):
        super().__init__()
        width = config.fdm_widths[-1]
        self.side = config.image_size // encoder_stride(config.patch, config.fdm_widths)
        C = 3 + config.mask_input
        self.encoder = encoder(3 * C, config.patch, config.fdm_widths, config.blocks)
        self.latent = nn.Linear(config.latent_dim, width * self.side**2)
        self.gate = config.gate
        self.merge = nn.Conv2d((3 if self.gate else 2) * width, width, 1)
        self.decoder = decoder(config.patch, config.fdm_widths, config.blocks)

    def forward(self, before, latent):
        seen = self.encoder(before)
        action = self.latent(latent).view(len(seen), -1, self.side, self.side)  # Z -> a map
        parts = [seen, action] + ([seen * action] if self.gate else [])
        merged = self.merge(torch.cat(parts, 1))  # (B, 2 or 3 width, h, w) -> (B, width, h, w)
        return torch.tanh(self.decoder(merged)) / 2

class Student(nn.Module):
    """A small U-Net that segments the agent: (B, 3, H, W) -> logits (B, 1, H, W)."""
    def __init__(self, widths=(12, 16, 32, 64, 64)):
        super().__init__()
        conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1)
        self.down = nn.ModuleList(map(conv, widths, widths[1:]))
        self.up = nn.ModuleList(conv(i + o, o) for i, o in zip(widths[:1:-1], widths[-2:0:-1]))
        self.head = nn.Conv2d(widths[1], 4, 1)

    def forward(self, x):
        x, seen = F.pixel_unshuffle(x, 2), []  # (B, 12, H / 2, W / 2)
        for conv in self.down:
            x = F.relu(conv(F.max_pool2d(x, 2) if seen else x))
            seen.append(x)
        for conv, skip in zip(self.up, seen[-2::-1]):
            x = F.relu(conv(torch.cat([F.interpolate(x, skip.shape[2:]), skip], 1)))
        return F.pixel_shuffle(self.head(x), 2)

# ==== 9. Latent action models =====================================================================
# In: windows of a Video. Out: an IDM whose latent actions explain what the masked loss asks for,
# and its FDM. One loop trains every method; they differ in the weight of the background alone.
def masked_mse(prediction, target, mask, background_weight=0.0):
    """The squared error weighted by an agent mask: all that MaskLAM adds to a LAM.

    prediction, target (B, C, H, W); mask (B, 1, H, W) in [0, 1], 1 = agent. Every pixel weighs
    w = mask + background_weight (1 - mask), and the result is sum(w error^2) / (C sum(w)).
    background_weight 1 is F.mse_loss, bit for bit (LAPO); 0 is the authors' hard mask."""
    if background_weight == 1:
        return F.mse_loss(prediction, target)
    weight = mask + background_weight * (1 - mask)
    error = weight * (prediction - target) ** 2  # (B, C, H, W)
    return error.sum() / (prediction.shape[1] * weight.sum())

def autocast(device):
    """bfloat16 where the device multiplies it natively; float32 elsewhere."""
    cpu = torch.cpu.get_capabilities() if str(device) == "cpu" else {}
    native = str(device) != "cpu" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bool(native))

def train(modules, compute_loss, updates, lr, text, checkpoint=None, report=None):
    """AdamW with 5 % warm-up and cosine decay to zero: the loop of every network in this file.

    compute_loss(step) -> scalar tensor; it draws its batch from `step` alone, so that a run that
    goes on from `checkpoint` (a path; written twice a minute) gives the numbers of one that never
    stopped. report(step) -> number. Returns ten times (step, mean loss since the last, report)."""
    modules = nn.ModuleList(modules)
    optimizer = torch.optim.AdamW(modules.parameters(), lr, (0.9, 0.99))
    start, history, losses = 0, [], []
    if checkpoint and checkpoint.exists():
        saved = load_torch(checkpoint)
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        start, history, losses = saved["step"], saved["history"], saved["losses"]
    every, saved_at = max(1, updates // 10), time.monotonic()
    for step in tqdm(range(start, updates), text, updates, initial=start, leave=False):
        warmup, cosine = (step + 1) / (0.05 * updates + 1), 1 + math.cos(math.pi * step / updates)
        optimizer.param_groups[0]["lr"] = lr * min(1, warmup) * 0.5 * cosine
        loss = compute_loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % every == 0:
            history.append((step + 1, float(torch.stack(losses).mean()),
                            report(step + 1) if report else None))
            losses = []
        if checkpoint and time.monotonic() - saved_at > 30:
            save_torch(checkpoint, dict(modules=modules.state_dict(), losses=losses, step=step + 1,
                                        optimizer=optimizer.state_dict(), history=history))
            saved_at = time.monotonic()
    return history

def make_lam(config, seed):
    """A fresh IDM and FDM with the weights that `seed` gives them."""
    torch.manual_seed(seed)
    networks = FrameEncoder(config, 6, config.latent_dim), FDM(config)
    return [network.to(memory_format=torch.channels_last) for network in networks]

def train_lam(config, windows, background_weight, text="lam", report=None, checkpoint=None):
    """Train a latent action model; -> (idm, fdm, history). report(idm) -> held-out probe NMSE."""
    idm, fdm = (module.to(windows.device) for module in make_lam(config, config.seed))

    def loss(step):
        rng = random(config.seed, "lam", step)
        chosen = rng.integers(len(windows), size=config.batch_size)
        offsets = rng.integers(1, config.offset + 1, config.batch_size)
        before, after, target, mask = windows.batch(chosen, offsets)
        with autocast(windows.device):
            prediction = fdm(before, idm(before, after))
        return masked_mse(prediction.float(), target, mask, background_weight)

    history = train([idm, fdm], loss, config.lam_updates, config.lam_lr, text, checkpoint,
                    report and (lambda step: report(idm)))
    return idm.eval(), fdm.eval(), history

@torch.no_grad()
def latents(idm, windows: Windows, chosen=None) -> np.ndarray:
    """Latent actions (n, Z) f32 of the chosen windows (default: all), k = 1."""
    chosen = np.arange(len(windows)) if chosen is None else chosen
    batches = (windows.batch(part) for part in np.split(chosen, range(512, len(chosen), 512)))
    return torch.cat([idm(before, after).cpu() for before, after, _, _ in batches]).numpy()

# ==== 10. Linear probe ============================================================================
# In: latent actions and true actions of training and held-out episodes. Out: how much of the action
# a linear map reads from the latent. Closed form, so nothing is tuned and nothing can diverge.
def ridge(inputs, targets, penalty=1e-4):
    """Ridge regression with intercept, closed form: (n, Z), (n, A) -> predict((m, Z)) -> (m, A)."""
    inputs, targets = np.asarray(inputs, np.float64), np.asarray(targets, np.float64)
    center, scale, offset = inputs.mean(0), inputs.std(0) + 1e-8, targets.mean(0)
    X = (inputs - center) / scale
    gram = X.T @ X + penalty * len(X) * np.eye(X.shape[1])
    weights = np.linalg.solve(gram, X.T @ (targets - offset))
    return lambda x: (np.asarray(x, np.float64) - center) / scale @ weights + offset

def nmse(prediction, target) -> np.ndarray:
    """Squared error over variance, per dimension (A,): 0 = perfect, 1 = knows only the mean."""
    return ((prediction - target) ** 2).mean(0) / target.var(0)

def r2(prediction, target) -> float:
    """1 - NMSE, averaged over the dimensions that vary at all; 0 where none does."""
    moves = target.var(0) > 1e-12
    return float(1 - nmse(prediction[:, moves], target[:, moves]).mean()) if moves.any() else 0.0

def probe(encode, training: Windows, heldout: Windows, decorrelated: Windows) -> dict:
    """Linear probe of encode(windows) -> (n, Z), fitted on `training`, read on unseen episodes.
    decorrelated: the same probe where the background ignores the action (rho = 0). leakage: R2 of a
    second one for the background's velocity, from one half of those episodes to the other."""
    z, z_heldout, z_decorrelated = (encode(w) for w in (training, heldout, decorrelated))
    a, a_heldout, a_decorrelated = (w.actions() for w in (training, heldout, decorrelated))
    read = ridge(z, a)
    moved = decorrelated.video.distractor[decorrelated.e, decorrelated.t]
    half = decorrelated.e < len(decorrelated.video.length) // 2
    read_background = ridge(z_decorrelated[half], moved[half])
    per_dimension = nmse(read(z_heldout), a_heldout)
    return dict(
        probe_nmse=float(per_dimension.mean()),
        probe_r2=r2(read(z_heldout), a_heldout),
        probe_nmse_per_dimension=per_dimension.tolist(),
        probe_nmse_decorrelated=float(nmse(read(z_decorrelated), a_decorrelated).mean()),
        leakage_r2=r2(read_background(z_decorrelated[~half]), moved[~half]))

# ==== 11. Latent policy ===========================================================================
# In: windows and a frozen IDM. Out: a policy from pixels to actions, in two steps: clone the latent
# actions from frames alone, then decode the cloned latents to actions with a few labels.
def regress(config, module, predict, targets, chosen, updates, lr, text, checkpoint=None):
    """Fit predict(batch (B,)) to targets[batch] by squared error; batches come from chosen."""
    targets = torch.from_numpy(targets).to(next(module.parameters()).device)

    def loss(step):
        rng = random(config.seed, "regress", step)
        batch = chosen[rng.integers(len(chosen), size=config.batch_size)]
        with autocast(targets.device):
            prediction = predict(batch)
        return F.mse_loss(prediction.float(), targets[torch.from_numpy(batch)])

    train([module], loss, updates, lr, text, checkpoint)

def clone(config, windows, targets, chosen, text="clone", checkpoint=None, future=False):
    """Behaviour cloning: regress targets (len(windows), Z or A) on the stack before, of `chosen`.
    With `future` it sees the stack after too (k = 1): on true actions, a supervised IDM."""
    torch.manual_seed(config.seed + 1)
    policy = FrameEncoder(config, 6 if future else 3, targets.shape[1])
    policy.to(windows.device, memory_format=torch.channels_last)
    stacks = lambda batch: windows.batch(batch)[:2] if future else [windows.before(batch)]
    updates = config.lam_updates if future else config.policy_updates
    lr = config.lam_lr if future else config.policy_lr
    regress(config, policy, lambda batch: policy(*stacks(batch)), targets, chosen, updates, lr,
            text, checkpoint)
    return policy.eval()

def make_decoder(latent_dim, action_dim):
    return nn.Sequential(nn.Linear(latent_dim, 256), nn.ReLU(), nn.Linear(256, action_dim))

def train_decoder(config, policy, windows: Windows, chosen):
    """MLP from the policy's latents to actions on the labelled windows; -> the MLP."""
    torch.manual_seed(config.seed + 2)
    with torch.no_grad():
        z = torch.cat([policy(windows.before(part))
                       for part in np.split(chosen, range(512, len(chosen), 512))])
    actions = windows.actions(chosen)
    mlp = make_decoder(z.shape[1], actions.shape[1]).to(windows.device)
    regress(config, mlp, lambda batch: mlp(z[torch.from_numpy(batch)]), actions,
            np.arange(len(chosen)), config.decoder_updates, 1e-3, "decoder")
    return mlp.eval()

def latent_policy(config, idm, windows, labelled, text="policy", checkpoint=None):
    """Pixels -> actions through latent actions: clone them, then decode; -> nn.Sequential.
    The policy is cloned from what a frozen IDM says of all windows, scaled to unit variance, as a
    latent's scale is arbitrary. True actions are read of the windows `labelled` (n,) alone."""
    z = latents(idm, windows)
    z = (z - z.mean(0)) / (z.std(0) + 1e-6)
    policy = clone(config, windows, z, np.arange(len(windows)), text, checkpoint)
    return nn.Sequential(policy, train_decoder(config, policy, windows, labelled))

# ==== 12. Evaluation ==============================================================================
# In: a policy. Out: its return in the real environment, on backgrounds that nothing was trained or
# probed on. Episodes of one job step together, so that the policy sees batches.
@torch.no_grad()
def rollout(job):
    """Episodes of (config, pickled (policy, student or None), seeds) -> (returns (n,), film).
    The policy maps (n, 3 C, H, W) to actions (n, A); the student (or the simulator) masks what it
    sees. film: (t, H, W, 3) u8 of the first episode, t <= 200."""
    config, pickled, seeds = job
    (policy, student), factor = pickle.loads(pickled), config.frame_size // config.image_size
    envs, rng = [make_env(config) for _ in seeds], random(seeds[0], "degrade")

    def seen(frames, masks):  # -> (n, H, W, C)
        frames = np.stack(frames)
        if not config.mask_input:
            return frames
        masks = student_masks(student, frames) if student else np.stack(masks)
        return np.concatenate([frames, degrade(config, masks, rng)[..., None]], -1)

    frames, infos = zip(*(env.reset(seed=seed) for env, seed in zip(envs, seeds)))
    frames, masks = list(frames), [info["mask"] for info in infos]
    stack = [box_average(seen(frames, masks), factor)] * 3  # the first frame, repeated
    returns, alive, film = np.zeros(len(envs)), np.ones(len(envs), bool), []
    for _ in range(config.eval_steps):
        actions = policy(to_float(torch.from_numpy(np.stack(stack, 1)))).numpy()
        if len(film) < 200 and alive[0]:
            film.append(frames[0])
        for i in np.flatnonzero(alive):
            frames[i], reward, terminated, _, info = envs[i].step(actions[i])
            masks[i] = info["mask"]
            returns[i] += reward
            alive[i] = not terminated
        if not alive.any():
            break
        stack = stack[1:] + [box_average(seen(frames, masks), factor)]
    return returns, np.stack(film)

def evaluate(config, policy: nn.Module, text, student=None):
    """Returns (eval_episodes,) of a pixel policy, and a film of the first episode."""
    pickled = pickle.dumps((policy.cpu(), copy.deepcopy(student).cpu() if student else None))
    seeds = [episode_seed(config, "evaluate", i) for i in range(config.eval_episodes)]
    jobs = [(config, pickled, seeds[i:i + 5]) for i in range(0, len(seeds), 5)]
    with worker_pool() as pool:
        results = list(tqdm(pool.map(rollout, jobs), f"evaluate {text}", len(jobs), leave=False))
    return np.concatenate([returns for returns, _ in results]), results[0][1]

def evaluate_state_policy(config, name):
    """Returns (eval_episodes,) of "expert" or "random", which read states, not pixels."""
    expert = load_expert(config.task) if name == "expert" else None
    seeds = [episode_seed(config, "evaluate", i) for i in range(config.eval_episodes)]
    return np.array([state_rollout((config.task, expert, seed, config.eval_steps, 0, 1))[0]
                     for seed in seeds])

# ==== 13. Report ==================================================================================
# In: the numbers of all stages. Out: a table, two figures and an animation.
COLUMNS = (("probe_nmse", "NMSE"), ("probe_nmse_decorrelated", "NMSE rho=0"),
           ("leakage_r2", "leakage"), ("return_mean", "return"), ("return_std", "+-"),
           ("normalized_return", "normalised"), ("labels", "labels"))
COLORS = {"lapo": "tab:red", "masklam": "tab:green", "oracle": "tab:gray",
          "labels-only": "silver", "supervised-idm": "tab:blue"}

def table(results: dict) -> str:
    """The results' methods and references as lines of text."""
    lines = [f"{'':16}" + "".join(f"{title:>12}" for _, title in COLUMNS)]
    for name, row in results["methods"].items():
        cells = (row.get(key) for key, _ in COLUMNS)
        text = ("" if v is None else f"{v:d}" if isinstance(v, int) else
                f"{v:.0f}" if abs(v) >= 10 else f"{v:.2f}" for v in cells)
        lines.append(f"{name:16}" + "".join(f"{cell:>12}" for cell in text))
    for name in ("expert", "random"):
        lines.append(f"{name:16}" + " " * 36 + f"{results[name + '_return']:>12.0f}")
    return "\n".join(lines)

def show(ax, picture, title, left=""):
    ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
    ax.set(xticks=[], yticks=[], ylabel=left)
    ax.set_title(title, fontsize=8)

def save_figure(figure, path):
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png", bbox_inches="tight")

def plot_summary(results, histories, predictions, path):
    """Bars of NMSE and return, {method: history} of `train`, and what each FDM predicted.
    predictions: {method: (true, predicted, mask)}, each (H, W, 3) or (H, W) u8."""
    heights = [3] + [2.5] * len(histories)
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    axes, *grid = figure.subplots(len(heights), 4, height_ratios=heights)
    for ax, key in zip(axes, ("probe_nmse", "return_mean")):
        rows = {n: r for n, r in results["methods"].items() if key in r}
        ax.bar(list(rows), [r[key] for r in rows.values()], color=[COLORS[n] for n in rows],
               yerr=[r["return_std"] for r in rows.values()] if key == "return_mean" else None)
        ax.tick_params(axis="x", labelrotation=25, labelsize=8)
    for (name, history), row in zip(histories.items(), grid):
        steps, losses, nmses = zip(*history)
        axes[2].plot(steps, np.array(losses) / losses[0], "o-", color=COLORS[name], label=name)
        axes[3].plot(steps, nmses, "o-", color=COLORS[name], label=name)
        true, predicted, mask = predictions[name]
        error = np.abs(true - predicted.astype(int)).mean(-1)
        pictures = {"next frame": true, f"{name}: prediction": predicted,
                    "absolute error, doubled": 2 * error, "mask": mask}
        for ax, (title, picture) in zip(row, pictures.items()):
            show(ax, picture, title)
    axes[3].set_ylim(0, 1.1)
    axes[3].legend(fontsize=8)
    for ax, title in zip(axes, ("probe NMSE of the action (lower is better)",
                                "return (higher is better)", "training loss over steps, first = 1",
                                "held-out probe NMSE over steps")):
        ax.set_title(title, fontsize=9)
    save_figure(figure, path)

def plot_masks(frames, labels, students, truth, heldout, heldout_truth, path):
    """Keyframes with the best, median, worst label (or student); area in held-out episodes."""
    order = np.lexsort([[-mask_iou(a, b) for a, b in zip(x, truth)] for x in (students, labels)])
    figure = Figure(figsize=(11, 5))
    left, right = figure.subfigures(1, 2, width_ratios=[3, 2])
    pictures = {"frame": frames, "label": labels, "student": students, "simulator": truth}
    ranks = zip(("best", "median", "worst"), order[[0, len(order) // 2, -1]])
    for row, (rank, i) in zip(left.subplots(3, 4), ranks):
        for ax, (title, images) in zip(row, pictures.items()):
            iou = f" {mask_iou(images[i], truth[i]):.2f}" if title in ("label", "student") else ""
            show(ax, images[i], title + iou, rank if title == "frame" else "")
    ax = right.subplots()
    for name, masks in (("student", heldout), ("simulator", heldout_truth)):
        ax.plot(masks.mean((0, 2, 3)) / 255, label=name)
    ax.set(xlabel="step", title="agent, fraction of held-out frames", ylim=(0, None))
    ax.legend()
    save_figure(figure, path)

def save_animation(films, path, scale=3):
    """Side-by-side GIF of {title: (t, H, W, 3) u8}, 20 frames a second."""
    longest = max(len(film) for film in films.values())
    rows = [np.pad(film[np.arange(longest).clip(max=len(film) - 1)],  # what ended stands still
                   ((0, 0), (0, 0), (0, 2), (0, 0))) for film in films.values()]
    frames = np.concatenate(rows, 2).repeat(scale, 1).repeat(scale, 2)
    images = [Image.fromarray(frame).quantize(64) for frame in frames]
    with written_whole(path) as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=50, loop=0)

# ==== 14. Pipeline ================================================================================
# In: the command line. Out: a run's folder. Stages are cached under a key made of the config fields
# they depend on, written whole or not at all, and taken up again where a killed run stopped.
FORMAT = "masklam-5"
RECORDING = ("task", "seed", "distractor", "correlation", "episodes", "heldout_episodes", "steps",
             "action_noise", "frame_size")
MASKS = ("erode", "dilate", "shift", "occlude")
SEGMENTER = ("masks", "sam_model", "sam_checkpoint", "prompt", "keyframes", "student_updates")
NETWORK = ("image_size", "patch", "idm_widths", "blocks", "hidden", "batch_size", "mask_input")
MODEL = NETWORK + ("latent_dim", "offset", "fdm_widths", "gate", "lam_updates", "lam_lr")
POLICY = NETWORK + ("policy_updates", "policy_lr")
DECODER = ("labels", "decoder_updates")
EVALUATION = ("eval_episodes", "eval_steps")
REFERENCES = ("oracle", "labels-only")  # cloned from true actions: all of them, the labelled ones
STAGES = ("record", "mask", "lam", "probe", "policy", "evaluate", "report")

def cache_key(config, names, *extra) -> str:
    """Twelve hex digits that change when one of the named fields (or an extra) does."""
    chosen = {name: getattr(config, name) for name in names}
    text = json.dumps([FORMAT, asdict(get_task(config.task)), chosen, extra], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

@contextlib.contextmanager
def written_whole(path):
    """A temporary path to write to; it takes path's place, on disk, only if nothing failed."""
    temporary = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def save_torch(path, payload):
    with written_whole(path) as temporary:
        torch.save({"format": FORMAT, "payload": payload}, temporary)

def load_torch(path):
    """What save_torch wrote; UserError for a damaged or foreign file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise ValueError(f"not a {FORMAT} file")
        return saved["payload"]
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged or foreign ({first_line(error)}); delete it, or "
                        "pass --fresh") from error

def save_json(path, value):
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")

class Run:
    """One seed's folder: its cache, its clock and its results."""
    def __init__(self, config: Config, folder: Path, device, fresh=False):
        self.config, self.folder, self.device = config, folder, device
        self.cache, self.seconds = folder / "cache", {}
        self.weights = METHODS | {"masklam": config.background_weight}
        try:
            if fresh and self.cache.exists():
                shutil.rmtree(self.cache)
            self.cache.mkdir(parents=True, exist_ok=True)
            save_json(self.cache / "config.json", asdict(config))
        except OSError as error:
            raise UserError(f"--out {folder} cannot be written: {error.strerror}") from error

    def cached(self, stage, name, key, compute):
        """compute(checkpoint path) -> payload of tensors and numbers, or the one from the cache."""
        path = self.cache / f"{stage}-{name}-{key}.pt"
        partial = path.with_suffix(".partial")
        if path.exists():
            payload, seconds = load_torch(path)
        else:
            start = time.monotonic()
            payload = compute(partial)
            seconds = time.monotonic() - start
            save_torch(path, (payload, seconds))
            partial.unlink(missing_ok=True)
        self.seconds[stage, name] = seconds
        return payload

    @functools.cached_property
    def videos(self):
        """{"training", "heldout", "decorrelated": Video}; records them where need be."""
        folder = self.cache / f"video-{cache_key(self.config, RECORDING)}"
        self.cached("record", "video", folder.name[6:], lambda _: record(self.config, folder))
        return {name: Video.open(folder / name) for name in ("training", "heldout", "decorrelated")}

    @functools.cached_property
    def masks(self):
        """-> (student or None, {video's name: masks}, {video's name: IoU with the simulator's})."""
        config, student, iou = self.config, None, {}
        masks = {name: video.masks for name, video in self.videos.items()}

        def compute(partial):
            student, labels, masks, iou = segment_videos(config, self.videos, self.device, partial)
            plot_masks(*labels, masks["heldout"], self.videos["heldout"].masks,
                       self.folder / "masks.png")
            return student.state_dict(), {k: torch.from_numpy(m) for k, m in masks.items()}, iou

        if config.masks != "simulator":
            key = cache_key(config, RECORDING + SEGMENTER)
            state, masks, iou = self.cached("mask", config.masks, key, compute)
            student, masks = Student(), {k: m.numpy() for k, m in masks.items()}
            student.load_state_dict(state)
            student.to(self.device).eval()
        if any(getattr(config, flag) for flag in MASKS):
            masks = {name: np.stack([degrade(config, episode, random(config.seed, name, i))
                                     for i, episode in enumerate(found)])
                     for name, found in masks.items()}
            iou = iou | {name: mask_iou(masks[name], video.masks, video.valid)
                         for name, video in self.videos.items()}
        if iou:
            print("mask IoU:", *(f"{k} {v:.3f}" for k, v in iou.items()))
        return student, masks, iou

    @functools.cached_property
    def windows(self):
        """Training, held-out and decorrelated video, shrunk, with their masks."""
        return [Windows(replace(video, masks=self.masks[1][name]).shrink(self.config.image_size),
                        self.device, self.config.mask_input) for name, video in self.videos.items()]

    def mask_fields(self, method=None):
        """The config's mask fields if they matter to a method or reference, as lapo's do not."""
        weighted = self.weights.get(method, 1) != 1
        segmenter = SEGMENTER if self.config.masks != "simulator" else ()
        return MASKS + segmenter if weighted or self.config.mask_input else ()

    def lam_key(self, method):
        return cache_key(self.config, RECORDING + MODEL + self.mask_fields(method), method,
                         self.weights[method])

    def lam(self, method):
        """-> (idm, fdm, history) of a method."""
        training, heldout, _ = self.windows
        sample = [random(self.config.seed, "report", i).permutation(len(w))[:2000]
                  for i, w in enumerate((training, heldout))]

        def probe_nmse(idm):
            read = ridge(latents(idm, training, sample[0]), training.actions(sample[0]))
            unseen = read(latents(idm, heldout, sample[1]))
            return float(nmse(unseen, heldout.actions(sample[1])).mean())

        def compute(partial):
            idm, fdm, history = train_lam(self.config, training, self.weights[method], method,
                                          probe_nmse, partial)
            return idm.state_dict(), fdm.state_dict(), history

        *states, history = self.cached("lam", method, self.lam_key(method), compute)
        idm, fdm = (module.to(self.device).eval() for module in make_lam(self.config, 0))
        for module, state in zip((idm, fdm), states):
            module.load_state_dict(state)
        return idm, fdm, history

    def probe(self, method):
        """-> the probe's numbers for the frozen IDM of a method, or for the supervised one."""
        idm, key = ((self.lam(method)[0], self.lam_key(method)) if method in METHODS
                    else self.policy(method)[:2])
        idm.to(self.device)
        return self.cached("probe", method, key, lambda _: probe(
            lambda windows: latents(idm, windows), *self.windows))

    def policy(self, name):
        """-> (pixel policy, cache key, number of labels it used) of a method or a reference."""
        config, training = self.config, self.windows[0]
        future, A = name == "supervised-idm", training.video.actions.shape[-1]
        labelled = np.arange(len(training))[:None if future or name == "oracle" else config.labels]
        if name in METHODS:
            key = cache_key(config, POLICY + DECODER, self.lam_key(name))
            policy = nn.Sequential(FrameEncoder(config, 3, config.latent_dim),
                                   make_decoder(config.latent_dim, A))
        else:  # cloned from actions, with no latent action in between
            training_fields = RECORDING + (MODEL if future else POLICY) + self.mask_fields()
            key = cache_key(config, training_fields, name, len(labelled))
            policy = FrameEncoder(config, 6 if future else 3, A)

        def compute(partial):
            last = (labelled, f"{name} policy", partial)
            if name in METHODS:
                return latent_policy(config, self.lam(name)[0], training, *last).state_dict()
            return clone(config, training, training.actions(), *last, future).state_dict()

        policy.load_state_dict(self.cached("policy", name, key, compute))
        return policy.eval(), key, len(labelled)

    def evaluate(self, name):
        """-> (returns, film) of a pixel policy, or (returns, None) of "expert" and "random"."""
        if name in ("expert", "random"):
            key = cache_key(self.config, ("task", "seed") + EVALUATION, name)
            compute = lambda _: (torch.from_numpy(evaluate_state_policy(self.config, name)), None)
        else:
            policy, policy_key, _ = self.policy(name)
            key = cache_key(self.config, EVALUATION, policy_key)
            compute = lambda _: tuple(map(torch.from_numpy, evaluate(
                self.config, policy, name, self.masks[0] if self.config.mask_input else None)))
        returns, film = self.cached("evaluate", name, key, compute)
        return returns.numpy(), None if film is None else film.numpy()

    def report(self) -> dict:
        """Write results.json, the figures and the animation; -> results.json's content."""
        config, rows, films = self.config, {}, {}
        expert, chance = (float(self.evaluate(n)[0].mean()) for n in ("expert", "random"))
        for name in config.methods + REFERENCES:
            returns, films[name] = self.evaluate(name)
            mean = float(returns.mean())
            rows[name] = (self.probe(name) if name in config.methods else {}) | dict(
                return_mean=mean, return_std=float(returns.std()), return_n=len(returns),
                normalized_return=(mean - chance) / (expert - chance), labels=self.policy(name)[2])
        rows["supervised-idm"] = self.probe("supervised-idm")
        results = dict(
            task=config.task, seed=config.seed, config=asdict(config), device=str(self.device),
            versions={m.__name__: m.__version__ for m in (torch, mujoco, gym, np)}
            | {"python": sys.version.split()[0]}, mask_source=config.masks, mask_iou=self.masks[2],
            seconds={stage: round(sum(s for key, s in self.seconds.items() if key[0] == stage), 1)
                     for stage in STAGES[:-1]},
            expert_return=expert, random_return=chance, methods=rows)
        shown = np.array([len(self.windows[1]) // 3])  # one held-out window, the same for all
        before, after, target, mask = self.windows[1].batch(shown)
        image = lambda x: (255 * (x[0].float().cpu() + 0.5)).clamp(0, 255).byte().numpy()
        pictures, histories = {}, {}
        for method in config.methods:
            idm, fdm, histories[method] = self.lam(method)
            with torch.no_grad():
                predicted = image(fdm(before, idm(before, after)))
            pictures[method] = (image(target).transpose(1, 2, 0), predicted.transpose(1, 2, 0),
                                image(mask - 0.5)[0])
        plot_summary(results, histories, pictures, self.folder / "summary.png")
        save_animation({m: films[m] for m in config.methods}, self.folder / "rollouts.gif")
        save_json(self.folder / "results.json", results)
        return results

    def execute(self, until="report"):
        """Every stage up to and including `until`; -> results.json's content if that is report."""
        methods, references = self.config.methods, REFERENCES + ("expert", "random")
        stages = dict(
            record=lambda: self.videos,
            mask=lambda: self.windows,
            lam=lambda: [self.lam(m) for m in methods],
            probe=lambda: [print(f"{name}: probe NMSE {self.probe(name)['probe_nmse']:.3f}")
                           for name in methods + ("supervised-idm",)],
            policy=lambda: [self.policy(name) for name in methods + REFERENCES],
            evaluate=lambda: [self.evaluate(name) for name in methods + references],
            report=self.report)
        for stage in STAGES[:STAGES.index(until) + 1]:
            result = stages[stage]()
        return result if until == "report" else None

def search_expert(name, seed):
    """Train a task's expert anew and print its entry for TASKS."""
    task, model = get_task(name), state_env(name).model
    camera = tuple(round(float(x), 2) for x in AgentRenderer(model, task.camera).camera)
    if name not in TASKS:
        print(f"{name} is new: assumed camera {camera}, noise {task.noise}, default search")
    literal, returns = train_expert(name, **task.search, seed=seed)
    print(f'    "{name}": {replace(task, camera=camera, expert=literal)},')
    print(f"return on ten unseen seeds: {np.mean(returns):.0f} +- {np.std(returns):.0f}")

def summarize(results: list[dict]) -> dict:
    """Mean, standard deviation, median and 95 % t-interval half-width over the seeds' results."""
    n = len(results)
    t95 = (0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)[min(n - 1, 9)]
    methods = {}
    for name, row in results[0]["methods"].items():
        methods[name] = {}
        for key in (k for k, v in row.items() if isinstance(v, (int, float))):
            values = np.array([r["methods"][name][key] for r in results], float)
            std = float(values.std(ddof=1)) if n > 1 else 0.0
            methods[name][key] = dict(mean=float(values.mean()), std=std,
                                      median=float(np.median(values)), interval=t95 * std / n**0.5)
    return dict(task=results[0]["task"], seeds=[r["seed"] for r in results], methods=methods)

def parse(argv):
    """Command line -> (config, all options given). Presets yield to flags given by name."""
    def fail(message):
        raise UserError(message)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     argument_default=argparse.SUPPRESS)
    parser.error = fail
    for f in fields(Config):
        if isinstance(f.default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(f.default, tuple):
            kind = dict(type=type((*f.default, "")[0]), nargs="+", action="extend")
        else:
            kind = dict(type=type(f.default))
        parser.add_argument("--" + f.name.replace("_", "-"), **kind,
                            help=f"{f.metadata['help']} (default {f.default})")
    parser.add_argument("--preset", choices=PRESETS, default=None,
                        help="sizes of everything (default: laptop, on CUDA gpu)")
    parser.add_argument("--seeds", type=int, default=None, help="run seeds 0 .. N-1, summarise")
    parser.add_argument("--out", default="runs", help="folder for run folders")
    parser.add_argument("--until", choices=STAGES, default="report", help="the last stage")
    parser.add_argument("--fresh", action="store_true", default=False, help="empty the cache first")
    parser.add_argument("--train-expert", action="store_true", default=False,
                        help="search the task's expert and print its literal")
    argv = "\n".join(sys.argv[1:] if argv is None else argv)  # --prompt -3,4 is no other flag
    argv = re.sub("^--prompt\n-", "--prompt=-", argv, flags=re.MULTILINE).splitlines()
    options = parser.parse_args(argv)
    options.preset = options.preset or ("gpu" if torch.cuda.is_available() else "laptop")
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(options).items()
              if hasattr(Config, k)}
    config = Config(**PRESETS[options.preset] | chosen)
    check_config(config)
    if options.seeds is not None and not 1 <= options.seeds <= 1000:
        raise UserError(f"--seeds is {options.seeds}; allowed: 1 to 1000")
    return config, options

def main(argv=None):
    """The program; returns its exit status."""
    try:
        config, options = parse(argv)
        if options.train_expert:
            search_expert(config.task, config.seed)
            return 0
        if not get_task(config.task).expert:
            raise UserError(f"--task {config.task} has no expert: search one with --train-expert, "
                            "and put the entry that it prints into TASKS")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if config.masks == "auto":
            path = sam_path(config.sam_model, config.sam_checkpoint)
            found = bool(config.sam_checkpoint) or path.exists()
            config = replace(config, masks="sam" if found else "simulator")
            print(f"masks: sam, from {path}" if found else "masks: the simulator's own; for SAM's: "
                  f"--masks sam, which downloads {path.name}, or --sam-checkpoint FILE")
        results = []
        for seed in [config.seed] if options.seeds is None else range(options.seeds):
            tag = f"{config.task}-{options.preset}-{config.distractor}-{seed}"
            run = Run(replace(config, seed=seed), Path(options.out) / tag, device, options.fresh)
            result = run.execute(options.until)
            if result:
                results.append(result)
                print(table(result))
                print(f"masks: {config.masks}; files:", *sorted(map(str, run.folder.glob("*.*"))))
        if options.seeds and results:
            path = Path(options.out) / (tag.rsplit("-", 1)[0] + "-summary.json")
            save_json(path, summarize(results))
            print("summary over seeds:", path)
        return 0
    except UserError as error:
        print(f"masklam: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmasklam: stopped; the same command goes on from here", file=sys.stderr)
        return 130

if __name__ == "__main__":
    sys.exit(main())
