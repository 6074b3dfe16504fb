# SPDX-License-Identifier: Apache-2.0
"""The command line: `loracache serve`, and every operation of a daemon as `loracache VERB`.

May import: adapters, audit, batch, client, config, daemon, errors, keys, logs, rest, results, simulator, tiers,
wire
Threads: one. What a command alone needs is imported when it runs.
"""
