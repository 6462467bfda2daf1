"""Tests of masklam.py against independent references: python -m pytest -q test_masklam.py"""

import contextlib
import errno
import functools
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
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
from segment_anything import SamPredictor
from segment_anything.modeling import (ImageEncoderViT, MaskDecoder, PromptEncoder, Sam,
                                       TwoWayTransformer)

import masklam
from masklam import Config, PRESETS, Video, Windows

HERE = Path(__file__).parent
SMOKE = Config(**PRESETS["smoke"])
TINY = replace(SMOKE, episodes=4, heldout_episodes=2, steps=12, lam_updates=12, batch_size=8,
               labels=20)


def run(*flags, timeout=150):
    return subprocess.run([sys.executable, str(HERE / "masklam.py"), *map(str, flags)],
                          capture_output=True, text=True, timeout=timeout)


def random_video(E=5, T=9, size=8, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda n: rng.standard_normal((E, T, n)).astype(np.float32)
    return Video(frames=rng.integers(0, 256, (E, T, size, size, 3), np.uint8),
                 masks=rng.integers(0, 256, (E, T, size, size), np.uint8),
                 length=np.array([9, 2, 1, 5, 9])[:E], actions=normal(2), intended=normal(2),
                 rewards=np.zeros((E, T), np.float32), states=normal(3), distractor=normal(4),
                 demonstration=np.arange(E) % 2 == 0)


# -- files ---------------------------------------------------------------------------------------


def test_script_header_equals_requirements():
    header = (HERE / "masklam.py").read_text().split("# ///\n")[0]
    listed = re.findall(r'"([^"]+==[^"]+)"', header)
    assert listed == (HERE / "requirements.txt").read_text().split()


def test_every_config_field_is_a_documented_flag():
    text = run("--help").stdout
    for f in fields(Config):
        assert "--" + f.name.replace("_", "-") in text and f.metadata["help"]


# -- bodies and experts --------------------------------------------------------------------------


@pytest.mark.parametrize("task, bar", [("cheetah", 1500), ("hopper", 600), ("walker", 500),
                                       ("swimmer", 120), ("ant", 500), ("humanoid", 600)])
def test_experts_return_what_their_bars_ask_for(task, bar):
    """500 steps on seeds of no search, without the bonus for being alive."""
    expert = masklam.load_expert(task)
    returns = [masklam.state_rollout((task, expert, 7_000_000 + i, 500, 0, 0))[2].sum()
               for i in range(10)]
    assert np.mean(returns) >= bar


@pytest.mark.parametrize("task", [name for name in masklam.TASKS if masklam.TASKS[name].reach])
def test_a_servo_holds_the_angles_that_an_action_asks_for(task):
    """In the air, without gravity: every joint settles at q0 + reach a / high."""
    env, entry = masklam.bare_env(task), masklam.TASKS[task]
    model, data, high = env.model, env.data, env.action_space.high
    joints = model.actuator_trnid[:, 0]
    model.opt.gravity[:] = 0
    model.geom_contype[:], model.geom_conaffinity[:] = 0, 0
    model.jnt_stiffness[:] = 0
    env.reset(seed=0)
    data.ctrl[:] = 0.2 * high * np.where(np.arange(len(high)) % 2, 1, -1)
    mujoco.mj_step(model, data, 2000)
    q = data.qpos[model.jnt_qposadr[joints]]
    asked = model.qpos0[model.jnt_qposadr[joints]] + entry.reach * data.ctrl / high
    within = asked.clip(*model.jnt_range[joints].T)
    np.testing.assert_allclose(q, within, atol=0.03)
    assert (abs(data.actuator_force) <= model.actuator_forcerange[:, 1] + 1e-9).all()


@pytest.mark.parametrize("task", masklam.TASKS)
def test_the_trained_gait_stays_within_the_frame(task, tmp_path):
    config = masklam.Config(task=task, distractor="none")
    env = masklam.make_env(config)
    _, info = env.reset(seed=0)
    sizes = (64, env.action_dim, len(info["state"]), len(info["distractor"]))
    masklam.Video.create(tmp_path, 2, config.steps, *sizes)
    for i in range(2):
        masklam.record_episode((config, tmp_path, i, i))
    video = masklam.Video.open(tmp_path)
    masks = video.masks[video.valid]
    border = np.concatenate([masks[:, [0, -1]], masks[..., [0, -1]].swapaxes(1, 2)], 2)
    assert (border >= 128).any((1, 2)).mean() <= 0.01
    assert 0.04 < masks.mean() / 255 < 0.08  # large


def test_the_humanoid_walks():
    """At more than a metre a second: standing would earn the return too."""
    expert, env = masklam.load_expert("humanoid"), masklam.state_env("humanoid")
    steps, forward = 0, 0.0
    for seed in range(7_000_000, 7_000_005):
        steps += len(masklam.state_rollout(("humanoid", expert, seed, 1000, 0, 0))[2])
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


def test_every_task_has_an_expert_with_a_bar():
    tested = test_experts_return_what_their_bars_ask_for.pytestmark[0].args[1]
    assert {task for task, _ in tested} == set(masklam.TASKS) == set(masklam.EXPERTS)


def test_folding_the_whitening_leaves_the_policy_unchanged():
    rng = np.random.default_rng(0)
    weights, mean, state = rng.normal(size=(3, 5)), rng.normal(size=5), rng.normal(size=5)
    std = rng.random(5) + 1
    folded = masklam.fold_whitening(weights, mean, std)
    expected = weights @ ((state - mean) / std)
    np.testing.assert_allclose(masklam.expert_action(folded, state, np.full(3, 99)), expected)
    clipped = masklam.expert_action(folded, state, np.full(3, 0.01))
    assert (clipped == 0.01 * np.sign(expected)).all()


def test_expert_search_learns_to_move_forward(monkeypatch):
    literal, returns = masklam.train_expert("cheetah", directions=8, top=4, size=0.03, step=0.02,
                                            noise=0.1, budget=60_000, horizon=100)
    chance = masklam.state_rollout(("cheetah", None, 0, 500, 0, 0))[2].sum()
    monkeypatch.setitem(masklam.EXPERTS, "cheetah", literal)
    assert masklam.load_expert("cheetah").shape == (6, 18)
    assert np.mean(returns) > chance + 100


def test_an_expert_for_an_environment_without_an_entry(monkeypatch, capsys):
    """The printed entries are Python, say what was assumed, and make the id a task."""
    search = dict(directions=2, top=1, budget=100)
    with monkeypatch.context() as patch:  # a short search
        patch.setattr(masklam, "get_task", lambda name: masklam.Task(name, search=search))
        assert masklam.main(["--task", "InvertedPendulum-v5", "--train-expert"]) == 0
    text = capsys.readouterr().out
    assert "assumed" in text and "return on ten unseen seeds" in text
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


def test_rays_are_cast_wherever_the_agent_is():
    """What is skipped shows nothing: the same picture as with rays at every pixel."""
    env = masklam.state_env("cheetah")
    env.reset(seed=0)
    renderer = masklam.AgentRenderer(env.model)
    for view in ((0, 0, 0, 1), (9, -9, 9, 0.7)):
        _, alpha, _ = renderer(env.data.qpos, view)
        everywhere = renderer._cast(renderer.world_rays[:, 0], renderer.colors)
        inside = everywhere[:, 3].reshape(64, 64) > 0
        assert masklam.mask_iou(alpha, inside * np.uint8(255)) > 0.9
        assert (alpha[inside] > 0).all() and (alpha[~inside] < 255).all()


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
    assert {model.body(b).name for b in model.geom_bodyid[~masklam.agent_geoms(model)]} == {
        "world", "object", "goal"}
    renderer = masklam.AgentRenderer(model)
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


def test_splits_share_no_seed():
    seeds = [masklam.episode_seed(replace(SMOKE, seed=s), split, i) for s in (0, 1)
             for split in ("training", "heldout", "decorrelated", "evaluate") for i in range(300)]
    assert len(set(seeds)) == len(seeds)


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
    np.testing.assert_allclose(velocities.std(0), backdrop.SPEED, rtol=0.15)
    assert backdrop.SPRITES >= 10 and backdrop.draw().shape == (64, 64, 3)
    other = masklam.Backdrop.tie(actions, 6)[0]
    assert not np.allclose(other, backdrop.projection)


# -- video and windows ---------------------------------------------------------------------------


def test_recorded_episodes_replay_exactly(tmp_path):
    frames = masklam.record(TINY, tmp_path)
    video = Video.open(tmp_path / "heldout")
    assert frames == 8 * 12 and (video.length == 12).all()
    assert len(Video.open(tmp_path / "training").length) == 4
    env = masklam.make_env(TINY)
    frame, info = env.reset(seed=masklam.episode_seed(TINY, "heldout", 1))
    for t in range(12):
        assert (video.frames[1, t] == frame).all() and (video.masks[1, t] == info["mask"]).all()
        np.testing.assert_allclose(video.states[1, t], info["state"], rtol=1e-6)
        frame, reward, _, _, info = env.step(video.actions[1, t] * env.action_space.high)
        assert abs(masklam.moving_reward(reward, info) - video.rewards[1, t]) < 1e-4
        assert (info["distractor"] == video.distractor[1, t]).all()
    assert abs(video.actions).max() <= 1 and video.demonstration.tolist() == [True, False]
    modified = os.stat(tmp_path / "training" / "frames.npy").st_mtime
    assert masklam.record(TINY, tmp_path) == 0  # everything is there already
    assert os.stat(tmp_path / "training" / "frames.npy").st_mtime == modified


def test_demonstrations_are_quiet_and_explorations_are_not(tmp_path):
    masklam.record(replace(TINY, steps=40), tmp_path)
    video = Video.open(tmp_path / "training")
    noise = video.actions - video.intended  # what clipping has left of it
    inner = (abs(video.intended) < 0.5) & (abs(video.actions) < 1)
    quiet = video.demonstration[:, None, None] & inner
    assert abs(video.intended).max() <= 1
    assert noise[quiet].std() < TINY.demonstration_noise
    assert noise[inner & ~quiet].std() > 0.5 * masklam.TASKS["cheetah"].noise
    expert, high = masklam.load_expert("cheetah"), np.ones(6)
    for state, intended in zip(video.states[0], video.intended[0]):
        expected = masklam.expert_action(expert, state, high)
        np.testing.assert_allclose(intended, expected, atol=1e-3)


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_the_recorded_background_has_the_correlation_and_speed_that_were_asked_for(rho, tmp_path):
    config = replace(TINY, episodes=20, steps=40, correlation=rho)
    masklam.record(config, tmp_path)
    for split, expected in (("training", rho), ("decorrelated", 0.0)):
        video = Video.open(tmp_path / split)
        moves = video.valid[:, 1:]
        projection, mean = masklam.tied_background(replace(config, correlation=0))
        drive = (video.actions[:, :-1][moves] - mean) @ projection.T
        velocity = video.distractor[:, :-1][moves]
        correlation = [np.corrcoef(d, v)[0, 1] for d, v in zip(drive.T, velocity.T)]
        assert np.mean(correlation) == pytest.approx(expected, abs=0.15)
        assert velocity.std() == pytest.approx(masklam.Backdrop.SPEED, rel=0.2)


def test_windows_equal_a_naive_loop_at_every_episode_edge():
    video = random_video()
    windows = Windows(video)
    expected = [(e, t) for e in range(5) for t in range(video.length[e] - 1)]
    assert list(zip(windows.e, windows.t)) == expected
    for k in (1, 2, 3, 10):
        obs, future_obs, next_obs, mask = windows.batch(np.arange(len(windows)), k)
        for i, (e, t) in enumerate(expected):
            last = video.length[e] - 1
            reach = min(k, last - t)
            wanted = [max(t + d, 0) for d in (-2, -1, 0)] + [
                max(t + reach + d, 0) for d in (-2, -1, 0)] + [t + 1]
            got = torch.cat([obs[i], future_obs[i]]).numpy()
            assert (got == [video.frames[e, s] for s in wanted[:6]]).all()
            target = video.frames[e, t + 1].transpose(2, 0, 1) / 255 - 0.5
            np.testing.assert_allclose(next_obs[i], target, atol=1e-6)
            np.testing.assert_allclose(mask[i, 0], video.masks[e, t + 1] / 255, atol=1e-6)
    assert torch.equal(windows.obs(np.arange(len(windows))), obs)
    assert set(windows.e[windows.demonstrations()]) == {0, 4}  # two has one frame


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
    plain, windows = Windows(video), Windows(video, mask_input=True)
    chosen = np.arange(len(windows))
    obs, future_obs, next_obs, mask = windows.batch(chosen, 2)
    for seen, frames, first in ((obs, plain.batch(chosen, 2)[0], 0),
                                (future_obs, plain.batch(chosen, 2)[1], 3)):
        assert torch.equal(seen[..., :3], frames)
        index = torch.from_numpy(windows.index(chosen, 2))[:, first:first + 3]
        assert torch.equal(seen[..., 3], windows.masks[index])
    assert torch.equal(next_obs, plain.batch(chosen, 2)[2])
    assert torch.equal(mask, plain.batch(chosen, 2)[3])
    assert torch.equal(windows.obs(chosen), obs)


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
    points = torch.tensor([[[0.5, 0.42]]]) * 256, torch.ones(1, 1, dtype=torch.int)
    box = torch.tensor([[0.05, 0.1, 0.95, 0.9]]) * 256
    optimizer, rng = torch.optim.AdamW(sam.parameters()), np.random.default_rng(0)
    for step in range(70):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20, (71 - step) / 30)
        batch = rng.integers(len(images), size=8)
        embeddings = sam.image_encoder(sam.preprocess(images[batch].permute(0, 3, 1, 2)))
        loss = 0
        for embedding, mask in zip(embeddings.split(1), truth[batch]):
            sparse, dense = sam.prompt_encoder(points=points, boxes=box, masks=None)
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
    candidates, scores = masklam.segment(predictor, frames, (), tmp_path / "partial")
    assert candidates.shape == (36, 3, 64, 64) and scores.shape == (36, 3)
    chosen = candidates[np.arange(36), masklam.choose_masks(candidates, scores)]
    iou = masklam.mask_iou(chosen * np.uint8(255), truth)
    assert iou >= 0.7, iou
    predictor.model.image_encoder = None  # what is done is not done again
    again, _ = masklam.segment(predictor, frames, (), tmp_path / "partial")
    assert (again == candidates).all()


def test_prompts_are_points_on_and_off_the_agent():
    seen = {}

    class Predictor:
        transform, device, features = SamPredictor(small_sam()).transform, torch.device("cpu"), None

        def set_torch_image(self, pixels, size):
            self.features = torch.zeros(1, 64, 16, 16)

        def predict(self, points, labels, box):
            seen.update(points=points.tolist(), labels=labels.tolist(), box=box)
            return np.zeros((3, 64, 64), bool), np.zeros(3, np.float32), None

    masklam.segment(Predictor(), np.zeros((1, 64, 64, 3), np.uint8), ("3,40", "-12,30"))
    assert seen == dict(points=[[3, 40], [12, 30]], labels=[1, 0], box=None)
    config, _ = masklam.parse(["--prompt", "3,40", "--prompt", "-12,30"])
    assert config.prompt == ("3,40", "-12,30")


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


def damaged(path, tmp_path, kind):
    bad = tmp_path / f"{kind}.pth"
    if kind == "architecture":
        torch.save(small_sam(width=64).state_dict(), bad)
    elif kind != "missing":
        content = path.read_bytes()
        bad.write_bytes(content[:len(content) // 2] if kind == "truncated" else b"<html>404")
    return bad


@pytest.mark.parametrize("kind", ["architecture", "truncated", "html", "missing"])
def test_a_file_that_is_no_checkpoint_gets_one_line(kind, fitted_sam, small_registry, tmp_path):
    bad = damaged(fitted_sam, tmp_path, kind)
    with pytest.raises(masklam.UserError, match="no checkpoint of vit_b") as error:
        masklam.load_sam("vit_b", str(bad), "cpu")
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def served(fitted_sam, tmp_path, monkeypatch):
    """SAM's official address is a server on this machine, torch's hub cache an empty folder."""
    content = fitted_sam.read_bytes()
    good = f"sam_vit_b_{hashlib.sha256(content).hexdigest()[:6]}.pth"
    site = {good: content, "sam_vit_b_000000.pth": content, "sam_vit_b_111111.pth": b"<html>"}

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
    monkeypatch.setitem(masklam.SAM_FILES, "vit_b", good)
    yield good
    server.shutdown()


def test_the_checkpoint_is_downloaded_once_and_then_found(served, small_registry, monkeypatch):
    assert not masklam.sam_path("vit_b").exists()
    masklam.load_sam("vit_b", "", "cpu")
    assert masklam.sam_path("vit_b").exists()
    monkeypatch.setattr(masklam, "SAM_URL", "http://127.0.0.1:9/")
    masklam.load_sam("vit_b", "", "cpu")


@pytest.mark.parametrize("kind, named", [("000000", "invalid hash"), ("111111", "invalid hash"),
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
        monkeypatch.setitem(masklam.SAM_FILES, "vit_b", f"sam_vit_b_{kind}.pth")
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
    torch.nn.init.constant_(student.head.bias, -100)
    monkeypatch.setattr(masklam, "train_student", lambda *_: student)
    config = replace(SMOKE, masks="student", keyframes=4)
    with pytest.raises(masklam.UserError, match="student"):
        masklam.segment_videos(config, {"training": random_video(size=16)}, torch.device("cpu"))


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
    idm, fdm = masklam.make_lam(config, 0)
    count = lambda module: sum(p.numel() for p in module.parameters())
    x4, x6 = (64, 128, 128), (96, 192, 192)
    assert count(idm) == encoder(18, x4) + (128 * 64 + 1) * 128
    decoder = sum(4 * conv(w, w, 3) + conv(w, below, 3)
                  for w, below in ((192, 192), (192, 96), (96, 96))) + conv(96, 3, 3)
    assert count(fdm) == encoder(9, x6) + 129 * 192 * 64 + conv(384, 192, 1) + decoder
    obs = torch.zeros(2, 3, 64, 64, 3, dtype=torch.uint8)
    assert idm(obs, obs).shape == (2, 128)
    prediction = fdm(obs, torch.zeros(2, 128))
    assert prediction.shape == (2, 3, 64, 64) and abs(prediction).max() <= 0.5


def test_the_laptops_networks_move_pixels_and_hidden_adds_a_layer():
    config = Config()
    idm, fdm = masklam.make_lam(config, 0)
    assert [type(layer) for layer in idm.head] == [torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear]
    obs = torch.randint(0, 256, (1, 3, 64, 64, 3), dtype=torch.uint8)
    z = torch.zeros(1, config.latent_dim)
    still = fdm(obs, z)
    assert idm(obs, obs).shape == (1, 32) and still.shape == (1, 3, 64, 64)
    other = obs.clone()
    other[0, :, 30, 30] = 255 - other[0, :, 30, 30]
    reach = torch.nonzero((fdm(other, z) != still)[0].any(0))
    patch = config.patch  # further than the patch that the pixel lies in
    assert (reach.amax(0) - reach.amin(0) >= 2 * patch).all()


def tiny_windows():
    return Windows(random_video(E=5, T=9, size=32))


def test_lapo_is_masklam_with_background_weight_one(tmp_path):
    config = replace(TINY, frame_size=32)
    a = masklam.train_lam(config, tiny_windows(), 1.0)
    b = masklam.train_lam(config, tiny_windows(), 1.0, "masklam")
    assert all(torch.equal(x, y) for x, y in zip(a[0].parameters(), b[0].parameters()))
    c = masklam.train_lam(config, tiny_windows(), 0.0)
    assert not all(torch.equal(x, y) for x, y in zip(a[0].parameters(), c[0].parameters()))


def test_resumed_training_equals_uninterrupted(tmp_path, monkeypatch):
    config = replace(TINY, frame_size=32)
    whole = masklam.train_lam(config, tiny_windows(), 0.0)
    clock = iter(range(0, 10**6, 40))  # every step is half a minute later: saves each time
    monkeypatch.setattr(masklam.time, "monotonic", lambda: next(clock))

    class Killed(Exception):
        pass

    def kill(idm, calls=[]):
        calls.append(1)
        if len(calls) == 7:
            raise Killed
        return 0.0

    with pytest.raises(Killed):
        masklam.train_lam(config, tiny_windows(), 0.0, "lam", kill, tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint").exists()
    resumed = masklam.train_lam(config, tiny_windows(), 0.0, "lam", None, tmp_path / "checkpoint")
    assert all(torch.equal(x, y) for x, y in zip(whole[0].parameters(), resumed[0].parameters()))
    assert [h[:2] for h in whole[2]] == [h[:2] for h in resumed[2]]


def test_a_loss_that_is_not_finite_is_an_error():
    weight = torch.nn.Linear(1, 1)
    with pytest.raises(masklam.UserError, match="the loss of lapo is nan"):
        masklam.train([weight], lambda step: weight.weight.sum() / 0 * 0, 20, 1e-3, "lapo")


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
    video = Video(shown[..., None].repeat(3, -1), masks, np.full(E, T), actions, 0 * actions, blank,
                  blank[..., None], distractor, blank[:, 0] == 0)
    parts = slice(0, 40), slice(40, 50), slice(50, 60)
    windows = [Windows(Video(*(getattr(video, f.name)[part] for f in fields(Video))))
               for part in parts]
    config = replace(TINY, frame_size=16, latent_dim=1, lam_updates=150, batch_size=64, lam_lr=3e-3)
    got = {}
    for method, weight in (("lapo", 1.0), ("masklam", 0.0)):
        idm, _, history = masklam.train_lam(config, windows[0], weight)
        assert history[-1][1] < 0.5 * history[0][1]
        got[method] = masklam.probe(functools.partial(masklam.latents, idm), *windows)
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
    noise_share = windows[0].noise().var(0) / (windows[0].noise().var(0) + 1)  # both are random
    assert linear["probe_nmse_noise"] == pytest.approx(0.5, abs=0.1), noise_share
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
    windows = Windows(random_video())
    chosen = np.arange(len(windows))
    got = masklam.next_background(windows, chosen).reshape(-1, 3, 4, 4)
    for i in (0, 3, len(windows) - 1):
        e, t = windows.e[i], windows.t[i] + 1
        frame, mask = (x[e, t, 2:4, 4:6] for x in (windows.video.frames, windows.video.masks))
        weight = 255 - mask
        expected = np.average(frame.reshape(4, 3), axis=0, weights=weight.reshape(4))
        np.testing.assert_allclose(got[i, :, 1, 2], expected, rtol=1e-5)


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

    def forward(self, obs, future_obs):
        seen = torch.stack([obs[:, -1, 0, 0, 0], obs[:, -1, -1, 0, 0]], 1) / 255 - 0.5
        return 1e-3 * seen @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]])


def test_cloning_and_decoding_recover_a_visible_action():
    windows = painted_windows()
    config = replace(PAINTED, latent_dim=2)
    labelled = masklam.labelled_windows(config, windows)
    policy = masklam.latent_policy(config, PaintedIDM(), windows, labelled)
    with torch.no_grad():
        got = policy(windows.obs(np.arange(len(windows)))).numpy()
    assert masklam.nmse(got, windows.actions()).mean() < 0.05


def test_labels_are_whole_demonstrations_drawn_at_random():
    windows = painted_windows()
    chosen = masklam.labelled_windows(replace(PAINTED, labels=60), windows)
    episodes = windows.e[chosen]
    assert len(set(chosen)) == 60 and (episodes % 2 == 0).all()
    assert np.bincount(episodes).tolist().count(19) == 3  # of 19 windows each
    other = masklam.labelled_windows(replace(PAINTED, labels=60, seed=1), windows)
    assert set(other) != set(chosen)


def test_decoder_and_labels_only_see_no_other_label():
    windows = painted_windows()
    labelled = masklam.labelled_windows(PAINTED, windows)
    hidden = np.setdiff1d(np.arange(len(windows)), labelled)
    policies = {}
    for secret in (False, True):
        windows.video.actions = windows.video.actions.copy()
        if secret:
            windows.video.actions[windows.e[hidden], windows.t[hidden]] = np.nan
        config = replace(PAINTED, latent_dim=2)
        policies[secret] = (masklam.latent_policy(config, PaintedIDM(), windows, labelled),
                            masklam.clone_labels(PAINTED, windows, labelled))
    for open_policy, blind in zip(policies[False], policies[True]):
        for a, b in zip(open_policy.parameters(), blind.parameters()):
            assert torch.equal(a, b) and a.isfinite().all()


def test_few_labels_are_learnt_from_no_longer_than_serves_the_unseen():
    """Targets without any relation to the inputs: the sooner it stops, the better."""
    rng = np.random.default_rng(0)
    inputs = torch.randn(100, 8)
    targets = rng.standard_normal((100, 2)).astype(np.float32)
    build = lambda: torch.nn.Sequential(torch.nn.Linear(8, 256), torch.nn.ReLU(),
                                        torch.nn.Linear(256, 2))
    config = replace(TINY, batch_size=64)
    network = masklam.regress_few(config, build, lambda b: inputs[torch.from_numpy(b)], targets,
                                  np.arange(100), 1000, 1e-3, "few")
    with torch.no_grad():
        learnt = masklam.nmse(network(inputs).numpy(), targets).mean()
    assert learnt > 0.3  # a thousand updates would know them by heart


# -- pipeline --------------------------------------------------------------------------------------


def test_summary_gives_mean_deviation_and_interval():
    rows = [dict(task="cheetah", seed=s, methods={"lapo": {"probe_nmse": v}})
            for s, v in enumerate((0.5, 0.7, 0.9))]
    got = masklam.summarize(rows)["methods"]["lapo"]["probe_nmse"]
    assert got["mean"] == pytest.approx(0.7) and got["std"] == pytest.approx(0.2)
    assert got["median"] == 0.7 and got["interval"] == pytest.approx(4.30 * 0.2 / 3**0.5)


@pytest.mark.parametrize("flags, named", [
    (["--task", "dog"], ["--task", "'dog'", "cheetah"]),
    (["--task", "CartPole-v1"], ["--task", "'CartPole-v1'", "MuJoCo"]),
    (["--task", "Reacher-v5"], ["--task", "Reacher-v5", "--train-expert"]),
    (["--methods", "lapo", "vae"], ["--methods", "'vae'", "masklam"]),
    (["--preset", "huge"], ["--preset", "'huge'", "laptop"]),
    (["--distractor", "mild"], ["--distractor", "'mild'", "none, low, hard"]),
    (["--labels", "-5"], ["--labels", "-5", "10 to"]),
    (["--correlation", "nan"], ["--correlation", "nan", "0 to 1"]),
    (["--lam-lr", "inf"], ["--lam-lr", "inf", "0 to 1"]),
    (["--labels", "many"], ["--labels", "many"]),
    (["--labels", "60000"], ["--labels is 60000", "10 to 156"]),
    (["--prompt", "32,28", "9,x"], ["--prompt is '9,x'", "x,y"]),
    (["--frame-size", "50"], ["--frame-size", "50", "multiples of 8"]),
    (["--fdm-widths", "8", "8", "8"], ["--fdm-widths", "two numbers"]),
    (["--erode", "9"], ["masks", "empty", "--erode"]),
    (["--out", "/proc/nowhere"], ["--out", "/proc/nowhere", "cannot be written"]),
])
def test_bad_input_gets_one_line_and_status_two(flags, named, tmp_path, capsys):
    until = "mask" if flags[0] == "--erode" else "record"
    flags = ["--preset", "smoke", "--until", until, "--out", str(tmp_path), *flags]
    assert masklam.main(flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("masklam:")]
    assert len(lines) == 1 and all(word in lines[0] for word in named), lines


def test_every_field_and_every_section_changes_the_keys_of_its_stage_and_later_ones(monkeypatch):
    def keys(config=SMOKE):
        return [masklam.cache_key(config, stage, "x") for stage in masklam.STAGES]

    def changed(other):
        return [stage for stage, a, b in zip(masklam.STAGES, keys(), other) if a != b]

    for f in fields(Config):
        value = getattr(SMOKE, f.name)
        new = (*value, "1,1") if isinstance(value, tuple) else value + type(value)(1)
        if f.name == "task":
            new = "hopper"
        first = masklam.STAGES.index(f.metadata["stage"])
        other = keys(replace(SMOKE, **{f.name: new}))
        assert changed(other) == list(masklam.STAGES[first:]), f.name

    source = (HERE / "masklam.py").read_text()
    before, edited = keys(), {"SPEED, PERSISTENCE = 2, 12, 3.5": "record",
                              "5 % warm-up": "mask", "w = mask + background_weight": "lam",
                              "penalty=1e-4": "probe", "labels-only\"": "policy",
                              "t <= 200": "evaluate", "Side-by-side GIF": "report"}
    for words, stage in edited.items():
        assert words in source
        monkeypatch.setattr(masklam.Path, "read_text", lambda _: source.replace(words, "edited"))
        masklam.source_text.cache_clear()
        now = keys()
        monkeypatch.undo()
        masklam.source_text.cache_clear()
        first = masklam.STAGES.index(stage)
        differs = [a != b for a, b in zip(before, now)]
        assert differs == [i >= first for i in range(len(masklam.STAGES))], words


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One smoke run of the command line, from nothing to the table."""
    out = tmp_path_factory.mktemp("runs")
    result = run("--preset", "smoke", "--out", out)
    assert result.returncode == 0, result.stderr[-2000:]
    folder = out / "cheetah-smoke-low-0"
    return folder, result, json.loads((folder / "results.json").read_text())


def test_smoke_run_prints_the_table_and_writes_every_file(smoke):
    folder, result, results = smoke
    assert set(results["methods"]) == {"lapo", "masklam", "oracle", "labels-only", "past-only",
                                       "supervised-idm"}
    probed = {"probe_nmse", "probe_nmse_per_dimension", "probe_nmse_noise",
              "probe_nmse_decorrelated", "leakage_r2"}
    returned = {"return_mean", "return_std", "return_n", "normalized_return", "labels"}
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
    for name in ("summary.png", "rollouts.gif"):
        assert (folder / name).stat().st_size > 1000 and str(folder / name) in result.stdout
    assert "settotalmass" not in result.stdout + result.stderr
    assert not list(folder.rglob("MUJOCO_LOG.TXT")) and not list(folder.rglob("*.tmp"))
    assert not list(folder.rglob("*.partial"))


def test_second_run_reuses_and_a_changed_flag_redoes_only_what_it_touches(smoke):
    folder, _, before = smoke
    cached = {p: p.stat().st_mtime_ns for p in (folder / "cache").glob("*.pt")}
    assert masklam.main(["--preset", "smoke", "--out", str(folder.parent)]) == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / "cache").glob("*.pt")} == cached
    assert json.loads((folder / "results.json").read_text()) == before
    flags = ["--preset", "smoke", "--out", str(folder.parent), "--labels", "40"]
    assert masklam.main(flags) == 0
    now = {p: p.stat().st_mtime_ns for p in (folder / "cache").glob("*.pt")}
    assert {p: now[p] for p in cached} == cached
    added = sorted(p.name.rsplit("-", 1)[0] for p in set(now) - set(cached))
    names = ("labels-only", "lapo", "masklam", "oracle")
    assert added == sorted([f"{stage}-{name}" for stage in ("evaluate", "policy") for name in names]
                           + ["evaluate-expert", "evaluate-random"])


def test_a_finished_run_gives_its_memory_back(smoke):
    folder, _, results = smoke
    config = replace(SMOKE, masks="simulator")
    run = masklam.Run(config, folder, torch.device("cpu"))
    assert run.probe("masklam")["probe_nmse"] == results["methods"]["masklam"]["probe_nmse"]
    gone = weakref.ref(run)
    del run
    assert gone() is None


def test_degraded_masks_leave_lapos_numbers_alone(smoke):
    folder, _, before = smoke
    flags = ["--preset", "smoke", "--out", str(folder.parent), "--dilate", "1", "--occlude", "0.2"]
    cached = set((folder / "cache").glob("*.pt"))
    assert masklam.main(flags) == 0
    results = json.loads((folder / "results.json").read_text())
    assert all(0.1 < iou < 0.8 for iou in results["mask_iou"].values())
    assert set(results["mask_iou"]) == {"training", "heldout", "decorrelated"}
    touched = {p.name.split("-")[0] for p in set((folder / "cache").glob("*.pt")) - cached}
    assert touched == {"mask", "lam", "probe", "policy", "evaluate"}
    lapo = {"leakage_r2": 0}  # what is masked out of the background has changed
    assert results["methods"]["lapo"] | lapo == before["methods"]["lapo"] | lapo
    assert masklam.main([*flags, "--mask-input"]) == 0
    assert before["mask_iou"] == {} and before["mask_source"] == "simulator"


def test_sam_masks_through_the_command_line(smoke, fitted_sam, small_registry, capsys):
    folder, first, _ = smoke
    assert "masks: the simulator's own" in first.stdout and "--masks sam" in first.stdout
    flags = ["--preset", "smoke", "--out", str(folder.parent), "--sam-checkpoint", str(fitted_sam),
             "--keyframes", "16", "--student-updates", "150"]
    assert masklam.main(flags) == 0  # auto: a checkpoint was given
    assert f"masks: sam, from {fitted_sam}" in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert results["mask_source"] == "sam" and results["mask_iou"]["keyframes"] >= 0.6
    assert set(results["mask_iou"]) == {"keyframes", "training", "heldout", "decorrelated"}
    assert (folder / "masks.png").stat().st_size > 1000
    assert masklam.main([*flags, "--mask-input", "--shift", "1", "--methods", "masklam"]) == 0
    shifted = json.loads((folder / "results.json").read_text())["mask_iou"]
    assert shifted["keyframes"] == results["mask_iou"]["keyframes"]
    assert shifted["heldout"] != results["mask_iou"]["heldout"]


def test_damaged_and_foreign_cache_files_are_named(smoke, capsys):
    folder, _, _ = smoke
    probes = (folder / "cache").glob("probe-lapo-*.pt")  # other tests' runs have added some
    path = min(probes, key=lambda p: p.stat().st_mtime_ns)
    good, results = path.read_bytes(), (folder / "results.json").read_bytes()
    foreign = folder / "foreign.pt"
    torch.save({"weights": torch.zeros(3)}, foreign)
    for bad in (good[:len(good) // 2], b"<html>", b"", foreign.read_bytes()):
        path.write_bytes(bad)
        assert masklam.main(["--preset", "smoke", "--out", str(folder.parent)]) == 2
        errors = capsys.readouterr().err.splitlines()
        lines = [line for line in errors if line.startswith("masklam:")]
        assert len(lines) == 1 and str(path) in lines[0]
        assert "--fresh" in lines[0] and (folder / "results.json").read_bytes() == results
    path.write_bytes(good)
    frames = next((folder / "cache").glob("record-video-*/training/frames.npy"))
    content = frames.read_bytes()
    frames.write_bytes(content[:5000])
    assert masklam.main(["--preset", "smoke", "--out", str(folder.parent)]) == 2
    assert str(frames.parent.parent) in capsys.readouterr().err
    frames.write_bytes(content)


def test_a_killed_run_goes_on_where_it_stopped(smoke, tmp_path):
    """SIGINT while recording; the second run ends with the numbers of an uninterrupted one."""
    folder, _, uninterrupted = smoke
    # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, str(HERE / "masklam.py"), "--preset", "smoke",
                                "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("training/length.npy")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "goes on from here" in errors and "Traceback" not in errors
    assert run("--preset", "smoke", "--out", tmp_path).returncode == 0
    results = json.loads((tmp_path / folder.name / "results.json").read_text())
    assert results["methods"] == uninterrupted["methods"]
