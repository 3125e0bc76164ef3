"""sb3-contrib's RecurrentPPO learns CartPole without its velocities, on our LSTM and without a time loop.

    python examples/torch/recurrent_ppo.py              60,000 frames
    python examples/torch/recurrent_ppo.py --variant torch.nn

Needs ``pip install sb3-contrib``. What differs from plain sb3-contrib is ``fusedrnn.torch.patched()`` around
the constructor and, for the time loop, ``ResetPolicy``. bench/recurrent_ppo.py times the three variants.
"""

from __future__ import annotations

import argparse

import gymnasium
from sb3_contrib import RecurrentPPO
from sb3_contrib.ppo_recurrent import MlpLstmPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

import fusedrnn.torch

VARIANTS = ("torch.nn", "fusedrnn", "fusedrnn, reset")


class Positions(gymnasium.ObservationWrapper):
    """Cart position and pole angle alone: the velocities are for the LSTM to find out."""

    def __init__(self, env):
        super().__init__(env)
        space = env.observation_space
        self.observation_space = gymnasium.spaces.Box(space.low[::2], space.high[::2], dtype=space.dtype)

    def observation(self, observation):
        return observation[::2]


class ResetPolicy(MlpLstmPolicy):
    """One call for a whole batch of sequences, where sb3-contrib steps through time if any episode starts."""

    @staticmethod
    def _process_sequence(features, lstm_states, episode_starts, lstm):
        n_seq = lstm_states[0].shape[1]
        x = features.reshape(n_seq, -1, lstm.input_size).swapaxes(0, 1)
        reset = episode_starts.reshape(n_seq, -1).swapaxes(0, 1)
        y, lstm_states = lstm(x, lstm_states, reset=reset)
        return y.swapaxes(0, 1).flatten(0, 1), lstm_states


def build(variant, seed, **options):
    """A model with 8 environments. A seed draws the same weights, actions and batches in every variant."""
    env = VecMonitor(DummyVecEnv([lambda: Positions(gymnasium.make("CartPole-v1"))] * 8))
    policy = ResetPolicy if variant == "fusedrnn, reset" else MlpLstmPolicy
    if variant == "torch.nn":
        return RecurrentPPO(policy, env, seed=seed, device="cpu", **options)
    with fusedrnn.torch.patched():
        return RecurrentPPO(policy, env, seed=seed, device="cpu", **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, default=VARIANTS[-1])
    parser.add_argument("--frames", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    build(options.variant, options.seed, verbose=1).learn(options.frames, log_interval=5)


if __name__ == "__main__":
    main()
