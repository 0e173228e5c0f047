"""PPO: its loss in figures worked out by hand, and what must hold of every update whatever the network."""

import math
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from toys import CONTINUOUS, DISCRETE, IMAGE, MULTI, VECTOR, Toy, live

import rl
from rl.algos.ppo import FIGURES, PPO, ActorCritic, Config, loss
from rl.loops import LoopState, on_policy
from rl.rollout import Rollout, RolloutBatch

SMALL = Config(rollout_steps=8, epochs=2, minibatches=4, hidden=(16, 16), features=16, lr=1e-3)
PLAIN = replace(SMALL, normalize_advantage=False)

# --- the loss, by hand ------------------------------------------------------------------------------------------------------

# r       1.5   0.5   1.5   0.5        eps = .2: both sides of the clip ...
# A         2     1    -1    -3        ... under both signs of A
# r A     3.0   0.5  -1.5  -1.5
# clip A  2.4   0.8  -1.2  -2.4
# min     2.4   0.5  -1.5  -2.4        sum -1, so L_policy = 1/4
RATIO = torch.tensor([1.5, 0.5, 1.5, 0.5])
ADVANTAGE = torch.tensor([2.0, 1.0, -1.0, -3.0])
# V         1     2     3     4
# R         0     2     5     4        squares 1 0 4 0, so L_value = 5/8
VALUE = torch.tensor([1.0, 2.0, 3.0, 4.0])
TARGET = torch.tensor([0.0, 2.0, 5.0, 4.0])
# V_old     0     2   2.5     1        value_clip .5: V_clip = .5 2 3 1.5, squares .25 0 4 6.25; max 1 0 4 6.25, L_value = 11.25/8
OLD_VALUE = torch.tensor([0.0, 2.0, 2.5, 1.0])
ENTROPY = torch.tensor([0.5, 0.7, 0.9, 0.3])  # mean .6
OLD = torch.tensor([-1.0, -0.3, -2.0, -0.7])
CLIP = torch.tensor(0.2)


def by_hand(config, log_prob=None, advantage=ADVANTAGE, target=TARGET, value=VALUE):
    log_prob = OLD + RATIO.log() if log_prob is None else log_prob
    return loss(log_prob, OLD, ENTROPY, value, OLD_VALUE, advantage, target, CLIP, config)


def test_the_loss_in_figures_worked_out_by_hand():
    total, figures = by_hand(replace(PLAIN, value_coef=0.5, entropy_coef=0.01))
    kl = (math.log(2.0) - math.log(1.5)) / 2  # mean of (r - 1) - log r: the r - 1 cancel
    assert total.shape == ()
    assert figures.tolist() == pytest.approx([0.25, 0.625, 0.6, kl, 1.0, 0.5], abs=1e-6)
    assert float(total) == pytest.approx(0.25 + 0.5 * 0.625 - 0.01 * 0.6, abs=1e-6)


def test_the_value_loss_with_clipping_takes_the_worse_of_both():
    total, figures = by_hand(replace(PLAIN, value_clip=0.5, value_coef=1.0))
    assert float(figures[1]) == pytest.approx(11.25 / 8, abs=1e-6)
    assert float(total) == pytest.approx(0.25 + 11.25 / 8, abs=1e-6)


def test_each_side_of_the_clip_alone():
    """(A, r, min): only a ratio that moved where the advantage pushes is held."""
    for advantage, ratio, least in [(1, 1.5, 1.2), (1, 0.5, 0.5), (-1, 1.5, -1.5), (-1, 0.5, -0.8), (1, 1.1, 1.1), (-1, 0.9, -0.9)]:
        log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
        one = torch.ones(1)
        total, _ = loss(log_prob, one * 0, one * 0, one * 0, one * 0, one * advantage, one * 0, CLIP, PLAIN)
        assert float(total.detach()) == pytest.approx(-least, abs=1e-6), (advantage, ratio)
        total.backward()
        held = least != pytest.approx(advantage * ratio)
        assert float(log_prob.grad) == pytest.approx(0.0 if held else -advantage * ratio, abs=1e-6), (advantage, ratio)  # type: ignore[arg-type]


def test_advantages_are_normalised_by_mean_and_sample_deviation():
    # A = 1 2 3 6: mean 3, sum of squares 14, sample deviation sqrt(14/3); times r = 1.1 1 1 .9 (no clipping):
    # (-2 x 1.1 - 1 + 0 + 3 x .9) / sqrt(14/3) = -.5 / 2.160247 = -.231455; L_policy = .231455 / 4
    log_prob = OLD + torch.tensor([1.1, 1.0, 1.0, 0.9]).log()
    _, figures = by_hand(SMALL, log_prob, torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert float(figures[0]) == pytest.approx(0.231455 / 4, abs=1e-6)
    # A single sample has no deviation: it stays as it is.
    one = torch.ones(1)
    total, _ = loss(one * 0, one * 0, one * 0, one * 0, one * 0, one * 3, one * 0, CLIP, SMALL)
    assert float(total) == pytest.approx(-3.0)


def test_the_loss_tells_rows_apart():
    """A silent broadcast of [N] against [N, 1] would not."""
    swapped = [1, 0, 2, 3]
    before = float(by_hand(PLAIN)[0])
    assert float(by_hand(PLAIN, target=TARGET[swapped])[0]) != pytest.approx(before, abs=1e-3)
    assert float(by_hand(PLAIN, advantage=ADVANTAGE[swapped])[0]) != pytest.approx(before, abs=1e-3)
    assert float(by_hand(PLAIN, value=VALUE[swapped])[0]) != pytest.approx(before, abs=1e-3)


# --- networks ---------------------------------------------------------------------------------------------------------------

KINDS = [
    pytest.param(VECTOR, DISCRETE, {}, False, id="discrete-fused"),
    pytest.param(VECTOR, DISCRETE, {"fused": False}, False, id="discrete"),
    pytest.param(VECTOR, DISCRETE, {}, True, id="masked-fused"),
    pytest.param(VECTOR, DISCRETE, {"fused": False}, True, id="masked"),
    pytest.param(VECTOR, MULTI, {}, False, id="multi"),
    pytest.param(VECTOR, CONTINUOUS, {}, False, id="continuous-fused"),
    pytest.param(VECTOR, CONTINUOUS, {"fused": False}, False, id="continuous"),
    pytest.param(VECTOR, DISCRETE, {"normalize_obs": True, "normalize_reward": True}, False, id="normalised-fused"),
    pytest.param(VECTOR, CONTINUOUS, {"fused": False, "normalize_obs": True, "normalize_reward": True}, False, id="normalised"),
    pytest.param(VECTOR, DISCRETE, {"lstm_size": 8}, False, id="lstm"),
    pytest.param(VECTOR, DISCRETE, {"lstm_size": 8, "normalize_obs": True}, True, id="lstm-masked-normalised"),
    pytest.param(VECTOR, CONTINUOUS, {"lstm_size": 8}, False, id="lstm-continuous"),
    pytest.param(IMAGE, DISCRETE, {}, False, id="cnn"),
    pytest.param(IMAGE, DISCRETE, {"lstm_size": 8}, False, id="cnn-lstm"),
]


def make(obs_space, action_space, changes, num_envs=8, seed=1, base=SMALL):
    return PPO(obs_space, action_space, num_envs, replace(base, **changes), seed=seed)


@pytest.mark.parametrize("obs_space, action_space, changes, masked", KINDS)
def test_the_first_minibatch_of_a_rollout_has_ratio_one(obs_space, action_space, changes, masked):
    """Else what acted was not what learns: another normalisation, mask or memory. In the second rollout the memory is not empty."""
    agent = make(obs_space, action_space, changes)
    small = "lstm_size" not in changes and obs_space is VECTOR and action_space is not MULTI
    assert (agent.fused is not None) == (small and changes.get("fused", True))
    diary = live(agent, Toy(obs_space, action_space, 8, masked), iterations=3, total=10_000)
    for figures in diary.figures:
        first = dict(zip(FIGURES, figures[0].tolist(), strict=True))
        assert first["max_ratio_error"] < 1e-6
        assert first["clip_fraction"] == 0
    assert all(figures[-1][5] > 1e-5 for figures in diary.figures)  # later ones have not


@pytest.mark.parametrize("obs_space, action_space, changes, masked", KINDS)
def test_every_quantity_of_a_minibatch_is_a_flat_vector(obs_space, action_space, changes, masked):
    agent = make(obs_space, action_space, changes)
    diary = live(agent, Toy(obs_space, action_space, 8, masked))
    lead = (8, 2) if agent.recurrent else (16,)
    for part in diary.parts[0]:
        for name in ("log_prob", "value", "advantage", "target"):
            assert part[name].shape == lead, name
        assert part["action"].shape[len(lead) :] == action_space.shape
    output, value, _ = agent.policy(part["obs"], part.get("memory"), part.get("going"))
    assert value.shape == lead
    assert agent._distribution(output, part.get("mask")).log_prob(part["action"]).shape == lead
    assert agent._distribution(output, part.get("mask")).entropy().shape == lead


def gradients(agent, part, **coefficients):
    """Largest gradient by parameter, of a part of the loss."""
    agent.config = replace(agent.config, **coefficients)
    if agent.fused is not None:
        agent.fused.config = agent.config
        agent.fused.update(part, 0.2)
    else:
        agent.update(part)
    return {name: float(p.grad.abs().max()) for name, p in agent.policy.named_parameters()}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("action_space", [DISCRETE, CONTINUOUS, MULTI])
def test_gradients_reach_only_the_intended_parameters(action_space, fused):
    agent = make(VECTOR, action_space, {"fused": fused, "normalize_advantage": False})
    part = live(agent, Toy(VECTOR, action_space, 8)).parts[0][-1]
    policy = gradients(agent, part, value_coef=0.0, entropy_coef=0.0)
    value = gradients(agent, part | {"advantage": part["advantage"] * 0}, value_coef=0.5, entropy_coef=0.0)
    entropy = gradients(agent, part | {"advantage": part["advantage"] * 0}, value_coef=0.0, entropy_coef=0.01)
    for name in policy:
        assert (policy[name] > 0) == (not name.startswith("critic")), name
        assert (value[name] > 0) == name.startswith("critic"), name
        if action_space is CONTINUOUS:  # a Gaussian's entropy knows nothing of the mean
            assert (entropy[name] > 0) == (name == "log_std"), name
        else:
            assert (entropy[name] > 0) == name.startswith("actor"), name


def test_shared_bodies_learn_from_both():
    for obs_space, changes in ((IMAGE, {}), (VECTOR, {"lstm_size": 8})):
        agent = make(obs_space, DISCRETE, {**changes, "normalize_advantage": False})
        part = live(agent, Toy(obs_space, DISCRETE, 8)).parts[0][-1]
        policy = gradients(agent, part, value_coef=0.0)
        value = gradients(agent, part | {"advantage": part["advantage"] * 0}, value_coef=0.5)
        for name in policy:
            body = not name.startswith(("actor", "critic"))
            assert (policy[name] > 0) == (body or name.startswith("actor")), name
            assert (value[name] > 0) == (body or name.startswith("critic")), name


def test_the_first_policy_is_nearly_uniform():
    agent = make(VECTOR, DISCRETE, {})
    output, _, _ = agent.policy(torch.randn(50, 5))
    assert float((output.detach().softmax(-1) - 1 / 3).abs().max()) < 0.02
    assert float(agent.policy.critic[-1].weight.detach().norm()) == pytest.approx(1.0, abs=1e-5)  # type: ignore[union-attr]
    assert float(make(VECTOR, CONTINUOUS, {"log_std_init": -0.5}).policy.log_std.detach().max()) == -0.5  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype, shape", [(np.uint8, (6,)), (np.float32, (2, 3))])
@pytest.mark.parametrize("lstm_size", [0, 8])
def test_vectors_of_other_kinds(dtype, shape, lstm_size):
    """Memory contents of a console are uint8; some sensors are tables."""
    space = gymnasium.spaces.Box(0, 255, shape, dtype)  # type: ignore[arg-type]
    for action_space in (DISCRETE, MULTI):
        diary = live(make(space, action_space, {"lstm_size": lstm_size}), Toy(space, action_space, 8))
        assert all(torch.isfinite(x) for x in diary.metrics[0].values())
        assert float(diary.figures[0][0][5]) < 1e-5


def test_an_agent_with_memory_has_separate_parts_that_fit():
    with pytest.raises(ValueError, match="minibatches=4 does not fit 3 envs"):
        make(VECTOR, DISCRETE, {"lstm_size": 8}, num_envs=3)
    with pytest.raises(ValueError, match="minibatches=4 does not fit 2 samples"):
        make(VECTOR, DISCRETE, {"rollout_steps": 1}, num_envs=2)


# --- an update --------------------------------------------------------------------------------------------------------------


def numbered(agent, steps=8, envs=8, progress=0.0) -> RolloutBatch:
    """A rollout whose first observation number says which sample it is."""
    g = torch.Generator().manual_seed(3)
    obs = torch.randn(steps, envs, 5, generator=g)
    obs[..., 0] = torch.arange(steps * envs).view(steps, envs) * 0.01
    none = torch.zeros(steps, envs, dtype=torch.bool)
    extras = {"log_prob": torch.full((steps, envs), -1.0986), "value": torch.randn(steps, envs, generator=g)}
    if agent.recurrent:
        extras["state"] = torch.zeros(steps, envs, 2, agent.config.lstm_size)
    action = torch.randint(0, 3, (steps, envs), generator=g)
    reward = torch.randn(steps, envs, generator=g)
    last = torch.zeros(envs, 2, agent.config.lstm_size) if agent.recurrent else None
    return RolloutBatch(obs, None, action, reward, none, none, obs.clone(), obs[0].clone(), None, last, extras, progress)


@pytest.mark.parametrize("changes", [{}, {"fused": False}, {"minibatches": 3}, {"lstm_size": 8}, {"lstm_size": 8, "minibatches": 3}])
def test_every_sample_is_visited_exactly_once_per_epoch(changes):
    agent = make(VECTOR, DISCRETE, {"epochs": 3, **changes})
    diary = live(agent, Toy(VECTOR, DISCRETE, 8))
    diary.learn(numbered(agent))
    parts, orders = diary.parts[-1], []
    assert len(parts) == 3 * agent.config.minibatches
    for epoch in range(3):
        own = parts[epoch * agent.config.minibatches : (epoch + 1) * agent.config.minibatches]
        axis = 1 if agent.recurrent else 0
        numbers = (torch.cat([p["obs"] for p in own], axis)[..., 0] * 100).round().long()
        assert sorted(numbers.flatten().tolist()) == list(range(64))
        orders.append(numbers.flatten().tolist())
        assert max(p["obs"].shape[axis] for p in own) - min(p["obs"].shape[axis] for p in own) <= 1
        if agent.recurrent:  # whole sequences: rows in order of time
            assert (numbers.diff(dim=0) == 8).all()
    assert orders[0] != orders[1] != orders[2]
    # What belongs together stays together.
    values = torch.cat([p["value"].flatten() for p in parts[: agent.config.minibatches]])
    ids = torch.cat([(p["obs"][..., 0] * 100).round().long().flatten() for p in parts[: agent.config.minibatches]])
    assert torch.equal(values, numbered(agent).extras["value"].flatten()[ids])


@pytest.mark.parametrize("fused", [True, False])
def test_learning_rate_and_clip_are_annealed(fused):
    agent = make(VECTOR, DISCRETE, {"anneal_lr": True, "anneal_clip": True, "lr": 0.01, "clip": 0.2, "fused": fused})
    metrics = agent.learn(numbered(agent, progress=0.25))
    assert float(metrics["train/learning_rate"]) == pytest.approx(0.0075)
    assert agent.optimizer.lr == pytest.approx(0.0075)
    assert float(agent._clip) == pytest.approx(0.15)
    still = make(VECTOR, DISCRETE, {"anneal_lr": False, "anneal_clip": False, "lr": 0.01, "fused": fused})
    assert float(still.learn(numbered(still, progress=0.25))["train/learning_rate"]) == pytest.approx(0.01)
    assert float(still._clip) == pytest.approx(0.2)
    # It is the step that shrinks, not just the figure: Adam's first step has the length of the learning rate.
    moved = []
    for progress in (0.0, 0.75):
        agent = make(VECTOR, DISCRETE, {"epochs": 1, "minibatches": 1, "lr": 0.01, "fused": fused})
        before = agent.optimizer.param.detach().clone()
        agent.learn(numbered(agent, progress=progress))
        moved.append(float((agent.optimizer.param.detach() - before).abs().max()))
    assert moved == pytest.approx([0.01, 0.0025], rel=0.05)
    # And the clip: the share of clipped samples is counted against it.
    fractions = []
    for progress in (0.0, 0.999):
        agent = make(VECTOR, DISCRETE, {"anneal_clip": True, "anneal_lr": False, "fused": fused})
        fractions.append(float(agent.learn(numbered(agent, progress=progress))["train/clip_fraction"]))
    assert fractions[0] < fractions[1] > 0.5


@pytest.mark.parametrize("changes", [{}, {"fused": False}])
def test_a_large_divergence_stops_the_epochs(changes):
    base = {"epochs": 5, "lr": 0.05, "anneal_lr": False, **changes}
    counts = {}
    for target in (None, 1e9, 1e-5):
        agent = make(VECTOR, DISCRETE, {**base, "target_kl": target})
        metrics = agent.learn(numbered(agent))
        counts[target] = int(metrics["train/n_updates"])
        assert agent.optimizer.steps == counts[target]
    assert counts == {None: 20, 1e9: 20, 1e-5: 4}


def test_advantages_and_targets_of_a_rollout_by_hand():
    """T = 3, B = 1, gamma = .5, lambda = .5, V = 1 2 3, r = 1 1 1; the value of what follows the last row is V'.

    running on:     delta_2 = 1 + .5 V' - 3            delta_1 = 1 + 1.5 - 2 = .5        delta_0 = 1 + 1 - 1 = 1
                    A_2 = delta_2    A_1 = .5 + A_2/4    A_0 = 1 + A_1/4
    terminated at 1: delta_1 = 1 - 2 = -1 = A_1          A_0 = 1 - 1/4 = .75             A_2 as before
    truncated at 1:  delta_1 = 1 + .5 V(final) - 2 = A_1 A_0 = 1 + A_1/4                 A_2 as before
    """
    changes = {"gamma": 0.5, "gae_lambda": 0.5, "rollout_steps": 3, "minibatches": 1, "epochs": 1, "lr": 0.0}
    agent = make(VECTOR, DISCRETE, changes, num_envs=1)
    final, last = torch.full((5,), 2.0), torch.full((5,), -1.0)
    v_final, v_last = (float(agent.policy(x.view(1, 5))[1].detach()) for x in (final, last))
    assert abs(v_final - v_last) > 0.05
    a2 = 1 + 0.5 * v_last - 3
    cut = 1 + 0.5 * v_final - 2
    wanted = {
        "on": [1 + (0.5 + a2 / 4) / 4, 0.5 + a2 / 4, a2],
        "terminated": [0.75, -1.0, a2],
        "truncated": [1 + cut / 4, cut, a2],
        "both": [0.75, -1.0, a2],
    }
    for how, advantage in wanted.items():
        flag = torch.tensor([[False], [True], [False]])
        none = torch.zeros_like(flag)
        final_obs = torch.full((3, 1, 5), math.nan)
        final_obs[1, 0] = final
        batch = RolloutBatch(
            torch.randn(3, 1, 5), None, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1),
            flag if how in ("terminated", "both") else none, flag if how in ("truncated", "both") else none,
            final_obs, last.view(1, 5), None, None, {"log_prob": torch.full((3, 1), -1.1), "value": torch.arange(1.0, 4.0).view(3, 1)}, 0.0,
        )  # fmt: skip
        diary = live(agent, Toy(VECTOR, DISCRETE, 1))
        diary.learn(batch)
        part = diary.parts[-1][0]
        order = part["value"].argsort()
        assert part["advantage"][order].tolist() == pytest.approx(advantage, abs=1e-5), how
        assert part["target"][order].tolist() == pytest.approx([a + v for a, v in zip(advantage, (1, 2, 3))], abs=1e-5), how


# --- memory -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"normalize_obs": True}])
def test_the_sequence_forward_equals_acting_step_by_step(changes):
    agent = make(VECTOR, DISCRETE, {"lstm_size": 8, **changes, "lr": 0.0})
    torch.manual_seed(0)
    for p in agent.policy.lstm.parameters():  # type: ignore[union-attr]
        p.data.normal_()
    if agent.obs_norm is not None:  # statistics change between rollouts: compare with those at acting
        agent.obs_norm.update(torch.randn(10, 5))
        agent.obs_norm.update = lambda batch: None
    diary = live(agent, Toy(VECTOR, DISCRETE, 8), iterations=2, total=10_000)
    for k, batch in enumerate(diary.batches):
        first = torch.zeros(8, 2, 8) if k == 0 else batch.first_state
        boundary = batch.terminated | batch.truncated
        assert boundary[:-1].any()
        going = torch.cat((torch.ones(1, 8), (~boundary[:-1]).float()))
        obs = agent._normalized(batch.obs)
        with torch.no_grad():
            _, value, states = agent.policy(obs, first, going)
            _, blind, _ = agent.policy(obs, first, torch.ones(8, 8))
        torch.testing.assert_close(value, batch.extras["value"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(states, batch.extras["state"], rtol=1e-5, atol=1e-6)
        assert float((blind - value).abs().max()) > 0.01  # the reset matters
    assert torch.equal(diary.batches[1].first_state, diary.batches[0].last_state)
    assert diary.batches[1].first_state.abs().max() > 0.01
    ended = diary.batches[0].terminated[-1] | diary.batches[0].truncated[-1]
    assert (diary.batches[0].last_state[ended] == 0).all() and ended.any() and not ended.all()


def test_the_bootstrap_at_a_time_limit_uses_the_memory_after_the_step():
    agent = make(VECTOR, DISCRETE, {"lstm_size": 8, "lr": 0.0})
    torch.manual_seed(0)
    for p in agent.policy.lstm.parameters():  # type: ignore[union-attr]
        p.data.normal_()
    batch = live(agent, Toy(VECTOR, DISCRETE, 8)).batches[0]
    following = agent._next_values(batch)
    cuts = batch.truncated.nonzero().tolist()
    assert cuts
    for t, b in cuts:
        ends = (batch.terminated | batch.truncated)[:t, b].nonzero().flatten().tolist()
        start = ends[-1] + 1 if ends else 0
        episode = torch.cat((batch.obs[start : t + 1, b], batch.final_obs[t, b].unsqueeze(0)))  # the whole episode, to its last sight
        with torch.no_grad():
            value = agent.policy(episode.unsqueeze(1), torch.zeros(1, 2, 8))[1][-1, 0]
            forgetful = agent.policy(batch.final_obs[t, b].view(1, 1, 5), torch.zeros(1, 2, 8))[1][0, 0]
        assert float(following[t, b]) == pytest.approx(float(value), abs=1e-5)
        assert abs(float(forgetful - value)) > 1e-3
    running = ~(batch.terminated | batch.truncated)[:-1]
    assert torch.equal(following[:-1][running], batch.extras["value"][1:][running])
    with torch.no_grad():
        beyond = agent.policy(batch.last_obs.unsqueeze(0), batch.last_state)[1][0]
    keep = ~batch.truncated[-1]
    torch.testing.assert_close(following[-1][keep], beyond[keep])


# --- masks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"fused": False}, {"lstm_size": 8}])
def test_what_is_masked_is_never_done(changes):
    env = Toy(VECTOR, DISCRETE, 8, masked=True)
    agent = make(VECTOR, DISCRETE, {**changes, "entropy_coef": 0.01, "rollout_steps": 64})
    diary = live(agent, env, iterations=3, total=10_000)
    assert len(env.actions) == 3 * 64
    for action, mask in env.actions:
        assert mask is not None and mask.gather(1, action.unsqueeze(1)).all()
    assert all(torch.isfinite(x) for metrics in diary.metrics for x in metrics.values())
    assert torch.isfinite(agent.optimizer.param).all()
    # Greedy too.
    obs, only = torch.randn(200, 5), torch.randint(0, 3, (200,))
    assert torch.equal(agent.act(obs, torch.nn.functional.one_hot(only, 3).bool(), None, explore=False).action, only)


# --- state ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("obs_space, action_space, changes, masked", KINDS)
def test_saved_and_restored_an_agent_goes_on_bit_equal(obs_space, action_space, changes, masked):
    def go(agent, env):
        list(on_policy(agent, env, Rollout(env, 8), 128, LoopState()))
        return agent.state_dict()

    agent = make(obs_space, action_space, changes)
    go(agent, Toy(obs_space, action_space, 8, masked))
    saved = _clone(agent.state_dict())
    wanted = _clone(go(agent, Toy(obs_space, action_space, 8, masked, seed=7)))
    other = make(obs_space, action_space, changes, seed=99)
    other.load_state_dict(saved)
    got = go(other, Toy(obs_space, action_space, 8, masked, seed=7))
    assert _equal(got, wanted) and not _equal(got, saved)


def _clone(tree):
    return {k: _clone(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.clone() if isinstance(tree, torch.Tensor) else tree


def _equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_acting_without_exploring_changes_nothing():
    agent = make(VECTOR, CONTINUOUS, {"normalize_obs": True, "normalize_reward": True})
    live(agent, Toy(VECTOR, CONTINUOUS, 8))
    before = _clone(agent.state_dict())
    first = agent.act(torch.randn(8, 5) * 100, explore=False).action
    for _ in range(5):
        agent.act(torch.randn(30, 5) * 100, explore=False)
    assert _equal(agent.state_dict(), before)
    assert first.shape == (8, 2)


def test_two_agents_of_one_seed_are_equal_and_of_two_are_not():
    runs = []
    for seed in (1, 1, 2):
        agent = make(VECTOR, DISCRETE, {}, seed=seed)
        live(agent, Toy(VECTOR, DISCRETE, 8), iterations=2)
        runs.append(agent.optimizer.param.detach().clone())
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


# --- learning, in seconds ---------------------------------------------------------------------------------------------------


def learn_in(env, config, iterations, seed=0):
    torch.set_num_threads(1)
    agent = PPO(env.single_observation_space, env.single_action_space, env.num_envs, config, seed=seed)
    env.reset(seed)
    rollout = Rollout(env, config.rollout_steps)
    total = iterations * config.rollout_steps * env.num_envs
    returns = [p.episode_returns.mean() for p in on_policy(agent, env, rollout, total, LoopState()) if len(p.episode_returns)]
    return agent, float(returns[-1])


IDENTITY = Config(rollout_steps=20, epochs=4, minibatches=2, lr=3e-3, hidden=(32,), gamma=0.5)


@pytest.mark.parametrize(
    "name, changes, random, bar",
    [
        ("Identity", {}, 2.5, 9.8),
        ("Identity", {"fused": False}, 2.5, 9.8),
        ("Identity", {"lstm_size": 16, "hidden": ()}, 2.5, 9.5),
        ("IdentityMultiDiscrete", {}, 2.92, 9.8),
        ("IdentityContinuous", {"log_std_init": -1.0}, -6.67, -0.05),
        ("IdentityContinuous", {"fused": False, "log_std_init": -1.0, "normalize_obs": True, "normalize_reward": True}, -6.67, -0.05),
    ],
)
def test_identity_is_learnt(name, changes, random, bar):
    from rl.evaluation import evaluate

    env = rl.make_vec(name, 32, seed=1)
    test_env = rl.make_vec(name, 100)
    config = replace(IDENTITY, **changes)
    untrained = PPO(env.single_observation_space, env.single_action_space, 32, config)
    assert evaluate(untrained, test_env, 100, seed=3).mean < random + 0.6 * (bar - random)
    agent, _ = learn_in(env, config, 60)
    assert evaluate(agent, test_env, 100, seed=3).mean > bar


class Merged:
    """Reports a time limit as an end of the task, as many implementations do: what must not be done."""

    def __init__(self, env):
        self.env = env

    def __getattr__(self, name):
        return getattr(self.env, name)

    def step(self, action):
        step = self.env.step(action)
        return step._replace(terminated=step.terminated | step.truncated, truncated=torch.zeros_like(step.truncated))


def value_taking_cuts_for_ends(gamma, gae_lambda, limit=20):
    """The V at which the mean advantage over an episode's steps is 0, when its last step seems to be followed by nothing."""

    def mean_advantage(v):
        a, total = 0.0, 0.0
        for k in range(limit):  # from the last step back
            a = (1 - v if k == 0 else 1 + gamma * v - v) + gamma * gae_lambda * a
            total += a
        return total / limit

    return mean_advantage(0) / (mean_advantage(0) - mean_advantage(1))  # it is linear in v


@pytest.mark.parametrize("gae_lambda, changes", [(0.0, {}), (0.95, {}), (0.95, {"fused": False})])
def test_the_value_of_what_never_ends(gae_lambda, changes):
    """Reward 1 for ever, cut every 20 steps without the time in sight: V = 1 / (1 - gamma) = 10.

    Taking the cut for an end, one-step targets lead to 1 / (1 - .9 x 19/20) = 6.90, and longer ones lower still.
    """
    broken = value_taking_cuts_for_ends(0.9, gae_lambda)
    assert broken == pytest.approx(1 / (1 - 0.9 * 19 / 20) if gae_lambda == 0 else 6.25, rel=1e-3)
    config = Config(
        rollout_steps=20, epochs=8, minibatches=1, lr=1e-2, gamma=0.9, gae_lambda=gae_lambda, hidden=(16,), max_grad_norm=1e9, **changes
    )
    values = []
    for wrap in (lambda env: env, Merged):
        agent, _ = learn_in(wrap(rl.make_vec("NeverEnding", 8, seed=1)), config, 100)
        values.append(float(agent.policy(torch.ones(1, 1))[1].detach()))
    assert values[0] == pytest.approx(10.0, rel=0.02)
    assert values[1] == pytest.approx(broken, rel=0.03)


def test_the_network_says_what_it_can_act_in():
    with pytest.raises(TypeError, match="not supported"):
        ActorCritic(VECTOR, gymnasium.spaces.Text(3), SMALL, torch.Generator())
