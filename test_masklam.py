"""Tests of masklam.py against independent references: python -m pytest -q test_masklam.py"""

import base64
import contextlib
import csv
import errno
import functools
import hashlib
import http.server
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
import zlib
from dataclasses import fields, replace
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "")

with contextlib.suppress(ImportError):
    import triton  # noqa: F401 - its LLVM crashes if torch loads it after MuJoCo has loaded Mesa's
import gymnasium as gym
import mujoco
import numpy as np
import pytest
import segment_anything
import torch
import torch.nn.functional as F
from gymnasium.utils.env_checker import check_env
from matplotlib.cbook import get_sample_data
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import (ImageEncoderViT, MaskDecoder, PromptEncoder, Sam,
                                       TwoWayTransformer)

import masklam
from masklam import Config, PRESETS, Video, Windows

HERE = Path(__file__).parent
SMOKE = Config(**PRESETS["smoke"])
TINY = replace(SMOKE, episodes=4, heldout_episodes=2, steps=12, lam_updates=12, batch_size=8,
               labels=20)


FLAGS = shlex.split("--preset smoke --batch-size 8 --lam-updates 10 --policy-updates 5 "
                    "--decoder-updates 20")  # of whole runs


def run(*flags, timeout=300, **settings):
    return subprocess.run([sys.executable, str(HERE / "masklam.py"), *map(str, flags)],
                          capture_output=True, text=True, timeout=timeout, **settings)


def flipped(content, place):
    """Bytes with one of them changed in one bit."""
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1:]


def random_video(E=5, T=9, size=8, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda n: rng.standard_normal((E, T, n)).astype(np.float32)
    return Video(frames=rng.integers(0, 256, (E, T, size, size, 3), np.uint8),
                 masks=rng.integers(0, 256, (E, T, size, size), np.uint8),
                 length=np.array([9, 2, 1, 5, 9])[:E], actions=normal(2), intended=normal(2),
                 expected=normal(2), rewards=np.zeros((E, T), np.float32), states=normal(3),
                 distractor=normal(4), demonstration=np.arange(E) % 2 == 0)


# -- files ---------------------------------------------------------------------------------------


def test_script_header_equals_requirements():
    header = (HERE / "masklam.py").read_text().split("# ///\n")[0]
    listed = re.findall(r'"([^"]+==[^"]+)"', header)
    assert listed == (HERE / "requirements.txt").read_text().split()


def test_every_config_field_is_a_flag_documented_with_its_default(capsys):
    with pytest.raises(SystemExit) as done:
        masklam.main(["--help"])
    assert done.value.code == 0
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines, at hyphens too
    assert (Config().background_weight, Config().offset) == (0, 1)  # what makes it MaskLAM
    for f in fields(Config):
        default = f.default if isinstance(f.default, tuple) else [f.default]
        words = " ".join(map(str, default)) or "none"
        shown = f"{f.metadata['help']} (default {words})"
        assert "--" + f.name.replace("_", "-") in text and "".join(shown.split()) in text, f.name


def test_an_import_does_nothing_but_define_names(tmp_path):
    """No file, no word, no thread, no process, and nothing random is touched."""
    program = ("import threading, random, numpy, torch; before = torch.random.get_rng_state();"
               "import masklam, multiprocessing; assert threading.active_count() == 1;"
               "assert not multiprocessing.active_children();"
               "assert torch.equal(before, torch.random.get_rng_state())")
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=tmp_path, text=True,
                          env=os.environ | {"PYTHONPATH": str(HERE)}, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_a_cache_file_is_read_back_or_named(tmp_path):
    path = tmp_path / "probe-x-1.pt"
    masklam.save_torch(path, (torch.arange(3), {"nmse": 0.5}))
    tensor, numbers = masklam.load_torch(path)
    assert torch.equal(tensor, torch.arange(3)) and numbers == {"nmse": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    good = path.read_bytes()
    foreign = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, foreign)
    for place in (0, 31, 32, len(good) // 2, len(good) - 1):
        path.write_bytes(flipped(good, place))
        with pytest.raises(masklam.UserError, match="damaged") as error:
            masklam.load_torch(path)
        assert str(path) in str(error.value)
    for bad in (b"", b"<html>", good[:40], good[:-1], good + b"x", foreign.getvalue()):
        path.write_bytes(bad)
        with pytest.raises(masklam.UserError, match="damaged"):
            masklam.load_torch(path)
    other = tmp_path / "probe-y-1.pt"
    other.write_bytes(good)
    with pytest.raises(masklam.UserError, match="copy of probe-x-1.pt") as error:
        masklam.load_torch(other)
    assert str(other) in str(error.value)


def test_only_damage_is_called_damage(tmp_path, monkeypatch):
    path = tmp_path / "probe-x-1.pt"
    masklam.save_torch(path, 1)

    def crowded(_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(masklam.Path, "read_bytes", crowded)
    with pytest.raises(OSError, match="Too many open files"):
        masklam.load_torch(path)


def test_what_fails_while_it_is_written_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "results.json"
    masklam.save_json(path, {"nmse": 0.5})
    with pytest.raises(ZeroDivisionError), masklam.written_whole(path) as temporary:
        temporary.write_text("half")
        assert json.loads(path.read_text()) == {"nmse": 0.5}
        1 / 0
    with pytest.raises(masklam.UserError):
        masklam.save_json(path, {"nmse": float("nan")})
    assert json.loads(path.read_text()) == {"nmse": 0.5}
    assert list(tmp_path.iterdir()) == [path]


def test_one_flipped_byte_in_an_array_is_named(tmp_path):
    masklam.record(TINY, tmp_path / "video")
    known = masklam.checksums(tmp_path / "video")
    masklam.check_arrays(tmp_path / "video", known)
    assert len(known) == 3 * len(fields(Video))
    damages = {"frames.npy": lambda content: flipped(content, len(content) // 3),
               "states.npy": lambda content: flipped(content, len(content) - 1),
               "masks.npy": lambda content: content[:-1], "rewards.npy": lambda content: b"",
               "actions.npy": None}
    for name, damage in damages.items():
        copy = tmp_path / name.split(".")[0]
        shutil.copytree(tmp_path / "video", copy)
        path = copy / "heldout" / name
        path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
        with pytest.raises(masklam.UserError, match="damaged") as error:
            masklam.check_arrays(copy, known)
        assert str(path) in str(error.value)


# -- bodies and experts --------------------------------------------------------------------------


@pytest.mark.parametrize("task, bar", [("cheetah", 1500), ("hopper", 600), ("walker", 500),
                                       ("swimmer", 120), ("ant", 500), ("humanoid", 600)])
def test_experts_return_what_their_bars_ask_for(task, bar):
    """500 steps on seeds of no search, without the bonus for being alive."""
    expert = masklam.load_expert(task)
    returns = [masklam.state_rollout(task, expert, 7_000_000 + i, 500)[2].sum()
               for i in range(10)]
    assert np.mean(returns) >= bar


@pytest.mark.parametrize("task", [name for name in masklam.TASKS if masklam.TASKS[name].servo])
def test_a_servo_holds_the_angles_that_an_action_asks_for(task):
    """In the air, without gravity. `rest` asks for the initial pose; the ends of an action lie
    2 reach apart, or where the joint ends; nothing is asked for that the joint cannot take."""
    env, reach = masklam.bare_env(task), masklam.TASKS[task].servo["reach"]
    model, data, high = env.model, env.data, env.action_space.high
    joints = model.actuator_trnid[:, 0]
    places, limits = model.jnt_qposadr[joints], model.jnt_range[joints]
    model.opt.gravity[:] = 0
    model.geom_contype[:], model.geom_conaffinity[:] = 0, 0
    model.jnt_stiffness[:] = 0
    motors, strongest = gym.make(masklam.TASKS[task].env_id).unwrapped.model, []
    torque = motors.actuator_gear[:, 0] * motors.actuator_ctrlrange[:, 1]

    def settled(action):
        env.reset(seed=0)
        data.ctrl[:] = action
        for steps in (1, 2000):  # at first, far from the angle, as strong as the motors were
            mujoco.mj_step(model, data, steps)
            assert (abs(data.actuator_force) <= torque + 1e-9).all()
            assert (abs(data.actuator_force) <= model.actuator_forcerange[:, 1] + 1e-9).all()
            strongest.append(abs(data.actuator_force))
        return data.qpos[places].copy()

    assert (abs(env.rest) <= high).all()
    pose = model.qpos0[places].clip(*limits.T)  # the ant's is beyond what its ankles can take
    np.testing.assert_allclose(settled(env.rest), pose, atol=0.03)
    lowest, middle, highest = (settled(a * high) for a in (-1, 0, 1))
    np.testing.assert_allclose(np.max(strongest, 0), torque)
    span = np.minimum(2 * reach, limits[:, 1] - limits[:, 0])
    np.testing.assert_allclose(highest - lowest, span, atol=0.06)
    np.testing.assert_allclose(middle, (lowest + highest) / 2, atol=0.03)
    assert (lowest >= limits[:, 0] - 0.03).all() and (highest <= limits[:, 1] + 0.03).all()
    assert (lowest - 0.03 <= pose).all() and (pose <= highest + 0.03).all()


@pytest.mark.parametrize("task", masklam.TASKS)
def test_the_trained_gait_stays_within_the_frame(task, tmp_path):
    config = masklam.Config(task=task, distractor="none")
    env = masklam.make_env(config)
    _, info = env.reset(seed=0)
    sizes = env.action_dim, len(info["state"]), len(info["distractor"])
    masklam.Video.create(tmp_path / "training", 2, config.steps, 64, *sizes)
    for i in range(2):
        masklam.record_episode(config, tmp_path, "training", i)
    video = masklam.Video.open(tmp_path / "training")
    masks = video.masks
    border = np.concatenate([masks[..., [0, -1], :], masks[..., [0, -1]].swapaxes(2, 3)], 3)
    gait, exploration = (border >= 128).any((2, 3)).mean(1)
    assert gait <= 0.01 and exploration <= 0.1  # who has fallen may stretch a foot out of it
    masks = masks[video.valid]
    assert 0.04 < masks.mean() / 255 < 0.08  # large


def test_every_task_has_an_expert_with_a_bar():
    tested = test_experts_return_what_their_bars_ask_for.pytestmark[0].args[1]
    assert {task for task, _ in tested} == set(masklam.TASKS) == set(masklam.EXPERTS)


def test_the_humanoid_walks():
    """At more than a metre a second: standing would earn the return too."""
    expert, env = masklam.load_expert("humanoid"), masklam.state_env("humanoid")
    steps, forward = 0, 0.0
    for seed in range(7_000_000, 7_000_005):
        steps += len(masklam.state_rollout("humanoid", expert, seed, 1000)[2])
        forward += env.data.qpos[0]
    assert forward / (steps * env.dt) > 1


def test_a_clock_is_shown_to_the_experts_of_gaits_alone():
    state = np.arange(45.0)
    assert masklam.expert_input("cheetah", state, 3) is state
    cycle = masklam.TASKS["humanoid"].cycle
    seen = [masklam.expert_input("humanoid", state, t) for t in (0, cycle // 4, cycle)]
    assert all(len(x) == 45 + 2 + 2 * 11 and (x[:45] == state).all() for x in seen)
    np.testing.assert_allclose(seen[0], seen[2], atol=1e-12)
    trunk = [0, 1, 2, 3, 4, 22, 23, 24, 25, 26, 27]  # height, quaternion, velocities
    np.testing.assert_allclose(seen[0][45:], [0, 1, *[0] * 11, *trunk], atol=1e-12)
    np.testing.assert_allclose(seen[1][45:], [1, 0, *trunk, *[0] * 11], atol=1e-12)


def test_folding_the_whitening_leaves_the_policy_unchanged():
    rng = np.random.default_rng(0)
    weights, mean, state = rng.normal(size=(3, 6)), rng.normal(size=5), rng.normal(size=5)
    std = rng.random(5) + 1
    folded = masklam.fold_whitening(weights, mean, std)
    expected = weights[:, 0] + weights[:, 1:] @ ((state - mean) / std)
    np.testing.assert_allclose(masklam.expert_action(folded, state, np.full(3, 99)), expected)
    clipped = masklam.expert_action(folded, state, np.full(3, 0.01))
    assert (clipped == 0.01 * np.sign(expected)).all()


def test_a_literal_is_float16_deflated_in_base_85():
    """1 bit of sign, 5 of exponent (bias 15), 10 of fraction: read here by hand."""
    def decode(low, high):
        bits = low + 256 * high
        exponent, fraction = bits >> 10 & 31, bits & 1023
        size = (1 + fraction / 1024) * 2.0**(exponent - 15) if exponent else fraction * 2.0**-24
        return -size if bits >> 15 else size

    data = np.random.default_rng(0).integers(0, 256, 600, np.uint8)
    data[1::2] &= 0b10111111  # no infinity
    planes = data[::2].tobytes() + data[1::2].tobytes()  # all low bytes, all high bytes
    literal = base64.b85encode(zlib.compress(planes, 9)).decode()
    expected = np.array([decode(*pair) for pair in data.reshape(-1, 2).tolist()]).reshape(6, -1)
    got = masklam.from_literal(literal, 6)
    assert got.dtype == np.float64 and got.shape == (6, 50) and (got == expected).all()
    assert masklam.to_literal(expected) == literal
    weights = np.random.default_rng(1).normal(size=(3, 12))
    again = masklam.from_literal(masklam.to_literal(weights), 3)
    np.testing.assert_allclose(again, weights, rtol=2.0**-11)


def test_expert_search_learns_to_move_forward(monkeypatch):
    literal = masklam.train_expert("cheetah", directions=8, top=4, size=0.03, step=0.02,
                                   noise=0.1, budget=60_000, horizon=100)
    expert = masklam.from_literal(literal, 6)
    returns = [masklam.state_rollout("cheetah", expert, i, 500)[2].sum() for i in range(5)]
    chance = masklam.state_rollout("cheetah", None, 0, 500)[2].sum()
    monkeypatch.setitem(masklam.EXPERTS, "cheetah", literal)
    assert masklam.load_expert("cheetah").shape == (6, 18)
    assert np.mean(returns) > chance + 100


def test_a_search_shows_the_expert_what_it_will_see():
    expert = masklam.from_literal(masklam.train_expert("humanoid", directions=2, top=1, horizon=9,
                                                       budget=30), 17)
    assert expert.shape == masklam.load_expert("humanoid").shape


def test_a_search_moves_along_the_best_direction_and_keeps_the_best_policy(monkeypatch):
    tried, scored, rollout = [], [], masklam.state_rollout

    def rewarded(task, expert, seed, steps, *noise):
        if expert is None:
            return rollout(task, expert, seed, steps)
        (scored if steps == 400 else tried).append(expert)
        reward = -len(scored) if steps == 400 else (1, 10, -1, -10)[len(tried) % 4 - 1]
        return np.zeros((5, expert.shape[1] - 1)), None, np.array([reward])

    monkeypatch.setattr(masklam, "worker_pool", contextlib.nullcontext)
    monkeypatch.setattr(masklam, "map_in", lambda _, function, jobs: map(function, *zip(*jobs)))
    monkeypatch.setattr(masklam, "state_rollout", rewarded)
    literal = masklam.train_expert("hopper", directions=2, top=1, budget=500)
    assert len(scored) > 6 and (masklam.from_literal(literal, 3) == scored[0]).all()
    bias = np.stack(tried)[:8, :, 0].reshape(2, 2, 2, 3)  # iteration, way, direction
    way, move = bias[0, 0, 1] - bias[0, 1, 1], bias[1].mean((0, 1)) - bias[0].mean((0, 1))
    assert move @ way > 0.999 * np.linalg.norm(move) * np.linalg.norm(way) > 0


def test_the_noise_of_a_search_lasts():
    _, actions, _ = masklam.state_rollout("cheetah", np.zeros((6, 18)), 0, 300, 0.1, 0.8)
    again = np.corrcoef(actions[1:].ravel(), actions[:-1].ravel())[0, 1]
    assert again == pytest.approx(0.8, abs=0.1)
    assert actions.std() == pytest.approx(0.1, rel=0.2)


def test_an_expert_for_an_environment_without_an_entry(monkeypatch, capsys):
    """The printed entries are Python, say what was assumed, and make the id a task."""
    search = dict(directions=2, top=1, budget=100)
    with monkeypatch.context() as patch:  # a short search
        patch.setattr(masklam, "get_task", lambda name: masklam.Task(name, search=search))
        assert masklam.main(["--task", "InvertedPendulum-v5", "--train-expert"]) == 0
    text = capsys.readouterr().out
    assert "assumed" in text and "return on ten unseen seeds" in text and "of random" in text
    task, expert = (eval("{" + line + "}", vars(masklam))["InvertedPendulum-v5"]
                    for line in text.splitlines() if line.startswith("    "))
    assert task.search == search and task.camera[0] > 0
    monkeypatch.setitem(masklam.TASKS, "InvertedPendulum-v5", task)
    monkeypatch.setitem(masklam.EXPERTS, "InvertedPendulum-v5", expert)
    env = masklam.make_env(replace(SMOKE, task="InvertedPendulum-v5"))
    _, info = env.reset(seed=0)
    assert 0.005 < (info["mask"] >= 128).mean() < 0.5
    assert masklam.load_expert("InvertedPendulum-v5").shape == (1, 5)


# -- renderer and distractors --------------------------------------------------------------------


@pytest.mark.parametrize("task", masklam.TASKS)
def test_renderer_agrees_with_the_simulators_segmentation(task):
    env, view = masklam.state_env(task), masklam.TASKS[task].camera
    env.reset(seed=0)
    env.action_space.seed(0)
    model, size = env.model, 384
    data, camera = mujoco.MjData(model), mujoco.MjvCamera()
    camera.distance, camera.azimuth, camera.elevation = view[0], 90, view[1]
    renderer = masklam.AgentRenderer(model, view)
    camera.lookat[2] = renderer.height
    try:
        reference = mujoco.Renderer(model, size, size)
    except Exception as error:  # MuJoCo raises many kinds
        pytest.skip(f"no OpenGL to compare with: {error}")
    reference.enable_segmentation_rendering()
    ious = []
    for _ in range(5):
        for _ in range(5):
            env.step(env.action_space.sample())
        data.qpos[:] = env.data.qpos
        mujoco.mj_forward(model, data)
        camera.lookat[:2] = data.subtree_com[1, :2]
        reference.update_scene(data, camera)
        inside = (reference.render()[..., 0] > 0) * np.uint8(255)
        truth = inside.reshape(64, 6, 64, 6).mean((1, 3)).round().astype(np.uint8)
        rgb, alpha, mask = renderer(env.data.qpos)
        assert (mask == alpha).all()
        ious.append(masklam.mask_iou(alpha, truth))
        assert 0.01 < (alpha >= 128).mean() < 0.2
        assert (rgb[alpha == 0] == 0).all() and rgb[alpha == 255].mean() > 40
        assert abs(alpha.mean() - truth.mean()) < 0.03 * truth.mean()  # soft alpha has no bias
    assert np.mean(ious) >= 0.94 and min(ious) >= 0.9  # limbs are three pixels wide


def test_zoom_is_the_agents_size_in_the_frame():
    def area(zoom):
        _, info = masklam.make_env(replace(SMOKE, zoom=zoom)).reset(seed=0)
        return (info["mask"] / 255).mean()

    assert area(0.5) == pytest.approx(area(1) / 4, rel=0.15)
    assert area(1.2) == pytest.approx(area(1) * 1.44, rel=0.15)


def test_the_camera_follows_the_agent_along_the_ground_but_shows_its_jumps():
    model = masklam.state_env("cheetah").model
    renderer, pose = masklam.AgentRenderer(model), model.qpos0.copy()
    middle = lambda mask: np.argwhere(mask >= 128).mean(0)  # row, column
    here = middle(renderer(pose)[1])
    pose[0] += 5  # metres ahead
    row, column = middle(renderer(pose)[1]) - here
    assert abs(row) < 1 and abs(column) < 1
    pose[1] += 0.3  # metres up
    row, column = middle(renderer(pose)[1]) - here
    assert -20 < row < -5 and abs(column) < 1


def test_a_goal_that_no_motor_moves_is_drawn_but_is_not_agent():
    model = gym.make("Pusher-v5").unwrapped.model
    renderer = masklam.AgentRenderer(model)
    assert {model.body(b).name for b in model.geom_bodyid[~renderer.agent]} == {
        "world", "object", "goal"}
    _, alpha, mask = renderer(model.qpos0)
    moved = model.qpos0.copy()
    moved[-4:] += 0.3  # places of goal and object
    _, elsewhere, same = renderer(moved)
    assert (mask <= alpha).all() and (mask < alpha).any()
    assert (alpha != elsewhere).any() and (mask == same).mean() > 0.95


@pytest.mark.parametrize("size", [90, 50, 33])
def test_distractors_are_drawn_at_any_size(size):
    env = masklam.Distractors(gym.make("HalfCheetah-v5"), size=size)
    env.reset(seed=0)
    for _ in range(3):
        frame, _, _, _, _ = env.step(env.action_space.sample())
    assert frame.shape == (size, size, 3) and len(np.unique(frame.reshape(-1, 3), axis=0)) > 10


def test_drawing_leaves_the_physics_bitwise_unchanged():
    states = []
    for draw in (True, False):
        env = gym.make("HalfCheetah-v5", disable_env_checker=True)
        wrapped = masklam.Distractors(env, "hard") if draw else env
        wrapped.reset(seed=4)
        wrapped.action_space.seed(0)
        for _ in range(10):
            wrapped.step(wrapped.action_space.sample())
        states.append(env.unwrapped.data.qpos.copy())
    assert (states[0] == states[1]).all()


@pytest.mark.parametrize("level", masklam.DISTRACTORS)
def test_wrapper_passes_the_environment_checker(level):
    env = masklam.Distractors(gym.make("HalfCheetah-v5", render_mode="rgb_array"), level)
    check_env(env, skip_render_check=True)
    observation, info = env.reset(seed=1)
    assert observation.shape == (64, 64, 3) and (env.render() == observation).all()
    action = np.full(6, 3.0)  # is clipped
    _, _, _, _, info = env.step(action)
    assert (info["action"] == 1).all() and info["state"].shape == (17,)


def test_equal_seeds_give_equal_frames_and_others_do_not():
    def film(seed):
        env = masklam.make_env(SMOKE)
        frames = [env.reset(seed=seed)[0]]
        return np.stack(frames + [env.step(np.full(6, 0.3))[0] for _ in range(5)])

    assert (film(3) == film(3)).all()
    assert (film(3) != film(4)).any(-1).mean() > 0.5


def test_splits_share_no_seed_however_many_episodes_are_allowed():
    most = {f.name: f.metadata["high"] for f in fields(Config)}
    sizes = dict(training=most["episodes"], heldout=most["heldout_episodes"],
                 decorrelated=most["heldout_episodes"], evaluate=most["eval_episodes"])
    spans = []
    for seed in (0, 1, most["seed"]):
        for split, size in sizes.items():
            ends = (masklam.episode_seed(replace(SMOKE, seed=seed), split, i)
                    for i in (0, 1, size - 1))
            first, second, last = ends
            assert second == first + 1 and last == first + size - 1
            spans.append((first, last))
    spans.sort()
    assert all(last < first for (_, last), (first, _) in zip(spans, spans[1:]))


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_background_velocity_follows_the_action_as_much_as_asked(rho):
    """Whatever the spread of the actions: rho changes the correlation, not the speed."""
    rng = np.random.default_rng(0)
    actions = rng.standard_normal((4000, 6)) * rng.uniform(0.1, 0.9, 6) + rng.uniform(-0.3, 0.3, 6)
    actions[:, 1] += actions[:, 0]
    backdrop = masklam.Backdrop(rng, masklam.Backdrop.tie(actions, 5), rho)
    velocities = []
    for action in actions:
        before = backdrop.position.copy()
        backdrop.step(action)
        moved = (backdrop.position - before).ravel()
        wrapped = (moved + backdrop.period / 2) % backdrop.period - backdrop.period / 2
        np.testing.assert_allclose(wrapped, backdrop.velocity, atol=1e-4)
        velocities.append(backdrop.velocity)
    drive, velocities = actions @ backdrop.projection.T, np.stack(velocities)
    correlation = [np.corrcoef(d, v)[0, 1] for d, v in zip(drive.T, velocities.T)]
    np.testing.assert_allclose(correlation, rho, atol=0.1)
    np.testing.assert_allclose(velocities.std(0), backdrop.speed, rtol=0.15)
    assert backdrop.SPRITES >= 10 and backdrop.draw().shape == (64, 64, 3)
    other = masklam.Backdrop.tie(actions, 6)[0]
    assert not np.allclose(other, backdrop.projection)


def test_what_is_drawn_moves_as_positions_say():
    """A sprite down and right, a texture up and left."""
    still = np.zeros((masklam.Backdrop.D, 1)), np.zeros(1)
    backdrop = masklam.Backdrop(np.random.default_rng(0), still)
    sprite, backdrop.sprites, backdrop.position[:] = backdrop.sprites[0], [], 40
    before = backdrop.draw()
    backdrop.sprites = [sprite]
    places = []
    for _ in range(2):
        places.append(np.argwhere((backdrop.draw() != before).any(-1)).min(0))
        backdrop.position[2] += 3, 5
    assert (places[1] - places[0] == (3, 5)).all()
    backdrop.sprites, backdrop.horizon = [], 0
    before = backdrop.draw()
    backdrop.position[1] += 3, 5
    assert (backdrop.draw()[:-3, :-5] == before[3:, 5:]).all()


def test_levels_show_what_they_say():
    seen = {}
    for level in masklam.DISTRACTORS:
        env = masklam.Distractors(gym.make("HalfCheetah-v5"), level)
        env.reset(seed=3)
        for _ in range(5):
            frame, _, _, _, info = env.step(np.zeros(6))
        seen[level] = frame, info["mask"]
        if level != "hard":  # at its soft outline the agent and what is behind it mix
            rgb, alpha, _ = env.renderer(env.unwrapped.data.qpos)
            behind = env.plain if level == "none" else env.backdrop.draw()
            assert len(np.unique(alpha)) > 2
            assert abs(frame - rgb - behind * (1 - alpha / 255)[..., None]).max() < 0.6
    (plain, mask), (low, same), (hard, other) = seen.values()
    inside, outside = mask == 255, mask == 0
    assert len(np.unique(plain[outside], axis=0)) == 1 < len(np.unique(low[outside], axis=0))
    assert (same == mask).all() and (plain[inside] == low[inside]).all()
    red, _, blue = plain[inside].mean(0)
    assert red > 1.2 * blue  # the agent is warm
    assert masklam.mask_iou(mask, other) < 0.9  # another view


def test_hard_views_and_colours_walk_smoothly_within_limits():
    env, poses = masklam.Distractors(gym.make("HalfCheetah-v5"), "hard"), []
    draw = env.renderer

    def spy(qpos, view, tint):
        poses.append(np.r_[view - np.array(masklam.NO_VIEW), tint.ravel()])
        return draw(qpos, view, tint)

    env.renderer = spy
    env.reset(seed=0)
    for _ in range(60):
        env.step(np.zeros(6))
    moves = np.diff(poses, axis=0)
    assert (abs(np.array(poses)) <= env.limit + 1e-9).all() and moves.any(0).all()
    again = [np.corrcoef(a, b)[0, 1] for a, b in zip(moves[1:].T, moves[:-1].T)]
    assert np.mean(again) > 0.5


def test_a_background_does_not_drift_and_keeps_half_of_its_velocity():
    rng = np.random.default_rng(0)
    actions = rng.standard_normal((4000, 6)) * 0.5 + rng.uniform(-0.6, 0.6, 6)
    for rho, follows in ((1.0, None), (0.0, 0.5)):
        backdrop, velocities = masklam.Backdrop(rng, masklam.Backdrop.tie(actions, 5), rho), []
        for action in actions:
            backdrop.step(action)
            velocities.append(backdrop.velocity)
        v = np.stack(velocities)
        assert abs(v.mean(0)).max() < 0.1 * backdrop.speed
        if follows:
            again = [np.corrcoef(a, b)[0, 1] for a, b in zip(v[1:].T, v[:-1].T)]
            np.testing.assert_allclose(again, follows, atol=0.1)


@pytest.fixture
def pictures(tmp_path):
    """A folder of photographs, an animation and a folder of frames, as a video of DAVIS is."""
    folder = tmp_path / "pictures"
    (folder / "frames").mkdir(parents=True)
    (folder / "readme.txt").write_text("not a picture")
    with get_sample_data("grace_hopper.jpg") as file:
        photograph = Image.open(file).convert("RGB")
    film = [photograph.crop((30 * i, 0, 30 * i + 300, 300)) for i in range(5)]
    film[0].save(folder / "animation.gif", save_all=True, append_images=film[1:])
    for i, frame in enumerate(film):
        frame.save(folder / "frames" / f"{i:05}.png")
    photograph.save(folder / "photograph.jpg")
    photograph.rotate(90).convert("L").save(folder / "turned.PNG")
    return folder


def test_every_split_shows_other_footage(pictures):
    shown = {split: {p.name for p in masklam.footage(str(pictures), split)}
             for split in masklam.SPLITS}
    assert shown == dict(training={"animation.gif", "frames"}, heldout={"photograph.jpg"},
                         decorrelated={"photograph.jpg"}, evaluate={"turned.PNG"})
    assert masklam.footage("", "training") == ()


@pytest.mark.parametrize("mode", ["CMYK", "P", "RGBA", "L"])
def test_pictures_keep_their_colours_however_they_are_stored(mode, tmp_path):
    picture = Image.new("RGB", (30, 20), (204, 0, 0)).convert(mode)
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    picture.save(path)
    shown, wanted = masklam.read_film(path, 16), picture.convert("RGB").getpixel((0, 0))
    assert shown.shape == (1, 16, 16, 3) and abs(shown - np.array(wanted, int)).max() <= 5


def test_footage_plays_forwards_and_backwards_from_any_frame(pictures):
    rng = np.random.default_rng(0)
    frames = [np.asarray(Image.open(p).resize((48, 48), Image.Resampling.BICUBIC), int)
              for p in sorted((pictures / "frames").glob("*"))]
    starts = set()
    for _ in range(60):
        tied = np.zeros((2, 1)), np.zeros(1)
        footage = masklam.Footage(rng, tied, 1.0, size=48, files=[pictures / "frames"])
        footage.position[:] = 0
        order = []
        for _ in range(12):
            errors = [np.abs(footage.draw() - frame).mean() for frame in frames]
            assert min(errors) < 2
            order.append(int(np.argmin(errors)))
            footage.step(np.zeros(1))
        there_and_back = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0] * 3
        assert any(there_and_back[i:i + 12] == order for i in range(10))
        starts.add(tuple(order[:2]))
    assert len(starts) == 10


def test_footage_follows_the_action_as_much_as_asked_and_has_no_seam(pictures):
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (3000, 3))
    tied = masklam.Footage.tie(actions, 0)
    footage = masklam.Footage(rng, tied, 0.6, size=48, files=[pictures / "photograph.jpg"])
    velocities = []
    for action in actions:
        footage.step(action)
        velocities.append(footage.velocity)
    drive, velocities = actions @ tied[0].T, np.stack(velocities)
    assert velocities.shape == (3000, 2)
    correlation = [np.corrcoef(d, v)[0, 1] for d, v in zip(drive.T, velocities.T)]
    np.testing.assert_allclose(correlation, 0.6, atol=0.06)
    np.testing.assert_allclose(velocities.std(0), footage.speed, rtol=0.1)
    jumps = []
    for place in range(0, 200, 5):  # a seam would be a jump
        footage.position[:] = place
        jumps.append(np.abs(np.diff(footage.draw().astype(int), axis=1)).mean((0, 2)).max())
    assert max(jumps) < 3 * np.median(jumps)


def test_a_recording_shows_the_footage_behind_the_agent(pictures, tmp_path):
    config = replace(TINY, backgrounds=str(pictures))
    masklam.record(config, tmp_path / "video")
    for split in masklam.SPLITS[:3]:
        video = Video.open(tmp_path / "video" / split)
        assert video.distractor.shape == (len(video.length), 12, 2)
        colors = {tuple(c) for path in masklam.footage(str(pictures), split)
                  for c in masklam.read_film(path, 64).reshape(-1, 3)}
        behind = video.frames[video.valid][video.masks[video.valid] == 0]
        assert len(np.unique(behind, axis=0)) > 200
        assert {tuple(c) for c in np.unique(behind, axis=0)} <= colors
    _, film = masklam.rollout(replace(config, eval_steps=3), PixelPolicy(6), [0])
    assert (film[:, :8] == film[:, :8, :, :1]).all()  # the grey picture


def test_other_files_in_the_folder_are_recorded_anew(pictures):
    config = replace(SMOKE, backgrounds=str(pictures))
    before = masklam.cache_key(config, "record", "video")
    masklam.file_stamps.cache_clear()
    assert masklam.cache_key(config, "record", "video") == before
    (pictures / "frames" / "00000.png").write_bytes((pictures / "turned.PNG").read_bytes())
    masklam.file_stamps.cache_clear()
    assert masklam.cache_key(config, "record", "video") != before
    config = replace(SMOKE, masks="sam", sam_checkpoint=str(pictures / "turned.PNG"))
    before = masklam.cache_key(config, "mask", "masks")
    (pictures / "turned.PNG").write_bytes(b"another checkpoint")
    masklam.file_stamps.cache_clear()
    assert masklam.cache_key(config, "mask", "masks") != before


# -- video and windows ---------------------------------------------------------------------------


@pytest.mark.parametrize("task, rtol", [("cheetah", 1e-6), ("humanoid", 1e-4)])
def test_recorded_episodes_replay_exactly(task, rtol, tmp_path):
    """The humanoid's actions reach 0.4, so that scaling them to 1 and back rounds."""
    config = replace(TINY, task=task)
    frames = masklam.record(config, tmp_path)
    video = Video.open(tmp_path / "heldout")
    assert frames == 8 * 12 and (video.length == 12).all()
    assert len(Video.open(tmp_path / "training").length) == 4
    env = masklam.make_env(config)
    frame, info = env.reset(seed=masklam.episode_seed(config, "heldout", 1))
    for t in range(12):
        assert (video.frames[1, t] == frame).all() and (video.masks[1, t] == info["mask"]).all()
        np.testing.assert_allclose(video.states[1, t], info["state"], rtol, rtol)
        frame, reward, _, _, info = env.step(video.actions[1, t] * env.action_space.high)
        assert abs(masklam.moving_reward(reward, info) - video.rewards[1, t]) < 1e-4
        assert (info["distractor"] == video.distractor[1, t]).all()
    assert abs(video.actions).max() <= 1 and video.demonstration.tolist() == [True, False]
    assert (abs(Video.open(tmp_path / "training").actions[1::2]) == 1).mean() < 0.6  # not louder
    modified = os.stat(tmp_path / "training" / "frames.npy").st_mtime_ns
    assert masklam.record(config, tmp_path) == 0  # everything is there already
    assert os.stat(tmp_path / "training" / "frames.npy").st_mtime_ns == modified


def test_a_recording_goes_on_where_it_was_stopped(tmp_path):
    masklam.record(TINY, tmp_path / "whole")

    def stopped(function, jobs):
        for job in jobs[:3]:
            yield function(*job)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        masklam.record(TINY, tmp_path / "stopped", stopped)
    assert np.count_nonzero(Video.open(tmp_path / "stopped" / "training").length) == 3
    assert masklam.record(TINY, tmp_path / "stopped") == (8 - 3) * 12
    whole, resumed = (masklam.checksums(tmp_path / name) for name in ("whole", "stopped"))
    assert whole == resumed and len(whole) == 3 * len(fields(Video))


def test_a_recording_that_does_not_fit_on_the_disk_is_refused_before_it_starts(tmp_path,
                                                                               monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(masklam.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(masklam.UserError, match="does not fit .* --episodes"):
        masklam.record(TINY, tmp_path / "video")
    assert not list(tmp_path.iterdir())


def test_a_recorded_number_that_is_none_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(masklam, "moving_reward", lambda *_: float("nan"))
    with pytest.raises(masklam.UserError, match="cheetah.* not a number"):
        masklam.record(TINY, tmp_path / "video")


def test_a_body_that_explores_starts_anew_when_it_has_fallen(tmp_path):
    masklam.record(replace(TINY, task="walker", episodes=8, steps=80, demonstration_noise=0.9),
                   tmp_path)
    video = Video.open(tmp_path / "training")
    assert (video.length[1::2] == 80).all() and video.length[::2].min() < 80
    assert (video.start[::2] == 0).all() and len(np.unique(video.start[1::2])) > 10
    height, angle = video.states[..., 0], video.states[..., 1]
    fallen = (height < 0.8) | (abs(angle) > 1)  # where the environment ends an episode
    assert not fallen[video.valid].any()
    again = video.start == np.arange(80)  # the first step of each start
    assert (abs(video.states[again] - masklam.state_env("walker").reset()[0]) < 0.02).all()
    assert (video.start[~again] < np.broadcast_to(np.arange(80), again.shape)[~again]).all()
    assert (video.distractor[1::2, :-1][again[1::2, 1:]] != 0).all()  # moved by the last action


def test_an_expert_with_a_clock_starts_it_anew(tmp_path):
    masklam.record(replace(TINY, task="humanoid", episodes=2, steps=150), tmp_path)
    video = Video.open(tmp_path / "training")
    expert, start = masklam.load_expert("humanoid"), video.start[1]
    assert 0 < start[-1] < 149
    for t in (start[-1], start[-1] + 3):
        seen = masklam.expert_input("humanoid", video.states[1, t], t - start[-1])
        expected = masklam.expert_action(expert, seen, np.full(17, 0.4)) / 0.4
        np.testing.assert_allclose(video.intended[1, t], expected, atol=1e-3)
    states, _, _ = masklam.state_rollout("humanoid", expert, 0, 150, 1.2, restart=True)
    sine, cosine = states[:, video.states.shape[2]:][:, :2].T
    begins = np.flatnonzero((sine == 0) & (cosine == 1))
    assert begins[0] == 0 and len(begins) > 1 and (np.diff(begins) % 60 != 0).any()


def test_demonstrations_are_quiet_and_explorations_are_not(tmp_path):
    masklam.record(replace(TINY, episodes=12, steps=40), tmp_path)
    video = Video.open(tmp_path / "training")
    noise = video.actions - video.intended  # what clipping has left of it
    quiet = video.demonstration[:, None, None] & (abs(video.actions) < 1)
    assert abs(video.intended).max() <= 1
    assert noise[quiet].std() < TINY.demonstration_noise
    # As many exploring actions are at their limits as noise of the task's scale takes there.
    loud = ~video.demonstration
    scale = TINY.exploration_noise * 2**0.5
    above, below = ((1 - sign * video.intended[loud]) / scale for sign in (1, -1))
    expected = np.mean([math.erfc(x) / 2 for x in np.r_[above.ravel(), below.ravel()]]) * 2
    assert (abs(video.actions[loud]) == 1).mean() == pytest.approx(expected, abs=0.06)
    expert, high = masklam.load_expert("cheetah"), np.ones(6)
    for state, intended in zip(video.states[0], video.intended[0]):
        expected = masklam.expert_action(expert, state, high)
        np.testing.assert_allclose(intended, expected, atol=1e-3)
    assert len({masklam.noise_scale(TINY, i, i) for i in range(0, 20, 2)}) == 10
    assert abs(np.corrcoef(noise[loud].reshape(6, -1)) - np.eye(6)).max() < 0.5  # each its own
    # What is executed on average, by trying.
    for i in (0, 1, 2, 3):
        seed = masklam.episode_seed(TINY, "training", i)
        tries = np.random.default_rng(i).standard_normal((20_000, 1, 1))
        tries = video.intended[i, :5] + masklam.noise_scale(TINY, i, seed) * tries
        np.testing.assert_allclose(video.expected[i, :5], tries.clip(-1, 1).mean(0), atol=0.03)


def test_noise_is_a_fraction_of_what_actions_reach():
    expert, high = masklam.load_expert("humanoid"), np.full(17, 0.4)
    states, actions, _ = masklam.state_rollout("humanoid", expert, 0, 30, noise=0.1)
    intended = np.stack([masklam.expert_action(expert, state, high) / high for state in states])
    noise = (actions - intended)[abs(intended) < 0.5]
    assert noise.std() == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize("task", ["hopper", "swimmer"])
def test_the_past_tells_nothing_of_the_noise(task):
    """Not even what was intended does, at whose limits noise has one way to go."""
    expert, high = masklam.load_expert(task), masklam.state_env(task).action_space.high

    def explore(first, episodes):
        known, noise = [], []
        for seed in range(first, first + episodes):
            states, actions, _ = masklam.state_rollout(task, expert, seed, 100, 1.2, restart=True)
            intended = [masklam.expert_action(expert, state, high) / high for state in states]
            known.append(np.stack(intended))
            noise.append(actions - masklam.expected_action(known[-1], 1.2))
        return np.concatenate(known), np.concatenate(noise)

    (x, y), (x_unseen, y_unseen) = explore(0, 30), explore(5000, 15)
    assert masklam.nmse(masklam.ridge(x, y)(x_unseen), y_unseen).mean() > 0.98


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_the_recorded_background_has_the_correlation_and_speed_that_were_asked_for(rho, tmp_path):
    """Least squares from actions to velocities explains rho^2 of them, and where the recording is
    decorrelated nothing."""
    config = replace(TINY, episodes=16, heldout_episodes=16, steps=30, correlation=rho)
    masklam.record(config, tmp_path)
    for split, expected in (("training", rho), ("heldout", rho), ("decorrelated", 0.0)):
        video = Video.open(tmp_path / split)
        moves = video.valid[:, 1:]
        actions = np.c_[video.actions[:, :-1][moves], np.ones(moves.sum())]
        velocity = video.distractor[:, :-1][moves]
        fit = actions @ np.linalg.lstsq(actions, velocity, rcond=None)[0]
        explained = 1 - ((velocity - fit) ** 2).sum(0) / ((velocity - velocity.mean(0)) ** 2).sum(0)
        assert explained.mean() == pytest.approx(expected**2, abs=0.07), split
        assert velocity.std() == pytest.approx(config.speed, rel=0.2)


@pytest.mark.parametrize("starts", [(), (3, 4, 7)])
def test_windows_equal_a_naive_loop_at_every_episode_edge(starts):
    """Episodes of one's own, and such as start anew at some steps."""
    video = random_video()
    starts = np.array([0, *starts])
    if len(starts) > 1:
        now = np.arange(9)
        latest = starts[(starts[:, None] <= now).sum(0) - 1]
        video = replace(video, start=np.tile(latest, (5, 1)))
    windows = Windows(video)
    ends = {e: [*starts[(0 < starts) & (starts < n)], n] for e, n in enumerate(video.length)}
    expected = [(e, t) for e in range(5) for t in range(9) if t + 1 < ends[e][-1]
                and t + 1 not in ends[e]]
    assert list(zip(windows.e, windows.t)) == expected
    chosen = np.arange(len(windows))
    for k in (1, 2, 3, 10):
        stacks, next_obs, mask = windows.batch(chosen, k)
        for i, (e, t) in enumerate(expected):
            first = max(s for s in starts if s <= t)
            last = min(end for end in ends[e] if end > t) - 1
            reach = min(k, last - t)
            wanted = [max(t + d, first) for d in (-2, -1, 0)] + [
                max(t + reach + d, first) for d in (-2, -1, 0)]
            assert (stacks[i].numpy() == [video.frames[e, s] for s in wanted]).all()
            target = video.frames[e, t + 1].transpose(2, 0, 1) / 255 - 0.5
            np.testing.assert_allclose(next_obs[i], target, atol=1e-6)
            np.testing.assert_allclose(mask[i, 0], video.masks[e, t + 1] / 255, atol=1e-6)
        assert torch.equal(windows.seen(chosen), stacks[:, :3])
        assert k > 1 or torch.equal(windows.seen(chosen, 6), stacks)
    each = np.arange(len(windows)) % 3 + 1  # an offset for every window of the batch
    mixed = windows.batch(chosen, each)[0]
    assert all(torch.equal(mixed[i], windows.batch(chosen[i:i + 1], k)[0][0])
               for i, k in enumerate(each))
    assert set(windows.e[windows.demonstrations()]) == {0, 4}  # two has one frame
    labels = [video.actions[e, t] for e, t in expected[3:5]]
    assert (windows.actions(chosen[3:5]) == labels).all()


def test_folded_frames_are_the_frames_in_other_order():
    frames = torch.randint(0, 256, (2, 3, 8, 8, 4), dtype=torch.uint8)
    plain = masklam.to_float(frames)
    expected = frames.permute(0, 1, 4, 2, 3).flatten(1, 2) / 255 - 0.5
    torch.testing.assert_close(plain, expected)
    folded = masklam.to_float(frames, 4)  # (2, 3 * 16 * 4, 2, 2)
    back = folded.unflatten(1, (3, 4, 4, 4)).permute(0, 1, 4, 5, 2, 6, 3).reshape(2, 12, 8, 8)
    torch.testing.assert_close(back, expected)
    with torch.autocast("cpu", torch.bfloat16):
        lower = masklam.to_float(frames, 4)
    assert lower.dtype == torch.bfloat16
    torch.testing.assert_close(lower.float(), folded, atol=2e-3, rtol=0)


def test_a_mask_input_is_the_fourth_channel_of_every_frame_that_is_seen():
    video = random_video()
    masks = 255 - video.masks  # others than the video's
    plain, windows = Windows(video, masks=masks), Windows(video, mask_input=True, masks=masks)
    chosen = np.arange(len(windows))
    stacks, next_obs, mask = windows.batch(chosen, 2)
    without, same_obs, same_mask = plain.batch(chosen, 2)
    assert torch.equal(stacks[..., :3], without)
    index = windows.index(chosen, 2)[:, :6]
    assert (stacks[..., 3].numpy() == masks.reshape(-1, 8, 8)[index]).all()
    assert torch.equal(next_obs, same_obs) and torch.equal(mask, same_mask)
    assert torch.equal(windows.seen(chosen), stacks[:, :3])


# -- masks -----------------------------------------------------------------------------------------


def test_degraded_masks_are_what_their_flags_say():
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 32, 32), np.uint8)
    masks[:, 8:20, 6:24] = rng.integers(0, 256, (6, 12, 18))
    worse = lambda **flags: masklam.degrade(replace(SMOKE, **flags), masks, rng)
    assert (worse() == masks).all()
    windows = np.lib.stride_tricks.sliding_window_view
    assert (worse(erode=1)[:, 1:-1, 1:-1] == windows(masks, (3, 3), (1, 2)).min((3, 4))).all()
    assert (worse(dilate=2)[:, 2:-2, 2:-2] == windows(masks, (5, 5), (1, 2)).max((3, 4))).all()
    moved = worse(shift=10)
    assert (moved[:, :, 10:] == masks[:, :, :-10]).all() and (moved[:, :, :10] == 0).all()
    agent, hidden = masks >= 128, worse(occlude=0.4)
    fractions = [(h[a] == 0).mean() for a, h in zip(agent, hidden)]
    assert min(fractions) >= 0.4 and np.mean(fractions) < 0.65
    assert ((hidden == masks) | (hidden == 0)).all()
    assert masklam.mask_iou(masks, hidden) == pytest.approx((hidden >= 128).sum() / agent.sum())
    assert (worse(occlude=1.0)[agent] == 0).all()
    masks[:] = 0
    masks[:, 9, 9] = 255  # eroded first, which leaves nothing to dilate
    assert (worse(erode=1, dilate=1) == 0).all()


def agent_frames(seeds, steps=6):
    """Every second frame, and its mask, of random cheetahs in front of the seeds' backgrounds."""
    env, frames, masks = masklam.make_env(SMOKE), [], []
    for seed in seeds:
        env.reset(seed=seed)
        env.action_space.seed(seed)
        for _ in range(steps):
            env.step(env.action_space.sample())
            frame, _, _, _, info = env.step(env.action_space.sample())
            frames.append(frame)
            masks.append(info["mask"])
    return np.stack(frames), np.stack(masks)


def small_sam(checkpoint=None, width=128):
    """A SAM of 1M parameters, built and loaded as segment_anything builds and loads vit_b."""
    sam = Sam(ImageEncoderViT(img_size=256, patch_size=16, embed_dim=width, depth=4, num_heads=4,
                              out_chans=64, use_rel_pos=True, global_attn_indexes=(0, 1, 2, 3)),
              PromptEncoder(64, (16, 16), (256, 256), 16),
              MaskDecoder(transformer_dim=64, transformer=TwoWayTransformer(2, 64, 4, 128)))
    if checkpoint:
        with open(checkpoint, "rb") as file:
            sam.load_state_dict(torch.load(file))
    return sam.eval()


@pytest.fixture(scope="module")
def fitted_sam(tmp_path_factory):
    """The file of a small SAM, fitted for less than a minute to masks of our own frames."""
    torch.manual_seed(0)
    sam = small_sam()
    frames, masks = agent_frames(range(100, 180))
    predictor = SamPredictor(sam)
    images = torch.stack([torch.from_numpy(predictor.transform.apply_image(f)) for f in frames])
    truth = torch.from_numpy(masks >= 128).float()
    points = torch.from_numpy(masklam.clicks(masks)) * 256 / 64  # (n, 1, 2)
    on = torch.ones(1, 1, dtype=torch.int)
    optimizer, rng = torch.optim.AdamW(sam.parameters()), np.random.default_rng(0)
    for step in range(70):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20, (71 - step) / 30)
        batch = rng.integers(len(images), size=8)
        embeddings = sam.image_encoder(sam.preprocess(images[batch].permute(0, 3, 1, 2)))
        loss = 0
        for embedding, point, mask in zip(embeddings.split(1), points[batch], truth[batch]):
            sparse, dense = sam.prompt_encoder(points=(point[None], on), boxes=None, masks=None)
            logits, iou = sam.mask_decoder(embedding, sam.prompt_encoder.get_dense_pe(), sparse,
                                           dense, multimask_output=True)  # (1, 3, 64, 64)
            inside = logits.sigmoid()
            overlap = (inside * mask).sum((2, 3)) / (inside + mask - inside * mask).sum((2, 3))
            loss = loss + (1 - overlap).mean() + (iou - overlap.detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("sam") / "sam_vit_b_fitted.pth"
    torch.save(sam.state_dict(), path)
    return path


@pytest.fixture
def small_registry(monkeypatch):
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", small_sam)


def test_sam_finds_the_agent_on_unseen_backgrounds(fitted_sam, small_registry, tmp_path):
    frames, truth = agent_frames(range(500, 506))
    predictor = masklam.load_sam("vit_b", str(fitted_sam), "cpu")
    points = masklam.clicks(truth)
    candidates, scores = masklam.segment(predictor, frames, points, checkpoint=tmp_path / "partial")
    assert candidates.shape == (36, 3, 64, 64) and scores.shape == (36, 3)
    chosen = candidates[np.arange(36), masklam.choose_masks(candidates, scores)]
    iou = masklam.mask_iou(chosen * np.uint8(255), truth)
    assert iou >= 0.7, iou
    predictor.model.image_encoder = None  # what is done is not done again
    again, _ = masklam.segment(predictor, frames, points, checkpoint=tmp_path / "partial")
    assert (again == candidates).all()


class RecordingPredictor:
    """Notes what it is prompted with, and says that the whole frame is the agent."""

    device, features = torch.device("cpu"), None

    def __init__(self):
        self.seen = []

    def set_image(self, frame):
        assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8
        self.features = torch.zeros(1, 64, 16, 16)

    def predict(self, points, labels):
        assert points.shape == (len(labels), 2)
        self.seen.append((points.tolist(), labels.tolist()))
        return np.ones((3, 64, 64), bool), np.zeros(3, np.float32), None


def test_sam_is_prompted_with_the_points_of_all_frames_or_of_each():
    predictor, frames = RecordingPredictor(), np.zeros((2, 64, 64, 3), np.uint8)
    masklam.segment(predictor, frames, [(3, 40), (12, 30)], [1, 0])
    masklam.segment(predictor, frames, [[(5, 6)], [(7, 8)]])
    for_all, each = predictor.seen[:2], predictor.seen[2:]
    assert for_all == [([[3, 40], [12, 30]], [1, 0])] * 2
    assert each == [([[5, 6]], [1]), ([[7, 8]], [1])]


def test_keyframes_without_an_agent_are_not_shown_to_sam(monkeypatch):
    frames, masks = (np.zeros((1, 16, 64, 64, *c), np.uint8) for c in ((3,), ()))
    masks[0, ::2, 20:40, 20:40] = 255
    predictor = RecordingPredictor()
    monkeypatch.setattr(masklam, "load_sam", lambda *_: predictor)
    config = replace(SMOKE, masks="sam", keyframes=16, student_updates=1)
    masklam.find_masks(config, {"training": masklam.Video(frames, masks, np.array([16]))}, "cpu")
    assert len(predictor.seen) == 8


def test_the_student_is_taught_sams_masks_of_keyframes_from_all_of_the_video(monkeypatch):
    frames, masks = (np.zeros((4, 16, 64, 64, *c), np.uint8) for c in ((3,), ()))
    frames[:], masks[..., 20:40, 20:40] = np.arange(64).reshape(4, 16, 1, 1, 1), 255
    found = np.arange(3)[:, None, None] == np.arange(64) // 22  # candidates, none of them the truth
    shown, got = [], []

    def segment(_, frames, points, checkpoint):
        shown.extend(frames[:, 0, 0, 0].tolist())
        return np.stack([np.broadcast_to(found, (3, 64, 64))] * len(frames)), np.eye(8, 3)

    monkeypatch.setattr(masklam, "load_sam", lambda *_: RecordingPredictor())
    monkeypatch.setattr(masklam, "segment", segment)
    monkeypatch.setattr(masklam, "choose_masks", lambda *_: np.full(8, 2))
    monkeypatch.setattr(masklam, "train_student", lambda _, *given: got.extend(given))
    monkeypatch.setattr(masklam, "student_masks", lambda _, frames: frames[..., 0] * 0 + 255)
    video = masklam.Video(frames, masks, np.full(4, 16))
    _, _, iou, _ = masklam.find_masks(replace(SMOKE, masks="sam", keyframes=8),
                                      {"training": video}, "cpu")
    assert (got[1] == 255 * np.broadcast_to(found[2], (8, 64, 64))).all()
    assert got[0][:, 0, 0, 0].tolist() == shown == [9 * i for i in range(8)]
    assert iou["keyframes"] == masklam.mask_iou(got[1], np.tile(masks[0, 0], (8, 1, 1)))


def test_a_click_is_the_point_of_the_agent_farthest_from_its_border():
    masks = np.zeros((2, 64, 64), np.uint8)
    masks[0, 10:19, 30:39] = masks[0, 10, 5:60] = 255  # a body and thin limbs
    masks[1, 40:45, 2:60] = 255
    (body,), (bar,) = masklam.clicks(masks)
    assert body.tolist() == [34.5, 14.5] and bar[1] == 42.5


@pytest.mark.parametrize("task", masklam.TASKS)
def test_sam_is_shown_a_point_of_the_agent_in_every_keyframe(task, monkeypatch):
    env = masklam.make_env(replace(SMOKE, task=task))
    env.action_space.seed(0)
    frame, info = env.reset(seed=0)
    shots = [(frame, info["mask"])]
    for _ in range(15):
        frame, _, _, _, info = env.step(env.action_space.sample())
        shots.append((frame, info["mask"]))
    frames, masks = (np.stack(x)[None] for x in zip(*shots))
    video = masklam.Video(frames, masks, np.array([16]))
    predictor = RecordingPredictor()
    monkeypatch.setattr(masklam, "load_sam", lambda *_: predictor)
    config = replace(SMOKE, task=task, masks="sam", keyframes=16, student_updates=1)
    masklam.find_masks(config, {"training": video}, "cpu")
    assert len(predictor.seen) == 16
    for (((x, y),), labels), mask in zip(predictor.seen, masks[0]):
        assert labels == [1] and mask[int(y), int(x)] >= 128


def test_the_candidate_that_resembles_the_other_keyframes_is_chosen():
    rng = np.random.default_rng(0)
    candidates = np.zeros((12, 3, 32, 32), bool)
    candidates[:, 0, 12:20, 8:24] = True  # the agent
    candidates[:, 1] = True  # everything
    for candidate in candidates[:, 2]:  # something else, each time elsewhere, of the agent's area
        y, x = rng.integers(0, 16, 2)
        candidate[y:y + 8, x:x + 16] = True
    predicted = np.tile([0.8, 0.99, 0.8], (12, 1)) + rng.uniform(0, 0.05, (12, 3))
    assert (masklam.choose_masks(candidates, predicted) == 0).all()


def test_a_candidate_of_the_other_keyframes_area_is_chosen():
    candidates = np.zeros((12, 3, 32, 32), bool)
    for candidate, (y, x) in zip(candidates, np.random.default_rng(0).integers(8, 16, (12, 2))):
        candidate[0, y:y + 8, x:x + 8] = True  # the agent
        candidate[1:, y - 4:y + 12, x - 4:x + 12] = True  # and what is around it
    predicted = np.tile([0.95, 0.75, 0.75], (12, 1))
    predicted[::3] = 0.75, 0.95, 0.95
    assert (masklam.choose_masks(candidates, predicted) == 0).all()


@pytest.mark.parametrize("wrong", [slice(0, 32), slice(16, 17)], ids=["everything", "a speck"])
def test_a_candidate_of_an_implausible_area_is_not_chosen(wrong):
    candidates = np.zeros((12, 3, 32, 32), bool)
    candidates[:, :2, 12:20, 8:24] = True  # the agent, and once more
    candidates[:, 2, wrong, wrong] = True  # the same in all keyframes, and SAM is sure of it
    predicted = np.tile([0.8, 0.7, 0.99], (12, 1))
    assert (masklam.choose_masks(candidates, predicted) == 0).all()


def damaged_checkpoint(path, tmp_path, kind):
    bad = tmp_path / f"{kind}.pth"
    if kind == "architecture":
        torch.save(small_sam(width=64).state_dict(), bad)
    elif kind != "missing":
        content = path.read_bytes()
        bad.write_bytes(content[:len(content) // 2] if kind == "truncated" else b"<html>404")
    return bad


@pytest.mark.parametrize("kind", ["architecture", "truncated", "html", "missing"])
def test_a_file_that_is_no_checkpoint_gets_one_line(kind, fitted_sam, small_registry, tmp_path):
    bad = damaged_checkpoint(fitted_sam, tmp_path, kind)
    with pytest.raises(masklam.UserError, match="no checkpoint of vit_b") as error:
        masklam.load_sam("vit_b", str(bad), "cpu")
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def served(fitted_sam, tmp_path, monkeypatch):
    """SAM's official address is a server on this machine, torch's hub cache an empty folder."""
    content = fitted_sam.read_bytes()
    good, digest = "sam_vit_b_good.pth", hashlib.sha256(content).hexdigest()
    site = {good: content, "sam_vit_b_other.pth": content[:-1], "sam_vit_b_html.pth": b"<html>"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(site[self.path[1:]])

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(masklam, "SAM_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(masklam.SAM_FILES, "vit_b", (good, digest))
    yield good
    server.shutdown()


def test_official_checkpoints_are_known_by_name_and_sha256():
    """The names end in the start of the files' MD5, which torch.hub does not check."""
    known = {"sam_vit_b_01ec64.pth": "ec2df627", "sam_vit_l_0b3195.pth": "3adcc431",
             "sam_vit_h_4b8939.pth": "a7bf3b02"}
    assert {name: digest[:8] for name, digest in masklam.SAM_FILES.values()} == known
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for _, digest in masklam.SAM_FILES.values())


def test_the_checkpoint_is_downloaded_once_and_then_found(served, small_registry, monkeypatch):
    assert not masklam.sam_path("vit_b").exists()
    masklam.load_sam("vit_b", "", "cpu")
    assert masklam.sam_path("vit_b").exists()
    monkeypatch.setattr(masklam, "SAM_URL", "http://127.0.0.1:9/")
    masklam.load_sam("vit_b", "", "cpu")


@pytest.mark.parametrize("kind, named", [("other", "invalid hash"), ("html", "invalid hash"),
                                         ("offline", "refused"), ("full", "No space left")])
def test_a_failed_download_gets_one_line_and_leaves_nothing(kind, named, served, small_registry,
                                                            monkeypatch, capsys):
    if kind == "offline":
        monkeypatch.setattr(masklam, "SAM_URL", "http://127.0.0.1:9/")
    elif kind == "full":
        def full(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(torch.hub, "tqdm", full)  # what opens once bytes have arrived
    else:
        _, digest = masklam.SAM_FILES["vit_b"]
        monkeypatch.setitem(masklam.SAM_FILES, "vit_b", (f"sam_vit_b_{kind}.pth", digest))
    with pytest.raises(masklam.UserError, match=named) as error:
        masklam.load_sam("vit_b", "", "cpu")
    assert "--sam-checkpoint" in str(error.value) and "\n" not in str(error.value)
    assert not [p for p in Path(torch.hub.get_dir()).rglob("*") if p.is_file()]


def test_a_student_learns_from_keyframes_to_mask_unseen_backgrounds():
    frames, masks = agent_frames(range(200, 232), 2)  # 64 keyframes
    unseen, truth = agent_frames(range(500, 510), 3)
    student = masklam.train_student(Config(), frames, masks, "cpu")
    assert masklam.mask_iou(masklam.student_masks(student, unseen), truth) >= 0.8


def test_a_student_that_sees_no_agent_is_an_error(monkeypatch):
    student = masklam.Student()
    torch.nn.init.constant_(list(student.parameters())[-1], -100)  # the last bias
    monkeypatch.setattr(masklam, "train_student", lambda *_: student)
    config = replace(SMOKE, masks="student", keyframes=4)
    with pytest.raises(masklam.UserError, match="student"):
        masklam.find_masks(config, {"training": random_video(size=16)}, torch.device("cpu"))


# -- loss, networks, training --------------------------------------------------------------------


def test_weight_one_is_the_plain_mse_bit_for_bit():
    prediction, target = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    mask = torch.rand(4, 1, 8, 8)
    assert torch.equal(masklam.masked_mse(prediction, target, mask, 1.0),
                       F.mse_loss(prediction, target))


def test_hard_mask_has_no_gradient_outside_and_the_right_scale_inside():
    prediction = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    target, mask = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.rand(4, 1, 8, 8).round()
    loss = masklam.masked_mse(prediction, target, mask, 0.0)
    inside = mask.expand(-1, 3, -1, -1).bool()
    assert torch.allclose(loss, ((prediction - target)[inside] ** 2).mean())
    loss.backward()
    assert (prediction.grad[~inside] == 0).all() and (prediction.grad[inside] != 0).all()
    half = masklam.masked_mse(prediction, target, mask.double(), 0.5)
    weight = np.where(inside.numpy(), 1, 0.5)
    expected = np.average(((prediction - target) ** 2).detach().numpy(), weights=weight)
    assert abs(half.item() - expected) < 1e-9


def test_a_batch_without_an_agent_teaches_nothing():
    prediction = torch.randn(4, 3, 8, 8, requires_grad=True)
    loss = masklam.masked_mse(prediction, torch.randn(4, 3, 8, 8), torch.zeros(4, 1, 8, 8), 0.0)
    loss.backward()
    assert loss.item() == 0 and (prediction.grad == 0).all()


def conv(i, o, k):
    return (i * k * k + 1) * o


def test_paper_preset_has_the_authors_network_sizes():
    def encoder(channels, widths):
        total = 0
        for width in widths:
            total += conv(channels, width, 3) + 4 * conv(width, width, 3)
            channels = width
        return total

    config = Config(**PRESETS["paper"])
    idm, fdm = masklam.make_networks(config, "masklam").values()
    count = lambda module: sum(p.numel() for p in module.parameters())
    x4, x6 = (64, 128, 128), (96, 192, 192)
    assert count(idm) == encoder(18, x4) + (128 * 64 + 1) * 128
    decoder = sum(4 * conv(w, w, 3) + conv(w, below, 3)
                  for w, below in ((192, 192), (192, 96), (96, 96))) + conv(96, 3, 3)
    assert count(fdm) == encoder(9, x6) + 129 * 192 * 64 + conv(384, 192, 1) + decoder
    stacks = torch.zeros(2, 6, 64, 64, 3, dtype=torch.uint8)
    assert idm(stacks).shape == (2, 128)
    prediction = fdm(stacks[:, :3], torch.full((2, 128), 1e3))
    assert prediction.shape == (2, 3, 64, 64) and abs(prediction).max() <= 0.5


def test_the_laptops_networks_move_pixels_and_hidden_adds_a_layer():
    config = Config()
    idm, fdm = masklam.make_networks(config, "masklam").values()
    assert [type(layer) for layer in idm.head] == [torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear]
    obs = torch.randint(0, 256, (1, 3, 64, 64, 3), dtype=torch.uint8)
    z = torch.zeros(1, config.latent_dim)
    still = fdm(obs, z)
    assert idm(torch.cat([obs, obs], 1)).shape == z.shape and still.shape == (1, 3, 64, 64)
    other = obs.clone()
    other[0, :, 30, 30] = 255 - other[0, :, 30, 30]
    reach = torch.nonzero((fdm(other, z) != still)[0].any(0))
    patch = config.patch  # further than the patch that the pixel lies in
    assert (reach.amax(0) - reach.amin(0) >= 2 * patch).all()


@pytest.mark.parametrize("fault, words", [
    (dict(length=np.array([9, 10, 3, 2, 5])), "length"),
    (dict(length=np.array([9, 3])), "length"),
    (dict(masks=np.zeros((5, 9, 8, 8, 1), np.uint8)), "mask for every frame"),
    (dict(frames=np.zeros((5, 9, 8, 8, 3), np.float32)), "bytes"),
    (dict(masks=np.zeros((5, 9, 8, 8), bool)), "bytes"),
    (dict(masks=np.ones((5, 9, 8, 8), np.uint8)), "255")])
def test_a_video_that_would_be_misread_is_refused(fault, words):
    with pytest.raises(masklam.UserError, match=words):
        Windows(replace(random_video(), **fault))


@pytest.mark.parametrize("method", ["lapo", "laom", "past-only"])
@pytest.mark.parametrize("wrong", [dict(frame_size=64), dict(mask_input=True)], ids=str)
def test_frames_that_do_not_fit_the_config_are_refused(method, wrong):
    config = replace(TINY, **dict(frame_size=32) | wrong)
    with pytest.raises(masklam.UserError, match=next(iter(wrong))):
        masklam.train_lam(config, tiny_windows(), method)
    policy = masklam.make_policy(config, 6)
    with pytest.raises(masklam.UserError, match=next(iter(wrong))):
        masklam.latents(policy, tiny_windows(), np.arange(3))


def test_a_method_that_there_is_not_and_video_without_a_transition_are_refused():
    with pytest.raises(masklam.UserError, match="'maskalm' is no method"):
        masklam.train_lam(TINY, tiny_windows(), "maskalm")
    with pytest.raises(masklam.UserError, match="nothing to learn from"):
        masklam.train_lam(TINY, Windows(replace(random_video(), length=np.ones(5, int))), "lapo")


def tiny_windows():
    return Windows(random_video(E=5, T=9, size=32))


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def handed_to_train(monkeypatch, config, windows, method):
    """The networks, loss, updates and learning rate that train_lam trains a method with."""
    got = []
    with monkeypatch.context() as patch:
        patch.setattr(masklam, "train", lambda *given, **_: got.append(given))
        masklam.train_lam(config, windows, method)
    networks, loss, updates, lr, *_ = got[0]
    return networks, loss, updates, lr


def gradients(networks, loss):
    networks.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in networks.parameters()]


@pytest.mark.parametrize("offset", [1, 4])
def test_lapo_and_masklam_differ_in_nothing_but_the_weight(offset, monkeypatch):
    """The same networks and batches; the gradients are those of the loss written out, with weight
    1 for lapo and with the mask's for masklam."""
    exact = lambda _: contextlib.nullcontext()  # bfloat16 would round what is compared
    monkeypatch.setattr(masklam, "autocast", exact)
    config = replace(TINY, frame_size=32, offset=offset, background_weight=0.3)
    windows = tiny_windows()
    lapo, ours = (handed_to_train(monkeypatch, config, windows, name)
                  for name in ("lapo", "masklam"))
    plain = handed_to_train(monkeypatch, replace(config, background_weight=1.0), windows, "masklam")
    for other in (ours, plain):
        assert other[2:] == lapo[2:] == (config.lam_updates, config.lam_lr)
        assert other[0].state_dict().keys() == lapo[0].state_dict().keys()
        assert all(map(torch.equal, other[0].parameters(), lapo[0].parameters()))

    drawn, batch = [], windows.batch
    monkeypatch.setattr(windows, "batch", lambda *given: drawn.append(given) or batch(*given))
    for step in (0, 7):
        got = [gradients(networks, loss(step)) for networks, loss, *_ in (lapo, ours, plain)]
        assert all(map(torch.equal, got[0], got[2]))
        assert not any(map(torch.equal, got[0], got[1]))
        chosen, k = drawn[-1]
        assert len(chosen) == config.batch_size and 1 <= k.min() <= k.max() <= offset
        for given in drawn[-3:]:
            np.testing.assert_array_equal(given, (chosen, k))
        stacks, next_obs, mask = batch(chosen, k)
        networks = lapo[0]
        for expected, background in ((got[0], 1.0), (got[1], 0.3)):
            with masklam.autocast("cpu"):
                prediction = networks["fdm"](stacks[:, :3], networks["idm"](stacks)).float()
            weight = torch.where(mask > 0, mask + background * (1 - mask), background)
            weight = weight.expand_as(prediction)
            loss = (weight * (prediction - next_obs) ** 2).sum() / weight.sum()
            for a, b in zip(gradients(networks, loss), expected):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("name, frames", [("past-only", 3), ("supervised-idm", 6)])
def test_a_reference_regresses_true_actions_on_the_frames_it_may_see(name, frames, monkeypatch):
    config, windows = replace(TINY, frame_size=32), tiny_windows()
    networks, loss, updates, lr = handed_to_train(monkeypatch, config, windows, name)
    assert updates == config.lam_updates // 2
    drawn, seen = [], windows.seen
    monkeypatch.setattr(windows, "seen", lambda *given: drawn.append(given[0]) or seen(*given))
    got = loss(3)
    (chosen,) = drawn
    shown = windows.batch(chosen)[0][:, :frames]
    with masklam.autocast("cpu"):
        z = networks["idm"](shown)
        read = networks["head"](z).float()
    true = torch.from_numpy(windows.video.actions[windows.e[chosen], windows.t[chosen]])
    torch.testing.assert_close(got, ((read - true) ** 2).mean())
    assert lr == config.lam_lr and z.shape == (config.batch_size, config.latent_dim)


def test_methods_learn_from_video_that_is_known_by_frames_and_masks_alone():
    config, video = replace(TINY, frame_size=32, lam_updates=3), random_video(size=32)
    own = Video(video.frames, video.masks, video.length)
    for method in ("lapo", "masklam", "laom"):
        a, _ = masklam.train_lam(config, Windows(video), method)
        b, _ = masklam.train_lam(config, Windows(own), method)
        assert torch.equal(weights(a), weights(b))
    windows = Windows(own)
    targets = masklam.latent_targets(b["idm"], windows)  # all episodes are to be cloned
    assert len(targets) == len(windows) and (targets.std(0) > 0.5).all()
    policy = masklam.clone(replace(config, policy_updates=2), windows, targets, "own")
    assert masklam.latents(policy, windows, np.arange(3)).shape == (3, config.latent_dim)


def test_laom_labels_sees_no_other_label():
    config, labelled = replace(TINY, frame_size=32, lam_updates=3), np.arange(0, 18, 3)
    windows, learnt = tiny_windows(), []
    hidden = np.setdiff1d(np.arange(len(windows)), labelled)
    for rows, value in ((hidden, 0.0), (hidden, np.nan), (labelled, 1.0)):
        actions = windows.video.actions.copy()
        actions[windows.e[rows], windows.t[rows]] = value
        other = Windows(replace(windows.video, actions=actions, intended=None))
        networks, _ = masklam.train_lam(config, other, "laom-labels", labelled)
        learnt.append(weights(networks))
    assert learnt[1].isfinite().all() and torch.equal(learnt[0], learnt[1])
    assert not torch.equal(learnt[0], learnt[2])


def test_another_seed_gives_other_networks_and_batches(monkeypatch):
    windows, drawn = tiny_windows(), []
    batch = windows.batch
    monkeypatch.setattr(windows, "batch", lambda *given: drawn.append(given[0]) or batch(*given))
    got = [handed_to_train(monkeypatch, replace(TINY, frame_size=32, seed=s), windows, "masklam")
           for s in (0, 1)]
    assert not torch.equal(*(weights(networks) for networks, *_ in got))
    for _, loss, *_ in got:
        loss(0)
    assert not np.array_equal(*drawn)


def test_offsets_are_drawn_from_one_to_k(monkeypatch):
    windows, drawn = tiny_windows(), []
    batch = windows.batch
    monkeypatch.setattr(windows, "batch", lambda *given: drawn.extend(given[1]) or batch(*given))
    config = replace(TINY, frame_size=32, offset=4)
    _, loss, _, _ = handed_to_train(monkeypatch, config, windows, "masklam")
    for step in range(10):
        loss(step)
    assert (np.bincount(drawn, minlength=5)[1:] > 5).all() and len(set(drawn)) == 4


def test_gradients_are_clipped_and_averaged_as_adamw_does():
    network = torch.nn.Linear(1, 1, bias=False)
    weight, m, v = float(network.weight.detach()), 0.0, 0.0
    slopes = [5.0, 0.5, -3.0, 0.1] * 5
    masklam.train(network, lambda step: slopes[step] * network.weight.sum(), 20, 0.1, "x")
    for step, slope in enumerate(slopes):
        slope = np.clip(slope, -1, 1)
        lr = 0.1 * min(1, (step + 1) / 2) * (1 + np.cos(np.pi * step / 20)) / 2
        m, v = 0.9 * m + 0.1 * slope, 0.99 * v + 0.01 * slope**2
        mean, square = m / (1 - 0.9**(step + 1)), v / (1 - 0.99**(step + 1))
        weight -= lr * (0.01 * weight + mean / np.sqrt(square))
    assert float(network.weight.detach()) == pytest.approx(weight, rel=1e-4)


def test_a_patch_fdm_predicts_the_change_since_the_last_frame():
    fdm = masklam.make_networks(Config(), "masklam")["fdm"]
    torch.nn.init.zeros_(fdm.unet.last.weight), torch.nn.init.zeros_(fdm.unet.last.bias)
    obs = torch.randint(0, 256, (1, 3, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(fdm(obs, torch.zeros(1, 64)), masklam.to_float(obs[:, 2:]))


def test_both_fdms_use_the_latent():
    obs = torch.randint(0, 256, (1, 3, 32, 32, 3), dtype=torch.uint8)
    for patch in (1, 4):
        config = replace(SMOKE, frame_size=32, patch=patch, blocks=patch % 4)
        fdm = masklam.make_networks(config, "masklam")["fdm"]
        assert not torch.equal(fdm(obs, torch.zeros(1, 64)), fdm(obs, torch.ones(1, 64)))


def test_laom_predicts_a_slow_embedding_of_the_next_stack(monkeypatch):
    monkeypatch.setattr(masklam, "augment", lambda stacks, seed: stacks)
    monkeypatch.setattr(masklam, "autocast", lambda _: contextlib.nullcontext())
    config, windows = replace(TINY, frame_size=32, offset=3, lam_updates=97_000), tiny_windows()
    networks, loss, _, _ = handed_to_train(monkeypatch, config, windows, "laom")
    idm, target = networks["idm"], networks["target"]
    with torch.no_grad():
        [fast.add_(0.01) for fast in idm.encoder.parameters()]
    before, drawn, index = weights(target), [], windows.index
    monkeypatch.setattr(windows, "index", lambda *given: drawn.append(given) or index(*given))
    got = loss(0)
    torch.testing.assert_close(weights(target) - before, torch.full_like(before, 1e-5),
                               rtol=0.1, atol=1e-7)
    (chosen, k), = drawn
    e, t = windows.e[chosen], windows.t[chosen]
    following = np.stack([windows.video.frames[e, (t + d).clip(0)] for d in (-1, 0, 1)], 1)
    stacks = windows.batch(chosen, k)[0]
    inputs = torch.cat([idm.encoder(stacks[:, :3]), idm(stacks)], 1)
    expected = F.mse_loss(networks["fdm"](inputs), target(torch.from_numpy(following)))
    torch.testing.assert_close(got, expected)


def test_laom_augments_every_stack_by_itself_and_its_target_gets_no_gradient(monkeypatch):
    config, windows, seeds = replace(TINY, frame_size=32), tiny_windows(), []
    networks, loss, _, _ = handed_to_train(monkeypatch, config, windows, "laom")
    _, other_loss, _, _ = handed_to_train(monkeypatch, replace(config, seed=1), windows, "laom")
    with monkeypatch.context() as patch:
        patch.setattr(masklam, "augment", lambda stacks, seed: seeds.append(seed) or stacks)
        for step in (0, 1):
            loss(step).backward()
            other_loss(step)
        loss(0)
    assert len(set(seeds)) == 12 and seeds[-3:] == seeds[:3]
    assert all(p.grad is None for p in networks["target"].parameters())
    assert all(p.grad is not None for p in networks["idm"].parameters())
    frame = torch.randint(0, 256, (1, 1, 32, 32, 3), dtype=torch.uint8)
    stacks = frame.expand(64, 3, -1, -1, -1)
    got = masklam.augment(stacks, 5)
    assert (got == got[:, :1]).all() and got.shape == stacks.shape  # its frames all alike
    ways = {part.numpy().tobytes() for part in got.chunk(8)}
    assert len(ways) > 2 and all((part == part[:1]).all() for part in got.chunk(8))
    assert torch.equal(got, masklam.augment(stacks, 5))
    assert not torch.equal(got, masklam.augment(stacks, 6))


def test_laom_labels_adds_a_thousandth_of_the_error_of_actions(monkeypatch):
    config, windows, losses = replace(TINY, frame_size=32), tiny_windows(), []
    monkeypatch.setattr(masklam, "laom_loss", lambda *_: torch.zeros(()))
    monkeypatch.setattr(masklam, "train", lambda _, loss, *__: losses.append(loss(0).item()))
    networks, _ = masklam.train_lam(config, windows, "laom-labels", np.full(3, 5))
    z = masklam.latents(networks["idm"], windows, np.array([5]))
    with torch.no_grad():
        error = networks["head"](torch.from_numpy(z)).numpy() - windows.actions([5])
    assert losses == [pytest.approx(1e-3 * (error**2).mean(), rel=0.05)]


class Killed(Exception):
    pass


def killed_at(windows, batches):
    """Windows that are killed when that many batches have been drawn."""
    draw, left = windows.index, [batches]

    def index(*given):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return draw(*given)

    windows.index = index
    return windows


@pytest.mark.parametrize("method, batches", [("masklam", 1), ("masklam", 11), ("laom", 7)])
def test_resumed_training_equals_uninterrupted(method, batches, tmp_path, monkeypatch):
    config = replace(TINY, frame_size=32, lam_updates=2 * TINY.lam_updates)
    path = tmp_path / "checkpoint"
    whole, history = masklam.train_lam(config, tiny_windows(), method)
    clock = iter(range(0, 10**6, 40))  # every step is half a minute later: saves each time
    monkeypatch.setattr(masklam.time, "monotonic", lambda: next(clock))
    with pytest.raises(Killed):
        masklam.train_lam(config, killed_at(tiny_windows(), batches), method, checkpoint=path)
    assert path.exists()
    rest = killed_at(tiny_windows(), config.lam_updates - batches)  # and not a batch more
    resumed, again = masklam.train_lam(config, rest, method, checkpoint=path)
    assert torch.equal(weights(whole), weights(resumed))
    assert [row[:2] for row in history] == [row[:2] for row in again] and len(history) >= 10


def test_training_warms_up_decays_and_reports_what_it_did():
    """Against AdamW written out for one weight, whose gradient clips to 1."""
    network, rates = torch.nn.Linear(1, 1, bias=False), []
    start = float(network.weight.detach())

    def loss(step):
        return 5 * network.weight.sum() + step

    history = masklam.train(network, loss, 40, 0.1, "lapo", report=lambda step: 2 * step)
    weight = start
    for step in range(40):
        rates.append(0.1 * min(1, (step + 1) / 3) * (1 + np.cos(np.pi * step / 40)) / 2)
        weight -= rates[-1] * (0.01 * weight + 1)  # Adam's step on a constant gradient is 1
    assert float(network.weight.detach()) == pytest.approx(weight, rel=1e-4)
    assert [row[0] for row in history] == list(range(4, 41, 4))
    assert [row[2] for row in history] == list(range(8, 81, 8))
    assert history[0][1] == pytest.approx(5 * start + 1.5, abs=5 * 0.2)  # steps 0 to 3


def test_a_loss_that_is_not_finite_is_an_error():
    weight = torch.nn.Linear(1, 1)
    with pytest.raises(masklam.UserError, match="the loss of lapo is nan"):
        masklam.train(weight, lambda step: weight.weight.sum() / 0 * 0, 20, 1e-3, "lapo")


def test_a_scarce_latent_goes_to_the_agent_with_the_mask_and_to_the_background_without():
    """Brightness of a small agent is the action, that of a large background the distractor."""
    rng = np.random.default_rng(0)
    E, T, size = 60, 12, 16
    actions, distractor = rng.uniform(-1, 1, (2, E, T, 1)).astype(np.float32)
    shown = np.full((E, T, size, size), 127, np.uint8)
    shown[:, 1:, :4] = (127 + 120 * actions[:, :-1, :, None]).round()
    shown[:, 1:, 4:] = (127 + 120 * distractor[:, :-1, :, None]).round()
    masks = np.zeros((E, T, size, size), np.uint8)
    masks[:, :, :4] = 255
    blank = np.zeros((E, T), np.float32)
    video = Video(shown[..., None].repeat(3, -1), masks, np.full(E, T), actions, 0 * actions,
                  0 * actions, blank, blank[..., None], distractor, blank[:, 0] == 0,
                  blank.astype(int))
    parts = slice(0, 40), slice(40, 50), slice(50, 60)
    windows = [Windows(Video(*(getattr(video, f.name)[part] for f in fields(Video))))
               for part in parts]
    config = replace(TINY, frame_size=16, latent_dim=1, lam_updates=150, batch_size=64, lam_lr=3e-3)
    got = {}
    for method in ("lapo", "masklam"):
        networks, history = masklam.train_lam(config, windows[0], method)
        assert history[-1][1] < 0.5 * history[0][1]
        read = functools.partial(masklam.latents, networks["idm"])
        got[method] = masklam.probe(read, *windows)
    assert got["masklam"]["probe_nmse"] < 0.2 and got["masklam"]["leakage_r2"] < 0.1
    assert got["lapo"]["probe_nmse"] > 0.8 and got["lapo"]["leakage_r2"] > 0.5


# -- probe, policy ---------------------------------------------------------------------------------


def test_ridge_equals_least_squares_on_the_augmented_problem():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 5)) * 3 + 1, rng.normal(size=(200, 2))
    new = rng.normal(size=(9, 5))
    scaled = (x - x.mean(0)) / (x.std(0) + 1e-8)
    rows = np.r_[scaled, np.sqrt(0.1 * 200) * np.eye(5)]
    weights = np.linalg.lstsq(rows, np.r_[y - y.mean(0), np.zeros((5, 2))], rcond=None)[0]
    expected = (new - x.mean(0)) / (x.std(0) + 1e-8) @ weights + y.mean(0)
    np.testing.assert_allclose(masklam.ridge(x, y, 0.1)(new), expected, atol=1e-9)


def test_probe_reads_linear_latents_and_nothing_from_noise():
    video = replace(random_video(12, 30), length=np.full(12, 30))
    windows = [Windows(video)] * 3
    mixing = np.random.default_rng(1).standard_normal((2, 6))
    linear = masklam.probe(lambda w, chosen: w.actions(chosen) @ mixing, *windows)
    assert linear["probe_nmse"] < 1e-6 and linear["probe_nmse_decorrelated"] < 1e-6
    assert linear["leakage_r2"] < 0.1
    assert linear["probe_nmse_noise"] == pytest.approx(0.5, abs=0.1)  # half of it is expected
    noise = masklam.probe(lambda w, chosen: w.noise(chosen), *windows)
    assert noise["probe_nmse_noise"] < 1e-6
    others = [Windows(replace(random_video(12, 30, 8, seed), length=np.full(12, 30)))
              for seed in (1, 2, 3)]
    nothing = masklam.probe(lambda w, chosen: np.random.default_rng(w.video.frames[0, 0].ravel())
                            .standard_normal((len(w), 1))[chosen], *others)
    assert 0.9 < nothing["probe_nmse"] < 1.2 and 0.9 < nothing["probe_nmse_noise"] < 1.2
    behind = masklam.probe(masklam.next_background, *windows)
    assert behind["leakage_r2"] > 0.999


def test_the_next_background_is_the_mean_of_what_is_not_agent():
    video = random_video()
    video.masks[::2] //= 10  # nothing of which is agent
    windows = Windows(video)
    chosen = np.arange(len(windows))
    got = masklam.next_background(windows, chosen).reshape(-1, 3, 4, 4)
    for i in (0, 3, len(windows) - 1):
        e, t = windows.e[i], windows.t[i] + 1
        frame, mask = (x[e, t, 2:4, 4:6] for x in (windows.video.frames, windows.video.masks))
        behind = mask < 26  # a tenth of agent, at most
        expected = frame[behind].mean(0) if behind.any() else np.zeros(3)
        np.testing.assert_allclose(got[i, :, 1, 2], expected, rtol=1e-5)


def test_leakage_is_measured_behind_the_true_agent_whatever_masks_are_learnt_with():
    video = random_video()
    chosen = np.arange(len(Windows(video)))
    worse = Windows(video, masks=np.zeros_like(video.masks))
    got, true = (masklam.next_background(w, chosen) for w in (worse, Windows(video)))
    assert (got == true).all() and worse.batch(chosen)[2].max() == 0


def test_a_background_of_one_colour_knows_nothing_of_the_pose(tmp_path):
    masklam.record(replace(TINY, distractor="none", frame_size=64), tmp_path)
    windows = Windows(Video.open(tmp_path / "training"))
    assert masklam.next_background(windows, np.arange(len(windows))).var(0).max() < 1e-3


def test_a_probe_is_read_where_it_was_not_fitted():
    windows = [Windows(replace(random_video(12, 30, 8, seed), length=np.full(12, 30)))
               for seed in (1, 2, 3)]
    rng, sizes = np.random.default_rng(0), []

    def chance(_, chosen):
        sizes.append(len(chosen))
        return rng.standard_normal((len(chosen), 100))

    got = masklam.probe(chance, *windows, 200)
    assert sizes == [200, 348, 348]
    assert min(got["probe_nmse"], got["probe_nmse_noise"], got["probe_nmse_decorrelated"]) > 1.2
    assert got["leakage_r2"] < -0.2
    got = masklam.probe(lambda w, chosen: w.actions(chosen) * (w is not windows[2]), *windows)
    assert got["probe_nmse"] < 1e-6 and got["probe_nmse_decorrelated"] == pytest.approx(1, abs=0.1)


def test_noise_is_what_was_done_less_what_was_to_be_expected():
    video = random_video()
    windows = Windows(video)
    e, t = windows.e[9:], windows.t[9:]
    np.testing.assert_array_equal(windows.noise(np.arange(9, len(windows))),
                                  video.actions[e, t] - video.expected[e, t])


def test_what_cannot_be_probed_is_named():
    with pytest.raises(masklam.UserError, match=r"\[1\]"):
        masklam.nmse(np.zeros((5, 2)), np.stack([np.arange(5), np.ones(5)], 1))


def painted_windows(seed=0):
    """The action is painted into the newest frame."""
    rng = np.random.default_rng(seed)
    E, T = 20, 20
    actions = rng.uniform(-1, 1, (E, T, 2)).astype(np.float32)
    frames = np.zeros((E, T, 32, 32, 3), np.uint8)
    frames[..., :16, :, 0] = (127 + 120 * actions[..., :1, None]).round()
    frames[..., 16:, :, 0] = (127 + 120 * actions[..., 1:, None]).round()
    return Windows(Video(frames, frames[..., 0], np.full(E, T), actions, actions,
                         demonstration=np.arange(E) % 2 == 0))


PAINTED = replace(TINY, frame_size=32, policy_updates=300, decoder_updates=300, batch_size=64,
                  policy_lr=1e-3, labels=100)


class PaintedIDM(torch.nn.Module):
    """Knows the action that is painted, turned, and on a scale of its own."""

    frames = 6

    def forward(self, stacks):
        seen = torch.stack([stacks[:, 2, 0, 0, 0], stacks[:, 2, -1, 0, 0]], 1) / 255 - 0.5
        return 1e-3 * seen @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]])


def cloned_and_decoded(config, windows, labelled):
    """The policy of PaintedIDM: latent targets, a clone of them, a decoder of the clone's."""
    targets = masklam.latent_targets(PaintedIDM(), windows)
    policy = masklam.clone(config, windows, targets, "clone")
    return masklam.decode(config, policy, windows, targets, labelled, "decode")


def test_cloning_and_decoding_recover_a_visible_action():
    windows = painted_windows()
    config = replace(PAINTED, latent_dim=2)
    policy = cloned_and_decoded(config, windows, masklam.labelled_windows(config, windows))
    with torch.no_grad():
        got = policy(windows.seen(np.arange(len(windows)))).numpy()
    assert masklam.nmse(got, windows.actions()).mean() < 0.05
    rows = windows.demonstrations()  # those of the other episodes may be anything
    windows.video.actions[1::2] = np.nan
    of_demonstrations = masklam.nmse(got[rows], windows.actions(rows)).mean()
    assert masklam.action_nmse(policy, windows) == pytest.approx(of_demonstrations, rel=0.1)


def test_latents_are_an_idms_of_the_windows_in_their_order():
    windows = painted_windows()
    chosen = np.random.default_rng(0).permutation(len(windows))[:300].repeat(4)  # several batches
    got = masklam.latents(PaintedIDM(), windows, chosen)
    painted = windows.video.frames[windows.e[chosen], windows.t[chosen]][:, [0, -1], 0, 0] / 255
    expected = 1e-3 * (painted - 0.5) @ [[0.6, 0.8], [-0.8, 0.6]]
    np.testing.assert_allclose(got, expected, rtol=2e-2, atol=1e-5)  # bfloat16 on some CPUs


def test_targets_of_cloning_are_the_demonstrations_latents_at_unit_variance():
    windows = painted_windows()
    rows = windows.demonstrations()
    targets = masklam.latent_targets(PaintedIDM(), windows)
    assert (windows.e[rows] % 2 == 0).all() and len(rows) == len(windows) // 2
    z = masklam.latents(PaintedIDM(), windows, rows)
    np.testing.assert_allclose(targets[rows].std(0), 1, atol=0.02)
    np.testing.assert_allclose(targets[rows].mean(0), 0, atol=0.02)
    for a, b in zip(targets[rows].T, z.T):
        assert np.corrcoef(a, b)[0, 1] > 0.9999
    assert (np.delete(targets, rows, 0) == 0).all()


def test_labels_are_whole_demonstrations_drawn_at_random():
    windows = painted_windows()
    chosen = masklam.labelled_windows(replace(PAINTED, labels=60), windows)
    episodes = windows.e[chosen]
    assert len(set(chosen)) == 60 and (episodes % 2 == 0).all()
    assert np.bincount(episodes).tolist().count(19) == 3  # of 19 windows each
    other = masklam.labelled_windows(replace(PAINTED, labels=60, seed=1), windows)
    assert set(other) != set(chosen)


def test_decoder_and_labels_only_see_no_other_label():
    """What they may not see is nan; and what they may see matters."""
    windows = painted_windows()
    config = replace(PAINTED, latent_dim=2, policy_updates=20, decoder_updates=20)
    labelled = masklam.labelled_windows(config, windows)
    hidden = np.setdiff1d(np.arange(len(windows)), labelled)

    def learn(rows, value):
        """Weights of both, where the actions of some rows are another value."""
        actions = windows.video.actions.copy()
        actions[windows.e[rows], windows.t[rows]] = value
        other = Windows(replace(windows.video, actions=actions, intended=actions * np.nan))
        policies = (cloned_and_decoded(config, other, labelled),
                    masklam.clone_labels(config, other, labelled))
        return [weights(policy) for policy in policies]

    seen, blind, changed = learn(hidden, 0.0), learn(hidden, np.nan), learn(labelled[:9], 0.5)
    for a, b, c in zip(seen, blind, changed):
        assert a.isfinite().all() and torch.equal(a, b) and not torch.equal(a, c)


def test_the_oracle_and_cloning_learn_from_demonstrations_alone():
    windows = painted_windows()
    config, rows = replace(PAINTED, policy_updates=20), windows.demonstrations()
    targets = windows.actions()
    others = np.setdiff1d(np.arange(len(windows)), rows)

    def learn(chosen, value):
        changed = targets.copy()
        changed[chosen] = value
        return weights(masklam.clone(config, windows, changed, "oracle"))

    expected = learn(others, 0.0)
    assert expected.isfinite().all() and torch.equal(learn(others, np.nan), expected)
    assert not torch.equal(learn(rows[:200], 0.0), expected)


def test_the_decoder_learns_each_label_from_both_latents(monkeypatch):
    windows, config, got = painted_windows(), replace(PAINTED, latent_dim=2), []
    targets = masklam.latent_targets(PaintedIDM(), windows)
    policy = masklam.make_policy(config, 2).eval()
    labelled = masklam.labelled_windows(config, windows)
    monkeypatch.setattr(masklam, "regress_few", lambda _, network, inputs, actions, rows, **how:
                        got.append((inputs(rows).numpy(), actions[rows])))
    masklam.decode(config, policy, windows, targets, labelled, "x")
    (z, actions), = got
    np.testing.assert_allclose(z[::2], masklam.latents(policy, windows, labelled), rtol=1e-5)
    np.testing.assert_array_equal(z[1::2], targets[labelled])
    for each in (actions[::2], actions[1::2]):
        np.testing.assert_array_equal(each, windows.actions(labelled))


def test_policies_and_decoders_are_trained_as_their_flags_say(monkeypatch):
    config, got = replace(PAINTED, latent_dim=2, policy_updates=31, decoder_updates=17), set()

    def train(network, loss, updates, lr, text, **_):
        got.add((text, updates, lr))
        return [(updates, 1.0, 1.0)]

    monkeypatch.setattr(masklam, "train", train)
    labelled = np.arange(20)
    cloned_and_decoded(config, painted_windows(), labelled)
    masklam.clone_labels(config, painted_windows(), labelled)
    assert got == {("clone", 31, config.policy_lr), ("labels-only", 31, config.policy_lr),
                   ("decode decoder", 17, 1e-3)}


def test_few_labels_are_all_learnt_in_the_end(monkeypatch):
    calls = []

    def regress(config, network, inputs, targets, rows, held=None, stop=None, **_):
        calls.append((rows.tolist(), held, stop))
        return [(10, 1.0, 0.5), (20, 0.5, 0.2), (30, 0.1, 0.3)]

    monkeypatch.setattr(masklam, "regress", regress)
    masklam.regress_few(TINY, torch.nn.Linear(1, 1), None, None, np.arange(20), text="x", lr=1,
                        updates=30)
    (first, held, none), (rows, no, stop) = calls
    assert first == list(range(16)) and held.tolist() == [16, 17, 18, 19] and none is None
    assert rows == list(range(20)) and no is None and stop == 20
    masklam.regress_few(TINY, torch.nn.Linear(1, 1), None, None, np.arange(22), text="x", lr=1,
                        updates=30)
    assert calls[2][0] == list(range(16))  # no pair of the decoder's is torn apart


def test_few_labels_are_learnt_from_no_longer_than_serves_the_unseen():
    """Targets without any relation to the inputs: the sooner it stops, the better."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    inputs = torch.randn(100, 8)
    targets = rng.standard_normal((100, 2)).astype(np.float32)
    network = torch.nn.Sequential(torch.nn.Linear(8, 256), torch.nn.ReLU(),
                                  torch.nn.Linear(256, 2))
    config = replace(TINY, batch_size=64)
    masklam.regress_few(config, network, lambda b: inputs[torch.from_numpy(b)], targets,
                        np.arange(100), text="few", lr=1e-3, updates=1000)
    with torch.no_grad():
        learnt = masklam.nmse(network(inputs).numpy(), targets).mean()
    assert learnt > 0.3  # a thousand updates would know them by heart


# -- evaluation ------------------------------------------------------------------------------------


class PixelPolicy(torch.nn.Module):
    """Actions that every byte of the stack, and its place, matter to; whole numbers, so that a
    batch gives exactly what its members give."""

    def __init__(self, actions):
        super().__init__()
        self.actions = actions

    def forward(self, obs):
        flat = obs.long().flatten(1)
        places = torch.arange(1, flat.shape[1] + 1)
        sums = [(flat * (places * (17 + a) % 251)).sum(1) for a in range(self.actions)]
        return torch.stack(sums, 1) % 2001 / 1000 - 1


def naive_rollout(config, policy, seed):
    """One episode, frame by frame -> its return and what was seen."""
    env = masklam.make_env(config)
    frame, info = env.reset(seed=seed)
    frames, total = [], 0.0
    for _ in range(config.eval_steps):
        seen = [frame, info["mask"][..., None]] if config.mask_input else [frame]
        frames.append(np.concatenate(seen, -1))
        stack = [frames[max(len(frames) - back, 0)] for back in (3, 2, 1)]
        action = policy(torch.from_numpy(np.stack(stack))[None])[0].numpy()
        frame, reward, terminated, _, info = env.step(action * env.action_space.high)
        total += reward - info.get("reward_survive", 0)
        if terminated:
            break
    return total, np.stack(frames)


@pytest.mark.parametrize("mask_input", [False, True])
def test_rollout_equals_a_naive_loop_of_episodes_that_end_early(mask_input):
    config = replace(SMOKE, task="walker", eval_steps=60, mask_input=mask_input)
    policy, seeds = PixelPolicy(6), [5, 6, 7, 8]
    returns, film = masklam.rollout(config, policy, seeds)
    expected = [naive_rollout(config, policy, seed) for seed in seeds]
    lengths = [len(frames) for _, frames in expected]
    assert min(lengths) < config.eval_steps and len(set(lengths)) > 1
    np.testing.assert_allclose(returns, [total for total, _ in expected], rtol=1e-9)
    assert film.dtype == np.uint8 and (film == expected[0][1][..., :3]).all()
    assert len(film) == lengths[0]


def test_with_a_student_it_masks_what_a_policy_sees(monkeypatch):
    def found(student, frames):
        return np.full(frames.shape[:3], student, np.uint8)

    monkeypatch.setattr(masklam, "student_masks", found)
    masks = []

    def policy(obs):
        masks.append(obs[..., 3])
        return torch.zeros(len(obs), 6)

    masklam.rollout(replace(SMOKE, mask_input=True, eval_steps=4), policy, [0, 1], student=77)
    assert len(masks) == 4 and (torch.stack(masks) == 77).all()
    degraded = replace(SMOKE, mask_input=True, eval_steps=2, shift=9)  # as those learnt with
    masklam.rollout(degraded, policy, [0, 1], student=77)
    assert (masks[-1][..., :9] == 0).all() and (masks[-1][..., 9:] == 77).all()


class Replay(torch.nn.Module):
    """Actions (n, t, A), whatever it sees."""

    def __init__(self, actions):
        super().__init__()
        self.actions, self.t = actions, 0

    def forward(self, obs):
        assert obs.shape[:2] == (len(self.actions), 3)
        self.t += 1
        return self.actions[:, self.t - 1]


@pytest.mark.parametrize("task", ["cheetah", "swimmer", "walker", "humanoid"])
def test_a_policy_that_replays_the_experts_actions_earns_what_the_expert_earns(task):
    config = replace(SMOKE, task=task, eval_episodes=3, eval_steps=20)  # more would be chaotic
    expert = masklam.load_expert(task)
    actions = torch.zeros(3, 20, len(expert))
    for i in range(3):
        seed = masklam.episode_seed(config, "evaluate", i)
        done = masklam.state_rollout(task, expert, seed, 20)[1]
        actions[i, :len(done)] = torch.from_numpy(done)
    returns, film = masklam.evaluate(config, Replay(actions), "replay")
    earned, chance = (masklam.evaluate_state_policy(config, n) for n in ("expert", "random"))
    np.testing.assert_allclose(returns, earned, rtol=1e-3, atol=1e-3)
    assert abs(returns - chance).mean() > 1
    assert film.shape[1:] == (64, 64, 3) and len(np.unique(film[:, 20:40], axis=0)) == len(film)


def test_evaluation_runs_every_episode_once_and_in_order(monkeypatch):
    config, groups = replace(SMOKE, eval_episodes=12), []

    def rollout(given, policy, seeds, student, device):
        assert student == "student"
        groups.append(seeds)
        return np.array(seeds, float), np.full((1, 1, 1, 3), len(groups), np.uint8)

    monkeypatch.setattr(masklam, "rollout", rollout)
    returns, film = masklam.evaluate(config, PixelPolicy(6), "x", "student")
    expected = [masklam.episode_seed(config, "evaluate", i) for i in range(12)]
    assert returns.tolist() == expected == sum(groups, []) and len(groups) > 1
    assert (film == 1).all()


# -- report ----------------------------------------------------------------------------------------


def some_results():
    rng = np.random.default_rng(0)
    probed = ["probe_nmse", "probe_nmse_noise", "probe_nmse_decorrelated", "leakage_r2"]
    returned = ["return_mean", "return_std", "normalized_return"]
    number = lambda key: float(rng.uniform(0.1, 0.9)) * (100 if key.startswith("return") else 1)
    rows = {name: {key: number(key) for key in probed + returned} | dict(labels=50 + i)
            for i, name in enumerate(("lapo", "masklam"))}
    rows |= {name: {key: number(key) for key in returned} | dict(labels=80 + i)
             for i, name in enumerate(masklam.CLONES)}
    rows |= {name: {key: number(key) for key in probed} for name in masklam.REFERENCES}
    return dict(task="cheetah", methods=rows, expert_return=312.4, random_return=-1.25,
                noise_share=0.6)


def test_the_table_has_every_number_under_its_title():
    results = some_results()
    header, *lines = masklam.table(results).splitlines()
    names = [*results["methods"], "expert", "random"]
    cells = lambda line: [line[at:at + 11].strip() for at in range(16, 16 + 8 * 11, 11)]
    assert cells(header) == ["NMSE", "of noise", "rho = 0", "leakage", "return", "+-",
                             "normalised", "labels"]
    assert [line[:16].strip() for line in lines[:len(names)]] == names
    keys = ["probe_nmse", "probe_nmse_noise", "probe_nmse_decorrelated", "leakage_r2",
            "return_mean", "return_std", "normalized_return", "labels"]
    for line, row in zip(lines, results["methods"].values()):
        for cell, key in zip(cells(line), keys):
            assert (cell == "") == (key not in row)
            if cell:
                assert float(cell) == pytest.approx(row[key], abs=0.5 if row[key] > 10 else 0.005)
    assert cells(lines[len(names) - 2])[4] == "312" and cells(lines[len(names) - 1])[4] == "-1.25"
    assert "0.60" in lines[-1]


def test_normalised_returns_are_0_for_chance_and_1_for_the_expert():
    assert masklam.normalized(-2.0, -2.0, 6.0) == 0 and masklam.normalized(6.0, -2.0, 6.0) == 1
    assert masklam.normalized(0.0, -2.0, 6.0) == 0.25
    with pytest.raises(masklam.UserError, match="expert"):
        masklam.normalized(1.0, 3.0, 3.0)


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been saved."""
    saved = []
    monkeypatch.setattr(masklam, "save_figure", lambda figure, path: saved.append(figure))
    return saved


def test_the_summary_shows_a_bar_for_every_number_and_what_was_predicted(figures, tmp_path):
    results, rng = some_results(), np.random.default_rng(1)
    picture = lambda *shape: rng.integers(0, 256, (8, 8, *shape), np.uint8)
    predictions = {n: (picture(3), picture(3), picture()) for n in ("lapo", "masklam")}
    masklam.plot_summary(results, predictions, tmp_path / "summary.png")
    (figure,) = figures
    panels, rest, shown = figure.axes[:4], figure.axes[4:], {}
    titles = [panel.get_title() for panel in panels]
    for key, words in dict(probe_nmse="NMSE of the action", return_mean="return",
                           probe_nmse_noise="of its noise", leakage_r2="background").items():
        (panel,) = [p for p, title in zip(panels, titles) if words in title]
        expected = {name: row[key] for name, row in results["methods"].items() if key in row}
        labels = [label.get_text() for label in panel.get_xticklabels()]
        heights = [bar.get_height() for bar in panel.patches]
        assert dict(zip(labels, heights)) == expected and len(heights) == len(expected)
        for name, bar in zip(labels, panel.patches):
            assert shown.setdefault(name, bar.get_facecolor()) == bar.get_facecolor()
        written = [text.get_text() for text in panel.texts]
        assert written == [masklam.brief(height) for height in heights]
        spread = panel.containers[0].errorbar if key != "return_mean" else None
        assert spread is None
        if key == "return_mean":
            bars = next(c for c in panel.containers if hasattr(c, "patches"))
            for name, ends in zip(labels, bars.errorbar.lines[2][0].get_segments()):
                row = results["methods"][name]
                middle, std = row["return_mean"], row["return_std"]
                np.testing.assert_allclose(ends[:, 1], [middle - std, middle + std])
    assert len(set(shown.values())) == len(results["methods"])

    masklam.plot_summary(results, {}, tmp_path / "summary.png")  # LAOM predicts no pixels
    assert len(figures[1].axes) == 4

    assert len(rest) == 8
    for i, (name, (true, predicted, mask)) in enumerate(predictions.items()):
        error = abs(true.astype(float) - predicted).mean(-1)
        for ax, image in zip(rest[4 * i:], (true, predicted, 2 * error, mask)):
            assert len(ax.images) == 1 and ax.get_title()
            np.testing.assert_allclose(ax.images[0].get_array(), image)
            assert ax.images[0].get_clim() == (0, 255)
        assert name in rest[4 * i + 1].get_title() and "error" in rest[4 * i + 2].get_title()


def test_one_window_is_shown_with_what_was_predicted_of_it():
    windows = tiny_windows()
    i = len(windows) // 3
    e, t = windows.e[i], windows.t[i] + 1
    networks = dict(idm=lambda stacks: None, fdm=lambda obs, z: torch.full((1, 3, 32, 32), 0.1))
    true, predicted, mask = masklam.predict_one(windows, networks)
    assert (true == windows.video.frames[e, t]).all() and (mask == windows.video.masks[e, t]).all()
    assert predicted.shape == true.shape and (predicted == 153).all()  # 255 (0.1 + 0.5)


def test_the_mask_figure_shows_the_best_the_median_and_the_worst_label(figures, tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, 8, 8, 3), np.uint8)
    truth, labels, students = np.zeros((3, 5, 8, 8), np.uint8)
    truth[:, :, :4] = 255  # 32 pixels, of which labels find fewer, each another number
    for i, found in enumerate((20, 8, 32, 4, 28)):
        labels[i].flat[np.flatnonzero(truth[i])[:found]] = 255
        students[i].flat[np.flatnonzero(truth[i])[:32 - found]] = 255
    masklam.plot_masks(frames, labels, students, truth, tmp_path / "masks.png")
    axes = figures[0].axes
    assert len(axes) == 12
    for row, rank, i, iou in ((0, "best", 2, "1.00"), (1, "median", 0, "0.62"),
                              (2, "worst", 3, "0.12")):
        shown = axes[4 * row:4 * row + 4]
        assert shown[0].get_ylabel() == rank and iou in shown[1].get_title()
        for ax, image in zip(shown, (frames, labels, students, truth)):
            assert (ax.images[0].get_array() == image[i]).all()


def test_a_sweep_has_a_panel_for_every_number_and_a_line_for_every_method(figures, tmp_path):
    rows = [dict(point=str(k), method=method, probe_nmse=0.1 * k + i, leakage_r2=0.5 * i)
            for k in (1, 2, 5) for i, method in enumerate(("lapo", "masklam"))]
    rows.append(dict(point="9", method="masklam", probe_nmse=3.0, leakage_r2=0.1))
    rows.append(dict(point="5", method="laom", probe_nmse=0.7, leakage_r2=0.2))
    masklam.plot_sweep(rows, tmp_path / "sweep.png", "what was asked", "--offset")
    assert figures[0].get_suptitle() == "what was asked"
    panels = figures[0].axes
    assert len(panels) == 2
    for panel, key, words in zip(panels, ("probe_nmse", "leakage_r2"), ("NMSE", "background")):
        assert words in panel.get_title() and len(panel.lines) == 3
        assert panel.get_xlabel() == "--offset"
        for line, method in zip(panel.lines, ("lapo", "masklam")):
            mine = [row for row in rows if row["method"] == method]
            assert line.get_label() == method
            assert list(line.get_xdata()) == [float(row["point"]) for row in mine]
            assert list(line.get_ydata()) == [row[key] for row in mine]
        across = panel.lines[2]
        assert across.get_label() == "laom" and set(across.get_ydata()) == {rows[-1][key]}
    named = [text.get_text() for text in panels[-1].get_legend().get_texts()]
    assert named == ["lapo", "masklam", "laom"]


def test_a_sweeps_axis_is_to_scale_and_words_are_not_joined(figures, tmp_path):
    def axis(points, what):
        rows = [dict(point=point, method="masklam", probe_nmse=0.5) for point in points]
        masklam.plot_sweep(rows, tmp_path / "sweep.png", "", what)
        return figures.pop().axes[0]

    assert axis(["50", "200", "24750"], "--labels").get_xscale() == "log"
    assert axis(["0.0", "0.05", "1.0"], "--background-weight").get_xscale() == "linear"
    assert axis(["1", "2", "10"], "--offset").lines[0].get_linestyle() == "-"
    assert axis(["as it is", "erode 1"], "").lines[0].get_linestyle() == "None"


def test_a_figure_is_a_picture_of_what_is_in_it(tmp_path):
    figure = masklam.Figure(figsize=(2, 1))
    figure.subplots().bar(["a"], [1], color="red")
    masklam.save_figure(figure, tmp_path / "figure.png")
    pixels = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    assert pixels.shape[1] > 100 and (pixels == (255, 0, 0)).all(-1).mean() > 0.1
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


def test_the_animation_shows_films_side_by_side_and_the_shorter_stands_still(tmp_path):
    short, long = np.zeros((3, 8, 8, 3), np.uint8), np.zeros((5, 8, 8, 3), np.uint8)
    short[..., 0] = np.array([60, 120, 180])[:, None, None]
    long[..., 2] = np.array([50, 90, 130, 170, 210])[:, None, None]
    masklam.save_animation([short, long], tmp_path / "rollouts.gif", 0.05)
    animation = Image.open(tmp_path / "rollouts.gif")
    assert animation.n_frames == 5 and animation.height == 24 and 48 <= animation.width <= 72
    for t in range(5):
        animation.seek(t)
        assert animation.info["duration"] == 50
        pixels = np.asarray(animation.convert("RGB")).astype(int)
        left, right = pixels[:, :24], pixels[:, animation.width // 2:][:, :24]
        assert abs(left - short[min(t, 2), 0, 0]).max() <= 4
        assert abs(right - long[t, 0, 0]).max() <= 4


def test_summary_gives_mean_deviation_and_interval():
    rows = [dict(task="cheetah", seed=s, config={}, methods={"lapo": {"probe_nmse": v}})
            for s, v in enumerate((0.5, 0.7, 1.2))]
    got = masklam.summarize(rows)["methods"]["lapo"]["probe_nmse"]
    assert got["mean"] == pytest.approx(0.8) and got["std"] == pytest.approx(0.13**0.5)
    assert got["median"] == 0.7 and got["interval"] == pytest.approx(4.30 * (0.13 / 3)**0.5)
    for n, t in ((2, 12.71), (6, 2.57), (12, 2.26)):
        got = masklam.summarize((rows * 4)[:n])["methods"]["lapo"]["probe_nmse"]
        assert got["interval"] == pytest.approx(t * got["std"] / n**0.5)
    assert masklam.summarize(rows)["seeds"] == [0, 1, 2]


# -- keys of the cache -----------------------------------------------------------------------------


SECTIONS = {  # and the stage that an edit of them redoes
    "Config, errors, files": None, "Video": "record", "Networks": "mask",
    "Latent action models": "lam", "Linear probe": "probe", "Latent policy": "policy",
    "Bodies": "record", "Renderer": "record", "Distractors": "record", "Recording": "record",
    "Masks": "mask", "Evaluation": "evaluate", "Report": "report", "Pipeline": None,
    "Appendix: experts": None}


def cache_keys(config=SMOKE):
    return {stage: masklam.cache_key(config, stage, "x") for stage in masklam.STAGES}


def changed_stages(before, after):
    return [stage for stage in masklam.STAGES if before[stage] != after[stage]]


def stages_from(stage):
    return list(masklam.STAGES[masklam.STAGES.index(stage):]) if stage else []


@pytest.mark.parametrize("field", fields(Config), ids=lambda field: field.name)
def test_every_field_changes_the_keys_of_its_stage_and_later_ones(field):
    value = getattr(SMOKE, field.name)
    new = (*value, *value) if isinstance(value, tuple) else value + type(value)(1)
    if field.name == "task":
        new = "hopper"
    after = cache_keys(replace(SMOKE, **{field.name: new}))
    assert changed_stages(cache_keys(), after) == stages_from(field.metadata["stage"])


def test_an_edit_of_a_section_changes_the_keys_of_its_stage_and_later_ones(monkeypatch):
    source, before = (HERE / "masklam.py").read_text(), cache_keys()
    banners = re.findall(r"^# ==== [^\n]* =+\n", source, re.MULTILINE)
    titles = [re.match(r"# ==== \d+\. ([^[=]*?) *(\[|=)", banner)[1] for banner in banners]
    assert titles == list(SECTIONS)
    for banner, (title, stage) in zip(banners, SECTIONS.items()):
        edited = source.replace(banner, banner + "EDITED = True\n")
        with monkeypatch.context() as patch:
            patch.setattr(masklam, "SOURCE", edited)
            masklam.source_text.cache_clear()
            after = cache_keys()
        masklam.source_text.cache_clear()
        assert changed_stages(before, after) == stages_from(stage), title
    assert cache_keys() == before


def test_a_change_of_a_task_or_its_expert_changes_all_keys_of_that_task(monkeypatch):
    before, hopper = cache_keys(), cache_keys(replace(SMOKE, task="hopper"))
    task = masklam.TASKS["cheetah"]
    for table, new in ((masklam.TASKS, replace(task, seconds=task.seconds / 2)),
                       (masklam.EXPERTS, masklam.EXPERTS["cheetah"][::-1])):
        with monkeypatch.context() as patch:
            patch.setitem(table, "cheetah", new)
            assert changed_stages(before, cache_keys()) == list(masklam.STAGES)
            assert cache_keys(replace(SMOKE, task="hopper")) == hopper
    assert masklam.cache_key(SMOKE, "lam", "x") != masklam.cache_key(SMOKE, "lam", "y")


def test_another_version_of_a_library_changes_all_keys(monkeypatch):
    before = cache_keys()
    monkeypatch.setitem(masklam.VERSIONS, "mujoco", "4.0.1")
    assert changed_stages(before, cache_keys()) == list(masklam.STAGES)


def test_what_learns_from_labels_is_learnt_anew_with_other_labels(tmp_path, monkeypatch):
    runs = [masklam.Run(replace(SMOKE, labels=n), tmp_path, torch.device("cpu")) for n in (80, 40)]
    for stage in ("lam", "probe", "policy", "decode", "evaluate"):
        for name in ("laom-labels", "laom-labels-targets"):
            a, b = (run.path(stage, name) for run in runs)
            assert a != b, stage
    assert runs[0].path("policy", "masklam") == runs[1].path("policy", "masklam")
    for name in ("mine", "mine-targets"):  # a method of a fork
        assert runs[0].path("lam", name) == runs[1].path("lam", name)
        with monkeypatch.context() as patch:
            patch.setattr(masklam, "SUPERVISED", (*masklam.SUPERVISED, "mine"))
            assert runs[0].path("lam", name) != runs[1].path("lam", name)


def test_a_run_shows_each_learner_the_training_video_and_the_labelled_windows_alone(
        tmp_path, monkeypatch):
    run = masklam.Run(replace(TINY, frame_size=32, mask_input=True, eval_steps=1), tmp_path,
                      torch.device("cpu"))
    windows, got, student = tiny_windows(), [], object()
    run.windows, run.videos, run.masks = [windows, None, None], {"training": windows.video}, (
        student, {}, {})
    labelled = masklam.labelled_windows(run.config, windows)

    def spy(*given, **_):
        got.append([given[at] for at in places])
        raise Killed

    monkeypatch.setattr(masklam.Run, "targets", lambda *_: np.zeros((len(windows), 64), np.float32))
    monkeypatch.setattr(masklam.Run, "policy", lambda *_: None)
    for learner, places, learn in (
            ("train_lam", (1, 3), lambda: run.lam("laom-labels")),
            ("decode", (2, 4), lambda: run.decode("masklam")),
            ("clone_labels", (1, 2), lambda: run.decode("labels-only"))):
        monkeypatch.setattr(masklam, learner, spy)
        with pytest.raises(Killed):
            learn()
        assert got[-1][0] is windows and got[-1][1].tolist() == labelled.tolist()
    monkeypatch.setattr(masklam, "evaluate", spy)
    monkeypatch.setattr(masklam.Run, "decode", lambda *_: (None, 0))
    places = (3,)
    with pytest.raises(Killed):
        run.evaluate("masklam")
    assert got[-1] == [student]


# -- wrong input -----------------------------------------------------------------------------------


# Flags, and what the one line that they get must name.
WRONG = {
    "--seed -1": "--seed is -1; allowed: 0 to", "--seed 1000001": "--seed is 1000001",
    "--seed 1.5": "--seed: invalid int value: '1.5'", "--seed": "--seed: expected one argument",
    "--distractor mild": "--distractor: invalid choice: 'mild'",
    "--correlation 1.1": "--correlation is 1.1; allowed: 0 to 1",
    "--correlation -0.1": "--correlation is -0.1", "--correlation nan": "--correlation is nan",
    "--correlation inf": "--correlation is inf", "--correlation half": "--correlation: invalid",
    "--episodes 3": "--episodes is 3; allowed: 4 to", "--episodes 1000001": "--episodes is 1000001",
    "--episodes 1e3": "--episodes: invalid int value", "--episodes nan": "--episodes: invalid int",
    "--heldout-episodes 1": "--heldout-episodes is 1; allowed: 2 to",
    "--heldout-episodes -4": "--heldout-episodes is -4",
    "--steps 7": "--steps is 7; allowed: 8 to 1000", "--steps 1001": "--steps is 1001",
    "--demonstration-noise -1": "--demonstration-noise is -1",
    "--demonstration-noise nan": "--demonstration-noise is nan",
    "--exploration-noise 9.1": "--exploration-noise is 9.1",
    "--exploration-noise=-inf": "--exploration-noise is -inf",
    "--exploration-noise 0 --demonstration-noise 0": "below 0.001",
    "--exploration-noise 1e-7 --demonstration-noise 0": "below 0.001",
    "--frame-size 15": "--frame-size is 15; allowed: 16 to 512",
    "--frame-size 513": "--frame-size is 513",
    "--frame-size 50": "--frame-size is 50; allowed: multiples of 8",
    "--frame-size 24 --masks student": "--frame-size is 24; allowed: with --masks student, mu",
    "--masks magic": "--masks: invalid choice: 'magic'",
    "--sam-model vit_x": "--sam-model: invalid choice: 'vit_x'",
    "--keyframes 3 --masks student": "--keyframes is 3; allowed: 4 to",
    "--keyframes 321 --masks student": "--keyframes is 321; allowed: 4 to 320",
    "--student-updates 0 --masks student": "--student-updates is 0; allowed: 1 to",
    "--erode -1": "--erode is -1; allowed: 0 to", "--erode 65": "--erode is 65",
    "--dilate -1": "--dilate is -1; allowed: 0 to", "--dilate 2.5": "--dilate: invalid int",
    "--shift -3": "--shift is -3; allowed: 0 to 512", "--shift 513": "--shift is 513",
    "--occlude 1.5": "--occlude is 1.5; allowed: 0 to 1", "--occlude nan": "--occlude is nan",
    "--mask-input 1": "unrecognized arguments: 1", "--mask-input=yes": "--mask-input",
    "--background-weight -0.5": "--background-weight is -0.5; allowed: 0 to 1",
    "--background-weight nan": "--background-weight is nan",
    "--latent-dim 0": "--latent-dim is 0; allowed: 1 to", "--latent-dim 8193": "--latent-dim is",
    "--offset 0": "--offset is 0; allowed: 1 to 100", "--offset 101": "--offset is 101",
    "--patch 0": "--patch is 0; allowed: 1 to 64", "--patch 3": "(--patch",
    "--patch 64": "--patch", "--patch 1 --frame-size 18": "multiples of 4",
    "--idm-widths": "--idm-widths: expected at least one argument",
    "--idm-widths 48 0": "--idm-widths is '48 0'; allowed", "--idm-widths 48,96": "--idm-widths",
    "--idm-widths 8 8 8 8 8 8": "--idm-widths", "--fdm-widths 8 8 8 8 8 8": "--fdm-widths",
    "--fdm-widths 4097": "--fdm-widths is '4097'", "--fdm-widths 9 -9": "is '9 -9'; all",
    "--blocks 17 --patch 1": "--blocks is 17; allowed: 0 to", "--blocks -1 --patch 1": "--blocks",
    "--hidden -1": "--hidden is -1; allowed: 0 to", "--hidden 8193": "--hidden is 8193",
    "--lam-updates 0": "--lam-updates is 0; allowed: 1 to",
    "--batch-size 1": "--batch-size is 1; allowed: 2 to", "--batch-size 64.0": "--batch-size: inv",
    "--lam-lr -0.001": "--lam-lr is -0.001; allowed: 0 to 1", "--lam-lr inf": "--lam-lr is inf",
    "--probe-windows 99": "--probe-windows is 99; allowed: 100 to",
    "--policy-updates -1": "--policy-updates is -1; allowed: 1 to",
    "--policy-lr nan": "--policy-lr is nan; allowed: 0 to 1", "--policy-lr 2": "--policy-lr is 2",
    "--labels 9": "--labels is 9; allowed: 10 to", "--labels -5": "--labels is -5",
    "--labels many": "--labels: invalid int value: 'many'",
    "--labels 157": "--labels is 157; allowed: 10 to 156",
    "--labels 80 --episodes 4": "--labels is 80; allowed: 10 to 78",
    "--decoder-updates 0": "--decoder-updates is 0; allowed: 1 to",
    "--eval-episodes 0": "--eval-episodes is 0; allowed: 1 to",
    "--eval-steps 0": "--eval-steps is 0; allowed: 1 to", "--eval-steps x": "--eval-steps: invalid",
    "--methods": "--methods: expected at least one argument",
    "--methods lapo vae": "--methods: invalid choice: 'vae'",
    "--methods lapo lapo": "--methods is 'lapo lapo'; allowed: each of them once",
    "--preset huge": "--preset: invalid choice: 'huge'", "--until dinner": "--until: invalid choi",
    "--seeds 0": "--seeds is 0; allowed: 1 to", "--seeds -1": "--seeds is -1; allowed: 1 to",
    "--seeds 1001": "--seeds is 1001", "--seeds two": "--seeds: invalid int",
    "--seeds 2 --seed 1": "--seed: not allowed with argument --seeds",
    "--epochs 5": "unrecognized arguments: --epochs", "cheetah": "unrecognized arguments: cheetah",
    "--fresh 1": "unrecognized arguments: 1", "'--no\nflag'": "unrecognized arguments",
    # tasks
    "--task dog": "--task is 'dog'; allowed: cheetah, hopper", "--task ''": "--task is ''",
    "--task Nope-v0": "--task is 'Nope-v0'", "--task CartPole-v1": "--task is 'CartPole-v1'",
    "--task Blackjack-v1": "--task is 'Blackjack-v1'", "--task a/b/c": "--task is 'a/b/c'",
    "--task MountainCarContinuous-v0": "--task is 'MountainCarContinuous-v0'",
    "--task HalfCheetah-v3": "--task is 'HalfCheetah-v3'",
    "--task nosuchmodule:Foo-v0": "--task is 'nosuchmodule:Foo-v0'",
    "--task :x": "--task is ':x'", "--task .x:Foo-v0": "--task is '.x:Foo-v0'",
    "--train-expert --task dog": "--task is 'dog'", "--train-expert --task ''": "--task is ''",
    "--train-expert --task CartPole-v1": "--task is 'CartPole-v1'",
    "--task Reacher-v5": "--task Reacher-v5 has no expert: search one with --train-expert",
    # footage
    "--backgrounds {tmp}/missing": "allowed: a folder with four or more videos or pictures (.png",
    "--backgrounds {tmp}": "allowed: a folder with four or more",
    "--backgrounds {tmp}/text.pth": "allowed: a folder with four or more",
    "--backgrounds {tmp}/broken": "three.jpg cannot be read",
    "--backgrounds {tmp}/flipped": "three.png cannot be read",
    "--backgrounds {tmp}/empty": "folder has no picture",
    "--backgrounds {tmp}/mp4": "pip install imageio[pyav]",
    "--backgrounds {tmp}/broken --distractor none": "--backgrounds has no effect",
    # masks without an agent
    "--erode 9": "--erode", "--erode 3 --task swimmer": "--erode", "--erode 64": "empty",
    "--shift 512": "--shift", "--shift 60": "--shift", "--occlude 1": "--occlude",
    "--dilate 3 --occlude 1": "--occlude",
    # flags without effect
    "--distractor none --correlation 0.5": "--correlation has no effect",
    "--distractor none --speed 4": "--speed has no effect",
    "--speed 101": "--speed is 101.0; allowed: 0 to 100",
    "--zoom 0": "--zoom is 0.0; allowed: 0.1 to 3", "--zoom 0.1 --task hopper": "are empty",
    "--task Reacher-v5 --zoom 2": "--zoom has no effect",  # no entry, so no camera of its own
    "--methods lapo --background-weight 0.5": "--background-weight has no effect",
    "--masks simulator --sam-model vit_b": "--sam-model has no effect",
    "--masks student --sam-checkpoint {tmp}/text.pth": "--sam-checkpoint has no effect",
    "--masks simulator --keyframes 8": "--keyframes has no effect",
    "--masks simulator --student-updates 8": "--student-updates has no effect",
    "--student-updates 8": "--student-updates has no effect",  # auto, and no SAM on this disk
    "--blocks 2": "--blocks has no effect", "--train-expert --labels 20": "--labels has no effect",
    "--train-expert --seeds 2": "--seeds has no effect",
    "--train-expert --preset smoke --fresh": "--fresh --preset has no effect with --train",
    "--train-expert --out {tmp}": "--out has no effect",
    # sweeps
    "--sweep colours": "--sweep: invalid choice: 'colours'",
    "--sweep labels --until lam": "--until: not allowed with argument --sweep",
    "--sweep labels --train-expert": "--train-expert: not allowed with argument --sweep",
    "--sweep labels --episodes 3": "--episodes is 3; allowed: 4 to",
    "--sweep labels --labels 20": "--labels is what --sweep labels changes",
    "--sweep masks --mask-input": "--mask-input is what --sweep masks changes",
    "--sweep correlation --distractor none": "--correlation has no effect",
    "--sweep weight --methods lapo": "--background-weight has no effect",
    "--sweep masks --frame-size 32": "{'erode': 1} video are empty",
    "--sweep masks --methods lapo": "--background-weight has no effect",
    # SAM
    "--sam-checkpoint {tmp}/missing.pth": "missing.pth is no checkpoint of vit_b",
    "--sam-checkpoint {tmp}/text.pth": "text.pth is no checkpoint of vit_b",
    "--sam-checkpoint {tmp}/page.pth": "page.pth is no checkpoint of vit_b",
    "--sam-checkpoint {tmp}/list.pth": "list.pth is no checkpoint of vit_b",
    "--sam-checkpoint {tmp}/other.pth --masks sam": "other.pth is no checkpoint of vit_b",
    "--sam-checkpoint {tmp}": "is no checkpoint of vit_b", "--masks sam": "cannot be downloaded",
    # disks
    "--episodes 200000 --steps 1000": "does not fit", "--out {tmp}/text.pth": "text.pth",
    "--out {tmp}/text.pth/deeper": "text.pth", "--out /proc/nowhere": "/proc/nowhere",
}


def test_every_flag_of_config_is_among_the_wrong_input():
    flags = {word.split("=")[0] for line in WRONG for word in shlex.split(line)}
    assert {"--" + f.name.replace("_", "-") for f in fields(Config)} <= flags and len(WRONG) >= 60


def test_a_home_that_may_not_be_searched_stops_no_run(monkeypatch):
    def stat(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stat)
        config, _ = masklam.parse(["--preset", "smoke"])
    assert config.masks == "simulator"


def test_a_sweep_of_labels_asks_for_no_more_than_there_are():
    config, _ = masklam.parse(["--preset", "smoke", "--episodes", "4", "--sweep", "labels"])
    assert [point["labels"] for point in masklam.sweep_points(config, "labels")] == [25, 50, 78]


@pytest.fixture
def started(monkeypatch, tmp_path, small_registry):
    """Ends a run that would start to work; no SAM on the disk, none to be had."""
    def work(*_, **__):
        raise AssertionError("work has begun")

    monkeypatch.setattr(masklam.Video, "create", work)
    monkeypatch.setattr(masklam, "train_expert", work)
    monkeypatch.setattr(masklam, "SAM_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_gets_one_line_and_status_two(line, started, tmp_path, capsys, recwarn):
    """At once, and nothing is written."""
    flags = [word.replace("{tmp}", str(tmp_path)) for word in shlex.split(line)]
    (tmp_path / "text.pth").write_bytes(b"<html>404")
    if "--backgrounds" in line:
        for folder, wrong in (("broken", "three.jpg"), ("mp4", "three.mp4"), ("empty", "folder")):
            (tmp_path / folder).mkdir()
            for name in ("0.png", "1.png", "2.png"):
                Image.new("RGB", (20, 20)).save(tmp_path / folder / name)
            (tmp_path / folder / wrong).write_bytes(b"<html>404")
        if "flipped" in line:
            picture = (tmp_path / "broken" / "0.png").read_bytes().replace(b"IDAT", b"KDAT")
            (tmp_path / "broken" / "three.jpg").unlink()
            (tmp_path / "broken").rename(tmp_path / "flipped")
            (tmp_path / "flipped" / "three.png").write_bytes(picture)
        (tmp_path / "empty" / "folder").unlink()
        (tmp_path / "empty" / "folder").mkdir()
    (tmp_path / "page.pth").write_bytes(b"error code: 1010")
    if "list.pth" in line:
        torch.save([1, 2], tmp_path / "list.pth")
    if "other.pth" in line:
        torch.save(small_sam(width=64).state_dict(), tmp_path / "other.pth")
    before, start = sorted(tmp_path.rglob("*")), time.process_time()
    if "--train-expert" not in flags:  # which takes neither
        flags = ["--preset", "smoke", "--out", str(tmp_path / "runs"), *flags]
    assert masklam.main(flags) == 2
    took = time.process_time() - start
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("masklam: ") and WRONG[line] in lines[0], lines
    assert not [str(warning.message) for warning in recwarn]
    after = [p for p in sorted(tmp_path.rglob("*")) if "hub" not in p.parts]
    assert after == before and took < 10


def test_no_memory_gets_one_line_and_other_errors_do_not(monkeypatch, tmp_path, capsys):
    def die(config, options, pool):
        list(masklam.map_in(pool, os._exit, [(1,)]))

    for fails in (lambda *_: np.empty(10**15), lambda *_: torch.empty(10**15), die):
        monkeypatch.setattr(masklam, "run_seeds", fails)
        assert masklam.main(["--preset", "smoke", "--out", str(tmp_path)]) == 2
        *before, line = capsys.readouterr().err.splitlines()
        assert line.startswith("masklam: out of memory") and "--episodes" in line
        assert before == ([""] if fails is die else [])  # after a worker's bar
    for error in (RuntimeError("shapes"), ZeroDivisionError("0")):
        def fails(*_):
            raise error
        monkeypatch.setattr(masklam, "run_seeds", fails)
        with pytest.raises(type(error), match=str(error)):
            masklam.main(["--preset", "smoke", "--out", str(tmp_path)])


# -- whole runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One smoke run of the command line, from nothing to the table."""
    out = tmp_path_factory.mktemp("runs")
    result = run(*FLAGS, "--out", out)
    assert result.returncode == 0, result.stderr[-2000:]
    folder = out / "cheetah-smoke-low-0"
    return folder, result, json.loads((folder / "results.json").read_text())


@pytest.fixture
def copied(smoke, tmp_path):
    """A run's folder, to be damaged: replace its files, they are the others' too."""
    folder = tmp_path / smoke[0].name
    shutil.copytree(smoke[0], folder, copy_function=os.link, ignore=lambda *_: ["lock"])
    return folder


def rewrite(path, content):
    path.unlink()
    path.write_bytes(content)


def masklam_lines(text):
    """What is said in the end; a bar of progress is called masklam, too."""
    lines = re.split("[\r\n]+", text)
    return [line for line in lines if line.startswith("masklam: ") and "%|" not in line]


def snapshot(folder):
    """{file: size and time of its last change}, but of what every run makes anew."""
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")
            if p.is_file() and p.name not in ("lock", "config.json", "masks.png")}


def test_smoke_run_prints_the_table_and_writes_every_file(smoke):
    folder, result, results = smoke
    assert set(results["methods"]) == {"lapo", "masklam", "oracle", "labels-only", "past-only",
                                       "supervised-idm"}
    probed = {"probe_nmse", "probe_nmse_per_dimension", "probe_nmse_noise",
              "probe_nmse_decorrelated", "leakage_r2"}
    returned = {"return_mean", "return_std", "return_n", "normalized_return", "action_nmse",
                "labels"}
    assert set(results["methods"]["masklam"]) == probed | returned
    assert set(results["methods"]["past-only"]) == probed
    assert set(results["methods"]["oracle"]) == returned
    assert set(results["rates"]) == {"frames", "lam", "policy"} and 0 < results["noise_share"] < 1
    for name in (*results["methods"], "expert", "random"):
        assert name in result.stdout
    row = results["methods"]["masklam"]
    span = results["expert_return"] - results["random_return"]
    assert row["normalized_return"] == pytest.approx(
        (row["return_mean"] - results["random_return"]) / span)
    counts = [results["methods"][name]["labels"] for name in ("masklam", *masklam.CLONES)]
    assert counts == [80, 4 * 39, 80]
    with Image.open(folder / "rollouts.gif") as animation:
        assert animation.info["duration"] == 100  # as long as an action lasts
    for name in ("summary.png", "rollouts.gif"):
        assert (folder / name).stat().st_size > 1000 and str(folder / name) in result.stdout
    assert "settotalmass" not in result.stdout + result.stderr
    assert not list(folder.rglob("MUJOCO_LOG.TXT")) and not list(folder.rglob("*.tmp"))
    assert not list(folder.rglob("*.partial"))


def test_second_run_reuses_and_a_changed_flag_redoes_only_what_it_touches(smoke):
    folder, _, before = smoke
    cached = {p: p.stat().st_mtime_ns for p in (folder / "cache").glob("*.pt")}
    assert masklam.main([*FLAGS, "--out", str(folder.parent)]) == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / "cache").glob("*.pt")} == cached
    assert json.loads((folder / "results.json").read_text()) == before
    flags = [*FLAGS, "--out", str(folder.parent), "--labels", "40"]
    assert masklam.main(flags) == 0
    now = {p: p.stat().st_mtime_ns for p in (folder / "cache").glob("*.pt")}
    assert {p: now[p] for p in cached} == cached
    added = sorted(p.name.rsplit("-", 1)[0] for p in set(now) - set(cached))
    decoded = ["labels-only", "lapo", "masklam"]
    assert added == sorted([f"decode-{name}" for name in decoded] + [
        f"evaluate-{name}" for name in (*decoded, "oracle", "expert", "random")])


def test_a_finished_run_gives_its_memory_back(smoke):
    folder, _, results = smoke
    config = replace(masklam.parse(FLAGS)[0], masks="simulator")
    run = masklam.Run(config, folder, torch.device("cpu"))
    assert run.probe("masklam")["probe_nmse"] == results["methods"]["masklam"]["probe_nmse"]
    gone = weakref.ref(run)
    del run
    assert gone() is None


def test_seeds_are_run_each_in_its_folder_and_summarised(smoke, tmp_path):
    assert masklam.main([*FLAGS, "--seeds", "2", "--out", str(tmp_path)]) == 0
    results = [json.loads((tmp_path / f"cheetah-smoke-low-{seed}" / "results.json").read_text())
               for seed in (0, 1)]
    assert [r["seed"] for r in results] == [0, 1]
    assert results[0]["methods"] == smoke[2]["methods"] != results[1]["methods"]
    summary = json.loads((tmp_path / "cheetah-smoke-low-summary.json").read_text())
    values = [r["methods"]["masklam"]["probe_nmse"] for r in results]
    assert summary["methods"]["masklam"]["probe_nmse"]["mean"] == pytest.approx(np.mean(values))


def test_a_sweep_of_labels_ends_with_returns(smoke, monkeypatch, capsys):
    folder, _, results = smoke
    monkeypatch.setitem(masklam.SWEEPS, "labels", [dict(labels=80)])  # and all 156
    assert masklam.main([*FLAGS, "--out", str(folder.parent), "--sweep", "labels"]) == 0
    files = [str(folder / f"sweep-labels.{kind}") for kind in ("csv", "png")]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["files:", *files]
    with open(folder / "sweep-labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["point"], row["method"]) for row in rows] == [
        (n, name) for n in ("80", "156") for name in ("lapo", "masklam", "labels-only")]
    for row in rows[:3]:
        for key in ("normalized_return", "action_nmse"):
            assert float(row[key]) == results["methods"][row["method"]][key]


def test_errors_of_actions_are_taken_on_held_out_episodes(smoke):
    folder, _, results = smoke
    config = replace(masklam.parse(FLAGS)[0], masks="simulator")
    run = masklam.Run(config, folder, torch.device("cpu"))
    policy, _ = run.decode("masklam")
    training, heldout = (masklam.action_nmse(policy, windows) for windows in run.windows[:2])
    assert results["methods"]["masklam"]["action_nmse"] == pytest.approx(heldout, rel=1e-3)
    assert abs(training - heldout) > 1e-3


def test_degraded_masks_leave_lapos_numbers_alone(smoke):
    folder, _, before = smoke
    flags = [*FLAGS, "--out", str(folder.parent), "--dilate", "1", "--occlude", "0.2"]
    cached = set((folder / "cache").glob("*.pt"))
    assert masklam.main(flags) == 0
    results = json.loads((folder / "results.json").read_text())
    for key in ("probe_nmse", "probe_nmse_noise"):  # but masklam's are others
        assert results["methods"]["masklam"][key] != before["methods"]["masklam"][key]
    assert all(0.1 < iou < 0.8 for iou in results["mask_iou"].values())
    assert set(results["mask_iou"]) == {"training", "heldout", "decorrelated"}
    touched = {p.name.split("-")[0] for p in set((folder / "cache").glob("*.pt")) - cached}
    assert touched == {"mask", "lam", "probe", "policy", "decode", "evaluate"}
    lapo = {"leakage_r2": 0}  # what is masked out of the background has changed
    assert results["methods"]["lapo"] | lapo == before["methods"]["lapo"] | lapo
    assert set(before["mask_iou"].values()) == {1.0} and before["mask_source"] == "simulator"


def test_sam_masks_through_the_command_line(smoke, fitted_sam, small_registry, capsys, monkeypatch):
    folder, first, _ = smoke
    assert "masks: the simulator's own" in first.stdout and "--masks sam" in first.stdout
    flags = [*FLAGS, "--out", str(folder.parent), "--sam-checkpoint", str(fitted_sam),
             "--keyframes", "16", "--student-updates", "150", "--mask-input", "--shift", "1"]
    assert masklam.main([*flags, "--methods", "masklam"]) == 0  # auto: a checkpoint was given
    assert f"masks: sam, from {fitted_sam}" in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert results["mask_source"] == "sam" and set(results["methods"]) == {
        "masklam", "oracle", "labels-only", "past-only", "supervised-idm"}
    assert set(results["mask_iou"]) == {"keyframes", "training", "heldout", "decorrelated"}
    assert results["mask_iou"]["keyframes"] >= 0.6 and results["mask_iou"]["training"] > 0.1
    assert (folder / "masks.png").stat().st_size > 1000
    monkeypatch.setattr(masklam, "segment", None)  # SAM has seen what there is
    flags[flags.index("--shift") + 1] = "2"
    assert masklam.main([*flags, "--until", "mask"]) == 0


def test_a_sweep_reuses_what_is_there_and_writes_a_row_for_every_point_and_method(
        smoke, monkeypatch, tmp_path):
    folder, _, results = smoke
    points, compute = [dict(correlation=0.5), dict(correlation=0.0)], masklam.compute_missing

    def compute_missing(wanted):
        for run, _, _ in wanted:
            assert {"videos", "masks"} <= set(vars(run))  # or every worker would record them
        return compute(wanted)

    monkeypatch.setattr(masklam, "compute_missing", compute_missing)
    monkeypatch.setitem(masklam.SWEEPS, "correlation", points)
    assert masklam.main([*FLAGS, "--out", str(folder.parent), "--sweep", "correlation"]) == 0
    with open(folder / "sweep-correlation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["point"], row["method"]) for row in rows] == [
        (str(rho), method) for rho in (0.5, 0.0) for method in ("lapo", "masklam")]
    assert (folder / "sweep-correlation.png").stat().st_size > 1000
    for row, other in zip(rows[:2], rows[2:]):
        known = results["methods"][row["method"]]
        for key in ("probe_nmse", "probe_nmse_noise", "probe_nmse_decorrelated", "leakage_r2"):
            assert float(row[key]) == known[key] != float(other[key])
    masklam.record(replace(masklam.parse(FLAGS)[0], masks="simulator", correlation=0.0), tmp_path)
    recorded = [masklam.checksums(path) for path in (folder / "cache").glob("record-video-*/")]
    assert masklam.checksums(tmp_path) in recorded


def test_one_flipped_byte_ends_a_run_before_anything_is_made_of_it(copied, capsys):
    """Of a result, of an array; and a result that was copied from another's."""
    flags = [*FLAGS, "--out", str(copied.parent)]
    masks = min((copied / "cache").glob("record-video-*/heldout/masks.npy"), key=os.path.getmtime)
    probe = min((copied / "cache").glob("probe-lapo-*.pt"), key=os.path.getmtime)
    lapo, ours = (min((copied / "cache").glob(f"evaluate-{name}-*.pt"), key=os.path.getmtime)
                  for name in ("lapo", "masklam"))  # the first: other tests' runs have added some
    for path, content, named in ((masks, flipped(masks.read_bytes(), 5000), "damaged"),
                                 (probe, flipped(probe.read_bytes(), 99), "damaged"),
                                 (ours, lapo.read_bytes(), lapo.name)):
        good = path.read_bytes()
        rewrite(path, content)
        before = snapshot(copied)
        assert masklam.main(flags) == 2
        (line,) = masklam_lines(capsys.readouterr().err)
        assert str(path) in line and named in line and "--fresh" in line
        assert snapshot(copied) == before
        rewrite(path, good)


def test_what_killed_runs_have_left_is_removed(copied):
    left = [copied / "results.json.1.tmp", copied / "cache" / "lam-lapo-1.pt.99.tmp"]
    for path in left:
        path.write_bytes(b"half")
    flags = [*FLAGS, "--until", "record", "--out", str(copied.parent)]
    assert masklam.main(flags) == 0
    assert not any(path.exists() for path in left)


def test_a_second_run_on_one_folder_says_that_there_is_another(copied, capsys):
    before = snapshot(copied)
    flags = [*FLAGS, "--out", str(copied.parent)]
    with masklam.own_folder(copied, SMOKE, False):
        for more in ([], ["--fresh"]):
            assert masklam.main([*flags, *more]) == 2
            (line,) = masklam_lines(capsys.readouterr().err)
            assert "another run" in line and str(copied) in line
    assert snapshot(copied) == before
    assert masklam.main([*flags, "--until", "record"]) == 0


@pytest.mark.parametrize("flags", [["--help"], FLAGS])
def test_a_closed_pipe_ends_a_run_quietly(flags, copied):
    """As `| head -1` closes it, here before the first word."""
    out, into = os.pipe()
    os.close(out)
    done = subprocess.run([sys.executable, str(HERE / "masklam.py"), *flags, "--out",
                           str(copied.parent)], stdout=into, stderr=subprocess.PIPE, text=True)
    os.close(into)
    assert done.returncode == 0 and "roken" not in done.stderr and "Trace" not in done.stderr


def test_fresh_empties_nothing_for_a_recording_that_would_not_fit(copied, capsys):
    before = snapshot(copied.parent)
    flags = [*FLAGS, "--fresh", "--episodes", "200000", "--steps", "1000"]
    assert masklam.main([*flags, "--out", str(copied.parent)]) == 2
    assert "does not fit" in capsys.readouterr().err
    assert {path: snapshot(copied.parent).get(path) for path in before} == before


@pytest.mark.parametrize("again", [[], ["--fresh"]])
def test_a_run_goes_on_when_fresh_was_stopped_while_it_emptied_the_cache(
        again, copied, monkeypatch):
    flags, count, unlink = [*FLAGS, "--out", str(copied.parent), "--until", "record"], [], os.unlink

    def stop(*given, **how):
        count.append(given)
        if len(count) == 20:
            raise KeyboardInterrupt
        return unlink(*given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", stop)
        assert masklam.main([*flags, "--fresh"]) == 130
    assert masklam.main([*flags, *again]) == 0 and not list(copied.rglob("*.tmp"))


def test_a_report_by_itself_needs_nothing_but_the_cache(copied):
    config = replace(masklam.parse(FLAGS)[0], masks="auto")
    run = masklam.Run(config, copied, torch.device("cpu"))
    assert run.config.masks == "simulator"  # auto, where no checkpoint is at hand
    results = run.report()
    assert results["mask_source"] == "simulator" and set(results["rates"]) == {
        "frames", "lam", "policy"}


@pytest.mark.parametrize("name, size", [("heldout/length.npy", 0), ("training/frames.npy", 5000)])
def test_what_is_left_of_a_damaged_recording_gets_one_line(name, size, copied, capsys):
    config = replace(masklam.parse(FLAGS)[0], masks="simulator")
    record = masklam.Run(config, copied, "cpu").path("record", "video")
    record.unlink()
    array = record.with_suffix("") / name
    rewrite(array, array.read_bytes()[:size])
    assert masklam.main([*FLAGS, "--until", "record", "--out", str(copied.parent)]) == 2
    (line,) = masklam_lines(capsys.readouterr().err)
    assert str(array.parent) in line and "--fresh" in line


def test_an_expert_that_earns_too_little_is_named_before_anything_is_trained(tmp_path, capsys):
    assert masklam.main([*FLAGS, "--eval-steps", "1", "--out", str(tmp_path)]) == 2
    assert "evaluate longer" in capsys.readouterr().err
    assert list(tmp_path.rglob("record-*")) and not list(tmp_path.rglob("lam-*"))


@pytest.mark.parametrize("task", masklam.TASKS)
def test_experts_are_better_than_chance_in_a_smoke_run(task):
    config = replace(SMOKE, task=task)
    expert, chance = (masklam.evaluate_state_policy(config, name).mean()
                      for name in ("expert", "random"))
    assert expert > chance


def test_a_run_without_an_output_ends_quietly(copied):
    done = subprocess.run([sys.executable, str(HERE / "masklam.py"), *FLAGS, "--out",
                           str(copied.parent)], preexec_fn=lambda: os.close(1),
                          stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_what_runs_is_the_source_as_it_was_when_it_was_read(tmp_path):
    """An edit while the program is at work gets another key, in the next run."""
    copy = tmp_path / "edited.py"
    copy.write_text((HERE / "masklam.py").read_text())
    code = ("import edited; from pathlib import Path; path = Path(edited.__file__)\n"
            "path.write_text(path.read_text().replace('error.sum()', '0 * error.sum()'))\n"
            "print(edited.cache_key(edited.Config(), 'lam', 'x'))")
    keys = [subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True).strip()
            for _ in range(2)]
    assert keys[0] == masklam.cache_key(Config(), "lam", "x") != keys[1]


def test_there_is_a_worker_for_every_core_that_may_be_used(monkeypatch):
    for cores, count in (({3}, 1), (set(range(4)), 4), (set(range(64)), 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        with masklam.worker_pool() as pool:
            assert pool._max_workers == count


def test_the_picture_of_masks_is_that_of_the_present_setting(copied):
    flags = [*FLAGS, "--out", str(copied.parent), "--until", "mask", "--masks", "student",
             "--student-updates", "150", "--keyframes"]
    pictures = []
    for keyframes in ("16", "12", "16"):
        assert masklam.main([*flags, keyframes]) == 0
        pictures.append((copied / "masks.png").read_bytes())
    assert pictures[0] == pictures[2] != pictures[1]
    assert masklam.main([*FLAGS, "--out", str(copied.parent), "--until", "mask"]) == 0
    assert not (copied / "masks.png").exists()


def test_an_input_that_never_changes_gets_no_weight(monkeypatch):
    rollout = masklam.state_rollout

    def with_a_constant(*given, **how):
        states, actions, rewards = rollout(*given, **how)
        return np.c_[states[:, :-1], np.full(len(states), 5.0)], actions, rewards

    monkeypatch.setattr(masklam, "worker_pool", contextlib.nullcontext)
    monkeypatch.setattr(masklam, "map_in", lambda _, function, jobs: map(function, *zip(*jobs)))
    monkeypatch.setattr(masklam, "state_rollout", with_a_constant)
    literal = masklam.train_expert("hopper", directions=4, top=2, horizon=20, budget=2000)
    expert = masklam.from_literal(literal, 3)
    assert (expert[:, -1] == 0).all() and abs(expert).max() < 100


@pytest.mark.parametrize("stage, limit", [
    ("record", 500_000), ("mask", 500_000), ("lam", 5_000_000)])
def test_a_disk_without_room_gets_one_line_and_loses_nothing(stage, limit, copied):
    """As many bytes as a file may have: too few for frames, and for the weights of a network."""
    flags = dict(record=["--seed", "1"], mask=["--dilate", "1"], lam=["--latent-dim", "8"])[stage]
    before = snapshot(copied.parent)
    done = run(*FLAGS, "--until", stage, "--out", copied.parent, *flags,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    (line,) = masklam_lines(done.stderr)
    assert done.returncode == 2 and "File too large" in line and "Traceback" not in done.stderr
    after = snapshot(copied.parent)
    assert {path: after.get(path) for path in before} == before
    added = [path.name for path in set(after) - set(before)]
    assert not [name for name in added if name.endswith((".tmp", ".npy", ".pt"))], added


def test_a_killed_run_goes_on_where_it_stopped(smoke, tmp_path):
    """Ctrl-C, which a terminal sends to workers too, while they start or record; the second run
    ends with the numbers of an uninterrupted one."""
    folder, _, uninterrupted = smoke
    process = start(*FLAGS, "--out", tmp_path)
    wait_for(lambda: list(tmp_path.rglob("training/length.npy")))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "goes on from here" in errors and "Traceback" not in errors
    assert run(*FLAGS, "--out", tmp_path).returncode == 0
    results = json.loads((tmp_path / folder.name / "results.json").read_text())
    assert results["methods"] == uninterrupted["methods"]


def start(*flags):
    """A run in a process group of its own. A shell starts what runs in the background with SIGINT
    ignored, and children inherit that."""
    return subprocess.Popen([sys.executable, str(HERE / "masklam.py"), *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def group_is_gone(process):
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_kills_at_random_moments_change_no_number_and_leave_nothing(smoke, tmp_path):
    """Politely while it records, and then without mercy when networks have begun to be trained."""
    folder, begun = tmp_path / smoke[0].name, {
        signal.SIGTERM: lambda: folder.exists(),
        signal.SIGKILL: lambda: list(folder.rglob("mask-masks-*.pt"))}
    for number, moment in zip(begun, np.random.default_rng().uniform(0, 5, 2)):
        process = start(*FLAGS, "--out", tmp_path)
        wait_for(begun[number])
        time.sleep(moment)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        expected = 130 if number == signal.SIGTERM else -signal.SIGKILL
        assert process.returncode == expected and "Traceback" not in errors, (moment, errors)
        wait_for(lambda: group_is_gone(process), 10)
    assert run(*FLAGS, "--out", tmp_path).returncode == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["methods"] == smoke[2]["methods"]
    assert not [p for p in folder.rglob("*") if p.suffix in (".tmp", ".partial")]
