# SPDX-License-Identifier: Apache-2.0
"""The client's side of the socket: what connectors, REST, the command line and users hold.

May import: backoff, errors, groups, keys, mapping, results, tiers, wire
Threads: a client or a connection belongs to one thread; one thread a process (hangups.py) notices daemons that end.
"""
