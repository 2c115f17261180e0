"""An ensemble of ReLU MLPs in other engines: what `benchmarks.remote` runs in processes of their own.

A module for each engine, which only its own process imports, and `peers`, which makes contestants of them.
Arrays come as in pyens: input [B, I] shared by all members, weights [E, out, in], biases [E, out].
"""
