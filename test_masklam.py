"""Tests of masklam.py against independent references: python -m pytest -q test_masklam.py"""

import ast
import contextlib
import hashlib
import http.server
import importlib.util
import inspect
import itertools
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "")

with contextlib.suppress(ImportError):
    import triton  # noqa: F401 - its LLVM crashes if torch loads it after MuJoCo has loaded Mesa's
import av
import gymnasium as gym
import mujoco
import numpy as np
import pytest
import segment_anything
import torch
import torch.nn.functional as F
from gymnasium.utils.env_checker import check_env
from PIL import Image
from segment_anything import modeling as sa

import masklam
from masklam import Config, METHODS, PRESETS, Run, SPLITS, STAGES, TASKS, UserError, Video, Windows

HERE = Path(__file__).parent
FLAGS = shlex.split(  # of whole runs, as small as they can be
    "--preset smoke --episodes 4 --heldout-episodes 2 --steps 20 --batch-size 8 --lam-updates 10 "
    "--policy-updates 10 --decoder-updates 10 --probe-updates 10 --eval-episodes 1 "
    "--eval-steps 40 --labels 20")
SMOKE, TINY = Config(**PRESETS["smoke"]), masklam.parse(FLAGS)[0]
torch.set_num_threads(1)  # as workers have, for equal numbers

def random_video(E=5, T=9, size=8, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda n: rng.standard_normal((E, T, n)).astype(np.float32)
    length = np.array([9, 2, 1, 5, 9]) if (E, T) == (5, 9) else np.full(E, T)
    return Video(rng.integers(0, 256, (E, T, size, size, 3), np.uint8),
                 rng.integers(0, 256, (E, T, size, size), np.uint8), length, normal(2), normal(2),
                 np.zeros((E, T), np.float32), normal(3), np.arange(E) % 2 == 0)

def tiny_windows():
    return Windows(random_video(size=32))

def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])

def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

def recorded(config, folder, episodes=None):
    """The training video of a recording, of which the first episodes are done, or all."""
    masklam.record(config, folder, lambda act, jobs: itertools.starmap(act, jobs[:episodes]))
    return Video.open(folder / "training")

def test_an_import_does_nothing_but_define_names(tmp_path):
    """No file, no word, no thread, no process, and nothing random is touched."""
    program = """import multiprocessing, numpy, random, threading, torch
state = lambda: str((random.getstate(), numpy.random.get_state(), torch.get_rng_state().tolist()))
before = state()
import masklam
assert state() == before
assert (threading.active_count(), multiprocessing.active_children()) == (1, [])"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=tmp_path, text=True,
                          env=os.environ | {"PYTHONPATH": str(HERE)}, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())

# -- bodies and experts --------------------------------------------------------------------------

@pytest.mark.parametrize("task, bar", [("cheetah", 1500), ("hopper", 600), ("walker", 500),
                                       ("swimmer", 120), ("ant", 500), ("humanoid", 60)])
def test_experts_return_what_their_bars_ask_for(task, bar):
    """500 steps on seeds of no search, without the bonus for being alive."""
    assert set(TASKS) == set(masklam.EXPERTS)
    expert = masklam.load_expert(task)
    returns = [masklam.state_rollout(task, expert, 7_000_000 + i, 500)[2].sum() for i in range(6)]
    assert np.mean(returns) >= bar

@pytest.mark.parametrize("task", [name for name in TASKS if TASKS[name].reach])
def test_a_servo_holds_the_angles_that_an_action_asks_for(task):
    """In the air, without gravity. The middle is the initial pose, as far as the joint can take
    every angle that is asked for; the ends lie 2 reach apart, or where the joint ends."""
    env, motors = masklam.bare_env(task).unwrapped, gym.make(TASKS[task].env_id).unwrapped.model
    model, data, strongest = env.model, env.data, []
    joints = model.actuator_trnid[:, 0]
    places, limits = model.jnt_qposadr[joints], model.jnt_range[joints]
    model.opt.gravity[:] = model.geom_contype[:] = model.geom_conaffinity[:] = 0
    model.jnt_stiffness[:] = 0

    def settled(share):
        for away, steps in ((share, 1), (0, 2000)):  # far away it is as strong as the motors were
            env.reset(seed=0)
            data.ctrl[:] = share * model.actuator_ctrlrange[:, 1]
            data.qpos[places] -= away
            mujoco.mj_step(model, data, steps)
            strongest.append(abs(data.actuator_force))
        return data.qpos[places].copy()

    lowest, middle, highest = map(settled, (-1, 0, 1))
    torque = motors.actuator_gear[:, 0] * motors.actuator_ctrlrange[:, 1]
    np.testing.assert_allclose(np.max(strongest, 0), torque)
    span = np.minimum(2 * TASKS[task].reach, limits[:, 1] - limits[:, 0])
    pose = model.qpos0[places].clip(limits[:, 0] + span / 2, limits[:, 1] - span / 2)
    np.testing.assert_allclose([lowest, middle, highest], [pose - span / 2, pose, pose + span / 2],
                               atol=0.03)

@pytest.mark.parametrize("task", TASKS)
def test_the_gait_stays_within_the_frame(task, tmp_path):
    config = Config(task=task, distractor="none", episodes=4, heldout_episodes=2)
    video = recorded(config, tmp_path / "video", 2)
    masks = video.masks[:2]
    border = np.concatenate([masks[..., [0, -1], :], masks[..., [0, -1]].swapaxes(2, 3)], 3)
    gait, exploration = (border >= 128).any((2, 3)).mean(1)
    assert gait <= 0.01 and exploration <= 0.1  # who has fallen may stretch a foot out of it
    assert 0.04 < video.masks[video.valid].mean() / 255 < 0.08  # large

# -- renderer and distractors --------------------------------------------------------------------

@pytest.mark.parametrize("task", TASKS)
def test_renderer_agrees_with_the_simulators_segmentation(task):
    env, view, size = masklam.state_env(task), TASKS[task].camera, 384
    env.reset(seed=0)
    env.action_space.seed(0)
    model, true = env.unwrapped.model, env.unwrapped.data
    renderer, camera = masklam.AgentRenderer(model, view), mujoco.MjvCamera()
    camera.distance, camera.azimuth, camera.elevation = view[0], 90, view[1]
    try:
        reference = mujoco.Renderer(model, size, size)
    except Exception as error:  # MuJoCo raises many kinds
        pytest.skip(f"no OpenGL to compare with: {error}")
    reference.enable_segmentation_rendering()
    ious, data = [], mujoco.MjData(model)
    for _ in range(5):
        for _ in range(5):
            env.step(env.action_space.sample())
        data.qpos[:] = true.qpos
        mujoco.mj_forward(model, data)
        camera.lookat[:] = *data.subtree_com[1, :2], renderer.height
        reference.update_scene(data, camera)
        inside = (reference.render()[..., 0] > 0) * np.uint8(255)
        truth = inside.reshape(64, 6, 64, 6).mean((1, 3)).round().astype(np.uint8)
        rgb, alpha = renderer(true.qpos)
        ious.append(masklam.mask_iou(alpha, truth))
        assert (rgb <= alpha[..., None]).all() and rgb.max() > 100
        assert abs(alpha.mean() - truth.mean()) < 0.03 * truth.mean()  # soft alpha has no bias
    assert np.mean(ious) >= 0.94 and min(ious) >= 0.9  # limbs are three pixels wide

@pytest.mark.parametrize("level, size", [("none", 64), ("low", 50), ("hard", 33)])
def test_distractors_are_an_environment_whose_physics_they_leave_alone(level, size):
    plain = gym.make("HalfCheetah-v5", render_mode="rgb_array")
    check_env(masklam.Distractors(plain, level, size=size), skip_render_check=True,
              skip_close_check=True)
    env, qpos, films = masklam.Distractors(plain, level, size=size), [], []
    for seed, wrapped in ((4, plain), (4, env), (4, env), (5, env)):
        film = [wrapped.reset(seed=seed)[0]]
        wrapped.action_space.seed(0)
        film += [wrapped.step(wrapped.action_space.sample())[0] for _ in range(10)]
        qpos.append(plain.unwrapped.data.qpos.copy()), films.append(np.stack(film))
    assert (qpos[0] == qpos[1]).all() and (films[1] == films[2]).all()
    assert (films[2] != films[3]).any(-1).mean() > (0.03 if level == "none" else 0.5)
    observation, _, _, _, info = env.step(np.full(6, 3.0))  # is clipped
    assert (info["action"] == 1).all() and info["state"].shape == (17,)
    assert (env.render() == observation).all() and observation.shape == (size, size, 3)

def test_actions_from_minus_one_to_one_are_all_that_ones_own_environment_takes(monkeypatch):
    """What wraps it stays, and its actions drive a background as far as they reach."""
    spec = gym.envs.registration.EnvSpec("Own-v0", entry_point=lambda: gym.wrappers.TransformReward(
        gym.wrappers.RescaleAction(gym.make("HalfCheetah-v5"), np.float32([-0.2, 2] * 3),
                                   np.float32([1, 9] * 3)), lambda _: 7.0))
    monkeypatch.setitem(gym.registry, "Own-v0", spec)
    env, own = masklam.bare_env("Own-v0"), gym.make("Own-v0", disable_env_checker=True)
    distractors, box, driven = masklam.Distractors(own), own.action_space, []
    env.reset(seed=0), distractors.reset(seed=0)
    distractors.backdrop.step = driven.append
    for share in np.float32([-1, -0.5, 0, 1]):
        place = box.low + (box.high - box.low) * (share + 1) / 2
        assert env.step(np.full(6, share))[1] == distractors.step(place)[1] == 7
        for got in (driven[-1], env.unwrapped.data.ctrl, own.unwrapped.data.ctrl):
            np.testing.assert_allclose(got, np.full(6, share), atol=1e-6)

def test_splits_share_no_seed_however_many_episodes_are_allowed():
    """Nor do recording and evaluation, nor runs with other seeds."""
    most = {f.name: f.metadata["allowed"][-1:] for f in fields(Config)}
    names, spans = ["episodes", "heldout_episodes", "heldout_episodes", "eval_episodes"], []
    for seed, (split, name) in itertools.product((0, 1, *most["seed"]), zip(SPLITS, names)):
        first, *more = (masklam.episode_seed(replace(SMOKE, seed=seed), split, i)
                        for i in (0, 1, most[name][0] - 1))
        assert more == [first + 1, first + most[name][0] - 1]
        spans.append((first, more[1]))
    spans.sort()
    assert all(last < first for (_, last), (first, _) in zip(spans, spans[1:]))

@pytest.mark.parametrize("rho, split, follows", [
    (0.0, "training", 0.0), (0.6, "training", 0.6), (1.0, "heldout", 1.0),
    (1.0, "decorrelated", 0.0)])
def test_a_background_moves_as_fast_and_follows_the_action_as_much_as_asked(rho, split, follows):
    """Least squares from actions like the recorded to velocities explains rho^2, of a decorrelated
    background nothing; it does not drift, and what follows nothing keeps half its velocity."""
    config, expert = Config(correlation=rho, speed=3.0), masklam.load_expert("cheetah")
    env, velocities = masklam.make_env(config, split), []
    env.reset(seed=0)
    actions = np.concatenate([masklam.state_rollout(
        "cheetah", expert, i, config.steps, masklam.noise_scale(config, i, i))[1]
        for i in range(50, 75)])
    for action in actions:
        before, half = env.backdrop.position.copy(), env.backdrop.period / 2
        env.backdrop.step(action)
        velocities.append((env.backdrop.position - before + half).ravel() % (2 * half) - half)
        np.testing.assert_allclose(velocities[-1], env.backdrop.velocity, atol=1e-4)
    known, v = np.c_[actions, np.ones(len(actions))], np.stack(velocities)
    rest = v - known @ np.linalg.lstsq(known, v, rcond=None)[0]
    np.testing.assert_allclose(1 - rest.var(0) / v.var(0), follows**2, atol=0.06)
    np.testing.assert_allclose(v.std(0), 3, rtol=0.15)
    assert abs(v.mean(0)).max() < 0.15 * 3 and v.shape[1] >= 20
    again = [np.corrcoef(a, b)[0, 1] for a, b in zip(v[1:].T, v[:-1].T)]
    assert follows or again == pytest.approx(np.full(v.shape[1], 0.5), abs=0.1)

def test_what_is_drawn_moves_as_positions_say():
    """A sprite down and right, a texture up and left."""
    still = np.zeros((masklam.Backdrop.D, 1)), np.zeros(1)
    backdrop = masklam.Backdrop(np.random.default_rng(0), still)
    sprites, backdrop.sprites, backdrop.horizon, backdrop.position[:] = backdrop.sprites, [], 0, 40
    before, backdrop.sprites = backdrop.draw(), sprites[:1]
    place = lambda: np.argwhere((backdrop.draw() != before).any(-1)).min(0)
    here, backdrop.position[2] = place(), (43, 45)
    assert (place() - here == (3, 5)).all()
    backdrop.sprites, backdrop.position[1] = [], (43, 45)
    assert (backdrop.draw()[:-3, :-5] == before[3:, 5:]).all()

def test_levels_show_what_they_say_and_hard_views_walk_smoothly_within_limits():
    seen, poses = [], []
    for level in ("none", "low", "hard"):
        env = masklam.Distractors(gym.make("HalfCheetah-v5"), level)
        env.reset(seed=3)
        frame, _, _, _, info = env.step(np.zeros(6))
        seen.append((frame, info["mask"]))
        if level != "hard":  # at its soft outline the agent and what is behind it mix
            rgb, alpha = env.renderer(env.unwrapped.data.qpos)
            behind = (70, 105, 140) if level == "none" else env.backdrop.draw()
            assert len(np.unique(alpha)) > 2
            assert abs(frame - rgb - behind * (1 - alpha / 255)[..., None]).max() < 0.6
    (plain, mask), (low, same), (_, other) = seen
    inside = plain[mask == 255]
    assert (same == mask).all() and (inside == low[mask == 255]).all()
    assert inside[:, 0].mean() > 1.2 * inside[:, 2].mean()  # the agent is warm
    assert masklam.mask_iou(mask, other) < 0.95  # another view
    draw = env.renderer
    env.renderer = lambda qpos, view: poses.append(view) or draw(qpos, view)
    for _ in range(60):
        env.step(np.zeros(6))
    moves = np.diff(poses, axis=0)
    assert (abs(np.array(poses)) <= np.array([9, 9, 9, 0.05]) + 1e-9).all() and moves.any(0).all()
    assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(moves[1:].T, moves[:-1].T)]) > 0.5

@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures, an animation and a folder of frames, as a video of DAVIS is."""
    folder = tmp_path / "pictures"
    (folder / "frames").mkdir(parents=True)
    (folder / "readme.txt").write_text("not a picture")
    blots = np.random.default_rng(0).integers(0, 256, (12, 15, 3), np.uint8)
    photograph = Image.fromarray(blots).resize((450, 360), Image.Resampling.BICUBIC)
    film = [photograph.crop((30 * i, 0, 30 * i + 300, 300)) for i in range(5)]
    film[0].save(folder / "animation.gif", save_all=True, append_images=film[1:])
    for i, frame in enumerate(film):
        frame.save(folder / "frames" / f"{i}.png")
    photograph.save(folder / "photograph.jpg")
    photograph.rotate(90).convert("L").save(folder / "turned.PNG")
    return folder

def test_footage_plays_forwards_and_backwards_from_any_frame(pictures):
    rng, tied, starts = np.random.default_rng(0), (np.zeros((2, 1)), np.zeros(1)), set()
    frames = [np.asarray(Image.open(p).resize((48, 48), Image.Resampling.BICUBIC), int)
              for p in sorted((pictures / "frames").glob("*"))]
    for _ in range(60):
        footage = masklam.Footage(rng, tied, 1.0, size=48, files=[pictures / "frames"])
        footage.position[:], order = 0, []
        for _ in range(12):
            errors = [np.abs(footage.draw() - frame).mean() for frame in frames]
            assert min(errors) < 2
            order.append(int(np.argmin(errors)))
            footage.step(np.zeros(1))
        there_and_back = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0] * 3
        assert any(there_and_back[i:i + 12] == order for i in range(10))
        starts.add(tuple(order[:2]))
    assert len(starts) == 10
    before, footage.position[:] = footage.draw(), footage.position + (3, 5)
    assert (footage.draw()[:-3, :-5] == before[3:, 5:]).all()

def test_every_split_shows_other_footage_behind_the_agent(pictures, tmp_path):
    shown = {split: [p.name for p in masklam.footage(str(pictures), split)] for split in SPLITS}
    assert shown == dict(training=["animation.gif", "frames"], heldout=["photograph.jpg"],
                         decorrelated=["photograph.jpg"], evaluate=["turned.PNG"])
    config = replace(TINY, backgrounds=str(pictures), eval_episodes=1, eval_steps=3)
    masklam.record(config, tmp_path / "video")
    for split in SPLITS[:3]:
        video = Video.open(tmp_path / "video" / split)
        films = [masklam.read_film(pictures / name, 64).reshape(-1, 3) for name in shown[split]]
        colors = {tuple(c) for film in films for c in film}
        behind = np.unique(video.frames[video.masks == 0], axis=0)
        assert len(behind) > 200 and {tuple(c) for c in behind} <= colors
    _, film = masklam.rollout(config, pixel_policy, "cpu", "x")
    assert (film[:, :8] == film[:, :8, :, :1]).all()  # the grey picture

# -- recording -----------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["cheetah", "humanoid"])
def test_recorded_episodes_replay_exactly(task, tmp_path):
    """The environment takes the humanoid's actions from -0.4 to 0.4."""
    config, folder = replace(TINY, task=task, steps=12), tmp_path / "video"
    masklam.record(config, folder)
    video, env = Video.open(folder / "heldout"), masklam.make_env(config)
    frame, info = env.reset(seed=masklam.episode_seed(config, "heldout", 1))
    for t in range(12):
        assert (video.frames[1, t] == frame).all() and (video.masks[1, t] == info["mask"]).all()
        assert (video.states[1, t] == info["state"].astype(np.float32)).all()
        frame, reward, _, _, info = env.step(video.actions[1, t])
        moving = reward - info.get("reward_survive", 0)
        assert video.rewards[1, t] == pytest.approx(moving, abs=1e-4)
    assert abs(video.actions).max() <= 1 and video.demonstration.tolist() == [True, False]

def test_a_recording_goes_on_where_it_was_stopped(tmp_path):
    whole, rest, folder = recorded(TINY, tmp_path / "whole"), [], tmp_path / "stopped"
    assert np.count_nonzero(recorded(TINY, folder, 3).length) == 3
    Video.open(folder / "training", "r+").frames[3, :5] = 77  # of one that was not finished
    pmap = lambda act, jobs: rest.extend(job[2:] for job in jobs) or itertools.starmap(act, jobs)
    masklam.record(TINY, folder, pmap)
    assert rest == [("training", 3), *itertools.product(("heldout", "decorrelated"), (0, 1))]
    assert whole.frames.shape == (4, 20, 64, 64, 3) and (whole.length == 20).all()
    assert contents(folder) == contents(tmp_path / "whole")
    rest.clear(), masklam.record(TINY, folder, pmap)
    assert rest == []

def test_a_body_that_explores_starts_anew_when_it_has_fallen_and_so_does_its_clock(
        monkeypatch, tmp_path):
    """An expected action is that of a phase of 7.5 steps from the last start."""
    config, now = replace(TINY, task="walker", episodes=6, steps=80), np.arange(80)
    expert = np.random.default_rng(0).normal(0, 0.3, (6, 1 + 17 + 2))
    monkeypatch.setitem(TASKS, "walker", replace(TASKS["walker"], cycle=7.5))
    monkeypatch.setattr(masklam, "load_expert", lambda _: expert)
    video = recorded(config, tmp_path / "video", 6)
    assert (video.length[1::2] == 80).all() and video.length[::2].min() < 80
    assert (video.start[::2] == 0).all() and len(np.unique(video.start[1::2])) > 6
    height, angle = video.states[..., 0], video.states[..., 1]
    fallen = (height < 0.8) | (abs(angle) > 1)  # where the environment ends an episode
    assert not fallen[video.valid].any() and (video.start <= now).all()
    again = (video.start == now) & video.valid  # the first step of each start
    assert (abs(video.states[again] - masklam.state_env("walker").reset()[0]) < 0.02).all()
    for t in (0, 20, video.start[1, -1], 79):
        angle, state = 2 * np.pi * (t - video.start[1, t]) / 7.5, video.states[1, t].astype(float)
        intended = expert @ [1, *state, np.sin(angle), np.cos(angle)]
        expected = masklam.expected_action(intended.clip(-1, 1), 1.2)
        np.testing.assert_allclose(video.expected[1, t], expected, atol=1e-3)

def test_demonstrations_are_quiet_and_explorations_are_not(tmp_path):
    config, expert = replace(TINY, episodes=20, steps=40), masklam.load_expert("cheetah")
    video = recorded(config, tmp_path / "video", 20)
    intended = (expert[:, 0] + video.states.astype(float) @ expert[:, 1:].T).clip(-1, 1)
    noise, loud = video.actions - intended, ~video.demonstration
    quiet = video.demonstration[:, None, None] & (abs(video.actions) < 1)
    assert 0 < noise[quiet].std() < config.demonstration_noise
    assert len({masklam.noise_scale(config, i, i) for i in range(0, 20, 2)}) == 10
    # As many exploring actions are at their limits as noise of the config's scale takes there.
    beyond = [(1 - sign * intended[loud]) / config.exploration_noise / 2**0.5 for sign in (1, -1)]
    expected = sum(np.mean([math.erfc(x) / 2 for x in end.ravel()]) for end in beyond)
    assert (abs(video.actions[loud]) == 1).mean() == pytest.approx(expected, abs=0.06)
    for i in range(4):  # what is executed on average, by trying
        scale = masklam.noise_scale(config, i, masklam.episode_seed(config, "training", i))
        tries = np.random.default_rng(i).standard_normal((20_000, 1, 1)) * scale + intended[i, :5]
        np.testing.assert_allclose(video.expected[i, :5], tries.clip(-1, 1).mean(0), atol=0.03)

# -- pictures and films --------------------------------------------------------------------------

def save_film(path, frames, turns=0):
    """A film (n, H, W, 3) u8, that a player is told to turn right so many times."""
    with av.open(path, "w") as film:
        stream = film.add_stream("mpeg4", 10, width=frames.shape[2], height=frames.shape[1],
                                 pix_fmt="yuv420p", bit_rate=10**6)
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        film.mux(stream.encode())
    matrix = lambda c, s: struct.pack(">5i", c << 16, s << 16, 0, -s << 16, c << 16)
    before, tag, track = path.read_bytes().rpartition(b"tkhd")
    turned = matrix(*[(1, 0), (0, 1), (-1, 0), (0, -1)][turns])
    path.write_bytes(before + tag + track.replace(matrix(1, 0), turned, 1))

QUARTERS = np.uint8([[(200, 40, 40), (40, 200, 40)], [(40, 40, 200), (200, 200, 40)]])
QUARTERS = QUARTERS.repeat(16, 0).repeat(16, 1)
ROUND = np.stack([np.rot90(QUARTERS, turns) for turns in range(4)])  # to the left
WIDE = np.stack([np.pad(QUARTERS, ((0, 0), (16, 16), (0, 0)))] * 2)
UPRIGHT, TURNED, OVER, _ = map(Image.fromarray, ROUND)
GREY, FADED, FOUR, SIX, THREE = (UPRIGHT.convert("L"), UPRIGHT.copy(), UPRIGHT.quantize(4),
                                 Image.Exif(), Image.Exif())
FADED.putalpha(128), SIX.update({274: 6}), THREE.update({274: 3})  # orientation
LEVELS = np.linspace(0, 65535, 32).astype(np.uint16)[None].repeat(32, 0)
COLORED = lambda grey: np.asarray(grey)[..., None].repeat(3, -1)
SHOWN = {  # how a file is written, and what a viewer shows of it
    "some.BMP": (UPRIGHT.save, QUARTERS), "four.png": (FOUR.save, QUARTERS),
    "grey.png": (GREY.save, COLORED(GREY)), "faded.png": (FADED.save, QUARTERS * (128 / 255)),
    "greyer.png": (FADED.convert("LA").save, COLORED(GREY) * (128 / 255)),
    "deep.png": (Image.fromarray(LEVELS).save, COLORED(LEVELS / 257)),
    "bits.png": (UPRIGHT.convert("1", dither=0).save, 255 * (COLORED(GREY) >= 128)),
    "holed.png": (lambda p: FOUR.save(p, transparency=FOUR.getpixel((0, 0))),
                  QUARTERS * (np.indices((32, 32)).max(0) >= 16)[..., None]),
    "cmyk.jpg": (UPRIGHT.convert("CMYK").save, QUARTERS),
    "slow.jpeg": (lambda p: UPRIGHT.save(p, progressive=True), QUARTERS),
    "six.jpg": (lambda p: TURNED.save(p, exif=SIX), QUARTERS),
    "three.png": (lambda p: OVER.save(p, exif=THREE), QUARTERS),
    "three.gif": (lambda p: FOUR.save(p, save_all=True, append_images=[TURNED, OVER]), ROUND[:3]),
    "two.webp": (lambda p: UPRIGHT.save(p, save_all=True, append_images=[TURNED], lossless=True),
                 ROUND[:2])}
SHOWN |= {f"film.{kind}": (lambda p: save_film(p, WIDE), ROUND[[0, 0]]) for kind in (
    "mov", "avi", "MKV")} | {f"{turns}.mp4": (lambda p, turns=turns: save_film(p, np.rot90(
        WIDE, turns, (1, 2)), turns), ROUND[[0, 0]]) for turns in range(4)}

@pytest.mark.parametrize("name", SHOWN)
def test_a_file_is_read_as_a_viewer_shows_it_but_cut_to_a_square(name, tmp_path):
    (write, shown), path = SHOWN[name], tmp_path / name
    write(path)
    film, shown = masklam.read_film(path, 32), np.reshape(shown, (-1, 32, 32, 3))
    assert film.shape == shown.shape and film.dtype == np.uint8
    exact = path.suffix in (".BMP", ".png", ".gif", ".webp")
    assert abs(film - 1.0 * shown).mean() < (0.6 if exact else 5)
    assert len(masklam.read_film(path, 32, limit=1)) == 1

def test_pictures_of_a_folder_come_in_natural_order_and_what_is_hidden_does_not(tmp_path):
    names = [*range(1, 13), "cat 2", "cat 10", "dog 1"]
    colors = np.uint8([(i, 3 * i, 200 - i) for i in range(len(names))])
    for i, (name, color) in enumerate(zip(names, colors)):
        Image.new("RGB", (20 + i, 40 - 2 * i), tuple(color.tolist())).save(tmp_path / f"{name}.png")
    for hidden in ("._0001.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / hidden).write_bytes(b"0")
    assert (masklam.read_film(tmp_path, 16) == colors[:, None, None]).all()

@pytest.mark.parametrize("name", ["cut.png", "cut.mp4", "empty.png", "text.mp4", "text.gif"])
def test_a_picture_or_film_that_cannot_be_read_is_named(name, tmp_path):
    path, whole = tmp_path / name, tmp_path / "0.png"
    Image.effect_noise((32, 32), 50).save(whole)
    save_film(path, QUARTERS[None]) if name == "cut.mp4" else shutil.copy(whole, path)
    path.write_bytes(dict(cut=path.read_bytes()[:600], text=b"<html>404", empty=b"")[path.stem])
    for film in (path, tmp_path):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            masklam.read_film(film, 16)

def test_clips_of_ones_own_are_read_with_the_masks_there_are(tmp_path):
    """Of pictures in a folder, palettes as DAVIS has them; a film and a GIF without."""
    own, shapes = tmp_path / "own", np.zeros((32, 32), np.uint8)
    shapes[:, :10], shapes[:, 20:] = 1, 2  # two objects
    (own / "2").mkdir(parents=True), (own / "masks" / "2").mkdir(parents=True)
    save_film(own / "1.mp4", QUARTERS[None].repeat(3, 0))
    GREY.save(own / "10.gif", save_all=True, append_images=[GREY.rotate(90)])
    for i in range(5):
        UPRIGHT.save(own / "2" / f"{i}.jpg")
        mask = Image.fromarray(shapes)
        mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        mask.save(own / "masks" / "2" / f"{i}.png")
    video = masklam.read_clips(own, 32)
    assert video.length.tolist() == [3, 5, 2] and len(Windows(video)) == 7
    assert video.frames[video.valid].any((1, 2, 3)).all() and not video.frames[~video.valid].any()
    assert ((video.masks[1] >= 128) == (shapes > 0)).all()
    assert (video.masks[::2][video.valid[::2]] == 255).all()
    (own / "masks" / "2" / "4.png").unlink(), (tmp_path / "empty").mkdir()
    (tmp_path / "dim" / "masks" / "1").mkdir(parents=True), GREY.save(tmp_path / "dim" / "1.png")
    Image.fromarray(shapes).save(tmp_path / "dim" / "masks" / "1" / "1.png")  # objects' numbers
    for name, words in (("own", "4 pictures for the 5 frames"), ("empty", ""), ("none", "not a"),
                        ("dim", "masks.1 is 2 where the agent is, not 255"),
                        ("own", "masks.3 is named as none of the clips: 1, 2, 10")):
        with pytest.raises(UserError, match=f"{name}.*{words}"):
            masklam.read_clips(tmp_path / name, 32)
        (own / "masks" / "3").mkdir(exist_ok=True)

# -- windows -------------------------------------------------------------------------------------

@pytest.mark.parametrize("starts", [[0], [0, 3, 4, 7]])
def test_windows_equal_a_naive_loop_at_every_episode_edge(starts):
    """Episodes of one's own, and such as start anew at some steps."""
    video, latest = random_video(), lambda t: max(s for s in starts if s <= t)
    if len(starts) > 1:
        video = replace(video, start=np.tile([latest(t) for t in range(9)], (5, 1)))
    windows = Windows(video)
    ends = {e: [*(s for s in starts[1:] if s < n), n] for e, n in enumerate(video.length)}
    expected = [(e, t) for e in range(5) for t in range(9) if t + 1 < ends[e][-1]
                and t + 1 not in ends[e]]
    assert list(zip(windows.e, windows.t)) == expected
    chosen = np.arange(len(windows))
    for k in (1, 2, 3, 10):
        stacks, next_obs, mask = windows.batch(chosen, k)
        for i, (e, t) in enumerate(expected):
            reach = min(k, min(end for end in ends[e] if end > t) - 1 - t)
            wanted = [max(now + d, latest(t)) for now in (t, t + reach) for d in (-2, -1, 0)]
            assert (stacks[i].numpy() == [video.frames[e, s] for s in wanted]).all()
            target = video.frames[e, t + 1].transpose(2, 0, 1) / 255 - 0.5
            np.testing.assert_allclose(next_obs[i], target, atol=1e-6)
            np.testing.assert_allclose(mask[i, 0], video.masks[e, t + 1] / 255, atol=1e-6)
        assert torch.equal(windows.seen(chosen), stacks[:, :3])
        assert k > 1 or torch.equal(windows.seen(chosen, 6), stacks)
    mixed = windows.batch(chosen, chosen % 3 + 1)[0]  # an offset for every window of the batch
    assert all(torch.equal(mixed[i], windows.batch(chosen[i:i + 1], i % 3 + 1)[0][0])
               for i in chosen)
    assert set(windows.e[windows.demonstrations()]) == {0, 4}  # two has one frame
    where = windows.e[3:5], windows.t[3:5]
    assert (windows.actions(chosen[3:5]) == video.actions[where]).all()
    short = Windows(replace(video, actions=video.actions[:, :-1]))  # none after the last frame
    assert (short.actions() == windows.actions()).all()
    with pytest.raises(UserError, match="noise is known of recordings alone"):
        Windows(replace(video, expected=None)).actions_and_noise()
    both, noise = windows.actions_and_noise(chosen[3:5]), video.actions - video.expected
    assert (both == np.c_[video.actions[where], noise[where]]).all()

def test_folded_frames_are_the_frames_in_other_order():
    frames = torch.randint(0, 256, (2, 3, 8, 8, 4), dtype=torch.uint8)
    expected = frames.permute(0, 1, 4, 2, 3).flatten(1, 2) / 255 - 0.5
    torch.testing.assert_close(masklam.to_float(frames), expected)
    folded = masklam.to_float(frames, 4)  # (2, 3 * 16 * 4, 2, 2)
    back = folded.unflatten(1, (3, 4, 4, 4)).permute(0, 1, 4, 5, 2, 6, 3).reshape(2, 12, 8, 8)
    torch.testing.assert_close(back, expected)
    with torch.autocast("cpu", torch.bfloat16):
        lower = masklam.to_float(frames, 4)
    assert lower.dtype == torch.bfloat16
    torch.testing.assert_close(lower.float(), folded, atol=2e-3, rtol=0)

@pytest.mark.parametrize("fault, words", [
    (dict(length=np.array([9, 10, 3, 2, 5])), "length is .5,., up to 10, not .5,. and 9 at most"),
    (dict(length=np.array([9, 3])), "length is"), ({}, "frames are .8, 8., frame_size is 64"),
    (dict(length=np.ones(5, int)), "nothing to learn from"),
    (dict(frames=np.zeros((5, 9, 3, 8, 8), np.uint8)), "frames are .5, 9, 3, 8, 8., not .E, T, H"),
    (dict(frames=np.zeros((5, 9, 8, 8, 3), np.float32)), "float32.*not arrays of uint8"),
    (dict(frames=[np.zeros((9, 8, 8, 3), np.uint8)] * 5), "list.*not arrays of uint8"),
    (dict(frames=[np.zeros((n, 8, 8, 3), np.uint8) for n in (9, 2, 1, 5, 9)]), "frames"),
    (dict(masks=np.zeros((5, 8, 8, 8), np.uint8)), "masks are .5, 8, 8, 8., not .5, 9, 8, 8."),
    (dict(masks=np.zeros((5, 9, 8, 8, 1), np.uint8)), "masks are"),
    (dict(masks=np.zeros((5, 9, 8, 8), bool)), "not arrays of uint8"),
    (dict(masks=np.ones((5, 9, 8, 8), np.uint8)), "masks are 255 where the agent is, not 1"),
    (dict(masks=np.uint8(255) * ~np.tile(random_video().valid[..., None, None], (8, 8))),
     "the masks are empty.*"),  # 255 behind the episodes' ends
    (dict(actions=np.zeros((5, 7, 2), np.float32)), "actions are .5, 7, 2., not .5, 9 or 8, A.")])
def test_a_video_that_would_be_misread_is_refused_in_a_line(fault, words):
    with pytest.raises(UserError, match=f"^{words}|{words}$") as error:
        masklam.train_lam(Config(), Windows(replace(random_video(), **fault)), "lapo")
    assert "\n" not in str(error.value)

# -- masks ---------------------------------------------------------------------------------------

def test_a_click_is_the_point_of_the_agent_farthest_from_its_border():
    masks = np.zeros((2, 64, 64), np.uint8)
    masks[0, 10:19, 30:39] = masks[0, 10, 5:60] = 255  # a body and thin limbs
    masks[1, 40:45, 2:60] = 255
    body, bar = masklam.clicks(masks)
    assert body.tolist() == [34.5, 14.5] and bar[1] == 42.5

class FakePredictor:
    """A SAM with prepared answers to frames number n: candidates (n, 3, H, W), scores (n, 3)."""

    def __init__(self, candidates, scores):
        self.device, self.answers, self.clicked = torch.device("cpu"), (candidates, scores), []

    def set_image(self, frame):
        self.number, self.features = int(frame[0, 0, 0]), torch.zeros(1)

    def predict(self, points, labels):
        assert labels.tolist() == [1]  # on the agent
        self.clicked.append((self.number, *points[0]))
        return *(x[self.number] for x in self.answers), None

def squares(side, *reach):
    """A square in each of twelve masks, at random places."""
    masks = np.zeros((12, 32, 32), bool)
    for mask, (y, x) in zip(masks, np.random.default_rng(side).integers(*reach, (12, 2))):
        mask[y:y + side, x:x + side] = True
    return masks

AGENT = squares(10, 12, 13)  # as the camera follows it

@pytest.mark.parametrize("wrong, right, also, scores", [
    (AGENT | True, AGENT, squares(10, 0, 22),  # something that each time is elsewhere
     [(0.99, 0.8, 0.82), (0.99, 0.82, 0.8)] * 6),
    (squares(16, 8, 16), squares(8, 8, 24), squares(16, 8, 16),  # of other sizes
     [(0.75, 0.95, 0.75), (0.95, 0.75, 0.75), (0.75, 0.95, 0.75)] * 4),
    (AGENT | True, AGENT, AGENT, (0.99, 0.8, 0.7)),  # everything, and SAM is sure of it
    (squares(1, 16, 17), AGENT, AGENT, (0.99, 0.8, 0.7))])  # a speck
def test_of_sams_answers_that_is_taken_which_is_plausible_and_like_the_others(
        wrong, right, also, scores):
    candidates = np.stack([wrong, right, also], 1)
    frames = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((32, 32, 3), np.uint8)
    sam = FakePredictor(candidates, np.broadcast_to(scores, (12, 3)))
    masks = masklam.segment(sam, frames, np.arange(24).reshape(12, 2))
    assert sam.clicked == [(i, 2 * i, 2 * i + 1) for i in range(12)]
    assert masks.dtype == np.uint8 and (masks == 255 * right).all()

def test_the_student_is_taught_sams_masks_of_keyframes_from_all_of_the_video(monkeypatch):
    """Frames without an agent are not shown to SAM, who is clicked on the agent."""
    frames, masks = (np.zeros((4, 16, 64, 64, *c), np.uint8) for c in ((3,), ()))
    frames[:], masks[::2, :, 20:40, 30:40] = np.arange(64).reshape(4, 16, 1, 1, 1), 255
    answer, got = np.indices((64, 64))[0] < 12, []
    sam = FakePredictor(np.broadcast_to(answer, (64, 3, 64, 64)), np.zeros((64, 3)))
    monkeypatch.setattr(masklam, "load_sam", lambda *_: sam)
    monkeypatch.setattr(masklam, "train_student", lambda _, *given: got.extend(given))
    video = Video(frames, masks, np.array([16, 16, 10, 0]))  # 42 frames
    _, iou = masklam.teach_student(replace(SMOKE, masks="sam", keyframes=8), video, "cpu")
    shown = [0, 5, 11, 35, 41]  # of 0, 5, 11, 17, 23, 29, 35, 41
    assert [number for number, _, _ in sam.clicked] == shown == got[0][:, 0, 0, 0].tolist()
    assert all(30 <= x < 40 and 20 <= y < 40 for _, x, y in sam.clicked)
    assert (got[1] == 255 * answer).all() and iou == 0

def small_sam(checkpoint=None, width=64):
    """A tiny SAM, built and loaded as segment_anything builds and loads vit_b."""
    sam = sa.Sam(sa.ImageEncoderViT(128, 8, 3, width, depth=2, num_heads=2, out_chans=64,
                                    use_rel_pos=True, global_attn_indexes=(0, 1)),
                 sa.PromptEncoder(64, (16, 16), (128, 128), 16), sa.MaskDecoder(
                     transformer_dim=64, transformer=sa.TwoWayTransformer(2, 64, 4, 128)))
    if checkpoint:
        with open(checkpoint, "rb") as file:
            sam.load_state_dict(torch.load(file))
    return sam.eval()

def agent_frames(seeds):
    """Frames, and their masks, of random cheetahs in front of the seeds' backgrounds."""
    env, shots = masklam.make_env(SMOKE), []
    for seed in seeds:
        env.reset(seed=seed)
        env.action_space.seed(seed)
        steps = [env.step(env.action_space.sample()) for _ in range(12)]
        shots += [(frame, info["mask"]) for frame, *_, info in steps[1::2]]
    return map(np.stack, zip(*shots))

@pytest.fixture(scope="module")
def fitted_sam(tmp_path_factory):
    """The file of a small SAM, fitted to masks of our own frames."""
    torch.manual_seed(0)
    sam, (frames, masks), on = small_sam(), agent_frames(range(100, 170)), torch.ones(1, 1)
    resize = segment_anything.SamPredictor(sam).transform.apply_image
    images = torch.from_numpy(np.stack(list(map(resize, frames)))).permute(0, 3, 1, 2)
    truth, points = torch.from_numpy(masks >= 128).float(), torch.from_numpy(masklam.clicks(masks))
    optimizer, rng = torch.optim.AdamW(sam.parameters()), np.random.default_rng(0)
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20, (81 - step) / 30)
        batch, loss = rng.integers(len(images), size=6), 0
        embeddings = sam.image_encoder(sam.preprocess(images[batch]))
        for embedding, (x, y), mask in zip(embeddings.split(1), points[batch], truth[batch]):
            point = torch.tensor([[[2 * x, 2 * y]]]), on  # 128 / 64
            sparse, dense = sam.prompt_encoder(points=point, boxes=None, masks=None)
            logits, iou = sam.mask_decoder(embedding, sam.prompt_encoder.get_dense_pe(), sparse,
                                           dense, multimask_output=True)  # (1, 3, 64, 64)
            inside = logits.sigmoid()
            overlap = (inside * mask).sum((2, 3)) / (inside + mask - inside * mask).sum((2, 3))
            loss = loss + (1 - overlap).mean() + (iou - overlap.detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("sam") / "fitted.pth"
    torch.save(sam.state_dict(), path)
    return path

@pytest.fixture
def small_registry(monkeypatch):
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", small_sam)

def test_sam_finds_the_agent_on_unseen_backgrounds(fitted_sam, small_registry):
    frames, truth = agent_frames(range(500, 506))
    predictor = masklam.load_sam("vit_b", str(fitted_sam), "cpu")
    iou = masklam.mask_iou(masklam.segment(predictor, frames, masklam.clicks(truth)), truth)
    assert iou >= 0.7, iou

@pytest.mark.parametrize("kind", ["good", "other", "html", "offline"])
def test_a_checkpoint_is_downloaded_once_if_its_hash_is_right(
        kind, fitted_sam, small_registry, tmp_path, monkeypatch):
    """From a server on this machine, to an empty folder."""
    good = fitted_sam.read_bytes()
    for name, content in dict(good=good, other=good[:-1], html=b"<html>").items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(masklam.SAM_FILES, "vit_b", (kind, hashlib.sha256(good).hexdigest()))
    handler = lambda *args: http.server.SimpleHTTPRequestHandler(*args, directory=tmp_path)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = 9 if kind == "offline" else server.server_port
        monkeypatch.setattr(masklam, "SAM_URL", f"http://127.0.0.1:{port}/")
        with contextlib.nullcontext() if kind == "good" else pytest.raises(
                UserError, match="refused" if kind == "offline" else "invalid hash"):
            masklam.load_sam("vit_b", "", "cpu")
        server.shutdown()
    files = [p.name for p in (tmp_path / "hub").rglob("*") if p.is_file()]
    assert files == (["good"] if kind == "good" else [])
    if kind == "good":
        masklam.load_sam("vit_b", "", "cpu")  # it is not fetched again

def test_a_student_learns_from_keyframes_to_mask_unseen_backgrounds(tmp_path):
    """Through a run, which learns with the masks that it found."""
    config = replace(TINY, masks="student", episodes=24, heldout_episodes=8, steps=12,
                     student_updates=400)
    run, found = Run(config, tmp_path), []
    for (split, true), windows in zip(run.videos.items(), run.windows):
        masks = windows.video.masks
        found.append(masklam.mask_iou(masks, true.masks))
        assert windows.video.frames is true.frames and 0.8 <= found[-1] < 1, split
        assert (windows.masks.numpy() == masks.reshape(-1, 64, 64)).all()
    assert run.mask() == dict(zip(SPLITS, found), keyframes=1)  # the simulator's

# -- loss, networks, training --------------------------------------------------------------------

def test_the_loss_is_an_average_weighted_by_the_mask():
    """Weight 1 is the plain MSE bit for bit, a hard mask lets no gradient out, and a batch without
    an agent teaches nothing."""
    prediction = torch.randn(4, 3, 8, 8, requires_grad=True)
    target, soft = torch.randn(4, 3, 8, 8), torch.rand(4, 1, 8, 8)
    hard, loss = soft.round(), masklam.masked_mse
    inside = hard.expand(-1, 3, -1, -1).bool()
    assert torch.equal(loss(prediction, target, soft, 1.0), F.mse_loss(prediction, target))
    for mask, background in ((hard, 0.0), (soft, 0.0), (soft, 0.3), (soft, 0.9)):
        weight = (mask + background * (1 - mask)).expand(-1, 3, -1, -1)
        expected = np.average(((prediction - target) ** 2).detach(), weights=weight)
        assert loss(prediction, target, mask, background).item() == pytest.approx(expected, 1e-5)
    loss(prediction, target, hard, 0.0).backward()
    assert (prediction.grad[~inside] == 0).all() and (prediction.grad[inside] != 0).all()
    prediction.grad = None
    empty = loss(prediction, target, torch.zeros(4, 1, 8, 8), 0.0)
    empty.backward()
    assert empty.item() == 0 and (prediction.grad == 0).all()

def test_paper_preset_has_the_authors_network_sizes_and_learns_and_acts():
    """Three updates of a LAM and of its policy."""
    conv = lambda i, o, k: (i * k * k + 1) * o
    encoder = lambda *widths: sum(conv(i, o, 3) + 4 * conv(o, o, 3)
                                  for i, o in itertools.pairwise(widths))
    decoder = sum(4 * conv(w, w, 3) + conv(w, below, 3)
                  for w, below in ((192, 192), (192, 96), (96, 96))) + conv(96, 3, 3)
    config = Config(**PRESETS["paper"] | dict(batch_size=4, lam_updates=3, policy_updates=3))
    windows = Windows(random_video(2, 12, 64))
    lam = masklam.train_lam(config, windows, "masklam")
    targets, rows = masklam.latent_targets(lam.idm, windows), windows.demonstrations()
    policy = masklam.clone(config, windows, targets, rows, "policy")
    counts = [len(weights(network)) for network in (lam.idm, lam.fdm, policy)]
    head = (128 * 64 + 1) * 128
    assert counts == [
        encoder(18, 64, 128, 128) + head,
        encoder(9, 96, 192, 192) + 129 * 192 * 64 + conv(384, 192, 1) + decoder,
        encoder(9, 64, 128, 128) + head] == [2_608_960, 8_724_387, 2_603_776]
    stacks = windows.seen(np.arange(2), 6)
    prediction = lam.fdm(stacks[:, :3], torch.full((2, 128), 1e3))
    assert np.isfinite(lam.losses).all() and lam.idm(stacks).shape == policy(stacks[:, :3]).shape
    assert prediction.shape == (2, 3, 64, 64) and 0 < abs(prediction).max() <= 0.5
    assert not torch.equal(prediction, lam.fdm(stacks[:, :3], torch.zeros(2, 128)))

@pytest.mark.parametrize("offset", [1, 4])
def test_lapo_and_masklam_differ_in_nothing_but_the_weight(offset, monkeypatch):
    """The same networks, batches and offsets; another seed has others. The losses are those
    written out, with weight 1 for lapo and with the mask's for masklam."""
    exact, handed, drawn = lambda _: contextlib.nullcontext(), [], []
    monkeypatch.setattr(masklam, "autocast", exact)  # bfloat16 would round what is compared
    monkeypatch.setattr(masklam, "train", lambda *given: handed.append(given) or [])
    config, windows = replace(TINY, frame_size=32, offset=offset), tiny_windows()
    for method, more in (("lapo", {}), ("masklam", dict(background_weight=0.3)),
                         ("masklam", dict(background_weight=1.0)), ("lapo", dict(seed=1))):
        masklam.train_lam(replace(config, **more), windows, method)
    lams, losses, updates, rates, *_ = zip(*handed)
    assert set(updates) == {config.lam_updates} and set(rates) == {config.lam_lr}
    assert [torch.equal(weights(lams[0]), weights(lam)) for lam in lams] == [True] * 3 + [False]
    batch = windows.batch
    monkeypatch.setattr(windows, "batch", lambda *given: drawn.append(given) or batch(*given))
    for step in range(4):
        lapo, masked, plain, _ = (loss(step).item() for loss in losses)
        (chosen, k), *same, other = drawn[4 * step:]
        assert len(same) == 2 and all((chosen == a).all() and (k == b).all() for a, b in same)
        assert len(chosen) == config.batch_size and (chosen != other[0]).any() and lapo == plain
        stacks, next_obs, mask = batch(chosen, k)
        error = (lams[0].fdm(stacks[:, :3], lams[0].idm(stacks)) - next_obs).detach() ** 2
        weight = (mask + 0.3 * (1 - mask)).expand_as(error)
        expected = error.mean().item(), np.average(error, weights=weight)
        assert (lapo, masked) == pytest.approx(expected, rel=1e-5)
    assert {k for _, each in drawn for k in each} == set(range(1, offset + 1))
    assert len({tuple(chosen) for chosen, _ in drawn}) == 8

@pytest.mark.parametrize("slopes", [[5.0] * 40, [5.0, 0.5, -3.0, 0.1] * 10, [0.5, -3.0, 2.0] * 11])
def test_training_is_adamw_with_warm_up_decay_and_clipped_gradients(slopes):
    """Written out for one weight; and the losses are means of parts of the training, up to ten."""
    network, losses, m, v, n = torch.nn.Linear(1, 1, bias=False), [], 0.0, 0.0, len(slopes)
    weight = float(network.weight.detach())
    history = list(masklam.train(
        network, lambda step: slopes[step] * network.weight.sum() + step, n, 0.1, "lapo"))
    for step, slope in enumerate(slopes):
        losses.append(slope * weight + step)
        slope = np.clip(slope, -1, 1)
        lr = 0.1 * min(1, (step + 1) / (0.05 * n + 1)) * (1 + np.cos(np.pi * step / n)) / 2
        m, v = 0.9 * m + 0.1 * slope, 0.99 * v + 0.01 * slope**2
        mean, square = m / (1 - 0.9**(step + 1)), v / (1 - 0.99**(step + 1))
        weight -= lr * (0.01 * weight + mean / np.sqrt(square))
    assert float(network.weight.detach()) == pytest.approx(weight, rel=1e-4)
    assert [step for step, _ in history] == [*range(4, n, 4), n]
    means = [np.mean(losses[i:i + 4]) for i in range(0, n, 4)]
    np.testing.assert_allclose([mean for _, mean in history], means, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("value, at, by", [(math.nan, 0, 3), (math.inf, 0, 3), (math.nan, 20, 21)])
def test_a_loss_that_is_not_finite_is_an_error(value, at, by, tmp_path, monkeypatch):
    """Even in the last update; and no checkpoint keeps it."""
    network = torch.nn.Linear(1, 1)
    monkeypatch.setattr(masklam.time, "monotonic", itertools.count(0, 40).__next__)  # always due
    fit = lambda value: list(masklam.train(network, lambda step: network.weight.sum() * 0 + (
        value if step >= at else 1), 21, 0, "lapo", tmp_path / "checkpoint"))
    with pytest.raises(UserError, match=f"the loss of lapo is {value} by update {by}:"):
        fit(value)
    assert fit(1)[-1] == (21, 1)

def stopped_at(windows, batches):
    """Windows that end a training when that many batches have been drawn."""
    left = [windows.index] * batches
    windows.index = lambda *given: left.pop()(*given)
    return windows

@pytest.mark.parametrize("batches", [1, 13, 20])
def test_resumed_training_equals_uninterrupted(batches, tmp_path, monkeypatch):
    config, path = replace(TINY, frame_size=32, lam_updates=40), tmp_path / "checkpoint"
    whole = masklam.train_lam(config, tiny_windows(), "masklam")
    monkeypatch.setattr(masklam.time, "monotonic", itertools.count(0, 40).__next__)  # always due
    with pytest.raises(IndexError, match="^pop from empty list$"):
        masklam.train_lam(config, stopped_at(tiny_windows(), batches), "masklam", path)
    rest = stopped_at(tiny_windows(), config.lam_updates - batches)  # and not a batch more
    resumed = masklam.train_lam(config, rest, "masklam", path)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.losses == resumed.losses and len(whole.losses) == 10

def test_a_latents_use_is_what_the_forward_model_loses_without_it():
    """Frames of two colours, whose upper quarter is the agent."""
    video, rng = random_video(12, 30), np.random.default_rng(0)
    parts = every, agent, behind, none = slice(0, 8), slice(0, 2), slice(2, 8), slice(0, 0)
    for part, mask in zip(parts[1:3], (255, 0)):
        video.frames[:, :, part] = rng.integers(0, 256, (12, 30, 1, 1, 3))
        video.masks[:, :, part] = mask

    def use(rows, weight, share=1.0):
        """Of a forward model that reads these rows, and a share of them, from the latent."""
        def fdm(obs, z):
            last = masklam.to_float(obs[:, 2:])
            last[:, :, rows] = (share * z + (1 - share) * last)[:, :, rows]
            return last

        return masklam.latent_use(SimpleNamespace(
            idm=lambda stacks: masklam.to_float(stacks[:, 5:]), fdm=fdm,
            background_weight=weight), Windows(video))

    assert [use(every, 1.0), use(agent, 0.0)] == pytest.approx([1, 1], abs=1e-4)
    assert use(none, 1.0) == use(none, 0.0) == use(behind, 0.0) == 0  # what weighs is the agent
    assert 0.1 < use(agent, 1.0) < 0.3 < use(behind, 1.0) < 0.9
    assert 0.5 < use(every, 1.0, 0.5) < 0.8  # 1/4 of the error is left of 1/4 + 1/4 + 1/4

def test_a_scarce_latent_goes_to_the_agent_with_the_mask_and_to_the_background_without():
    """Brightness of a small agent is the action, that of a large background the distractor."""
    E, T, size = 60, 12, 16
    actions, distractor = np.random.default_rng(0).uniform(-1, 1, (2, E, T, 1)).astype(np.float32)
    shown, masks = np.full((2, E, T, size, size), 127, np.uint8)
    shown[:, 1:, :4] = (127 + 120 * actions[:, :-1, :, None]).round()
    shown[:, 1:, 4:] = (127 + 120 * distractor[:, :-1, :, None]).round()
    masks[:, :, :4], masks[:, :, 4:] = 255, 0
    arrays = shown[..., None].repeat(3, -1), masks, np.full(E, T), actions, 0 * actions
    windows = [Windows(Video(*(x[part] for x in arrays)))
               for part in (slice(0, 40), slice(40, 50), slice(50, 60))]
    config, got = replace(TINY, frame_size=16, latent_dim=1, lam_updates=150, batch_size=64), {}
    for method in METHODS:
        lam = masklam.train_lam(config, windows[0], method)
        assert lam.losses[-1] < 0.5 * lam.losses[0]
        got[method] = masklam.probe(config, lambda *args: masklam.encode(lam.idm, *args), *windows)
    assert got["masklam"]["probe_nmse"] < 0.2 and got["masklam"]["leakage_r2"] < 0.1
    assert got["lapo"]["probe_nmse"] > 0.8 and got["lapo"]["leakage_r2"] > 0.5

# -- probes --------------------------------------------------------------------------------------

def test_ridge_equals_least_squares_on_the_augmented_problem():
    rng = np.random.default_rng(0)
    x, y, new = (rng.normal(size=size) * 3 + 1 for size in ((200, 5), (200, 2), (9, 5)))
    scaled = (x - x.mean(0)) / (x.std(0) + 1e-8)
    rows = np.r_[scaled, np.sqrt(0.1 * 200) * np.eye(5)]
    found = np.linalg.lstsq(rows, np.r_[y - y.mean(0), np.zeros((5, 2))], rcond=None)[0]
    expected = (new - x.mean(0)) / (x.std(0) + 1e-8) @ found + y.mean(0)
    np.testing.assert_allclose(masklam.ridge(x, y, 0.1)(new), expected, atol=1e-9)

def test_an_mlp_probe_reads_what_lies_on_no_line_and_nothing_from_noise():
    """A product of two inputs, on any scale, beside others that say nothing in training."""
    config, rng = replace(TINY, probe_updates=300), np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    x, unseen, product = normal(2500, 2), normal(1000, 2), lambda x: np.c_[x.prod(1), x[:, 0]]
    line = masklam.nmse(masklam.ridge(x, product(x))(unseen), product(unseen))
    predict = masklam.mlp_probe(config, np.c_[100 * x + 7, 0 * x], product(x), "cpu")
    mlp = masklam.nmse(predict(np.c_[100 * unseen + 7, unseen]), product(unseen))
    assert line[0] > 0.9 and line[1] < 0.01 and mlp.max() < 0.1
    x, y, unseen, true = normal(2500, 20), normal(2500, 1), normal(2500, 20), normal(2500, 1)
    predict = masklam.mlp_probe(config, x, y, "cpu")
    assert 0.9 < masklam.nmse(predict(unseen), true).mean() < 1.3

def test_a_probe_reads_the_action_its_noise_and_the_background_from_what_knows_them():
    windows, config = [Windows(random_video(12, 30))] * 3, replace(TINY, probe_updates=200)
    mixing = np.random.default_rng(1).standard_normal((2, 6)).astype(np.float32)
    linear = masklam.probe(config, lambda w, chosen: w.actions(chosen) @ mixing, *windows)
    assert max(linear["probe_nmse"], linear["probe_nmse_decorrelated"]) < 1e-6
    assert linear["probe_nmse_per_dimension"] == pytest.approx([0, 0], abs=1e-6)
    assert linear["probe_nmse_mlp"] < 0.1 < linear["probe_nmse_noise_mlp"]
    assert linear["probe_nmse_noise"] == pytest.approx(0.5, abs=0.1)  # half of it is expected
    assert linear["leakage_r2"] < 0.1
    noise = masklam.probe(config, lambda w, chosen: w.actions_and_noise(chosen)[:, 2:], *windows)
    assert noise["probe_nmse_noise"] < 1e-6 and noise["probe_nmse_noise_mlp"] < 0.1
    assert masklam.probe(config, masklam.next_background, *windows)["leakage_r2"] > 0.999

def test_a_probe_is_read_where_it_was_not_fitted():
    windows, asked = [Windows(random_video(12, 30, 8, seed)) for seed in (1, 2, 3)], []
    rng = np.random.default_rng(0)

    def chance(w, chosen):
        asked.append((windows.index(w), len(chosen)))
        return rng.standard_normal((len(chosen), 40)).astype(np.float32)

    for few in (100, 300):
        got = masklam.probe(replace(TINY, probe_windows=few), chance, *windows)
        assert asked[-3:] == [(0, few), (1, 348), (2, 348)] and got["leakage_r2"] < -0.1
        assert min(got["probe_nmse"], got["probe_nmse_noise"], got["probe_nmse_decorrelated"]) > 1.1
        assert 0.9 < min(got["probe_nmse_mlp"], got["probe_nmse_noise_mlp"]) < 1.3
    of_two = lambda w, chosen: w.actions(chosen) * (w is not windows[2])
    got = masklam.probe(TINY, of_two, *windows)
    assert got["probe_nmse"] < 1e-6 and got["probe_nmse_decorrelated"] == pytest.approx(1, abs=0.1)

def test_the_next_background_is_the_mean_of_what_is_not_agent():
    video = random_video()
    video.masks[::2] //= 10  # nothing of which is agent
    windows = Windows(video)
    got = masklam.next_background(windows, np.arange(len(windows))).reshape(-1, 3, 4, 4)
    for i in range(len(windows)):
        place = windows.e[i], windows.t[i] + 1, slice(2, 4), slice(4, 6)
        behind = video.masks[place] < 26  # a tenth of agent, at most
        expected = video.frames[place][behind].mean(0) if behind.any() else np.zeros(3)
        np.testing.assert_allclose(got[i, :, 1, 2], expected, rtol=1e-5)

@pytest.mark.parametrize("name, late, knows", [
    ("past-only", 0, True), ("past-only", 1, False), ("supervised-idm", 1, True)])
def test_a_reference_sees_the_frames_it_may_see(name, late, knows):
    """The action is painted into the frame at which it is taken, or into the next."""
    windows, unseen = (painted_windows(seed, late) for seed in (0, 1))
    every, frames = np.arange(len(windows)), masklam.REFERENCES[name]
    network = masklam.clone(PAINTED, windows, windows.actions(), every, name, frames, updates=160)
    found = masklam.nmse(masklam.encode(network, unseen, every, frames), unseen.actions()).mean()
    assert found < 0.2 if knows else found > 0.9

# -- policies ------------------------------------------------------------------------------------

def painted_windows(seed=0, late=0):
    """The action is painted into the frame of its step, or `late` steps later."""
    E, T = 20, 20
    actions = np.random.default_rng(seed).uniform(-1, 1, (E, T, 2)).astype(np.float32)
    frames, shown = np.zeros((E, T, 32, 32, 3), np.uint8), np.roll(actions, late, 1)
    frames[..., 0] = (127 + 120 * shown).round().repeat(16, 2)[..., None]
    return Windows(Video(frames, frames[..., 0], np.full(E, T), actions, actions,
                         demonstration=np.arange(E) % 2 == 0))

PAINTED = replace(TINY, frame_size=32, policy_updates=200, decoder_updates=300, batch_size=64,
                  labels=100)

class PaintedIDM(torch.nn.Module):
    """Knows the action that is painted, turned, and on a scale of its own."""

    def forward(self, stacks):
        seen = torch.stack([stacks[:, 2, 0, 0, 0], stacks[:, 2, -1, 0, 0]], 1) / 255 - 0.5
        return 1e-3 * seen @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]])

def cloned_and_decoded(config, windows, labelled):
    """The policy of PaintedIDM: latent targets, a clone of them, a decoder of the clone's."""
    targets = masklam.latent_targets(PaintedIDM(), windows)
    policy = masklam.clone(config, windows, targets, windows.demonstrations(), "clone")
    return masklam.decode(config, policy, windows, targets, labelled, "decode")

def test_cloning_and_decoding_recover_a_visible_action():
    windows = painted_windows()
    policy = cloned_and_decoded(PAINTED, windows, masklam.labelled_windows(PAINTED, windows))
    with torch.no_grad():
        got = policy(windows.seen(np.arange(len(windows)))).numpy()
    assert masklam.nmse(got, windows.actions()).mean() < 0.05
    rows = windows.demonstrations()  # those of the other episodes may be anything
    windows.video.actions[1::2] = np.nan
    of_demonstrations = masklam.nmse(got[rows], windows.actions(rows)).mean()
    assert masklam.action_nmse(policy, windows) == pytest.approx(of_demonstrations, rel=0.1)
    targets = masklam.latent_targets(PaintedIDM(), windows)  # at unit variance
    z = masklam.encode(PaintedIDM(), windows, rows)
    np.testing.assert_allclose(targets[rows], (z - z.mean(0)) / z.std(0), rtol=0.01, atol=0.01)
    assert (np.delete(targets, rows, 0) == 0).all() and (windows.e[rows] % 2 == 0).all()

def test_labels_are_whole_demonstrations_drawn_at_random():
    windows = painted_windows()
    chosen, other, every = (masklam.labelled_windows(replace(PAINTED, labels=n, seed=seed), windows)
                            for n, seed in ((60, 0), (60, 1), (999, 0)))
    counts = np.bincount(windows.e[chosen], minlength=20)
    assert len(set(chosen)) == 60 and (counts[1::2] == 0).all()
    assert counts.tolist().count(19) == 3 and set(other) != set(chosen)  # of 19 windows each
    assert set(every) == set(windows.demonstrations())

@pytest.mark.parametrize("learner", ["decoder", "labels-only", "oracle"])
def test_whoever_learns_from_labels_sees_no_other_label(learner):
    """What may not be seen is nan; and what may be seen matters."""
    windows, config = painted_windows(), replace(PAINTED, policy_updates=20, decoder_updates=20)
    allowed = masklam.labelled_windows(config, windows)
    if learner == "oracle":
        allowed = windows.demonstrations()
    hidden = np.setdiff1d(np.arange(len(windows)), allowed)

    def learn(rows, value):
        actions = windows.video.actions.copy()
        actions[windows.e[rows], windows.t[rows]] = value
        other = Windows(replace(windows.video, actions=actions, expected=actions * np.nan))
        if learner == "decoder":
            return weights(cloned_and_decoded(config, other, allowed))
        return weights(masklam.clone(config, other, other.actions(), allowed, learner,
                                     few=learner == "labels-only"))

    seen, blind, changed = learn(hidden, 0.0), learn(hidden, np.nan), learn(allowed[:19], 0.5)
    assert seen.isfinite().all() and torch.equal(seen, blind) and not torch.equal(seen, changed)

def test_few_labels_are_learnt_no_longer_than_serves_the_unseen_and_in_the_end_all_of_them():
    """Targets without any relation to the inputs: the sooner it stops, the better."""
    inputs, drawn, config = torch.randn(102, 8), [], replace(TINY, batch_size=64)
    targets = np.random.default_rng(0).standard_normal((102, 2)).astype(np.float32)
    read = lambda batch: drawn.append(set(batch.tolist())) or inputs[torch.from_numpy(batch)]

    def error(few):
        torch.manual_seed(0)
        network = masklam.mlp(8, 256, 2)
        masklam.regress(config, network, read, targets, np.arange(102), few, text="", lr=0.01,
                        updates=300)
        return masklam.nmse(network(inputs).detach().numpy(), targets).mean()

    assert error(False) < 0.1  # known by heart
    drawn.clear()
    assert error(True) > 0.4
    fit, held = set(range(80)), set(range(80, 102))  # an even number: the decoder's are pairs
    judged = [i for i, batch in enumerate(drawn) if batch == held]
    assert len(judged) == 10 and all(batch <= fit for batch in drawn[:judged[-1]] if batch != held)
    final = drawn[judged[-1] + 1:]
    assert set.union(*final) == fit | held and len(final) in (30, 60)  # updates of 300

# -- evaluation and report -----------------------------------------------------------------------

def pixel_policy(obs):
    """Actions (n, 6) that every byte of the stack, and its place, matter to; of whole numbers, so
    that a batch gives exactly what its members give."""
    flat = obs.long().flatten(1)
    places = torch.arange(1, flat.shape[1] + 1)
    sums = [(flat * (places * (17 + a) % 251)).sum(1) for a in range(6)]
    return torch.stack(sums, 1) % 2001 / 1000 - 1

def naive_rollout(config, seed):
    """One episode of pixel_policy, frame by frame -> its return and what was seen."""
    env, total, terminated = masklam.make_env(config, "evaluate"), 0.0, False
    frames = [env.reset(seed=seed)[0]]
    while not terminated and len(frames) <= config.eval_steps:
        stack = np.stack([frames[max(len(frames) - back, 0)] for back in (3, 2, 1)])
        action = pixel_policy(torch.from_numpy(stack)[None])[0].numpy()
        frame, reward, terminated, _, info = env.step(action)
        total += reward - info.get("reward_survive", 0)
        frames.append(frame)
    return total, np.stack(frames[:-1])

def test_rollout_equals_a_naive_loop_of_episodes_that_end_early():
    config = replace(SMOKE, task="walker", eval_steps=60, eval_episodes=6)
    returns, film = masklam.rollout(config, pixel_policy, "cpu", "x")
    seeds = [masklam.episode_seed(config, "evaluate", i) for i in range(6)]
    expected, films = zip(*(naive_rollout(config, seed) for seed in seeds))
    lengths = {len(frames) for frames in films}
    assert min(lengths) < config.eval_steps and len(lengths) > 1
    np.testing.assert_allclose(returns, expected, rtol=1e-9)
    assert film.dtype == np.uint8 and np.array_equal(film, films[0])

@pytest.mark.parametrize("task", ["cheetah", "walker", "humanoid"])
def test_a_policy_that_replays_the_experts_actions_earns_what_the_expert_earns(task, tmp_path):
    config = replace(SMOKE, task=task, eval_episodes=3, eval_steps=20)  # more would be chaotic
    expert, seeds = masklam.load_expert(task), masklam.evaluation_seeds(config)
    _, done, rewards = zip(*(masklam.state_rollout(task, expert, seed, 20) for seed in seeds))
    moves = (torch.stack(list(map(torch.from_numpy, step)))
             for step in itertools.zip_longest(*done, fillvalue=done[0][0]))
    returns, _ = masklam.rollout(config, lambda obs: next(moves), "cpu", "replay")
    np.testing.assert_allclose(returns, [r.sum() for r in rewards], rtol=1e-3, atol=1e-3)
    chance, earned = Run(config, tmp_path).scale()
    assert earned == pytest.approx(returns.mean(), rel=1e-3) and earned - chance > 1

KEYS = ["probe_nmse", "probe_nmse_noise", "probe_nmse_mlp", "probe_nmse_noise_mlp",
        "probe_nmse_decorrelated", "leakage_r2", "latent_use", "return_mean", "return_std",
        "normalized_return", "labels"]

def test_the_table_has_every_number_under_its_title(smoke):
    results = results_of(smoke[0])
    header, *lines = masklam.table(results).splitlines()
    cells = lambda line: [line[at:at + 9].strip() for at in range(15, 15 + 11 * 9, 9)]
    assert cells(header) == ["NMSE", "of noise", "by MLP", "of noise", "rho = 0", "leakage",
                             "use of z", "return", "+-", "0 to 1", "labels"]
    rows = results["methods"] | {name: dict(return_mean=results[f"{name}_return"])
                                 for name in ("expert", "random")}
    assert [line[:15].strip() for line in lines[:-1]] == list(rows)
    for line, row in zip(lines, rows.values()):
        for cell, key in zip(cells(line), KEYS):
            assert (cell == "") == (key not in row)
            if cell:
                most = 0.5 if abs(row[key]) > 10 else 0.005
                assert float(cell) == pytest.approx(row[key], abs=most)
    assert f"{results['noise_share']:.2f}" in lines[-1]

def test_the_summary_shows_a_bar_for_every_number(smoke, monkeypatch, tmp_path):
    results, figures, save = results_of(smoke[0]), [], masklam.Figure.savefig
    monkeypatch.setattr(masklam.Figure, "savefig", lambda self, *given, **how: figures.append(
        self) or save(self, *given, **how))
    masklam.plot_summary(results, tmp_path / "summary.png")
    *panels, curves = figures[0].axes
    for key, panel in zip([*KEYS[:4], *KEYS[5:8]], panels, strict=True):
        labels = [label.get_text() for label in panel.get_xticklabels()]
        heights = {name: bar.get_height() for name, bar in zip(labels, panel.patches)}
        assert panel.get_title() and heights == {
            name: row[key] for name, row in results["methods"].items() if key in row}
    for row, line in zip(results["methods"].values(), curves.lines):
        np.testing.assert_array_equal(line.get_ydata(), row.get("losses", []))
    assert Image.open(tmp_path / "summary.png").width > 1000

def test_the_animation_shows_films_side_by_side_and_the_shorter_stands_still(tmp_path):
    films = [np.zeros((n, 8, 8, 3), np.uint8) for n in (3, 5)]
    films[0][..., 0] = np.array([60, 120, 180])[:, None, None]
    films[1][..., 2] = np.array([50, 90, 130, 170, 210])[:, None, None]
    masklam.save_animation(films, tmp_path / "rollouts.gif", 0.05)
    animation = Image.open(tmp_path / "rollouts.gif")
    assert animation.n_frames == 5 and animation.height == 24
    for t in range(5):
        animation.seek(t)
        assert animation.info["duration"] == 50
        pixels = np.asarray(animation.convert("RGB")).astype(int)
        for i, film in enumerate(films):
            shown = pixels[:, i * animation.width // 2:][:, :24]
            assert abs(shown - film[min(t, len(film) - 1), 0, 0]).max() <= 4

# -- keys of what is kept ------------------------------------------------------------------------

SECTIONS = {  # and the stage that an edit of them redoes
    "Config": None, "Video": "record", "Networks": "mask", "Latent action models": "lam",
    "Probes": "probe", "Latent policy": "policy", "Bodies": "record", "Renderer": "record",
    "Films": "record", "Distractors": "record", "Recording": "record", "Masks": "mask",
    "Evaluation": "evaluate", "Report": "report", "A run": None, "Experts": None}

def keys(out, config=SMOKE, module=masklam):
    run = module.Run(config, out)
    return {stage: run.path(stage, "x").name for stage in STAGES}

def changed(before, after):
    """The first stage of those whose keys have changed; all after it must have."""
    stages = [stage for stage in STAGES if before[stage] != after[stage]]
    assert stages == list(STAGES[-len(stages):] if stages else ())
    return stages[0] if stages else None

def test_every_field_and_other_files_change_the_keys_of_their_stage_and_later_ones(
        pictures, tmp_path):
    new = dict(task="hopper", distractor="none", correlation=0.7, backgrounds=str(pictures),
               masks="student", sam_model="vit_l", sam_checkpoint=str(pictures / "readme.txt"),
               background_weight=0.5, idm_widths=(8, 8), fdm_widths=(8, 8), patch=2,
               frame_size=128, lam_lr=0.1, policy_lr=0.1, methods=("masklam",))
    before, kept = keys(tmp_path), {}
    for f in fields(Config):
        config = replace(SMOKE, **{f.name: new.get(f.name) or getattr(SMOKE, f.name) + 1})
        kept[f.name] = config, keys(tmp_path, config)
        assert changed(before, kept[f.name][1]) == f.metadata["stage"], f.name
    assert Run(SMOKE, tmp_path).path("lam", "x") != Run(SMOKE, tmp_path).path("lam", "y")
    (pictures / "frames" / "00000.png").write_bytes((pictures / "turned.PNG").read_bytes())
    (pictures / "readme.txt").write_bytes(b"another checkpoint")
    for name, stage in (("seed", None), ("backgrounds", "record"), ("sam_checkpoint", "mask")):
        config, known = kept[name]
        assert changed(known, keys(tmp_path, config)) == stage

def test_an_edit_of_the_source_changes_the_keys_of_its_stage_and_later_ones(tmp_path, monkeypatch):
    source, before = inspect.getsource(masklam), keys(tmp_path)
    banners = re.findall(r"^# ==== [^\n]* =+\n", source, re.MULTILINE)
    titles = [re.match(r"# ==== \d+\. ([^[=]*?) *(\[|=)", banner)[1] for banner in banners]
    methods = re.findall(r"^    @stage\n    def (\w+)\(.*\n", source, re.MULTILINE)
    assert titles == list(SECTIONS) and methods == list(STAGES[:-1])
    edits = [(banner, "EDITED = 1\n", stage) for banner, stage in zip(banners, SECTIONS.values())]
    edits += [(re.search(rf"    @stage\n    def {name}\(.*\n", source)[0], "        # edited\n",
               name) for name in methods]
    edits.append((source.splitlines(True)[-1], "# ==== 18. Of a fork [lam] ====\n", "lam"))
    for number, (after, line, stage) in enumerate(edits):
        path = tmp_path / f"edited_{number}.py"
        path.write_text(source.replace(after, after + line))
        spec = importlib.util.spec_from_file_location("masklam", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "masklam", module)  # for its dataclasses
        spec.loader.exec_module(module)
        config = module.Config(**PRESETS["smoke"])
        assert changed(before, keys(tmp_path, config, module)) == stage, after

def test_no_stage_uses_what_only_the_section_of_a_later_one_defines():
    trees = [(STAGES.index(name), ast.parse(inspect.cleandoc(code))) for name, code in masklam.CODE]
    homes = {getattr(node, "name", None) or ast.unparse(node.targets[0]): stage
             for stage, tree in trees[:1 - len(STAGES)] for node in tree.body}
    assert homes["clone"] < STAGES.index("policy") and len(homes) > 70
    for stage, tree in trees:
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not {name for name in used if homes.get(name, 0) > stage}

def test_a_change_of_a_task_its_expert_or_a_library_changes_all_keys(monkeypatch, tmp_path):
    configs = SMOKE, replace(SMOKE, task="hopper")
    before, task = [keys(tmp_path, config) for config in configs], TASKS["cheetah"]
    for table, key, new, elsewhere in (
            (TASKS, "cheetah", replace(task, seconds=task.seconds / 2), None),
            (masklam.EXPERTS, "cheetah", masklam.EXPERTS["cheetah"][::-1], None),
            (masklam.VERSIONS, "mujoco", "4.0.1", "record"),
            (vars(masklam), "__name__", "fork", "record")):  # whose networks are other classes
        with monkeypatch.context() as patch:
            patch.setitem(table, key, new)
            after = [keys(tmp_path, config) for config in configs]
            assert list(map(changed, before, after)) == ["record", elsewhere]

# -- wrong input ---------------------------------------------------------------------------------

@pytest.fixture
def alone(monkeypatch):
    """main works in this process, without workers."""
    monkeypatch.setattr(masklam, "workers", lambda: contextlib.nullcontext(itertools.starmap))

WRONG = {  # flags, and what the one line that they get must name
    "--seed -1": "seed is -1; allowed: (0, 1000000)", "--seed 1.5": "invalid int value: '1.5'",
    "--distractor mild": "distractor is 'mild'; allowed: ('none', 'low', 'hard')",
    "--correlation nan": "correlation is nan", "--speed 101": "speed is 101.0; allowed: (0, 100)",
    "--episodes 3": "episodes is 3; allowed: (4, ", "--frame-size 50": "multiples of 8",
    "--frame-size 24 --masks student": "multiples of 16", "--patch 3": "frame_size is 64",
    "--background-weight 2": "background_weight is 2.0", "--latent-dim 0": "latent_dim is 0",
    "--idm-widths 8 0": "idm_widths is 0", "--fdm-widths": "expected at least one argument",
    "--lam-lr inf": "lam_lr is inf", "cheetah": "cheetah", "--backgrounds {tmp}/none": "/none",
    "--preset huge": "--preset: invalid choice: 'huge'", "--until dinner": "--until: invalid choi",
    "--epochs 5": "unrecognized arguments: --epochs", "'--no\nflag'": "unrecognized arguments",
    "--task dog": "--task is 'dog'; allowed: cheetah, hopper", "--task CartPole-v1": "CartPole-v1",
    "--task Nope-v0": "--task is 'Nope-v0'", "--task HalfCheetah-v3": "--task is 'HalfCheetah-v3'",
    "--backgrounds {tmp}/some": "four or more", "--out {tmp}/text/deeper": "text",
    "--backgrounds {tmp}/broken": "3.mp4 cannot be read", "--out {tmp}/text": "text",
    "--backgrounds {tmp}/empty": "folder has no picture",
    "--task Reacher-v5": "--task Reacher-v5 has no expert: see notebooks",
    "--methods lapo vae": "'vae' is not one of METHODS: lapo, masklam"}
LATE = {  # these are only known once there is a recording
    "--demonstration-noise 0 --exploration-noise 0": "never change",
    "--eval-steps 1": "evaluate longer", "--masks sam --sam-checkpoint {tmp}/none": "none"} | {
        f"--masks sam --sam-checkpoint {{tmp}}/{file}": f"no checkpoint of vit_b in {{tmp}}/{file}"
        for file in ("text", "cut.pth", "other.pth")}

@pytest.mark.parametrize("line", [*WRONG, *LATE])
def test_wrong_input_gets_one_line_and_status_two(line, alone, copied, small_registry, capsys):
    (copied / "text").write_text("<html>404")
    for name in ("broken", "empty", "some"):
        (copied / name).mkdir()
        for i in range(3):
            Image.new("RGB", (20, 20)).save(copied / name / f"{i}.png")
    (copied / "broken" / "3.mp4").write_bytes(b"<html>404")
    (copied / "empty" / "folder").mkdir()
    torch.save(small_sam(width=32).state_dict(), copied / "other.pth")
    (copied / "cut.pth").write_bytes((copied / "other.pth").read_bytes()[:100_000])
    before = contents(copied)
    fill = lambda text: text.replace("{tmp}", str(copied))
    assert masklam.main([*FLAGS, "--out", str(copied), *map(fill, shlex.split(line))]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("masklam: ")
    assert fill((WRONG | LATE)[line]) in said[0]
    new = contents(copied).keys() - before.keys()
    assert not new if line in WRONG else not [p for p in new if p.name == "results.json"], new

# -- whole runs ----------------------------------------------------------------------------------

def start(*flags):
    """The script in a process group of its own, heeding SIGINT, which background jobs ignore."""
    return subprocess.Popen([sys.executable, str(HERE / "masklam.py"), *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

def results_of(out, *flags):
    return json.loads((out / masklam.parse([*FLAGS, *flags])[2] / "results.json").read_text())

@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run of the command line, from nothing to the table -> its --out, and what it said."""
    out = tmp_path_factory.mktemp("runs")
    process = start(*FLAGS, "--out", out)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and errors == "", errors[-2000:]
    return out, said

@pytest.fixture
def copied(smoke, tmp_path):
    """A copy of that run, which a test may add to; its files are links, to be replaced only."""
    return shutil.copytree(smoke[0], tmp_path / "runs", copy_function=os.link)

def cached(out):
    return {p: p.stat().st_mtime_ns for p in (out / "cache").rglob("*") if p.is_file()}

PROBED, RETURNED = {*KEYS[:6], "probe_nmse_per_dimension"}, {*KEYS[7:], "return_n", "action_nmse"}
LEARNT = PROBED | {"losses", "latent_use"}

def test_a_run_prints_the_table_and_writes_every_file(smoke):
    out, said = smoke
    results, folder = results_of(out), out / masklam.parse(FLAGS)[2]
    rows, low, high = (results[key] for key in ("methods", "random_return", "expert_return"))
    assert {name: set(row) for name, row in rows.items()} == dict.fromkeys(
        METHODS, LEARNT | RETURNED) | dict.fromkeys(masklam.CLONES, RETURNED) | dict.fromkeys(
        masklam.REFERENCES, PROBED)
    assert set(results) == {*"task seed config versions device mask_source mask_iou random_return "
                            "expert_return methods noise_share seconds".split()}
    assert said.startswith(masklam.table(results)) and 0 < results["noise_share"] < 1
    assert results["mask_iou"] == dict.fromkeys(SPLITS[:3], 1)
    for row in (rows["masklam"], rows["oracle"]):
        assert row["normalized_return"] == pytest.approx((row["return_mean"] - low) / (high - low))
    assert [rows[name]["labels"] for name in ("masklam", *masklam.CLONES)] == [20, 20, 2 * 19]
    assert {key.split("-")[0] for key in results["seconds"]} == set(STAGES[:-1])
    assert results["seconds"]["record-all"] > 0 and "lam-masklam" in results["seconds"]
    with Image.open(folder / "rollouts.gif") as animation:
        assert animation.info["duration"] == 100  # as long as an action lasts
    files = [str(folder / name) for name in ("results.json", "rollouts.gif", "summary.png")]
    assert sorted(map(str, folder.iterdir())) == said.splitlines()[-1].split()[1:] == files
    assert not [p for p in out.rglob("*") if p.suffix in (".tmp", ".partial", ".TXT")]

def test_a_folders_name_says_what_was_given_and_is_no_default():
    name = lambda line: masklam.parse(shlex.split(line))[2]
    assert name("") == name("--batch-size 64 --preset laptop --until report") == "cheetah"
    assert name("--task hopper --latent-dim 16 --until lam") == "hopper_latent-dim=16_until=lam"
    assert name("--preset smoke --steps 40 --labels 90") == "cheetah_preset=smoke_labels=90"
    assert name("--backgrounds a/b --out c") == "cheetah_backgrounds=a-b"
    assert name("--idm-widths 8 16 --patch 2") == "cheetah_patch=2_idm-widths=8,16"
    assert len({x for n in (300, 301) if len(x := name(f"--backgrounds {'a' * n}")) < 250}) == 2

def test_a_second_run_reuses_and_a_changed_flag_redoes_only_what_it_touches(copied, alone):
    before, first = cached(copied), results_of(copied)
    assert masklam.main([*FLAGS, "--out", str(copied)]) == 0
    assert cached(copied) == before and results_of(copied) == first
    assert masklam.main([*FLAGS, "--out", str(copied), "--labels", "30"]) == 0
    after, decoded = cached(copied), {*METHODS, *masklam.CLONES}
    assert {p: after[p] for p in before} == before
    assert {p.name[:-16] for p in after.keys() - before.keys()} == {
        *(f"decode-{name}" for name in decoded),
        *(f"evaluate-{name}" for name in decoded), "scale-all"}
    assert results_of(copied) == first and results_of(copied, "--labels", "30") != first

@pytest.mark.parametrize("until, rows, redone", [
    ("record --masks student", {}, set()), ("mask", {}, set()),
    ("lam", dict.fromkeys(METHODS, {"losses"}), {"lam"}),
    ("probe", dict.fromkeys(METHODS, LEARNT) | dict.fromkeys(masklam.REFERENCES, PROBED),
     {"lam", "probe"})])
def test_until_ends_with_the_numbers_there_are_in_a_folder_of_their_own(
        until, rows, redone, copied, alone):
    """With another weight of the background, which changes masklam's numbers alone."""
    before, first = cached(copied), results_of(copied)
    flags = "--until", *until.split(), "--background-weight", "0.5"
    assert masklam.main([*FLAGS, "--out", str(copied), *flags]) == 0
    results = results_of(copied, *flags)
    assert {name: set(row) for name, row in results["methods"].items()} == rows
    assert "expert_return" not in results and results_of(copied) == first
    assert {p.name.split("-")[0] for p in cached(copied).keys() - before.keys()} == redone
    for key in set.intersection(*rows.values()) if until == "probe" else ():
        assert results["methods"]["lapo"][key] == first["methods"]["lapo"][key]
        assert results["methods"]["masklam"][key] != first["methods"]["masklam"][key] or (
            key == "leakage_r2")

def test_networks_that_the_script_has_kept_are_loaded_elsewhere(copied):
    run, before, row = Run(TINY, copied), cached(copied), results_of(copied)["methods"]["masklam"]
    lam, windows = run.lam("masklam"), run.windows[1]
    assert type(lam) is masklam.LAM and lam.losses == row["losses"]
    assert masklam.latent_use(lam, windows) == pytest.approx(row["latent_use"], abs=1e-5)
    error = masklam.action_nmse(run.decode("masklam"), windows)
    assert error == pytest.approx(row["action_nmse"], rel=1e-3) and cached(copied) == before
    sent = pickle.dumps(run)  # without its videos
    assert len(sent) < 5000 and pickle.loads(sent).path("lam", "x") == run.path("lam", "x")

@pytest.mark.parametrize("flags, limit", [
    ("--seed 1", 500_000), ("--masks student --student-updates 1", 300_000),
    ("--latent-dim 8", 5_000_000)])
def test_a_full_disk_gets_one_line_and_leaves_no_half_file(flags, limit, copied, alone, capsys):
    """As many bytes as a file may have: too few for frames, for masks, and for a network."""
    before, most = contents(copied), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most[1]))
    try:
        status = masklam.main([*FLAGS, "--out", str(copied), *flags.split()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    said, after = capsys.readouterr().err.splitlines(), contents(copied)
    assert status == 2 and len(said) == 1 and said[0].startswith("masklam: "), said
    assert {path: after.get(path) for path in before} == before
    assert not [p for p in after.keys() - before.keys() if not p.name.startswith("scale-")]

def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)

def test_stops_and_kills_at_random_moments_change_no_number_and_leave_no_process(
        smoke, tmp_path, alone):
    """Ctrl-C, which a terminal sends to workers too, and twice without mercy."""
    for number, latest in ((signal.SIGINT, 2), (signal.SIGKILL, 4), (signal.SIGKILL, 4)):
        process, moment = start(*FLAGS, "--out", tmp_path), np.random.default_rng().random()
        wait_for(lambda: list(tmp_path.glob("cache/*/training/length.npy")))
        time.sleep(latest * moment)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
        _, errors = process.communicate(timeout=60)
        wanted = (130,) if number == signal.SIGINT else (-number, 0)  # or it was faster
        assert process.returncode in wanted, (moment, errors)
        assert number == signal.SIGKILL or "goes on from here" in errors
        with pytest.raises(ProcessLookupError):  # once workers have seen that they are alone
            wait_for(lambda: os.killpg(process.pid, 0), 20)
    assert masklam.main([*FLAGS, "--out", str(tmp_path)]) == 0
    assert results_of(tmp_path)["methods"] == results_of(smoke[0])["methods"]

def test_two_runs_at_once_end_with_equal_numbers(smoke, tmp_path):
    both = [start(*FLAGS, "--out", tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    table = masklam.table(results_of(smoke[0]))
    assert all(text.startswith(table) and errors == "" for text, errors in said)
    assert results_of(tmp_path)["methods"] == results_of(smoke[0])["methods"]
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".tmp", ".partial")]

def learn(path):
    """Train three networks on a video, some of whose frames show no agent."""
    config, windows = replace(TINY, frame_size=32, lam_updates=20), tiny_windows()
    windows.masks[::2], every = 0, np.arange(len(windows))
    lams = [masklam.train_lam(config, windows, method) for method in METHODS]
    lams[0].fdm.requires_grad_(False)  # a method may have parameters that never learn
    loss = lambda step: lams[0].loss(windows, masklam.share(every[:20]), 1, None)
    list(masklam.train(lams[0], loss, 5, 1e-3, "idm"))
    policy = masklam.clone(config, windows, windows.actions(), every, "policy", updates=20)
    masklam.save(path, torch.cat([weights(network) for network in (*lams, policy)]))

def torchrun(folder, preparation, *flags):
    """Two processes prepare and run main -> what they said."""
    (folder / "both.py").write_text(f"""import contextlib, os, sys, masklam, test_masklam
if __name__ == "__main__":
    masklam.autocast = lambda _: contextlib.nullcontext()
    {preparation}
    sys.exit(masklam.main(sys.argv[1:]))""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--no-python", sys.executable]  # not python -u: their lines would mix
    return subprocess.run([*command, folder / "both.py", *flags], env=os.environ | {
        "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": ""}, text=True,
                          capture_output=True, timeout=300)

def test_two_processes_train_what_one_would(smoke, tmp_path, monkeypatch):
    """In float32; and a whole run is that of one process but for its rounding."""
    done = torchrun(tmp_path, f"""masklam.dist.init_process_group()
    test_masklam.learn(masklam.Path("{tmp_path}", os.environ["RANK"]))
    masklam.dist.init_process_group = lambda **_: None""", *FLAGS, "--out", tmp_path)
    assert done.returncode == 0 and done.stdout.count("files:") == 1, done.stderr
    monkeypatch.setattr(masklam, "autocast", lambda _: contextlib.nullcontext())
    learn(tmp_path / "alone")
    both = [masklam.load(tmp_path / rank) for rank in "01"]
    assert torch.equal(*both)
    torch.testing.assert_close(both[0], masklam.load(tmp_path / "alone"), rtol=0, atol=1e-5)
    got, first = results_of(tmp_path), results_of(smoke[0])
    assert all(got[key] == first[key] for key in got if key not in ("methods", "seconds", "device"))
    for name, row in first["methods"].items():
        for key in row.keys() & {"losses", "probe_nmse_mlp", "action_nmse", "labels"}:
            assert got["methods"][name][key] == pytest.approx(row[key], rel=0.1), (name, key)

@pytest.mark.parametrize("flags, words", [
    ("--batch-size 7", "batch_size is 7; allowed: multiples of 2"),
    ("--until lam --lam-lr 1e-3", "it fails")])
def test_processes_that_cannot_train_together_end_together(flags, words, copied):
    """Where one process fails alone, another waits for its part of the batch."""
    done = torchrun(copied, """def fail(*_): raise masklam.UserError("it fails")
    if os.environ["RANK"] == "1": masklam.train_lam = fail""", *FLAGS, "--out", copied,
                    *flags.split())
    assert done.returncode and f"masklam: {words}" in done.stderr

# -- the README's numbers ------------------------------------------------------------------------

RESULTS = [json.loads(path.read_text()) for path in (HERE / "notebooks/results").glob("*.json")]

@pytest.mark.parametrize("task", sorted({r["task"] for r in RESULTS}))
def test_every_number_of_the_readmes_table_is_a_median_of_default_runs(task):
    runs = [r for r in RESULTS if Config(**r["config"]) == Config(task=task, seed=r["seed"])]
    median = lambda name, key: masklam.brief(np.median([r["methods"][name][key] for r in runs]))
    columns = [(name, reader) for reader in ("", "_mlp") for name in METHODS]
    columns += [(name, "_mlp") for name in masklam.REFERENCES]
    cells = [f"{median(name, 'probe_nmse' + reader)} / {median(name, 'probe_nmse_noise' + reader)}"
             for name, reader in columns]
    cells += [median(name, "normalized_return") for name in (*METHODS, *masklam.CLONES)]
    assert f"\n| {task} | {' | '.join(cells)} |\n" in (HERE / "README.md").read_text()

def test_the_readme_shows_what_seed_0_of_the_cheetah_prints():
    printed = masklam.table(json.loads((HERE / "notebooks/results/cheetah.json").read_text()))
    lines = [f"    {line}".rstrip() for line in printed.splitlines()]
    assert "\n".join(lines) in (HERE / "README.md").read_text()
